"""The run itself: processes, DeepSpeed engines, checkpoints, metrics and progress."""
