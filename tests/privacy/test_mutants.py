"""Bugs that published or plausible DP code has, planted one at a time: the checks must kill every one.

A mutant is the package with one piece of source text replaced. All modules that could hold the old part are run again with it.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from privacy import checks, gradient_checks, spending_checks

MODULES = (
    "privacy.plan",
    "privacy.accounting",
    "privacy.randomness",
    "privacy.sampling",
    "privacy.ledger",
    "privacy.mechanism",
    "privacy.gradients",
    "privacy.training",
    "privacy.search",
    "privacy.statement",
    "data.sources",
    "data.tasks",
    "privacy.trainer",
)
"""In the order in which they import each other."""


@dataclass(frozen=True)
class Mutant:
    """One bug: where, what the source says, what it says instead, and the check that is expected to see it."""

    name: str
    module: str
    source: str
    bug: str
    killer: str


NOISE_LINE = 'noise = self._source.normal(sum(total.numel() for total in sums), "noise", self._trial, self._step_number, commitment)'

MUTANTS = [
    Mutant(
        "mean for sum",
        "privacy.mechanism",
        "kept.trunc().long().sum(dim=0)",
        "kept.mean(dim=0).nan_to_num().trunc().long()",
        "the_sum_is_the_sum_of_clipped_gradients",
    ),
    Mutant(
        "clip after sum",
        "privacy.mechanism",
        "squares_B = torch.stack([part.square().sum(dim=1) for part in flat]).sum(dim=0)",
        "squares_B = torch.stack([part.nan_to_num(0, 0, 0).sum(dim=0).square().sum() for part in flat]).sum().expand(len(flat[0]))",
        "one_example_moves_the_sum_by_the_norm_at_most",
    ),
    Mutant(
        "no clip",
        "privacy.mechanism",
        ".clamp(max=1.0)",
        ".clamp(min=1.0)",
        "one_example_moves_the_sum_by_the_norm_at_most",
    ),
    Mutant(
        "clip on the first micro-batch alone",
        "privacy.mechanism",
        "        factor_B = torch.where(",
        "        if self.params[0].summed_grad is not None:\n"
        "            factor_B = torch.full_like(factor_B, GRID / self.max_grad_norm)\n"
        "        factor_B = torch.where(",
        "one_example_moves_the_sum_by_the_norm_at_most",
    ),
    Mutant(
        "norm of the prompt without the biases",
        "privacy.mechanism",
        "part.square().sum(dim=1) for part in flat]",
        "part.square().sum(dim=1) for part in flat[:1]]",
        "one_example_moves_the_sum_by_the_norm_at_most",
    ),
    Mutant(
        "each parameter clipped by itself",
        "privacy.mechanism",
        "kept = torch.where(finite_B[:, None], part, 0.0) * factor_B[:, None]",
        "own_B = (self.max_grad_norm / part.norm(dim=1)).clamp(max=1.0) * (GRID / self.max_grad_norm)\n"
        "            kept = torch.where(finite_B[:, None], part, 0.0) * torch.where(finite_B, own_B, 0.0)[:, None]",
        "one_example_moves_the_sum_by_the_norm_at_most",
    ),
    Mutant(
        "NaN let through",
        "privacy.mechanism",
        "part.isfinite().all(dim=1) for part in flat",
        "part.isinf().logical_not().all(dim=1) for part in flat",
        "one_example_moves_the_sum_by_the_norm_at_most",
    ),
    Mutant(
        "one bad example spoils its micro-batch",
        "privacy.mechanism",
        "finite_B = torch.stack([part.isfinite().all(dim=1) for part in flat]).all(dim=0)",
        "finite_B = torch.stack([part.isfinite().all(dim=1) for part in flat]).all().expand(len(flat[0]))",
        "one_example_moves_the_sum_by_the_norm_at_most",
    ),
    Mutant(
        "floating-point sum",
        "privacy.mechanism",
        "total = kept.trunc().long().sum(dim=0)",
        "total = kept.float().sum(dim=0)",
        "the_sum_does_not_depend_on_split_or_order",
    ),
    Mutant(
        "noise divided by sqrt(k)",
        "privacy.mechanism",
        "noise * (self.noise_multiplier * GRID)",
        "noise * (self.noise_multiplier * GRID / 3**0.5)",
        "noise_is_normal_with_the_planned_deviation",
    ),
    Mutant(
        "noise without C",
        "privacy.mechanism",
        "noise * (self.noise_multiplier * GRID)",
        "noise * (self.noise_multiplier * GRID / self.max_grad_norm)",
        "noise_is_normal_with_the_planned_deviation",
    ),
    Mutant(
        "noise in each micro-batch",
        "privacy.mechanism",
        "parameter.summed_grad = total if parameter.summed_grad is None else parameter.summed_grad + total",
        "total = total + torch.from_numpy(self._source.normal(total.numel(), str(parameter.summed_grad)) * self.noise_multiplier * GRID)"
        ".long().view(total.shape)\n"
        "            parameter.summed_grad = total if parameter.summed_grad is None else parameter.summed_grad + total",
        "noise_is_normal_with_the_planned_deviation",
    ),
    Mutant(
        "one noise value for a row of coordinates",
        "privacy.randomness",
        "        return values",
        "        return np.repeat(values[: -(-count // 8)], 8)[:count]",
        "noise_is_normal_with_the_planned_deviation",
    ),
    Mutant(
        "uniform noise",
        "privacy.randomness",
        "ndtri(uniform).reshape(_SUMMED, count)",
        "((uniform - 0.5) * 12**0.5).reshape(_SUMMED, count)",
        "noise_is_normal_with_the_planned_deviation",
    ),
    Mutant(
        "noise used again in the next step",
        "privacy.mechanism",
        '"noise", self._trial, self._step_number, commitment',
        '"noise", self._trial, 0, "x"',
        "noise_is_normal_with_the_planned_deviation",
    ),
    Mutant(
        "noise not bound to its sum",
        "privacy.mechanism",
        '"noise", self._trial, self._step_number, commitment',
        '"noise", self._trial, self._step_number',
        "noise_is_never_used_on_another_gradient",
    ),
    Mutant(
        "realised batch size as normaliser",
        "privacy.mechanism",
        "        self._feed(gradients, last=False)",
        "        self.expected_batch_size = len(gradients[0])\n        self._feed(gradients, last=False)",
        "nothing_realised_shows_in_the_mean",
    ),
    Mutant(
        "fixed seed",
        "privacy.randomness",
        "secrets.token_bytes(_KEY_BYTES) if",
        'hashlib.sha256(b"fixed").digest() if',
        "keys_come_from_the_operating_system_and_go",
    ),
    Mutant(
        "key kept after the run",
        "privacy.randomness",
        'RandomSource(source.run, b"")',
        "source",
        "keys_come_from_the_operating_system_and_go",
    ),
    Mutant(
        "key readable by others",
        "privacy.randomness",
        "0o600)",
        "0o644)",
        "keys_come_from_the_operating_system_and_go",
    ),
    Mutant(
        "shuffle for Poisson",
        "privacy.sampling",
        "    threshold = int(",
        "    return sorted(words_N.argsort()[: round(plan.sampling_probability * total)].tolist())\n    threshold = int(",
        "rows_are_sampled_by_poisson",
    ),
    Mutant(
        "one batch for all steps",
        "privacy.sampling",
        'source.words(total, "rows", *step)',
        'source.words(total, "rows", *step[:1])',
        "rows_are_sampled_by_poisson",
    ),
    Mutant(
        "rows drawn in pairs",
        "privacy.sampling",
        "in enumerate(words_N.tolist())",
        "in enumerate(words_N.repeat(2)[:total].tolist())",
        "rows_are_sampled_by_poisson",
    ),
    Mutant(
        "q too large",
        "privacy.sampling",
        "int(plan.sampling_probability * _WORDS)",
        "int(plan.sampling_probability * 1.1 * _WORDS)",
        "rows_are_sampled_by_poisson",
    ),
    Mutant(
        "one row repeated for the batch",
        "privacy.gradients",
        "copies = [source.detach().expand(rows, *source.shape[1:]).requires_grad_(True) for source in sources]",
        "copies = [source.detach().requires_grad_(True) for source in sources]",
        "gradients_are_each_example_s_own",
    ),
    Mutant(
        "mean of losses before the clip",
        "privacy.gradients",
        "losses_B.sum()",
        "losses_B.mean()",
        "gradients_are_each_example_s_own",
    ),
    Mutant(
        "last rows of a step dropped",
        "privacy.trainer",
        "range(0, len(group), size)",
        "range(0, len(group) - size + 1, size)",
        "one_row_moves_a_real_step_by_the_norm_at_most",
    ),
    Mutant(
        "copies that fill up counted as examples",
        "privacy.trainer",
        "part[:counted] for part",
        "part for part",
        "one_row_moves_a_real_step_by_the_norm_at_most",
    ),
    Mutant(
        "padded to the longest row of a micro-batch",
        "privacy.trainer",
        "[material.rows[row] for row in filled], length)",
        "[material.rows[row] for row in filled])",
        "a_row_s_calls_are_its_own",
    ),
    Mutant(
        "rows of a masked model that fill their call",
        "privacy.trainer",
        "len(material.rows[row].token_ids) + material.model.masked",
        "len(material.rows[row].token_ids)",
        "a_row_s_calls_are_its_own",
    ),
    Mutant(
        "copies that fill up counted as right",
        "privacy.trainer",
        "[:counted].sum()",
        ".sum()",
        "a_score_counts_each_row_once",
    ),
    Mutant(
        "empty batch skipped",
        "privacy.training",
        "            for group, rate in",
        "            if not poisson_rows(run.plan, run.source, run.total, trial, step):\n"
        "                continue\n"
        "            for group, rate in",
        "every_step_is_charged_and_noised_also_when_empty",
    ),
    Mutant(
        "step not counted on resume",
        "privacy.ledger",
        "        if commitment in known:",
        "        if known:",
        "a_restart_repeats_or_pays",
    ),
    Mutant(
        "intent noted after the noise",
        "privacy.mechanism",
        "        self._intend(commitment)\n        " + NOISE_LINE,
        "        " + NOISE_LINE + "\n        self._intend(commitment)",
        "intents_are_on_disk_before_the_noise",
    ),
    Mutant(
        "intent not flushed",
        "privacy.ledger",
        "        os.fsync(self._descriptor)\n",
        "",
        "intents_are_on_disk_before_the_noise",
    ),
    Mutant(
        "budget of finished runs alone",
        "privacy.ledger",
        "for spending in spendings.values() for plan in spending.plans()]",
        "for spending in spendings.values() if spending.finished for plan in spending.plans()]",
        "a_budget_adds_up_all_runs_and_holds_its_cap",
    ),
    Mutant(
        "cap compared with this run alone",
        "privacy.ledger",
        "composed_epsilon([*others, *own.plans()]",
        "composed_epsilon(own.plans()",
        "a_budget_adds_up_all_runs_and_holds_its_cap",
    ),
    Mutant(
        "half of the steps accounted",
        "privacy.accounting",
        "step.self_compose(plan.steps)",
        "step.self_compose(max(1, plan.steps // 2))",
        "accountants_give_the_known_figures",
    ),
    Mutant(
        "sigma rounded down",
        "privacy.accounting",
        "    steps = math.ceil(math.exp(float(brentq(excess, low, high, xtol=1e-6))) / _SIGMA_GRID)\n"
        "    while excess(math.log(steps * _SIGMA_GRID), _FINE) > 0:\n        steps += 1\n",
        "    steps = math.floor(math.exp(float(brentq(excess, low, high, xtol=1e-6))) / _SIGMA_GRID)\n",
        "calibration_meets_its_target_from_below",
    ),
    Mutant(
        "delta of 1/N",
        "privacy.plan",
        "declared**-1.1",
        "1 / declared",
        "the_plan_is_declared_and_never_counted",
    ),
    Mutant(
        "seeded noise called private",
        "privacy.plan",
        'return self.noise_source == "system"',
        "return True",
        "seeded_noise_is_not_called_private",
    ),
    Mutant(
        "repeated steps left out of the claim",
        "privacy.statement",
        "composed_epsilon(spending.plans(), plan.delta) if spending.repeated_steps else cost.epsilon",
        "cost.epsilon",
        "statements_hold_what_was_charged",
    ),
    Mutant(
        "a step begun again priced as another sample",
        "privacy.plan",
        "steps=count, noise_multiplier=self.noise_multiplier / times**0.5",
        "steps=count * times",
        "a_repeated_step_costs_what_its_one_sample_tells",
    ),
    Mutant(
        "a ledger put back from an older copy",
        "privacy.training",
        "    run.ledger.charge_done(trial, first)\n",
        "",
        "a_checkpoint_ahead_of_its_ledger_is_charged",
    ),
    Mutant(
        "another plan on the way",
        "privacy.ledger",
        "if own.plan != plan:",
        "if False:",
        "a_run_keeps_its_plan",
    ),
    Mutant(
        "half an intent on a full disk",
        "privacy.ledger",
        "os.write(self._descriptor, data) < len(data)",
        "not os.write(self._descriptor, data)",
        "a_full_disk_stops_a_step_before_its_noise",
    ),
    Mutant(
        "a loss that is too small",
        "privacy.accounting",
        "not prv - _PRV_BELOW <= pld <= prv + _PRV_ABOVE",
        "pld > prv + _PRV_ABOVE",
        "accountants_must_agree",
    ),
    Mutant(
        "claims taken at their word",
        "privacy.statement",
        "if true > claim + _TOLERANCE",
        "if true > claim + 100",
        "statements_hold_what_was_charged",
    ),
    Mutant(
        "fixed number of trials",
        "privacy.search",
        "    trials, weight = 0, 1.0",
        "    return round(plan.mean_trials)\n    trials, weight = 0, 1.0",
        "searches_stop_at_random_and_score_with_noise",
    ),
    Mutant(
        "score without noise",
        "privacy.search",
        "float(plan.score_noise_multiplier or 0.0)",
        "0.0",
        "searches_stop_at_random_and_score_with_noise",
    ),
    Mutant(
        "first of two labels kept",
        "data.tasks",
        "if text not in disputed",
        "",
        "one_row_of_the_file_is_one_example_at_most",
    ),
    Mutant(
        "a type for each column, from all its rows",
        "data.sources",
        "pd.DataFrame(rows, dtype=object)",
        "pd.DataFrame(rows)",
        "one_row_of_the_file_is_one_example_at_most",
    ),
]


@contextmanager
def planted(mutant: Mutant) -> Iterator[None]:
    """The package with the bug in it."""
    modules = [checks.part(name) for name in MODULES]
    before = [dict(vars(module)) for module in modules]
    try:
        for name, module in zip(MODULES, modules, strict=True):
            source = Path(module.__file__).read_text()
            if name == mutant.module:
                assert source.count(mutant.source) == 1, (
                    f"{mutant.name}: the source to replace stands {source.count(mutant.source)} times"
                )
                source = source.replace(mutant.source, mutant.bug)
            exec(compile(source, module.__file__, "exec"), vars(module))
        yield
    finally:
        for module, names in zip(modules, before, strict=True):
            vars(module).clear()
            vars(module).update(names)


CHECKS = {
    check.__name__: check
    for check in [*checks.CHECKS, *gradient_checks.CHECKS, *spending_checks.CHECKS]
}
TRIED: list[str] = []
KILLED: list[str] = []


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_the_checks_kill(mutant: Mutant) -> None:
    TRIED.append(mutant.name)
    with planted(mutant), pytest.raises(AssertionError):
        CHECKS[mutant.killer]()
    KILLED.append(mutant.name)


def test_every_mutant_was_killed() -> None:
    print(f"mutants killed: {len(KILLED)} of {len(TRIED)}", file=sys.__stdout__)
    assert KILLED == TRIED
    assert len(MUTANTS) >= 20


def test_without_a_bug_the_checks_pass_again() -> None:
    for check in {mutant.killer for mutant in MUTANTS} - {
        "accountants_give_the_known_figures",
        "calibration_meets_its_target_from_below",
    }:
        CHECKS[check]()
