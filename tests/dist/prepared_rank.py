"""The command line of one rank, to which something is done before: `prepared_rank.py PREPARATION ARGUMENT...`"""

import os
import signal
import sys
from collections.abc import Callable

from post_dist.cli import main
from post_dist.stages import prompt_training


def stopped_at_its_third_step() -> None:
    real = prompt_training.schedule_at

    def schedule_at(section: object, step: int, steps: int) -> float:
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(section, step, steps)

    prompt_training.schedule_at = schedule_at


PREPARATIONS: dict[str, Callable[[], object]] = {"nothing": lambda: None, "stopped at its third step": stopped_at_its_third_step}

if __name__ == "__main__":
    PREPARATIONS[sys.argv.pop(1)]()
    main()
