"""Choose the settings of a private run for the time that there is.

The choice depends on how fast the machine is at that moment. A run that resumes must take the same
steps. So the speed is measured once and written down.
"""

import json
import logging
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from post_dist.artifacts.run_folder import influential_settings
from post_dist.artifacts.strict_json import read_dataclass
from post_dist.config.schema import RunConfig
from post_dist.errors import InputError
from post_dist.files import digest_of, write_file
from post_dist.privacy.suggested_settings import (
    FEW_GRADIENTS,
    LEAST_GRADIENTS,
    PROMPT_SETTINGS,
    suggested_plan,
)
from post_dist.runtime.distributed import World
from post_dist.runtime.private_process import owner_only
from post_dist.stages.tune.speed import TuningSpeed, measure_speed
from post_dist.stages.tune.stage import check_settings
from post_dist.stages.tune.tuned_model import TunedModel

log = logging.getLogger(__name__)

_MOST_GRADIENTS = 1e12
_HALVINGS = 60


def settings_for_minutes(
    config: RunConfig, model: TunedModel, minutes: float, world: World
) -> dict[str, Any]:
    """Choose the settings of a private run that takes some minutes on this machine.

    Args:
        config: the run file. Its batch size and its steps do not matter.
        model: the model that is tuned.
        minutes: time for the steps, and for reading the examples where a head needs that.
        world: the ranks. Rank 0 alone measures.

    Returns:
        `gradients_per_second`, as measured; and `settings`: the value of each field of the run
        file, such as `privacy.steps`.

    Raises:
        ArtifactRefused: the public prompt does not belong to the model.
        InputError: there is no private run to plan, too little time for one, or the settings do
            not suit the model.
        Interrupted: the process was asked to stop.
    """
    _refuse(config, minutes)
    # The speed is that of the prompt which will be tuned.
    of_prompt = _left_open(config, model)
    config = _with_prompt_length(config, of_prompt)
    check_settings(config, model, world)
    speed = _speed(config, model, world)
    plan = plan_for(config, speed, minutes)
    return {
        "gradients_per_second": speed.gradients_per_second,
        "settings": {**plan, **of_prompt},
    }


def _refuse(config: RunConfig, minutes: float) -> None:
    """Refuse a run file that has no private run, or one whose time cannot be known."""
    config.need_task("private_task")
    if not math.isfinite(minutes):
        raise InputError(f"minutes must be a finite number, not {minutes}")
    if not config.privacy.enabled:
        raise InputError(
            "minutes are planned for a private run only",
            "set privacy.enabled: true and privacy.target_epsilon, for example 8",
        )
    if config.privacy.clip_quantile is not None:
        raise InputError(
            "minutes do not go with privacy.clip_quantile, which needs large batches",
            "set privacy.steps and privacy.expected_batch_size",
        )
    if config.protects_users:
        raise InputError(
            "minutes do not go with private_task.user_column: how many texts a user has is "
            "private, so the time of a step is not known",
            "set privacy.steps and privacy.expected_batch_size",
        )


def _left_open(config: RunConfig, model: TunedModel) -> dict[str, float]:
    """Return the settings of a prompt that the run file leaves open."""
    if config.tune.adapter != "prompt":
        return {}
    # What the owner has written stays as it is.
    given = {f"privacy.{name}" for name in config.privacy.model_fields_set}
    given |= {f"tune.{name}" for name in config.tune.model_fields_set}
    # A public prompt has its own length.
    if model.public_prompt is not None:
        given.add("tune.num_virtual_tokens")
    return {field: value for field, value in PROMPT_SETTINGS.items() if field not in given}


def _with_prompt_length(config: RunConfig, settings: dict[str, float]) -> RunConfig:
    """Return the run file with the length of the prompt that will be tuned."""
    length = settings.get("tune.num_virtual_tokens", config.tune.num_virtual_tokens)
    tune = config.tune.model_copy(update={"num_virtual_tokens": int(length)})
    return config.model_copy(update={"tune": tune})


def _speed(config: RunConfig, model: TunedModel, world: World) -> TuningSpeed:
    """Return the speed of tuning, as an earlier start has measured it if there was one."""
    path = config.output / config.name / f"speed-{_digest(config, model, world)}.json"
    # The private process has no other ranks to wait for.
    alone = replace(world, size=1)

    def measure() -> TuningSpeed:
        if path.exists():
            log.info("tune: the speed is of an earlier start; to measure again, delete %s", path)
            return kept_speed(path)
        speed = measure_speed(config, model, alone)
        # Whatever belongs to a private run is for its owner alone.
        with owner_only():
            text = json.dumps(asdict(speed), indent=2) + "\n"
            write_file(path, lambda partial: partial.write_text(text))
        return speed

    return world.on_main(measure)


def kept_speed(path: Path) -> TuningSpeed:
    """Read a speed that was measured before.

    Raises:
        InputError: the file does not hold one.
    """
    try:
        speed = read_dataclass(path, TuningSpeed)
        if speed.pass_seconds > 0:
            return speed
    except (OSError, ValueError):
        pass
    raise InputError(f"{path} holds no speed", "delete it, and the speed is measured again")


def _digest(config: RunConfig, model: TunedModel, world: World) -> str:
    """Return a short digest of all that the speed depends on."""
    settings = influential_settings(config, "tune")
    # Clipping, noise and accounting take no time to speak of.
    del settings["privacy"]
    gpu = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else None
    return digest_of({"settings": settings, "model": model.digest, "gpu": gpu})[:8]


def plan_for(config: RunConfig, speed: TuningSpeed, minutes: float) -> dict[str, float]:
    """Return the largest plan that the time allows.

    Args:
        config: the run file of a private run.
        speed: the speed of this machine.
        minutes: the time.

    Returns:
        The value of each field of the run file, such as `privacy.steps`.

    Raises:
        InputError: there is too little time.
    """
    examples = _declared_examples(config)
    # A search trains several times, and the time is that of all of them.
    search = config.tune.search
    trials = 1.0 if search is None else search.mean_trials
    beside_steps = examples * speed.reading_seconds + _counting_seconds(config, speed, examples)

    def plan_of(gradients: float) -> dict[str, float]:
        return suggested_plan(config.tune.adapter, gradients, examples)

    def seconds(gradients: float) -> float:
        plan = plan_of(gradients)
        step_seconds = speed.step_seconds(plan["privacy.expected_batch_size"])
        return beside_steps + trials * plan["privacy.steps"] * step_seconds

    if seconds(LEAST_GRADIENTS) > 60 * minutes:
        needed = math.ceil(seconds(LEAST_GRADIENTS) / 60)
        raise InputError(
            f"{minutes:g} minutes are too few for a private run on this machine",
            f"give {needed} minutes or more",
        )
    # The time rises with the number of gradients, so the largest number is found by halving.
    low, high = math.log(LEAST_GRADIENTS), math.log(_MOST_GRADIENTS)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if seconds(math.exp(middle)) > 60 * minutes:
            high = middle
        else:
            low = middle
    gradients = math.exp(low)
    # A head needs so few that it never lacks them.
    if config.tune.adapter != "head" and gradients < FEW_GRADIENTS:
        _warn_of_few(config, gradients)
    plan = plan_of(gradients)
    # With a declared number of examples, the probability follows from the batch size.
    if config.privacy.sampling_probability is not None:
        plan["privacy.sampling_probability"] = plan["privacy.expected_batch_size"] / examples
    return plan


def _counting_seconds(config: RunConfig, speed: TuningSpeed, examples: float) -> float:
    """Return about the longest time that counting right validation examples takes."""
    passes = config.tune.validation_passes
    validation = examples * config.need_task("private_task").validation_per_training
    if config.tune.adapter == "head":
        return passes * validation * speed.reading_seconds
    # A pass without gradients takes less than one with them.
    return passes * validation / speed.gradients_per_second


def _declared_examples(config: RunConfig) -> float:
    """Return the declared number of examples, or that which the sampling probability implies."""
    privacy = config.privacy
    if privacy.declared_examples is not None or privacy.sampling_probability is None:
        return float(privacy.declared_examples or 0)
    return (privacy.expected_batch_size or config.tune.batch_size) / privacy.sampling_probability


def _warn_of_few(config: RunConfig, gradients: float) -> None:
    """Warn that a prompt or another adapter gets too few gradients to learn."""
    has_classes = config.need_task("private_task").response_column is None
    log.warning(
        "tune: there is time for %d gradients of single examples, and with fewer than %d it is "
        "chance what is learned%s",
        gradients,
        FEW_GRADIENTS,
        "; tune.adapter: head needs far less time" if has_classes else "",
    )
