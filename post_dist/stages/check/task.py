"""Bind the template and the label words of a task to a tokenizer, for the check of a run file."""

from collections.abc import Mapping, Sequence
from functools import partial

from transformers import PreTrainedTokenizerBase

from post_dist.artifacts.task import PromptTask
from post_dist.data.template import Template
from post_dist.data.verbalizer import Verbalizer
from post_dist.models.facts import ModelFacts
from post_dist.stages.check.report import Findings, LabelTokens


def bind_template(
    task: PromptTask, tokenizer: PreTrainedTokenizerBase, facts: ModelFacts
) -> Template:
    """Bind the template of a task to a tokenizer.

    Raises:
        InputError: the template does not suit the model, or leaves no room for text.
    """
    return Template(
        task.template,
        tokenizer,
        task.max_length,
        masked=facts.masked,
        vocabulary=facts.vocabulary,
        max_response_length=task.max_response_length,
    )


def label_tokens(
    stage: str,
    words: Mapping[str, Sequence[str]],
    task: PromptTask,
    tokenizer: PreTrainedTokenizerBase,
    vocabulary: int,
    findings: Findings,
) -> LabelTokens:
    """Find the token of each label word, and collect an error for each word that cannot be used.

    Args:
        stage: the stage that reads the task.
        words: the label words of each class.
        task: the task, which says whether words of several tokens are allowed.
        tokenizer: the tokenizer that reads the words.
        vocabulary: number of tokens that the model has an embedding for.
        findings: collects the errors.

    Returns:
        The words that can be used, with their tokens.
    """

    def bind(*classes: Sequence[str]) -> Verbalizer:
        wanted = tuple(tuple(of_class) for of_class in classes)
        return Verbalizer(
            wanted, tokenizer, vocabulary=vocabulary, allow_multi_token=task.allow_multi_token
        )

    # Each word is bound alone, so every word of several tokens is named.
    found: LabelTokens = {label: {} for label in words}
    for label, of_class in words.items():
        for word in of_class:
            single = findings.attempt(stage, partial(bind, [word]))
            if single is not None:
                token = single.token_ids[0][0]
                found[label][word] = str(tokenizer.convert_ids_to_tokens(token))
    # The usable words are bound together, to find two classes that share a token.
    findings.attempt(stage, lambda: bind(*map(tuple, found.values())))
    return found
