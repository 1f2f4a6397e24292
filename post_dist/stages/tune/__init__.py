"""Stage 2, the owner: tune a soft prompt on the student with private data."""
