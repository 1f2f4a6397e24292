"""Class scores of a model with a soft prompt before the text and a linear head behind it.

Shapes: B examples of a batch, N examples, C classes, n prompt tokens, d width, m features of the
head.
"""

import torch

from post_dist.artifacts.head import LinearHead
from post_dist.data.task_reader import TaskReader
from post_dist.data.template import Encoded
from post_dist.models.batch_inference import InferenceRun, outputs_at_answers
from post_dist.models.classifier import word_scores
from post_dist.models.language_model import LanguageModel


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

    def scores(hidden_Bk: torch.Tensor) -> torch.Tensor:
        return of_words(hidden_Bk[:, -model.width :]) + head.scores(head.read(hidden_Bk))

    return outputs_at_answers(
        model,
        examples,
        reader.template,
        prompt_nd,
        scores,
        run,
        layers=head.layers(model.width, len(model.layers)),
    )
