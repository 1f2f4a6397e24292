"""What must hold of each row's gradient and of a trial's score, on small models: checks like those of `checks.py`, used in the same way."""

import tempfile
from collections.abc import Callable, Sequence
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


@cache
def model_folder(family: str) -> Path:
    return tiny.write_model(Path(MODELS.name) / family, family, layers=3)


@cache
def material(family: str, dtype: torch.dtype = torch.float64, device: torch.device = CPU) -> Any:
    """A frozen tiny model, a template, a verbalizer, rows and their classes."""
    from post_dist.data.template import Template
    from post_dist.data.verbalizer import Verbalizer
    from post_dist.models.load import load_tokenizer, load_whole
    from post_dist.models.tuning_task import TuningTask

    folder = model_folder(family)
    tokenizer, model = load_tokenizer(folder), load_whole(folder, "fp32", device)
    model.model.to(dtype)
    template = Template(
        "{text} It was {mask}." if model.masked else "Review: {text} It was",
        tokenizer,
        48,
        masked=model.masked,
    )
    examples = tiny.sentences(7, 5)
    examples[3] = ("x", 1)
    return TuningTask(
        model=model,
        template=template,
        verbalizer=Verbalizer((("bad",), ("good",)), tokenizer, allow_multi_token=False),
        rows=template.encode([text for text, _ in examples]),
        wanted=torch.tensor([label for _, label in examples]),
        start_nd=torch.randn(
            6, model.width, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
        )
        * 0.3,
    )


def change_each_example(
    family: str, dtype: torch.dtype, device: torch.device, *, share: bool
) -> None:
    """Change the examples of a batch one by one: its own gradient changes, and no bit of another's."""
    made = material(family, dtype, device)
    parameters = [made.start_nd.float().to(device), torch.zeros(2, device=device)]
    gradients = part("privacy.gradients").ExampleGradients(
        made.model, made.verbalizer, parameters, share_prefix=share
    )
    batch, wanted = made.template.collate(made.rows).to(device), made.wanted.to(device)
    before = gradients(batch, wanted)
    for row in range(len(made.rows)):
        length = int(batch.attention_mask[row].sum())
        input_ids, classes = batch.input_ids.clone(), wanted.clone()
        inside = slice(0, batch.answer[row]) if made.model.masked else slice(0, length)
        input_ids[row, inside] = torch.randint(10, 200, input_ids[row, inside].shape, device=device)
        classes[row] = 1 - classes[row]
        after = gradients(replace(batch, input_ids=input_ids), classes)
        others = [other for other in range(len(made.rows)) if other != row]
        assert not torch.equal(before[0][row], after[0][row])
        assert all(
            torch.equal(one[others], other[others])
            for one, other in zip(before, after, strict=True)
        )


def example_gradients(
    family: str,
    *,
    share: bool,
    rows: Sequence[int] = range(7),
    dtype: torch.dtype = torch.float64,
    parameters: torch.dtype = torch.float64,
) -> list[torch.Tensor]:
    made = material(family, dtype)
    values = [made.start_nd.to(parameters), torch.tensor([0.2, -0.1], dtype=parameters)]
    gradients = part("privacy.gradients").ExampleGradients(
        made.model, made.verbalizer, values, share_prefix=share
    )
    return gradients(
        made.template.collate([made.rows[row] for row in rows]), made.wanted[list(rows)]
    )


def gradients_one_at_a_time(family: str) -> list[torch.Tensor]:
    """The same by ordinary training's way: one example, one backward pass."""
    from post_dist.models.classifier import BIAS_SCALE

    made, found = material(family), []
    for row in range(7):
        prompt_nd = made.start_nd.clone().requires_grad_(True)
        bias_C = torch.tensor([0.2, -0.1], dtype=torch.float64, requires_grad=True)
        batch = made.template.collate([made.rows[row]])
        scores = made.verbalizer.scores(
            made.model(batch.input_ids, batch.attention_mask, prompt_nd, batch.answer)
        )
        loss = torch.nn.functional.cross_entropy(
            scores + BIAS_SCALE * bias_C, made.wanted[row : row + 1]
        )
        found.append(torch.autograd.grad(loss, [prompt_nd, bias_C]))
    return [torch.stack(parts) for parts in zip(*found, strict=True)]


def apart(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> float:
    """Largest relative difference of an example's gradient."""
    return max(
        float(((a - b).flatten(1).norm(dim=1) / b.flatten(1).norm(dim=1).clamp(min=1e-300)).max())
        for a, b in zip(one, other, strict=True)
    )


def gradients_are_each_example_s_own() -> None:
    alone = gradients_one_at_a_time("gpt2")
    for share in (False, True):
        together = example_gradients("gpt2", share=share)
        assert [tuple(part.shape) for part in together] == [(7, 6, 32), (7, 2)]
        assert apart(together, alone) < 1e-12


def stage_sum(
    family: str, dtype: torch.dtype, rows: list[int], *, virtual_tokens: int
) -> torch.Tensor:
    """The clipped sum of one step over some rows of a real (tiny) model, by the stage's own micro-batches; C is 1e-3."""
    from post_dist.config.schema import Tune

    made = material(family, dtype)
    parameters = [made.start_nd.float().repeat(virtual_tokens // 6, 1), torch.tensor([0.2, -0.1])]
    section = Tune(micro_batch_size_per_gpu=4)
    pieces = list(part("privacy.trainer").micro_gradients(section, made, parameters, rows, CPU))
    assert sum(len(piece[0]) for piece in pieces) == len(rows), "a row was dropped or taken twice"
    sums = noisy_sums(
        pieces,
        [parameter.shape for parameter in parameters],
        source=quiet_source(),
        max_grad_norm=1e-3,
    )
    return torch.cat([total.flatten() for total in sums])


def one_row_moves_a_real_step_by_the_norm_at_most() -> None:
    rows = list(range(7))
    for family, dtype, tokens in (
        ("llama", torch.float32, 6),
        ("llama", torch.bfloat16, 30),
        ("roberta", torch.float32, 6),
    ):
        whole = stage_sum(family, dtype, rows, virtual_tokens=tokens)
        assert torch.equal(stage_sum(family, dtype, rows[::-1], virtual_tokens=tokens), whole)
        for left_out in rows:
            moved = float(
                (
                    whole
                    - stage_sum(
                        family,
                        dtype,
                        [row for row in rows if row != left_out],
                        virtual_tokens=tokens,
                    )
                ).norm()
            )
            assert 1e-3 * (1 - 1e-5) <= moved <= 1e-3 * (1 + 1e-6), (
                f"{family}: row {left_out} moves the sum by {moved / 1e-3:.7f} C"
            )


def calls_of(
    rows: list[int], made: Any, work: Callable[[Any, list[torch.Tensor], list[int]], object]
) -> dict[tuple[int, ...], set]:
    """For each row, by its tokens, the model's calls that it is in while gradients or a score are worked out.

    A call is told by its shape, and by whether attention is given a mask: without one other kernels run.
    """
    from post_dist.models.language_model import LanguageModel

    calls, forward, attention, masked = (
        {},
        LanguageModel.forward,
        torch.nn.functional.scaled_dot_product_attention,
        set(),
    )

    def attend(*given: Any, attn_mask: torch.Tensor | None = None, **named: Any) -> torch.Tensor:
        masked.add(attn_mask is not None)
        return attention(*given, attn_mask=attn_mask, **named)

    def watched(
        self: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, *given: Any, **named: Any
    ) -> torch.Tensor:
        masked.clear()
        made = forward(self, input_ids, attention_mask, *given, **named)
        for ids, mask in zip(input_ids, attention_mask, strict=True):
            calls.setdefault(tuple(ids[mask.bool()].tolist()), set()).add(
                (tuple(input_ids.shape), frozenset(masked))
            )
        return made

    with (
        mock.patch.object(LanguageModel, "forward", watched),
        mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", attend),
    ):
        work(made, [made.start_nd.float()], rows)
    return calls


def a_row_s_calls_are_its_own() -> None:
    from post_dist.config.schema import Tune

    tuning, section, world = (
        part("privacy.trainer"),
        Tune(micro_batch_size_per_gpu=2),
        World(0, 1, 0, "none", CPU),
    )

    def gradients(made: Any, parameters: list[torch.Tensor], rows: list[int]) -> None:
        list(tuning.micro_gradients(section, made, parameters, rows, CPU))

    def score(made: Any, parameters: list[torch.Tensor], rows: list[int]) -> None:
        tuning.count_right(
            section,
            replace(made, rows=[made.rows[row] for row in rows], wanted=made.wanted[rows]),
            parameters,
            world,
        )

    for family in ("llama", "roberta"):
        made = material(family, torch.float32)
        texts = [
            "the film " * words + "is dull" for words in (1, 2, 3, 4, 9, 10, 11, 12, 40, 50)
        ]  # some fill their micro-batch
        made = replace(made, rows=made.template.encode(texts), wanted=torch.arange(len(texts)) % 2)
        before = made.model.model.config._attn_implementation
        made.model.model.set_attn_implementation(
            "sdpa" if made.model.masked else "post_dist_sdpa"
        )  # as on a GPU
        try:
            for work in (gradients, score):
                whole = calls_of(list(range(len(texts))), made, work)
                assert all(len(calls) == 1 for calls in whole.values())
                for row in range(len(texts)):
                    for tokens, calls in calls_of([row], made, work).items():
                        assert calls == whole[tokens], (
                            f"{family}: {work.__name__}: a row's call depends on the rows beside it"
                        )
        finally:
            made.model.model.set_attn_implementation(before)


def made_right(made: Any, parameters: list[torch.Tensor], row: int) -> bool:
    """Whether a row that is asked alone comes out as it should."""
    from post_dist.models.classifier import BIAS_SCALE

    batch = made.template.collate([made.rows[row]])
    scores = made.verbalizer.scores(
        made.model(batch.input_ids, batch.attention_mask, parameters[0], batch.answer)
    )
    return bool((scores + BIAS_SCALE * parameters[1]).argmax() == made.wanted[row])


def a_score_counts_each_row_once() -> None:
    from post_dist.config.schema import Tune

    made, tuning, world = (
        material("llama", torch.float32),
        part("privacy.trainer"),
        World(0, 1, 0, "none", CPU),
    )
    parameters, section = (
        [made.start_nd.float(), torch.tensor([0.2, -0.1])],
        Tune(micro_batch_size_per_gpu=4),
    )
    right = [made_right(made, parameters, row) for row in range(7)]
    for rows in ([0], [0, 1, 2], list(range(7))):
        for wanted in (made.wanted, 1 - made.wanted):
            chosen = replace(made, rows=[made.rows[row] for row in rows], wanted=wanted[rows])
            expected = sum(right[row] == bool(wanted[row] == made.wanted[row]) for row in rows)
            assert tuning.count_right(section, chosen, parameters, world) == expected


CHECKS: list[Callable[[], None]] = [
    gradients_are_each_example_s_own,
    one_row_moves_a_real_step_by_the_norm_at_most,
    a_row_s_calls_are_its_own,
    a_score_counts_each_row_once,
]
