"""Bugs that published or plausible DP code has, planted one at a time: the checks must kill each.

A mutant is the package with one piece of source text replaced. All modules that could hold the old
part are executed again with it.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from privacy import checks, gradient_checks, ledger_checks, spending_checks

MODULES = (
    "privacy.randomness",
    "privacy.sampling",
    "privacy.plan",
    "privacy.accounting",
    "privacy.spending",
    "privacy.anchor",
    "privacy.ledger",
    "privacy.budget",
    "privacy.mechanism",
    "data.sources",
    "data.tasks",
    "privacy.micro_batches",
    "privacy.gradients",
    "privacy.scoring",
    "privacy.batch_sizes",
    "privacy.trainer",
    "privacy.search",
    "privacy.statement",
    "privacy.private_run",
)
"""In the order in which they import each other."""


@dataclass(frozen=True)
class Mutant:
    """One bug.

    Attributes:
        name: what is wrong.
        module: where the bug is planted.
        source: the correct source text.
        bug: the text that replaces it.
        killer: the check that must detect the bug.
    """

    name: str
    module: str
    source: str
    bug: str
    killer: str


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
        "squares = [part.nan_to_num(0, 0, 0).sum(dim=0).square().sum() for part in flat]\n"
        "        squares_B = torch.stack(squares).sum().expand(len(flat[0]))",
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
        "        factor_B = torch.where(finite_B, self._grid_factors(flat), 0.0)\n",
        "        factor_B = torch.where(finite_B, self._grid_factors(flat), 0.0)\n"
        "        if self.params[0].summed_grad is not None:\n"
        "            unclipped_B = torch.full_like(factor_B, GRID / self.max_grad_norm)\n"
        "            factor_B = torch.where(finite_B, unclipped_B, 0.0)\n",
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
        "            kept = finite * factor_B[:, None]\n",
        "            own_B = (self.max_grad_norm / finite.norm(dim=1)).clamp(max=1.0)\n"
        "            own_B = torch.where(finite_B, own_B * (GRID / self.max_grad_norm), "
        "0.0)\n"
        "            kept = finite * own_B[:, None]\n",
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
        "torch.stack([part.isfinite().all(dim=1) for part in flat]).all(dim=0)",
        "torch.stack([part.isfinite().all(dim=1) for part in flat]).all().expand(len(flat[0]))",
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
        "            if parameter.summed_grad is not None:\n",
        "            extra = self._source.normal(total.numel(), "
        "str(parameter.summed_grad))\n"
        "            steps = torch.from_numpy(extra * self.noise_multiplier * "
        "GRID).long()\n"
        "            total = total + steps.view(total.shape)\n"
        "            if parameter.summed_grad is not None:\n",
        "noise_is_normal_with_the_planned_deviation",
    ),
    Mutant(
        "one noise value for several coordinates",
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
        '"noise", *place, commitment',
        '"noise", self._trial, 0, "x"',
        "noise_is_normal_with_the_planned_deviation",
    ),
    Mutant(
        "noise not bound to its sum",
        "privacy.mechanism",
        '"noise", *place, commitment',
        '"noise", *place',
        "noise_is_never_used_on_another_gradient",
    ),
    Mutant(
        "realized batch size as divisor",
        "privacy.mechanism",
        "        self._feed(gradients, last=False)",
        "        self.expected_batch_size = len(gradients[0])\n"
        "        self._feed(gradients, last=False)",
        "nothing_realized_shows_in_the_mean",
    ),
    Mutant(
        "fixed seed",
        "privacy.randomness",
        "        key = secrets.token_bytes(_KEY_BYTES)\n",
        '        key = hashlib.sha256(b"fixed").digest()\n',
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
        "        threshold = int(",
        "        size = round(self.sampling_probability * total)\n"
        "        return sorted(words_N.argsort()[:size].tolist())\n"
        "        threshold = int(",
        "examples_are_sampled_by_poisson",
    ),
    Mutant(
        "one batch for all steps",
        "privacy.sampling",
        'source.words(total, "rows", *step)',
        'source.words(total, "rows", *step[:1])',
        "examples_are_sampled_by_poisson",
    ),
    Mutant(
        "examples drawn in pairs",
        "privacy.sampling",
        "in enumerate(words_N.tolist())",
        "in enumerate(words_N.repeat(2)[:total].tolist())",
        "examples_are_sampled_by_poisson",
    ),
    Mutant(
        "q too large",
        "privacy.sampling",
        "int(self.sampling_probability * _WORDS)",
        "int(self.sampling_probability * 1.1 * _WORDS)",
        "examples_are_sampled_by_poisson",
    ),
    Mutant(
        "one prompt for the whole batch",
        "privacy.gradients",
        "source.detach().expand(count, *source.shape[1:])",
        "source.detach()",
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
        "last examples of a step dropped",
        "privacy.micro_batches",
        "range(0, len(group), size)",
        "range(0, len(group) - size + 1, size)",
        "one_example_moves_a_real_step_by_the_norm_at_most",
    ),
    Mutant(
        "copies that fill up counted as examples",
        "privacy.gradients",
        "part[: micro_batch.counted] for part in found",
        "part for part in found",
        "one_example_moves_a_real_step_by_the_norm_at_most",
    ),
    Mutant(
        "padded to the longest example of a micro-batch",
        "privacy.micro_batches",
        "for example in filled], length)",
        "for example in filled])",
        "an_example_s_calls_are_its_own",
    ),
    Mutant(
        "examples of a masked model that fill their call",
        "privacy.micro_batches",
        "len(task.examples[example].token_ids) + task.model.masked",
        "len(task.examples[example].token_ids)",
        "an_example_s_calls_are_its_own",
    ),
    Mutant(
        "places compared up to a tolerance",
        "privacy.batch_sizes",
        "(one == other) |",
        "torch.isclose(one, other, rtol=1e-4) |",
        "no_place_in_a_micro_batch_counts",
    ),
    Mutant(
        "the student's own weights alone are tried",
        "privacy.batch_sizes",
        "tasks = [task, replace(task, model=_with_random_weights(task, generator))]",
        "tasks = [task]",
        "no_place_in_a_micro_batch_counts",
    ),
    Mutant(
        "scores of a search not compared",
        "privacy.batch_sizes",
        "            if self._scored:\n",
        "            if False:\n",
        "no_place_in_a_micro_batch_counts",
    ),
    Mutant(
        "one example in each pass is not compared with others before it",
        "privacy.batch_sizes",
        "[[full], [short], [self._other()], [full], [short]]",
        "[[full]]",
        "no_place_in_a_micro_batch_counts",
    ),
    Mutant(
        "a size that failed is used",
        "privacy.batch_sizes",
        "        sizes[length] = _largest_size(checks, planned)\n",
        "        sizes[length] = _largest_size(checks, planned) and planned\n",
        "no_place_in_a_micro_batch_counts",
    ),
    Mutant(
        "repeated steps left out of epsilon at other deltas",
        "privacy.statement",
        '"epsilon_at_delta": cost.epsilon_at,\n        "true_positive',
        '"epsilon_at_delta": planned.epsilon_at,\n        "true_positive',
        "statements_hold_what_was_charged",
    ),
    Mutant(
        "repeated steps left out of the bound of attacks",
        "privacy.statement",
        'false": cost.true_positive_rate,\n        "not_covered"',
        'false": planned.true_positive_rate,\n        "not_covered"',
        "statements_hold_what_was_charged",
    ),
    Mutant(
        "a delta above 1 / N passes",
        "privacy.statement",
        "plan.delta >= 1 / examples",
        "plan.delta >= 1",
        "statements_hold_what_was_charged",
    ),
    Mutant(
        "another unit is believed",
        "privacy.statement",
        '"private": plan.private,\n        "unit": UNIT,',
        '"private": plan.private,',
        "statements_hold_what_was_charged",
    ),
    Mutant(
        "what is not covered may be left out",
        "privacy.statement",
        'if statement.get("not_covered") not in known:',
        "if False:",
        "statements_hold_what_was_charged",
    ),
    Mutant(
        "numbers of a data frame's column type",
        "data.sources",
        "if isinstance(value, float) and value.is_integer():",
        "if False:",
        "one_row_of_the_file_is_one_example_at_most",
    ),
    Mutant(
        "a key that others can read",
        "privacy.randomness",
        "status.st_uid != os.geteuid() or status.st_mode & 0o077",
        "False",
        "keys_come_from_the_operating_system_and_go",
    ),
    Mutant(
        "a key behind a link",
        "privacy.randomness",
        "os.O_RDONLY | os.O_NOFOLLOW",
        "os.O_RDONLY",
        "keys_come_from_the_operating_system_and_go",
    ),
    Mutant(
        "copies that fill up counted as right",
        "privacy.scoring",
        "matches_B[: micro_batch.counted].sum()",
        "matches_B.sum()",
        "a_score_counts_each_example_once",
    ),
    Mutant(
        "empty batch skipped",
        "privacy.trainer",
        "        for gradients in self._trainer",
        '        if not examples:\n            return ""\n        for gradients in self._trainer',
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
        "        self._intend(commitment)\n"
        "        # The commitment is part of the noise's name, so another sum gets "
        "independent noise.\n"
        '        noise = self._source.normal(sum(sizes), "noise", *place, commitment)\n',
        "        # The commitment is part of the noise's name, so another sum gets "
        "independent noise.\n"
        '        noise = self._source.normal(sum(sizes), "noise", *place, commitment)\n'
        "        self._intend(commitment)\n",
        "intents_are_on_disk_before_the_noise",
    ),
    Mutant(
        "intent not flushed",
        "privacy.ledger",
        "            os.fsync(self._descriptor)\n",
        "",
        "intents_are_on_disk_before_the_noise",
    ),
    Mutant(
        "budget of finished runs alone",
        "privacy.spending",
        "                plans += spending.plans()\n",
        "                plans += spending.plans() if spending.finished else []\n",
        "a_budget_adds_up_all_runs_and_holds_its_cap",
    ),
    Mutant(
        "cap compared with this run alone",
        "privacy.ledger",
        "plans = [*others, *own.at_the_end().plans()]",
        "plans = own.at_the_end().plans()",
        "a_budget_adds_up_all_runs_and_holds_its_cap",
    ),
    Mutant(
        "half of the steps accounted",
        "privacy.sampling",
        "SelfComposedDpEvent(step, steps)",
        "SelfComposedDpEvent(step, max(1, steps // 2))",
        "accountants_give_the_known_numbers",
    ),
    Mutant(
        "sigma rounded down",
        "privacy.accounting",
        "    multiples = math.ceil(math.exp(log_sigma) / _SIGMA_GRID)\n"
        "    # The coarse loss is the more pessimistic one, so the first multiple meets "
        "the target as a rule.\n"
        "    while True:\n"
        "        rounded = replace(plan, noise_multiplier=round(multiples * _SIGMA_GRID, "
        "4))\n"
        "        if _epsilon(rounded, _FINE) <= target:\n"
        "            return rounded\n",
        "    multiples = math.floor(math.exp(log_sigma) / _SIGMA_GRID)\n"
        "    while True:\n"
        "        return replace(plan, noise_multiplier=round(multiples * _SIGMA_GRID, "
        "4))\n",
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
        "if spending.repeated_steps else planned",
        "if False else planned",
        "statements_hold_what_was_charged",
    ),
    Mutant(
        "a repeated step priced as another sample",
        "privacy.plan",
        "                steps=count,\n"
        "                noise_multiplier=self.noise_multiplier / times**0.5,\n",
        "                steps=count * times,\n",
        "a_repeated_step_costs_what_its_one_sample_tells",
    ),
    Mutant(
        "a ledger put back from an older copy",
        "privacy.trainer",
        "        self._run.ledger.charge_done(self._trial, done)\n",
        "",
        "a_checkpoint_ahead_of_its_ledger_is_charged",
    ),
    Mutant(
        "another plan after a restart",
        "privacy.ledger",
        "if own.plan != plan:",
        "if False:",
        "a_run_keeps_its_plan",
    ),
    Mutant(
        "half an intent on a full disk",
        "privacy.ledger",
        "if written < len(data):",
        "if not written:",
        "a_full_disk_stops_a_step_before_its_noise",
    ),
    Mutant(
        "a loss that is too small",
        "privacy.accounting",
        "near_prv = prv - _PRV_BELOW <= pld <= prv + PRV_ABOVE",
        "near_prv = pld <= prv + PRV_ABOVE",
        "accountants_must_agree",
    ),
    Mutant(
        "claims taken at their word",
        "privacy.statement",
        "claimed < least - _TOLERANCE",
        "claimed < least - 100",
        "statements_hold_what_was_charged",
    ),
    Mutant(
        "fixed number of trials",
        "privacy.search",
        "    trials = 0\n",
        "    return round(plan.mean_trials)\n    trials = 0\n",
        "searches_stop_at_random_and_score_with_noise",
    ),
    Mutant(
        "score without noise",
        "privacy.search",
        "noise * float(plan.score_noise_multiplier or 0.0)",
        "noise * 0.0",
        "searches_stop_at_random_and_score_with_noise",
    ),
    Mutant(
        "first of two labels kept",
        "data.tasks",
        "del answer_of[text]",
        "pass",
        "one_row_of_the_file_is_one_example_at_most",
    ),
    Mutant(
        "a type for each column, from all its rows",
        "data.sources",
        "pd.DataFrame(rows, dtype=object)",
        "pd.DataFrame(rows)",
        "one_row_of_the_file_is_one_example_at_most",
    ),
    Mutant(
        "another q accounted than drawn",
        "privacy.sampling",
        "PoissonSampledDpEvent(self.sampling_probability, noise)",
        "PoissonSampledDpEvent(self.sampling_probability / 2, noise)",
        "the_accountants_hear_of_the_sampler_that_draws",
    ),
    Mutant(
        "score left out of the accounting",
        "privacy.plan",
        "if self.score_noise_multiplier is None:",
        "if True:",
        "the_library_composes_as_by_hand",
    ),
    Mutant(
        "search calibrated as a single run",
        "privacy.plan",
        "        if self.mean_trials is None:\n            return self.trial_event()\n",
        "        return self.trial_event()\n",
        "calibration_of_a_search_gives_the_known_noise",
    ),
    Mutant(
        "noise multipliers out of range",
        "privacy.accounting",
        "_MOST_SIGMA = 200.0\n",
        "_MOST_SIGMA = 1e6\n",
        "calibration_refuses_targets_out_of_range",
    ),
]


@contextmanager
def planted(mutant: Mutant) -> Iterator[None]:
    """Execute the package's modules with the bug in one of them, and restore them afterwards."""
    modules = [checks.part(name) for name in MODULES]
    before = [dict(vars(module)) for module in modules]
    try:
        for name, module in zip(MODULES, modules, strict=True):
            source = Path(module.__file__).read_text()
            if name == mutant.module:
                found = source.count(mutant.source)
                assert found == 1, f"{mutant.name}: the source text occurs {found} times"
                source = source.replace(mutant.source, mutant.bug)
            exec(compile(source, module.__file__, "exec"), vars(module))
        yield
    finally:
        for module, names in zip(modules, before, strict=True):
            vars(module).clear()
            vars(module).update(names)


CHECKS = {}
for module in (checks, gradient_checks, ledger_checks, spending_checks):
    for check in module.CHECKS:
        CHECKS[check.__name__] = check
TRIED: list[str] = []
KILLED: list[str] = []
SLOW = {
    "accountants_give_the_known_numbers",
    "calibration_meets_its_target_from_below",
    "calibration_of_a_search_gives_the_known_noise",
    "calibration_refuses_targets_out_of_range",
    "the_library_composes_as_by_hand",
}


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
    for check in {mutant.killer for mutant in MUTANTS} - SLOW:
        CHECKS[check]()
