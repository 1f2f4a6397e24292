"""The stages of POST, each a function from a run file to an artifact."""
