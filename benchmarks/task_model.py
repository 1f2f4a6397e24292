"""A causal model that labels, embeds and writes the texts of one task, for `rivals.py`.

Shapes: N texts, B texts of a batch, T tokens, C classes, k values of hidden states, d width.
"""

import random
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import GenerationConfig

from post_dist.artifacts.head import LinearHead
from post_dist.artifacts.task import PromptTask
from post_dist.config.schema import RunConfig
from post_dist.data.public_text import load_public_texts
from post_dist.data.task_reader import TaskReader
from post_dist.data.template import Encoded
from post_dist.losses.transfer import share_matching_offsets
from post_dist.models.batch_inference import InferenceRun, map_batches, outputs_at_answers
from post_dist.models.classifier import word_scores
from post_dist.models.load import load_tokenizer, load_whole
from post_dist.runtime.distributed import World
from post_dist.runtime.precision import choose_precision

_BATCH = 32
_WRITING_BATCH = 100
_EMBEDDING_LAYERS = 15
"""The student has the same lower layers, so the owner can embed texts without the LLM."""
_TOP_K = 50


class TaskModel:
    """A frozen model bound to a task.

    Args:
        folder: folder of the model.
        config: run file with the sections `private_task` and `public_task`.
        world: this process, alone.

    Attributes:
        num_classes: number of classes C.
        words: the label word of each class.
        public_texts: all texts of the public task.
    """

    def __init__(self, folder: Path, config: RunConfig, world: World) -> None:
        self._folder = folder
        self._config = config
        self._world = world
        self._tokenizer = load_tokenizer(folder)
        self._precision = choose_precision(config.engine, world.device)
        self._model = load_whole(folder, self._precision, world.device)
        task = PromptTask.of_section(config.need_task("private_task"), init_text="")
        self._reader = TaskReader(
            task, self._tokenizer, masked=False, vocabulary=self._model.vocabulary_size
        )
        self.num_classes = self._reader.num_classes
        self.words = [words[0] for words in task.label_words]
        # A file may be sorted, so none of it is cut off.
        public = config.need_task("public_task").model_copy(update={"max_rows": None})
        self.public_texts, _ = load_public_texts(public, "public_task")

    def some_public_texts(self, count: int, seed: int) -> list[str]:
        """Draw public texts at random."""
        return random.Random(seed).sample(self.public_texts, count)

    @torch.no_grad()
    def scores(self, texts: list[str], shots: Sequence[tuple[str, int]] = ()) -> torch.Tensor:
        """Return the class scores [N, C] of texts behind a few labeled texts.

        Args:
            texts: the texts to label.
            shots: texts with their classes. They are run once for all texts.
        """
        prefix = None
        if shots:
            tokens = torch.tensor(self._context_tokens(shots))
            prefix = self._model.prefix_of(self._model.embed(tokens))
        of_words = self._reader.verbalizer

        def compute(chosen: list[Encoded]) -> torch.Tensor:
            batch = self._reader.collate(chosen)
            logits = self._model(
                batch.input_ids, None, None, batch.answer, prefix, tokens=of_words.tokens
            )
            return of_words.scores_of_tokens(logits)

        return map_batches(self._reader.encode(texts), compute, self._run("scores"))

    def states(self, texts: list[str], layers: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the hidden states [N, k] of layers at the answers, and the class scores [N, C]."""
        last = len(self._model.layers) - 1
        read = sorted({*layers, last})
        states_Nk = outputs_at_answers(
            self._model,
            self._reader.encode(texts),
            self._reader.template,
            None,
            lambda hidden_Bk: hidden_Bk,
            self._run("states"),
            layers=read,
        )
        width = self._model.width
        scores_NC = word_scores(self._model, self._reader.verbalizer)(states_Nk[:, -width:])
        chosen = states_Nk if last in layers else states_Nk[:, :-width]
        return chosen.float(), scores_NC.float()

    def last_layers(self, count: int) -> list[int]:
        """Return the numbers of the last layers."""
        return list(range(len(self._model.layers)))[-count:]

    @torch.no_grad()
    def embeddings(self, texts: list[str]) -> torch.Tensor:
        """Return the mean hidden state [N, d] of each text behind a middle layer and a norm."""
        lower = load_whole(self._folder, self._precision, self._world.device)
        trunk = lower.model.base_model
        trunk.layers = nn.ModuleList(lower.layers[:_EMBEDDING_LAYERS])
        lower.model.config.num_hidden_layers = _EMBEDDING_LAYERS
        length = self._reader.template.max_length
        encoded = [
            Encoded(ids, len(ids) - 1)
            for ids in self._tokenizer(texts, truncation=True, max_length=length).input_ids
        ]

        def compute(chosen: list[Encoded]) -> torch.Tensor:
            batch = self._reader.collate(chosen)
            hidden_BTd = lower(batch.input_ids).float()
            mask = batch.attention_mask[:, :, None]
            return (hidden_BTd * mask).sum(dim=1) / mask.sum(dim=1)

        return map_batches(encoded, compute, self._run("embeddings"))

    @torch.no_grad()
    def continue_texts(self, prompts: list[str], new_tokens: int) -> list[str]:
        """Sample what follows each prompt, up to the first quotation mark or line break."""
        sampling = GenerationConfig(
            max_new_tokens=new_tokens,
            do_sample=True,
            temperature=1.0,
            top_k=_TOP_K,
            eos_token_id=self._tokenizer.eos_token_id,
            pad_token_id=self._tokenizer.eos_token_id,
        )
        self._tokenizer.pad_token = self._tokenizer.eos_token
        found = []
        for start in range(0, len(prompts), _WRITING_BATCH):
            # Padding comes first, so that all prompts end at the same place.
            batch = self._tokenizer(
                prompts[start : start + _WRITING_BATCH],
                padding=True,
                padding_side="left",
                return_tensors="pt",
            )
            # pyrefly: ignore[not-callable] - a method of every model with a causal head
            tokens = self._model.model.generate(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                generation_config=sampling,
            )
            new = tokens[:, batch.input_ids.shape[1] :]
            found += self._tokenizer.batch_decode(new, skip_special_tokens=True)
        return [text.split('"')[0].split("\n")[0] for text in found]

    def _context_tokens(self, shots: Sequence[tuple[str, int]]) -> list[int]:
        """Return the tokens of labeled texts in the template, each with its label word."""
        gap = self._tokenizer("\n\n", add_special_tokens=False).input_ids
        encoded = self._reader.encode([text for text, _ in shots])
        tokens: list[int] = []
        for row, (_, index) in zip(encoded, shots, strict=True):
            label = self._reader.verbalizer.token_ids[index][0]
            tokens += [*row.token_ids, label, *gap]
        return tokens

    def _run(self, label: str) -> InferenceRun:
        return InferenceRun(_BATCH, self._world, label)


def balanced(scores_NC: torch.Tensor, public_NC: torch.Tensor) -> torch.Tensor:
    """Shift class scores so that public text has the same mean probability of each class.

    Our transfer matches class shares too, and a rival without it would be handicapped.
    """
    classes = public_NC.shape[1]
    return scores_NC + share_matching_offsets(public_NC, torch.full((classes,), 1 / classes))


def features_like(states_Nk: torch.Tensor, public_Nk: torch.Tensor) -> torch.Tensor:
    """Standardize states [N, k] like public ones, and scale each row to length 1, in fp64."""
    return LinearHead.untrained(public_Nk, 1).features(states_Nk)
