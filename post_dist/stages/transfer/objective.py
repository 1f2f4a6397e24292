"""What a soft prompt for the target has to learn: public rows, and what the models say to them without it.

Three of the four forwards of the published loss do not depend on the prompt that is trained, so they are run once. Scores of a few
classes are kept as they are; of a whole vocabulary, [N, V] would be too much, and the hidden states [N, d] under the head are kept.

Shapes: N public rows, B rows of a step, K scores (vocabulary or classes), C classes, V vocabulary, n prompt tokens, d width.
"""

import logging
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from post_dist.artifacts.task import PromptTask
from post_dist.config.schema import Transfer
from post_dist.config.sources import Task
from post_dist.data.order import rows_of_like_length
from post_dist.data.template import NO_TOKEN, Batch, Encoded, Template
from post_dist.data.verbalizer import Verbalizer
from post_dist.losses.divergence import softened_kl
from post_dist.losses.transfer import proxy_logits, published_transfer_loss, share_matching_offsets
from post_dist.models.batch_inference import answers, map_in_batches
from post_dist.models.generation import response_hidden
from post_dist.models.language_model import LanguageModel
from post_dist.models.prompt_init import check_room
from post_dist.runtime.distributed import World
from post_dist.stages.transfer.public_statistics import alpha_by_agreement, class_information

log = logging.getLogger(__name__)

_ROWS_AT_ONCE = 4
"""For each row that a rank trains on in a step: without gradients one layer's activations are alive, and not all layers'."""


@dataclass(frozen=True)
class Models:
    """The student that the source prompts were tuned on, and the target."""

    student: LanguageModel
    target: LanguageModel


@dataclass(frozen=True)
class Lesson:
    """What one prompt has to learn.

    Attributes:
        section: the objective, with a number for alpha.
        template: of the public rows.
        verbalizer: of the task.
        class_biases: of the source prompt's task.
        rows: public texts in the template.
        source: what is kept of the student's answers, [N, C] or [N, d]; of its responses [N, R, d].
        source_prompted: of the student's behind the source prompt.
        target: of the target's.
        offsets: [K], added to the proxy's scores.
        signals: what the public text told, by name.
    """

    section: Transfer
    template: Template
    verbalizer: Verbalizer
    class_biases: tuple[float, ...]
    rows: list[Encoded]
    source: torch.Tensor
    source_prompted: torch.Tensor
    target: torch.Tensor
    offsets: torch.Tensor
    signals: Mapping[str, float]

    @property
    def keeps_hidden(self) -> bool:
        """Whether hidden states are kept, and the head is still to be run."""
        return self.section.scores == "vocabulary"

    @cached_property
    def _lengths(self) -> list[int]:
        return [len(row.token_ids) for row in self.rows]

    def rows_at(self, step: int, seed: int) -> list[int]:
        """The rows of a step."""
        return rows_of_like_length(step, self.section.batch_size, self._lengths, seed)

    @cached_property
    def there(self) -> torch.Tensor:
        """Where the rows' responses have a token, [N, R]."""
        return self.template.responses(self.rows) != NO_TOKEN

    def of(self, chosen: list[int], kept: torch.Tensor) -> torch.Tensor:
        """What is kept of some rows: one answer each, or, row by row, the tokens of their responses."""
        return (
            kept[chosen][self.there[chosen]] if self.template.max_response_length else kept[chosen]
        )

    def _shares(self, chosen: list[int], device: torch.device) -> torch.Tensor | None:
        """What each token of the responses counts, so that all rows count the same; None where a row has one answer."""
        if not self.template.max_response_length:
            return None
        there_BR = self.there[chosen].to(device)
        return (1 / (len(chosen) * there_BR.sum(dim=1, keepdim=True))).expand_as(there_BR)[there_BR]

    def loss(
        self,
        chosen: list[int],
        prompted_BV: torch.Tensor,
        target_BV: torch.Tensor | None,
        student: LanguageModel,
    ) -> torch.Tensor:
        """The mean loss of rows.

        Args:
            chosen: their numbers.
            prompted_BV: logits of the prompted target, at the answers or, row by row, at the tokens of the responses.
            target_BV: logits of the target, where hidden states are kept.
            student: for its head, where hidden states are kept.
        """
        device, section = prompted_BV.device, self.section
        source_BK, source_prompted_BK, target_BK = (
            self.of(chosen, kept) for kept in (self.source, self.source_prompted, self.target)
        )
        source_BK, source_prompted_BK, target_BK = (
            kept.to(device) for kept in (source_BK, source_prompted_BK, target_BK)
        )
        shares_B = self._shares(chosen, device)
        prompted_BK = prompted_BV if self.keeps_hidden else self.verbalizer.scores(prompted_BV)
        if target_BV is not None:
            # Models of one family and tokenizer may fill their embeddings up to different sizes, with tokens that no text has.
            common = min(student.vocabulary_size, target_BV.shape[1])
            prompted_BK, target_BK = prompted_BK[:, :common], target_BV.detach()[:, :common]
            with torch.no_grad():
                source_BK = student.head(source_BK)[:, :common]
                source_prompted_BK = self.verbalizer.lift(
                    student.head(source_prompted_BK), self.class_biases
                )[:, :common]
        if section.objective == "published":
            weights: dict[str, Any] = {
                "alpha": section.alpha,
                "temperature": section.temperature,
                "shares_B": shares_B,
            }
            return published_transfer_loss(
                source_BK, source_prompted_BK, target_BK, prompted_BK, **weights
            )
        wanted_BK = proxy_logits(
            source_BK, source_prompted_BK, target_BK, section.proxy_lambda
        ) + self.offsets.to(device)
        return softened_kl(wanted_BK, prompted_BK, section.temperature, shares_B)


def prepare_lesson(
    task: PromptTask,
    source_nd: torch.Tensor,
    public_task: Task,
    public: tuple[list[str], list[str]],
    models: Models,
    section: Transfer,
    tokenizers: tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase],
    world: World,
    said: dict[Hashable, torch.Tensor],
) -> Lesson:
    """Run the three forwards that need no training, over all public rows, for a source prompt [n, d] and its task.

    `public` holds the public texts, and the responses to them for a prompt that generates text. The tokenizers are the student's and the
    target's: they may differ where classes are compared, which each model has in words of its own. `said` keeps what the models say
    without a prompt, for the next lesson on the same texts: models, public task and texts must be the same for all that share it.
    """
    texts, responses = public
    log.info(
        "transfer: %d public texts, objective %s on the %s",
        len(texts),
        section.objective,
        section.scores,
    )
    text = public_task.template or task.template
    most = task.max_response_length
    bounds: dict[str, Any] = {"masked": models.target.masked, "max_response_length": most}
    templates = [Template(text, tokenizer, task.max_length, **bounds) for tokenizer in tokenizers]
    verbalizers = [
        Verbalizer(task.label_words, tokenizer, allow_multi_token=task.allow_multi_token)
        for tokenizer in tokenizers
    ]
    rows = [template.encode(texts, responses if most else ()) for template in templates]
    for model, template in zip((models.student, models.target), templates, strict=True):
        check_room(model, len(source_nd), template.longest)
    by_classes = section.scores == "classes"

    def kept(
        model: LanguageModel, prompt_nd: torch.Tensor | None, biases: Sequence[float], label: str
    ) -> torch.Tensor:
        by = int(model is models.target)

        def keep(answer: torch.Tensor) -> torch.Tensor:
            return (
                verbalizers[by].scores(verbalizers[by].lift(answer, biases))
                if by_classes
                else answer
            )

        at_once = _ROWS_AT_ONCE * -(-section.batch_size // world.size)
        how: dict[str, Any] = {"batch_size": at_once, "world": world, "label": label}
        if most:
            return map_in_batches(
                rows[by],
                lambda chosen: hidden(model, templates[by].collate(chosen), prompt_nd),
                **how,
            )
        return answers(model, rows[by], templates[by], prompt_nd, keep, **how, with_head=by_classes)

    def hidden(model: LanguageModel, batch: Batch, prompt_nd: torch.Tensor | None) -> torch.Tensor:
        return response_hidden(model, batch.to(world.device), most, prompt=prompt_nd)

    def unprompted(model: LanguageModel, label: str) -> torch.Tensor:
        question = (
            label,
            section.scores,
            text,
            task.label_words,
            task.max_length,
            task.allow_multi_token,
            most,
        )
        if question not in said:
            said[question] = kept(model, None, (), label)
        return said[question]

    source = unprompted(models.student, "student")
    source_prompted = kept(models.student, source_nd, task.class_biases, "student + prompt")
    target = unprompted(models.target, "target")

    section, signals = _heed(
        section, verbalizers, models, (source, source_prompted, target), task.class_biases
    )
    offsets = torch.zeros(1)
    if section.match_class_shares:
        offsets = share_matching_offsets(
            proxy_logits(source, source_prompted, target, section.proxy_lambda), source_prompted
        )
        log.info(
            "transfer: class offsets %s match the prompted student's shares",
            [round(float(offset), 3) for offset in offsets],
        )
    return Lesson(
        section,
        templates[1],
        verbalizers[1],
        task.class_biases,
        rows[1],
        source,
        source_prompted,
        target,
        offsets,
        signals,
    )


def _heed(
    section: Transfer,
    verbalizers: Sequence[Verbalizer],
    models: Models,
    kept: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    biases: Sequence[float],
) -> tuple[Transfer, dict[str, float]]:
    """What the answers to the public text tell, and the settings with the alpha that follows from it, if it is to."""
    if not verbalizers[0].token_ids:
        return section, {}

    @torch.no_grad()
    def classes(
        model: LanguageModel, answered: torch.Tensor, biases: Sequence[float] = ()
    ) -> torch.Tensor:
        by = verbalizers[model is models.target]
        if section.scores == "classes":
            return answered
        head = model.head_of(by.tokens)
        parts = [
            head(part.to(model.model.device)).cpu() for part in answered.split(section.batch_size)
        ]
        return by.scores_of_tokens(torch.cat(parts)) + torch.tensor([biases or [0.0]])

    source, source_prompted, target = kept
    prompted_NC = classes(models.student, source_prompted, biases)
    signals = {"class_information_nats": class_information(prompted_NC)}
    if section.alpha == "auto":
        signals["alpha"] = alpha_by_agreement(
            classes(models.student, source), prompted_NC, classes(models.target, target)
        )
        section = section.model_copy(update={"alpha": signals["alpha"]})
    log.info(
        "transfer: the public text tells %s",
        ", ".join(f"{name} {value:.3f}" for name, value in signals.items()),
    )
    return section, signals


def lesson_losses(
    models: Models,
    lessons: Sequence[Lesson],
    prompts: Sequence[torch.Tensor],
    chosen: Sequence[list[int]],
    device: torch.device,
) -> list[torch.Tensor]:
    """Each prompt's loss on its own rows, from one forward of the target.

    Args:
        models: student and target.
        lessons: one for each prompt.
        prompts: [n, d] each.
        chosen: the rows of each, equally many.
        device: of the models.
    """
    picked = [
        [lesson.rows[row] for row in rows] for lesson, rows in zip(lessons, chosen, strict=True)
    ]
    longest = max(len(row.token_ids) for rows in picked for row in rows)
    parts = [
        lesson.template.collate(rows, longest) for lesson, rows in zip(lessons, picked, strict=True)
    ]
    batch = Batch(
        *(
            torch.cat([getattr(part, name) for part in parts])
            for name in ("input_ids", "attention_mask", "answer")
        )
    ).to(device)
    of_target = [
        lesson.of(rows, lesson.target).to(device)
        for lesson, rows in zip(lessons, chosen, strict=True)
        if lesson.keeps_hidden
    ]
    prompts_Gnd = torch.stack(list(prompts))
    of_each_row = prompts_Gnd.repeat_interleave(len(chosen[0]), dim=0)
    most = lessons[0].template.max_response_length
    if most:
        hidden_BRd = response_hidden(models.target, batch, most, prompt=of_each_row)
        there_BR = torch.cat(
            [lesson.there[rows] for lesson, rows in zip(lessons, chosen, strict=True)]
        ).to(device)
        logits = models.target.head(torch.cat([hidden_BRd[there_BR], *of_target]))
        counts = [len(part) for part in of_target]
    else:
        logits = models.target(
            batch.input_ids,
            batch.attention_mask,
            prompts_Gnd if models.target.shares_prompt else of_each_row,
            batch.answer,
            share_prompt=models.target.shares_prompt,
            beside=torch.cat(of_target) if of_target else None,
        )
        counts = [len(rows) for rows in chosen]
    prompted = logits[: sum(counts)].split(counts)
    unprompted = iter(logits[sum(counts) :].split([len(part) for part in of_target]))
    return [
        lesson.loss(
            rows, prompted_BV, next(unprompted) if lesson.keeps_hidden else None, models.student
        )
        for lesson, rows, prompted_BV in zip(lessons, chosen, prompted, strict=True)
    ]
