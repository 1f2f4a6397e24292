"""The run file: its schema, its loading, and the DeepSpeed settings that follow from it."""
