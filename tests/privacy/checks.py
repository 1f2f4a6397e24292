"""What must hold of the private mechanism, each as a function that raises AssertionError when it does not.

`test_mechanism.py` runs them on the package as it is, `test_mutants.py` on the package with a planted bug. So they reach every
part through its module at the time of the call.
"""

import json
import secrets
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import tiny
import torch
from scipy import stats

from post_dist.runtime.distributed import World

CPU = torch.device("cpu")
SMALL_CHANCE = 1e-6
"""A test of randomness fails by chance this often."""


def part(name: str) -> ModuleType:
    return import_module(f"post_dist.{name}")


def plan_of(**changes: Any) -> Any:
    fields = {
        "noise_multiplier": 0.7,
        "sampling_probability": 0.2,
        "steps": 6,
        "max_grad_norm": 0.3,
        "delta": 1e-5,
        "expected_batch_size": 64.0,
    }
    return part("privacy.plan").PrivacyPlan(**(fields | changes))


def fresh_source(name: str = "run") -> Any:
    return part("privacy.randomness").RandomSource(name, secrets.token_bytes(32))


def quiet_source() -> Any:
    """A source whose noise is zero, to look at the sum alone."""
    kind = part("privacy.randomness").RandomSource

    class Quiet(kind):
        def normal(self, count: int, *purpose: object) -> np.ndarray:
            return np.zeros(count)

    return Quiet("run", secrets.token_bytes(32))


@contextmanager
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as path:
        yield Path(path)


def noisy_sums(micro_batches: Sequence[Sequence[torch.Tensor]], shapes: Sequence[tuple], *, source: Any, step: int = 0, **plan: Any) -> Any:
    """What the optimizer is handed after one step over micro-batches, times the divisor: the noisy sums, in fp64."""
    parameters = [torch.zeros(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    made = plan_of(**plan)
    optimizer = part("privacy.mechanism").PrivateOptimizer(torch.optim.SGD(parameters, lr=1.0), made, source)
    for gradients in micro_batches:
        optimizer.accumulate(gradients)
    optimizer.finish(step, lambda commitment: None)
    return [-parameter.detach() * made.expected_batch_size for parameter in parameters]


# ---------------------------------------------------------------------------------------------------------------- noise


def noise_is_normal_with_the_planned_deviation() -> None:
    size = 76_800
    micro_batches = [[torch.zeros(5, size)], [torch.zeros(0, size)], [torch.zeros(3, size)]]
    source = fresh_source()
    steps = [noisy_sums(micro_batches, [(size,)], source=source, step=step)[0].numpy() for step in range(3)]
    wanted = 0.7 * 0.3
    for noise in steps:
        assert abs(noise.std() / wanted - 1) < 0.01
        assert stats.kstest(noise / wanted, "norm").pvalue > SMALL_CHANCE
        assert abs(stats.kurtosis(noise)) < 6 * (24 / size) ** 0.5, "the tails are not normal"
        assert abs(np.corrcoef(noise[1:], noise[:-1])[0, 1]) < 6 / size**0.5, "neighbouring coordinates share noise"
    for one, other in ((0, 1), (1, 2), (0, 2)):
        assert abs(np.corrcoef(steps[one], steps[other])[0, 1]) < 6 / size**0.5, "two steps share noise"


def noise_is_never_used_on_another_gradient() -> None:
    source, size = fresh_source(), 20_000
    gradient = torch.zeros(1, size)
    first = noisy_sums([[gradient]], [(size,)], source=source)[0].numpy()
    again = noisy_sums([[gradient]], [(size,)], source=source)[0].numpy()
    assert np.array_equal(first, again), "the same step on the same sum must repeat its noise"
    gradient[0, 0] = 0.2
    other = noisy_sums([[gradient]], [(size,)], source=source)[0].numpy()
    assert abs(np.corrcoef(first[1:], other[1:])[0, 1]) < 6 / size**0.5, "another sum got the same noise"


def keys_come_from_the_operating_system_and_go() -> None:
    randomness = part("privacy.randomness")
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{number}.json" for number in range(3)]
        with mock.patch.object(randomness.secrets, "token_bytes", wraps=secrets.token_bytes) as entropy:
            sources = [randomness.open_source(path, "system", 0) for path in paths]
            assert entropy.mock_calls.count(mock.call(32)) == 3
        assert len({source.key for source in sources}) == 3
        assert all(len(source.key) == 32 and path.stat().st_mode & 0o77 == 0 for source, path in zip(sources, paths, strict=True))
        assert randomness.open_source(paths[0], "system", 0) == sources[0], "a run that goes on keeps its key"
        randomness.destroy_key(paths[0], sources[0])
        assert sources[0].key.hex() not in paths[0].read_text()
        assert randomness.open_source(paths[0], "system", 0).run == sources[0].run


# ------------------------------------------------------------------------------------------------------- clip and sum


def hard_examples() -> torch.Tensor:
    """Per-example gradients [B, 40] made to break a clip: huge, tiny, equal, not finite, at the norm, just above it."""
    rows = torch.randn(12, 40, generator=torch.Generator().manual_seed(0))
    rows[0] = 1e30
    rows[1] = 3e38
    rows[2, 5] = float("nan")
    rows[3, 7] = float("inf")
    rows[4] = 1e-42
    rows[5] = rows[6]
    rows[7] *= 0.3 / rows[7].norm()
    rows[8] *= 0.3 * (1 + 1e-6) / rows[8].norm()
    rows[9] = 0
    rows[10] *= -1e4
    return rows


def total_of(rows: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    """The sum over rows cut into micro-batches of the sizes, with two parameters of 30 and 10 values."""
    micro_batches = [[chunk[:, :30].reshape(-1, 5, 6), chunk[:, 30:]] for chunk in rows.split(list(sizes))]
    sums = noisy_sums(micro_batches, [(5, 6), (10,)], source=quiet_source())
    return torch.cat([total.flatten() for total in sums])


def one_example_moves_the_sum_by_the_norm_at_most() -> None:
    rows = hard_examples()
    whole = total_of(rows, [12])
    assert torch.isfinite(whole).all()
    for left_out in range(12):
        without = torch.cat([rows[:left_out], rows[left_out + 1 :]])
        for sizes in ([11], [1] * 11, [4, 7], [10, 1]):
            moved = float((whole - total_of(without, sizes)).norm())
            assert moved <= 0.3 * (1 + 1e-6), f"example {left_out} moves the sum by {moved / 0.3:.3g} C"


def the_sum_does_not_depend_on_split_or_order() -> None:
    rows = hard_examples()
    whole = total_of(rows, [12])
    for sizes in ([1] * 12, [11, 1], [5, 7]):
        assert torch.equal(total_of(rows, sizes), whole)
    assert torch.equal(total_of(rows.flip(0), [3, 9]), whole)


def the_sum_is_the_sum_of_clipped_gradients() -> None:
    rows = hard_examples().double()
    finite = rows[rows.isfinite().all(dim=1)]
    wanted = sum(row * min(1.0, 0.3 / max(float(row.norm()), 1e-300)) for row in finite)
    torch.testing.assert_close(total_of(rows, [5, 7]), wanted, rtol=1e-6, atol=1e-6)


def nothing_realised_shows_in_the_mean() -> None:
    one, many = (noisy_sums([[torch.full((rows, 4), 0.01)]], [(4,)], source=quiet_source())[0] for rows in (1, 10))
    torch.testing.assert_close(many, 10 * one, rtol=1e-6, atol=0)


# ------------------------------------------------------------------------------------------------------------- sampling


def rows_are_sampled_by_poisson() -> None:
    sampling, source, total, steps = part("privacy.sampling"), fresh_source(), 300, 2000
    plan = plan_of(sampling_probability=0.1)
    drawn = np.zeros((steps, total), dtype=bool)
    for step in range(steps):
        drawn[step, sampling.poisson_rows(plan, source, total, 0, step)] = True
    counts, variance = drawn.sum(axis=0), steps * 0.1 * 0.9
    chi = ((counts - steps * 0.1) ** 2 / variance).sum()
    assert stats.chi2.sf(chi, total) > SMALL_CHANCE, "rows are not drawn equally often with probability q"
    assert stats.chi2.cdf(chi, total) > SMALL_CHANCE, "rows are drawn more evenly than chance would"
    sizes = drawn.sum(axis=1)
    spread = (steps - 1) * sizes.var(ddof=1) / (total * 0.1 * 0.9)
    assert SMALL_CHANCE < stats.chi2.sf(spread, steps - 1) < 1 - SMALL_CHANCE, "batch sizes do not vary as a binomial"
    together = drawn[:, :-1] & drawn[:, 1:]
    pairs = stats.binomtest(int(together.sum()), together.size, 0.01).pvalue
    assert pairs > SMALL_CHANCE, "two rows are not drawn independently"
    assert abs(np.corrcoef(drawn[:-1].ravel(), drawn[1:].ravel())[0, 1]) < 6 / drawn.size**0.5, "steps share their rows"


def everything_is_drawn_at_probability_one() -> None:
    assert part("privacy.sampling").poisson_rows(plan_of(sampling_probability=1.0), fresh_source(), 50, 0, 0) == list(range(50))


# ------------------------------------------------------------------------------------------------------------ gradients


MODELS = tempfile.TemporaryDirectory()


@cache
def model_folder(family: str) -> Path:
    return tiny.write_model(Path(MODELS.name) / family, family, layers=3)


@cache
def material(family: str, dtype: torch.dtype = torch.float64, device: torch.device = CPU) -> Any:
    """A frozen tiny model, a template, a verbalizer, rows and their classes."""
    from post_dist.data.template import Template, Verbalizer
    from post_dist.models.load import load_tokenizer, load_whole
    from post_dist.stages.material import Material

    folder = model_folder(family)
    tokenizer, model = load_tokenizer(folder), load_whole(folder, "fp32", device)
    model.model.to(dtype)
    template = Template("{text} It was {mask}." if model.masked else "Review: {text} It was", tokenizer, 48, masked=model.masked)
    examples = tiny.sentences(7, 5)
    examples[3] = ("x", 1)
    return Material(
        model=model,
        template=template,
        verbalizer=Verbalizer((("bad",), ("good",)), tokenizer, allow_multi_token=False),
        rows=template.encode([text for text, _ in examples]),
        wanted=torch.tensor([label for _, label in examples]),
        start_nd=torch.randn(6, model.width, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 0.3,
    )


def change_each_example(family: str, dtype: torch.dtype, device: torch.device, *, share: bool) -> None:
    """Change the examples of a batch one by one: its own gradient changes, and no bit of another's."""
    made = material(family, dtype, device)
    parameters = [made.start_nd.float().to(device), torch.zeros(2, device=device)]
    gradients = part("privacy.gradients").ExampleGradients(made.model, made.verbalizer, parameters, share_prefix=share)
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
        assert all(torch.equal(one[others], other[others]) for one, other in zip(before, after, strict=True))


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
    gradients = part("privacy.gradients").ExampleGradients(made.model, made.verbalizer, values, share_prefix=share)
    return gradients(made.template.collate([made.rows[row] for row in rows]), made.wanted[list(rows)])


def gradients_one_at_a_time(family: str) -> list[torch.Tensor]:
    """The same by ordinary training's way: one example, one backward pass."""
    from post_dist.models.classifier import BIAS_SCALE

    made, found = material(family), []
    for row in range(7):
        prompt_nd = made.start_nd.clone().requires_grad_(True)
        bias_C = torch.tensor([0.2, -0.1], dtype=torch.float64, requires_grad=True)
        batch = made.template.collate([made.rows[row]])
        scores = made.verbalizer.scores(made.model(batch.input_ids, batch.attention_mask, prompt_nd, batch.answer))
        loss = torch.nn.functional.cross_entropy(scores + BIAS_SCALE * bias_C, made.wanted[row : row + 1])
        found.append(torch.autograd.grad(loss, [prompt_nd, bias_C]))
    return [torch.stack(parts) for parts in zip(*found, strict=True)]


def apart(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> float:
    """Largest relative difference of an example's gradient."""
    return max(
        float(((a - b).flatten(1).norm(dim=1) / b.flatten(1).norm(dim=1).clamp(min=1e-300)).max()) for a, b in zip(one, other, strict=True)
    )


def gradients_are_each_example_s_own() -> None:
    alone = gradients_one_at_a_time("gpt2")
    for share in (False, True):
        together = example_gradients("gpt2", share=share)
        assert [tuple(part.shape) for part in together] == [(7, 6, 32), (7, 2)]
        assert apart(together, alone) < 1e-12


def stage_sum(family: str, dtype: torch.dtype, rows: list[int], *, virtual_tokens: int) -> torch.Tensor:
    """The clipped sum of one step over some rows of a real (tiny) model, by the stage's own micro-batches; C is 1e-3."""
    from post_dist.config.schema import Tune

    made = material(family, dtype)
    parameters = [made.start_nd.float().repeat(virtual_tokens // 6, 1), torch.tensor([0.2, -0.1])]
    section = Tune(micro_batch_size_per_gpu=4)
    pieces = list(part("stages.private_tuning").micro_gradients(section, made, parameters, rows, CPU))
    assert sum(len(piece[0]) for piece in pieces) == len(rows), "a row was dropped or taken twice"
    sums = noisy_sums(pieces, [parameter.shape for parameter in parameters], source=quiet_source(), max_grad_norm=1e-3)
    return torch.cat([total.flatten() for total in sums])


def one_row_moves_a_real_step_by_the_norm_at_most() -> None:
    rows = list(range(7))
    for family, dtype, tokens in (("llama", torch.float32, 6), ("llama", torch.bfloat16, 30), ("roberta", torch.float32, 6)):
        whole = stage_sum(family, dtype, rows, virtual_tokens=tokens)
        assert torch.equal(stage_sum(family, dtype, rows[::-1], virtual_tokens=tokens), whole)
        for left_out in rows:
            moved = float((whole - stage_sum(family, dtype, [row for row in rows if row != left_out], virtual_tokens=tokens)).norm())
            assert 1e-3 * (1 - 1e-5) <= moved <= 1e-3 * (1 + 1e-6), f"{family}: row {left_out} moves the sum by {moved / 1e-3:.7f} C"


def calls_of(rows: list[int], made: Any, work: Callable[[Any, list[torch.Tensor], list[int]], object]) -> dict[tuple[int, ...], set]:
    """For each row, by its tokens, the model's calls that it is in while gradients or a score are worked out.

    A call is told by its shape, and by whether attention is given a mask: without one other kernels run.
    """
    from post_dist.models.language_model import LanguageModel

    calls, forward, attention, masked = {}, LanguageModel.forward, torch.nn.functional.scaled_dot_product_attention, set()

    def attend(*given: Any, attn_mask: torch.Tensor | None = None, **named: Any) -> torch.Tensor:
        masked.add(attn_mask is not None)
        return attention(*given, attn_mask=attn_mask, **named)

    def watched(self: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, *given: Any, **named: Any) -> torch.Tensor:
        masked.clear()
        made = forward(self, input_ids, attention_mask, *given, **named)
        for ids, mask in zip(input_ids, attention_mask, strict=True):
            calls.setdefault(tuple(ids[mask.bool()].tolist()), set()).add((tuple(input_ids.shape), frozenset(masked)))
        return made

    with (
        mock.patch.object(LanguageModel, "forward", watched),
        mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", attend),
    ):
        work(made, [made.start_nd.float()], rows)
    return calls


def a_row_s_calls_are_its_own() -> None:
    from post_dist.config.schema import Tune

    tuning, section, world = part("stages.private_tuning"), Tune(micro_batch_size_per_gpu=2), World(0, 1, 0, "none", CPU)

    def gradients(made: Any, parameters: list[torch.Tensor], rows: list[int]) -> None:
        list(tuning.micro_gradients(section, made, parameters, rows, CPU))

    def score(made: Any, parameters: list[torch.Tensor], rows: list[int]) -> None:
        tuning.count_right(section, replace(made, rows=[made.rows[row] for row in rows], wanted=made.wanted[rows]), parameters, world)

    for family in ("llama", "roberta"):
        made = material(family, torch.float32)
        texts = ["the film " * words + "is dull" for words in (1, 2, 3, 4, 9, 10, 11, 12, 40, 50)]  # some fill their micro-batch
        made = replace(made, rows=made.template.encode(texts), wanted=torch.arange(len(texts)) % 2)
        before = made.model.model.config._attn_implementation
        made.model.model.set_attn_implementation("sdpa" if made.model.masked else "post_dist_sdpa")  # as on a GPU
        try:
            for work in (gradients, score):
                whole = calls_of(list(range(len(texts))), made, work)
                assert all(len(calls) == 1 for calls in whole.values())
                for row in range(len(texts)):
                    for tokens, calls in calls_of([row], made, work).items():
                        assert calls == whole[tokens], f"{family}: {work.__name__}: a row's call depends on the rows beside it"
        finally:
            made.model.model.set_attn_implementation(before)


def made_right(made: Any, parameters: list[torch.Tensor], row: int) -> bool:
    """Whether a row that is asked alone comes out as it should."""
    from post_dist.models.classifier import BIAS_SCALE

    batch = made.template.collate([made.rows[row]])
    scores = made.verbalizer.scores(made.model(batch.input_ids, batch.attention_mask, parameters[0], batch.answer))
    return bool((scores + BIAS_SCALE * parameters[1]).argmax() == made.wanted[row])


def a_score_counts_each_row_once() -> None:
    from post_dist.config.schema import Tune

    made, tuning, world = material("llama", torch.float32), part("stages.private_tuning"), World(0, 1, 0, "none", CPU)
    parameters, section = [made.start_nd.float(), torch.tensor([0.2, -0.1])], Tune(micro_batch_size_per_gpu=4)
    right = [made_right(made, parameters, row) for row in range(7)]
    for rows in ([0], [0, 1, 2], list(range(7))):
        for wanted in (made.wanted, 1 - made.wanted):
            chosen = replace(made, rows=[made.rows[row] for row in rows], wanted=wanted[rows])
            expected = sum(right[row] == bool(wanted[row] == made.wanted[row]) for row in rows)
            assert tuning.count_right(section, chosen, parameters, world) == expected


# --------------------------------------------------------------------------------------------------- search and splits


def searches_stop_at_random_and_score_with_noise() -> None:
    search, plan = part("privacy.search"), plan_of(mean_trials=5.0, score_noise_multiplier=10.0)
    counts = np.array([search.number_of_trials(plan, fresh_source()) for _ in range(4000)])
    p = search.logarithmic_parameter(5.0)
    known = np.arange(1, 15)
    wanted = stats.logser(p).pmf(known)
    seen = np.array([(counts == k).sum() for k in known])
    rest = [len(counts) - seen.sum(), 1 - wanted.sum()]
    chance = stats.chisquare([*seen, rest[0]], len(counts) * np.array([*wanted, rest[1]])).pvalue
    assert chance > SMALL_CHANCE, "the number of trials is not logarithmic"

    from post_dist.config.schema import Tune

    section = Tune.model_validate({"search": {"mean_trials": 5, "learning_rate": [0.1, 0.2]}})
    scores = []
    with folder() as place:
        for number in range(300):
            source, tried = fresh_source(), place / str(number)
            with mock.patch.object(search, "number_of_trials", return_value=1):
                search.run_search(section, 0.1, plan, source, tried, lambda *given: [torch.zeros(1)], lambda tuned: 100)
            scores.append(float(search.load_tensors(tried / "search", 1)["score"]))
    assert abs(np.mean(scores) - 100) < 6 * 10 / 300**0.5
    assert 0.8 < np.std(scores) / 10 < 1.2, "the score's noise is not the planned one"


def one_row_of_the_file_is_one_example_at_most() -> None:
    import pyarrow
    from pyarrow import parquet

    from post_dist.config.sources import Task

    load = part("data.tasks").load_examples
    task = {
        "name": "t",
        "visibility": "private",
        "template": "{text} x",
        "text": "{age} {note}",
        "label_column": "label",
        "labels": {0: ["bad"], 1: ["good"]},
        "test_share": 0,
        "validation_share": 0,
    }

    def json_lines(path: Path, rows: list[tuple[Any, ...]]) -> None:
        path.write_text("".join(json.dumps(dict(zip(("age", "note", "label"), row, strict=True))) + "\n" for row in rows))

    def whole_numbers(path: Path, rows: list[tuple[Any, ...]]) -> None:
        parquet.write_table(pyarrow.table(dict(zip(("age", "note", "label"), zip(*rows, strict=True), strict=True))), path)

    def comma_separated(path: Path, rows: list[tuple[Any, ...]]) -> None:
        path.write_text("age,note,label\n" + "".join(f"{age},{note},{label}\n" for age, note, label in rows))

    rows = [(30, "a", 0), (31, "b", 1), (31, "b", 1), (32, "c", 0), (33, "d", 1)]
    added = [(age, note, label) for age, note in zip(range(30, 35), "abcde", strict=True) for label in (0, 1)]
    missing, odd = (None, "e", 1), [(3.5, "e", 1), ("old", "e", 1), (True, "e", 1), (30, "e", None)]
    kinds = {"csv": (comma_separated, added), "jsonl": (json_lines, [*added, missing, *odd]), "parquet": (whole_numbers, [*added, missing])}
    for ending, (write, more) in kinds.items():

        def examples(given: list[tuple[Any, ...]], ending: str = ending, write: Callable = write) -> set[tuple[str, int]]:
            with folder() as place:
                write(place / f"t.{ending}", given)
                loaded = load(Task.model_validate(task | {"path": place / f"t.{ending}"}), "train", "t")
            return set(zip(loaded.texts, loaded.classes, strict=True))

        base = examples(rows)
        assert base == {("30 a", 0), ("31 b", 1), ("32 c", 0), ("33 d", 1)}
        for row in more:
            for place in (0, len(rows)):
                changed = examples([*rows[:place], row, *rows[place:]])
                assert len(base ^ changed) <= 1, f"{ending}: one row more, {row}, changed {len(base ^ changed)} examples"


CHECKS: list[Callable[[], None]] = [
    noise_is_normal_with_the_planned_deviation,
    noise_is_never_used_on_another_gradient,
    keys_come_from_the_operating_system_and_go,
    one_example_moves_the_sum_by_the_norm_at_most,
    the_sum_does_not_depend_on_split_or_order,
    the_sum_is_the_sum_of_clipped_gradients,
    nothing_realised_shows_in_the_mean,
    rows_are_sampled_by_poisson,
    everything_is_drawn_at_probability_one,
    gradients_are_each_example_s_own,
    one_row_moves_a_real_step_by_the_norm_at_most,
    a_row_s_calls_are_its_own,
    a_score_counts_each_row_once,
    searches_stop_at_random_and_score_with_noise,
    one_row_of_the_file_is_one_example_at_most,
]
