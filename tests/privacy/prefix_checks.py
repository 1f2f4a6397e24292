"""Checks of a prefix as the part that private tuning trains."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from privacy.checks import noisy_sums, part, quiet_source
from privacy.gradient_checks import (
    WORLD,
    Change,
    apart,
    changed_layer,
    mix_examples,
    round_the_last_differently,
    round_the_last_score_differently,
    tuning_task,
)
from privacy.user_checks import USERS
from torch.nn import functional

NORM = 1e-2
FAMILIES = ("llama", "gpt2")
"""Llama has fewer heads of keys than of queries. GPT-2 has learned positions."""


def section_of(**fields: Any) -> Any:
    from post_dist.config.stages import Tune

    return Tune(adapter="prefix", **fields)


def tuned_prefix(
    family: str = "llama", dtype: torch.dtype = torch.float32, **changes: Any
) -> tuple[Any, list[torch.Tensor]]:
    """Return a prefix on seven examples, and values that are not those of its prompt."""
    config = SimpleNamespace(tune=section_of(), need_task=lambda role: None, seed=0)
    task = tuning_task(family, dtype)
    kind = part("privacy.tuned_prefix").TunedPrefix
    task = replace(task, adapter=kind.start(task, config, None), **changes)
    sizes = part("privacy.micro_batches").planned_sizes(task, 4)
    made = kind(task, config, sizes, WORLD)
    generator = torch.Generator().manual_seed(4)
    parameters = []
    for parameter in made.parameters():
        values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameters.append(parameter + (0.3 * values).to(parameter.dtype))
    return made, parameters


def scores_of(task: Any, parameters: Sequence[torch.Tensor], example: int) -> torch.Tensor:
    """Return the class scores [1, C] of one example alone, by a cache of transformers."""
    from transformers import DynamicCache

    batch = task.reader.collate([task.examples[example]])
    cache = DynamicCache()
    for layer, (keys, values) in enumerate(zip(parameters[::2], parameters[1::2], strict=True)):
        cache.update(keys[None], values[None], layer)
    output = task.model.model(input_ids=batch.input_ids, cache=cache, use_cache=True)
    return task.reader.scores(output.logits[0, batch.answer])


def expected_gradients(made: Any, parameters: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return the gradients as ordinary training has them: one example, one backward pass."""
    leaves = [parameter.clone().requires_grad_(True) for parameter in parameters]
    found = []
    for example in range(7):
        scores = scores_of(made.task, leaves, example)
        loss = functional.cross_entropy(scores, made.task.targets[example][None])
        found.append(torch.autograd.grad(loss, leaves))
    return [torch.stack(column) for column in zip(*found, strict=True)]


def a_prefix_s_gradients_are_each_example_s_own() -> None:
    for family in FAMILIES:
        made, parameters = tuned_prefix(family, torch.float64)
        expected = expected_gradients(made, parameters)
        task = made.task
        gradients = part("privacy.tuned_adapter").AdapterGradients(
            task, task.adapter.with_values(parameters), made.prompt_in_front(task)
        )
        found = gradients(task.reader.collate(task.examples), task.targets)
        assert [one.shape for one in found] == [other.shape for other in expected]
        # Llama's norms compute in fp32, whatever the weights are.
        assert apart(found, expected) < (1e-12 if family == "gpt2" else 1e-6)
    # A user's gradient is the sum over all of the user's examples.
    of_users, _ = tuned_prefix("gpt2", torch.float64, users=USERS)
    (found,) = of_users.gradients(parameters, [2, 0])
    for one, other in zip(found, expected, strict=True):
        for row, user in enumerate((2, 0)):
            total = sum(other[example] for example in range(7) if USERS[example] == user)
            torch.testing.assert_close(one[row], total, rtol=1e-9, atol=1e-13)


def prefix_sum(made: Any, parameters: Sequence[torch.Tensor], units: list[int]) -> torch.Tensor:
    """Return the clipped sum of a step on some units, by the real micro-batches."""
    pieces = list(made.gradients(parameters, units))
    assert sum(len(piece[0]) for piece in pieces) == len(units)
    shapes = [parameter.shape for parameter in parameters]
    sums = noisy_sums(pieces, shapes, source=quiet_source(), max_grad_norm=NORM)
    return torch.cat([values.flatten() for values in sums])


def one_unit_moves_a_prefix_by_the_norm_at_most() -> None:
    for family, dtype, users in (
        ("llama", torch.float32, ()),
        ("llama", torch.bfloat16, USERS),
        ("gpt2", torch.float32, ()),
    ):
        made, parameters = tuned_prefix(family, dtype, users=users)
        # At this size no example changes another, also on processors with wide registers.
        made = replace(made, sizes=dict.fromkeys(made.sizes, 4))
        units = list(range(len(made.units)))
        whole = prefix_sum(made, parameters, units)
        assert torch.equal(prefix_sum(made, parameters, units[::-1]), whole)
        for left_out in units:
            others = [unit for unit in units if unit != left_out]
            moved = float((whole - prefix_sum(made, parameters, others)).norm()) / NORM
            assert 1 - 1e-5 <= moved <= 1 + 1e-6, f"unit {left_out} moves the sum by {moved:.7f} C"


def a_prefix_starts_as_its_prompt() -> None:
    for family in FAMILIES:
        made, _ = tuned_prefix(family, torch.float64)
        task = made.task
        start = made.parameters()
        assert len(start) == 2 * len(task.model.layers)
        for example in range(7):
            batch = task.reader.collate([task.examples[example]])
            arguments = (batch.input_ids, batch.attention_mask, task.start_nd, batch.answer)
            expected = task.reader.scores(task.model(*arguments))
            found = scores_of(task, start, example)
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)
            # The prompt is given too, but the prefix runs in its place.
            with part("models.adapted").adapted(task.model, task.adapter):
                found = task.reader.scores(task.model(*arguments))
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)
        # What one trial of a search trains is not what the next one starts from.
        for parameter in start:
            parameter.zero_()
        assert all(parameter.any() for parameter in made.parameters())


def a_prefix_is_scored_as_evaluate_does() -> None:
    made, _ = tuned_prefix(dtype=torch.float64)
    plain = made.parameters()

    def choices(parameters: Sequence[torch.Tensor]) -> list[int]:
        return [int(scores_of(made.task, parameters, example).argmax()) for example in range(7)]

    # Train a prefix that chooses other classes than its prompt.
    others = torch.tensor([1 - choice for choice in choices(plain)])
    opposed = replace(made, task=replace(made.task, targets=others))
    parameters = made.parameters()
    for _ in range(20):
        sums = [found.sum(dim=0) for found in expected_gradients(opposed, parameters)]
        length = torch.stack([each.norm() for each in sums]).norm()
        steps = zip(parameters, sums, strict=True)
        parameters = [parameter - each / length for parameter, each in steps]
    right = int((torch.tensor(choices(parameters)) == others).sum())
    module = part("privacy.tuned_adapter")
    with mock.patch.object(module, "validation_task", return_value=opposed.task):
        assert made.count_right(parameters) == right > 3
        assert made.count_right(plain) == 0


def no_place_counts_for_a_prefix() -> None:
    made, _ = tuned_prefix()
    search = {"mean_trials": 2.0, "learning_rate": [1e-3]}
    plain = section_of(micro_batch_size_per_gpu=8)
    scored = section_of(micro_batch_size_per_gpu=8, search=search)

    def chosen(section: Any, change: Change) -> set[int]:
        with changed_layer(made.task.model, change):
            return set(part("privacy.batch_sizes").independent_sizes(section, made.task).values())

    assert max(chosen(plain, torch.Tensor.clone)) > 4
    assert chosen(plain, mix_examples) == {1}, "examples change each other"
    assert max(chosen(scored, round_the_last_score_differently)) <= 4, "scores were not compared"
    assert max(chosen(plain, round_the_last_differently)) <= 4, "gradients were not compared"


CHECKS: list[Callable[[], None]] = [
    a_prefix_s_gradients_are_each_example_s_own,
    one_unit_moves_a_prefix_by_the_norm_at_most,
    a_prefix_starts_as_its_prompt,
    a_prefix_is_scored_as_evaluate_does,
    no_place_counts_for_a_prefix,
]
