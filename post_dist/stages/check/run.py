"""Check a run file against its models, data and prompts, without weights and without a GPU.

The checks are independent, so one call finds every problem. They apply the same rules as the
stages. A private file is read on its owner's machine. Its values, counts and class shares never
leave this module.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from post_dist.artifacts.prompt import PUBLIC_PROMPT
from post_dist.artifacts.run_folder import SETTINGS, influential_settings, is_finished
from post_dist.artifacts.task import PromptTask
from post_dist.config.cluster import ClusterStage
from post_dist.config.schema import RunConfig, Stage
from post_dist.config.sources import Corpus, DataSource, Task
from post_dist.config.yaml_files import read_yaml
from post_dist.conflicts import Conflict, Layout
from post_dist.data.corpus_files import corpus_files, units_of
from post_dist.data.documents import documents_of
from post_dist.data.private_as_public import check_not_private
from post_dist.data.public_text import load_public_texts
from post_dist.data.tasks import load_examples
from post_dist.errors import InputError, PostDistError
from post_dist.files import check_write_access, writing
from post_dist.models.facts import ModelFacts
from post_dist.paths import reading
from post_dist.runtime.engine_conflicts import engine_conflicts
from post_dist.runtime.private_process import forgetting_private_data
from post_dist.stages.check.given import GivenParts
from post_dist.stages.check.models import same_tokenizer
from post_dist.stages.check.report import CheckReport, Findings, LabelTokens, PlanEpsilon
from post_dist.stages.check.task import bind_template, label_tokens
from post_dist.stages.conflicts import transfer_conflicts, tune_conflicts
from post_dist.stages.distill.conflicts import conflicts as distill_conflicts
from post_dist.stages.distill.conflicts import token_conflicts
from post_dist.stages.evaluate.conflicts import conflicts as evaluate_conflicts
from post_dist.stages.transfer.conflicts import TransferModels
from post_dist.stages.tune.conflicts import start_conflicts
from post_dist.stages.warm_start.conflicts import conflicts as warm_start_conflicts

if TYPE_CHECKING:
    from post_dist.privacy.plan import PrivacyPlan

_LARGEST_CORPUS_BYTES = 1 << 28
"""A larger corpus is not read: parsing it takes more than seconds."""


def check_run(config: RunConfig) -> CheckReport:
    """Check a run file against config.json, tokenizers, prompts and local data.

    Args:
        config: the run file.
    """
    check = _Check(config)
    check.run()
    return CheckReport(
        stages=tuple(check.stages),
        conflicts=tuple(check.findings.conflicts.values()),
        label_words=check.label_words,
        epsilon=tuple(check.epsilon),
        not_checked=tuple(dict.fromkeys(check.findings.not_checked)),
    )


class _Check:
    """The checks of one run file."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.findings = Findings()
        self.label_words: dict[str, LabelTokens] = {}
        self.epsilon: list[PlanEpsilon] = []
        self.stages = self._runnable_stages()
        self._given = GivenParts(config, self.stages, self.findings)

    def run(self) -> None:
        """Check each stage that the run file can run."""
        # A run file may leave some stages to another party. One without any stage is a mistake.
        if not self.stages:
            nothing = Conflict(
                "the run file has no complete set of sections for any stage",
                "`post-dist init DIR` writes a whole run file",
            )
            self.findings.add("run file", [nothing])
        # Without a cluster section, the number of ranks of a stage is unknown. An owner has one.
        if self.config.teacher is not None and "cluster" not in self.config.model_fields_set:
            self.findings.not_checked.append(
                "engine settings on several GPUs: the run file has no section cluster"
            )
        checks: dict[Stage, Callable[[], None]] = {
            "distill": self._check_distill,
            "warm_start": self._check_warm_start,
            "tune": self._check_tune,
            "transfer": self._check_transfer,
            "evaluate": self._check_evaluate,
        }
        for stage in self.stages:
            checks[stage]()
        self._check_public_sections()
        if self.stages:
            # Every stage writes its run there.
            output = self.config.output / self.config.name
            self.findings.attempt(self.stages[0], partial(_check_writable, output))

    def _check_public_sections(self) -> None:
        """Check that no public section names the private data."""
        config = self.config
        for where, public in (("corpus", config.corpus), ("public_task", config.public_task)):
            check = partial(check_not_private, config.private_task, public, where)
            self.findings.attempt(where, check)

    def _runnable_stages(self) -> list[Stage]:
        """List the stages whose sections the run file has. Another party runs the others."""
        found: list[Stage] = []
        for stage in self.config.stages_until("evaluate"):
            try:
                self.config.need(stage)
            except InputError as error:
                self.findings.not_checked.append(f"{stage}: {error.args[0]}")
            else:
                found.append(stage)
        return found

    def _layout(self, stage: ClusterStage) -> Layout:
        """Return the ranks of a stage by the cluster section, or one GPU without that section."""
        if "cluster" not in self.config.model_fields_set:
            return Layout(ranks=1, ranks_per_node=1, device="cuda")
        asked = self.config.cluster.for_stage(stage)
        device = "cuda" if asked.gpus_per_node else "cpu"
        return Layout(asked.nodes * asked.tasks, asked.tasks, device)

    # ------------------------------------------------------------------------------------ stages

    def _check_distill(self) -> None:
        config = self.config
        if self._given.teacher is not None and self._given.teacher.facts is not None:
            found = distill_conflicts(config, self._given.teacher.facts, self._layout("distill"))
            tokenizer = self._given.teacher.tokenizer
            if tokenizer is not None:
                found += token_conflicts(tokenizer, self._given.teacher.facts)
            self.findings.add("distill", found)
        if config.cluster.signals.workers:
            # Each worker of the array holds a teacher of its own.
            found = engine_conflicts(config.engine, self._layout("signals"))
            self.findings.add("signals", found)
        # Whether the text is long enough shows only when it is tokenized, which takes too long.
        corpus = config.corpus
        if corpus is not None:
            self.findings.attempt("distill", partial(self._read_corpus, corpus))

    def _read_corpus(self, corpus: Corpus) -> None:
        """Read the documents of the corpus for errors, unless there are too many.

        Raises:
            PostDistError: a file cannot be read.
        """
        if not self._is_readable("corpus", corpus):
            return
        size = sum(file.stat().st_size for file in corpus_files(corpus))
        if size > _LARGEST_CORPUS_BYTES:
            self.findings.not_checked.append(f"corpus: {corpus.path} is too large to be read now")
            return
        for unit in units_of(corpus):
            for _ in documents_of(corpus, unit):
                pass

    def _check_warm_start(self) -> None:
        config = self.config
        task = config.public_task
        student = None if self._given.student is None else self._given.student.facts
        teacher = None if self._given.teacher is None else self._given.teacher.facts
        if student is None or teacher is None:
            self.findings.not_checked.append("warm_start: the models are not there yet")
        else:
            layout = self._layout("warm_start")
            self.findings.add("warm_start", warm_start_conflicts(config, student, teacher, layout))
        if task is not None and task.labels and config.warm_start is not None:
            own = PromptTask.of_section(task, config.warm_start.init_text)
            self._check_reading("warm_start", own, list(task.labels))

    def _check_tune(self) -> None:
        config = self.config
        # The baseline of full prompt tuning tunes on the target.
        target = None if self._given.teacher is None else self._given.teacher.facts
        if self._given.student is None:
            self.findings.not_checked.append("tune: the student is not in inputs.student yet")
        elif self._given.student.facts is not None:
            found = tune_conflicts(config, self._given.student.facts, target, self._layout("tune"))
            self.findings.add("tune", found)
        if self._given.student is not None and self._given.student.facts is not None:
            self._check_start(self._given.student.facts)
        task = config.private_task
        if task is not None:
            own = PromptTask.of_section(task, config.tune.init_text)
            self._check_reading("tune", own, list(task.labels))
            # Right answers are counted on the validation split.
            splits = ["train"]
            if config.privacy.enabled and config.tune.counts_right:
                splits.append("validation")
            self._check_examples("tune", task, splits)
        self._account()

    def _check_start(self, student: ModelFacts) -> None:
        """Check the public prompt that tuning starts from. One that is yet to be made will fit."""
        given = self.config.inputs.public_prompt
        if given is not None:
            start = self._given.read_prompt("tune", given, PUBLIC_PROMPT)
            if start is not None:
                self.findings.add("tune", start_conflicts(self.config, start, student))
        elif self.config.warm_start is None:
            self.findings.add("tune", start_conflicts(self.config, None, student))

    def _check_transfer(self) -> None:
        public_task = self.config.public_task
        if public_task is None:
            return
        if public_task.visibility != "public" or self._is_readable("public_task", public_task):
            # A task that is not public is refused before its file is opened.
            self.findings.attempt("transfer", lambda: load_public_texts(public_task, "public_task"))
        # Both models read the public text, in the template of the public task or of the prompt.
        prompts = self._given.source_prompts("transfer")
        for prompt in prompts:
            template = public_task.template or prompt.task.template
            labels = [str(number) for number in range(len(prompt.task.label_words))]
            self._check_reading("transfer", replace(prompt.task, template=template), labels)
        # The rules of the transfer need both models.
        student = self._given.student
        target = self._given.teacher
        if student is None or target is None:
            self.findings.not_checked.append("transfer: the student is not in inputs.student yet")
        elif student.facts is not None and target.facts is not None:
            same = same_tokenizer(student, target)
            models = TransferModels(student.facts, target.facts, same_tokenizer=same)
            found = transfer_conflicts(self.config, models, prompts, self._layout("transfer"))
            self.findings.add("transfer", found)

    def _check_evaluate(self) -> None:
        config = self.config
        layout = self._layout("evaluate")
        models = self._given.prompted_models()
        self.findings.add("evaluate", evaluate_conflicts(config, models, layout))
        task = config.private_task
        if task is not None:
            own = PromptTask.of_section(task, config.tune.init_text)
            self._check_reading("evaluate", own, list(task.labels))
            self._check_examples("evaluate", task, [config.evaluate.split])

    def _check_reading(self, stage: Stage, task: PromptTask, labels: Sequence[str]) -> None:
        """Bind a task to each tokenizer that will read it: its template and its label words.

        Args:
            stage: the stage that reads the task.
            task: template and label words.
            labels: names of its classes.
        """
        # A task that generates text has no label words.
        words = dict(zip(labels, task.label_words, strict=True))
        for name, model in self._given.readers():
            tokenizer = model.tokenizer
            if tokenizer is None:
                continue
            vocabulary = len(tokenizer) if model.facts is None else model.facts.vocabulary
            tokens = label_tokens(stage, words, task, tokenizer, vocabulary, self.findings)
            if tokens:
                self.label_words.setdefault(name, tokens)
            if model.facts is not None:
                bind = partial(bind_template, task, tokenizer, model.facts)
                self.findings.attempt(stage, bind)

    # ----------------------------------------------------------------------------- data and cost

    def _check_examples(self, stage: Stage, task: Task, splits: Sequence[str]) -> None:
        """Read the splits of the private task for errors. Their contents are not kept."""
        if not self._is_readable("private_task", task):
            return
        for split in splits:
            self.findings.attempt(stage, partial(_read_split, task, split))

    def _is_readable(self, where: str, source: DataSource) -> bool:
        """Return whether a source is a local file, which can be read in seconds.

        Args:
            where: name of the section in the run file.
            source: the section.
        """
        if source.path is None:
            self.findings.not_checked.append(f"{where}: {source.hub} is not fetched from the hub")
            return False
        return True

    def _account(self) -> None:
        """Compute epsilon of each private plan that tuning follows."""
        sections = [section for section in self.config.all_privacy if section.enabled]
        if not sections:
            return
        from post_dist.privacy.accounting import account  # takes a second
        from post_dist.privacy.calibration import private_plan

        # Plans are computed one by one, so a target that no noise reaches does not hide the others.
        for section in sections:
            run = self.config.model_copy(update={"privacy": section})
            plan = self.findings.attempt("tune", partial(private_plan, run))
            if plan is None:
                continue
            cost = self.findings.attempt("tune", partial(account, plan))
            if cost is not None:
                epsilon = PlanEpsilon(cost.epsilon, plan.delta, plan.noise_multiplier)
                self.epsilon.append(epsilon)
            if section is self.config.privacy:
                self._check_ledger(plan)

    def _check_ledger(self, plan: "PrivacyPlan") -> None:
        """Check that the ledger of the private data allows a run with this plan."""
        from post_dist.privacy.ledger import check_spending

        task = self.config.private_task
        # Data that cannot be read are a conflict of their own.
        path = None if task is None else task.path
        if path is not None and not (os.path.isfile(path) and os.access(path, os.R_OK)):
            return
        find = partial(_run_with_these_settings, self.config)
        begun = self.findings.attempt("tune", find)
        # A finished run spends nothing, and a resumed one is charged already.
        if begun is not None and is_finished(begun):
            self.findings.not_checked.append(f"tune: the ledger, because {begun} is finished")
            return
        if begun is not None:
            self.findings.not_checked.append(f"tune: the cap, because {begun} may be resumed")
        new = plan if begun is None else None

        def check() -> None:
            with forgetting_private_data():
                check_spending(self.config, new)

        self.findings.attempt("tune", check)


def _check_writable(folder: Path) -> None:
    """Refuse a folder that cannot be made or written to.

    Raises:
        InputError: this account may not write there.
    """
    with writing(folder):
        check_write_access(folder)


def _run_with_these_settings(config: RunConfig) -> Path | None:
    """Return the folder of a tuning run with these settings, if there is one.

    Whether its inputs are the same too shows only when all of them are hashed.
    """
    wanted = influential_settings(config, "tune")
    around = config.output / config.name
    with reading(around):
        runs = sorted(around.glob("tune-*"))
    for run in runs:
        try:
            settings = read_yaml((run / SETTINGS).read_text(), str(run / SETTINGS))
            found = influential_settings(RunConfig.model_validate(settings), "tune")
        except (OSError, ValueError, PostDistError):  # of another version, or of somebody else
            continue
        if found == wanted:
            return run
    return None


def _read_split(task: Task, split: str) -> None:
    """Read a split of the private task.

    Raises:
        InputError: it cannot be read. The reader's hint may name the columns of the file. In a file
            without a header, these are values of the first example. Another hint replaces it.
    """
    try:
        with forgetting_private_data():
            load_examples(task, split, "private_task")
    except InputError as error:
        safe_hint = "compare the file with text, label_column and labels of private_task"
        hint = safe_hint if error.hint else ""
        raise InputError(error.args[0], hint) from None
