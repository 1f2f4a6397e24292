"""What must hold of the private mechanism, each as a function that raises AssertionError when it does not.

`test_mechanism.py` runs them on the package as it is, `test_mutants.py` on the package with a planted bug. So they reach every
part through its module at the time of the call.
"""

import json
import secrets
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import torch
from scipy import stats

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


def noisy_sums(
    micro_batches: Sequence[Sequence[torch.Tensor]],
    shapes: Sequence[tuple],
    *,
    source: Any,
    step: int = 0,
    **plan: Any,
) -> Any:
    """What the optimizer is handed after one step over micro-batches, times the divisor: the noisy sums, in fp64."""
    parameters = [torch.zeros(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    made = plan_of(**plan)
    optimizer = part("privacy.mechanism").PrivateOptimizer(
        torch.optim.SGD(parameters, lr=1.0), made, source
    )
    for gradients in micro_batches:
        optimizer.accumulate(gradients)
    optimizer.finish(step, lambda commitment: None)
    return [-parameter.detach() * made.expected_batch_size for parameter in parameters]


# ---------------------------------------------------------------------------------------------------------------- noise


def noise_is_normal_with_the_planned_deviation() -> None:
    size = 76_800
    micro_batches = [[torch.zeros(5, size)], [torch.zeros(0, size)], [torch.zeros(3, size)]]
    source = fresh_source()
    steps = [
        noisy_sums(micro_batches, [(size,)], source=source, step=step)[0].numpy()
        for step in range(3)
    ]
    wanted = 0.7 * 0.3
    for noise in steps:
        assert abs(noise.std() / wanted - 1) < 0.01
        assert stats.kstest(noise / wanted, "norm").pvalue > SMALL_CHANCE
        assert abs(stats.kurtosis(noise)) < 6 * (24 / size) ** 0.5, "the tails are not normal"
        assert abs(np.corrcoef(noise[1:], noise[:-1])[0, 1]) < 6 / size**0.5, (
            "neighbouring coordinates share noise"
        )
    for one, other in ((0, 1), (1, 2), (0, 2)):
        assert abs(np.corrcoef(steps[one], steps[other])[0, 1]) < 6 / size**0.5, (
            "two steps share noise"
        )


def noise_is_never_used_on_another_gradient() -> None:
    source, size = fresh_source(), 20_000
    gradient = torch.zeros(1, size)
    first = noisy_sums([[gradient]], [(size,)], source=source)[0].numpy()
    again = noisy_sums([[gradient]], [(size,)], source=source)[0].numpy()
    assert np.array_equal(first, again), "the same step on the same sum must repeat its noise"
    gradient[0, 0] = 0.2
    other = noisy_sums([[gradient]], [(size,)], source=source)[0].numpy()
    assert abs(np.corrcoef(first[1:], other[1:])[0, 1]) < 6 / size**0.5, (
        "another sum got the same noise"
    )


def keys_come_from_the_operating_system_and_go() -> None:
    randomness = part("privacy.randomness")
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{number}.json" for number in range(3)]
        with mock.patch.object(
            randomness.secrets, "token_bytes", wraps=secrets.token_bytes
        ) as entropy:
            sources = [randomness.open_source(path, "system", 0) for path in paths]
            assert entropy.mock_calls.count(mock.call(32)) == 3
        assert len({source.key for source in sources}) == 3
        assert all(
            len(source.key) == 32 and path.stat().st_mode & 0o77 == 0
            for source, path in zip(sources, paths, strict=True)
        )
        assert randomness.open_source(paths[0], "system", 0) == sources[0], (
            "a run that goes on keeps its key"
        )
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
    micro_batches = [
        [chunk[:, :30].reshape(-1, 5, 6), chunk[:, 30:]] for chunk in rows.split(list(sizes))
    ]
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
            assert moved <= 0.3 * (1 + 1e-6), (
                f"example {left_out} moves the sum by {moved / 0.3:.3g} C"
            )


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
    one, many = (
        noisy_sums([[torch.full((rows, 4), 0.01)]], [(4,)], source=quiet_source())[0]
        for rows in (1, 10)
    )
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
    assert stats.chi2.sf(chi, total) > SMALL_CHANCE, (
        "rows are not drawn equally often with probability q"
    )
    assert stats.chi2.cdf(chi, total) > SMALL_CHANCE, "rows are drawn more evenly than chance would"
    sizes = drawn.sum(axis=1)
    spread = (steps - 1) * sizes.var(ddof=1) / (total * 0.1 * 0.9)
    assert SMALL_CHANCE < stats.chi2.sf(spread, steps - 1) < 1 - SMALL_CHANCE, (
        "batch sizes do not vary as a binomial"
    )
    together = drawn[:, :-1] & drawn[:, 1:]
    pairs = stats.binomtest(int(together.sum()), together.size, 0.01).pvalue
    assert pairs > SMALL_CHANCE, "two rows are not drawn independently"
    assert abs(np.corrcoef(drawn[:-1].ravel(), drawn[1:].ravel())[0, 1]) < 6 / drawn.size**0.5, (
        "steps share their rows"
    )


def everything_is_drawn_at_probability_one() -> None:
    assert part("privacy.sampling").poisson_rows(
        plan_of(sampling_probability=1.0), fresh_source(), 50, 0, 0
    ) == list(range(50))


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
                search.run_search(
                    section,
                    0.1,
                    plan,
                    source,
                    tried,
                    lambda *given: [torch.zeros(1)],
                    lambda tuned: 100,
                )
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
        path.write_text(
            "".join(
                json.dumps(dict(zip(("age", "note", "label"), row, strict=True))) + "\n"
                for row in rows
            )
        )

    def whole_numbers(path: Path, rows: list[tuple[Any, ...]]) -> None:
        parquet.write_table(
            pyarrow.table(
                dict(zip(("age", "note", "label"), zip(*rows, strict=True), strict=True))
            ),
            path,
        )

    def comma_separated(path: Path, rows: list[tuple[Any, ...]]) -> None:
        path.write_text(
            "age,note,label\n" + "".join(f"{age},{note},{label}\n" for age, note, label in rows)
        )

    rows = [(30, "a", 0), (31, "b", 1), (31, "b", 1), (32, "c", 0), (33, "d", 1)]
    added = [
        (age, note, label)
        for age, note in zip(range(30, 35), "abcde", strict=True)
        for label in (0, 1)
    ]
    missing, odd = (None, "e", 1), [(3.5, "e", 1), ("old", "e", 1), (True, "e", 1), (30, "e", None)]
    kinds = {
        "csv": (comma_separated, added),
        "jsonl": (json_lines, [*added, missing, *odd]),
        "parquet": (whole_numbers, [*added, missing]),
    }
    for ending, (write, more) in kinds.items():

        def examples(
            given: list[tuple[Any, ...]], ending: str = ending, write: Callable = write
        ) -> set[tuple[str, int]]:
            with folder() as place:
                write(place / f"t.{ending}", given)
                loaded = load(
                    Task.model_validate(task | {"path": place / f"t.{ending}"}), "train", "t"
                )
            return set(zip(loaded.texts, loaded.classes, strict=True))

        base = examples(rows)
        assert base == {("30 a", 0), ("31 b", 1), ("32 c", 0), ("33 d", 1)}
        for row in more:
            for place in (0, len(rows)):
                changed = examples([*rows[:place], row, *rows[place:]])
                assert len(base ^ changed) <= 1, (
                    f"{ending}: one row more, {row}, changed {len(base ^ changed)} examples"
                )


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
    searches_stop_at_random_and_score_with_noise,
    one_row_of_the_file_is_one_example_at_most,
]
