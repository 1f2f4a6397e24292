"""The policy for values that are not finite: skip the step, and stop after five skips in a row."""

from post_dist.errors import InputError

LIMIT_IN_A_ROW = 5
"""A single skipped step may be an unlucky batch. Five in a row mean that the run has diverged."""


class NonFiniteGuard:
    """Counts skipped steps.

    Private tuning does not use it. Whether an example's gradient is finite is private. The private
    mechanism counts a gradient that is not finite as zero and takes every step.

    Args:
        label: name of the run, for the message.
        hint: what the user can change.
        unit: what is skipped and counted, `steps` or `micro-batches`.

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
        """Record the outcome of a step, which must be the same on every rank.

        Args:
            step: number of the step.
            finite: whether all values of the step were finite.
            where: the ranks with a value that is not finite, for the message.

        Raises:
            InputError: the last five steps were all skipped.
        """
        # One good step resets the count.
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
