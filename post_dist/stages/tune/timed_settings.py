"""Choose the settings of a private run for the time that there is, and keep them.

The choice depends on how fast the machine is at that moment. A run that resumes must take the same
steps. So the choice is written down, and read from then on.
"""

import json
import logging
from typing import Any

from post_dist.config.schema import RunConfig
from post_dist.errors import InputError
from post_dist.files import digest_of, write_file
from post_dist.privacy.plan import declared_plan
from post_dist.privacy.suggested_settings import (
    FEW_GRADIENTS,
    LEAST_GRADIENTS,
    suggested_settings,
)
from post_dist.runtime.distributed import World
from post_dist.runtime.private_process import owner_only
from post_dist.stages.tune.speed import TuningSpeed, measure_speed
from post_dist.stages.tune.stage import refuse_settings
from post_dist.stages.tune.tuned_model import TunedModel

log = logging.getLogger(__name__)


def settings_for_minutes(
    config: RunConfig, model: TunedModel, minutes: float, world: World
) -> dict[str, Any]:
    """Choose the settings of a private run that takes some minutes on this machine.

    Args:
        config: the run file. Its own values of these settings do not matter.
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
    _refuse(config)
    refuse_settings(config, model, world)
    # The name says what was asked for, so another question measures again.
    asked = {
        "settings": config.view("tune").model_dump(mode="json"),
        "model": model.digest,
        "minutes": minutes,
    }
    path = config.output / config.name / f"minutes-{digest_of(asked)[:8]}.json"

    def choose() -> dict[str, Any]:
        if path.exists():
            log.info("tune: an earlier start has chosen the settings: %s", path)
            found: dict[str, Any] = json.loads(path.read_text())
            return found
        chosen = _choose(config, model, measure_speed(config, model, world), minutes)
        # Whatever belongs to a private run is for its owner alone.
        with owner_only():
            text = json.dumps(chosen, indent=2) + "\n"
            write_file(path, lambda partial: partial.write_text(text))
        return chosen

    return world.on_main(choose)


def _refuse(config: RunConfig) -> None:
    """Refuse a run file that has no private run, or one whose time cannot be known."""
    config.need_task("private_task")
    if not config.privacy.enabled:
        raise InputError("--minutes plans a private run", "give --epsilon too, for example 8")
    if config.protects_users:
        raise InputError(
            "--minutes does not go with private_task.user_column: how many texts a user has is "
            "private, so the time of a step is not known",
            "set privacy.steps and privacy.expected_batch_size",
        )


def _choose(
    config: RunConfig, model: TunedModel, speed: TuningSpeed, minutes: float
) -> dict[str, Any]:
    """Return the settings for a speed.

    Raises:
        InputError: there is too little time.
    """
    plan = declared_plan(config, noise_multiplier=1.0)
    examples = plan.expected_batch_size / plan.sampling_probability
    # A search trains several times, and the time is that of all of them.
    trials = plan.mean_trials or 1.0
    gradients = speed.gradients_in(60 * minutes, examples) / trials
    if gradients < LEAST_GRADIENTS:
        training_seconds = trials * LEAST_GRADIENTS / speed.gradients_per_second
        needed = examples * speed.reading_seconds + training_seconds
        raise InputError(
            f"{minutes:g} minutes are too few for a private run on this machine",
            f"give {needed / 60:.2g} minutes or more",
        )
    settings = suggested_settings(config.tune.adapter, gradients, examples)
    # With a declared number of examples, the probability follows from the batch size.
    if config.privacy.sampling_probability is not None:
        share = settings["privacy.expected_batch_size"] / examples
        settings["privacy.sampling_probability"] = share
    # A public prompt has its own length.
    if model.public_prompt is not None:
        settings.pop("tune.num_virtual_tokens", None)
    if config.tune.adapter != "head" and gradients < FEW_GRADIENTS:
        log.warning(
            "tune: there is time for %d gradients of single examples, and with fewer than %d it is "
            "chance what a prompt learns; a head behind a public prompt needs none of the model",
            gradients,
            FEW_GRADIENTS,
        )
    return {"gradients_per_second": speed.gradients_per_second, "settings": settings}
