"""Class scores of a model with a soft prompt before the text and a linear head behind it.

Shapes: B examples of a batch, N examples, C classes, n prompt tokens, d width, m features of the
head, k values of the hidden states of several layers.
"""

from collections.abc import Callable

import torch

from post_dist.artifacts.head import LinearHead
from post_dist.data.task_reader import TaskReader
from post_dist.data.template import Encoded
from post_dist.models.batch_inference import InferenceRun, outputs_at_answers
from post_dist.models.classifier import word_scores
from post_dist.models.language_model import LanguageModel


def scores_of_states(
    states_Bk: torch.Tensor,
    of_words: Callable[[torch.Tensor], torch.Tensor],
    width: int,
    head: LinearHead | None = None,
) -> torch.Tensor:
    """Compute class scores [B, C] from hidden states.

    Args:
        states_Bk: states of the layers that `LinearHead.layers` names. The last one is the model's.
        of_words: function of the last layer's states, which returns the scores of the label words.
        width: width d of the model.
        head: the head, whose scores are added; None for those of the label words alone.
    """
    scores_BC = of_words(states_Bk[:, -width:])
    return scores_BC if head is None else scores_BC + head.scores(head.read(states_Bk))


def headed_scores(
    model: LanguageModel,
    examples: list[Encoded],
    reader: TaskReader,
    prompt_nd: torch.Tensor | None,
    head: LinearHead,
    run: InferenceRun,
) -> torch.Tensor:
    """Compute the class scores of the label words plus those of the head.

    Args:
        model: the frozen model.
        examples: the examples, encoded by `reader`.
        reader: the task, bound to the model's tokenizer.
        prompt_nd: the prompt.
        head: the head that was tuned behind it.
        run: batch size, ranks and label.

    Returns:
        Class scores [N, C], on the CPU of every rank.
    """
    of_words = word_scores(model, reader.verbalizer)
    return outputs_at_answers(
        model,
        examples,
        reader.template,
        prompt_nd,
        lambda states_Bk: scores_of_states(states_Bk, of_words, model.width, head),
        run,
        layers=head.layers(model.width, len(model.layers)),
    )
