"""The results of the stages: run folders, manifests, soft prompts and their model cards."""
