"""Audit prompts by membership inference, with shadow prompts from the real stages.

Each shadow prompt is tuned by the stage `tune` on half of some private rows, at the epsilon of the
run file, and transferred by the stage `transfer` together with the others. The attack then tries to
tell which rows a prompt was tuned on, from the confidence of the model in them.

Shapes: S shadow prompts, N rows, C classes.
"""

import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from post_dist.artifacts.prompt import read_prompt
from post_dist.artifacts.run_folder import MEMBERSHIP, RunFolder
from post_dist.artifacts.strict_json import read_small
from post_dist.config.privacy import Privacy
from post_dist.config.schema import RunConfig, Stage
from post_dist.config.sources import Task
from post_dist.data.public_text import load_public_texts
from post_dist.data.tasks import Examples, load_examples
from post_dist.errors import ArtifactRefused, EnvironmentFault, InputError, PrivacyRefused
from post_dist.files import digest_of, write_file
from post_dist.privacy.membership import (
    AttackSuccess,
    attack,
    balanced_members,
    confidences,
)
from post_dist.runtime.distributed import World
from post_dist.stages.evaluate.cached_answers import (
    CachedAnswers,
    EvaluationSplit,
    ModelFolders,
    load_answers,
)
from post_dist.stages.pipeline import Pipeline

if TYPE_CHECKING:
    from post_dist.privacy.accounting import Account

log = logging.getLogger(__name__)

_SHADOWS = "shadows"
"""Folder of the shadow prompts, and of the private rows that they are tuned on."""
_RATE = "true_positive_rate_at_1_percent_false"
_FEWEST_SHADOWS = 4
_FEWEST_ROWS = 20


@dataclass(frozen=True)
class MembershipAttack:
    """The size of an attack.

    Attributes:
        shadows: number of shadow prompts.
        rows: number of private rows in the attack. Each shadow prompt is tuned on half of them.
    """

    shadows: int
    rows: int


def audit_membership(
    config: RunConfig, size: MembershipAttack, pipeline: Pipeline, world: World
) -> dict[str, Any]:
    """Attack shadow prompts on the student, and on the large LLM if the run file has a transfer.

    The result is computed from private rows without noise, and no epsilon covers it. The shadow
    prompts are deleted at the end. An interrupted audit goes on with those that are finished.

    Args:
        config: the run file.
        size: number of shadow prompts and rows.
        pipeline: finds the student.
        world: the ranks.

    Returns:
        The numbers of the audit: `student_auc` and others. They are also in the run folder.

    Raises:
        InputError: the attack does not suit the task, there are too few rows, or the student does
            not exist yet.
    """
    _refuse(config, size)
    config.need("tune")
    folder = _folder(config, size, pipeline)
    kept = world.on_main(lambda: finished_result(folder))
    if kept is not None:
        return kept
    if _transfers(config):
        # A hub data set is fetched before any private row is read.
        public_task = config.need_task("public_task")
        world.on_main(partial(load_public_texts, public_task, "public_task"))
    with pipeline.running([folder]):
        shadows = _Shadows(config, size, folder, pipeline, world)
        try:
            result = _attack(config, shadows, world)
        except (InputError, ArtifactRefused, PrivacyRefused):
            # It does not go on, so no private rows may stay behind.
            shutil.rmtree(shadows.folder, ignore_errors=True)
            raise
        world.on_main(lambda: _finish(folder, shadows.folder, result))
    return result


def _refuse(config: RunConfig, size: MembershipAttack) -> None:
    """Refuse a task or a size that the attack is not made for."""
    task = config.need_task("private_task")
    if task.response_column is not None or config.protects_users:
        raise InputError(
            "membership inference asks for one row and its class; this task "
            + ("generates text" if task.response_column is not None else "protects users"),
            "audit the plan with the attack `canaries`",
        )
    if size.shadows < _FEWEST_SHADOWS or size.shadows % 2:
        raise InputError(
            f"{size.shadows} shadow prompts cannot be attacked",
            f"give an even number from {_FEWEST_SHADOWS} on",
        )


def _folder(config: RunConfig, size: MembershipAttack, pipeline: Pipeline) -> RunFolder:
    """Return the folder of the audit. Its name covers all that the result depends on."""
    settings = config.transfer.model_dump(mode="json") if _transfers(config) else None
    inputs = {
        "model": pipeline.student_digest,
        "private_task": pipeline.inputs.data_digest("private_task"),
        "attack": digest_of({"shadows": size.shadows, "rows": size.rows, "transfer": settings}),
    }
    if pipeline.public_prompt is not None:
        inputs["public prompt"] = pipeline.public_prompt.manifest.digest
    if _transfers(config):
        inputs["teacher"] = pipeline.inputs.teacher_digest
        inputs["public_task"] = pipeline.inputs.data_digest("public_task")
    return pipeline.private_folder(config, "tune", inputs, "membership")


def _transfers(config: RunConfig) -> bool:
    """Return whether the run file can transfer prompts."""
    return config.teacher is not None and config.public_task is not None


class _Shadows:
    """The shadow prompts of an audit, each tuned on half of the rows.

    Args:
        config: the run file.
        size: number of shadow prompts and rows.
        audit_folder: the folder of the audit.
        pipeline: finds the student.
        world: the ranks.

    Attributes:
        folder: folder of everything that is deleted at the end.
        task: the task of the run file.
        rows: the rows of the attack.
        members_SN: which rows each shadow prompt is tuned on.
        models: the student, and the large LLM if prompts are transferred to it.
        digests: digests of `student` and `teacher`.
    """

    def __init__(
        self,
        config: RunConfig,
        size: MembershipAttack,
        audit_folder: RunFolder,
        pipeline: Pipeline,
        world: World,
    ) -> None:
        self.folder = audit_folder.path / _SHADOWS
        self._config = config
        self._world = world
        self.task = config.need_task("private_task")
        self.rows = world.on_main(lambda: _choose_rows(self.task, size.rows, config.seed))
        self.members_SN = balanced_members(size.shadows, len(self.rows.texts), config.seed)
        # The shadows share the student and the public prompt of the run. Nobody signs the shadows.
        shared = {
            "student": pipeline.student,
            "public_prompt": pipeline.public_prompt_folder,
            "trusted_keys": (),
        }
        self._inputs = config.inputs.model_copy(update=shared)
        # The copy of an admitted student is no artifact, and would not be admitted again.
        self._admitted = None if config.inputs.student is None else pipeline.inputs
        self.models = ModelFolders(pipeline.student, None)
        self.digests = {"student": pipeline.student_digest}
        if _transfers(config):
            self.models = ModelFolders(pipeline.student, pipeline.inputs.teacher)
            self.digests["teacher"] = pipeline.inputs.teacher_digest

    def tuned(self) -> list[Path]:
        """Tune the shadow prompts on the student, and return their folders."""
        prompts = []
        for number, members_N in enumerate(self.members_SN):
            log.info("membership: shadow prompt %d of %d", number + 1, len(self.members_SN))
            members = self.folder / f"shadow-{number}.jsonl"
            write = partial(_write_rows, members, self.rows, self.task, np.flatnonzero(members_N))
            self._world.on_main(write)
            config = self._shadow_config(number, members)
            # A finished shadow of an interrupted audit is found by its signature.
            stages = self._pipeline(config, "tune")
            prompts.append(stages.tune().artifact)
        return prompts

    def transferred(self, prompts: Sequence[Path]) -> list[Path]:
        """Transfer shadow prompts to the large LLM, and return the folders of the results."""
        # One transfer trains all of them together, so the target is loaded once.
        inputs = self._inputs.model_copy(update={"source_prompt": tuple(prompts)})
        changes = {"output": self.folder, "name": "transfer", "inputs": inputs}
        config = self._config.model_copy(update=changes)
        folders = self._pipeline(config, "transfer").transfer()
        return [folder.artifact for folder in folders]

    def _pipeline(self, config: RunConfig, stage: Stage) -> Pipeline:
        """Return a pipeline of shadows, which runs one stage."""
        return Pipeline(config, self._world, frozenset((stage,)), admitted=self._admitted)

    def cost(self) -> "Account | None":
        """Return what each shadow prompt tells of its rows at most; None without privacy."""
        from post_dist.privacy.accounting import account  # takes a second
        from post_dist.privacy.calibration import private_plan

        config = self._shadow_config(0, self.folder / "rows")
        return account(private_plan(config)) if config.privacy.enabled else None

    def _shadow_config(self, number: int, members: Path) -> RunConfig:
        """Return the run file of one shadow prompt, which is tuned on the rows of a file."""
        # The shadows spend nothing of the real data's budget: nobody else sees them.
        privacy = shadow_privacy(self._config, self.members_SN[number].sum())
        changes = {
            "name": members.stem,
            "output": self.folder,
            "seed": self._config.seed + number,
            "private_task": _task_of(self.task, members),
            "privacy": privacy.model_copy(update={"ledger_anchors": self.folder / "anchors"}),
            "tune": self._config.tune.model_copy(
                update={"search": None, "comparison_noise_multiplier": None}
            ),
            "inputs": self._inputs,
        }
        return self._config.model_copy(update=changes)


def _task_of(task: Task, path: Path) -> Task:
    """Return a task that reads all rows of a file written by `_write_rows`."""
    changes = {
        "path": path,
        "hub": None,
        "test_hub_split": None,
        "text": "{text}",
        "label_column": "label",
        "max_rows": None,
        "validation_share": 0.0,
        "test_share": 0.0,
    }
    return task.model_copy(update=changes)


def shadow_privacy(config: RunConfig, members: int) -> Privacy:
    """Return the plan of a shadow prompt: the same epsilon, steps and batch, for fewer examples."""
    section = config.privacy
    if not section.enabled:
        return section
    from post_dist.privacy.accounting import account  # takes a second
    from post_dist.privacy.calibration import private_plan

    plan = private_plan(config)
    expected = plan.expected_batch_size
    if expected > members:
        raise InputError(
            f"each shadow prompt has {members} examples, and a step expects {expected:g}",
            "give more rows, or set a smaller privacy.expected_batch_size",
        )
    changes = {
        "target_epsilon": section.target_epsilon or account(plan).epsilon,
        "noise_multiplier": None,
        "declared_examples": int(members),
        "target_delta": plan.delta,
        "sampling_probability": None,
        "ledger": None,
        "max_total_epsilon": None,
        # The ledger of the data does not know the shadows. With noise from a seed, each of them
        # says that it is not private, so nobody takes one for a prompt to hand on.
        "noise_source": "seeded",
    }
    return Privacy.model_validate(section.model_dump() | changes)


def _choose_rows(task: Task, wanted: int, seed: int) -> Examples:
    """Choose an even number of rows of the training split at random."""
    examples = load_examples(task, "train", "private_task")
    available = len(examples.texts)
    count = min(wanted, available) // 2 * 2
    if count < _FEWEST_ROWS:
        raise InputError(
            f"membership inference needs {_FEWEST_ROWS} rows or more of the training split"
        )
    chosen = np.random.default_rng(seed).permutation(available)[:count]
    texts = [examples.texts[row] for row in chosen]
    return Examples(texts, [examples.classes[row] for row in chosen], [], [])


def _write_rows(path: Path, rows: Examples, task: Task, chosen: np.ndarray) -> None:
    """Write the chosen rows to a file that the stage `tune` reads."""
    labels = list(task.labels)
    lines = []
    for row in chosen:
        fields = {"text": rows.texts[row], "label": labels[rows.classes[row]]}
        lines.append(json.dumps(fields) + "\n")
    write_file(path, lambda unfinished: unfinished.write_text("".join(lines)))


def _attack(config: RunConfig, shadows: _Shadows, world: World) -> dict[str, Any]:
    """Make the shadow prompts, measure the confidences, and attack."""
    sources = shadows.tuned()
    targets = shadows.transferred(sources) if _transfers(config) else []

    # The models are loaded after all training, so that no two of them are in memory twice.
    split = EvaluationSplit(shadows.task, shadows.rows, digest_of(shadows.rows.texts))
    student, target = load_answers(
        shadows.models, shadows.digests, split, config, shadows.folder / "answers", world
    )
    cost = shadows.cost()
    result: dict[str, Any] = {
        "attack": "lira",
        "shadow_prompts": len(sources),
        "rows": len(shadows.rows.texts),
        "epsilon": None if cost is None else cost.epsilon,
        f"most_{_RATE}": None if cost is None else cost.true_positive_rate,
    }
    result |= _numbers("student", _success(student, sources, shadows))
    if target is not None:
        result |= _numbers("transferred", _success(target, targets, shadows))
    return result


def _success(model: CachedAnswers, prompts: Sequence[Path], shadows: _Shadows) -> AttackSuccess:
    """Attack the prompts of one model."""
    classes_N = np.array(shadows.rows.classes)
    found = []
    for number, folder in enumerate(prompts):
        prompt = read_prompt(folder)
        scores_NC = model.answers(prompt, f"shadow prompt {number + 1} of {len(prompts)}")
        scores_NC = prompt.task.with_biases(scores_NC)
        found.append(confidences(scores_NC.numpy(), classes_N))
    return attack(np.stack(found), shadows.members_SN)


def _numbers(model: str, success: AttackSuccess) -> dict[str, float]:
    """Name the numbers of an attack on the prompts of one model."""
    return {
        f"{model}_auc": success.auc,
        f"{model}_auc_standard_error": success.auc_error,
        f"{model}_{_RATE}": success.true_positive_rate,
    }


def finished_result(folder: RunFolder) -> dict[str, Any] | None:
    """Read the result of a finished audit; None if it is not finished.

    Raises:
        EnvironmentFault: the file is damaged.
    """
    file = folder.path / MEMBERSHIP
    if not file.is_file():
        return None
    # The audit may have been killed before it had deleted all of them.
    shutil.rmtree(folder.path / _SHADOWS, ignore_errors=True)
    try:
        return read_small(file)
    except (OSError, ValueError):
        raise EnvironmentFault(
            f"{file} is damaged", "delete it, and the same command attacks again"
        ) from None


def _finish(folder: RunFolder, shadows: Path, result: dict[str, Any]) -> None:
    """Keep the numbers, and delete the shadow prompts, which no epsilon covers."""
    text = json.dumps(result, indent=2) + "\n"
    write_file(folder.path / MEMBERSHIP, lambda unfinished: unfinished.write_text(text))
    shutil.rmtree(shadows)
