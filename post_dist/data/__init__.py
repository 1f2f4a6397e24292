"""Public text for distillation; labelled tasks with their templates and splits."""
