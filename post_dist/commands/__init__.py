"""What the command line can do: each command loads the run file, calls what does the work, and prints. No torch before that."""
