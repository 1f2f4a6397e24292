"""Slurm: what is submitted, how it is followed, and what a machine lacks."""
