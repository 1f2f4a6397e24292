"""The evaluation: a table that compares all ways to use a prompt."""
