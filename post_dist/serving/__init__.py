"""Use a finished prompt: predictions for new texts."""
