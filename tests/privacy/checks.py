"""Checks of the private mechanism: each raises AssertionError when a property does not hold.

`test_mechanism.py` runs them on the package, `test_mutants.py` on the package with a planted bug.
So they look up every part of the package in its module at the time of the call.
"""

import json
import secrets
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from scipy import stats

CPU = torch.device("cpu")
SMALL_CHANCE = 1e-6
"""Probability that a correct package fails one test of its randomness."""


def part(name: str) -> ModuleType:
    """Return a module of the package as it is now."""
    return import_module(f"post_dist.{name}")


def on_a_coarse_grid(check: Callable[[], None]) -> Callable[[], None]:
    """Let a check account ten times as fast, where it compares epsilons with each other."""

    @wraps(check)
    def checked() -> None:
        accounting = part("privacy.accounting")
        with mock.patch.object(accounting, "FINE", 1e-3):
            _forget(accounting)
            try:
                check()
            finally:
                _forget(accounting)

    return checked


def _forget(module: ModuleType) -> None:
    """Empty the caches of a module's functions, whose keys do not name the grid."""
    for member in vars(module).values():
        if hasattr(member, "cache_clear"):
            member.cache_clear()


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


def poisson_sampler(sampling_probability: float) -> Any:
    return part("privacy.sampling").PoissonSampler(sampling_probability)


def fresh_source(name: str = "run") -> Any:
    return part("privacy.randomness").RandomSource(name, secrets.token_bytes(32))


def quiet_source() -> Any:
    """Return a source whose noise is zero, so that the sum alone is seen."""
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
    """Return the noisy sums of one step over micro-batches in fp64: the step times the divisor."""
    parameters = [torch.zeros(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    made = plan_of(**plan)
    optimizer = part("privacy.mechanism").PrivateOptimizer(
        torch.optim.SGD(parameters, lr=1.0), made, source
    )
    for gradients in micro_batches:
        optimizer.accumulate(gradients)
    optimizer.finish(step, lambda commitment: None)
    return [-parameter.detach() * made.expected_batch_size for parameter in parameters]


# --- noise ---


def noise_is_normal_with_the_planned_deviation() -> None:
    size = 76_800
    micro_batches = [[torch.zeros(5, size)], [torch.zeros(0, size)], [torch.zeros(3, size)]]
    source = fresh_source()
    steps = []
    for step in range(3):
        (noisy,) = noisy_sums(micro_batches, [(size,)], source=source, step=step)
        steps.append(noisy.numpy())
    planned = 0.7 * 0.3
    for noise in steps:
        assert abs(noise.std() / planned - 1) < 0.01
        assert stats.kstest(noise / planned, "norm").pvalue > SMALL_CHANCE
        assert abs(stats.kurtosis(noise)) < 6 * (24 / size) ** 0.5, "the tails are not normal"
        neighbors = np.corrcoef(noise[1:], noise[:-1])[0, 1]
        assert abs(neighbors) < 6 / size**0.5, "neighboring coordinates share noise"
    for one, other in ((0, 1), (1, 2), (0, 2)):
        correlation = np.corrcoef(steps[one], steps[other])[0, 1]
        assert abs(correlation) < 6 / size**0.5, "two steps share noise"


def noise_is_never_used_on_another_gradient() -> None:
    source = fresh_source()
    size = 20_000
    gradient = torch.zeros(1, size)
    first = noisy_sums([[gradient]], [(size,)], source=source)[0].numpy()
    again = noisy_sums([[gradient]], [(size,)], source=source)[0].numpy()
    assert np.array_equal(first, again), "the same step on the same sum must repeat its noise"
    gradient[0, 0] = 0.2
    other = noisy_sums([[gradient]], [(size,)], source=source)[0].numpy()
    correlation = np.corrcoef(first[1:], other[1:])[0, 1]
    assert abs(correlation) < 6 / size**0.5, "another sum got the same noise"


def every_parameter_gets_noise_of_its_own() -> None:
    """Also one of a few values, such as the class biases."""
    shapes = [(40,), (3,)]
    source = fresh_source()
    empty = [[torch.zeros(0, *shape) for shape in shapes]]
    drawn: list[list[np.ndarray]] = [[], []]
    for step in range(1500):
        for noise, total in zip(
            drawn, noisy_sums(empty, shapes, source=source, step=step), strict=True
        ):
            noise.append(total.numpy())
    for noise in drawn:
        values = np.concatenate(noise) / (0.7 * 0.3)
        assert stats.kstest(values, "norm").pvalue > SMALL_CHANCE, "a parameter lacks its noise"
        # Of 60,000 values on a grid of some 3e9, one or two may be equal by chance.
        assert len(set(values.tolist())) > 0.9999 * len(values), "noise has few values"
        assert np.abs(values).max() > 2.7, "noise has no tails"
    firsts = [np.array([step[0] for step in noise]) for noise in drawn]
    assert abs(np.corrcoef(*firsts)[0, 1]) < 6 / 1500**0.5, "two parameters share noise"


def noise_has_tails_and_many_values() -> None:
    values = fresh_source().normal(400_000, "noise")
    assert len(set(values.tolist())) == len(values)
    for bound in (3.0, 4.0):
        expected = len(values) * 2 * stats.norm.sf(bound)
        beyond = int((np.abs(values) > bound).sum())
        assert abs(beyond - expected) < 6 * expected**0.5, f"tails beyond {bound} deviations"


def trials_share_no_noise() -> None:
    source = fresh_source()
    mechanism = part("privacy.mechanism")
    noises = []
    for trial in (0, 1):
        parameter = torch.zeros(2000, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.SGD([parameter], lr=1.0)
        private = mechanism.PrivateOptimizer(optimizer, plan_of(), source, trial)
        private.finish(0, lambda commitment: None)
        noises.append(parameter.detach().numpy())
    assert abs(np.corrcoef(*noises)[0, 1]) < 6 / 2000**0.5, "two trials share noise"
    plan = plan_of(mean_trials=5.0, score_noise_multiplier=10.0)
    scores = {part("privacy.search").noisy_score(7, plan, source, trial) for trial in range(9)}
    assert len(scores) == 9, "two scores share noise"


def every_byte_of_a_key_varies() -> None:
    open_source = part("privacy.randomness").open_source
    with folder() as place:
        keys = [open_source(place / f"{number}.json", "system", 0).key for number in range(64)]
    for values in zip(*keys, strict=True):
        assert len(set(values)) > 32, "a byte of the keys hardly varies"


def keys_come_from_the_operating_system_and_go() -> None:
    randomness = part("privacy.randomness")
    with folder() as place:
        paths = [place / f"{number}.json" for number in range(3)]
        entropy = mock.Mock(wraps=secrets.token_bytes)
        with mock.patch.object(randomness.secrets, "token_bytes", entropy):
            sources = [randomness.open_source(path, "system", 0) for path in paths]
        assert entropy.mock_calls.count(mock.call(32)) == 3
        assert len({source.key for source in sources}) == 3
        for source, path in zip(sources, paths, strict=True):
            assert len(source.key) == 32
            assert path.stat().st_mode & 0o77 == 0
        again = randomness.open_source(paths[0], "system", 0)
        assert again == sources[0], "a run that resumes keeps its key"
        paths[1].chmod(0o640)
        link = place / "link.json"
        link.symlink_to(paths[2])
        for known in (paths[1], link):
            try:
                randomness.open_source(known, "system", 0)
            except part("errors").ArtifactRefused:
                continue
            raise AssertionError(f"{known.name}: a key that others may know was used")
        randomness.destroy_key(paths[0], sources[0])
        assert sources[0].key.hex() not in paths[0].read_text()
        assert randomness.open_source(paths[0], "system", 0).run == sources[0].run


# --- clip and sum ---


def hard_gradients() -> torch.Tensor:
    """Return per-example gradients [B, 40] made to break a clip.

    They are huge, tiny, equal, not finite, at the norm and just above it.
    """
    gradients = torch.randn(12, 40, generator=torch.Generator().manual_seed(0))
    gradients[0] = 1e30
    gradients[1] = 3e38
    gradients[2, 5] = float("nan")
    gradients[3, 7] = float("inf")
    gradients[4] = 1e-42
    gradients[5] = gradients[6]
    gradients[7] *= 0.3 / gradients[7].norm()
    gradients[8] *= 0.3 * (1 + 1e-6) / gradients[8].norm()
    gradients[9] = 0
    gradients[10] *= -1e4
    return gradients


def total_of(gradients: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    """Return the sum over micro-batches of the sizes, for parameters of 30 and 10 values."""
    micro_batches = []
    for chunk in gradients.split(list(sizes)):
        micro_batches.append([chunk[:, :30].reshape(-1, 5, 6), chunk[:, 30:]])
    sums = noisy_sums(micro_batches, [(5, 6), (10,)], source=quiet_source())
    return torch.cat([total.flatten() for total in sums])


def one_example_moves_the_sum_by_the_norm_at_most() -> None:
    gradients = hard_gradients()
    whole = total_of(gradients, [12])
    assert torch.isfinite(whole).all()
    for left_out in range(12):
        without = torch.cat([gradients[:left_out], gradients[left_out + 1 :]])
        for sizes in ([11], [1] * 11, [4, 7], [10, 1]):
            moved = float((whole - total_of(without, sizes)).norm()) / 0.3
            assert moved <= 1 + 1e-6, f"example {left_out} moves the sum by {moved:.3g} C"


def the_sum_does_not_depend_on_split_or_order() -> None:
    gradients = hard_gradients()
    whole = total_of(gradients, [12])
    for sizes in ([1] * 12, [11, 1], [5, 7]):
        assert torch.equal(total_of(gradients, sizes), whole)
    assert torch.equal(total_of(gradients.flip(0), [3, 9]), whole)


def the_sum_is_the_sum_of_clipped_gradients() -> None:
    gradients = hard_gradients().double()
    expected = torch.zeros(40, dtype=torch.float64)
    for gradient in gradients[gradients.isfinite().all(dim=1)]:
        norm = max(float(gradient.norm()), 1e-300)
        expected += gradient * min(1.0, 0.3 / norm)
    torch.testing.assert_close(total_of(gradients, [5, 7]), expected, rtol=1e-6, atol=1e-6)


def nothing_realized_shows_in_the_mean() -> None:
    sums = []
    for examples in (1, 10):
        gradients = torch.full((examples, 4), 0.01)
        sums.append(noisy_sums([[gradients]], [(4,)], source=quiet_source())[0])
    torch.testing.assert_close(sums[1], 10 * sums[0], rtol=1e-6, atol=0)


# --- sampling ---


def examples_are_sampled_by_poisson() -> None:
    sampler = poisson_sampler(0.1)
    source = fresh_source()
    total = 300
    steps = 2000
    drawn = np.zeros((steps, total), dtype=bool)
    for step in range(steps):
        drawn[step, sampler.draw(source, total, 0, step)] = True

    # Each example is drawn with probability q, and no more evenly than chance.
    counts = drawn.sum(axis=0)
    variance = steps * 0.1 * 0.9
    chi = ((counts - steps * 0.1) ** 2 / variance).sum()
    assert stats.chi2.sf(chi, total) > SMALL_CHANCE, "examples are not drawn with probability q"
    assert stats.chi2.cdf(chi, total) > SMALL_CHANCE, "examples are drawn too evenly"

    # The batch sizes vary as a binomial.
    sizes = drawn.sum(axis=1)
    spread = (steps - 1) * sizes.var(ddof=1) / (total * 0.1 * 0.9)
    chance = stats.chi2.sf(spread, steps - 1)
    assert SMALL_CHANCE < chance < 1 - SMALL_CHANCE, "batch sizes do not vary as a binomial"

    # Examples are drawn independently of each other and of the step before.
    together = drawn[:, :-1] & drawn[:, 1:]
    pairs = stats.binomtest(int(together.sum()), together.size, 0.01).pvalue
    assert pairs > SMALL_CHANCE, "two examples are not drawn independently"
    correlation = np.corrcoef(drawn[:-1].ravel(), drawn[1:].ravel())[0, 1]
    assert abs(correlation) < 6 / drawn.size**0.5, "steps share their examples"


def everything_is_drawn_at_probability_one() -> None:
    assert poisson_sampler(1.0).draw(fresh_source(), 50, 0, 0) == list(range(50))


def the_accountants_hear_of_the_sampler_that_draws() -> None:
    """The plan's sampler, its event for dp-accounting and its history for Opacus have one q."""
    plan = plan_of(sampling_probability=0.2)
    event = plan.event()
    assert plan.sampler == poisson_sampler(0.2)
    assert (event.count, event.event.sampling_probability) == (6, 0.2)
    assert event.event.event.noise_multiplier == 0.7
    assert plan.sampler.opacus_history(0.7, 6) == [(0.7, 0.2, 6)]


# --- search and splits ---


class FakeTrainer:
    """Trains nothing and scores every trial with 100 correct examples."""

    def __init__(self, plan: Any, source: Any, checkpoints: Path) -> None:
        from post_dist.config.schema import RunConfig

        tune = {"search": {"mean_trials": 5, "learning_rate": [0.1, 0.2]}}
        privacy = {"enabled": True, "declared_examples": 6000, "noise_multiplier": 1.0}
        fields = {"name": "a", "tune": tune, "privacy": privacy}
        self.config = RunConfig.model_validate(fields)
        trainer = part("privacy.trainer")
        ledger = SimpleNamespace(intend_score=lambda trial, commitment: None)
        self.run = trainer.PrivateRun(plan, source, ledger, checkpoints, "fake", None)
        # A search asks the part that is trained for its score.
        self.part = self

    def train(self, *given: object) -> list[torch.Tensor]:
        return [torch.zeros(1)]

    def count_right(self, parameters: list[torch.Tensor]) -> int:
        return 100


def searches_stop_at_random_and_score_with_noise() -> None:
    search = part("privacy.search")
    plan = plan_of(mean_trials=5.0, score_noise_multiplier=10.0)
    counts = np.array([search.number_of_trials(plan, fresh_source()) for _ in range(4000)])
    p = search.logarithmic_parameter(5.0)
    known = np.arange(1, 15)
    expected = stats.logser(p).pmf(known)
    seen = np.array([(counts == k).sum() for k in known])
    all_seen = [*seen, len(counts) - seen.sum()]
    all_expected = len(counts) * np.array([*expected, 1 - expected.sum()])
    chance = stats.chisquare(all_seen, all_expected).pvalue
    assert chance > SMALL_CHANCE, "the number of trials is not logarithmic"

    settings = part("privacy.trainer").TrialSettings(0.1, 0.3)
    scores = []
    with folder() as place, mock.patch.object(search, "number_of_trials", return_value=1):
        for number in range(300):
            tried = place / str(number)
            search.run_search(FakeTrainer(plan, fresh_source(), tried), settings)
            scores.append(float(search.load_tensors(tried / "search", 1)["score"]))
    assert abs(np.mean(scores) - 100) < 6 * 10 / 300**0.5
    assert 0.8 < np.std(scores) / 10 < 1.2, "the score's noise is not the planned one"


class CountingTrainer(FakeTrainer):
    """Trial k trains to [k] and has a number of correct examples from a table."""

    COUNTS = (50, 90, 20, 70, 99, 10, 60)

    def train(self, settings: Any, trial: int, checkpoints: Path) -> list[torch.Tensor]:
        return [torch.tensor([float(trial)])]

    def count_right(self, parameters: list[torch.Tensor]) -> int:
        return self.COUNTS[int(parameters[0])]


def a_search_keeps_the_best_noisy_score() -> None:
    search = part("privacy.search")
    settings = part("privacy.trainer").TrialSettings(0.1, 0.3)
    found = []
    wanted = []
    for noise in (1.0, 60.0):
        plan = plan_of(mean_trials=5.0, score_noise_multiplier=noise)
        for number in range(20):
            source = fresh_source(str(number))
            with folder() as place:
                # A search that was stopped goes on behind its last trial.
                for trials in (3, 7):
                    with mock.patch.object(search, "number_of_trials", return_value=trials):
                        (best,) = search.run_search(CountingTrainer(plan, source, place), settings)
                found.append(int(best))
            noise_of = [
                float(source.normal(1, "score", k, count)[0])
                for k, count in enumerate(CountingTrainer.COUNTS)
            ]
            wanted.append(
                int(np.argmax(np.array(CountingTrainer.COUNTS) + noise * np.array(noise_of)))
            )
    assert found == wanted, "a search published another trial than the best one"
    assert len(set(found[20:])) > 1, "the scores have no noise"


Row = tuple[Any, ...]
COLUMNS = ("age", "note", "label")


def write_json_lines(path: Path, rows: list[Row]) -> None:
    lines = [json.dumps(dict(zip(COLUMNS, row, strict=True))) + "\n" for row in rows]
    path.write_text("".join(lines))


def write_parquet(path: Path, rows: list[Row]) -> None:
    import pyarrow
    from pyarrow import parquet

    columns = zip(*rows, strict=True)
    parquet.write_table(pyarrow.table(dict(zip(COLUMNS, columns, strict=True))), path)


def write_parquet_by_pandas(path: Path, rows: list[Row]) -> None:
    import pandas as pd

    pd.DataFrame(rows, columns=list(COLUMNS)).to_parquet(path)


def write_csv(path: Path, rows: list[Row]) -> None:
    lines = [f"{age},{note},{label}\n" for age, note, label in rows]
    path.write_text("age,note,label\n" + "".join(lines))


def one_row_of_the_file_is_one_example_at_most() -> None:
    from post_dist.config.sources import Task

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

    def examples(ending: str, write: Callable, rows: list[Row]) -> set[tuple[str, int]]:
        with folder() as place:
            path = place / f"t.{ending}"
            write(path, rows)
            section = Task.model_validate(task | {"path": path})
            loaded = part("data.tasks").load_examples(section, "train", "t")
        return set(zip(loaded.texts, loaded.classes, strict=True))

    rows = [(30, "a", 0), (31, "b", 1), (31, "b", 1), (32, "c", 0), (33, "d", 1)]
    added: list[Row] = []
    for age, note in zip(range(30, 35), "abcde", strict=True):
        added += [(age, note, 0), (age, note, 1)]
    missing = (None, "e", 1)
    odd = [(3.5, "e", 1), ("old", "e", 1), (True, "e", 1), (30, "e", None)]
    numbers = [(30.5, "e", 1), (30, "e", None)]
    kinds = [
        ("csv", write_csv, added),
        ("jsonl", write_json_lines, [*added, missing, *odd]),
        ("parquet", write_parquet, [*added, missing]),
        ("parquet", write_parquet_by_pandas, [*added, missing, *numbers]),
    ]
    for ending, write, more in kinds:
        base = examples(ending, write, rows)
        assert base == {("30 a", 0), ("31 b", 1), ("32 c", 0), ("33 d", 1)}
        for row in more:
            for place in (0, len(rows)):
                changed = examples(ending, write, [*rows[:place], row, *rows[place:]])
                different = len(base ^ changed)
                assert different <= 1, f"{ending}: row {row} more changed {different} examples"


CHECKS: list[Callable[[], None]] = [
    noise_is_normal_with_the_planned_deviation,
    noise_is_never_used_on_another_gradient,
    every_parameter_gets_noise_of_its_own,
    noise_has_tails_and_many_values,
    trials_share_no_noise,
    every_byte_of_a_key_varies,
    keys_come_from_the_operating_system_and_go,
    one_example_moves_the_sum_by_the_norm_at_most,
    the_sum_does_not_depend_on_split_or_order,
    the_sum_is_the_sum_of_clipped_gradients,
    nothing_realized_shows_in_the_mean,
    examples_are_sampled_by_poisson,
    everything_is_drawn_at_probability_one,
    the_accountants_hear_of_the_sampler_that_draws,
    searches_stop_at_random_and_score_with_noise,
    a_search_keeps_the_best_noisy_score,
    one_row_of_the_file_is_one_example_at_most,
]
