"""`python -m post_dist`, which is also what the deepspeed launcher and torchrun start."""

from post_dist.cli import main

main()
