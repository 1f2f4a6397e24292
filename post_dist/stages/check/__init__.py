"""`post-dist check`: find everything that keeps a run file from running, without its weights."""
