"""Compare what was tuned with what it began as, by a noisy count that the privacy plan pays for.

One more validation example changes the difference of the two counts by one at most.
"""

import json
import logging
from collections.abc import Sequence

import torch

from post_dist.artifacts.strict_json import read_number
from post_dist.files import write_file
from post_dist.privacy.search import charge_score, noisy_score
from post_dist.privacy.trainer import PrivateTrainer

log = logging.getLogger(__name__)

_DEVIATIONS = 2.0
"""A difference of fewer standard deviations of the noise does not tell the two apart."""


class Comparison:
    """The comparison of one run. What to compare with is counted when it is made.

    Args:
        trainer: the part that is tuned, and the run.

    Raises:
        InputError: the data have no validation examples.
        Interrupted: the run was asked to stop.
    """

    def __init__(self, trainer: PrivateTrainer) -> None:
        self._part = trainer.part
        self._run = trainer.run
        # A run may be killed after its key is destroyed. The noise cannot be drawn again then.
        self._file = trainer.run.checkpoints / "comparison.json"
        self._right_before = 0
        if not self._file.exists():
            self._right_before = self._part.count_right(self._part.parameters())

    def finish(self, parameters: Sequence[torch.Tensor]) -> None:
        """Release with noise how many more validation examples the tuned parameters get right."""
        if not self._file.exists():
            difference = self._part.count_right(parameters) - self._right_before
            charge_score(self._run, difference, trial=0)
            gained = noisy_score(difference, self._run.plan, self._run.source, trial=0)
            write_file(self._file, lambda partial: partial.write_text(json.dumps(gained)))
        try:
            gained = read_number(self._file)
        except (OSError, ValueError):
            # It was paid for, and without the key it cannot be drawn again.
            log.warning("tune: %s is damaged, so nothing tells what tuning has gained", self._file)
            return
        deviation = float(self._run.plan.score_noise_multiplier or 0.0)
        measured = (
            f"with noise of standard deviation {deviation:g}, {gained:+.0f} validation examples "
            "are right that were not before tuning"
        )
        if gained > _DEVIATIONS * deviation:
            log.info("tune: %s", measured)
        elif gained < -_DEVIATIONS * deviation:
            log.warning(
                "tune: the result is WORSE than what tuning began with: %s; use what it began "
                "with, or give tuning more examples or a larger epsilon",
                measured,
            )
        else:
            log.warning(
                "tune: the result cannot be told from what tuning began with: %s; more examples or "
                "a larger epsilon help",
                measured,
            )
