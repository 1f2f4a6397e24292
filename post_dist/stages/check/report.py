"""What a check of a run file finds, and how it collects it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from post_dist.conflicts import Conflict
from post_dist.errors import EnvironmentFault, PostDistError

_Result = TypeVar("_Result")

LabelTokens = dict[str, dict[str, str]]
"""For each class, its label words and the tokens that they become."""


@dataclass(frozen=True)
class StageConflict:
    """A conflict, and the stage that would raise it.

    Attributes:
        stage: name of the stage, or `run file`.
        message: what is wrong.
        hint: what to change; empty where the message says it.
    """

    stage: str
    message: str
    hint: str = ""


@dataclass(frozen=True)
class PlanEpsilon:
    """The privacy cost of one private plan of the run.

    Attributes:
        epsilon: epsilon at `delta`.
        delta: delta of the plan.
        noise_multiplier: noise multiplier of the plan.
    """

    epsilon: float
    delta: float
    noise_multiplier: float


@dataclass(frozen=True)
class CheckReport:
    """What a check found.

    Attributes:
        stages: the stages that this run file can run, which were checked.
        conflicts: what keeps them from running.
        label_words: for `student` and `teacher`, the tokens of the label words in its tokenizer.
        epsilon: the cost of each private plan.
        not_checked: what could not be checked, and why.
    """

    stages: tuple[str, ...]
    conflicts: tuple[StageConflict, ...]
    label_words: dict[str, LabelTokens]
    epsilon: tuple[PlanEpsilon, ...]
    not_checked: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing keeps the stages from running."""
        return not self.conflicts


@dataclass
class Findings:
    """Collects what the checks find."""

    conflicts: dict[str, StageConflict] = field(default_factory=dict)
    """By message: several stages read the same task, and one line about it is enough."""
    not_checked: list[str] = field(default_factory=list)

    def add(self, stage: str, found: Sequence[Conflict]) -> None:
        """Add the conflicts of a stage."""
        for conflict in found:
            known = StageConflict(stage, conflict.message, conflict.hint)
            self.conflicts.setdefault(conflict.message, known)

    def attempt(self, stage: str, work: Callable[[], _Result]) -> _Result | None:
        """Do a piece of work; keep its error as a conflict and return None.

        What this machine cannot reach, such as the hub, is not the run file's fault.
        """
        try:
            return work()
        except EnvironmentFault as fault:
            self.not_checked.append(f"{stage}: {fault.args[0]}")
        except PostDistError as error:
            self.add(stage, [Conflict(error.args[0], error.hint)])
        return None
