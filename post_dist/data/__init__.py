"""Public text for distillation, and labeled tasks with their templates and splits."""
