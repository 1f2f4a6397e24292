"""The artifact of `tune`: files, settings and card of a tuned prompt."""

from pathlib import Path
from typing import Any

from post_dist.artifacts.card import write_card
from post_dist.artifacts.prompt import PromptContents, Provenance, write_prompt
from post_dist.artifacts.run_folder import RunFolder
from post_dist.config.schema import RunConfig
from post_dist.models.load import tokenizer_fingerprint
from post_dist.models.tuning_task import TuningTask
from post_dist.stages.tune.tuned_model import TunedModel

_PRIVATE = (
    "A soft prompt that was tuned with differential privacy: epsilon {epsilon:.4g} at delta "
    "{delta:.2g}. The unit is {unit}, and two data sets are neighbors by the relation "
    "{neighbouring_relation}. What this covers, and what not, is below and in `privacy.json`."
)
_SEEDED = (
    "A soft prompt that is NOT private: it was tuned with noise from a seed, "
    "which can be subtracted."
)
_NOT_PRIVATE = (
    "A soft prompt. It was tuned WITHOUT differential privacy and may reveal its training data."
)


def write_tuned_prompt(
    folder: RunFolder, task: TuningTask, contents: PromptContents, model: TunedModel
) -> None:
    """Write the artifact: the prompt, its task, its privacy statement and its model card.

    Args:
        folder: the run folder.
        task: what was tuned.
        contents: the outcome of tuning.
        model: the model that the prompt belongs to.
    """

    def card(artifact: Path) -> None:
        _write_card(artifact, folder.config, contents.privacy, model)

    provenance = Provenance(
        model_name=model.name,
        tokenizer=tokenizer_fingerprint(task.reader.tokenizer),
        parents=_parents(model),
        config=_settings(folder.config, model),
    )
    write_prompt(folder.artifact, contents, provenance, card)


def _parents(model: TunedModel) -> dict[str, str]:
    """Return the digests of the model, and of the public prompt that tuning started from."""
    parents = {"model": model.digest}
    if model.public_prompt is not None:
        parents["public prompt"] = model.public_prompt.manifest.digest
    return parents


def _settings(config: RunConfig, model: TunedModel) -> dict[str, Any]:
    """Return the settings for the artifact's manifest.

    They must not include the number of examples, which is private.
    """
    # The rule of the split is public. The number of examples in each split is private.
    rule = {"split_salt", "validation_share", "test_share", "test_hub_split"}
    private_task = config.need_task("private_task")
    split = {"hash": "sha256", **private_task.model_dump(include=rule)}
    settings: dict[str, Any] = {"tune": config.tune.model_dump(mode="json"), "split": split}
    # The paths of the ledger and its anchor stay with the owner.
    if config.privacy.enabled:
        places = {"ledger", "ledger_anchors"}
        settings["privacy"] = config.privacy.model_dump(mode="json", exclude=places)
    # Whoever gets the prompt must know that its student may be anybody's.
    if model.trusted:
        settings["student_checked"] = False
    return settings


def _used_settings(config: RunConfig, model: TunedModel) -> dict[str, Any]:
    """Return the settings of `tune` that the run has used. No run computes them from the data."""
    # A public prompt replaces the text that the prompt would start from.
    unused = set() if model.public_prompt is None else {"init_text"}
    if not config.privacy.enabled:
        # Only a private run compares its result with its start.
        unused.add("comparison_noise_multiplier")
        return config.tune.model_dump(exclude=unused, exclude_none=True)
    # These take seconds to import, and a private run has imported them.
    from post_dist.privacy.calibration import private_plan
    from post_dist.privacy.private_run import learning_rate

    # The statement has what the plan puts in the place of these.
    unused |= {"steps", "batch_size", "comparison_noise_multiplier"}
    rows = config.tune.model_dump(exclude=unused, exclude_none=True)
    rows["learning_rate"] = learning_rate(config, private_plan(config))
    return rows


def _write_card(
    artifact: Path, config: RunConfig, statement: dict[str, Any] | None, model: TunedModel
) -> None:
    """Write the model card.

    The card of a private prompt includes the plan and the privacy statement.
    """
    rows = _used_settings(config, model)
    notes = {}
    if statement is None:
        summary = _NOT_PRIVATE
        rows["epsilon"] = "none: tuned without differential privacy"
    else:
        summary = _PRIVATE.format(**statement) if statement["private"] else _SEEDED
        # The learning rate of a private run is there already.
        hidden = {"enabled", "ledger", "ledger_anchors", "learning_rate"}
        # Where a setting and the statement have the same name, the statement wins.
        rows |= config.privacy.model_dump(exclude=hidden, exclude_none=True)
        claims = dict(statement)
        notes["What epsilon does not cover"] = claims.pop("not_covered")
        warnings = claims.pop("warnings")
        if warnings:
            notes["Warning"] = warnings
        # A reader would take None for no cost.
        groups = claims["epsilon_for_groups"].items()
        claims["epsilon_for_groups"] = {
            size: "above 200, no promise" if epsilon is None else epsilon
            for size, epsilon in groups
        }
        rows |= claims
        # Nobody is told which of its candidates a search has chosen.
        if config.tune.search is not None:
            for name in config.tune.search.candidates:
                del rows[name]
    write_card(
        artifact,
        f"Soft prompt for {model.title}",
        summary,
        rows,
        library="peft",
        tag="prompt-tuning",
        notes=notes,
    )
