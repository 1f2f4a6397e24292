"""Bugs that published or plausible DP code has, each with the check that must detect it."""

from dataclasses import dataclass


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
        "norm_B = torch.stack([part.square().sum(dim=1) for part in flat]).sum(dim=0).sqrt()",
        "squares = [part.nan_to_num(0, 0, 0).sum(dim=0).square().sum() for part in flat]\n"
        "        norm_B = torch.stack(squares).sum().sqrt().expand(len(flat[0]))",
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
        "        factor_B = torch.where(finite_B, self._grid_factors(norm_B), 0.0)\n",
        "        factor_B = torch.where(finite_B, self._grid_factors(norm_B), 0.0)\n"
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
        "kernels = replace(task, model=_with_random_weights(task, generator))",
        "kernels = task",
        "no_place_in_a_micro_batch_counts",
    ),
    Mutant(
        "scores of a search not compared",
        "privacy.tuned_prompt",
        "            if section.counts_right:\n",
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
        '"epsilon_at_delta": cost.epsilon_at,\n        "epsilon_for',
        '"epsilon_at_delta": planned.epsilon_at,\n        "epsilon_for',
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
        "another unit is believed",
        "privacy.plan",
        "if self.unit not in (ONE_EXAMPLE, ONE_USER):",
        "if False:",
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
        '        if not units:\n            return ""\n        for gradients in self._trainer',
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
        "privacy.calibration",
        "    multiples = math.ceil(math.exp(log_sigma) / _SIGMA_GRID)\n"
        "    # The coarse loss is the more pessimistic one, so the first multiple meets "
        "the target as a rule.\n"
        "    while True:\n"
        "        rounded = replace(plan, noise_multiplier=round(multiples * _SIGMA_GRID, "
        "4))\n"
        "        if epsilon_of(rounded, FINE) <= target:\n"
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
        "planned if spending.is_as_planned else",
        "planned if True else",
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
        "comparison with the start without noise",
        "privacy.comparison",
        "noisy_score(difference, self._run.plan, self._run.source, trial=0)",
        "difference",
        "a_comparison_has_the_noise_of_the_plan",
    ),
    Mutant(
        "comparison with the start drawn again after the key is gone",
        "privacy.comparison",
        "        if not self._file.exists():\n            difference",
        "        if True:\n            difference",
        "a_comparison_has_the_noise_of_the_plan",
    ),
    Mutant(
        "comparison with the start not charged",
        "privacy.plan",
        "compared = None if plans else score_noise",
        "compared = None",
        "a_comparison_is_charged_once",
    ),
    Mutant(
        "second count of a comparison not charged",
        "privacy.plan",
        "counts = max(told, default=1)",
        "counts = 1",
        "a_count_that_is_told_twice_is_charged_twice",
    ),
    Mutant(
        "second score of a trial not charged",
        "privacy.plan",
        "if score_noise is not None and not plans:",
        "if False:",
        "a_count_that_is_told_twice_is_charged_twice",
    ),
    Mutant(
        "count told before the ledger has it",
        "privacy.search",
        "    run.ledger.intend_score(trial, commitment)\n",
        "    pass\n",
        "a_count_that_is_told_twice_is_charged_twice",
    ),
    Mutant(
        "counts of the ledger not read",
        "privacy.spending",
        'scores.setdefault(int(row["trial"]), set()).add(str(row["commitment"]))',
        'scores.setdefault(int(row["trial"]), set()).add("")',
        "a_count_that_is_told_twice_is_charged_twice",
    ),
    Mutant(
        "comparison with the start left out of a statement",
        "privacy.statement",
        'tune.get("comparison_noise_multiplier")',
        "None",
        "a_comparison_is_in_the_statement",
    ),
    Mutant(
        "search of a manifest left out of its claim",
        "privacy.statement",
        'search.get("mean_trials")',
        "None",
        "a_statement_has_the_search_and_the_target_of_its_settings",
    ),
    Mutant(
        "claim far below the wanted epsilon",
        "privacy.statement",
        "_is_between(claim, 0, _LEAST_SHARE_OF_TARGET * target)",
        "False",
        "a_statement_has_the_search_and_the_target_of_its_settings",
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
        "del answer_of[key]",
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
        "privacy.calibration",
        "_MOST_SIGMA = 200.0\n",
        "_MOST_SIGMA = 1e6\n",
        "calibration_refuses_targets_out_of_range",
    ),
    Mutant(
        "a run admitted by the steps that it has begun",
        "privacy.ledger",
        "*own.at_the_end().plans()",
        "*own.plans()",
        "a_run_is_admitted_by_what_it_will_have_spent",
    ),
    Mutant(
        "repeats not compared with the cap",
        "privacy.ledger",
        "        if known:\n            intents",
        "        if False:\n            intents",
        "a_run_is_admitted_by_what_it_will_have_spent",
    ),
    Mutant(
        "cap compared at the run's own delta",
        "privacy.ledger",
        "composed_epsilon(plans, self._cap.delta)",
        "composed_epsilon(plans, self._plan.delta)",
        "the_cap_belongs_to_the_data",
    ),
    Mutant(
        "a run file raises the cap",
        "privacy.ledger",
        "if cap is not None and cap != recorded.epsilon:",
        "if cap is not None and cap > recorded.epsilon:\n        return Cap(cap, plan.delta)\n"
        "    if False:",
        "the_cap_belongs_to_the_data",
    ),
    Mutant(
        "a run file without a cap has none",
        "privacy.ledger",
        "    return recorded\n",
        "    return Cap(cap, plan.delta)\n",
        "the_cap_belongs_to_the_data",
    ),
    Mutant(
        "a run may begin twice",
        "privacy.spending",
        'if row["run"] in self.runs:',
        "if False:",
        "a_ledger_keeps_all_its_rows",
    ),
    Mutant(
        "a ledger that was cut",
        "privacy.anchor",
        "len(lines) < rows or row_hash(lines[rows - 1]) != self.record.last",
        "len(lines) >= rows and row_hash(lines[rows - 1]) != self.record.last",
        "a_ledger_keeps_all_its_rows",
    ),
    Mutant(
        "a ledger that was computed anew",
        "privacy.anchor",
        "len(lines) < rows or row_hash(lines[rows - 1]) != self.record.last",
        "len(lines) < rows",
        "a_ledger_keeps_all_its_rows",
    ),
    Mutant(
        "an anchor that stays behind",
        "privacy.ledger",
        "        self._anchor.advance(self._rows, self._first, self._last)\n",
        "",
        "a_ledger_keeps_all_its_rows",
    ),
    Mutant(
        "a ledger for each copy of the data",
        "privacy.anchor",
        "if known:",
        "if False:",
        "copies_of_the_data_share_a_ledger",
    ),
    Mutant(
        "an anchor with the plain hash of the data",
        "privacy.anchor",
        "return hmac.new(self.salt.encode(), mark.encode(), hashlib.sha256).hexdigest()",
        "return mark",
        "copies_of_the_data_share_a_ledger",
    ),
    Mutant(
        "a lost ledger begins anew",
        "privacy.anchor",
        "if _first_row(ledger) == record.first:",
        "if True:",
        "copies_of_the_data_share_a_ledger",
    ),
    Mutant(
        "another ledger for known data",
        "privacy.anchor",
        "    if not may_move:\n",
        "    if False:\n",
        "copies_of_the_data_share_a_ledger",
    ),
    Mutant(
        "data that have spent from two ledgers",
        "privacy.anchor",
        "if anchor is not None and may_move:",
        "if False:",
        "data_with_two_ledgers_are_refused",
    ),
    Mutant(
        "a place that stays with two ledgers",
        "privacy.anchor",
        "other.write(other.record.without_data(marks))",
        "pass",
        "data_with_two_ledgers_are_refused",
    ),
    Mutant(
        "edited data get another ledger",
        "privacy.anchor",
        "    return (file_digest(data), f",
        "    return (file_digest(data),)\n    return (f",
        "copies_of_the_data_share_a_ledger",
    ),
    Mutant(
        "a ledger for each revision",
        "privacy.anchor",
        'f"hub {task.hub} {task.hub_config}"',
        'f"hub {task.hub} {task.revision}"',
        "hub_data_have_one_ledger",
    ),
    Mutant(
        "rows for a file that was replaced",
        "privacy.ledger",
        "        self._check_is_ours()\n",
        "",
        "no_step_goes_on_without_its_ledger",
    ),
    Mutant(
        "a row of somebody else is not noticed",
        "privacy.ledger",
        "if replaced or locked.st_size != self._size:",
        "if replaced:",
        "no_step_goes_on_without_its_ledger",
    ),
    Mutant(
        "the end of any file is removed",
        "privacy.spending",
        "    if not lines and not _ROW_START",
        "    if False and not _ROW_START",
        "a_file_that_is_no_ledger_stays_as_it_is",
    ),
    Mutant(
        "a whole row without a line break is dropped",
        "privacy.spending",
        "    if is_whole_row(last):",
        "    if False:",
        "a_row_without_its_line_break_is_charged",
    ),
    Mutant(
        "an old anchor",
        "privacy.ledger",
        "        anchor.read_again()\n",
        "",
        "an_anchor_forgets_nothing",
    ),
    Mutant(
        "an anchor of one run alone",
        "privacy.anchor",
        "            self.read_again()\n",
        "",
        "an_anchor_forgets_nothing",
    ),
    Mutant(
        "any plan in a ledger",
        "privacy.spending",
        "if plan.out_of_bounds():",
        "if False:",
        "no_plan_of_a_ledger_breaks_the_accountants",
    ),
    Mutant(
        "users and examples in one ledger",
        "privacy.ledger",
        "if others - {plan.unit}:",
        "if False:",
        "units_do_not_mix_in_a_ledger",
    ),
    Mutant(
        "a plan for users that claims examples",
        "privacy.plan",
        "unit=ONE_USER if config.protects_users else ONE_EXAMPLE",
        "unit=ONE_EXAMPLE",
        "a_plan_for_users_says_so",
    ),
    Mutant(
        "a user in two splits",
        "data.tasks",
        "_belongs(task, user or text, split)",
        "_belongs(task, text, split)",
        "a_user_changes_no_other_user_s_examples",
    ),
    Mutant(
        "users dispute each other's labels",
        "data.tasks",
        "        if answer_of.setdefault((user, text), answer) != answer:\n",
        "        for other, same in list(answer_of):\n"
        "            if same == text and answer_of[other, same] != answer:\n"
        "                disputed.add((other, same))\n"
        "        if answer_of.setdefault((user, text), answer) != answer:\n",
        "a_user_changes_no_other_user_s_examples",
    ),
    Mutant(
        "each example of a user clipped by itself",
        "privacy.gradients",
        "                    total[row_of[task.users[example]]] += part[place]\n"
        "        yield totals\n",
        "                    total[row_of[task.users[example]]] += part[place]\n"
        "            yield [part.double() for part in found]\n",
        "a_user_moves_a_step_by_the_norm_at_most",
    ),
    Mutant(
        "the first example of each user alone",
        "privacy.gradients",
        "for example in task.units[user]]",
        "for example in task.units[user][:1]]",
        "a_user_s_gradient_is_the_sum_over_all_examples",
    ),
    Mutant(
        "users whose gradients are mixed up",
        "privacy.gradients",
        "total[row_of[task.users[example]]] += part[place]",
        "total[place % len(users)] += part[place]",
        "a_user_s_gradient_is_the_sum_over_all_examples",
    ),
    Mutant(
        "a group that costs as much as one example",
        "privacy.accounting",
        "return float(size * high)",
        "return float(high)",
        "groups_cost_what_their_examples_tell_together",
    ),
    Mutant(
        "the delta of one example for a group",
        "privacy.accounting",
        "grown = math.expm1(size * epsilon) / math.expm1(epsilon)",
        "grown = 1.0",
        "groups_cost_what_their_examples_tell_together",
    ),
    Mutant(
        "repeated steps left out of the cost of groups",
        "privacy.statement",
        '"epsilon_for_groups": group_epsilons(spending.plans(), plan.delta)',
        '"epsilon_for_groups": group_epsilons([plan], plan.delta)',
        "groups_cost_what_their_examples_tell_together",
    ),
    Mutant(
        "attacks bounded at 0.1%",
        "privacy.accounting",
        "FALSE_POSITIVE_RATE = 0.01\n",
        "FALSE_POSITIVE_RATE = 0.001\n",
        "attacks_are_bounded_at_one_percent",
    ),
    Mutant(
        "epsilon at other deltas is that of the plan's",
        "privacy.accounting",
        "{name: float(accountant.get_epsilon(delta)) for name, delta in deltas.items()}",
        "{name: float(accountant.get_epsilon(plan.delta)) for name in deltas}",
        "attacks_are_bounded_at_one_percent",
    ),
    Mutant(
        "a seeded run beside a private one is believed",
        "privacy.accounting",
        "if any(not plan.private for plan in plans):",
        "if all(not plan.private for plan in plans):",
        "a_seeded_run_voids_the_others",
    ),
    Mutant(
        "no warning of a large delta",
        "privacy.plan",
        "if examples is None or self.delta < 1 / examples:",
        "if True:",
        "a_large_delta_is_warned_of",
    ),
    Mutant(
        "claims that are a little too good",
        "privacy.statement",
        "_TOLERANCE = 1e-3\n",
        "_TOLERANCE = 10.0\n",
        "statements_hold_what_was_charged",
    ),
    Mutant(
        "no noise on the class biases",
        "privacy.mechanism",
        "noisy = (total + drawn.view(total.shape)).double()",
        "noisy = (total + drawn.view(total.shape) * (total.numel() > 3)).double()",
        "every_parameter_gets_noise_of_its_own",
    ),
    Mutant(
        "less noise on a small parameter",
        "privacy.mechanism",
        "steps = torch.from_numpy(noise * (self.noise_multiplier * GRID)).round().long()",
        "noise[-3:] *= 0.8\n"
        "        steps = torch.from_numpy(noise * (self.noise_multiplier * GRID)).round().long()",
        "every_parameter_gets_noise_of_its_own",
    ),
    Mutant(
        "a key of 16 bits",
        "privacy.randomness",
        "key = secrets.token_bytes(_KEY_BYTES)",
        "key = secrets.token_bytes(_KEY_BYTES)[:2] + bytes(_KEY_BYTES - 2)",
        "every_byte_of_a_key_varies",
    ),
    Mutant(
        "a trial clips by its own norm, with the plan's noise",
        "privacy.trainer",
        "self._private = PrivateOptimizer(self._optimizer, plan, self._run.source, trial)",
        "self._private = PrivateOptimizer(self._optimizer, plan, self._run.source, trial)\n"
        "        ratio = trainer.run.plan.max_grad_norm / plan.max_grad_norm\n"
        "        self._private.noise_multiplier *= ratio",
        "a_run_is_gradient_descent_on_noisy_sums",
    ),
    Mutant(
        "a trial clips by the plan's norm",
        "privacy.trainer",
        "plan = replace(trainer.run.plan, max_grad_norm=settings.max_grad_norm)",
        "plan = replace(trainer.run.plan)",
        "a_run_is_gradient_descent_on_noisy_sums",
    ),
    Mutant(
        "half a step",
        "privacy.mechanism",
        "expected_batch_size=plan.expected_batch_size",
        "expected_batch_size=2 * plan.expected_batch_size",
        "a_run_is_gradient_descent_on_noisy_sums",
    ),
    Mutant(
        "a search keeps its worst trial",
        "privacy.search",
        'if score > best["score"]:',
        'if score < best["score"] or len(best) == 1:',
        "a_search_keeps_the_best_noisy_score",
    ),
    Mutant(
        "a search keeps its last trial",
        "privacy.search",
        'if score > best["score"]:',
        "if True:",
        "a_search_keeps_the_best_noisy_score",
    ),
    Mutant(
        "a search forgets its best trial when it is stopped",
        "privacy.search",
        "        best = load_tensors(kept, finished)\n",
        "        pass\n",
        "a_search_keeps_the_best_noisy_score",
    ),
    Mutant(
        "a search chooses by the true score",
        "privacy.search",
        "return count + noise *",
        "return count + 0 * noise *",
        "a_search_keeps_the_best_noisy_score",
    ),
    Mutant(
        "trials share the noise of their sums",
        "privacy.mechanism",
        "place = (self._trial, self._step_number)",
        "place = (0, self._step_number)",
        "trials_share_no_noise",
    ),
    Mutant(
        "trials share the noise of their scores",
        "privacy.search",
        'source.normal(1, "score", trial, count)',
        'source.normal(1, "score", count)',
        "trials_share_no_noise",
    ),
    Mutant(
        "noise without tails",
        "privacy.randomness",
        "values: np.ndarray = ndtri(uniform)",
        "values: np.ndarray = ndtri(uniform.clip(0.01, 0.99))",
        "noise_has_tails_and_many_values",
    ),
    Mutant(
        "noise of few values",
        "privacy.randomness",
        "_UNIFORM_BITS = 52\n",
        "_UNIFORM_BITS = 6\n",
        "noise_has_tails_and_many_values",
    ),
    Mutant(
        "a ledger that is read before its anchor",
        "privacy.budget",
        """    anchor = _anchor(path, anchors)
    lines = ledger_lines(path)
    if anchor""",
        """    lines = ledger_lines(path)
    anchor = _anchor(path, anchors)
    if anchor""",
        "a_run_may_go_on_while_its_budget_is_added_up",
    ),
    Mutant(
        "anchors below a relative home",
        "privacy.anchor",
        "    if not around.is_absolute():\n        raise InputError(",
        "    if not str(around):\n        raise InputError(",
        "a_home_without_a_fixed_place_keeps_no_anchors",
    ),
    Mutant(
        "connections while private data are in memory",
        "runtime.private_process",
        "    _Hook.refuses = True\n",
        "    _Hook.refuses = False\n",
        "a_private_process_makes_no_connection",
    ),
    Mutant(
        "datagrams while private data are in memory",
        "runtime.private_process",
        '"socket.bind", "socket.sendto",',
        '"socket.bind",',
        "a_private_process_makes_no_connection",
    ),
    Mutant(
        "name lookups while private data are in memory",
        "runtime.private_process",
        "if connects or event in _LOOKUPS:",
        "if connects:",
        "a_private_process_makes_no_connection",
    ),
    Mutant(
        "files that a group can read",
        "runtime.private_process",
        "_OWNER_ONLY = 0o077\n",
        "_OWNER_ONLY = 0o027\n",
        "files_of_a_private_process_are_the_owner_s_alone",
    ),
    Mutant(
        "core dumps with private data",
        "runtime.private_process",
        "resource.setrlimit(resource.RLIMIT_CORE, (0, hard_limit))",
        "pass",
        "files_of_a_private_process_are_the_owner_s_alone",
    ),
    Mutant(
        "number of examples in the log",
        "privacy.private_run",
        "    _log_cost(plan)\n",
        "    _log_cost(plan)\n    log.info('tune: %d examples', len(task.examples))\n",
        "neighbors_leave_the_same_traces",
    ),
    Mutant(
        "length of the longest text in the log",
        "stages.tune.stage",
        "    precision = choose_precision(",
        "    log.info('tune: up to %d characters', max(map(len, loaded.texts)))\n"
        "    precision = choose_precision(",
        "neighbors_leave_the_same_traces",
    ),
    Mutant(
        "class balance in the card",
        "stages.tune.artifact",
        "_write_card(artifact, folder.config, contents.privacy, model)",
        "balance = {'balance': float(task.targets.double().mean())}\n"
        "        claims = (contents.privacy or {}) | balance\n"
        "        _write_card(artifact, folder.config, claims, model)",
        "neighbors_leave_the_same_traces",
    ),
    Mutant(
        "number of examples in the claim",
        "privacy.tuned_prompt",
        "PromptContents(parameters[0], prompt_task, statement)",
        "PromptContents(parameters[0], prompt_task, (statement or {}) | {'n': len(task.units)})",
        "neighbors_leave_the_same_traces",
    ),
    Mutant(
        "number of examples in the manifest",
        "stages.tune.artifact",
        "parents=_parents(model),",
        'parents=_parents(model) | {"n": str(len(task.examples))},',
        "neighbors_leave_the_same_traces",
    ),
    Mutant(
        "length of the longest text in the task",
        "privacy.tuned_prompt",
        "        prompt_task = task.reader.task\n",
        "        longest = max(len(example.token_ids) for example in task.examples)\n"
        "        prompt_task = replace(task.reader.task, max_length=longest)\n",
        "neighbors_leave_the_same_traces",
    ),
    Mutant(
        "number of examples in a file's name",
        "stages.tune.artifact",
        "    provenance = Provenance(",
        "    (folder.path / f'of-{len(task.examples)}').touch()\n    provenance = Provenance(",
        "neighbors_leave_the_same_traces",
    ),
    Mutant(
        "number of examples in a file's mode",
        "stages.tune.artifact",
        "    provenance = Provenance(",
        "    (folder.path / 'lock').with_name('resolved.yaml').chmod(\n"
        "        0o600 + 0o100 * (len(task.examples) % 2)\n"
        "    )\n"
        "    provenance = Provenance(",
        "neighbors_leave_the_same_traces",
    ),
    Mutant(
        "number of examples in the exit code",
        "stages.tune.artifact",
        "    provenance = Provenance(",
        "    if len(task.examples) % 2:\n"
        "        from post_dist.errors import InputError\n\n"
        "        raise InputError('an odd number')\n"
        "    provenance = Provenance(",
        "neighbors_leave_the_same_traces",
    ),
    Mutant(
        "realized batch size in the checkpoint",
        "privacy.trainer",
        "        save_tensors(self._checkpoints, step, state)\n",
        "        total = len(self._trainer.part.units)\n"
        "        drawn = self._sampler.draw(self._run.source, total, self._trial, step - 1)\n"
        "        state['batch'] = torch.tensor(float(len(drawn)))\n"
        "        save_tensors(self._checkpoints, step, state)\n",
        "neighbors_leave_the_same_traces",
    ),
    Mutant(
        "an initial prompt from the private texts",
        "stages.tune.stage",
        "model, tokenizer, prompt_task.init_text, section.num_virtual_tokens",
        "model, tokenizer, loaded.texts[-1], section.num_virtual_tokens",
        "neighbors_leave_the_same_traces",
    ),
    Mutant(
        "a folder's name from the data",
        "artifacts.run_folder",
        "keyed = hmac.new(key, signature.encode(), hashlib.sha256).hexdigest()",
        "keyed = signature",
        "the_name_of_a_run_tells_nothing_of_its_data",
    ),
    Mutant(
        "a quantile without noise",
        "privacy.mechanism",
        "noisy_count = int(self._unclipped) / 2 + noise * self._plan.count_deviation",
        "noisy_count = int(self._unclipped) / 2",
        "the_clipping_norm_moves_by_a_noisy_quantile",
    ),
    Mutant(
        "a quantile that costs nothing",
        "privacy.mechanism",
        "noise_multiplier=plan.gradient_noise_multiplier",
        "noise_multiplier=plan.noise_multiplier",
        "the_clipping_norm_moves_by_a_noisy_quantile",
    ),
    Mutant(
        "the same noise on every quantile",
        "privacy.mechanism",
        'self._source.normal(1, "unclipped", *name)',
        'self._source.normal(1, "unclipped")',
        "the_clipping_norm_moves_by_a_noisy_quantile",
    ),
    Mutant(
        "a quantile of all steps so far",
        "privacy.mechanism",
        "        self._unclipped = 0\n\n    def _adapt_norm",
        "\n    def _adapt_norm",
        "the_clipping_norm_follows_its_quantile",
    ),
    Mutant(
        "gradients that are not finite count as small ones",
        "privacy.mechanism",
        "unclipped_B = finite_B & (norm_B <= self.max_grad_norm)",
        "unclipped_B = ~finite_B | (norm_B <= self.max_grad_norm)",
        "the_clipping_norm_follows_its_quantile",
    ),
    Mutant(
        "a head's gradient of another example's feature",
        "privacy.tuned_head",
        "self._feature_m[:] = inputs.features_Nm[example]",
        "self._feature_m[:] = inputs.features_Nm[example - 1]",
        "a_head_s_gradients_are_those_of_its_loss",
    ),
    Mutant(
        "the last example of a user alone moves a head",
        "privacy.tuned_head",
        "weight_BCm[row] += np.outer",
        "weight_BCm[row] = np.outer",
        "a_head_s_gradients_are_those_of_its_loss",
    ),
    Mutant(
        "a head without the scores of the label words",
        "privacy.tuned_head",
        "inputs.scores_NC[example] + weight_Cm",
        "weight_Cm",
        "a_head_s_gradients_are_those_of_its_loss",
    ),
    Mutant(
        "units of a head that do not fit into memory are left out",
        "privacy.tuned_head",
        "        for start in range(0, len(units), at_once):\n",
        "        for start in range(0, min(1, len(units)), at_once):\n",
        "one_unit_moves_a_head_by_the_norm_at_most",
    ),
    Mutant(
        "features of a head from one micro-batch of all examples",
        "privacy.tuned_head",
        "micro_batches(task, range(count), sizes, world.device)",
        "micro_batches(task, range(count), dict.fromkeys(sizes, count), world.device)",
        "no_example_changes_what_a_head_reads_of_another",
    ),
    Mutant(
        "features standardized by the private examples",
        "privacy.tuned_head",
        "    return HeadInputs(features_Nm, scores_NC",
        "    features_Nm -= features_Nm.mean(axis=0)\n    return HeadInputs(features_Nm, scores_NC",
        "no_example_changes_what_a_head_reads_of_another",
    ),
    Mutant(
        "a validation example of a head counted whatever its class",
        "privacy.tuned_head",
        "right += int(p_C.argmax() == label)",
        "right += int(p_C.argmax() >= 0)",
        "a_head_reads_the_prompted_student",
    ),
    Mutant(
        "number of examples in the watchdog's phase of a head, and so in the log",
        "privacy.tuned_head",
        "    count = len(task.examples)\n",
        "    count = len(task.examples)\n"
        "    import logging\n\n"
        "    logging.getLogger(__name__).info('tune: %d features', count)\n",
        "neighbors_leave_the_same_traces",
    ),
    Mutant(
        "mean of a head moved by the private examples",
        "privacy.tuned_head",
        "        head = task.need(LinearHead).with_values(weight, bias)\n",
        "        from dataclasses import replace\n\n"
        "        shifted = replace(task.adapter, mean=task.adapter.mean + len(task.examples))\n"
        "        head = shifted.with_values(weight, bias)\n",
        "neighbors_leave_the_same_traces",
    ),
    Mutant(
        "hidden states of a head not compared at other places",
        "privacy.tuned_head",
        "        return lambda batch, targets: list(states(batch))\n",
        "        return lambda batch, targets: [torch.zeros(len(targets))]\n",
        "no_place_counts_for_a_head",
    ),
    Mutant(
        "a run that resumes with its first clipping norm",
        "privacy.trainer",
        "if done and self._adapts:",
        "if False:",
        "an_adaptive_run_resumes_with_its_norm",
    ),
    Mutant(
        "one LoRA for the whole batch",
        "privacy.tuned_adapter",
        "value.detach().expand(len(targets), *value.shape)",
        "value.detach().clone()",
        "a_lora_s_gradients_are_each_example_s_own",
    ),
    Mutant(
        "mean of losses of a LoRA before the clip",
        "privacy.tuned_adapter",
        "torch.autograd.grad(losses_B.sum(), copies)",
        "torch.autograd.grad(losses_B.mean(), copies)",
        "a_lora_s_gradients_are_each_example_s_own",
    ),
    Mutant(
        "the prompt in front of a LoRA left out",
        "privacy.tuned_lora",
        "PromptInput(prompt=task.start_nd, shared=shared)",
        "PromptInput()",
        "a_lora_s_gradients_are_each_example_s_own",
    ),
    Mutant(
        "a LoRA's product without its scale",
        "models.adapted",
        "(self._scale * product)",
        "product",
        "a_lora_s_gradients_are_each_example_s_own",
    ),
    Mutant(
        "upper layers of a LoRA counted from the bottom",
        "models.lora_layers",
        "layers[-(settings.upper_layers or len(layers)) :]",
        "layers[: settings.upper_layers or len(layers)]",
        "a_lora_changes_the_upper_layers",
    ),
    Mutant(
        "outputs of the lower layers of another text",
        "privacy.lower_states",
        "row[:length]",
        "row[:2]",
        "layers_below_a_lora_run_once",
    ),
    Mutant(
        "time of a run that follows from the number of examples",
        "privacy.tuned_lora",
        "not are_kept(declared_plan(self.config, 1.0), of_example)",
        "not len(self.task.examples) < 50",
        "declared_numbers_decide_whether_lower_states_are_kept",
    ),
    Mutant(
        "factors of a LoRA beside the rows of other examples",
        "models.adapted",
        "if self._down.dim() == 3 and",
        "if False and",
        "layers_that_mix_the_rows_of_examples_are_refused",
    ),
    Mutant(
        "gradients of a LoRA not compared at other places",
        "privacy.tuned_adapter",
        "            found = gradients(batch, targets)\n",
        "            found = [torch.zeros(len(targets))]\n",
        "no_place_counts_for_a_lora",
    ),
    Mutant(
        "scores of a search over LoRAs not compared",
        "privacy.tuned_adapter",
        "            if section.counts_right:\n",
        "            if False:\n",
        "no_place_counts_for_a_lora",
    ),
    Mutant(
        "a LoRA scored without its factors",
        "privacy.tuned_adapter",
        "        with adapted(self.task.model, self._with(parameters)):\n"
        "            return count_right",
        "        with adapted(self.task.model, None):\n            return count_right",
        "a_lora_is_scored_as_evaluate_does",
    ),
    Mutant(
        "number of examples in the alpha of a LoRA",
        "privacy.tuned_adapter",
        "        adapter = task.need(cls.kind).with_values(parameters)\n",
        "        adapter = task.need(cls.kind).with_values(parameters)\n"
        "        if isinstance(adapter, Lora):\n"
        "            adapter = Lora(adapter.factors, len(task.examples))\n",
        "neighbors_leave_the_same_traces",
    ),
    Mutant(
        "one prefix for the whole batch",
        "privacy.tuned_adapter",
        "value.detach().expand(len(targets), *value.shape)",
        "value.detach().clone()",
        "a_prefix_s_gradients_are_each_example_s_own",
    ),
    Mutant(
        "mean of losses behind a prefix before the clip",
        "privacy.tuned_adapter",
        "torch.autograd.grad(losses_B.sum(), copies)",
        "torch.autograd.grad(losses_B.mean(), copies)",
        "a_prefix_s_gradients_are_each_example_s_own",
    ),
    Mutant(
        "the prompt run behind its own prefix",
        "models.language_model",
        "            prompt, prefix, share_prompt = None, self._in_place, False\n",
        "            prefix = self._in_place\n",
        "a_prefix_starts_as_its_prompt",
    ),
    Mutant(
        "a prefix that does not start as its prompt",
        "models.prefix_layers",
        "part[0].to(wide) for part in",
        "torch.zeros_like(part[0]).to(wide) for part in",
        "a_prefix_starts_as_its_prompt",
    ),
    Mutant(
        "gradients of a prefix not compared at other places",
        "privacy.tuned_adapter",
        "            found = gradients(batch, targets)\n",
        "            found = [torch.zeros(len(targets))]\n",
        "no_place_counts_for_a_prefix",
    ),
    Mutant(
        "scores of a search over prefixes not compared",
        "privacy.tuned_adapter",
        "            if section.counts_right:\n",
        "            if False:\n",
        "no_place_counts_for_a_prefix",
    ),
    Mutant(
        "a prefix scored without its values",
        "privacy.tuned_adapter",
        "        with adapted(self.task.model, self._with(parameters)):\n"
        "            return count_right",
        "        with adapted(self.task.model, None):\n            return count_right",
        "a_prefix_is_scored_as_evaluate_does",
    ),
    Mutant(
        "trials of a search that go on with the prefix of the last one",
        "privacy.tuned_adapter",
        "value.to(self.world.device, copy=True) for value in values",
        "value.to(self.world.device) for value in values",
        "a_prefix_starts_as_its_prompt",
    ),
]
