"""The template and the label words of a task in one tokenizer, for the check of a run file."""

from collections.abc import Mapping, Sequence
from functools import partial

from transformers import PreTrainedTokenizerBase

from post_dist.artifacts.task import PromptTask
from post_dist.data.template import Template
from post_dist.data.verbalizer import Verbalizer
from post_dist.stages.check.report import Findings, LabelTokens


def bind_template(
    task: PromptTask, tokenizer: PreTrainedTokenizerBase, *, masked: bool
) -> Template:
    """Bind the template of a task to a tokenizer.

    Raises:
        InputError: the template does not suit the model, or leaves no room for text.
    """
    return Template(
        task.template,
        tokenizer,
        task.max_length,
        masked=masked,
        max_response_length=task.max_response_length,
    )


def label_tokens(
    stage: str,
    words: Mapping[str, Sequence[str]],
    task: PromptTask,
    tokenizer: PreTrainedTokenizerBase,
    findings: Findings,
) -> LabelTokens:
    """Find the token of each label word, and collect the words that do not work.

    Args:
        stage: the stage that reads the task.
        words: the label words of each class.
        task: says whether words of several tokens are allowed.
        tokenizer: the tokenizer that reads the words.
        findings: collects what is wrong.

    Returns:
        The words that work, with their tokens.
    """

    def bind(*classes: Sequence[str]) -> Verbalizer:
        wanted = tuple(tuple(of_class) for of_class in classes)
        return Verbalizer(wanted, tokenizer, allow_multi_token=task.allow_multi_token)

    # Each word by itself, so that all long ones are named.
    found: LabelTokens = {label: {} for label in words}
    for label, of_class in words.items():
        for word in of_class:
            single = findings.attempt(stage, partial(bind, [word]))
            if single is not None:
                token = single.token_ids[0][0]
                found[label][word] = str(tokenizer.convert_ids_to_tokens(token))
    # Two classes that share a token are found among the words that are sound.
    findings.attempt(stage, lambda: bind(*map(tuple, found.values())))
    return found
