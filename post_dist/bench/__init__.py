"""Benchmarks: of a stage beside what else one could use, of its step on many ranks, and of the machine itself."""
