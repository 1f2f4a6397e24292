"""The conflicts of distillation: settings that do not suit the teacher, the ranks or each other."""

from transformers import PreTrainedTokenizerBase

from post_dist.admission.tokenizer_files import check_tokens
from post_dist.config.precision import BYTES_PER_ELEMENT, Precision
from post_dist.config.schema import Distill, RunConfig, Student
from post_dist.config.sources import Corpus
from post_dist.conflicts import Conflict, Layout
from post_dist.errors import ArtifactRefused, InputError
from post_dist.losses.metric_labels import METRIC_LABELS
from post_dist.losses.terms import hidden_terms_in_use
from post_dist.models.facts import ModelFacts
from post_dist.models.student import layer_conflicts
from post_dist.runtime.engine_conflicts import compile_conflicts, engine_conflicts
from post_dist.stages.distill.signal_files import files_of, most_files_of_a_step
from post_dist.stages.distill.signal_format import (
    GIB,
    exact_product,
    file_bytes,
    files_within,
    kept_bytes,
    kept_names,
)


def required_sections(config: RunConfig) -> tuple[Corpus, Student]:
    """Return the sections that distillation reads and that have no default.

    Raises:
        InputError: one of them is missing.
    """
    corpus, student = config.need_sections("corpus", "student")
    return corpus, student


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
    found += compile_conflicts(config.engine, layout)
    found += _training_conflicts(config, student, teacher)
    found += _cache_conflicts(config, teacher)
    found += _corpus_conflicts(corpus, teacher)
    # `auto` is bf16 on a GPU. The stage checks again with the precision of its device.
    precision = config.engine.precision
    found += limit_conflicts(config, teacher, "bf16" if precision == "auto" else precision)
    # Without max_tokens, the number of sequences is known only after the text is tokenized.
    sequences = _training_sequences(corpus)
    if sequences is not None and sequences > 0:
        found += epoch_conflicts(config.distill, sequences)
    return found


def token_conflicts(tokenizer: PreTrainedTokenizerBase, teacher: ModelFacts) -> list[Conflict]:
    """Check that the teacher has an embedding for each token, as the owner of a student does."""
    try:
        check_tokens(tokenizer, teacher.vocabulary)
    except ArtifactRefused as error:
        return [
            Conflict(
                f"the teacher: {error.args[0]}, so every owner would refuse its student",
                "resize the teacher's embeddings, or remove these tokens from the tokenizer",
            )
        ]
    return []


def limit_conflicts(config: RunConfig, teacher: ModelFacts, precision: Precision) -> list[Conflict]:
    """Check that `distill.cache_gib` has room for the files of a step, and for one more.

    Args:
        config: the run file.
        teacher: facts of the model to distill.
        precision: precision of the teacher.
    """
    section = config.distill
    if section.cache_gib is None:
        return []
    corpus, student = required_sections(config)
    exact = exact_product(teacher, fp32=precision == "fp32")
    names = kept_names(section, student, exact_product=exact)
    of_token = kept_bytes(names, teacher.width, BYTES_PER_ELEMENT[precision])
    # With one more, workers make the next file while the student trains.
    of_step = most_files_of_a_step(section.batch_size) + 1
    needed = min(of_step, files_of(section.steps * section.batch_size))
    if files_within(section.cache_gib, of_token, corpus.sequence_length) >= needed:
        return []
    of_file = file_bytes(of_token, corpus.sequence_length) / GIB
    least = f"{1.01 * needed * of_file:.3g}"
    return [
        Conflict(
            f"distill.cache_gib: {section.cache_gib:g} is too small: a file of signals takes "
            f"{of_file:.3g} GiB, and a step needs room for {needed}",
            f"set it to at least {least}, and higher if several ranks or workers make files",
        )
    ]


def epoch_conflicts(section: Distill, sequences: int) -> list[Conflict]:
    """Check that a run with `distill.cache_gib` reads each of the training sequences once."""
    read = section.steps * section.batch_size
    if section.cache_gib is None or read <= sequences:
        return []
    return [
        Conflict(
            f"distill.cache_gib: the steps read {read} sequences, and the corpus has {sequences}: "
            "a second epoch reads files that are gone",
            "leave distill.cache_gib out, or lower distill.steps or distill.batch_size",
        )
    ]


def _training_conflicts(config: RunConfig, student: Student, teacher: ModelFacts) -> list[Conflict]:
    """Check that the chosen parts of the student can be trained."""
    found = []
    if config.engine.zero_stage == 3 and config.engine.compile:
        found.append(
            Conflict(
                "engine.compile: the student is sharded here",
                "set engine.zero_stage: 2, or leave engine.compile out",
            )
        )
    if config.engine.zero_stage == 3 and not student.freeze_head:
        found.append(
            Conflict(
                "a trained head does not go with engine.zero_stage: 3, which scatters its weights",
                "set engine.zero_stage: 2, or student.freeze_head: true",
            )
        )
    if teacher.has_other_parts:
        found.append(
            Conflict(
                f"the teacher's language model is a part of a larger one ({teacher.family})",
                "save the language model alone, and give that as the teacher",
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
    left = _training_sequences(corpus)
    if left is not None and left <= 0:
        found.append(
            Conflict(
                f"corpus.max_tokens makes {left + corpus.held_out_sequences} sequences, "
                f"and {corpus.held_out_sequences} are to be held out",
                "raise corpus.max_tokens, or lower corpus.held_out_sequences",
            )
        )
    return found


def _training_sequences(corpus: Corpus) -> int | None:
    """Return the largest number of sequences to train on, or None without `corpus.max_tokens`.

    If more are held out than there are, it is negative.
    """
    if corpus.max_tokens is None:
        return None
    return corpus.max_tokens // corpus.sequence_length - corpus.held_out_sequences
