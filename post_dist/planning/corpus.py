"""What `post-dist corpus` needs: time of CPU cores, disk and memory."""

from post_dist.config.schema import RunConfig
from post_dist.config.sources import Corpus
from post_dist.data.corpus_files import corpus_files
from post_dist.errors import InputError

TOKENS_PER_CORE_SECOND = 200_000
"""Speed of one process (benchmarks/corpus-cpu.md). Tokenizers differ by a factor of two."""
MEMORY_GIB_PER_PROCESS = 0.5
"""Memory of one process with its imports."""
_TEXT_BYTES_PER_TOKEN = 4
_STORED_BYTES_PER_TOKEN = 4


def plan_corpus(config: RunConfig) -> dict[str, float] | None:
    """Estimate what the job that tokenizes the corpus takes.

    Returns:
        `tokens`, `cores` of the job, `hours`, `core_hours`, `disk_gb` and `memory_gib` of all
        processes. None without a corpus, or if the size of the text is unknown: a hub data set, or
        missing files, without `max_tokens`.
    """
    section = config.corpus
    if section is None:
        return None
    tokens = section.max_tokens or _tokens_in_files(section)
    if tokens is None:
        return None
    cores = config.cluster.for_stage("corpus").cpus_per_task
    processes = min(section.workers or cores, cores)
    core_hours = tokens / TOKENS_PER_CORE_SECOND / 3600
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
    }


def _tokens_in_files(section: Corpus) -> float | None:
    """Estimate the tokens of local files by their size. Compressed text is counted as it is."""
    if section.path is None:
        return None
    # A plan is often made where the text is not.
    try:
        size = sum(file.stat().st_size for file in corpus_files(section))
    except (InputError, OSError):
        return None
    # Text in other scripts than Latin has more bytes per token.
    return size / _TEXT_BYTES_PER_TOKEN
