"""The commands. Each one parses its options, calls the API, and prints the result."""
