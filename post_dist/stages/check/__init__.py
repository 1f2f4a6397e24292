"""`post-dist check`: everything that keeps a run file from running, without weights."""
