"""Run the stages in order. Each reads the results of earlier ones. Finished ones are skipped.

The stages that shard models are imported where they run. They load DeepSpeed, which the private
stages do without.
"""

import logging
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from post_dist.admission.refusal import refusing
from post_dist.artifacts.manifest import ArtifactKind, read_manifest
from post_dist.artifacts.prompt import PUBLIC_PROMPT, SoftPromptArtifact
from post_dist.artifacts.run_folder import RunFolder, run_folder
from post_dist.config.schema import RunConfig, Stage
from post_dist.errors import ArtifactRefused, InputError, PostDistError
from post_dist.models.load import model_name, weights_of
from post_dist.runtime.distributed import World
from post_dist.runtime.logs import log_file
from post_dist.runtime.private_process import forgetting_private_data, owner_only
from post_dist.runtime.watchdog import unwatched
from post_dist.stages.evaluate.cached_answers import ModelFolders
from post_dist.stages.evaluate.rows import (
    PromptVariant,
    TargetPrompt,
    TransferredPrompt,
    target_prompts,
)
from post_dist.stages.evaluate.stage import PromptSet, check_evaluation, evaluate
from post_dist.stages.prompt_origin import check_made_for, is_digest_of, is_transferred
from post_dist.stages.run_inputs import RunInputs, check_inputs
from post_dist.stages.tune.stage import TunedModel, check_tuning, tune

if TYPE_CHECKING:
    from post_dist.stages.transfer.stage import DescribedModels

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _NeededPrompt:
    """A prompt on the target that a row of the table needs.

    Attributes:
        variant: the prompt on the student that this prompt belongs to.
        row: name of the row.
        plan: how the prompt is made.
    """

    variant: PromptVariant
    row: str
    plan: TargetPrompt


class Pipeline:
    """Finds or runs the stages of one run file.

    A finished stage is recognized by its signature and does not run again.

    Args:
        config: the run file.
        world: the ranks.
        may_run: the stages that this command may start. The others must be finished, or their
            artifacts given in `inputs`.
        resume: `auto` resumes an unfinished stage from its checkpoint; `never` starts it anew.
        admitted: the inputs of a run with the same given student, which has passed its checks.

    Attributes:
        inputs: reads what the run file names.
    """

    def __init__(
        self,
        config: RunConfig,
        world: World,
        may_run: frozenset[Stage],
        resume: str = "auto",
        admitted: RunInputs | None = None,
    ) -> None:
        self._config = config
        self._world = world
        self._may_run = may_run
        self._resume = resume
        self.inputs = RunInputs(config, world, admitted)

    def distill(self) -> RunFolder:
        """Find or make the student, and attack it if the run file says so.

        Returns:
            The finished folder of the stage.
        """
        from post_dist.stages.distill.stage import check_distillation, distill

        self._config.need("distill")
        folder = self._student_folder
        teacher = self.inputs.teacher
        if self._unfinished([folder]):
            check_distillation(folder.config, teacher, self._world)
            with self.running([folder]):
                distill(folder, teacher, self.inputs.teacher_digest, self._world, self._resume)
        if self._config.distill.attack_tokens:
            return self._attack(folder)
        return folder

    def _attack(self, student: RunFolder) -> RunFolder:
        """Find or make the student whose manifest tells of attacks."""
        from post_dist.stages.distill.attack import attack
        from post_dist.stages.distill.attack_config import attacks_config
        from post_dist.stages.distill.stage import check_distillation

        # Settings that do not name the layers, such as `auto`, may stand for another student.
        digest = self._world.on_main(lambda: read_manifest(student.artifact, "student").digest)
        inputs = self._distill_inputs | {"student": digest}
        folder = run_folder(attacks_config(self._config), "distill", inputs, label="attack")
        teacher = self.inputs.teacher
        if self._unfinished([folder]):
            check_distillation(folder.config, teacher, self._world)
            with self.running([folder]):
                digest = self.inputs.teacher_digest
                attack(folder, student.artifact, teacher, digest, self._world, self._resume)
        return folder

    def signals(self) -> tuple[Path, int]:
        """Write the teacher's signals that `distill` will read, beside other workers.

        Returns:
            The folder of their files, and the number of files.
        """
        from post_dist.stages.distill.stage import check_distillation, write_signals

        self._config.need("distill")
        teacher = self.inputs.teacher
        # The folder is not made: the signals are beside it.
        folder = self._student_folder
        check_distillation(folder.config, teacher, self._world)
        return write_signals(folder, teacher, self.inputs.teacher_digest, self._world)

    def warm_start(self) -> RunFolder:
        """Find or make the public prompt for the student.

        Returns:
            The finished folder of the stage.
        """
        from post_dist.stages.warm_start.stage import (
            WarmStartModels,
            check_warm_start,
            warm_start,
        )

        self._config.need("warm_start")
        digests = {"teacher": self.inputs.teacher_digest, "student": self.student_digest}
        inputs = digests | {"public_task": self.inputs.data_digest("public_task")}
        folder = run_folder(self._config, "warm_start", inputs)
        if self._unfinished([folder]):
            models = WarmStartModels(self.inputs.teacher, self.student, self._student_name, digests)
            check_warm_start(folder.config, models, self._world)
            with self.running([folder]):
                warm_start(folder, models, self._world, self._resume)
        return folder

    def tune(self) -> RunFolder:
        """Find or make the prompt on the student.

        Returns:
            The finished folder of the stage.
        """
        return self._tune_on_student(self._config)

    def settings_for_minutes(self, minutes: float) -> dict[str, Any]:
        """Choose the settings of a private run on the student for the time that there is.

        Args:
            minutes: the time.

        Returns:
            What `timed_settings.settings_for_minutes` returns.
        """
        from post_dist.stages.tune.timed_settings import settings_for_minutes

        return settings_for_minutes(self._config, self._tuned_student, minutes, self._world)

    def transfer(self) -> list[RunFolder]:
        """Find or make the prompts on the target: one, or those of several owners.

        Returns:
            The finished folder of each, in the order of `inputs.source_prompt`.

        Raises:
            ArtifactRefused: a prompt was refused. The others are transferred nevertheless.
        """
        sources: dict[Path, SoftPromptArtifact] = {}
        refused: list[PostDistError] = []
        several = len(self._source_prompts) > 1
        for folder in self._source_prompts:
            # One owner's prompt must not stop those of the others.
            try:
                source = self._source(folder)
                if several:
                    self._check_one_of_several(folder, source)
                sources[folder] = source
            except ArtifactRefused as error:
                refused.append(error)
        made, failed = self._transfer([(self._config, source) for source in sources.values()])
        folders = [each for each in made if each.path not in failed]
        for folder, run in zip(sources, made, strict=True):
            error = failed.get(run.path)
            if error is not None:
                # One of several is known to its sender by the folder that was sent.
                refused.append(ArtifactRefused(f"{folder}: {error.args[0]}") if several else error)
        if refused and not several:
            raise refused[0]
        if refused:
            reasons = "; ".join(str(error).splitlines()[0] for error in refused)
            raise ArtifactRefused(
                f"{len(refused)} of {len(self._source_prompts)} prompts were refused: {reasons}",
                "the others are transferred: " + ", ".join(str(each.artifact) for each in folders),
            )
        return folders

    def evaluate(self) -> RunFolder:
        """Find or make the comparison table, and what its rows need.

        A data owner's run file has no section `teacher`. The table then has only the rows of the
        student.

        Returns:
            The finished folder of the stage.

        Raises:
            InputError: several source prompts are given.
        """
        config = self._config
        config.need("evaluate")
        variants = self._prompt_variants()
        inputs = {
            "student": self.student_digest,
            "private_task": self.inputs.data_digest("private_task"),
        }
        if config.teacher is None:
            models = ModelFolders(self.student, None)
            prompts = [
                PromptSet(variant.label, self._source(variant.source), {}) for variant in variants
            ]
        else:
            models = ModelFolders(self.student, self.inputs.teacher)
            prompts = self._with_target_prompts(variants)
            inputs = {"teacher": self.inputs.teacher_digest, **inputs}

        # The signature holds the digest of every prompt, so other prompts give another table.
        folder = self.private_folder(config, "evaluate", inputs | _prompt_digests(prompts))
        if self._unfinished([folder]):
            check_evaluation(folder.config, models, prompts, self._world)
            with self.running([folder]):
                evaluate(folder, models, prompts, inputs, self._world)
        return folder

    def everything(self) -> RunFolder:
        """Check all inputs, then find or run all stages.

        Returns:
            The finished folder of the evaluation.
        """
        self._config.need(*self._config.stages_until("evaluate"))
        # A wrong label word must show before hours of distillation.
        self._world.on_main(partial(check_inputs, self._config, self.inputs.teacher))
        return self.evaluate()

    # Prompts of the table. `evaluate.private_rows` adds one variant for each epsilon.

    def _prompt_variants(self) -> list[PromptVariant]:
        """Find or tune the prompts on the student that the table compares.

        Returns:
            The run file's own prompt, and one for each epsilon of `evaluate.private_rows`.
        """
        config = self._config
        if len(self._source_prompts) > 1:
            raise InputError(
                f"inputs.source_prompt names {len(self._source_prompts)} prompts, and a table "
                "compares one",
                "evaluate each prompt by itself",
            )
        (own_prompt,) = self._source_prompts
        variants = [PromptVariant("", config, own_prompt, config.inputs.target_prompt)]
        for epsilon in config.evaluate.private_rows:
            privacy = config.privacy.for_target(epsilon)
            with_epsilon = config.model_copy(update={"privacy": privacy})
            prompt = self._tune_on_student(with_epsilon).artifact
            variants.append(PromptVariant(f", epsilon {epsilon:g}", with_epsilon, prompt))
        return variants

    def _with_target_prompts(self, variants: Sequence[PromptVariant]) -> list[PromptSet]:
        """Find or make the prompts on the target that the rows of the table need."""
        needed = []
        for variant in variants:
            plans = target_prompts(variant)
            # The run file's own transfer comes first. The baselines follow.
            for row in sorted(plans, key=lambda name: name != TransferredPrompt.name):
                needed.append(_NeededPrompt(variant, row, plans[row]))

        # The transfers of all variants are trained together.
        transfers = [prompt for prompt in needed if prompt.plan.made_by == "transfer"]
        folders, failed = self._transfer(
            [(prompt.plan.config, self._source(prompt.variant.source)) for prompt in transfers]
        )
        if failed:
            raise next(iter(failed.values()))
        transferred = {
            (prompt.variant.label, prompt.row): folder.artifact
            for prompt, folder in zip(transfers, folders, strict=True)
        }

        # Collect the prompts of each variant: transferred, given, or tuned on the target.
        found: dict[str, dict[str, SoftPromptArtifact]] = {
            variant.label: {} for variant in variants
        }
        for prompt in needed:
            place = (prompt.variant.label, prompt.row)
            if place in transferred:
                artifact = transferred[place]
            elif prompt.plan.folder is not None:
                artifact = prompt.plan.folder
            else:
                artifact = self._tune_on_target(prompt.plan.config).artifact
            on_target = self.inputs.prompt(artifact, self.inputs.teacher)
            check_made_for(
                on_target,
                str(self.inputs.teacher),
                self._is_teacher,
                lambda: self.inputs.teacher_weights,
            )
            found[prompt.variant.label][prompt.row] = on_target
        return [
            PromptSet(variant.label, self._source(variant.source), found[variant.label])
            for variant in variants
        ]

    def _is_teacher(self, digest: str) -> bool:
        """Return whether a digest is that of the large LLM, with or without its hidden files."""
        if digest == self.inputs.teacher_digest:
            return True
        return self._world.on_main(partial(is_digest_of, self.inputs.teacher, digest))

    # Stages with the settings of one row.

    def _tune_on_student(self, config: RunConfig) -> RunFolder:
        """Find or tune a prompt on the student."""
        return self._tune(config, self._tuned_student, label="")

    @property
    def _tuned_student(self) -> TunedModel:
        """The student, and the public prompt that tuning starts from."""
        return TunedModel(
            self.student,
            self.student_digest,
            self._student_name,
            self.public_prompt,
            self.inputs.trusts_student,
        )

    def _tune_on_target(self, config: RunConfig) -> RunFolder:
        """Find or tune a prompt on the target, for the baseline of full prompt tuning."""
        name = model_name(self.inputs.teacher, self._config.teacher)
        target = TunedModel(self.inputs.teacher, self.inputs.teacher_digest, name)
        return self._tune(config, target, label="target")

    def _tune(self, config: RunConfig, model: TunedModel, *, label: str) -> RunFolder:
        """Find or tune a prompt on a model.

        Args:
            config: the run file, with the privacy plan of this prompt.
            model: the model.
            label: part of the name of the run's folder.
        """
        config.need("tune")
        inputs = {"model": model.digest, "private_task": self.inputs.data_digest("private_task")}
        if model.public_prompt is not None:
            inputs["public prompt"] = model.public_prompt.manifest.digest
        folder = self.private_folder(config, "tune", inputs, label)
        if self._unfinished([folder]):
            private_task = config.need_task("private_task")
            check_tuning(folder.config, private_task, model, self._world)
            with self.running([folder]):
                tune(folder, private_task, model, self._world, self._resume)
        return folder

    def _check_one_of_several(self, folder: Path, source: SoftPromptArtifact) -> None:
        """Refuse one of several prompts if it does not suit the models.

        Raises:
            ArtifactRefused: it would stop the transfer of the others.
        """
        from post_dist.stages.transfer.job import TransferRequest
        from post_dist.stages.transfer.stage import check_transfer

        # The owner's mistake is the owner's, and not one of the run file.
        request = TransferRequest(self._transfer_folder(self._config, source), source)
        with refusing(folder):
            check_transfer([request], self._described_models, self._world)

    def _transfer(
        self, wanted: Sequence[tuple[RunConfig, SoftPromptArtifact]]
    ) -> tuple[list[RunFolder], dict[Path, PostDistError]]:
        """Find or make transferred prompts.

        All prompts that are not finished are trained together.

        Args:
            wanted: the settings and the source prompt of each.

        Returns:
            The folder of each, in the same order; and by its path why one was not transferred.
        """
        if not wanted:
            return [], {}
        from post_dist.stages.transfer.job import TransferRequest
        from post_dist.stages.transfer.stage import Target, check_transfer, transfer

        requests = []
        for config, source in wanted:
            requests.append(TransferRequest(self._transfer_folder(config, source), source))

        # Two rows of a table may need the same prompt. It is trained once.
        by_folder = {request.folder.path: request for request in requests}
        unfinished = self._unfinished([request.folder for request in by_folder.values()])
        failed = {}
        if unfinished:
            missing = [by_folder[folder.path] for folder in unfinished]
            check_transfer(missing, self._described_models, self._world)
            with self.running(unfinished):
                target = Target(self.inputs.teacher, self.inputs.teacher_weights)
                failed = transfer(missing, target, self.student, self._world, self._resume)
        return [request.folder for request in requests], failed

    def _transfer_folder(self, config: RunConfig, source: SoftPromptArtifact) -> RunFolder:
        """Return the folder for the transfer of a prompt."""
        self._config.need("transfer")
        inputs = {
            "teacher": self.inputs.teacher_digest,
            "student": self.student_digest,
            "public_task": self._public_digest,
            "source prompt": source.manifest.digest,
        }
        return run_folder(config, "transfer", inputs)

    @cached_property
    def _described_models(self) -> "DescribedModels":
        """Student and target of a transfer, without their weights."""
        from post_dist.stages.transfer.stage import describe_models

        return describe_models(self.inputs.teacher, self.student)

    @cached_property
    def _public_digest(self) -> str:
        """Digest of the public text of a transfer."""
        return self.inputs.data_digest("public_task")

    # Results of earlier stages, or what the run file gives in their place.

    @cached_property
    def student(self) -> Path:
        """The student's folder: admitted from `inputs`, or made by the distill stage."""
        if self.inputs.student is not None:
            return self.inputs.student
        # An owner, whose run file has no teacher, cannot make a student.
        if self._config.teacher is None:
            raise InputError(
                "the run file names no student",
                "an owner gives its folder in inputs.student; a provider adds the sections "
                "teacher, student and corpus",
            )
        return self.distill().artifact

    @cached_property
    def student_digest(self) -> str:
        """Digest of the student."""
        if self.inputs.student is not None:
            return self.inputs.student_digest
        student = self.student  # all ranks make it
        return self._world.on_main(lambda: read_manifest(student, "student").digest)

    @property
    def _student_name(self) -> str:
        """Name of the student for others to read, not that of an admitted copy."""
        return model_name(self._config.inputs.student or self.student)

    @cached_property
    def public_prompt(self) -> SoftPromptArtifact | None:
        """The public prompt that tuning starts from: given, or made; None to start from text."""
        folder = self.public_prompt_folder
        return None if folder is None else self._for_student(folder, PUBLIC_PROMPT)

    @cached_property
    def public_prompt_folder(self) -> Path | None:
        """The folder of the public prompt."""
        given = self._config.inputs.public_prompt
        if given is None and self._config.warm_start is not None:
            return self.warm_start().artifact
        return given

    @cached_property
    def _source_prompts(self) -> tuple[Path, ...]:
        """Folders of the prompts on the student: given in `inputs`, or made by the tune stage."""
        return self.inputs.source_prompts or (self.tune().artifact,)

    def _source(self, folder: Path) -> SoftPromptArtifact:
        """Read a prompt that was tuned on the student."""
        return self._for_student(folder, "soft prompt")

    def _for_student(self, folder: Path, kind: ArtifactKind) -> SoftPromptArtifact:
        """Read a prompt of the student.

        Raises:
            ArtifactRefused: it was made for another model, by its own lineage.
        """
        prompt = self.inputs.prompt(folder, self.student, kind)
        # A student that is trusted has lost its manifest, by which prompts name it.
        if self.inputs.trusts_student and not is_transferred(prompt):
            return prompt
        check_made_for(
            prompt,
            str(self._config.inputs.student or self.student),
            self.student_digest.__eq__,
            lambda: self._student_weights,
        )
        return prompt

    @cached_property
    def _student_weights(self) -> str:
        """Digest of the student's weights. A prompt that was transferred to it names them."""
        student = self.student
        with unwatched("hashing the student"):  # it may be an older large LLM
            return self._world.on_main(partial(weights_of, student))

    # Folders of the stages.

    @property
    def _student_folder(self) -> RunFolder:
        """The folder of the student itself, which attacks do not change."""
        # Without them in its signature, a student that is finished can be attacked later.
        section = self._config.distill.model_copy(update={"attack_tokens": ()})
        config = self._config.model_copy(update={"distill": section})
        return run_folder(config, "distill", self._distill_inputs)

    @property
    def _distill_inputs(self) -> dict[str, str]:
        """Digest of each input of distillation, by its role."""
        corpus = self.inputs.data_digest("corpus")
        return {"teacher": self.inputs.teacher_digest, "corpus": corpus}

    def private_folder(
        self, config: RunConfig, stage: Stage, inputs: dict[str, str], label: str = ""
    ) -> RunFolder:
        """Return the folder of a private stage. Rank 0 names it, because its key may be new.

        Args:
            config: the run file.
            stage: name of the stage.
            inputs: digest of each input of the stage, by its role.
            label: part of the folder's name.
        """
        return self._world.on_main(partial(run_folder, config, stage, inputs, label))

    def _unfinished(self, folders: Sequence[RunFolder]) -> list[RunFolder]:
        """Return the folders whose stage still has to run.

        Args:
            folders: folders of one stage, one for each signature.

        Raises:
            InputError: a folder is not finished, and this command may not run its stage.
        """
        # Rank 0 decides for all ranks, because other nodes may see a finished folder later.
        unfinished = self._world.on_main(
            lambda: [folder for folder in folders if not folder.finished]
        )
        for folder in folders:
            if folder not in unfinished:
                log.info("%s is finished: %s", folder.stage, folder.path)
            elif folder.stage not in self._may_run:
                raise InputError(
                    f"{folder.stage} is not finished for these settings ({folder.path})",
                    f"run `post-dist {folder.stage.replace('_', '-')}` first, or give its artifact "
                    "in `inputs`",
                )
        return unfinished

    @contextmanager
    def running(self, folders: Sequence[RunFolder]) -> Iterator[None]:
        """Hold the folders while a stage runs in them, and write its log there.

        The folders are made only now, so a stage that was refused leaves nothing behind.
        """
        start = time.monotonic()
        with ExitStack() as held:
            if any(folder.private for folder in folders):
                held.enter_context(owner_only())
                held.enter_context(forgetting_private_data())
            for folder in folders:
                self._world.on_main(partial(held.enter_context, folder.held()))
                held.enter_context(log_file(folder.path, self._world.rank))
                log.info("%s starts in %s", folder.stage, folder.path)
            yield
            log.info("%s is done in %.0f s", folders[0].stage, time.monotonic() - start)
            # A finished stage never resumes, so its checkpoints are deleted.
            if self._world.is_main:
                # One of several prompts may have failed.
                for folder in filter(lambda each: each.finished, folders):
                    shutil.rmtree(folder.checkpoints, ignore_errors=True)
                    folder.link_latest()


def _prompt_digests(prompts: Sequence[PromptSet]) -> dict[str, str]:
    """Return the digest of every prompt of a table, by the name of its row."""
    digests = {}
    for prompt_set in prompts:
        digests["source" + prompt_set.label] = prompt_set.source.manifest.digest
        for row, prompt in prompt_set.on_target.items():
            digests[row + prompt_set.label] = prompt.manifest.digest
    return digests
