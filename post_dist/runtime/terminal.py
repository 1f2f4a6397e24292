"""Durations in units that fit them, and bars, for a terminal."""

_UNITS = ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes"))
_BAR_WIDTH = 20


def duration(seconds: float) -> str:
    """Return a duration in the largest unit of which it has one or more, such as `3.2 hours`."""
    for length, unit in _UNITS:
        # 59.96 minutes would be written as 60.0.
        if seconds >= 0.999 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.3g} s"


def bar(share: float) -> str:
    """Return a bar of fixed width that is filled to a share from 0 to 1; more fills it whole."""
    filled = round(_BAR_WIDTH * min(max(share, 0.0), 1.0))
    return "█" * filled + "░" * (_BAR_WIDTH - filled)
