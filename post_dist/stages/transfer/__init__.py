"""Stage 3, the provider: transfer soft prompts to the large LLM with public text."""
