"""What a run takes, reckoned before it is queued: sizes, costs, hardware, scaling, and long runs with failures."""
