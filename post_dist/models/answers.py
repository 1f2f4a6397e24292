"""The answers of a model to examples: class scores or generated responses, behind a prompt or not.

Shapes: N examples, C classes, R tokens of a response.
"""

import torch

from post_dist.artifacts.head import LinearHead
from post_dist.artifacts.prompt import PromptContents
from post_dist.data.task_reader import TaskReader
from post_dist.data.template import Encoded
from post_dist.errors import ArtifactRefused
from post_dist.models.adapted import adapted
from post_dist.models.batch_inference import InferenceRun, outputs_at_answers
from post_dist.models.generation import generate_responses
from post_dist.models.headed import headed_scores
from post_dist.models.language_model import LanguageModel


class OutputsNotFinite(ArtifactRefused):
    """The outputs of a model behind a prompt are not finite. All ranks see the same outputs."""


def answers_of(
    model: LanguageModel,
    examples: list[Encoded],
    reader: TaskReader,
    prompt: PromptContents | None,
    run: InferenceRun,
) -> torch.Tensor:
    """Compute the answers of a model. All ranks call this function together.

    Args:
        model: the frozen model.
        examples: the examples, encoded by `reader`.
        reader: the task, bound to the model's tokenizer.
        prompt: the soft prompt, perhaps with an adapter; None for no prompt.
        run: batch size, ranks and label.

    Returns:
        Class scores [N, C] with the prompt's adapter, and without the class biases of its task; or
        the tokens [N, R] of generated responses, padded with NO_TOKEN. They are on the CPU.

    Raises:
        OutputsNotFinite: a score behind the prompt is not finite.
    """
    answers = _answers(model, examples, reader, prompt, run)
    if prompt is not None:
        check_finite(answers)
    return answers


def check_finite(outputs: torch.Tensor) -> None:
    """Check the outputs of a model behind a prompt.

    The values of a prompt and its adapter are bounded. Their products may still overflow.

    Raises:
        OutputsNotFinite: a value is not finite.
    """
    if not outputs.isfinite().all():
        raise OutputsNotFinite(
            "the outputs of the model with the prompt are not finite",
            "ask for a prompt with smaller values",
        )


def _answers(
    model: LanguageModel,
    examples: list[Encoded],
    reader: TaskReader,
    prompt: PromptContents | None,
    run: InferenceRun,
) -> torch.Tensor:
    prompt_nd = None if prompt is None else prompt.embeddings.to(run.world.device)
    adapter = None if prompt is None else prompt.adapter
    # A head adds its scores to those of the label words. It has no use for generated text.
    if isinstance(adapter, LinearHead):
        return headed_scores(model, examples, reader, prompt_nd, adapter, run)
    with adapted(model, adapter):
        if reader.generates:
            end_token = reader.tokenizer.eos_token_id
            return generate_responses(model, examples, reader.template, prompt_nd, end_token, run)
        return outputs_at_answers(model, examples, reader.template, prompt_nd, reader.scores, run)
