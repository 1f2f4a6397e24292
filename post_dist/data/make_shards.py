"""Make the shards of a corpus: tokenize its units, over several processes, and seal the parts.

Processes share nothing but the folder. A start that was killed loses only unfinished parts.
"""

import hashlib
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from post_dist.config.sources import Corpus
from post_dist.data.corpus_files import corpus_digests, file_type, source_digest, units_of
from post_dist.data.duplicates import without_duplicates
from post_dist.data.shard_worker import WorkerPool
from post_dist.data.token_parts import (
    PartRecord,
    TokenizerWork,
    cut_part,
    finished_parts,
    record_path,
    tokenize_unit,
)
from post_dist.data.token_shards import (
    FORMAT_VERSION,
    INDEX,
    ShardIndex,
    check_parts,
    is_sealed,
    read_index,
)
from post_dist.errors import InputError
from post_dist.files import digest_of, lock_file, make_folder, write_file, writing
from post_dist.runtime.progress import progress
from post_dist.runtime.stop import leave_if_requested
from post_dist.runtime.watchdog import phase

log = logging.getLogger(__name__)

_POLL_SECONDS = 0.5
_KEPT = "the finished parts of the tokenized corpus are kept"
_LOCK = "lock"
_WITH_DUPLICATES = "with-duplicates"


def make_shards(
    section: Corpus, tokenizer: PreTrainedTokenizerBase, separator: int, corpora: Path
) -> Path:
    """Return the folder of sealed shards of a corpus. They are made if they are missing.

    Args:
        section: the section `corpus` of the run file.
        tokenizer: the teacher's tokenizer.
        separator: token at the end of each document.
        corpora: parent of the folders of all corpora.

    Raises:
        InputError: a file cannot be read, or the corpus has no documents.
        ArtifactRefused: a part is not as it was written.
        EnvironmentFault: the disk is full, or a worker has died.
        Interrupted: this process was asked to stop. Finished parts are kept.
    """
    contents = _contents(section, tokenizer, separator)
    folder = corpora / digest_of(contents)[:16]
    if not is_sealed(folder):
        with _held(folder):
            # Another run may have made them in the meantime.
            if not is_sealed(folder):
                work = TokenizerWork(section, tokenizer, separator, folder, units_of(section))
                fill_folder(work, contents)
                return folder
    # A start that was killed after it had sealed the shards leaves this folder.
    shutil.rmtree(folder / _WITH_DUPLICATES, ignore_errors=True)
    check_parts(folder, read_index(folder).parts)
    return folder


def _contents(
    section: Corpus, tokenizer: PreTrainedTokenizerBase, separator: int
) -> dict[str, Any]:
    """Return everything that the tokens depend on."""
    files = []
    # The same bytes are other documents in a file of another type. Names do not matter.
    for path, digest in corpus_digests(section):
        files.append([str(file_type(path)), digest])
    # The length of sequences is left out, because the shards do not depend on it.
    fields = {"hub_config", "hub_split", "text", "max_rows", "max_tokens"}
    # Older shards do not name this field.
    if section.deduplicate:
        fields.add("deduplicate")
    return {
        "version": FORMAT_VERSION,
        "source": source_digest(section),
        "files": files,
        "settings": section.model_dump(mode="json", include=fields),
        "tokenizer": _tokenizer_digest(tokenizer),
        "separator": separator,
    }


def _tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a digest of everything that a tokenizer's output depends on."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    # Tokenizers in pure Python have no file that describes all of them.
    if backend is None:
        facts = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
        return digest_of(facts | {"special": tokenizer.all_special_tokens})
    facts = json.loads(backend.to_str())
    # Each call of the tokenizer sets these two.
    facts.pop("truncation", None)
    facts.pop("padding", None)
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Create and lock a folder. If another run makes the same shards, wait for it.

    Raises:
        InputError: the folder cannot be written to.
        Interrupted: this process was asked to stop while it waited.
    """
    make_folder(folder)
    with writing(folder):
        lock = (folder / _LOCK).open("w")
    # The file stays open while the body runs, because closing it releases the lock.
    with lock:
        while not lock_file(lock):
            leave_if_requested("another run makes the tokenized corpus")
            phase(f"waiting for another run that makes {folder}")
            time.sleep(_POLL_SECONDS)
        yield


def fill_folder(work: TokenizerWork, contents: dict[str, Any]) -> None:
    """Make the missing parts of a locked folder, and seal it.

    Args:
        work: the corpus and the tokenizer.
        contents: what the tokens depend on, for the index.

    Raises:
        PostDistError: as `make_shards`.
    """
    folder = work.folder
    with writing(folder):
        _prepare(folder)
    make_parts = _distinct_parts if work.section.deduplicate else _made_parts
    parts = make_parts(work)
    index = ShardIndex(contents, parts)
    # The index comes first. A start that is killed here leaves sealed shards.
    with writing(folder):
        index.write(folder)
        _remove_unused(folder, parts)
    log.info("corpus: %d tokens of %d documents in %s", index.tokens, index.documents, folder)


def _made_parts(work: TokenizerWork) -> list[PartRecord]:
    """Make the parts that are missing, and compare the others with their digests."""
    folder = work.folder
    # A part of an earlier start may have been damaged since.
    kept = sorted(folder.glob("part-*.safetensors"))
    _tokenize(work)
    parts = _used_parts(work)
    # A file may be empty, but not the whole corpus.
    if not any(part.documents for part in parts):
        source = work.section.path or work.section.hub
        raise InputError(f"corpus: {source} has no rows")
    check_parts(folder, [part for part in parts if folder / part.name in kept])
    return parts


def _distinct_parts(work: TokenizerWork) -> list[PartRecord]:
    """Make the parts in a folder of their own, and write them without duplicates."""
    whole = replace(work, folder=work.folder / _WITH_DUPLICATES)
    make_folder(whole.folder)
    with writing(whole.folder):
        # What a killed search for duplicates has left is large.
        for scratch in whole.folder.glob(".buckets-*"):
            shutil.rmtree(scratch)
        _prepare(whole.folder)
    kept = [path.name for path in work.folder.glob("part-*.safetensors")]
    parts = without_duplicates(whole.folder, _made_parts(whole), work.folder)
    check_parts(work.folder, [part for part in parts if part.name in kept])
    return parts


def _prepare(folder: Path) -> None:
    """Remove what a killed start has left, and restore the records of sealed parts."""
    for path in folder.glob(".*"):
        # A worker of a killed start may still be ending.
        path.unlink(missing_ok=True)
    if not (folder / INDEX).exists():
        return
    # Someone has deleted a damaged part. Only its unit is made again.
    for part in read_index(folder).parts:
        path = record_path(folder / part.name)
        write_file(path, lambda partial, part=part: partial.write_text(json.dumps(asdict(part))))


def _remove_unused(folder: Path, parts: list[PartRecord]) -> None:
    """Remove what the index replaces: records, duplicates, and parts after the limits."""
    used = {part.name for part in parts}
    for path in folder.glob("part-*"):
        if path.name not in used:
            path.unlink()
    shutil.rmtree(folder / _WITH_DUPLICATES, ignore_errors=True)


class _Counter:
    """Counts what the finished units hold, in order, until the corpus has enough.

    Args:
        work: the corpus.
    """

    def __init__(self, work: TokenizerWork) -> None:
        self._folder = work.folder
        self._tokens_left = work.section.max_tokens or sys.maxsize
        self._documents_left = work.section.max_rows or sys.maxsize

    @property
    def enough(self) -> bool:
        """Whether no further unit is needed."""
        return self._tokens_left <= 0 or self._documents_left <= 0

    def add(self, unit: int) -> None:
        """Count a finished unit."""
        for part in finished_parts(self._folder, unit):
            self._tokens_left -= part.tokens
            self._documents_left -= part.documents


def _tokenize(work: TokenizerWork) -> None:
    """Make the parts of all units that are needed."""
    workers = min(work.section.workers or _cores(), len(work.units))
    if workers > 1:
        _tokenize_in_processes(work, workers)
        return

    # One process needs no pool, which would cost seconds of imports.
    counter = _Counter(work)
    with progress("tokenizing the corpus", len(work.units)) as advance:
        for number in range(len(work.units)):
            tokenize_unit(work, number, _between)
            advance("")
            counter.add(number)
            if counter.enough:
                return


def _cores() -> int:
    """Return the number of cores that this process may use."""
    allowed = len(os.sched_getaffinity(0))
    # Not every cluster binds a task to the cores that it has asked for.
    asked = os.environ.get("SLURM_CPUS_PER_TASK", "")
    return min(allowed, int(asked)) if asked.isdecimal() else allowed


def _between() -> None:
    phase("tokenizing the corpus")
    leave_if_requested(_KEPT)


def _tokenize_in_processes(work: TokenizerWork, workers: int) -> None:
    """Make the parts over several processes.

    Units after the last one that is needed may be made too. They are not used.
    """
    # Units are counted in order, so the result does not depend on which ends first.
    counter = _Counter(work)
    pool = WorkerPool(work, workers)
    threads = ThreadPoolExecutor(workers)
    try:
        made = [threads.submit(pool.make, number) for number in range(len(work.units))]
        with progress("tokenizing the corpus", len(made)) as advance:
            for number, unit in enumerate(made):
                # The main thread must wake up to see a signal.
                while not wait([unit], timeout=_POLL_SECONDS).done:
                    leave_if_requested(_KEPT)
                unit.result()
                advance("")
                counter.add(number)
                if counter.enough:
                    return
    finally:
        # The threads wait for the workers, so the workers end first.
        threads.shutdown(wait=False, cancel_futures=True)
        pool.end()
        threads.shutdown()


def _used_parts(work: TokenizerWork) -> list[PartRecord]:
    """Return the parts up to `max_tokens` and `max_rows`, the last one cut there."""
    parts: list[PartRecord] = []
    tokens_left = work.section.max_tokens or sys.maxsize
    documents_left = work.section.max_rows or sys.maxsize
    for unit in range(len(work.units)):
        for part in finished_parts(work.folder, unit):
            # Parts were made before anyone knew where the limit is.
            if part.tokens > tokens_left or part.documents > documents_left:
                part = cut_part(work.folder, part, tokens_left, documents_left)
            # The order of the parts is that of the text.
            parts.append(part)
            tokens_left -= part.tokens
            documents_left -= part.documents
            if tokens_left <= 0 or documents_left <= 0:
                return parts
    return parts
