"""Other implementations of the stages' steps, written from each project's description."""
