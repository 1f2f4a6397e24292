"""The stages in their order: what each is handed, and what is finished already."""

import logging
import shutil
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

from post_dist.artifacts.manifest import fingerprint, read_manifest
from post_dist.artifacts.run_folder import RunFolder, run_folder
from post_dist.config.schema import RunConfig, Stage
from post_dist.config.sources import DataSource
from post_dist.data.public_text import load_public_texts
from post_dist.data.tasks import load_examples
from post_dist.data.template import Template, Verbalizer
from post_dist.errors import InputError
from post_dist.models.load import is_masked, load_config, load_tokenizer, model_folder
from post_dist.runtime.distributed import World
from post_dist.runtime.logs import log_file
from post_dist.stages.distill import distill
from post_dist.stages.evaluate import evaluate
from post_dist.stages.transfer import transfer
from post_dist.stages.tune import tune

log = logging.getLogger(__name__)

_PUBLISHED = {"objective": "published", "scores": "vocabulary", "temperature": 2.0, "match_class_shares": False, "trained_share": 0.0}
"""The paper's loss and start, whatever the run file chooses for its own transfer."""


class Pipeline:
    """Finds or runs the stages of one run file. A finished one is known by its signature and never run again.

    Args:
        config: the run file.
        world: the ranks.
        may_run: the stages that this command may start; the others must be finished, or their artefacts given in `inputs`.
        resume: auto goes on from a checkpoint; never starts an unfinished stage from its beginning.
    """

    def __init__(self, config: RunConfig, world: World, may_run: frozenset[Stage], resume: str = "auto") -> None:
        self._config = config
        self._world = world
        self._may_run = may_run
        self._resume = resume

    def distill(self) -> RunFolder:
        """The student."""
        self._need("teacher", "student", "corpus")
        folder = run_folder(self._config, "distill", {"teacher": self._teacher_digest, "corpus": self._data("corpus")})
        return self._run(folder, lambda: distill(folder, self._teacher, self._world, self._resume))

    def tune(self) -> RunFolder:
        """The prompt on the student."""
        return self._tune(self._config, self.student, "the student")

    def transfer(self) -> RunFolder:
        """The prompt on the target."""
        return self._transfer(self._config, self._source_prompt)

    def evaluate(self) -> RunFolder:
        """The comparison of all rows, with the baselines that the run file asks for."""
        self._need("teacher", "private_task")
        given = self._config.inputs.target_prompt
        prompts = {"transferred": given or self.transfer().artifact}
        if "published transfer" in self._config.evaluate.baselines:
            section = self._config.transfer.model_copy(update=_PUBLISHED)
            prompts["published transfer"] = self._transfer(
                self._config.model_copy(update={"transfer": section}), self._source_prompt
            ).artifact
        if "full prompt tuning" in self._config.evaluate.baselines:
            prompts["full prompt tuning"] = self._tune(self._config, self._teacher, "the target").artifact
        for epsilon in self._config.evaluate.private_rows:
            config = self._config.model_copy(update={"privacy": self._config.privacy.for_target(epsilon)})
            source_prompt = self._tune(config, self.student, "the student").artifact
            prompts[f"student + prompt, epsilon {epsilon:g}"] = source_prompt
            prompts[f"transferred, epsilon {epsilon:g}"] = self._transfer(config, source_prompt).artifact
        parents = {
            "teacher": self._teacher_digest,
            "student": self._student_digest,
            **{name: read_manifest(path, "soft prompt").digest for name, path in {"source prompt": self._source_prompt, **prompts}.items()},
        }
        folder = run_folder(self._config, "evaluate", parents | {"private_task": self._data("private_task")})
        return self._run(folder, lambda: evaluate(folder, self._teacher, self.student, self._source_prompt, prompts, parents, self._world))

    def everything(self) -> RunFolder:
        """All stages, after a look at all inputs: a wrong label word is found before hours of distillation."""
        inputs = self._config.inputs
        self._need("teacher", "private_task")
        if inputs.student is None:
            self._need("student", "corpus")
        plans = [self._config.privacy, *map(self._config.privacy.for_target, self._config.evaluate.private_rows)]
        for plan in filter(lambda plan: plan.enabled, plans):
            from post_dist.privacy.accounting import account, private_plan  # takes a second

            account(private_plan(self._config.model_copy(update={"privacy": plan})))
        tokenizer = load_tokenizer(self._teacher)
        task = self._config.private_task
        if task is not None and task.template is not None:
            load_examples(task, self._config.evaluate.split, "private_task")
            Template(task.template, tokenizer, task.max_length, masked=is_masked(load_config(self._teacher)))
            Verbalizer(tuple(task.labels.values()), tokenizer, allow_multi_token=task.allow_multi_token)
        if inputs.target_prompt is None:
            self._need("public_task")
            if self._config.public_task is not None:
                load_public_texts(self._config.public_task, "public_task")
        return self.evaluate()

    def _tune(self, config: RunConfig, model: Path, model_name: str) -> RunFolder:
        self._need("private_task")
        on_student = model_name == "the student"
        digest = self._student_digest if on_student else self._teacher_digest
        inputs = {"model": digest, "private_task": self._data("private_task")}
        folder = run_folder(config, "tune", inputs, label="" if on_student else "target")
        return self._run(folder, lambda: tune(folder, model, {"model": digest}, model_name, self._world, self._resume))

    def _transfer(self, config: RunConfig, source_prompt: Path) -> RunFolder:
        self._need("teacher", "public_task")
        inputs = {
            "teacher": self._teacher_digest,
            "student": self._student_digest,
            "source prompt": read_manifest(source_prompt, "soft prompt").digest,
            "public_task": self._data("public_task"),
        }
        folder = run_folder(config, "transfer", inputs)
        return self._run(folder, lambda: transfer(folder, self._teacher, self.student, source_prompt, self._world, self._resume))

    @cached_property
    def _teacher(self) -> Path:
        self._need("teacher")
        with self._world.main_first():
            folder = model_folder(self._config.teacher)  # type: ignore[arg-type]
        load_config(folder)
        return folder

    @cached_property
    def _teacher_digest(self) -> str:
        return fingerprint(self._teacher)

    @cached_property
    def student(self) -> Path:
        """The student's folder: made here, or given in `inputs`."""
        return self._config.inputs.student or self.distill().artifact

    @cached_property
    def _student_digest(self) -> str:
        return read_manifest(self.student, "student").digest

    @cached_property
    def _source_prompt(self) -> Path:
        return self._config.inputs.source_prompt or self.tune().artifact

    def _need(self, *sections: str) -> None:
        missing = [section for section in sections if getattr(self._config, section) is None]
        if missing:
            raise InputError(f"the run file lacks the section{'s' * (len(missing) > 1)} {', '.join(missing)}")

    def _data(self, section: str) -> str:
        """What names the contents of a data section: the file's digest, or the hub's name and commit."""
        source: DataSource = getattr(self._config, section)
        if source.path is None:
            return f"{source.hub}@{source.revision}"
        if not source.path.is_file():
            raise InputError(f"{section}.path: {source.path} is {'no file' if source.path.exists() else 'missing'}")
        return fingerprint(source.path)

    def _run(self, folder: RunFolder, stage: Callable[[], None]) -> RunFolder:
        finished = folder.finished
        self._world.barrier()
        if finished:
            log.info("%s is finished: %s", folder.stage, folder.path)
            return folder
        if folder.stage not in self._may_run:
            raise InputError(
                f"{folder.stage} is not finished for these settings ({folder.path})",
                f"run `post-dist {folder.stage}` first, or give its artefact in `inputs`",
            )
        self._world.on_main(folder.open)
        start = time.monotonic()
        with log_file(folder.path, self._world.rank):
            log.info("%s starts in %s", folder.stage, folder.path)
            stage()
            log.info("%s is done in %.0f s", folder.stage, time.monotonic() - start)
        if self._world.is_main:
            shutil.rmtree(folder.checkpoints, ignore_errors=True)
        return folder
