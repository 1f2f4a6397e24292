"""Language models with a soft prompt in front, their loading, and the student that is cut from a teacher."""
