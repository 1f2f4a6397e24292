"""Private soft-prompt transfer in three stages: distill, tune, transfer (POST, arXiv 2506.16196)."""

__version__ = "0.1.0"
