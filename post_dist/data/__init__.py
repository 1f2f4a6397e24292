"""Public text for distillation; labelled tasks, their templates and splits."""
