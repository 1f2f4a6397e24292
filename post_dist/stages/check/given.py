"""What a run file gives to its stages: models and prompts, read without weights."""

from dataclasses import replace
from functools import partial
from pathlib import Path

from post_dist.admission.door import admit_prompt, check_trusted, described_student
from post_dist.artifacts.manifest import FILE_NAME, ArtifactKind
from post_dist.artifacts.prompt import SoftPromptArtifact
from post_dist.artifacts.task import PromptTask
from post_dist.config.schema import RunConfig, Stage
from post_dist.errors import InputError
from post_dist.models.load import tokenizer_folder
from post_dist.models.student import stand_in_layers
from post_dist.paths import kind_of
from post_dist.stages.check.models import (
    CheckedModel,
    find_weights,
    read_model,
    same_tokenizer,
)
from post_dist.stages.check.report import Findings
from post_dist.stages.evaluate.conflicts import PromptedModel
from post_dist.stages.prompt_origin import check_belongs
from post_dist.stages.transfer.conflicts import SourcePrompt


class GivenParts:
    """The models and prompts of a run file.

    Args:
        config: the run file.
        stages: the stages that it can run, in their order.
        findings: takes what is wrong with a model or a prompt.

    Attributes:
        teacher: the large LLM; None if the run file does not name it.
        student: the given student, or what is known of the one that distillation will make; None
            if neither is there.
    """

    def __init__(self, config: RunConfig, stages: list[Stage], findings: Findings) -> None:
        self._config = config
        self._stages = stages
        self._findings = findings
        self.teacher = self._read_teacher()
        self.student = self._read_student()

    def prompted_models(self) -> list[PromptedModel]:
        """List the models of the evaluation, each with its longest prompt."""
        lengths = [prompt.num_virtual_tokens for prompt in self.source_prompts("evaluate")]
        # A given prompt for the target has its own length. All others are as long as their source.
        given = self._config.inputs.target_prompt
        on_target = None
        if given is not None:
            keys = self._config.inputs.trusted_keys
            on_target = self._findings.attempt("evaluate", lambda: admit_prompt(given, keys=keys))
        longest = max(lengths, default=0)
        found = []
        if self.student is not None and self.student.facts is not None:
            found.append(PromptedModel("the student", self.student.facts, longest))
        if self.teacher is not None and self.teacher.facts is not None:
            if on_target is not None:
                longest = max(longest, len(on_target.embeddings))
            found.append(PromptedModel("the target", self.teacher.facts, longest))
        return found

    def source_prompts(self, stage: Stage) -> list[SourcePrompt]:
        """Read the given prompts, or describe the one that the run file tunes.

        Args:
            stage: the stage that reads them.
        """
        given = self._config.inputs.source_prompt
        if given is None:
            task = self._config.private_task
            if task is None:
                self._findings.not_checked.append(
                    f"{stage}: the prompt is not in inputs.source_prompt yet"
                )
                return []
            own = PromptTask.of_section(task, self._config.tune.init_text)
            return [SourcePrompt(self._config.tune.num_virtual_tokens, own)]
        # One prompt, or those of several owners.
        found = []
        for folder in given if isinstance(given, tuple) else (given,):
            prompt = self.read_prompt(stage, folder)
            if prompt is not None:
                found.append(SourcePrompt.of(prompt))
        return found

    def read_prompt(
        self, stage: Stage, folder: Path, kind: ArtifactKind = "soft prompt"
    ) -> SoftPromptArtifact | None:
        """Read a prompt, and compare it with the student that it was tuned on."""
        keys = self._config.inputs.trusted_keys
        prompt = self._findings.attempt(stage, lambda: admit_prompt(folder, kind, keys))
        student = self.student
        if prompt is None or student is None:
            return prompt
        facts = student.facts
        tokenizer = student.tokenizer
        if facts is not None and tokenizer is not None:
            self._findings.attempt(stage, lambda: check_belongs(prompt, facts, tokenizer))
        return prompt

    def readers(self) -> list[tuple[str, CheckedModel]]:
        """List the models that read a task, with one entry for models that share a tokenizer."""
        found = []
        if self.student is not None:
            found.append(("student", self.student))
        if self.teacher is None:
            return found
        if self.student is None or not same_tokenizer(self.student, self.teacher):
            found.append(("teacher", self.teacher))
        return found

    def _read_teacher(self) -> CheckedModel | None:
        section = self._config.teacher
        if section is None or not self._stages:
            return None
        # A hub model is fetched without its weights.
        folder = self._findings.attempt(self._stages[0], lambda: tokenizer_folder(section))
        if folder is None:
            return None
        find_weights(folder, self._stages[0], self._findings)
        return read_model(folder, self._stages[0], self._findings)

    def _read_student(self) -> CheckedModel | None:
        """Read the given student, or derive the facts of the one that distillation will make."""
        given = self._config.inputs.student
        if given is not None and self._stages:
            read = partial(self._read_given_student, given, self._stages[0])
            return self._findings.attempt(self._stages[0], read) or CheckedModel(None, None)
        if "distill" not in self._stages or self.teacher is None:
            return None
        # The student has the teacher's width, context and tokenizer, and fewer layers.
        facts = self.teacher.facts
        section = self._config.student
        if facts is not None and section is not None:
            try:
                layers = len(stand_in_layers(section, facts.layers))
            except InputError:
                layers = facts.layers  # the check of distillation reports this error
            facts = replace(facts, layers=layers)
        return replace(self.teacher, facts=facts)

    def _read_given_student(self, given: Path, stage: Stage) -> CheckedModel:
        """Read a student that `inputs` gives. Its weights are not hashed, which may take long."""
        if kind_of(given) != "folder":
            return read_model(given, stage, self._findings)
        find_weights(given, stage, self._findings)
        # The rule is that of the stages. A foreign configuration is read only behind the door.
        inputs = self._config.inputs
        if not inputs.trusted_keys and not kind_of(given / FILE_NAME):
            check_trusted(given, trusted=inputs.trust_model)
            return read_model(given, stage, self._findings)
        with described_student(given, inputs.trusted_keys) as folder:
            return read_model(folder, stage, self._findings)
