"""The settings of attacks on a student. The planner reads them without loading DeepSpeed."""

import math

from post_dist.config.schema import RunConfig
from post_dist.stages.distill.conflicts import required_sections


def attacks_config(config: RunConfig) -> RunConfig:
    """Return the run file of all attacks together: no layer is frozen, and nothing is cached.

    Raises:
        InputError: the run file lacks the section `corpus` or `student`.
    """
    _, student = required_sections(config)
    steps = sum(_steps(config, tokens) for tokens in config.distill.attack_tokens)
    # A cache covers the steps of the student alone.
    changes = {"steps": steps, "cache": "none", "cache_gib": None}
    attacks = config.distill.model_copy(update=changes)
    unfrozen = student.model_copy(update={"frozen_lower_layers": 0})
    return config.model_copy(update={"distill": attacks, "student": unfrozen})


def attack_config(config: RunConfig, tokens: int) -> RunConfig:
    """Return the run file of one attack, which is a distillation on a number of tokens.

    Raises:
        InputError: the run file lacks the section `corpus` or `student`.
    """
    steps = {"steps": _steps(config, tokens)}
    attacks = attacks_config(config)
    return attacks.model_copy(update={"distill": attacks.distill.model_copy(update=steps)})


def _steps(config: RunConfig, tokens: int) -> int:
    corpus, _ = required_sections(config)
    return math.ceil(tokens / (config.distill.batch_size * corpus.sequence_length))
