"""Checks of per-example gradients and of a trial's score, on small models."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import tiny
import torch
from privacy.checks import CPU, noisy_sums, part, quiet_source

from post_dist.runtime.distributed import World

MODELS = tempfile.TemporaryDirectory()
WORLD = World(0, 1, 0, "none", CPU)


@cache
def model_folder(family: str) -> Path:
    return tiny.write_model(Path(MODELS.name) / family, family, layers=3)


@cache
def tuning_task(family: str, dtype: torch.dtype = torch.float64, device: torch.device = CPU) -> Any:
    """Return a frozen tiny model with a task and seven examples."""
    from post_dist.artifacts.task import PromptTask
    from post_dist.data.task_reader import TaskReader
    from post_dist.models.load import load_tokenizer, load_whole
    from post_dist.models.tuning_task import TuningTask

    place = model_folder(family)
    model = load_whole(place, "fp32", device)
    model.model.to(dtype)
    task = PromptTask(
        template="{text} It was {mask}." if model.masked else "Review: {text} It was",
        label_words=(("bad",), ("good",)),
        max_length=48,
        allow_multi_token=False,
        init_text="",
    )
    reader = TaskReader(
        task, load_tokenizer(place), masked=model.masked, vocabulary=model.vocabulary_size
    )
    labeled = tiny.sentences(7, 5)
    labeled[3] = ("x", 1)
    generator = torch.Generator().manual_seed(1)
    return TuningTask(
        model=model,
        reader=reader,
        examples=reader.encode([text for text, _ in labeled]),
        targets=torch.tensor([label for _, label in labeled]),
        start_nd=torch.randn(6, model.width, dtype=torch.float64, generator=generator) * 0.3,
    )


def gradients_of(task: Any, parameters: Sequence[torch.Tensor], *, share: bool) -> Any:
    """Return the per-example gradients of a task at given parameters."""
    return part("privacy.gradients").ExampleGradients(
        task.model, task.reader.verbalizer, parameters, share_prefix=share
    )


def scores_of(task: Any, prompt_nd: torch.Tensor, example: int) -> torch.Tensor:
    """Return the class scores [1, C] of one example, which the model reads alone."""
    batch = task.reader.collate([task.examples[example]])
    logits = task.model(batch.input_ids, batch.attention_mask, prompt_nd, batch.answer)
    return task.reader.scores(logits)


def change_each_example(
    family: str, dtype: torch.dtype, device: torch.device, *, share: bool
) -> None:
    """Change examples one by one: the example's own gradient changes, and no bit of others."""
    task = tuning_task(family, dtype, device)
    parameters = [task.start_nd.float().to(device), torch.zeros(2, device=device)]
    gradients = gradients_of(task, parameters, share=share)
    batch = task.reader.collate(task.examples).to(device)
    targets = task.targets.to(device)
    before = gradients(batch, targets)
    for example in range(len(task.examples)):
        length = int(batch.attention_mask[example].sum())
        input_ids = batch.input_ids.clone()
        inside = slice(0, batch.answer[example]) if task.model.masked else slice(0, length)
        shape = input_ids[example, inside].shape
        input_ids[example, inside] = torch.randint(10, 200, shape, device=device)
        classes = targets.clone()
        classes[example] = 1 - classes[example]

        after = gradients(replace(batch, input_ids=input_ids), classes)
        others = [other for other in range(len(task.examples)) if other != example]
        assert not torch.equal(before[0][example], after[0][example])
        for one, other in zip(before, after, strict=True):
            assert torch.equal(one[others], other[others])


def example_gradients(
    family: str,
    *,
    share: bool,
    examples: Sequence[int] = range(7),
    dtype: torch.dtype = torch.float64,
    parameters: torch.dtype = torch.float64,
) -> list[torch.Tensor]:
    """Return the gradients of some examples in one batch."""
    task = tuning_task(family, dtype)
    values = [task.start_nd.to(parameters), torch.tensor([0.2, -0.1], dtype=parameters)]
    batch = task.reader.collate([task.examples[example] for example in examples])
    return gradients_of(task, values, share=share)(batch, task.targets[list(examples)])


def gradients_one_at_a_time(family: str) -> list[torch.Tensor]:
    """Return the same gradients as ordinary training has them: one example, one backward pass."""
    from post_dist.models.classifier import BIAS_SCALE

    task = tuning_task(family)
    of_prompt = []
    of_bias = []
    for example in range(7):
        prompt_nd = task.start_nd.clone().requires_grad_(True)
        bias_C = torch.tensor([0.2, -0.1], dtype=torch.float64, requires_grad=True)
        scores = scores_of(task, prompt_nd, example) + BIAS_SCALE * bias_C
        loss = torch.nn.functional.cross_entropy(scores, task.targets[example : example + 1])
        prompt_gradient, bias_gradient = torch.autograd.grad(loss, [prompt_nd, bias_C])
        of_prompt.append(prompt_gradient)
        of_bias.append(bias_gradient)
    return [torch.stack(of_prompt), torch.stack(of_bias)]


def apart(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> float:
    """Return the largest relative difference of an example's gradient."""
    largest = 0.0
    for a, b in zip(one, other, strict=True):
        difference_B = (a - b).flatten(1).norm(dim=1)
        norm_B = b.flatten(1).norm(dim=1).clamp(min=1e-300)
        largest = max(largest, float((difference_B / norm_B).max()))
    return largest


def gradients_are_each_example_s_own() -> None:
    alone = gradients_one_at_a_time("gpt2")
    for share in (False, True):
        together = example_gradients("gpt2", share=share)
        assert [tuple(gradient.shape) for gradient in together] == [(7, 6, 32), (7, 2)]
        assert apart(together, alone) < 1e-12


def step_sum(
    family: str, dtype: torch.dtype, examples: list[int], *, virtual_tokens: int
) -> torch.Tensor:
    """Return the clipped sum of one step on a tiny model, by the real micro-batches; C is 1e-3."""
    task = tuning_task(family, dtype)
    prompt_nd = task.start_nd.float().repeat(virtual_tokens // 6, 1)
    parameters = [prompt_nd, torch.tensor([0.2, -0.1])]
    gradients = part("privacy.gradients")
    sizes = part("privacy.micro_batches").planned_sizes(task, 4)
    pieces = list(gradients.unit_gradients(task, parameters, examples, sizes, CPU))
    counted = sum(len(piece[0]) for piece in pieces)
    assert counted == len(examples), "an example was dropped or taken twice"
    shapes = [parameter.shape for parameter in parameters]
    sums = noisy_sums(pieces, shapes, source=quiet_source(), max_grad_norm=1e-3)
    return torch.cat([total.flatten() for total in sums])


def one_example_moves_a_real_step_by_the_norm_at_most() -> None:
    examples = list(range(7))
    for family, dtype, tokens in (
        ("llama", torch.float32, 6),
        ("llama", torch.bfloat16, 30),
        ("roberta", torch.float32, 6),
    ):
        whole = step_sum(family, dtype, examples, virtual_tokens=tokens)
        backwards = step_sum(family, dtype, examples[::-1], virtual_tokens=tokens)
        assert torch.equal(backwards, whole)
        for left_out in examples:
            others = [example for example in examples if example != left_out]
            without = step_sum(family, dtype, others, virtual_tokens=tokens)
            moved = float((whole - without).norm()) / 1e-3
            message = f"{family}: example {left_out} moves the sum by {moved:.7f} C"
            assert 1 - 1e-5 <= moved <= 1 + 1e-6, message


Calls = dict[tuple[int, ...], set]
"""For each example, by its tokens, the model calls that it is in."""


@contextmanager
def watched_calls() -> Iterator[Calls]:
    """Record the model's calls: their shape, and whether attention gets a mask.

    Without one other kernels run.
    """
    from post_dist.models.language_model import LanguageModel

    calls: Calls = {}
    masked = set()
    forward = LanguageModel.forward
    attention = torch.nn.functional.scaled_dot_product_attention

    def watched_attention(
        *given: Any, attn_mask: torch.Tensor | None = None, **named: Any
    ) -> torch.Tensor:
        masked.add(attn_mask is not None)
        return attention(*given, attn_mask=attn_mask, **named)

    def watched_forward(
        self: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, *given: Any, **named: Any
    ) -> torch.Tensor:
        masked.clear()
        result = forward(self, input_ids, attention_mask, *given, **named)
        call = (tuple(input_ids.shape), frozenset(masked))
        for ids, mask in zip(input_ids, attention_mask, strict=True):
            tokens = tuple(ids[mask.bool()].tolist())
            calls.setdefault(tokens, set()).add(call)
        return result

    functional = torch.nn.functional
    with (
        mock.patch.object(LanguageModel, "forward", watched_forward),
        mock.patch.object(functional, "scaled_dot_product_attention", watched_attention),
    ):
        yield calls


@contextmanager
def attention_as_on_a_gpu(model: Any) -> Iterator[None]:
    before = model.model.config._attn_implementation
    model.model.set_attn_implementation("sdpa" if model.masked else "post_dist_sdpa")
    try:
        yield
    finally:
        model.model.set_attn_implementation(before)


def compute_gradients(task: Any, examples: list[int]) -> None:
    gradients = part("privacy.gradients")
    sizes = part("privacy.micro_batches").planned_sizes(task, 2)
    list(gradients.unit_gradients(task, [task.start_nd.float()], examples, sizes, CPU))


def compute_score(task: Any, examples: list[int]) -> None:
    encoded = [task.examples[example] for example in examples]
    chosen = replace(task, examples=encoded, targets=task.targets[examples])
    sizes = part("privacy.micro_batches").planned_sizes(task, 2)
    part("privacy.scoring").count_right(chosen, [task.start_nd.float()], sizes, WORLD)


def an_example_s_calls_are_its_own() -> None:
    # Some of these texts fill their micro-batch to its last token.
    repeats = (1, 2, 3, 4, 9, 10, 11, 12, 40, 50)
    texts = ["the film " * words + "is dull" for words in repeats]
    for family in ("llama", "roberta"):
        task = tuning_task(family, torch.float32)
        encoded = task.reader.encode(texts)
        task = replace(task, examples=encoded, targets=torch.arange(len(texts)) % 2)
        for compute in (compute_gradients, compute_score):
            with attention_as_on_a_gpu(task.model):
                with watched_calls() as whole:
                    compute(task, list(range(len(texts))))
                assert all(len(calls) == 1 for calls in whole.values())
                for example in range(len(texts)):
                    with watched_calls() as alone:
                        compute(task, [example])
                    for tokens, calls in alone.items():
                        message = f"{family}: {compute.__name__}: a call depends on other examples"
                        assert calls == whole[tokens], message


def classified_correctly(task: Any, parameters: list[torch.Tensor], example: int) -> bool:
    """Return whether an example that the model reads alone is classified correctly."""
    from post_dist.models.classifier import BIAS_SCALE

    scores = scores_of(task, parameters[0], example) + BIAS_SCALE * parameters[1]
    return bool(scores.argmax() == task.targets[example])


def a_score_counts_each_example_once() -> None:
    task = tuning_task("llama", torch.float32)
    count_right = part("privacy.scoring").count_right
    parameters = [task.start_nd.float(), torch.tensor([0.2, -0.1])]
    sizes = part("privacy.micro_batches").planned_sizes(task, 4)
    right = [classified_correctly(task, parameters, example) for example in range(7)]
    for examples in ([0], [0, 1, 2], list(range(7))):
        encoded = [task.examples[example] for example in examples]
        chosen = replace(task, examples=encoded, targets=task.targets[examples])
        expected = sum(right[example] for example in examples)
        assert count_right(chosen, parameters, sizes, WORLD) == expected
        # With the other class of two as the target, exactly the other examples are right.
        flipped = replace(chosen, targets=1 - chosen.targets)
        assert count_right(flipped, parameters, sizes, WORLD) == len(examples) - expected


Change = Callable[[torch.Tensor], torch.Tensor]
"""Function that changes the output of a layer for all examples of a batch."""


@contextmanager
def changed_layer(model: Any, change: Change) -> Iterator[None]:
    """Change the output of one layer, also in copies of the model."""
    hook = model.layers[0].mlp.register_forward_hook(lambda module, given, out: change(out))
    try:
        yield
    finally:
        hook.remove()


def mix_examples(out: torch.Tensor) -> torch.Tensor:
    return out - 0.1 * out.mean(dim=0, keepdim=True)


def round_the_last_differently(out: torch.Tensor) -> torch.Tensor:
    """Change the last place of large batches by a rounding error, as some kernels do."""
    if len(out) <= 4 or not out.requires_grad:
        return out
    return torch.cat([out[:-1], out[-1:] * (1 + 2.0**-23)])


def round_the_last_score_differently(out: torch.Tensor) -> torch.Tensor:
    if len(out) <= 4 or torch.is_grad_enabled():
        return out
    return torch.cat([out[:-1], out[-1:] * (1 + 2.0**-23)])


def no_place_in_a_micro_batch_counts() -> None:
    from post_dist.config.schema import Tune
    from post_dist.data.task_reader import TaskReader

    sizes = part("privacy.batch_sizes")
    task = tuning_task("llama", torch.float32)
    short = replace(task.reader.task, max_length=16)
    task = replace(
        task, reader=TaskReader(short, task.reader.tokenizer, masked=False, vocabulary=600)
    )
    plain = {"micro_batch_size_per_gpu": 12, "num_virtual_tokens": 6}
    search = {"search": {"mean_trials": 2, "learning_rate": [0.1]}}
    comparison = {"comparison_noise_multiplier": 2}

    def chosen(change: Change, **more: Any) -> dict[int, int]:
        with changed_layer(task.model, change):
            return sizes.independent_sizes(Tune.model_validate(plain | more), task)

    planned = {16: 12}
    fours = {16: 4}
    assert chosen(torch.Tensor.clone) == planned
    assert chosen(mix_examples) == {16: 1}, "examples change each other"
    assert chosen(round_the_last_differently) == fours, "a last bit was not noticed"
    assert chosen(round_the_last_score_differently) == planned
    for counting in (search, comparison):
        found = chosen(round_the_last_score_differently, **counting)
        assert found == fours, "a score's bit differs"

    # Rounding changes no zero, so a student of zeros shows no difference with made-up texts.
    weight = task.model.layers[0].mlp.down_proj.weight
    kept = weight.detach().clone()
    weight.data.zero_()
    try:
        found = chosen(round_the_last_differently)
    finally:
        weight.data.copy_(kept)
    assert found == fours, "weights that show no rounding hid a difference"

    passes = iter(range(10_000))
    try:
        chosen(lambda out: out * (1 + 1e-6 * next(passes)))
    except part("errors").InputError:
        return
    raise AssertionError("a model that remembers examples was accepted")


CHECKS: list[Callable[[], None]] = [
    no_place_in_a_micro_batch_counts,
    gradients_are_each_example_s_own,
    one_example_moves_a_real_step_by_the_norm_at_most,
    an_example_s_calls_are_its_own,
    a_score_counts_each_example_once,
]
