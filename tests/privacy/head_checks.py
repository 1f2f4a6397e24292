"""Checks of a linear head as the part that private tuning trains."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from privacy.checks import noisy_sums, part, plan_of, quiet_source
from privacy.gradient_checks import (
    WORLD,
    Change,
    changed_layer,
    mix_examples,
    round_the_last_score_differently,
    tuning_task,
)
from privacy.user_checks import USERS
from torch.nn import functional

NORM = 1e-2


def tuned_head(**changes: Any) -> Any:
    """Return a head behind a prompt on seven examples, and parameters that are not zero."""
    from post_dist.artifacts.head import LinearHead
    from post_dist.config.stages import Tune

    task = replace(tuning_task("llama", torch.float32), **changes)
    # The head reads two layers.
    hidden = torch.randn(50, 2 * task.model.width, generator=torch.Generator().manual_seed(3))
    head = LinearHead.untrained(hidden, 2)
    task = replace(task, start_nd=task.start_nd.float(), adapter=head)
    config = SimpleNamespace(tune=Tune(adapter="head"), need_task=lambda role: None)
    sizes = part("privacy.micro_batches").planned_sizes(task, 4)
    made = part("privacy.tuned_head").TunedHead(task, config, sizes, WORLD)
    generator = torch.Generator().manual_seed(4)
    parameters = [
        torch.randn(parameter.shape, generator=generator) for parameter in made.parameters()
    ]
    return made, parameters


def expected_gradients(made: Any, parameters: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return the gradients of the cross-entropy of each example, by autograd in fp64."""
    inputs = made._inputs
    weights = [parameter.double().requires_grad_(True) for parameter in parameters]
    found: list[list[torch.Tensor]] = [[], []]
    for example, label in enumerate(inputs.classes_N):
        feature = torch.from_numpy(inputs.features_Nm[example])
        scores = torch.from_numpy(inputs.scores_NC[example]) + weights[0] @ feature + weights[1]
        loss = functional.cross_entropy(scores[None], torch.tensor([label]))
        for kept, gradient in zip(found, torch.autograd.grad(loss, weights), strict=True):
            kept.append(gradient)
    return [torch.stack(kept) for kept in found]


def a_head_s_gradients_are_those_of_its_loss() -> None:
    made, parameters = tuned_head()
    expected = expected_gradients(made, parameters)
    order = [3, 0, 6, 2]
    (found,) = made.gradients(parameters, order)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other[order], rtol=1e-9, atol=1e-12)
    # A user's gradient is the sum over all of the user's examples.
    of_users, _ = tuned_head(users=USERS)
    (found,) = of_users.gradients(parameters, [2, 0])
    for one, other in zip(found, expected, strict=True):
        for row, user in enumerate((2, 0)):
            total = sum(other[example] for example in range(7) if USERS[example] == user)
            torch.testing.assert_close(one[row], total, rtol=1e-9, atol=1e-12)


def head_sum(made: Any, parameters: Sequence[torch.Tensor], units: list[int]) -> torch.Tensor:
    """Return the clipped sum of a step on some units, whose gradients come in several parts."""
    with mock.patch.object(part("privacy.tuned_head"), "_GRADIENT_BYTES", 2000):
        pieces = list(made.gradients(parameters, units))
    assert sum(len(piece[0]) for piece in pieces) == len(units)
    shapes = [parameter.shape for parameter in parameters]
    sums = noisy_sums(pieces, shapes, source=quiet_source(), max_grad_norm=NORM)
    return torch.cat([values.flatten() for values in sums])


def one_unit_moves_a_head_by_the_norm_at_most() -> None:
    for users in ((), USERS):
        made, parameters = tuned_head(users=users)
        units = list(range(len(made.units)))
        whole = head_sum(made, parameters, units)
        for left_out in units:
            others = [unit for unit in units if unit != left_out]
            moved = float((whole - head_sum(made, parameters, others)).norm()) / NORM
            assert 1 - 1e-5 <= moved <= 1 + 1e-6, f"unit {left_out} moves the sum by {moved:.7f} C"


def no_example_changes_what_a_head_reads_of_another() -> None:
    task = tuning_task("llama", torch.float32)
    whole = tuned_head()[0]._inputs
    for chosen in ([6], [2, 5], [5, 4, 3, 2, 1]):
        examples = [task.examples[example] for example in chosen]
        some = tuned_head(examples=examples, targets=task.targets[chosen])[0]._inputs
        for place, example in enumerate(chosen):
            assert (some.features_Nm[place] == whole.features_Nm[example]).all()
            assert (some.scores_NC[place] == whole.scores_NC[example]).all()
            assert some.classes_N[place] == whole.classes_N[example]


def a_head_reads_the_prompted_student() -> None:
    made, parameters = tuned_head()
    task = made._task
    weight, bias = parameters
    head = task.adapter.with_values(weight, bias)
    last_two = range(len(task.model.layers))[-2:]
    right = 0
    for example, target in zip(task.examples, task.targets, strict=True):
        batch = task.reader.collate([example])
        arguments = (batch.input_ids, batch.attention_mask, task.start_nd, batch.answer)
        of_words = task.reader.scores(task.model(*arguments))
        scores = of_words + head.scores(task.model(*arguments, layers=last_two))
        right += int(scores.argmax() == target)
    # What the private run counts on the validation split is what `evaluate` computes.
    scoring = part("privacy.tuned_head")
    with mock.patch.object(scoring, "validation_task", lambda of, section: of):
        assert made.count_right(parameters) == right
        assert made.count_right([torch.zeros_like(weight), torch.tensor([0.0, 1e3])]) == int(
            (task.targets == 1).sum()
        )


def noise_moves_the_scores_of_a_head_by_less_than_half_a_nat() -> None:
    from post_dist.config.privacy import Privacy
    from post_dist.config.stages import Tune

    rate_of = part("privacy.private_run").learning_rate
    plan = plan_of(noise_multiplier=5.0, max_grad_norm=2.0, steps=100, expected_batch_size=50.0)

    def rate(tune: Tune, privacy: Privacy) -> float:
        return rate_of(SimpleNamespace(tune=tune, privacy=privacy), plan)

    # A step's noise is 5 * 2 / 50 = 0.2. After 100 steps of rate 1 it would be 2.
    head = Tune(adapter="head")
    assert math.isclose(rate(head, Privacy()), 0.2)
    assert rate(Tune(adapter="head", learning_rate=0.1), Privacy()) == 0.1
    # What the run file says is taken.
    assert rate(head, Privacy(learning_rate=3.0)) == 3.0
    assert rate(Tune(), Privacy()) == Tune().learning_rate


def no_place_counts_for_a_head() -> None:
    from post_dist.config.stages import Tune

    task = tuned_head()[0]._task
    section = Tune(adapter="head", micro_batch_size_per_gpu=8)

    def chosen(change: Change) -> set[int]:
        with changed_layer(task.model, change):
            return set(part("privacy.batch_sizes").independent_sizes(section, task).values())

    assert max(chosen(torch.Tensor.clone)) > 4
    assert chosen(mix_examples) == {1}, "examples change each other"
    assert chosen(round_the_last_score_differently) == {4}, "a last bit was not noticed"


CHECKS: list[Callable[[], None]] = [
    a_head_s_gradients_are_those_of_its_loss,
    one_unit_moves_a_head_by_the_norm_at_most,
    no_example_changes_what_a_head_reads_of_another,
    a_head_reads_the_prompted_student,
    no_place_counts_for_a_head,
    noise_moves_the_scores_of_a_head_by_less_than_half_a_nat,
]
