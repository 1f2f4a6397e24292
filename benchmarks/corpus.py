"""Measure `post-dist corpus`: memory, speed, the cost of the hashes, and killed starts.

    python benchmarks/corpus.py [MEGABYTES ...]
    python benchmarks/corpus.py --kills MEGABYTES

The text is made of words that a Zipf distribution draws. A byte-level BPE tokenizer of 8,000 tokens
is trained on it. The first command writes corpus-cpu.md. The second prints what killed starts lose.
"""

import hashlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from markdown_table import markdown_table
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from post_dist.config.sources import Corpus
from post_dist.data.corpus_files import UNIT_BYTES, units_of
from post_dist.data.make_shards import make_shards
from post_dist.data.token_shards import check_parts, read_index

MEGABYTES = (50, 200)
WORKERS = (1, 2)
KILLS = 20
_RESULTS = Path(__file__).with_name("corpus-cpu.md")
_INTRO = """\
# The corpus stage (CPU)

- Made by: `python benchmarks/corpus.py`.
- Machine: two cores of an AMD EPYC, which other processes used too.
- Text: lines of 120 words. A byte-level BPE tokenizer of 8,000 tokens reads it.
- Columns: a second of a core is a second of processor time. The memory is that of all processes,
  sampled every 50 ms, above what each has after its imports. `hashing` is the check at each later
  start, in two threads.
- Result: shards of all numbers of processes are equal to the byte.

"""
_REPEATED_MEGABYTES = 50
_MIB = 1 << 20
_SEPARATOR = 0
_LINE_WORDS = 120


def main(megabytes: list[int]) -> None:
    """Measure each size with each number of workers, and write the table."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        rows = []
        for size in megabytes:
            text = _prepared_text(folder, size)
            digests = set()
            for workers in WORKERS:
                found = _measured(folder, text, workers)
                digests.add(found["digest"])
                rows.append(_row(size, workers, found))
                _write_results(rows)
            if len(digests) != 1:
                raise SystemExit("the number of processes changed the shards")


def _write_results(rows: list[tuple[str, ...]]) -> None:
    """Write the rows measured so far."""
    heads = (
        "text MB",
        "processes",
        "tokens/s of a core",
        "tokens/s",
        "peak above base, GiB",
        "hashing, GB/s",
    )
    _RESULTS.write_text(_INTRO + markdown_table(heads, rows) + "\n")


def _row(size: int, workers: int, found: dict[str, float]) -> tuple[str, ...]:
    return (
        str(size),
        str(workers),
        f"{found['tokens'] / found['core_seconds']:,.0f}",
        f"{found['tokens'] / found['seconds']:,.0f}",
        f"{found['above_base'] / 2**30:.2f}",
        f"{found['bytes'] / found['check_seconds'] / 1e9:.2f}",
    )


def _prepared_text(folder: Path, megabytes: int) -> Path:
    """Write a text of this size, and train the tokenizer if there is none yet."""
    text = folder / f"{megabytes}.txt"
    _write_text(text, megabytes)
    if not (folder / "tokenizer").exists():
        _train_tokenizer(text, folder / "tokenizer")
    return text


def _write_text(path: Path, megabytes: int) -> None:
    """Write lines of words that a Zipf distribution draws."""
    source = np.random.default_rng(0)
    letters = np.array(list("etaoinshrdlucmfwypvbgk"))
    words = ["".join(source.choice(letters, source.integers(2, 11))) for _ in range(30_000)]
    with path.open("w") as file:
        while file.tell() < min(megabytes, _REPEATED_MEGABYTES) * 1_000_000:
            numbers = np.minimum(source.zipf(1.2, 1000 * _LINE_WORDS), len(words)) - 1
            for start in range(0, len(numbers), _LINE_WORDS):
                line = numbers[start : start + _LINE_WORDS]
                file.write(" ".join(words[number] for number in line) + "\n")
    block = path.read_bytes()
    with path.open("ab") as file:
        for _ in range(megabytes // _REPEATED_MEGABYTES - 1):
            file.write(block)


def _train_tokenizer(text: Path, folder: Path) -> None:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=8000,
        special_tokens=["</s>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    with text.open() as lines:
        core.train_from_iterator((lines.readline() for _ in range(2000)), trainer)
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>").save_pretrained(folder)


def _start(folder: Path, text: Path, workers: int, corpora: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, __file__, "--one", str(folder), str(text), str(workers)]
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false"}
    return subprocess.Popen(
        [*command, str(corpora)], stdout=subprocess.PIPE, text=True, env=environment
    )


def _measured(folder: Path, text: Path, workers: int) -> dict[str, float]:
    """Make the shards in a fresh process, and return what it measures."""
    process = _start(folder, text, workers, folder / f"corpora-{text.stem}-{workers}")
    said, _ = process.communicate()
    return json.loads(said.splitlines()[-1])


def _one(folder: Path, text: Path, workers: int, corpora: Path) -> None:
    """Make the shards in this process, and print what they cost."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
    tokenizer(["a first text"])
    section = Corpus.model_validate({"path": text, "workers": workers})
    # The command starts no more processes than there are units of text.
    workers = min(workers, len(units_of(section)))
    processes = 1 if workers == 1 else 1 + workers
    base = processes * _resident(os.getpid())
    peak = _Peak()
    core_seconds = _core_seconds()
    start = time.monotonic()
    made = make_shards(section, tokenizer, _SEPARATOR, corpora)
    seconds = time.monotonic() - start
    core_seconds = _core_seconds() - core_seconds
    above_base = peak.end() - base

    index = read_index(made)
    start = time.monotonic()
    check_parts(made, index.parts)
    facts = {
        "tokens": index.tokens,
        "seconds": seconds,
        "core_seconds": core_seconds,
        "above_base": above_base,
        "bytes": sum(part.size for part in index.parts),
        "check_seconds": time.monotonic() - start,
        "digest": _digest(made),
    }
    print(json.dumps(facts))


def _core_seconds() -> float:
    """Return the processor time of this process and of its children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _digest(folder: Path) -> str:
    """Return a digest of the bytes of all files."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def _resident(process: int) -> int:
    """Return the resident memory of a process in bytes, or 0 if it has ended."""
    try:
        fields = Path(f"/proc/{process}/statm").read_text().split()
    except (OSError, IndexError):
        return 0
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")


class _Peak:
    """Samples the memory of this process and its children."""

    def __init__(self) -> None:
        self._most = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()

    def end(self) -> int:
        """Stop, and return the largest sum in bytes."""
        self._ended.set()
        self._thread.join()
        return self._most

    def _sample(self) -> None:
        own = os.getpid()
        while not self._ended.wait(0.05):
            processes = [own]
            for task in Path(f"/proc/{own}/task").iterdir():
                try:
                    processes += map(int, (task / "children").read_text().split())
                except OSError:
                    continue
            self._most = max(self._most, sum(map(_resident, set(processes))))


def kill(megabytes: int) -> None:
    """Kill starts with SIGKILL at random moments, and print what was lost."""
    source = random.Random(0)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        text = _prepared_text(folder, megabytes)
        corpora = folder / "killed"
        lost = []
        for _ in range(KILLS):
            before = _finished(corpora)
            process = _start(folder, text, WORKERS[-1], corpora)
            # Wait until it works again, so that the kill does not hit the imports alone.
            while process.poll() is None and _finished(corpora) == before:
                time.sleep(0.02)
            time.sleep(source.uniform(0, 3))
            if process.poll() is not None:
                break
            lost.append(_text_in_work(process.pid, text))
            process.send_signal(signal.SIGKILL)
            process.wait()
            print(f"killed with {lost[-1] / 1e6:.1f} MB in work", flush=True)
        _start(folder, text, WORKERS[-1], corpora).communicate()
        whole = folder / "whole"
        _start(folder, text, 1, whole).communicate()
        equal = _digest(next(whole.iterdir())) == _digest(next(corpora.iterdir()))
    print(
        f"{WORKERS[-1]} processes on {megabytes} MB, killed {len(lost)} times with SIGKILL: equal "
        f"to the byte to an undisturbed run: {'yes' if equal else 'no'}. Text read twice after a "
        f"kill, MB: {statistics.median(lost) / 1e6:.1f} in the median, {max(lost) / 1e6:.1f} at "
        f"most, {sum(lost) / 1e6:.1f} in all."
    )


def _text_in_work(process: int, text: Path) -> int:
    """Return how many bytes of unfinished units the workers of a process have read, at most."""
    tasks = Path(f"/proc/{process}/task").iterdir()
    workers = {worker for task in tasks for worker in (task / "children").read_text().split()}
    return sum(_read_of_unit(Path("/proc") / worker, text) for worker in workers)


def _read_of_unit(worker: Path, text: Path) -> int:
    for link in (worker / "fd").iterdir():
        if os.readlink(link) == str(text):
            facts = (worker / "fdinfo" / link.name).read_text()
            read = int(facts.split("pos:")[1].split()[0]) % UNIT_BYTES
            # A unit that is read to its end may not be finished yet.
            return read if read > _MIB else UNIT_BYTES
    return UNIT_BYTES


def _finished(corpora: Path) -> int:
    return len(list(corpora.glob("*/part-*.json")))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        _one(Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]), Path(sys.argv[5]))
    elif sys.argv[1:2] == ["--kills"]:
        kill(int(sys.argv[2]))
    else:
        main([int(each) for each in sys.argv[1:]] or list(MEGABYTES))
