"""Stage 1, the provider: distill the large LLM into a student."""
