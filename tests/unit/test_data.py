"""Splits, templates, verbalizers, packing and order."""

import csv
import resource
import socket
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from post_dist.config.sources import Corpus, Task
from post_dist.data.corpus_files import source_digest
from post_dist.data.order import rank_batches, rows_of_like_length, shuffled_rows
from post_dist.data.public_text import load_public_texts
from post_dist.data.sources import read_table
from post_dist.data.split_reads import count_split_read
from post_dist.data.tasks import load_examples, split_of
from post_dist.data.template import Template
from post_dist.data.verbalizer import Verbalizer
from post_dist.errors import InputError, PrivacyRefused
from post_dist.runtime.distributed import World
from post_dist.runtime.private_process import forgetting_private_data
from post_dist.stages.run_inputs import _digest_of_file

WORDS = tiny.tokenizer("llama")
MASKED_WORDS = tiny.tokenizer("roberta")
ALONE = World(0, 1, 0, "none", torch.device("cpu"))


def task(path: Path, **fields: object) -> Task:
    base = {
        "name": "t",
        "visibility": "private",
        "path": path,
        "template": "Review: {text} It was",
        "labels": {"0": ["bad"], "1": ["good"]},
    }
    return Task.model_validate(base | fields)


def test_splits_part_the_rows_and_stay_when_rows_are_added(tmp_path: Path) -> None:
    rows = tiny.sentences(300, 0)
    section = task(tiny.write_csv(tmp_path / "a.csv", rows))
    parts = {
        split: set(load_examples(section, split, "t").texts)
        for split in ("train", "validation", "test")
    }
    assert set.union(*parts.values()) == {text for text, _ in rows}
    assert sum(map(len, parts.values())) == len({text for text, _ in rows})
    assert 15 <= len(parts["test"]) <= 50
    more = task(tiny.write_csv(tmp_path / "b.csv", tiny.sentences(100, 9) + rows[::-1]))
    assert parts["test"] <= set(load_examples(more, "test", "t").texts)


def test_repeated_texts_count_once(tmp_path: Path) -> None:
    rows = tiny.sentences(50, 0)
    section = task(tiny.write_csv(tmp_path / "a.csv", rows + rows))
    assert len(load_examples(section, "train", "t").texts) == len(
        {text for text, _ in rows if split_of(text, section) == "train"}
    )


def test_max_rows_draws_from_all_classes_of_a_sorted_file(tmp_path: Path) -> None:
    rows = sorted(tiny.sentences(300, 0), key=lambda row: row[1])
    examples = load_examples(
        task(tiny.write_csv(tmp_path / "a.csv", rows), max_rows=40), "train", "t"
    )
    assert len(examples.classes) == 40
    assert 8 <= sum(examples.classes) <= 32


def test_a_label_outside_the_verbalizer_names_the_row_and_nothing_of_it(tmp_path: Path) -> None:
    section = task(
        tiny.write_csv(tmp_path / "a.csv", [*tiny.sentences(5, 0), ("secret words", 77)])
    )
    with pytest.raises(InputError) as caught:
        load_examples(section, "train", "private_task")
    assert "row 6" in str(caught.value)
    assert "secret" not in str(caught.value)
    assert "77" not in str(caught.value)


def test_a_row_without_a_text_needs_no_label_word(tmp_path: Path) -> None:
    rows = tiny.sentences(50, 0)
    whole = load_examples(task(tiny.write_csv(tmp_path / "a.csv", rows)), "train", "t")
    rows.insert(5, (" ", 77))
    assert load_examples(task(tiny.write_csv(tmp_path / "b.csv", rows)), "train", "t") == whole


def test_public_texts_come_without_labels_and_never_from_a_private_task(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text\nfirst\nsecond\nfirst\n")
    assert load_public_texts(task(path, visibility="public"), "public_task") == (
        ["first", "second"],
        [],
    )
    with pytest.raises(PrivacyRefused):
        load_public_texts(task(path), "public_task")


def test_whoever_reads_private_data_makes_no_connection_and_leaves_no_core_dump(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    section = task(tiny.write_csv(tmp_path / "a.csv", tiny.sentences(50, 0)))
    limits = []
    monkeypatch.setattr(resource, "setrlimit", lambda *limit: limits.append(limit))
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
        with forgetting_private_data():
            load_examples(section, "train", "private_task")
            assert [(kind, soft) for kind, (soft, _) in limits] == [(resource.RLIMIT_CORE, 0)]
            with pytest.raises(ConnectionRefusedError, match="while private data are in memory"):
                socket.create_connection(address, 1)
        # The data are gone.
        socket.create_connection(address, 1).close()


def test_a_cut_line_in_the_record_of_evaluations_is_left_out(tmp_path: Path) -> None:
    section = task(tiny.write_csv(tmp_path / "a.csv", tiny.sentences(50, 0)))
    record = tmp_path / "a.csv.test_readings.jsonl"
    assert count_split_read(section, tmp_path, "evaluate-1") == 1
    with record.open("a") as file:
        file.write('{"evaluation": "eva')
    assert count_split_read(section, tmp_path, "evaluate-2") == 2
    assert count_split_read(section, tmp_path, "evaluate-2") == 2
    assert len(record.read_text().splitlines()) == 3


def test_responses_stand_beside_their_texts_and_disputed_ones_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,answer\nfirst,one\nsecond, two \nfirst,three\nthird,four\n")
    assert load_public_texts(task(path, visibility="public", response_column="answer"), "t") == (
        ["first", "second", "third"],
        ["one", "two", "four"],
    )
    everything = task(path, response_column="answer", validation_share=0.0, test_share=0.0)
    examples = load_examples(everything, "train", "t")
    assert sorted(zip(examples.texts, examples.responses, strict=True)) == [
        ("second", "two"),
        ("third", "four"),
    ]
    assert examples.classes == []


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "parquet"])
def test_file_formats_give_the_same_rows(tmp_path: Path, ending: str) -> None:
    import pandas as pd

    table = pd.DataFrame(
        {"text": [f"row {n} with words" for n in range(30)], "label": [n % 2 for n in range(30)]}
    )
    path = tmp_path / f"a.{ending}"
    writers = {
        "csv": lambda: table.to_csv(path, index=False),
        "tsv": lambda: table.to_csv(path, index=False, sep="\t"),
        "jsonl": lambda: table.to_json(path, orient="records", lines=True),
        "parquet": lambda: table.to_parquet(path),
    }
    writers[ending]()
    examples = load_examples(task(path), "train", "t")
    wanted = [
        (row.text, row.label)
        for row in table.itertuples()
        if split_of(row.text, task(path)) == "train"
    ]
    assert list(zip(examples.texts, examples.classes, strict=True)) == wanted


def test_data_of_another_file_type_are_other_data(tmp_path: Path) -> None:
    """TSV has no quotes, so the same bytes are other texts."""
    digests = set()
    for name in ("a.csv", "b.csv", "a.tsv", "b.TSV"):
        (tmp_path / name).write_text('text\tlabel\n"so ""good"""\t1\n')
        digests.add(_digest_of_file(tmp_path / name, "private_task"))
        digests.add(source_digest(Corpus(path=tmp_path / name)))
    assert len(digests) == 2


def test_the_header_alone_decides_what_separates_the_fields_of_a_csv_file(tmp_path: Path) -> None:
    rows = [
        ["nota larga", "tono"],
        ["ruido; gritos, y más\nde noche", "1"],
        ["¿luz?", '2 "dos"'],
    ]
    path = tmp_path / "a.csv"
    for separator in ",;\t":
        for mark in ("utf-8", "utf-8-sig"):
            with path.open("w", encoding=mark, newline="") as file:
                csv.writer(file, delimiter=separator).writerows(rows)
            table = read_table(path, "t")
            assert [list(table.columns), *table.to_numpy().tolist()] == rows
    # One more example changes nothing: these fields are still separated by a comma.
    path.write_text('text,"a;b;c"\na;b;c,1\n')
    assert read_table(path, "t").to_numpy().tolist() == [["a;b;c", "1"]]
    path.write_text("text;label\na;b;c\n")
    with pytest.raises(InputError, match="line 2: more fields than the header has\n  put a text"):
        read_table(path, "t")


def test_values_of_the_hub_are_taken_as_written(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    rows = datasets.Dataset.from_dict({"age": [30, None, 31], "note": ["a", "b", "c"]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *given, **named: rows)
    section = Task.model_validate(
        {
            "name": "t",
            "visibility": "public",
            "hub": "org/data",
            "revision": "abc",
            "text": "{age} {note}",
        }
    )
    assert load_public_texts(section, "t") == (["30 a", "31 c"], [])


def test_columns_are_composed(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("title,content\nA,b c\n")
    assert load_public_texts(task(path, visibility="public", text="{title}: {content}"), "t") == (
        ["A: b c"],
        [],
    )


@given(st.text(max_size=300))
@settings(deadline=None)
def test_template_stays_whole_whatever_the_text(text: str) -> None:
    template = Template("Review: {text} It was", WORDS, 24, masked=False, vocabulary=600)
    (row,) = template.encode([text])
    assert len(row.token_ids) <= 24
    assert row.answer == len(row.token_ids) - 1
    shown = WORDS.decode(row.token_ids)
    assert shown.startswith("Review:")
    assert shown.endswith(" It was")


def test_a_long_text_loses_its_beginning() -> None:
    template = Template("Review: {text} It was", WORDS, 24, masked=False, vocabulary=600)
    (row,) = template.encode(["the start " + "the film is dull " * 20 + "the finish"])
    assert "the finish It was" in WORDS.decode(row.token_ids)


def test_only_the_template_s_mask_asks_for_an_answer() -> None:
    template = Template("{text} It was {mask}.", MASKED_WORDS, 32, masked=True, vocabulary=600)
    (row,) = template.encode(["a <mask> in the text"])
    assert row.token_ids.count(MASKED_WORDS.mask_token_id) == 1
    assert row.token_ids[row.answer] == MASKED_WORDS.mask_token_id


def test_padding_is_on_the_right() -> None:
    template = Template("{text} It was", WORDS, 32, masked=False, vocabulary=600)
    batch = template.collate(template.encode(["the film", "the film is dull"]))
    assert batch.attention_mask.tolist()[0] == sorted(
        batch.attention_mask.tolist()[0], reverse=True
    )
    assert batch.answer.tolist() == (batch.attention_mask.sum(dim=1) - 1).tolist()


def test_verbalizer_scores_are_mean_logits_of_the_words() -> None:
    verbalizer = Verbalizer(
        (("bad", "awful"), ("good",)), WORDS, vocabulary=600, allow_multi_token=False
    )
    logits = torch.randn(3, len(WORDS))
    (bad, awful), (good,) = verbalizer.token_ids
    assert WORDS.convert_ids_to_tokens([bad, awful, good]) == ["Ġbad", "Ġawful", "Ġgood"]
    torch.testing.assert_close(
        verbalizer.scores(logits),
        torch.stack([(logits[:, bad] + logits[:, awful]) / 2, logits[:, good]], dim=1),
    )


def test_verbalizer_refuses_words_of_several_tokens_and_shared_words() -> None:
    with pytest.raises(InputError, match="'extraordinary' is"):
        Verbalizer((("bad",), ("extraordinary",)), WORDS, vocabulary=600, allow_multi_token=False)
    assert Verbalizer(
        (("bad",), ("extraordinary",)), WORDS, vocabulary=600, allow_multi_token=True
    ).token_ids
    with pytest.raises(InputError, match="share the token") as words:
        Verbalizer((("bad", "good"), ("good",)), WORDS, vocabulary=600, allow_multi_token=False)
    assert words.value.hint == "choose words whose first tokens differ, such as letters"
    # Both begin with the token of the space before a word.
    with pytest.raises(InputError, match="'A' and 'B' share the token") as letters:
        Verbalizer((("A",), ("B",)), WORDS, vocabulary=600, allow_multi_token=True)
    assert letters.value.hint == "choose words whose first tokens differ"


def test_a_label_word_of_unknown_characters_is_refused() -> None:
    core = Tokenizer(WordPiece({"[UNK]": 0, "good": 1, "bad": 2}, unk_token="[UNK]"))
    core.pre_tokenizer = Whitespace()
    words = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]")
    known = Verbalizer((("bad",), ("good",)), words, vocabulary=3, allow_multi_token=False)
    assert known.token_ids == [[2], [1]]
    with pytest.raises(InputError, match="'wunderbar' has no token of the model"):
        Verbalizer((("bad",), ("wunderbar",)), words, vocabulary=3, allow_multi_token=False)


@given(count=st.integers(1, 40), at_most=st.integers(1, 12), ranks=st.integers(1, 7))
def test_shares_count_every_row_once_and_weigh_up_to_the_mean(
    count: int, at_most: int, ranks: int
) -> None:
    values = np.random.default_rng(0).normal(size=count)
    dealt = [rank_batches(range(count), at_most, rank, ranks) for rank in range(ranks)]
    assert len({len(own) for own in dealt}) == 1, "every rank runs equally many"
    assert sorted(
        row for own in dealt for share in own for row in share.rows[: share.counted]
    ) == list(range(count))
    assert all(1 <= len(share.rows) <= at_most for own in dealt for share in own)
    mean = np.mean([share.weight * values[share.rows].mean() for own in dealt for share in own])
    assert mean == pytest.approx(values.mean(), abs=1e-12)


def test_order_reads_all_rows_once_an_epoch() -> None:
    rows = shuffled_rows(0, 30, 10, seed=3)
    assert [sorted(rows[start : start + 10]) for start in (0, 10, 20)] == [list(range(10))] * 3
    assert rows[:10] != rows[10:20]
    assert shuffled_rows(7, 6, 10, seed=3) == rows[7:13]


def test_batches_of_like_length_read_all_rows_and_pad_less() -> None:
    lengths = np.random.default_rng(0).integers(5, 60, size=64).tolist()
    batches = [rows_of_like_length(step, 4, lengths, seed=1) for step in range(16)]
    assert sorted(row for batch in batches for row in batch) == list(range(64))
    padded = sum(4 * max(lengths[row] for row in batch) for batch in batches)
    plain = sum(
        4 * max(lengths[row] for row in shuffled_rows(4 * step, 4, 64, seed=1))
        for step in range(16)
    )
    assert padded < 0.8 * plain
    assert batches == [rows_of_like_length(step, 4, lengths, seed=1) for step in range(16)]


def test_lifted_logits_raise_the_class_scores_and_nothing_else() -> None:
    words = tiny.tokenizer("llama")
    verbalizer = Verbalizer(
        (("bad", "dull"), ("good",)), words, vocabulary=600, allow_multi_token=True
    )
    logits = torch.randn(3, len(words))
    lifted = verbalizer.lift(logits, (0.5, -2.0))
    torch.testing.assert_close(
        verbalizer.scores(lifted), verbalizer.scores(logits) + torch.tensor([0.5, -2.0])
    )
    assert int((lifted != logits).any(dim=0).sum()) == 3
    assert verbalizer.lift(logits, ()) is logits


def test_half_a_character_in_a_json_file_is_an_input_error(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "secret \\ud800", "label": 1}\n')
    with pytest.raises(InputError, match="half a character") as caught:
        read_table(path, "private_task")
    assert "secret" not in str(caught.value)


def test_a_date_that_python_does_not_know_is_an_input_error(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    dates = pyarrow.array([3 * 10**8], pyarrow.date32())
    parquet.write_table(pyarrow.table({"text": dates}), path)
    with pytest.raises(InputError, match="cannot be read as PARQUET"):
        read_table(path, "private_task")
