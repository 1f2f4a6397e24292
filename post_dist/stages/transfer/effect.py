"""What a transferred prompt does to the target on public text, besides its task.

The texts are some of those that the prompt was trained on. The loss is only over the answers, so
the perplexity of the text itself was not trained.

Shapes: B examples of a batch, N examples, T tokens, n prompt tokens, d width, V vocabulary,
C classes.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from post_dist.artifacts.prompt import Adapter
from post_dist.data.template import NO_TOKEN, Batch, Encoded
from post_dist.losses.pieces import logit_pieces, split_positions
from post_dist.models.adapted import adapted
from post_dist.models.batch_inference import InferenceRun, map_batches
from post_dist.models.classifier import word_scores
from post_dist.models.language_model import LanguageModel
from post_dist.runtime.distributed import World
from post_dist.stages.transfer.objective import TransferObjective
from post_dist.stages.transfer.public_statistics import LEAST_INFORMATION

log = logging.getLogger(__name__)

_MOST_TEXTS = 64
_PERPLEXITY_FACTOR = 3.0
"""Rise of the perplexity above which a prompt spoils the text behind it.

The demo's prompt lowers it by a fifth. A prompt of standard normal noise lowers it too. Ten times
that noise raises it eight times.
"""
_LARGEST_SHARE = 0.95
"""Share of one class above which the answers hardly depend on the text."""
_MOST_NATS = 100.0


@dataclass(frozen=True)
class _Answers:
    """What the target says of the public texts.

    Attributes:
        perplexity: exp of the mean loss of a token; None for a masked model.
        classes_N: class of each answer; None for a task that generates text.
    """

    perplexity: float | None
    classes_N: torch.Tensor | None


@torch.no_grad()
def effect_on_public_text(
    target: LanguageModel,
    objective: TransferObjective,
    prompt_nd: torch.Tensor,
    world: World,
    adapter: Adapter | None = None,
) -> dict[str, Any]:
    """Compare the target with and without a prompt on public text. All ranks call it.

    Args:
        target: the target, perhaps in ZeRO-3 shards.
        objective: the objective that the prompt was trained with, which has the texts.
        prompt_nd: the prompt on the target's device.
        world: the ranks.
        adapter: what was trained behind it; None if it was the prompt itself.

    Returns:
        `texts`, their number. For a causal target, `perplexity_without_prompt` and
        `perplexity_with_prompt` of a token. For a task with classes, the shares of the classes in
        the answers, `class_shares_without_prompt` and `class_shares_with_prompt`; `label_shift`,
        the total variation distance of the two; and `changed_answers`, the share of the texts whose
        answer is another one.
    """
    stride = -(-len(objective.examples) // _MOST_TEXTS)
    examples = objective.examples[::stride]
    without = _answers(target, objective, examples, None, world)
    with adapted(target, adapter):
        prompted = _answers(target, objective, examples, prompt_nd, world)

    effect: dict[str, Any] = {"texts": len(examples)}
    if without.perplexity is not None:
        effect["perplexity_without_prompt"] = without.perplexity
        effect["perplexity_with_prompt"] = prompted.perplexity
    if without.classes_N is not None and prompted.classes_N is not None:
        num_classes = objective.reader.num_classes
        effect |= _changed_classes(without.classes_N, prompted.classes_N, num_classes)
    return effect


def effect_of_head(without_NC: torch.Tensor, headed_NC: torch.Tensor) -> dict[str, Any]:
    """Compare the target's class scores on public text with and without prompt and head.

    Args:
        without_NC: class scores without them.
        headed_NC: class scores with both.

    Returns:
        As `effect_on_public_text`, without the perplexities: a head writes no text.
    """
    classes = without_NC.argmax(dim=1), headed_NC.argmax(dim=1)
    return {"texts": len(without_NC), **_changed_classes(*classes, without_NC.shape[1])}


def _changed_classes(
    before_N: torch.Tensor, after_N: torch.Tensor, num_classes: int
) -> dict[str, Any]:
    """Compare the classes of the answers without and with a prompt."""
    before_C = before_N.bincount(minlength=num_classes) / len(before_N)
    after_C = after_N.bincount(minlength=num_classes) / len(after_N)
    return {
        "class_shares_without_prompt": _rounded(before_C),
        "class_shares_with_prompt": _rounded(after_C),
        "label_shift": _rounded((after_C - before_C).abs().sum() / 2),
        "changed_answers": _rounded((before_N != after_N).float().mean()),
    }


def report_effect(name: str, effect: Mapping[str, Any], statistics: Mapping[str, float]) -> None:
    """Log the effect of a prompt, and warn of a prompt that spoils the target's text or answers.

    Args:
        name: name of the prompt's run.
        effect: as `effect_on_public_text` returns it.
        statistics: statistics of the models without the new prompt.
    """
    parts = []
    rise = 1.0
    largest_share = 0.0
    if "perplexity_with_prompt" in effect:
        before = effect["perplexity_without_prompt"]
        after = effect["perplexity_with_prompt"]
        rise = after / before
        parts.append(f"perplexity {before:.4g} without the prompt and {after:.4g} with it")
    if "label_shift" in effect:
        largest_share = max(effect["class_shares_with_prompt"])
        parts.append(f"{effect['changed_answers']:.0%} of the answers change")
        parts.append(f"label shift {effect['label_shift']:.2f} (total variation distance)")
        parts.append(f"most frequent class {largest_share:.0%} of the answers")
    log.info("transfer: %s on %d public texts: %s", name, effect["texts"], ", ".join(parts))

    if rise > _PERPLEXITY_FACTOR:
        log.warning(
            "transfer: %s raises the perplexity of public text %.1f times; look at what the large "
            "LLM writes with it before you serve it",
            name,
            rise,
        )
    # A source prompt that says the same of all texts has its own warning.
    had_information = statistics.get("class_information_nats", 0.0) >= LEAST_INFORMATION
    if largest_share > _LARGEST_SHARE and had_information:
        log.warning(
            "transfer: with %s, the large LLM gives one class to %.0f%% of the public texts; "
            "compare the public text with the task",
            name,
            100 * largest_share,
        )


def _rounded(values: torch.Tensor) -> Any:
    """Return a number or a list of numbers with the digits that so few texts are good for."""
    return values.double().cpu().numpy().round(4).tolist()


def _answers(
    target: LanguageModel,
    objective: TransferObjective,
    examples: list[Encoded],
    prompt_nd: torch.Tensor | None,
    world: World,
) -> _Answers:
    reader = objective.reader
    # As many at once as a step trains on: a forward alone needs less memory.
    batch_size = -(-objective.section.batch_size // world.size)
    pieces = logit_pieces(batch_size * reader.longest, target.vocabulary_size)
    of_words = word_scores(target, reader.verbalizer) if reader.num_classes else None

    def compute(chosen: list[Encoded]) -> torch.Tensor:
        batch = reader.collate(chosen).to(world.device)
        hidden_BTd = target(batch.input_ids, batch.attention_mask, prompt_nd)
        num_virtual_tokens = 0 if prompt_nd is None else len(prompt_nd)
        hidden_BTd = hidden_BTd[:, num_virtual_tokens:]
        columns = _loss_and_tokens(target, hidden_BTd, batch, pieces)
        if of_words is not None:
            rows_B = torch.arange(len(chosen), device=world.device)
            columns.append(of_words(hidden_BTd[rows_B, batch.answer]).argmax(dim=1).float())
        return torch.stack(columns, dim=1)

    run = InferenceRun(batch_size, world, "effect on public text")
    columns_N = map_batches(examples, compute, run).double().T
    perplexity = None
    if not target.masked:
        # JSON has neither infinity nor NaN.
        nats = columns_N[0].sum() / columns_N[1].sum().clamp(min=1)
        perplexity = _rounded(nats.nan_to_num(_MOST_NATS).clamp(max=_MOST_NATS).exp())
    classes_N = columns_N[-1].long() if reader.num_classes else None
    return _Answers(perplexity, classes_N)


def _loss_and_tokens(
    target: LanguageModel, hidden_BTd: torch.Tensor, batch: Batch, pieces: int
) -> list[torch.Tensor]:
    """Compute the sum of the losses of each text's tokens, and their number.

    The tokens of a response do not count: other ones are wanted there. All ranks use the same
    number of pieces, because each one gathers a sharded head.

    Returns:
        Two tensors [B]; none for a masked model.
    """
    if target.masked:
        return []
    positions_T = torch.arange(batch.input_ids.shape[1] - 1, device=batch.answer.device)
    is_text_BT = positions_T < batch.answer[:, None]
    labels_BT = batch.input_ids[:, 1:].masked_fill(~is_text_BT, NO_TOKEN)
    hidden_Nd = hidden_BTd[:, :-1].flatten(0, 1)
    labels_N = labels_BT.flatten()
    losses = []
    for piece in split_positions(len(labels_N), pieces):
        logits = target.head(hidden_Nd[piece]).float()
        losses.append(
            functional.cross_entropy(
                logits, labels_N[piece], ignore_index=NO_TOKEN, reduction="none"
            )
        )
    losses_BT = torch.cat(losses).view_as(labels_BT)
    return [losses_BT.sum(dim=1), is_text_BT.sum(dim=1).float()]
