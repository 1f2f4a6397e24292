"""Benchmarks: a stage beside other implementations, a step on many ranks, and the machine."""
