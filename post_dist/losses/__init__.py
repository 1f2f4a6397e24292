"""The losses of distillation and transfer: pure functions of tensors."""
