"""Check a run file against its models, data and prompts, without weights and without a GPU.

The checks are independent, so one call finds every problem. They apply the same rules as the
stages. A private file is read on its owner's machine. Its values, counts and class shares never
leave this module.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from post_dist.admission.door import admit_prompt, described_student, refuse_unchecked
from post_dist.artifacts.manifest import FILE_NAME, ArtifactKind
from post_dist.artifacts.prompt import PUBLIC_PROMPT, SoftPromptArtifact
from post_dist.artifacts.task import PromptTask
from post_dist.config.schema import RunConfig, Stage
from post_dist.config.sources import Corpus, DataSource, Task
from post_dist.conflicts import Conflict, Layout
from post_dist.data.corpus_files import corpus_files, units_of
from post_dist.data.documents import documents_of
from post_dist.data.public_text import load_public_texts
from post_dist.data.tasks import load_examples
from post_dist.errors import InputError
from post_dist.models.load import tokenizer_folder
from post_dist.models.student import stand_in_layers
from post_dist.stages.check.models import (
    CheckedModel,
    note_missing_weights,
    read_model,
    same_tokenizer,
)
from post_dist.stages.check.report import CheckReport, Findings, LabelTokens, PlanEpsilon
from post_dist.stages.check.task import bind_template, label_tokens
from post_dist.stages.conflicts import transfer_conflicts, tune_conflicts
from post_dist.stages.distill.conflicts import conflicts as distill_conflicts
from post_dist.stages.evaluate.conflicts import PromptedModel
from post_dist.stages.evaluate.conflicts import conflicts as evaluate_conflicts
from post_dist.stages.prompt_origin import check_belongs
from post_dist.stages.transfer.conflicts import SourcePrompt, TransferModels
from post_dist.stages.tune.conflicts import start_conflicts
from post_dist.stages.warm_start.conflicts import conflicts as warm_start_conflicts

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
        self.stages: list[Stage] = []
        self._teacher: CheckedModel | None = None
        self._student: CheckedModel | None = None

    def run(self) -> None:
        """Find the stages that the run file can run, and check each of them."""
        # A run file may leave some stages to another party. One without any stage is a mistake.
        self.stages = self._runnable_stages()
        if not self.stages:
            nothing = Conflict(
                "the run file has no complete set of sections for any stage",
                "`post-dist init DIR` writes a whole run file",
            )
            self.findings.add("run file", [nothing])
        self._teacher = self._read_teacher()
        self._student = self._read_student()
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

    # ------------------------------------------------------------------------------------ models

    def _read_teacher(self) -> CheckedModel | None:
        section = self.config.teacher
        if section is None or not self.stages:
            return None
        # A hub model is fetched without its weights.
        folder = self.findings.attempt(self.stages[0], lambda: tokenizer_folder(section))
        if folder is None:
            return None
        note_missing_weights(folder, self.findings)
        return read_model(folder, self.stages[0], self.findings)

    def _read_student(self) -> CheckedModel | None:
        """Read the given student, or derive the facts of the one that distillation will make."""
        given = self.config.inputs.student
        if given is not None and self.stages:
            read = partial(self._read_given_student, given, self.stages[0])
            return self.findings.attempt(self.stages[0], read) or CheckedModel(None, None)
        if "distill" not in self.stages or self._teacher is None:
            return None
        # The student has the teacher's width, context and tokenizer, and fewer layers.
        facts = self._teacher.facts
        section = self.config.student
        if facts is not None and section is not None:
            try:
                layers = len(stand_in_layers(section, facts.layers))
            except InputError:
                layers = facts.layers  # the check of distillation reports this error
            facts = replace(facts, layers=layers)
        return replace(self._teacher, facts=facts)

    def _read_given_student(self, given: Path, stage: Stage) -> CheckedModel:
        """Read a student that `inputs` gives. Its weights are not hashed, which may take long."""
        if not given.is_dir():
            return read_model(given, stage, self.findings)
        note_missing_weights(given, self.findings)
        # The rule is that of the stages. A foreign configuration is read only behind the door.
        inputs = self.config.inputs
        if not inputs.trusted_keys and not (given / FILE_NAME).exists():
            refuse_unchecked(given, trusted=inputs.trust_model)
            return read_model(given, stage, self.findings)
        with described_student(given, inputs.trusted_keys) as folder:
            return read_model(folder, stage, self.findings)

    def _layout(self, stage: Stage) -> Layout:
        """Return the ranks of a stage by the cluster section, or one GPU without that section."""
        if "cluster" not in self.config.model_fields_set:
            return Layout(ranks=1, ranks_per_node=1, device="cuda")
        asked = self.config.cluster.for_stage(stage)
        device = "cuda" if asked.gpus_per_node else "cpu"
        return Layout(asked.nodes * asked.tasks, asked.tasks, device)

    # ------------------------------------------------------------------------------------ stages

    def _check_distill(self) -> None:
        config = self.config
        if self._teacher is not None and self._teacher.facts is not None:
            found = distill_conflicts(config, self._teacher.facts, self._layout("distill"))
            self.findings.add("distill", found)
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
        student = None if self._student is None else self._student.facts
        teacher = None if self._teacher is None else self._teacher.facts
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
        target = None if self._teacher is None else self._teacher.facts
        if self._student is None:
            self.findings.not_checked.append("tune: the student is not in inputs.student yet")
        elif self._student.facts is not None:
            found = tune_conflicts(config, self._student.facts, target, self._layout("tune"))
            self.findings.add("tune", found)
        self._check_start()
        task = config.private_task
        if task is not None:
            own = PromptTask.of_section(task, config.tune.init_text)
            self._check_reading("tune", own, list(task.labels))
            # A private search scores its trials on the validation split.
            splits = ["train"]
            if config.tune.search is not None:
                splits.append("validation")
            self._check_examples("tune", task, splits)
        self._account()

    def _check_start(self) -> None:
        """Check the public prompt that tuning starts from. One that is yet to be made will fit."""
        given = self.config.inputs.public_prompt
        if given is not None:
            start = self._read_prompt("tune", given, PUBLIC_PROMPT)
            if start is not None:
                self.findings.add("tune", start_conflicts(self.config, start))
        elif self.config.warm_start is None:
            self.findings.add("tune", start_conflicts(self.config, None))

    def _check_transfer(self) -> None:
        public_task = self.config.public_task
        if public_task is None:
            return
        if public_task.visibility != "public" or self._is_readable("public_task", public_task):
            # A task that is not public is refused before its file is opened.
            self.findings.attempt("transfer", lambda: load_public_texts(public_task, "public_task"))
        # Both models read the public text, in the template of the public task or of the prompt.
        prompts = self._source_prompts("transfer")
        for prompt in prompts:
            template = public_task.template or prompt.task.template
            labels = [str(number) for number in range(len(prompt.task.label_words))]
            self._check_reading("transfer", replace(prompt.task, template=template), labels)
        # The rules of the transfer need both models.
        student = self._student
        target = self._teacher
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
        self.findings.add("evaluate", evaluate_conflicts(config, self._prompted_models(), layout))
        task = config.private_task
        if task is not None:
            own = PromptTask.of_section(task, config.tune.init_text)
            self._check_reading("evaluate", own, list(task.labels))
            self._check_examples("evaluate", task, [config.evaluate.split])

    # ------------------------------------------------------------------------- prompts and tasks

    def _prompted_models(self) -> list[PromptedModel]:
        """List the models of the evaluation, each with its longest prompt."""
        lengths = [prompt.num_virtual_tokens for prompt in self._source_prompts("evaluate")]
        # A given prompt for the target has its own length. All others are as long as their source.
        given = self.config.inputs.target_prompt
        on_target = None
        if given is not None:
            keys = self.config.inputs.trusted_keys
            on_target = self.findings.attempt("evaluate", lambda: admit_prompt(given, keys=keys))
        longest = max(lengths, default=0)
        found = []
        if self._student is not None and self._student.facts is not None:
            found.append(PromptedModel("the student", self._student.facts, longest))
        if self._teacher is not None and self._teacher.facts is not None:
            if on_target is not None:
                longest = max(longest, len(on_target.embeddings))
            found.append(PromptedModel("the target", self._teacher.facts, longest))
        return found

    def _source_prompts(self, stage: Stage) -> list[SourcePrompt]:
        """Read the given prompts, or describe the one that the run file tunes.

        Args:
            stage: the stage that reads them.
        """
        given = self.config.inputs.source_prompt
        if given is None:
            task = self.config.private_task
            if task is None:
                self.findings.not_checked.append(
                    f"{stage}: the prompt is not in inputs.source_prompt yet"
                )
                return []
            own = PromptTask.of_section(task, self.config.tune.init_text)
            return [SourcePrompt(self.config.tune.num_virtual_tokens, own)]
        # One prompt, or those of several owners.
        found = []
        for folder in given if isinstance(given, tuple) else (given,):
            prompt = self._read_prompt(stage, folder)
            if prompt is not None:
                found.append(SourcePrompt.of(prompt))
        return found

    def _read_prompt(
        self, stage: Stage, folder: Path, kind: ArtifactKind = "soft prompt"
    ) -> SoftPromptArtifact | None:
        """Read a prompt, and compare it with the student that it was tuned on."""
        keys = self.config.inputs.trusted_keys
        prompt = self.findings.attempt(stage, lambda: admit_prompt(folder, kind, keys))
        student = self._student
        if prompt is None or student is None:
            return prompt
        facts = student.facts
        tokenizer = student.tokenizer
        if facts is not None and tokenizer is not None:
            self.findings.attempt(stage, lambda: check_belongs(prompt, facts, tokenizer))
        return prompt

    def _check_reading(self, stage: Stage, task: PromptTask, labels: Sequence[str]) -> None:
        """Bind a task to each tokenizer that will read it: its template and its label words.

        Args:
            stage: the stage that reads the task.
            task: template and label words.
            labels: names of its classes.
        """
        # A task that generates text has no label words.
        words = dict(zip(labels, task.label_words, strict=True))
        for name, model in self._readers():
            tokenizer = model.tokenizer
            if tokenizer is None:
                continue
            tokens = label_tokens(stage, words, task, tokenizer, self.findings)
            if tokens:
                self.label_words.setdefault(name, tokens)
            if model.facts is not None:
                bind = partial(bind_template, task, tokenizer, model.facts)
                self.findings.attempt(stage, bind)

    def _readers(self) -> list[tuple[str, CheckedModel]]:
        """List the models that read a task, with one entry for models that share a tokenizer."""
        found = []
        if self._student is not None:
            found.append(("student", self._student))
        if self._teacher is None:
            return found
        if self._student is None or not same_tokenizer(self._student, self._teacher):
            found.append(("teacher", self._teacher))
        return found

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


def _read_split(task: Task, split: str) -> None:
    """Read a split of the private task.

    Raises:
        InputError: it cannot be read. The reader's hint may name the columns of the file. In a file
            without a header, these are values of the first example. Another hint replaces it.
    """
    try:
        load_examples(task, split, "private_task")
    except InputError as error:
        safe_hint = "compare the file with text, label_column and labels of private_task"
        hint = safe_hint if error.hint else ""
        raise InputError(error.args[0], hint) from None
