"""The run file: its schema, its loader, and the DeepSpeed settings that follow from it."""
