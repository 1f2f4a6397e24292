"""What `post-dist corpus` needs: time of CPU cores, disk and memory.

If the text is here, a sample of it is tokenized, because tokenizers, texts and cores differ by
factors of two.
"""

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from post_dist.config.models import Teacher
from post_dist.config.schema import RunConfig
from post_dist.config.sources import Corpus
from post_dist.data.corpus import document_separator
from post_dist.data.corpus_files import LINE_TYPES, Unit, corpus_files, file_type
from post_dist.data.token_parts import TokenizerWork, finished_parts, tokenize_unit
from post_dist.errors import InputError, PostDistError
from post_dist.models.load import load_tokenizer, tokenizer_folder

TOKENS_PER_CORE_SECOND = 200_000
"""Speed of one process where nothing was measured (benchmarks/corpus-cpu.md)."""
MEMORY_GIB_PER_PROCESS = 0.5
"""Memory of one process with its imports."""
_TEXT_BYTES_PER_TOKEN = 4
_STORED_BYTES_PER_TOKEN = 4
_SAMPLE_BYTES = 1 << 20
"""Size of a piece of the sample."""
_FEWEST_BYTES = 1 << 16
"""A smaller sample tells nothing, and needs no plan."""
_SAMPLE_PIECES = 3
"""Number of pieces, from all over the text. They take a second or two."""


@dataclass(frozen=True)
class _Speed:
    """The tokens of a text, and the time that they take.

    Attributes:
        tokens_per_byte: tokens of a byte of the files.
        tokens_per_core_second: tokens of a second of a core.
        sampled_mb: megabytes of text that this was measured on; 0 if it is assumed.
    """

    tokens_per_byte: float = 1 / _TEXT_BYTES_PER_TOKEN
    tokens_per_core_second: float = TOKENS_PER_CORE_SECOND
    sampled_mb: float = 0.0


def plan_corpus(config: RunConfig) -> dict[str, float] | None:
    """Estimate what the job that tokenizes the corpus takes.

    Returns:
        `tokens`, `cores` of the job, `hours`, `core_hours`, `disk_gb` and `memory_gib` of all
        processes, `tokens_per_core_second`, and `sampled_mb`, the text that it was measured on, or
        0. None without a corpus, or if the size of the text is unknown: a hub data set, or
        missing files, without `max_tokens`.
    """
    section = config.corpus
    if section is None:
        return None
    speed = _Speed() if config.teacher is None else _speed(section, config.teacher)
    tokens = section.max_tokens or _tokens_in_files(section, speed)
    if tokens is None:
        return None
    cores = config.cluster.for_stage("corpus").cpus_per_task
    processes = min(section.workers or cores, cores)
    core_hours = tokens / speed.tokens_per_core_second / 3600
    # The tokens are written twice before duplicates are removed.
    copies = 2 if section.deduplicate else 1
    # Workers have a parent process, which reads nothing itself.
    started = processes + 1 if processes > 1 else 1
    return {
        "tokens": tokens,
        "cores": cores,
        "hours": core_hours / processes,
        "core_hours": core_hours,
        "disk_gb": copies * tokens * _STORED_BYTES_PER_TOKEN / 1e9,
        "memory_gib": started * MEMORY_GIB_PER_PROCESS,
        "tokens_per_core_second": speed.tokens_per_core_second,
        "sampled_mb": speed.sampled_mb,
    }


def _speed(section: Corpus, teacher: Teacher) -> _Speed:
    """Tokenize some of the text as `post-dist corpus` does, if text and tokenizer are here."""
    if section.path is None:
        return _Speed()
    try:
        pieces = _pieces(section)
        size = sum(pieces.values())
        if size < _FEWEST_BYTES:
            return _Speed()
        tokenizer = load_tokenizer(tokenizer_folder(teacher))
        with tempfile.TemporaryDirectory() as folder:
            whole = section.model_copy(update={"max_tokens": None, "max_rows": None})
            separator = document_separator(tokenizer)
            work = TokenizerWork(whole, tokenizer, separator, Path(folder), list(pieces))
            # The first call of a tokenizer is slow.
            tokenizer("some text")
            start = time.process_time()  # of all threads
            for number in range(len(pieces)):
                tokenize_unit(work, number, lambda: None)
            seconds = time.process_time() - start
            tokens = 0
            for number in range(len(pieces)):
                tokens += sum(part.tokens for part in finished_parts(work.folder, number))
    except (PostDistError, OSError):
        # Whoever runs `corpus` or `check` is told.
        return _Speed()
    return _Speed(tokens / size, tokens / seconds, size / 1e6)


def _pieces(section: Corpus) -> dict[Unit, int]:
    """Choose pieces of the text from all over it, and return the bytes of each.

    Large files that cannot be entered in the middle are left out.

    Raises:
        InputError: there are no files.
    """
    sizes = {file: file.stat().st_size for file in corpus_files(section)}
    total = sum(sizes.values())
    pieces = {}
    for number in range(_SAMPLE_PIECES):
        place = int(total * (number + 0.5) / _SAMPLE_PIECES)
        for file, size in sizes.items():
            if place < size:
                piece = _piece(file, size, place)
                pieces |= {} if piece is None else {piece: (piece.stop or size) - piece.start}
                break
            place -= size
    return pieces


def _piece(file: Path, size: int, place: int) -> Unit | None:
    """Return a piece of a file that begins at or before a place; None if it has no small one."""
    kind = file_type(file)
    if kind is not None and kind.suffix in LINE_TYPES and not kind.compression:
        start = max(0, min(place, size - _SAMPLE_BYTES))
        return Unit(file, start, min(start + _SAMPLE_BYTES, size))
    # The numbers of a Parquet file's units are those of its row groups.
    is_small = size <= _SAMPLE_BYTES and file.suffix.lower() != ".parquet"
    return Unit(file) if is_small else None


def _tokens_in_files(section: Corpus, speed: _Speed) -> float | None:
    """Estimate the tokens of local files by their size. Compressed text is counted as it is."""
    if section.path is None:
        return None
    # A plan is often made where the text is not.
    try:
        size = sum(file.stat().st_size for file in corpus_files(section))
    except (InputError, OSError):
        return None
    return size * speed.tokens_per_byte
