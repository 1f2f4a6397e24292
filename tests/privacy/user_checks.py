"""Checks of privacy for all examples of a user together."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from privacy.checks import CPU, folder, noisy_sums, part, plan_of, quiet_source
from privacy.gradient_checks import tuning_task
from privacy.ledger_checks import open_ledger, refused

USERS = [0, 1, 0, 2, 1, 0, 2]
"""The user of each of the seven examples."""


def user_sum(users: list[int], **changes: Any) -> tuple[torch.Tensor, int]:
    """Return the clipped sum of a step on some users, and the number of gradients in it."""
    task = replace(tuning_task("llama", torch.float32), users=USERS, **changes)
    parameters = [task.start_nd.float(), torch.tensor([0.2, -0.1])]
    sizes = part("privacy.micro_batches").planned_sizes(task, 4)
    pieces = list(part("privacy.gradients").unit_gradients(task, parameters, users, sizes, CPU))
    shapes = [parameter.shape for parameter in parameters]
    sums = noisy_sums(pieces, shapes, source=quiet_source(), max_grad_norm=1e-3)
    return torch.cat([total.flatten() for total in sums]), sum(len(piece[0]) for piece in pieces)


def a_user_moves_a_step_by_the_norm_at_most() -> None:
    whole, counted = user_sum([0, 1, 2])
    assert counted == 3
    for left_out in range(3):
        others = [user for user in range(3) if user != left_out]
        moved = float((whole - user_sum(others)[0]).norm()) / 1e-3
        assert 1 - 1e-5 <= moved <= 1 + 1e-6, f"user {left_out} moves the sum by {moved:.7f} C"


def a_user_s_gradient_is_the_sum_over_all_examples() -> None:
    task = replace(tuning_task("llama", torch.float32), users=USERS)
    parameters = [task.start_nd.float()]
    sizes = part("privacy.micro_batches").planned_sizes(task, 4)
    unit_gradients = part("privacy.gradients").unit_gradients
    single = replace(task, users=())
    alone = {}
    for example in range(7):
        ((gradient,),) = unit_gradients(single, parameters, [example], sizes, CPU)
        alone[example] = gradient[0].double()
    ((together,),) = unit_gradients(task, parameters, [0, 2], sizes, CPU)
    for row, user in enumerate((0, 2)):
        expected = sum(alone[example] for example in range(7) if USERS[example] == user)
        torch.testing.assert_close(together[row], expected, rtol=1e-6, atol=1e-9)


def a_user_changes_no_other_user_s_examples() -> None:
    from post_dist.config.sources import Task

    rows = [
        ("a", 0, "u"),
        ("b", 1, "u"),
        ("a", 1, "v"),
        ("c", 0, "v"),
        ("c", 1, "v"),
        ("d", 1, "w"),
    ]
    of_others = {("a", 0), ("b", 1), ("a", 1), ("d", 1)}

    def examples(more: list[tuple[str, int, str]], split: str = "train", **changes: Any) -> Any:
        with folder() as place:
            path = place / "t.csv"
            lines = [f"{text},{label},{user}\n" for text, label, user in [*rows, *more]]
            path.write_text("text,label,user\n" + "".join(lines))
            section = Task.model_validate(
                {
                    "name": "t",
                    "visibility": "private",
                    "path": path,
                    "template": "{text} x",
                    "labels": {0: ["bad"], 1: ["good"]},
                    "user_column": "user",
                    "test_share": 0,
                    "validation_share": 0,
                }
                | changes
            )
            return part("data.tasks").load_examples(section, split, "t")

    base = examples([])
    assert set(zip(base.texts, base.classes, strict=True)) == of_others
    assert base.users == [0, 0, 1, 2]
    loaded = examples([("a", 1, "x"), ("b", 0, "x"), ("d", 0, "x"), ("d", 1, "x")])
    kept = list(zip(loaded.texts, loaded.classes, loaded.users, strict=True))
    assert [row for row in kept if row[2] < 3] == list(
        zip(base.texts, base.classes, base.users, strict=True)
    )
    assert sorted(row[:2] for row in kept if row[2] == 3) == [("a", 1), ("b", 0)]
    # All examples of a user are in one split.
    names = [f"user {number}" for number in range(40)] + [
        f" user {number} " for number in range(40)
    ]
    many = [(f"text {number}", 0, names[number % 80]) for number in range(400)]
    halves = {"validation_share": 0.5}
    sizes = [len(set(examples(many, split, **halves).users)) for split in ("train", "validation")]
    assert sum(sizes) == 43, "a user is in two splits"


def a_plan_for_users_says_so() -> None:
    from post_dist.config.schema import RunConfig

    task = {"name": "sst2", "visibility": "private", "path": "t.csv", "user_column": "user"}
    privacy = {"enabled": True, "declared_examples": 6000, "noise_multiplier": 1.0}
    fields = {"name": "a", "private_task": task, "privacy": privacy}
    plan = part("privacy.calibration").private_plan(RunConfig.model_validate(fields))
    assert plan.unit == "one user"


def units_do_not_mix_in_a_ledger() -> None:
    ledger = part("privacy.ledger")
    with folder() as place:
        with open_ledger(place) as opened:
            ledger.LedgerRun(opened, "a", plan_of(), None)
        with open_ledger(place) as opened:
            start = partial(ledger.LedgerRun, opened, "b", plan_of(unit="one user"), None)
            assert refused(start, "PrivacyRefused", "this run protects one user")


CHECKS: list[Callable[[], None]] = [
    a_user_moves_a_step_by_the_norm_at_most,
    a_user_s_gradient_is_the_sum_over_all_examples,
    a_user_changes_no_other_user_s_examples,
    a_plan_for_users_says_so,
    units_do_not_mix_in_a_ledger,
]
