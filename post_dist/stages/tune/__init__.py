"""Stage 2, run by the data owner: tune a soft prompt on the student with private data."""
