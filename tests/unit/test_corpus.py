"""The corpus: which documents are read, and the shards that they become."""

import gzip
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from post_dist.artifacts.manifest import FILE_NAME
from post_dist.artifacts.run_folder import SETTINGS
from post_dist.config.schema import Corpus
from post_dist.config.sources import DataSource, Task
from post_dist.data import documents as documents_module
from post_dist.data import duplicates, shard_worker, token_parts
from post_dist.data import make_shards as make_shards_module
from post_dist.data.corpus import build_corpus
from post_dist.data.corpus_files import units_of
from post_dist.data.documents import documents_of
from post_dist.data.make_shards import fill_folder, make_shards
from post_dist.data.order import RankBatch
from post_dist.data.sources import read_rows
from post_dist.data.split_reads import count_split_read
from post_dist.data.token_parts import DOCUMENT_LENGTHS, TokenizerWork, finished_parts
from post_dist.data.token_shards import TokenShards, read_index
from post_dist.errors import ArtifactRefused, EnvironmentFault, InputError, Interrupted
from post_dist.files import digest_of, lock_file
from post_dist.privacy.ledger import ledger_beside
from post_dist.runtime import stop
from post_dist.runtime.distributed import World

WORDS = tiny.tokenizer("llama")
END = WORDS.eos_token_id
ALONE = World(0, 1, 0, "none", torch.device("cpu"))

ODD_LINES = (
    "plain text",
    "",
    "  blanks around  ",
    "windows\r",
    "a\x0bb\x0cc\x1cd",
    "next\x85line\u2028and\u2029more",
    "naïve 東京 \U0001f600",
    "old mac\rtwo",
    "</s> in the text",
    "a longer line " * 30,
)
"""Lines on which readers of text differ."""


def section_of(path: object, **fields: object) -> Corpus:
    base = {"path": path, "sequence_length": 16, "held_out_sequences": 1, "workers": 1}
    return Corpus.model_validate(base | fields)


def documents(section: Corpus, unit_bytes: int = 1 << 20) -> list[str]:
    """All documents, read unit by unit."""
    found = []
    for unit in units_of(section, unit_bytes):
        found += documents_of(section, unit)
    return found


def stream_of(texts: list[str]) -> list[int]:
    """The tokens of documents, as the first version of the corpus packed them."""
    stream = []
    for text in texts:
        stream += [*WORDS(text, add_special_tokens=False).input_ids, END]
    return stream


def tokens_in(folder: Path) -> list[int]:
    shards = TokenShards(folder)
    return shards.read(0, len(shards)).tolist()


def texts(count: int, seed: int = 0) -> list[str]:
    return [text for text, _ in tiny.sentences(count, seed)]


def work_in(folder: Path, section: Corpus, **fields: Any) -> TokenizerWork:
    """Work with units and parts so small that a short text has many of them."""
    folder.mkdir(exist_ok=True)
    small = {"units": units_of(section, 600), "part_characters": 250} | fields
    return TokenizerWork(section, WORDS, END, folder, **small)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# Documents.


@settings(max_examples=60, deadline=None)
@given(
    lines=st.lists(st.sampled_from(ODD_LINES), min_size=1, max_size=12),
    unit_bytes=st.integers(1, 200),
    block_bytes=st.integers(1, 64),
    ends=st.booleans(),
)
def test_ranges_of_text_give_the_lines_of_the_whole_file(
    tmp_path_factory: pytest.TempPathFactory,
    lines: list[str],
    unit_bytes: int,
    block_bytes: int,
    ends: bool,
) -> None:
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_bytes(("\n".join(lines) + "\n" * ends or "\n").encode())
    if not path.stat().st_size:
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents_module, "_BLOCK_BYTES", block_bytes)
        found = documents(section_of(path), unit_bytes)
    whole = path.read_text(encoding="utf-8").splitlines()
    assert found == [line.strip() for line in whole]


def zst(content: bytes) -> bytes:
    """Two zstd frames, as a parallel compressor writes them."""
    half = len(content) // 2
    codec = pyarrow.Codec("zstd")
    return b"".join(codec.compress(part).to_pybytes() for part in (content[:half], content[half:]))


def tables() -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for number, line in enumerate(ODD_LINES * 80):
        rows.append({"title": f"t{number}", "text": line, "age": number, "share": number / 4})
    for number in range(0, len(rows), 7):
        rows[number]["age"] = None
    return rows


@pytest.mark.parametrize("suffix", ["csv", "semicolon.csv", "tsv", "jsonl", "parquet"])
def test_tables_give_the_rows_that_the_reader_of_whole_files_gives(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"a.{suffix}"
    rows = pd.DataFrame(tables())
    if suffix == "parquet":
        rows.to_parquet(path, row_group_size=300)
    elif suffix == "jsonl":
        lines = [json.dumps(row, ensure_ascii=False) for row in tables()]
        lines[5:5] = ["", "  "]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    else:
        separator = {"csv": ",", "semicolon.csv": ";", "tsv": "\t"}[suffix]
        # pandas puts no lone carriage return in quotes, and a row that it cuts is refused.
        rows["text"] = rows["text"].str.replace("\r", "")
        rows.to_csv(path, sep=separator, index=False)
    monkeypatch.setattr(documents_module, "_BLOCK_BYTES", 5000)
    text = "{title}: {text} {age} {share}"
    whole = read_rows(DataSource(path=path, text=text), "train", "corpus").texts
    assert len(whole) > 600
    section = section_of(path, text=text)
    assert documents(section, 700) == whole
    if suffix != "parquet":
        content = path.read_bytes()
        for name, packed in (
            (f"b.{suffix}.gz", gzip.compress(content)),
            (f"b.{suffix}.zst", zst(content)),
        ):
            compressed = tmp_path / name
            compressed.write_bytes(packed)
            assert documents(section_of(compressed, text=text)) == whole


def test_lists_folders_and_patterns_name_files_in_order(tmp_path: Path) -> None:
    inner = tmp_path / "data" / "inner"
    inner.mkdir(parents=True)
    (tmp_path / "data" / "b.txt").write_text("b\n")
    (tmp_path / "data" / "a.jsonl").write_text('{"text": "a"}\n')
    (inner / "c.txt.gz").write_bytes(gzip.compress(b"c"))
    (tmp_path / "data" / "README.md").write_text("not text of the corpus")
    (tmp_path / "data" / ".hidden.txt").write_text("hidden")
    (tmp_path / "one.txt").write_text("one")
    data = tmp_path / "data"
    assert documents(section_of(data)) == ["a", "b", "c"]
    assert documents(section_of(data / "*.txt")) == ["b"]
    assert documents(section_of(data / "**" / "*.txt*")) == ["b", "c"]
    assert documents(section_of([tmp_path / "one.txt", data / "b.txt"])) == ["one", "b"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"good\n" * 900 + b"\xff\n", "a.txt, line 901 is not UTF-8 text"),
        ("a.jsonl", b'{"text": "x"}\n' * 900 + b"[]\n", "a.jsonl, line 901, is not a JSON object"),
        ("a.jsonl", b'{"other": "x"}\n', "there is no column 'text'"),
        ("a.jsonl", b'{"text": ["x"]}\n', "column 'text' holds lists or mappings"),
        ("a.csv", b"text\n" + b"x\n" * 600 + b"x,y\n", "a.csv, line 602: more fields than"),
        ("a.csv", b"text\nx,y\n", "a.csv, line 2: more fields than the header has"),
        ("a.tsv", b"text\tb\n\nx\n", "a.tsv, line 3: fewer fields than the header has"),
        ("a.csv", b'text\nx\n"y\nz', "a.csv, line 3: a quote is in a field without quotes, or a"),
        ("a.csv", b"\n\n", "cannot be read as CSV"),
        ("a.csv", "text,b\nx,1".encode("utf-16-le"), "a.csv is not UTF-8 text"),
        ("a.txt", "good\nbad".encode("utf-16-be"), "a.txt is not UTF-8 text"),
        ("a.csv", b"body\nx\n", "there is no column 'text'"),
        ("a.csv", b"body\n", "there is no column 'text'"),
        ("a.csv", b"", "a.csv is empty"),
        ("a.parquet", b"no table", "cannot be read as PARQUET"),
        ("a.txt.gz", b"no gzip", "a.txt.gz: cannot be read"),
        ("a.txt.gz", gzip.compress(b"x" * 9000, mtime=0)[:-12], "cannot be read as TXT"),
        ("a.txt.zst", b"no zstd at all", "a.txt.zst: cannot be read"),
        (
            "a.txt.zst",
            pyarrow.Codec("zstd").compress(b"x" * 9000).to_pybytes()[:-4],
            "a.txt.zst: cannot",
        ),
        ("a.pdf", b"x", "a.pdf has no known file type"),
    ],
)
def test_errors_name_the_file_and_the_line(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as error:
        documents(section_of(tmp_path / name), 700)
    assert message in str(error.value)


def test_missing_files_and_empty_folders_are_refused(tmp_path: Path) -> None:
    for path, message in (
        (tmp_path / "none.txt", "none.txt: No such file or directory"),
        (tmp_path / "*.txt", "has no file to read"),
        (tmp_path, "has no file to read"),
    ):
        with pytest.raises(InputError, match=message.replace("*", ".")):
            documents(section_of(path))


@pytest.mark.parametrize("pattern", ["", "**/*.txt", "**", "*/../**/[ab].txt"])
def test_links_are_followed_and_each_file_is_read_once(tmp_path: Path, pattern: str) -> None:
    data = tmp_path / "data"
    (data / "inner").mkdir(parents=True)
    (tmp_path / "store").mkdir()
    (data / "inner" / "a.txt").write_text("a")
    (tmp_path / "store" / "b.txt").write_text("b")
    (data / "part").symlink_to("../store")
    (data / "again.txt").symlink_to("inner/a.txt")
    # With two links to a folder above, paths of every length and order would lead to one file.
    for name in ("up", "inner/up"):
        (data / name).symlink_to(data)
    assert sorted(documents(section_of(data / pattern))) == ["a", "b"]


def test_a_link_to_nothing_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.txt").symlink_to("gone.txt")
    for path in (tmp_path, tmp_path / "*.txt"):
        with pytest.raises(InputError, match=r"b\.txt: No such file"):
            documents(section_of(path))


@pytest.mark.parametrize("pattern", ["", "**/*.*l*", "**", "runs/*/*/*.jsonl"])
def test_what_post_dist_writes_is_no_text_of_the_corpus(tmp_path: Path, pattern: str) -> None:
    run = tmp_path / "runs" / "demo" / "distill-1f2e3d4c"
    for place in (run / "logs", tmp_path / "artifact", tmp_path / "runs/demo/texts"):
        place.mkdir(parents=True)
    (run / SETTINGS).write_text("name: demo")
    (tmp_path / "artifact" / FILE_NAME).write_text("{}")
    (tmp_path / "runs/demo/texts/public.jsonl").write_text('{"text": "public"}\n')
    data = tmp_path / "private.csv"
    task = Task(name="t", visibility="private", path=data, labels={"0": ("bad",)})
    count_split_read(task, tmp_path, "private")
    beside = ledger_beside(data)
    for record in (
        beside,
        run / "metrics.jsonl",
        run / "logs" / "rank.jsonl",
        tmp_path / "private_metrics.jsonl",
        tmp_path / "artifact" / "rows.jsonl",
    ):
        record.write_text('{"text": "private"}\n')
    assert documents(section_of(tmp_path / pattern)) == ["public"]
    with pytest.raises(InputError, match="has the name of a record"):
        documents(section_of(beside))


def test_a_missing_column_is_reported_with_its_file(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text\nx\n")
    (tmp_path / "b.csv").write_text("body\nx\n")
    with pytest.raises(InputError, match=r"corpus\.path: .*b\.csv: there is no column 'text'"):
        documents(section_of(tmp_path))


def test_a_hub_data_set_is_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    texts = [f"document {number}" for number in range(600)]
    asked: dict[str, Any] = {}

    def load_dataset(*given: object, **named: object) -> object:
        asked.update(named)
        return datasets.Dataset.from_dict({"text": texts}).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    section = section_of(None, hub="org/data", revision="abc")
    assert documents(section) == texts
    assert asked["streaming"] is True
    folder = make_shards(section, WORDS, END, tmp_path)
    assert tokens_in(folder) == stream_of(texts)


# Shards.


def test_corpus_packs_every_token_once_and_parts_held_out_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n".join(texts(60)))
    section = section_of(tmp_path / "a.txt", held_out_sequences=4)
    corpus = build_corpus(section, WORDS, tmp_path, 0, ALONE)
    stream = stream_of(texts(60))
    count = len(stream) // 16
    packed = np.array(stream[: count * 16]).reshape(count, 16)
    assert corpus.sequences(list(range(count))).tolist() == packed.tolist()
    trained = corpus.training(RankBatch(list(range(corpus.num_training_sequences)), 1.0))
    held_out = torch.cat([corpus.held_out(share) for share in corpus.held_out_batches(3, ALONE)])
    assert sorted(torch.cat([trained, held_out]).tolist()) == sorted(packed.tolist())
    assert held_out.tolist() == packed[-4:].tolist()
    for sequence, places in zip(
        packed.tolist(), corpus.positions(torch.from_numpy(packed).long()).tolist(), strict=True
    ):
        ends = [place + 1 for place, token in enumerate(sequence) if token == END]
        starts = [0, *ends]
        expected = [place - max(s for s in starts if s <= place) for place in range(16)]
        assert places == expected
    together = section.model_copy(update={"separate_documents": False})
    assert build_corpus(together, WORDS, tmp_path, 0, ALONE).positions(trained) is None


def test_students_share_the_shards_whatever_the_length_of_their_sequences(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n".join(texts(60)))
    corpora = tmp_path / "corpora"
    first = build_corpus(section_of(tmp_path / "a.txt"), WORDS, corpora, 0, ALONE)
    (tmp_path / "a.txt").rename(tmp_path / "b.txt")
    longer = section_of(tmp_path / "b.txt", sequence_length=40, workers=2)
    second = build_corpus(longer, WORDS, corpora, 1, ALONE)
    assert len(list(corpora.iterdir())) == 1
    assert first.sequences([0, 1, 2, 3, 4]).flatten().tolist() == (
        second.sequences([0, 1]).flatten().tolist()
    )
    assert first.digest != second.digest
    make_shards(longer, tiny.tokenizer("llama", 500), END, corpora)
    make_shards(section_of(tmp_path / "b.txt", max_rows=9), WORDS, END, corpora)
    assert len(list(corpora.iterdir())) == 3


@pytest.mark.parametrize("limits", [{}, {"max_tokens": 700}, {"max_rows": 33}])
def test_parts_join_to_the_stream_and_end_at_the_limits(
    tmp_path: Path, limits: dict[str, int]
) -> None:
    lines = texts(90)
    (tmp_path / "a.txt").write_text("\n".join(lines[:50]))
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress("\n".join(lines[50:]).encode()))
    section = section_of([tmp_path / "a.txt", tmp_path / "b.txt.gz"], **limits)
    work = work_in(tmp_path / "shards", section)
    fill_folder(work, {})
    stream = stream_of(lines[: limits.get("max_rows")])[: limits.get("max_tokens")]
    assert tokens_in(work.folder) == stream
    index = read_index(work.folder)
    assert len(index.parts) > (3 if limits else 10)
    lengths = []
    for part in index.parts:
        lengths += load_file(work.folder / part.name)[DOCUMENT_LENGTHS].tolist()
    assert index.documents == len(lengths)
    wanted = [len(stream_of([line])) for line in lines[: len(lengths)]]
    wanted[-1] -= sum(wanted) - len(stream)
    assert lengths == wanted
    shards = TokenShards(work.folder)
    for first, last in ((0, 1), (3, 400), (len(stream) - 5, len(stream))):
        assert shards.read(first, last).tolist() == stream[first:last]


@pytest.mark.parametrize("workers", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_make_the_bytes_that_one_makes(tmp_path: Path, workers: int) -> None:
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("\n".join(texts(60, ord(name))))
    (tmp_path / "c.csv.gz").write_bytes(gzip.compress(b"text\nfirst\nsecond\n"))
    made = []
    for count in (1, workers):
        section = section_of(tmp_path / "*.*", workers=count, max_tokens=1800)
        work = work_in(tmp_path / str(count), section)
        fill_folder(work, {"a": 1})
        made.append(files_of(work.folder))
    assert len(made[0]) > 10
    assert made[0] == made[1]

    # An error of a worker is the error of the command.
    (tmp_path / "d.jsonl").write_text("{}\nno json")
    section = section_of([tmp_path / "a.txt", tmp_path / "d.jsonl"], workers=workers)
    with pytest.raises(InputError, match=r"d.jsonl, line 2, is not a JSON object"):
        fill_folder(work_in(tmp_path / "wrong", section), {})


def test_the_first_of_equal_documents_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = texts(50) + texts(30) + ["", "twice", "twice"] + texts(40, 1) + texts(50)
    distinct = list(dict.fromkeys(lines))
    (tmp_path / "a.txt").write_text("\n".join(lines[:70]))
    (tmp_path / "b.txt").write_text("\n".join(lines[70:]))
    section = section_of(tmp_path / "*.txt", deduplicate=True)
    monkeypatch.setattr(duplicates, "_DOCUMENTS_IN_BUCKET", 20)
    work = work_in(tmp_path / "shards", section)
    fill_folder(work, {})
    assert tokens_in(work.folder) == stream_of(distinct)
    index = read_index(work.folder)
    assert index.documents == len(distinct)
    assert len(index.parts) > 10

    # A start that is killed while it writes the parts leaves the same shards.
    killed = work_in(tmp_path / "killed", section)
    real = duplicates.keep_documents
    calls = iter(range(6))

    def stops(*given: Any) -> Any:
        if next(calls, None) is None:
            raise Interrupted("as if it was killed")
        return real(*given)

    monkeypatch.setattr(duplicates, "keep_documents", stops)
    with pytest.raises(Interrupted):
        fill_folder(killed, {})
    assert len(list(killed.folder.glob("part-*.safetensors"))) == 6
    monkeypatch.setattr(duplicates, "keep_documents", real)
    fill_folder(killed, {})
    assert files_of(killed.folder) == files_of(work.folder)

    # All documents are read first, and the folder of a plain corpus is another one.
    limited = work_in(tmp_path / "limited", section.model_copy(update={"max_rows": 60}))
    fill_folder(limited, {})
    assert tokens_in(limited.folder) == stream_of(list(dict.fromkeys(lines[:60])))
    plain = make_shards(section_of(tmp_path / "*.txt"), WORDS, END, tmp_path / "corpora")
    assert make_shards(section, WORDS, END, tmp_path / "corpora") != plain


def test_a_corpus_without_documents_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(InputError, match="has no rows"):
        make_shards(section_of(tmp_path / "a.txt"), WORDS, END, tmp_path / "corpora")
    (tmp_path / "a.txt").write_text("one line")
    section = section_of(tmp_path / "a.txt", held_out_sequences=9)
    with pytest.raises(InputError, match=r"makes \d sequences, and 9 are to be held out"):
        build_corpus(section, WORDS, tmp_path / "corpora", 0, ALONE)


# Interruptions and damage.


def in_child(body: Callable[[], object]) -> int:
    """Run a function in a forked process, and return its process id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        stop.listen()
        body()
        code = 0
    except Interrupted:
        code = Interrupted.exit_code
    finally:
        os._exit(code)


def slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make each unit take some milliseconds, so that signals arrive in the middle."""
    original = token_parts.file_digest

    def slow(path: Path) -> str:
        time.sleep(0.005)
        return original(path)

    monkeypatch.setattr(token_parts, "file_digest", slow)


def test_a_killed_start_loses_only_unfinished_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("\n".join(texts(200)))
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress("\n".join(texts(200, 1)).encode()))
    section = section_of(tmp_path / "[ab].*")
    whole = work_in(tmp_path / "whole", section)
    fill_folder(whole, {})

    slowly(monkeypatch)
    work = work_in(tmp_path / "killed", section)
    source = random.Random(0)
    kills = 0
    for _ in range(12):
        before = {path: path.stat().st_mtime_ns for path in work.folder.glob("part-*.json")}
        child = in_child(lambda: fill_folder(work, {}))
        time.sleep(source.uniform(0.01, 0.12))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if (work.folder / "index.json").exists():
            break
        kills += 1
        # A finished part is not made again.
        assert before == {path: path.stat().st_mtime_ns for path in before}
    assert kills >= 5
    fill_folder(work, {})
    assert files_of(work.folder) == files_of(whole.folder)


def test_a_worker_that_is_killed_within_a_line_has_ended() -> None:
    process = SimpleNamespace(stdout=[b'{"unit": 0, "made": false}\n', b'{"unit": 0, '])
    process.wait = lambda: -9
    with pytest.raises(EnvironmentFault, match="has ended with exit code -9"):
        shard_worker._wait_until_made(process)


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_worker_whose_parent_is_killed_ends_in_silence(tmp_path: Path, share: float) -> None:
    (tmp_path / "a.txt").write_text("\n".join(texts(20)))
    message = pickle.dumps(work_in(tmp_path / "shards", section_of(tmp_path / "a.txt")))
    command = [sys.executable, "-m", "post_dist.data.shard_worker"]
    sent = message[: int(share * len(message))]
    ended = subprocess.run(command, input=sent, capture_output=True, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, b"", b"")


@pytest.mark.parametrize("number", stop._SIGNALS)
def test_a_signal_stops_the_work_between_two_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    (tmp_path / "a.txt").write_text("\n".join(texts(2000)))
    work = work_in(tmp_path / "shards", section_of(tmp_path / "a.txt"))
    slowly(monkeypatch)
    child = in_child(lambda: fill_folder(work, {}))
    while not any(work.folder.glob("part-*.json")):
        time.sleep(0.01)
    os.kill(child, number)
    start = time.monotonic()
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == Interrupted.exit_code
    assert time.monotonic() - start < 5
    assert not (work.folder / "index.json").exists()


def test_another_run_waits_for_the_one_that_makes_the_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("\n".join(texts(20)))
    section = section_of(tmp_path / "a.txt")
    reference = make_shards(section, WORDS, END, tmp_path / "reference")
    folder = tmp_path / "corpora" / reference.name
    folder.mkdir(parents=True)
    monkeypatch.setattr(make_shards_module, "_POLL_SECONDS", 0.01)
    with (folder / "lock").open("w") as lock:
        assert lock_file(lock)
        found: list[Path] = []
        thread = threading.Thread(
            target=lambda: found.append(make_shards(section, WORDS, END, tmp_path / "corpora"))
        )
        thread.start()
        thread.join(0.2)
        assert thread.is_alive()
        # The other run finishes.
        for name, content in files_of(reference).items():
            (folder / name).write_bytes(content)
    thread.join(10)
    assert found == [folder]


def test_a_flipped_bit_is_refused_by_name_and_the_part_made_again(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n".join(texts(60)))
    section = section_of(tmp_path / "a.txt")
    folder = make_shards(section, WORDS, END, tmp_path / "corpora")
    sealed = files_of(folder)
    source = random.Random(0)
    damaged = [folder / name for name in sealed if name != "lock"]
    assert len(damaged) == 2
    for path in damaged * 6:
        content = bytearray(path.read_bytes())
        content[source.randrange(len(content))] ^= 1 << source.randrange(8)
        path.write_bytes(content)
        with pytest.raises(ArtifactRefused, match=path.name) as error:
            make_shards(section, WORDS, END, tmp_path / "corpora")
        assert "the next run makes it again" in error.value.hint
        path.unlink()
        assert make_shards(section, WORDS, END, tmp_path / "corpora") == folder
        assert files_of(folder) == sealed


def test_an_index_or_a_record_that_holds_anything_is_not_as_it_was_written(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n".join(texts(60)))
    section = section_of(tmp_path / "a.txt")
    folder = make_shards(section, WORDS, END, tmp_path / "corpora")
    sealed = files_of(folder)
    index = folder / "index.json"
    honest = json.loads(index.read_text())
    strange = ["[" * 100_000, '{"a":' * 100_000, "[]", json.dumps(honest | {"parts": 7})]
    for changes in (
        {"tokens": -1},
        {"tokens": 10**30},
        {"unit": "x"},
        {"size": True},
        {"unit": 1.0},
    ):
        strange.append(json.dumps(with_digest(honest, changes)))
    for text in strange:
        index.write_text(text)
        with pytest.raises(ArtifactRefused, match="is not as it was written"):
            make_shards(section, WORDS, END, tmp_path / "corpora")
    index.unlink()
    os.mkfifo(index)
    with pytest.raises(ArtifactRefused, match="is not as it was written"):
        make_shards(section, WORDS, END, tmp_path / "corpora")
    index.unlink()

    # A part whose record is damaged is made again.
    written = honest["parts"][0]
    record = folder / "part-000000-0000.json"
    record.write_text(json.dumps(written))
    assert len(finished_parts(folder, 0)) == 1
    for changes in ({"tokens": -1}, {"documents": "x"}, {"unit": 3}, {"sha256": 7}, {"more": 1}):
        record.write_text(json.dumps(written | changes))
        assert finished_parts(folder, 0) == []
    record.write_text("[" * 100_000)
    assert make_shards(section, WORDS, END, tmp_path / "corpora") == folder
    assert files_of(folder) == sealed


def with_digest(index: dict, changes: dict) -> dict:
    """Return the fields of an index whose first part has changes, with the digest of all."""
    first, *others = index["parts"]
    parts = [first | changes, *others]
    return index | {"parts": parts, "digest": digest_of([index["contents"], parts])}


def test_memory_does_not_grow_with_the_text(tmp_path: Path) -> None:
    def four_each(texts: list[str], add_special_tokens: bool) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[[1, 2, 3, 4] for _ in texts])

    peaks = []
    for size in (1, 4):
        path = tmp_path / f"{size}.txt"
        path.write_text("a line of text that is not very short\n" * (6_000 * size))
        work = TokenizerWork(
            section_of(path),
            four_each,
            END,
            tmp_path / str(size),
            units_of(section_of(path), 1 << 16),
        )
        work.folder.mkdir()
        tracemalloc.start()
        fill_folder(work, {})
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0]


def test_the_command_needs_no_weights_and_distill_reads_its_shards(
    main: Callable, tmp_path: Path
) -> None:
    run = tiny.write_run(tmp_path)
    weights = tmp_path / "teacher" / "model.safetensors"
    weights.rename(tmp_path / "weights")
    code, said, errors = main("corpus", run, "--json")
    assert code == 0, errors
    made = json.loads(said)
    index = read_index(Path(made["path"]))
    assert (made["tokens"], made["documents"]) == (index.tokens, index.documents)
    assert made["sequences"] == index.tokens // 32

    (tmp_path / "weights").rename(weights)
    before = {path: path.stat().st_mtime_ns for path in Path(made["path"]).iterdir()}
    code, _, errors = main("distill", run, "--set=distill.steps=1")
    assert code == 0, errors
    corpora = Path(made["path"]).parent
    assert {path: path.stat().st_mtime_ns for path in corpora.glob("*/*")} == before
