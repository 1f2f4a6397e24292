"""Use a tokenizer, which somebody else may have made, in a child process with limits."""

from collections.abc import Callable, Sequence
from typing import Any

from post_dist.errors import ArtifactRefused
from post_dist.runtime.limited_child import ChildFailed, in_limited_child

_MIB = 1 << 20
_LEAST_SECONDS = 60
_SECONDS_PER_MIB = 60
"""An honest tokenizer needs about 2 s for each MiB of long texts."""
_TEXTS_PER_SECOND = 500
_LEAST_MEMORY_BYTES = 512 * _MIB
_MEMORY_FACTOR = 256
"""Bytes of memory for each byte of text. A list of tokens needs about 40."""


def with_limits(work: Callable[[], Any], texts: Sequence[str]) -> Any:
    """Return the result of work with a tokenizer.

    The door tries a tokenizer on a few texts alone. It may hang, crash or fill the memory on
    others, and the message of a library could quote them.

    Args:
        work: the work. Its result must be a JSON value.
        texts: the texts that it reads. They determine the limits.

    Raises:
        ArtifactRefused: the tokenizer crashes on a text, or needs far more time or memory than
            any honest one.
    """
    size = sum(len(text.encode()) for text in texts)
    seconds = _LEAST_SECONDS + _SECONDS_PER_MIB * size // _MIB + len(texts) // _TEXTS_PER_SECOND
    try:
        return in_limited_child(work, seconds, _LEAST_MEMORY_BYTES + _MEMORY_FACTOR * size)
    except ChildFailed:
        raise ArtifactRefused(
            "the model's tokenizer cannot read the texts: it crashes, or needs too much time "
            "or memory",
            "use another model, and ask who made this one",
        ) from None
