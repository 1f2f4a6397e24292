"""Differential privacy of the prompt: the plan, and the sampler, clip, noise, accounting and ledger that follow from it."""
