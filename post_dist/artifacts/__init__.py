"""What the stages leave behind: run folders, manifests, soft prompts and their model cards."""
