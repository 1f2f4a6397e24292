"""Class scores of a model with a soft prompt before the text and a linear head behind it.

Shapes: N examples, C classes, n prompt tokens, d width.
"""

from dataclasses import dataclass

import torch

from post_dist.artifacts.head import LinearHead
from post_dist.data.task_reader import TaskReader
from post_dist.data.template import Encoded
from post_dist.models.batch_inference import InferenceRun, outputs_at_answers
from post_dist.models.language_model import LanguageModel


@dataclass(frozen=True)
class PromptAndHead:
    """A soft prompt and the head that was tuned behind it.

    Attributes:
        prompt_nd: the prompt; None for no prompt.
        head: the head.
    """

    prompt_nd: torch.Tensor | None
    head: LinearHead


def headed_scores(
    model: LanguageModel,
    examples: list[Encoded],
    reader: TaskReader,
    tuned: PromptAndHead,
    run: InferenceRun,
) -> torch.Tensor:
    """Compute the class scores of the label words plus those of the head.

    Args:
        model: the frozen model.
        examples: the examples, encoded by `reader`.
        reader: the task, bound to the model's tokenizer.
        tuned: the prompt and the head.
        run: batch size, ranks and label.

    Returns:
        Class scores [N, C], on the CPU of every rank.
    """
    verbalizer = reader.verbalizer
    logits_of_words = model.head_of(verbalizer.tokens)

    def scores(hidden_Bd: torch.Tensor) -> torch.Tensor:
        of_words = verbalizer.scores_of_tokens(logits_of_words(hidden_Bd))
        return of_words + tuned.head.scores(hidden_Bd)

    return outputs_at_answers(
        model, examples, reader.template, tuned.prompt_nd, scores, run, with_head=False
    )
