"""Slurm: what is submitted, how jobs are followed, and what a machine lacks."""
