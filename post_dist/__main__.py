"""`python -m post_dist`: the module that torchrun and the deepspeed launcher start."""

from post_dist.cli import main

main()
