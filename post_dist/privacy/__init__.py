"""Differential privacy: the plan, and all that follows from it, down to the training loop."""
