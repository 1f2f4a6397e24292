"""The report of a check, and the class that collects its findings."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from post_dist.conflicts import Conflict
from post_dist.errors import EnvironmentFault, PostDistError

_Result = TypeVar("_Result")

LabelTokens = dict[str, dict[str, str]]
"""Maps each class to its label words, and each word to its token."""


@dataclass(frozen=True)
class StageConflict:
    """A conflict, and the stage that would raise it.

    Attributes:
        stage: name of the stage, or another part of a run: `run file`, `corpus`, `public_task` or
            `signals`.
        message: what is wrong.
        hint: what to change; empty if the message says it already.
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
        stages: the stages that this run file can run. Only these were checked.
        conflicts: what keeps the stages from running.
        label_words: for `student` and `teacher`, the token of each label word in its tokenizer.
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
    """Conflicts by message. Several stages may find the same conflict; the first one is kept."""
    not_checked: list[str] = field(default_factory=list)

    def add(self, stage: str, found: Sequence[Conflict]) -> None:
        """Add the conflicts of a stage."""
        for conflict in found:
            known = StageConflict(stage, conflict.message, conflict.hint)
            self.conflicts.setdefault(conflict.message, known)

    def attempt(self, stage: str, work: Callable[[], _Result]) -> _Result | None:
        """Do a piece of work and return its result, or None if it raises an error.

        An error becomes a conflict. An `EnvironmentFault`, such as an unreachable hub, is not the
        run file's fault. It becomes an entry of `not_checked`.
        """
        try:
            return work()
        except EnvironmentFault as fault:
            self.not_checked.append(f"{stage}: {fault.args[0]}")
        except PostDistError as error:
            self.add(stage, [Conflict(error.args[0], error.hint)])
        return None
