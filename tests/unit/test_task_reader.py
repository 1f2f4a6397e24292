"""A task bound to a tokenizer: tokens in, class scores out, and errors that say what is wrong."""

from dataclasses import replace

import pytest
import tiny
import torch
from tokenizers import AddedToken

from post_dist.artifacts.task import PromptTask
from post_dist.data.task_reader import TaskReader
from post_dist.data.template import NO_TOKEN
from post_dist.errors import InputError

WORDS = tiny.tokenizer("llama")
MASKED_WORDS = tiny.tokenizer("roberta")
VOCABULARY = 600
CLASSES = PromptTask(
    template="Review: {text} It was",
    label_words=(("bad", "awful"), ("good",)),
    max_length=24,
    allow_multi_token=False,
    init_text="predict it",
)
RESPONSES = replace(CLASSES, label_words=(), max_response_length=4)


def token(word: str) -> int:
    (found,) = WORDS(f" {word}", add_special_tokens=False).input_ids
    return found


def test_a_text_is_read_in_the_template() -> None:
    reader = TaskReader(CLASSES, WORDS, masked=False, vocabulary=VOCABULARY)
    (example,) = reader.encode(["the film is dull"])
    assert WORDS.decode(example.token_ids) == "Review: the film is dull It was"
    assert example.answer == len(example.token_ids) - 1
    assert example.response == ()
    assert reader.longest == 24


def test_a_masked_model_answers_at_the_mask() -> None:
    task = replace(CLASSES, template="{text} It was {mask}.")
    reader = TaskReader(task, MASKED_WORDS, masked=True, vocabulary=VOCABULARY)
    (example,) = reader.encode(["the film is dull"])
    assert example.token_ids[example.answer] == MASKED_WORDS.mask_token_id


def test_a_batch_is_padded_to_the_longest_or_further() -> None:
    reader = TaskReader(CLASSES, WORDS, masked=False, vocabulary=VOCABULARY)
    examples = reader.encode(["the film", "the long story of the cast is dull"])
    longest = max(len(example.token_ids) for example in examples)
    assert reader.collate(examples).input_ids.shape == (2, longest)
    assert reader.collate(examples, longest + 3).input_ids.shape == (2, longest + 3)
    assert reader.collate(examples, 2).attention_mask.sum(dim=1).tolist() == [
        len(example.token_ids) for example in examples
    ]


def test_scores_are_mean_logits_of_the_label_words() -> None:
    reader = TaskReader(CLASSES, WORDS, masked=False, vocabulary=VOCABULARY)
    assert not reader.generates
    assert reader.num_classes == 2
    logits = torch.randn(3, len(WORDS))
    bad = (logits[:, token("bad")] + logits[:, token("awful")]) / 2
    expected = torch.stack([bad, logits[:, token("good")]], dim=1)
    torch.testing.assert_close(reader.scores(logits), expected)


def test_a_task_with_classes_ignores_responses() -> None:
    reader = TaskReader(CLASSES, WORDS, masked=False, vocabulary=VOCABULARY)
    assert reader.encode(["the film"], ["good"]) == reader.encode(["the film"])


def test_a_generating_task_appends_the_response_and_its_end() -> None:
    reader = TaskReader(RESPONSES, WORDS, masked=False, vocabulary=VOCABULARY)
    assert reader.generates
    assert reader.num_classes == 0
    assert reader.longest == 28
    (without,) = reader.encode(["the film"])
    (example,) = reader.encode(["the film"], ["good"])
    assert example.response == (token("good"), WORDS.eos_token_id)
    assert example.token_ids == [*without.token_ids, *example.response]
    assert example.answer == without.answer
    assert reader.responses([example, without]).tolist() == [
        [*example.response, NO_TOKEN, NO_TOKEN],
        [NO_TOKEN] * 4,
    ]


def test_a_long_response_is_cut_and_still_ends() -> None:
    reader = TaskReader(RESPONSES, WORDS, masked=False, vocabulary=VOCABULARY)
    (example,) = reader.encode(["the film"], ["good bad good bad good"])
    assert len(example.response) == 4
    assert example.response[-1] == WORDS.eos_token_id


@pytest.mark.parametrize(
    ("changes", "masked", "message"),
    [
        ({"template": "{text} It was {mask}."}, False, r"\{mask\} is for masked models"),
        ({}, True, r"a masked model needs \{mask\}"),
        ({"template": "{text} It was "}, False, "ends in white space"),
        ({"max_length": 5}, False, "alone fills max_length"),
        ({"label_words": (("bad",), ("extraordinary",))}, False, "'extraordinary' is"),
        ({"label_words": (("bad",), ("bad",))}, False, "share the token"),
        ({"template": "{text}\nok: True\n"}, False, r"template '\{text\}\\nok: True\\n' ends in"),
    ],
)
def test_a_task_that_does_not_suit_the_tokenizer_is_refused(
    changes: dict, masked: bool, message: str
) -> None:
    tokenizer = MASKED_WORDS if masked else WORDS
    with pytest.raises(InputError, match=message):
        TaskReader(replace(CLASSES, **changes), tokenizer, masked=masked, vocabulary=VOCABULARY)


def test_a_label_word_without_an_embedding_is_refused() -> None:
    words = tiny.tokenizer("llama")
    words.add_tokens(AddedToken("<br>", lstrip=True))
    task = replace(CLASSES, label_words=(("bad",), ("<br>",)))
    with pytest.raises(InputError, match="'<br>' has no token of the model"):
        TaskReader(task, words, masked=False, vocabulary=VOCABULARY)


def test_responses_need_an_end() -> None:
    words = tiny.tokenizer("llama")
    words.eos_token = None
    with pytest.raises(InputError, match="no end-of-text token"):
        TaskReader(RESPONSES, words, masked=False, vocabulary=VOCABULARY)


def test_a_text_without_tokens_has_a_place_for_the_answer() -> None:
    reader = TaskReader(
        replace(CLASSES, template="{text}"), WORDS, masked=False, vocabulary=VOCABULARY
    )
    (example,) = reader.encode([""])
    assert (len(example.token_ids), example.answer) == (1, 0)


def test_a_slow_tokenizer_is_refused() -> None:
    class Slow:
        """A tokenizer written in Python."""

        is_fast = False

    with pytest.raises(InputError, match="not a fast one"):
        TaskReader(CLASSES, Slow(), masked=False, vocabulary=VOCABULARY)


def test_a_word_of_several_tokens_may_be_allowed() -> None:
    task = replace(CLASSES, label_words=(("bad",), ("extraordinary",)), allow_multi_token=True)
    assert TaskReader(task, WORDS, masked=False, vocabulary=VOCABULARY).num_classes == 2
