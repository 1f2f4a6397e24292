"""The conflicts of distillation: settings that do not suit the teacher, the ranks or each other."""

from post_dist.config.schema import RunConfig, Student
from post_dist.config.sources import Corpus
from post_dist.conflicts import Conflict, Layout
from post_dist.errors import InputError
from post_dist.losses.metric_labels import METRIC_LABELS
from post_dist.losses.terms import hidden_terms_in_use
from post_dist.models.facts import ModelFacts
from post_dist.models.student import layer_conflicts
from post_dist.runtime.shard_group import engine_conflicts


def required_sections(config: RunConfig) -> tuple[Corpus, Student]:
    """Return the sections that distillation reads and that have no default.

    Raises:
        InputError: one of them is missing.
    """
    if config.corpus is None or config.student is None:
        raise InputError("the run file lacks one of the sections corpus and student", "add it")
    return config.corpus, config.student


def conflicts(config: RunConfig, teacher: ModelFacts, layout: Layout) -> list[Conflict]:
    """Find what keeps the distill stage from running.

    Args:
        config: the run file.
        teacher: facts of the model to distill.
        layout: the ranks of the stage.

    Returns:
        All conflicts, those of the engine first.
    """
    try:
        corpus, student = required_sections(config)
    except InputError as error:
        return [Conflict(error.args[0], error.hint)]
    # All conflicts are listed at once, so a user can fix the run file in one go.
    found = engine_conflicts(config.engine, layout)
    found += layer_conflicts(student, teacher.layers)
    found += _training_conflicts(config, student, teacher)
    found += _cache_conflicts(config, teacher)
    found += _corpus_conflicts(corpus, teacher)
    return found


def _training_conflicts(config: RunConfig, student: Student, teacher: ModelFacts) -> list[Conflict]:
    """Check that the chosen parts of the student can be trained."""
    found = []
    if config.engine.zero_stage == 3 and not student.freeze_head:
        found.append(
            Conflict(
                "a trained head does not go with engine.zero_stage: 3, which scatters its weights",
                "set engine.zero_stage: 2, or student.freeze_head: true",
            )
        )
    if teacher.tied and student.freeze_embeddings != student.freeze_head:
        found.append(
            Conflict(
                "this model's embeddings and head are one tensor",
                "set student.freeze_embeddings and student.freeze_head alike",
            )
        )
    if teacher.scales_attention_by_layer:
        found.append(
            Conflict(
                "this model scales attention by the number of the layer, which changes when "
                "layers are left out",
                "choose another teacher",
            )
        )
    return found


def _cache_conflicts(config: RunConfig, teacher: ModelFacts) -> list[Conflict]:
    """Check that the teacher's signals can be cached as `distill.cache` says."""
    cache = config.distill.cache
    if cache == "none":
        return []
    # The masks of a masked model change in each epoch, so a cache cannot help.
    if teacher.masked:
        return [
            Conflict(
                "distill.cache: a masked model reads a sequence with other masks each time",
                "leave distill.cache out",
            )
        ]
    if cache == "hidden":
        return []
    found = []
    for term in hidden_terms_in_use(config.distill):
        found.append(
            Conflict(
                "distill.cache: sampled keeps no hidden states, which the "
                f"{METRIC_LABELS[term.metric]} compares",
                f"set distill.{term.weight_field}: 0",
            )
        )
    if not teacher.matrix_head:
        found.append(
            Conflict(
                "distill.cache: sampled needs a head that is one matrix",
                "set distill.cache: hidden",
            )
        )
    return found


def _corpus_conflicts(corpus: Corpus, teacher: ModelFacts) -> list[Conflict]:
    """Check the length and number of the sequences."""
    found = []
    if corpus.sequence_length > teacher.context_length:
        found.append(
            Conflict(
                f"corpus.sequence_length {corpus.sequence_length} exceeds the teacher's context "
                f"of {teacher.context_length}",
                "lower corpus.sequence_length",
            )
        )
    # Without max_tokens, the number of sequences is known only after the text is tokenized.
    if corpus.max_tokens is not None:
        sequences = corpus.max_tokens // corpus.sequence_length
        if sequences <= corpus.held_out_sequences:
            found.append(
                Conflict(
                    f"corpus.max_tokens makes {sequences} sequences, "
                    f"and {corpus.held_out_sequences} are to be held out",
                    "raise corpus.max_tokens, or lower corpus.held_out_sequences",
                )
            )
    return found
