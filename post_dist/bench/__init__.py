"""Benchmarks of a stage beside its peers, of a step on many ranks, and of the machine itself."""
