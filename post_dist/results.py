"""What the functions of the Python API return. Loading this file loads no torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from post_dist.artifacts.evaluation_table import TABLE_FILE


@dataclass(frozen=True)
class SignalsResult:
    """The teacher's signals, which `distill` reads.

    Attributes:
        path: the folder of their files.
        files: number of files.
    """

    path: Path
    files: int

    def __str__(self) -> str:
        return str(self.path)


@dataclass(frozen=True)
class StudentResult:
    """A distilled student.

    Attributes:
        path: the run folder, with settings, metrics and logs.
        artifact: the student, a folder that `from_pretrained` of transformers loads.
        held_out: metrics of the student on held-out public text, by name.
    """

    path: Path
    artifact: Path
    held_out: Mapping[str, float]

    def __str__(self) -> str:
        return str(self.artifact)


@dataclass(frozen=True)
class TimedSettings:
    """Settings of a private run for the time that there is.

    Attributes:
        gradients_per_second: gradients of single examples of full length on this machine.
        settings: the value of each field of the run file that was chosen, such as `privacy.steps`.
    """

    gradients_per_second: float
    settings: Mapping[str, float]

    @property
    def overrides(self) -> list[str]:
        """The settings as `load_run` takes them."""
        return [f"{field}={value}" for field, value in self.settings.items()]


@dataclass(frozen=True)
class PromptResult:
    """A soft prompt.

    Attributes:
        path: the run folder, with settings, metrics and logs.
        artifact: the prompt, a folder that `PeftModel.from_pretrained` loads.
        epsilon: the epsilon that the prompt claims, or None without differential privacy.
        delta: the delta of that epsilon, or None.
        effect: what a transferred prompt does to the large LLM on public text, by name; empty for
            other prompts.
        student: the student that the prompt was tuned on; None for a transferred prompt.
    """

    path: Path
    artifact: Path
    epsilon: float | None
    delta: float | None
    effect: Mapping[str, Any] = field(default_factory=dict)
    student: Path | None = None

    def __str__(self) -> str:
        return str(self.artifact)


@dataclass(frozen=True)
class PublicPromptResult:
    """A public prompt on the student, which no private data has touched.

    Attributes:
        path: the run folder, with settings, metrics and logs.
        artifact: the prompt, a folder that `inputs.public_prompt` takes.
    """

    path: Path
    artifact: Path

    def __str__(self) -> str:
        return str(self.artifact)


@dataclass(frozen=True)
class TransferResult:
    """The prompts for the large LLM.

    Attributes:
        prompts: one prompt for each source prompt, in the order of `inputs.source_prompt`.
    """

    prompts: tuple[PromptResult, ...]

    def __str__(self) -> str:
        return "\n".join(str(prompt) for prompt in self.prompts)


@dataclass(frozen=True)
class EvaluationResult:
    """The comparison table.

    Attributes:
        path: the run folder.
        artifact: the folder that holds `table.json`.
        table: the object that `post-dist evaluate --json` prints: `task`, `split` and `rows`.
        report: the HTML page, or None if no page was written.
    """

    path: Path
    artifact: Path
    table: Mapping[str, Any]
    report: Path | None = None

    def __str__(self) -> str:
        from post_dist.report.tables import table_text

        return f"{table_text(self.table)}\n{self.place}"

    @property
    def place(self) -> str:
        """A line that names the report page, or the table's file if there is no page."""
        if self.report is not None:
            return f"report: {self.report}"
        return f"table: {self.artifact / TABLE_FILE}"


@dataclass(frozen=True)
class PrivacyCost:
    """The privacy cost of a plan for private tuning.

    Attributes:
        epsilon: epsilon of the plan at `delta`.
        delta: delta of the (epsilon, delta) guarantee.
        noise_multiplier: sigma, the standard deviation of the noise divided by the clipping norm.
        sampling_probability: q, the probability of each training example to be in a step's batch.
        steps: number of steps.
        accountant: name of the accountant that computed epsilon.
        cross_checks: epsilon by other accountants, by their names. For a private search, this is
            the epsilon of one trial.
        epsilon_at_delta: epsilon at stricter deltas, by delta.
        true_positive_rate_at_1_percent_false: upper bound on the true positive rate of any
            membership inference attack at a false positive rate of 1%.
        mean_trials: expected number of trials of a private search, or None.
        private: False if the noise comes from a seed, with which anybody can subtract it.
    """

    epsilon: float
    delta: float
    noise_multiplier: float
    sampling_probability: float
    steps: int
    accountant: str
    cross_checks: Mapping[str, float]
    epsilon_at_delta: Mapping[str, float]
    true_positive_rate_at_1_percent_false: float
    mean_trials: float | None
    private: bool
