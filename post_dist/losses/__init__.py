"""Loss functions of distillation and transfer: pure functions of tensors."""
