"""Plan a run before it is queued: costs, hardware, scaling, and long runs with failures."""
