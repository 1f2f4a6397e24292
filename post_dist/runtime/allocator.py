"""Control when glibc returns memory: a block with its own mapping returns when it is freed."""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

_M_MMAP_THRESHOLD = -3
"""glibc's number for the option, from malloc.h."""
_FROM_64_KIB = 1 << 16
_FROM_32_MIB = 1 << 25
"""The largest threshold that glibc's own dynamic rule reaches."""


@contextmanager
def memory_given_back_at_once() -> Iterator[None]:
    """Map every block of 64 KiB or more separately while the body runs.

    Smaller blocks come from the heap, where freed blocks leave holes. Afterwards the threshold is
    32 MiB, or the user's MALLOC_MMAP_THRESHOLD_. It must not stay low: a training step that maps
    each of its tensors takes twice as long (64 private examples: 6.1 s instead of 3.0 s).
    """
    # Only glibc has mallopt.
    mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda option, value: None)
    mallopt(_M_MMAP_THRESHOLD, _FROM_64_KIB)
    try:
        yield
    finally:
        threshold = int(os.environ.get("MALLOC_MMAP_THRESHOLD_", _FROM_32_MIB))
        mallopt(_M_MMAP_THRESHOLD, threshold)
