"""The settings of an attack on a student. The planner reads them without loading DeepSpeed."""

import math

from post_dist.config.schema import RunConfig
from post_dist.stages.distill.conflicts import required_sections


def attack_config(config: RunConfig, tokens: int) -> RunConfig:
    """Return the run file of an attack: distillation of all layers on a number of tokens.

    Raises:
        InputError: the run file lacks the section `corpus` or `student`.
    """
    corpus, student = required_sections(config)
    section = config.distill
    steps = math.ceil(tokens / (section.batch_size * corpus.sequence_length))
    # A cache covers the steps of the student alone.
    attack = section.model_copy(update={"steps": steps, "cache": "none", "cache_gib": None})
    unfrozen = student.model_copy(update={"frozen_lower_layers": 0})
    return config.model_copy(update={"distill": attack, "student": unfrozen})
