"""Modes of torch that a caller may have switched on around a call."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def default_modes() -> Iterator[None]:
    """Switch torch's modes of this thread to their defaults, and back at the end.

    Without gradients, nothing trains. With autocast, a stage would compute in another precision
    than its run file says, and make another prompt.
    """
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast("cpu", enabled=False),
        torch.autocast("cuda", enabled=False),
    ):
        yield
