"""Benchmarks of the stages beside what else one could use, in one process on the same model and batch."""
