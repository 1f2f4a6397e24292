"""Language models with a soft prompt, their loading, and the student cut from a teacher."""
