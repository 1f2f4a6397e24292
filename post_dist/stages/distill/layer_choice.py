"""Choose the teacher's layers that make the student."""

import logging

from post_dist.config.schema import Student
from post_dist.data.corpus import PackedCorpus
from post_dist.models.language_model import LanguageModel
from post_dist.models.model_checks import running
from post_dist.models.student import least_harmful_layers, listed_layers
from post_dist.runtime.distributed import World

log = logging.getLogger(__name__)

_SEQUENCES = 32
"""Sequences of public text on which `layers: auto` measures each layer."""


def choose_layers(
    section: Student,
    teacher: LanguageModel,
    corpus: PackedCorpus,
    micro_batch_size: int,
    world: World,
) -> tuple[int, ...]:
    """Return the layers to keep, ascending. All ranks call it.

    Args:
        section: the section `student` of the run file.
        teacher: the teacher; it runs only for `layers: auto`.
        corpus: the public text.
        micro_batch_size: most sequences in one forward pass of a rank.
        world: the ranks.
    """
    # A named rule or a list of layers needs no measurement.
    if section.layers != "auto":
        layers = listed_layers(section, len(teacher.layers))
        rule = section.layers if isinstance(section.layers, str) else "listed"
        log.info("student: layers %s (%s)", list(layers), rule)
        return layers

    # Measure on the first sequences that training reads. Each rank takes its part of them.
    sample = []
    for batch in corpus.step_batches(0, _SEQUENCES, micro_batch_size, world):
        sample.append((corpus.training(batch).to(world.device), batch.weight))
    num_layers = int(section.num_layers or 0)
    with running(teacher, "without some of its layers"):
        layers = least_harmful_layers(
            teacher, sample, num_layers, section.frozen_lower_layers, world
        )
    log.info("student: layers %s (their removal costs most at the last position)", list(layers))
    return layers
