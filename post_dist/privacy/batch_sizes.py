"""Choose the sizes of micro-batches at which examples do not change each other, bit for bit.

Clipping bounds what one example adds to the sum only if its gradient does not depend on the other
examples. In exact arithmetic no causal or masked model mixes examples. But a matrix product may
round a row differently at another place of its batch, by the shape, the device and the number of
threads. A student can be built so that its gradients consist of rounding alone: one example then
moves the sum by several clipping norms.

So every shape that the run may use is tried on the machine that runs, before the first step: with
the student's weights, and with random ones, because a student may hide from random tokens what it
does with real ones. Random weights need one layer of each kind, because layers of one kind run the
same kernels. A size that fails is replaced by a smaller one. The last resort is one example in each
pass.

A model may also remember earlier passes. With dynamic rotary embeddings, a text that is longer than
all before it changes how later texts are read. So a model is refused if its buffers change.

Shapes: B examples, T tokens, R tokens of a response.
"""

import copy
import logging
import secrets
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

import torch

from post_dist.config.schema import Tune
from post_dist.data.template import NO_TOKEN, Batch
from post_dist.errors import InputError
from post_dist.models.compiled import compile_again
from post_dist.models.families import layer_kinds
from post_dist.models.language_model import LanguageModel
from post_dist.models.tuning_task import TuningTask
from post_dist.privacy.micro_batches import LENGTH_STEP, planned_sizes, size_of_longest
from post_dist.privacy.tuned_part import tuned_kind
from post_dist.runtime.stop import leave_if_requested

log = logging.getLogger(__name__)

_ALIGNED = 8
"""Sizes that are a multiple of this fill the blocks of common kernels for matrix products."""
_SMALL = (4, 2, 1)
_RANDOM_WEIGHT = 0.02


@dataclass(frozen=True)
class _Probe:
    """A made-up example.

    Attributes:
        token_ids: its tokens.
        answer: position of the answer.
        target: its class, or the R tokens of its response.
    """

    token_ids: torch.Tensor
    answer: int
    target: torch.Tensor


def independent_sizes(section: Tune, task: TuningTask) -> dict[int, int]:
    """Find the number of examples in a micro-batch of each length.

    The result depends on the model, the machine and the run file, and not on the examples.

    Args:
        section: gives the size of a micro-batch of the longest examples.
        task: the model and the form of the task.

    Returns:
        For each padded length, the largest tried size at which examples are independent.

    Raises:
        InputError: one example's gradient changes from pass to pass, or the model remembers
            earlier passes.
        Interrupted: the process was asked to stop.
    """
    # The provider of the student must not know the probes, or the student could behave for them
    # alone.
    generator = torch.Generator().manual_seed(secrets.randbits(63))
    # The cheaper trial comes first and is the larger one. The student itself is run less often.
    kernels = replace(task, model=_with_random_weights(task, generator))
    fresh = _buffers_of(task.model)
    sizes = {}
    plan = planned_sizes(task, size_of_longest(section, task))
    if task.model.has_experts:
        # The products of an expert have a row for each token that the router sends there. No trial
        # covers what other examples may do to their shape, so each example runs alone.
        plan = dict.fromkeys(plan, 1)
    # On a CPU this takes minutes, and no step is taken meanwhile.
    log.info("tune: checking that examples do not affect each other, at %d lengths", len(plan))
    for length, planned in plan.items():
        leave_if_requested("no step was taken yet")
        checks = [
            _IndependenceCheck(kernels, section, length, generator, all_patterns=True),
            _IndependenceCheck(task, section, length, generator, all_patterns=False),
        ]
        sizes[length] = _largest_size(checks, planned)
        if sizes[length] == 0:
            raise InputError(
                f"{type(task.model.model).__name__} gives an example another gradient after "
                "other examples, so gradient clipping cannot bound what one example contributes",
                "use a dense model",
            )
        if sizes[length] < planned:
            log.warning(
                "tune: micro-batches of %d tokens hold %d examples instead of %d: in larger ones, "
                "this model's gradients depend on the other examples on this machine",
                length,
                sizes[length],
                planned,
            )
    # Passes of all lengths have been made by now, with the most tokens that an example may have.
    if not _are_equal(fresh, _buffers_of(task.model)):
        raise InputError(
            f"{type(task.model.model).__name__} changes with the length of the texts that it has "
            "read, so gradient clipping cannot bound what one example contributes",
            "use a model whose rope_type is not dynamic, or a smaller max_length",
        )
    return sizes


def _buffers_of(model: LanguageModel) -> dict[str, torch.Tensor]:
    """Return copies of what a model keeps from pass to pass, besides its weights."""
    return {name: buffer.clone() for name, buffer in model.model.named_buffers()}


def _are_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Return whether two sets of tensors have the same names and bits."""
    if set(one) != set(other):
        return False
    return all(_same_bits(buffer, other[name]) for name, buffer in one.items())


def _largest_size(checks: Sequence["_IndependenceCheck"], planned: int) -> int:
    """Return the largest size that passes all checks; 0 if none does."""
    aligned = range(planned - 1 - (planned - 1) % _ALIGNED, 0, -_ALIGNED)
    small = [size for size in _SMALL if size < planned]
    for size in (planned, *aligned, *small):
        if all(check.passes(size) for check in checks):
            return size
    return 0


def _with_random_weights(task: TuningTask, generator: torch.Generator) -> LanguageModel:
    """Return a copy of the model with dense random weights, and only its first layers.

    The first layers hold at least one layer of each kind.
    """
    kinds = _kinds_of_layers(task.model)
    count = max(kinds.index(kind) for kind in kinds) + 1
    # The other layers are taken out before the copy, which then needs little memory.
    layers = task.model.layers
    above = list(layers[count:])
    del layers[count:]
    try:
        model = copy.deepcopy(task.model)
    finally:
        layers.extend(above)
    model.model.config.num_hidden_layers = count
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator) * _RANDOM_WEIGHT
            # The scales of layer norms are vectors around 1.
            start = 1.0 if parameter.dim() == 1 else 0.0
            parameter.copy_(noise + start)
    compile_again(model)
    return model


def _kinds_of_layers(model: LanguageModel) -> list[Hashable]:
    """Return what decides the kernels of each layer: its class, its shapes, and its attention."""
    attention = layer_kinds(model.model.config)
    kinds: list[Hashable] = []
    for number, layer in enumerate(model.layers):
        shapes = tuple(parameter.shape for parameter in layer.parameters())
        kinds.append((type(layer), shapes, *attention[number : number + 1]))
    return kinds


class _IndependenceCheck:
    """Compares an example's gradient at all places of a micro-batch, beside different examples.

    Args:
        task: the model and the form of the task.
        section: says whether biases are tuned, and whether right answers are counted.
        length: padded length T of the micro-batch.
        generator: draws the probes.
        all_patterns: whether to try each place beside more kinds of neighbors.
    """

    def __init__(
        self,
        task: TuningTask,
        section: Tune,
        length: int,
        generator: torch.Generator,
        *,
        all_patterns: bool,
    ) -> None:
        self._task = task
        self._section = section
        self._length = length
        self._generator = generator
        self._all_patterns = all_patterns
        # Examples of a masked model always have a token of padding.
        most = length - int(task.model.masked)
        self._full = self._probe(most)
        self._short = self._probe(max(2, most - LENGTH_STEP + 1))

    def passes(self, size: int) -> bool:
        """Return whether the two probes have the same results in all patterns.

        The results are gradients and logits; for a head, the hidden states that it reads.
        """
        results = tuned_kind(self._section).results(self._task, self._section)
        known: dict[int, list[torch.Tensor]] = {}
        for rows in self._patterns(size):
            batch, targets = self._batch(rows)
            if not self._agrees(rows, results(batch, targets), known):
                return False
        return True

    def _patterns(self, size: int) -> list[list[_Probe]]:
        """Return micro-batches in which the two probes stand at all places."""
        full = self._full
        short = self._short
        if size == 1:
            return [[full], [short], [self._other()], [full], [short]]
        largest = self._largest_embedding_example()
        patterns = [[full, short], [largest, full]]
        if self._all_patterns:
            # Without padding, some kernels need no mask.
            patterns += [[full, full], [short, self._other()]]
        return [(pair * size)[:size] for pair in patterns]

    def _agrees(
        self,
        rows: Sequence[_Probe],
        found: Sequence[torch.Tensor],
        known: dict[int, list[torch.Tensor]],
    ) -> bool:
        """Compare the probes' results with those of their first row, and remember them."""
        for place, row in enumerate(rows):
            if row is not self._full and row is not self._short:
                continue
            own = [part[place] for part in found]
            first = known.setdefault(id(row), own)
            if not all(map(_same_bits, first, own)):
                return False
        return True

    def _probe(self, count: int, token: int | None = None) -> _Probe:
        """Make an example of `count` tokens: random ones, or one repeated token."""
        task = self._task
        shape = (count,)
        token_ids = torch.randint(task.model.vocabulary_size, shape, generator=self._generator)
        if token is not None:
            token_ids = torch.full(shape, token)
        if not task.reader.generates:
            target = torch.randint(task.reader.num_classes, (), generator=self._generator)
            return _Probe(token_ids, count - 1, target)
        # The response is at the end of the text.
        longest = task.targets.shape[1]
        given = min(longest, count - 1)
        target = torch.full((longest,), NO_TOKEN)
        target[:given] = token_ids[count - given :]
        return _Probe(token_ids, count - given - 1, target)

    def _other(self) -> _Probe:
        """Make a new random example of full length."""
        return self._probe(len(self._full.token_ids))

    def _largest_embedding_example(self) -> _Probe:
        """Make an example of the token with the largest embedding."""
        table: torch.Tensor = self._task.model.model.get_input_embeddings().get_parameter("weight")
        return self._probe(len(self._full.token_ids), int(table.float().norm(dim=1).argmax()))

    def _batch(self, rows: Sequence[_Probe]) -> tuple[Batch, torch.Tensor]:
        """Pad probes on the right to one batch [B, T], with their targets."""
        input_ids = torch.zeros(len(rows), self._length, dtype=torch.long)
        attention_mask = torch.zeros_like(input_ids)
        for place, row in enumerate(rows):
            input_ids[place, : len(row.token_ids)] = row.token_ids
            attention_mask[place, : len(row.token_ids)] = 1
        device = self._task.model.model.device
        answers_B = torch.tensor([row.answer for row in rows])
        targets = torch.stack([row.target for row in rows]).to(device)
        return Batch(input_ids, attention_mask, answers_B).to(device), targets


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether two tensors hold equal values, where NaN equals NaN."""
    if one.shape != other.shape:
        return False
    return bool(((one == other) | (one.isnan() & other.isnan())).all())
