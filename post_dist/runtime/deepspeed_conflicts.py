"""Check the run file's `engine.deepspeed` by DeepSpeed's own model of its settings."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pydantic import ValidationError

from post_dist.config.schema import Engine
from post_dist.conflicts import Conflict
from post_dist.errors import InputError, PostDistError, first_line

_PLACE = "engine.deepspeed.zero_optimization"
_REMOVED = "legacy_stage1"
"""A setting that DeepSpeed's model still has. True ends every ZeRO stage with an error."""


def deepspeed_conflicts(engine: Engine) -> list[Conflict]:
    """Find the settings of ZeRO that DeepSpeed does not have, or whose values it refuses."""
    given = engine.deepspeed.zero_optimization if engine.deepspeed else {}
    if not given:
        return []
    # Loaded only where the run file asks for it: a stage of the data owner never gets here.
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    # DeepSpeed also takes `prefetch_bucket_size` for `stage3_prefetch_bucket_size`. A preset with
    # the long name would silently win, so the short one is refused.
    known = set()
    for name, field in DeepSpeedZeroConfig.model_fields.items():
        known.add(field.alias or name)
    found = []
    for key in sorted(given.keys() - known):
        found.append(Conflict(f"{_PLACE}: DeepSpeed has no setting {key}", "leave it out"))
    if given.get(_REMOVED):
        found.append(Conflict(f"{_PLACE}: DeepSpeed has removed {_REMOVED}", "leave it out"))
    values: dict[str, Any] = {key: value for key, value in given.items() if key in known}
    try:
        DeepSpeedZeroConfig(**values)
    except ValidationError as error:
        for problem in error.errors():
            place = ".".join([_PLACE, *map(str, problem["loc"])])
            found.append(Conflict(f"{place}: DeepSpeed says: {problem['msg']}", "change its value"))
    return found


@contextmanager
def naming_deepspeed_settings(engine: Engine) -> Iterator[None]:
    """Name `engine.deepspeed` in the errors with which DeepSpeed refuses settings at its start.

    DeepSpeed's model of its settings does not know which of them go together.

    Raises:
        InputError: DeepSpeed does not start, and the run file has further settings.
    """
    try:
        yield
    except Exception as error:
        # An error of torch or of the machine is a RuntimeError, which a NotImplementedError is too,
        # or an OSError.
        says_unsupported = isinstance(error, NotImplementedError)
        is_other = isinstance(error, RuntimeError | OSError | PostDistError)
        if not engine.deepspeed or (is_other and not says_unsupported):
            raise
        raise InputError(
            f"engine.deepspeed: DeepSpeed does not start with these settings: {first_line(error)}",
            "leave out those that you do not need",
        ) from error
