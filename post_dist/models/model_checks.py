"""Check whether post_dist can use a model, by its configuration or by a trial run.

Shapes: T tokens.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PretrainedConfig

from post_dist.errors import InputError, first_line
from post_dist.models.agreement import agree
from post_dist.models.families import (
    is_encoder,
    is_language_model,
    is_masked,
    scales_logits,
)
from post_dist.models.language_model import LanguageModel


def check_config(config: PretrainedConfig) -> None:
    """Check in the configuration that a model is of a kind that post_dist can use.

    A sharded model gets no other check, because `check_split` runs the model. After that, ZeRO
    would keep weights for a second use that never comes.

    Raises:
        InputError: the model scales its logits, or is neither a causal nor a masked language model.
    """
    if not is_language_model(config):
        raise InputError(
            f"a model of the type {config.model_type} is not a causal or masked language model",
            "use a decoder such as Llama, or an encoder such as BERT",
        )
    if is_encoder(config) and not is_masked(config):
        raise _not_causal(f"a model of the type {config.model_type}")
    if scales_logits(config):
        raise _changed_logits(config.get_text_config().model_type)


def check_split(model: LanguageModel) -> None:
    """Check that trunk and head, run separately, give the same logits as the model's own forward.

    Raises:
        InputError: the logits differ. The model may scale or cap them in an unknown way, or its
            last layer does not run at some positions alone. Or it does not run without its tokens,
            or is causal by its class alone.
    """
    # Any tokens will do, but the first few are often special tokens.
    input_ids = torch.arange(4, 8, device=model.model.device)[None]
    mask = torch.ones_like(input_ids)
    answer = 2
    # A causal model never reads what follows, and the mask hides it from a masked one.
    followed = torch.cat([input_ids, input_ids[:, :2]], dim=1)
    mask_of_followed = torch.cat([mask, torch.zeros_like(mask[:, :2])], dim=1)
    with torch.no_grad():
        with running(model, "on embeddings in place of tokens"):
            ours = model.head(model(input_ids)).float()
        with running(model, "as a whole"):
            own_forward = model.model(input_ids=input_ids, attention_mask=mask)
        with running(model, "at the answers alone"):
            at_answer = model(input_ids, mask, answer=mask.new_tensor([answer])).float()
        with running(model, "beside padding"):
            hidden = model(followed, mask_of_followed)[:, : mask.shape[1]]
            beside_padding = model.head(hidden).float()
    expected = own_forward.logits.float()
    if not agree(ours, expected):
        raise _changed_logits(type(model.model).__name__)
    if not agree(beside_padding, ours):
        if not model.masked:
            raise _not_causal(f"a {type(model.model).__name__}")
        raise InputError(
            f"a {type(model.model).__name__} reads padding, so a text's scores would depend on the "
            "texts beside it",
            "use a model of another family",
        )
    if not agree(at_answer, expected[:, answer]):
        raise InputError(
            f"a {type(model.model).__name__} gives other logits at the answers alone",
            "use a model of another family",
        )


@contextmanager
def running(model: LanguageModel, how: str) -> Iterator[None]:
    """Convert the errors of a trial run, in code of a family that never ran like this.

    Args:
        model: the model that runs inside this context.
        how: what is unusual, for the message.

    Raises:
        InputError: the model does not run like this.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, AttributeError, LookupError, RuntimeError) as error:
        raise InputError(
            f"a {type(model.model).__name__} does not run {how}: {first_line(error)}",
            "use a model of another family",
        ) from error


def check_documents_apart(model: LanguageModel) -> None:
    """Check that a document gives the same outputs after another document and at the front.

    All ranks of a sharded model must call it together.

    Raises:
        InputError: the outputs differ, as in a family whose attention ignores positions.
    """
    tokens = torch.arange(4, 12, device=model.model.device)
    one, other = tokens.view(2, 4)
    packed = torch.stack([torch.cat([one, other]), torch.cat([other, one])])
    # The positions start again at the second document.
    positions = torch.arange(4, device=tokens.device).repeat(2, 2)
    with torch.no_grad():
        hidden = model(packed, position_ids=positions).float()
    after_other = hidden[0, 4:]
    at_front = hidden[1, :4]
    if not agree(after_other, at_front):
        raise InputError(
            f"corpus.separate_documents: a {type(model.model).__name__} attends across packed "
            "documents all the same",
            "set corpus.separate_documents: false",
        )


def _changed_logits(model: str) -> InputError:
    return InputError(
        f"a {model} changes its logits in a way that post_dist does not know",
        "use a model of another family",
    )


def _not_causal(model: str) -> InputError:
    return InputError(
        f"{model} attends to later tokens, so it is not causal, and its config.json names a "
        "causal class",
        "name its masked class in `architectures`, such as BertForMaskedLM",
    )
