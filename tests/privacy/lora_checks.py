"""Checks of a LoRA as the part that private tuning trains."""

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
TARGETS = {
    "llama": ("q_proj", "v_proj", "down_proj"),
    "opt": ("q_proj", "v_proj"),
    "roberta": ("query", "output.dense"),
}
"""Modules to change, some of them in the MLP, which the last layer runs only at the answers."""


def section_of(family: str = "llama", **fields: Any) -> Any:
    from post_dist.config.stages import Tune

    lora = {"r": 2, "lora_alpha": 6, "target_modules": TARGETS[family], "upper_layers": 2}
    return Tune(adapter="lora", lora=lora, **fields)


def privacy_of(epochs: float) -> Any:
    """Return a plan that reads each of 100 declared examples so often; none for 0."""
    from post_dist.config.privacy import Privacy

    if not epochs:
        return Privacy(enabled=False)
    steps = round(epochs * 100 / 4)
    sizes = {"declared_examples": 100, "expected_batch_size": 4, "steps": steps}
    return Privacy(enabled=True, noise_multiplier=1, **sizes)


def tuned_lora(
    family: str = "llama",
    dtype: torch.dtype = torch.float32,
    epochs: float = 0,
    **changes: Any,
) -> tuple[Any, list[torch.Tensor]]:
    """Return a LoRA on seven examples, and factors that are not zero."""
    config = SimpleNamespace(
        tune=section_of(family),
        need_task=lambda role: None,
        seed=0,
        privacy=privacy_of(epochs),
        protects_users=bool(changes.get("users")),
    )
    task = tuning_task(family, dtype)
    kind = part("privacy.tuned_lora").TunedLora
    task = replace(task, adapter=kind.start(task, config, None), **changes)
    sizes = part("privacy.micro_batches").planned_sizes(task, 4)
    made = kind(task, config, sizes, WORLD)
    generator = torch.Generator().manual_seed(4)
    wide = torch.promote_types(dtype, torch.float32)
    parameters = []
    for parameter in made.parameters():
        values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameters.append((0.3 * values).to(wide))
    return made, parameters


def loss_of(made: Any, parameters: Sequence[torch.Tensor], example: int) -> torch.Tensor:
    """Return the loss of one example by a model whose weights hold the product of the factors."""
    task = made.task
    lora = task.adapter
    weights = {}
    for layer, down, up in zip(lora.layers, parameters[::2], parameters[1::2], strict=True):
        weight = task.model.get_parameter(f"model.{layer}.weight")
        weights[f"model.{layer}.weight"] = weight + 6 / 2 * up @ down
    batch = task.reader.collate([task.examples[example]])
    arguments = (batch.input_ids, batch.attention_mask, task.start_nd, batch.answer)
    logits = torch.func.functional_call(task.model, weights, arguments)
    return functional.cross_entropy(task.reader.scores(logits), task.targets[example][None])


def expected_gradients(made: Any, parameters: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return the gradients as ordinary training has them: one example, one backward pass."""
    leaves = [parameter.clone().requires_grad_(True) for parameter in parameters]
    found = [torch.autograd.grad(loss_of(made, leaves, example), leaves) for example in range(7)]
    return [torch.stack(column) for column in zip(*found, strict=True)]


def a_lora_s_gradients_are_each_example_s_own() -> None:
    for family in TARGETS:
        made, parameters = tuned_lora(family, torch.float64)
        expected = expected_gradients(made, parameters)
        task = made.task
        gradients = part("privacy.tuned_adapter").AdapterGradients(
            task, task.adapter.with_values(parameters), made.prompt_in_front(task)
        )
        found = gradients(task.reader.collate(task.examples), task.targets)
        assert [one.shape for one in found] == [other.shape for other in expected]
        # Llama's norms and OPT's attention compute in fp32, whatever the weights are.
        assert apart(found, expected) < (1e-12 if family == "roberta" else 1e-6)
    # A user's gradient is the sum over all of the user's examples.
    of_users, _ = tuned_lora("roberta", torch.float64, users=USERS)
    (found,) = of_users.gradients(parameters, [2, 0])
    for one, other in zip(found, expected, strict=True):
        for row, user in enumerate((2, 0)):
            total = sum(other[example] for example in range(7) if USERS[example] == user)
            torch.testing.assert_close(one[row], total, rtol=1e-9, atol=1e-13)


def lora_sum(made: Any, parameters: Sequence[torch.Tensor], units: list[int]) -> torch.Tensor:
    """Return the clipped sum of a step on some units, by the real micro-batches."""
    pieces = list(made.gradients(parameters, units))
    assert sum(len(piece[0]) for piece in pieces) == len(units)
    shapes = [parameter.shape for parameter in parameters]
    sums = noisy_sums(pieces, shapes, source=quiet_source(), max_grad_norm=NORM)
    return torch.cat([values.flatten() for values in sums])


def one_unit_moves_a_lora_by_the_norm_at_most() -> None:
    for family, dtype, users in (
        ("llama", torch.float32, ()),
        ("llama", torch.bfloat16, USERS),
        ("roberta", torch.float32, ()),
    ):
        made, parameters = tuned_lora(family, dtype, users=users)
        # At this size no example changes another, also in a model that is not causal.
        made = replace(made, sizes=dict.fromkeys(made.sizes, 4))
        units = list(range(len(made.units)))
        whole = lora_sum(made, parameters, units)
        assert torch.equal(lora_sum(made, parameters, units[::-1]), whole)
        for left_out in units:
            others = [unit for unit in units if unit != left_out]
            moved = float((whole - lora_sum(made, parameters, others)).norm()) / NORM
            assert 1 - 1e-5 <= moved <= 1 + 1e-6, f"unit {left_out} moves the sum by {moved:.7f} C"


def layers_that_mix_the_rows_of_examples_are_refused() -> None:
    """The MLP of OPT reads the tokens of all examples as one matrix."""
    from post_dist.errors import InputError

    with mock.patch.dict(TARGETS, {"opt": ("fc2",)}):
        made, parameters = tuned_lora("opt")
        refusal: Exception | None = None
        try:
            list(made.gradients(parameters, [0, 1]))
        except (InputError, RuntimeError) as error:
            refusal = error
    assert isinstance(refusal, InputError), "a LoRA took the rows of other examples"


def a_lora_changes_the_upper_layers() -> None:
    made, _ = tuned_lora()
    layers = made.task.adapter.layers
    assert {layer.split(".")[2] for layer in layers} == {"1", "2"}
    assert len(layers) == 2 * len(TARGETS["llama"])
    # It starts as the model without a LoRA, and `tune` twice starts from the same values.
    start = made.parameters()
    assert not any(factor.any() for factor in start[1::2])
    assert all(map(torch.equal, start, made.parameters()))
    assert all(factor.any() for factor in start[::2])


def layers_below_a_lora_run_once() -> None:
    types = {"llama": torch.bfloat16, "opt": torch.float32, "roberta": torch.float32}
    for family, dtype in types.items():
        made, parameters = tuned_lora(family, dtype)
        kept, _ = tuned_lora(family, dtype, epochs=3)
        assert made.below is None
        for units in (range(7), [6, 2], [3]):
            wanted = list(made.gradients(parameters, units))
            lowest = kept.task.model.layers[0]
            with mock.patch.object(lowest, "forward", side_effect=AssertionError("it ran again")):
                found = list(kept.gradients(parameters, units))
            for one, other in zip(wanted, found, strict=True):
                assert all(map(torch.equal, one, other)), f"{family}: other gradients"


def declared_numbers_decide_whether_lower_states_are_kept() -> None:
    module = part("privacy.lower_states")
    assert tuned_lora(epochs=1.9)[0].below is None
    assert tuned_lora(epochs=3, users=USERS)[0].below is None
    made, _ = tuned_lora(epochs=3)
    assert made.below is not None
    # 100 declared examples, of which the task has seven.
    of_all = 100 * (len(made.task.start_nd) + made.task.reader.longest) * made.task.model.width * 4
    for most, is_kept in ((of_all, True), (of_all - 1, False)):
        with mock.patch.object(module, "_MOST_BYTES", most):
            assert (tuned_lora(epochs=3)[0].below is not None) is is_kept


def a_lora_is_scored_as_evaluate_does() -> None:
    made, parameters = tuned_lora(dtype=torch.float64)
    parameters = [2 * parameter for parameter in parameters]
    task = made.task
    right = 0
    for example, target in enumerate(task.targets):
        # The loss of a class is its negative log-probability.
        losses = []
        for label in range(2):
            labeled = replace(task, targets=torch.full_like(task.targets, label))
            losses.append(float(loss_of(replace(made, task=labeled), parameters, example)))
        right += losses.index(min(losses)) == target
    plain = [torch.zeros_like(parameter) for parameter in parameters]
    with mock.patch.object(part("privacy.tuned_adapter"), "validation_task", lambda of, _: of):
        assert made.count_right(parameters) == right
        assert made.count_right(plain) != right, "the check cannot tell a LoRA from none"


def no_place_counts_for_a_lora() -> None:
    made, _ = tuned_lora()
    search = {"mean_trials": 2.0, "learning_rate": [1e-3]}
    plain = section_of(micro_batch_size_per_gpu=8)
    scored = section_of(micro_batch_size_per_gpu=8, search=search)
    compared = section_of(micro_batch_size_per_gpu=8, comparison_noise_multiplier=2.0)

    def chosen(section: Any, change: Change) -> set[int]:
        with changed_layer(made.task.model, change):
            return set(part("privacy.batch_sizes").independent_sizes(section, made.task).values())

    assert max(chosen(plain, torch.Tensor.clone)) > 4
    assert chosen(plain, mix_examples) == {1}, "examples change each other"
    # The products of a LoRA are so small here that some processors need smaller sizes anyway.
    for counting in (scored, compared):
        sizes = chosen(counting, round_the_last_score_differently)
        assert max(sizes) <= 4, "scores were not compared"
    assert max(chosen(plain, round_the_last_differently)) <= 4, "gradients were not compared"


CHECKS: list[Callable[[], None]] = [
    a_lora_s_gradients_are_each_example_s_own,
    one_unit_moves_a_lora_by_the_norm_at_most,
    layers_that_mix_the_rows_of_examples_are_refused,
    a_lora_changes_the_upper_layers,
    layers_below_a_lora_run_once,
    declared_numbers_decide_whether_lower_states_are_kept,
    a_lora_is_scored_as_evaluate_does,
    no_place_counts_for_a_lora,
]
