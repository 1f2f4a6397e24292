"""Slurm: submit jobs, follow them, and check what a machine lacks."""
