"""Processes, DeepSpeed engines, checkpoints, metrics and progress."""
