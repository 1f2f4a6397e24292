"""The comparison of all ways to use a prompt."""
