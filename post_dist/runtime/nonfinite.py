"""The policy for values that are not finite: skip the step on every rank, stop after five skips."""

from post_dist.errors import InputError

LIMIT_IN_A_ROW = 5
"""One skipped step may be an unlucky batch; five in a row are a diverged run."""


class NonFiniteGuard:
    """Counts skipped steps.

    Private tuning does not use it. Whether an example's gradient is finite is private, so the
    mechanism counts such a gradient as zero and takes its step like any other.

    Args:
        label: name of the run, for the message.
        hint: what the user can change.
        unit: what is counted: steps, or micro-batches where a step may lose one of several.

    Attributes:
        skipped: number of skipped steps so far.
    """

    def __init__(
        self, label: str, hint: str = "lower the learning rate", unit: str = "steps"
    ) -> None:
        self._label = label
        self._hint = hint
        self._unit = unit
        self._in_a_row = 0
        self.skipped = 0

    def record(self, step: int, *, finite: bool, where: str = "") -> None:
        """Note the outcome of a step, which must be the same on every rank.

        Args:
            step: number of the step.
            finite: whether the step could be taken.
            where: which ranks saw the value, for the message.

        Raises:
            InputError: the last five steps were all skipped.
        """
        # One good step ends a series of bad ones.
        if finite:
            self._in_a_row = 0
            return
        self.skipped += 1
        self._in_a_row += 1
        if self._in_a_row >= LIMIT_IN_A_ROW:
            message = (
                f"{self._label}: {self._in_a_row} {self._unit} in a row were not finite, "
                f"up to step {step}{where}"
            )
            raise InputError(message, self._hint)
