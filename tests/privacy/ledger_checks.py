"""Checks of the training loop, the ledger and a restart, like those of `checks.py`."""

import hashlib
import json
import math
import os
import resource
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from privacy.checks import (
    CPU,
    folder,
    fresh_source,
    on_a_coarse_grid,
    part,
    plan_of,
    quiet_source,
)

from post_dist.runtime.distributed import World


class ToyPart:
    """20 examples and a parameter of 50 numbers, in place of a prompt.

    The gradient of example e has its weight in coordinate e.
    """

    kind: type[torch.optim.Optimizer] = torch.optim.Adam

    def __init__(self, scale: float) -> None:
        self.units = [[example] for example in range(20)]
        self._scale = scale

    def parameters(self) -> list[torch.Tensor]:
        return [torch.zeros(50)]

    def optimizer(
        self, parameters: list[torch.Tensor], learning_rate: float, steps: int
    ) -> torch.optim.Optimizer:
        return self.kind(parameters, lr=learning_rate)

    def gradients(
        self, parameters: Sequence[torch.Tensor], units: Sequence[int]
    ) -> Iterator[list[torch.Tensor]]:
        for start in range(0, len(units), 2):
            chunk = units[start : start + 2]
            gradients = torch.zeros(len(chunk), 50)
            gradients[torch.arange(len(chunk)), torch.tensor(chunk)] = self._scale
            yield [gradients]


def open_ledger(place: Path) -> AbstractContextManager[Any]:
    """Open the ledger of a folder, which also holds the anchors."""
    anchor = part("privacy.anchor").claim_anchor(
        place / "anchors", place / "ledger.jsonl", (), may_move=True
    )
    return part("privacy.ledger").lock_ledger(anchor)


def train_toy(
    place: Path,
    source: Any,
    plan: Any,
    *,
    cap: float | None = None,
    scale: float = 1.0,
    norm: float | None = None,
    finish: bool = True,
) -> torch.Tensor:
    """Train 50 numbers privately in a folder; resumes from what it finds there."""
    from post_dist.config.schema import RunConfig

    trainer = part("privacy.trainer")
    ledger = part("privacy.ledger")

    config = RunConfig.model_validate({"name": "toy", "tune": {"schedule": "constant"}})
    with open_ledger(place) as opened:
        held = ledger.LedgerRun(opened, source.run, plan, cap)
        checkpoints = place / "checkpoints" / source.run
        world = World(0, 1, 0, "none", CPU)
        run = trainer.PrivateRun(plan, source, held, checkpoints, "toy", world)
        settings = trainer.TrialSettings(0.1, norm or plan.max_grad_norm)
        (parameter,) = trainer.PrivateTrainer(ToyPart(scale), config, run).train(
            settings, 0, checkpoints
        )
        if finish:
            held.finish()
    return parameter.detach()


def spendings(place: Path) -> dict[str, Any]:
    return part("privacy.spending").read_ledger(place / "ledger.jsonl").runs


def every_step_is_charged_and_noised_also_when_empty() -> None:
    trainer = part("privacy.trainer")
    save = trainer.save_tensors
    states = []

    def watched(checkpoints: Path, step: int, tensors: dict[str, torch.Tensor]) -> None:
        states.append(tensors["0"].detach().clone())
        save(checkpoints, step, tensors)

    with folder() as place:
        plan = plan_of(sampling_probability=1e-9, steps=4)
        with mock.patch.object(trainer, "save_tensors", watched):
            train_toy(place, fresh_source(), plan)
        assert len(states) == 4, "a step without examples was skipped"
        for before, after in pairwise([torch.zeros(50), *states]):
            assert not torch.equal(before, after)
        assert spendings(place)["run"].charged_steps == 4


def a_run_is_gradient_descent_on_noisy_sums() -> None:
    """The parameters move by the rate times the mean of the clipped gradients and the noise.

    Also where a trial has another clipping norm than the plan.
    """
    plan = plan_of(sampling_probability=1.0)
    for norm in (0.3, 0.02):
        # Each of the 20 examples has its gradient in a coordinate of its own.
        clipped = torch.zeros(50)
        clipped[:20] = norm
        with mock.patch.object(ToyPart, "kind", torch.optim.SGD):
            with folder() as place:
                moved = train_toy(place, quiet_source(), plan, norm=norm)
            torch.testing.assert_close(moved, -0.1 * 6 * clipped / 64, rtol=1e-5, atol=1e-8)
            noises = []
            for number in range(20):
                with folder() as place:
                    moved = train_toy(place, fresh_source(str(number)), plan, norm=norm)
                noises.append(moved / -0.1 * 64 - 6 * clipped)
        deviation = float(torch.stack(noises).std()) / (0.7 * norm * 6**0.5)
        assert abs(deviation - 1) < 0.15, f"the noise of a trial is {deviation:.2f} of the plan's"


def intents_are_on_disk_before_the_noise() -> None:
    source = fresh_source()
    kind = type(source)
    normal = kind.normal
    fsync = os.fsync
    intents = []
    flushes = []
    synced = []

    with folder() as place:

        def watched_normal(self: Any, count: int, *purpose: object) -> np.ndarray:
            if purpose and purpose[0] == "noise":
                lines = (place / "ledger.jsonl").read_text().splitlines()
                steps = [line for line in lines if json.loads(line)["row"] == "step"]
                intents.append(len(steps))
                flushes.append(len(synced))
            return normal(self, count, *purpose)

        def watched_fsync(descriptor: int) -> None:
            if os.readlink(f"/proc/self/fd/{descriptor}").endswith("ledger.jsonl"):
                synced.append(descriptor)
            fsync(descriptor)

        with (
            mock.patch.object(kind, "normal", watched_normal),
            mock.patch.object(os, "fsync", watched_fsync),
        ):
            train_toy(place, source, plan_of())
    assert intents == [1, 2, 3, 4, 5, 6]
    assert flushes == [3, 4, 5, 6, 7, 8], "an intent was not flushed"


def a_restart_repeats_or_pays() -> None:
    with folder() as place:
        source = fresh_source()
        plan = plan_of()
        kept = place / "checkpoints" / "run"
        straight = train_toy(place, source, plan)
        assert spendings(place)["run"].charged_steps == 6

        shutil.rmtree(kept)
        again = train_toy(place, source, plan)
        assert torch.equal(again, straight), "the same run again must be the same"
        charged = spendings(place)["run"].charged_steps
        assert charged == 6, "a repeated step was charged though its noise is the same"

        shutil.rmtree(kept)
        train_toy(place, source, plan, scale=0.01)
        charged = spendings(place)["run"].charged_steps
        assert charged > 6, "steps on another gradient were not charged"


def a_home_without_a_fixed_place_keeps_no_anchors() -> None:
    anchor = part("privacy.anchor")
    for home in ("relative", "."):
        with mock.patch.dict(os.environ, {"HOME": home, "XDG_STATE_HOME": ""}):
            try:
                found = anchor.default_anchor_folder()
            except part("errors").InputError:
                continue
            raise AssertionError(f"anchors in {found}, another folder in each working folder")


def a_run_may_go_on_while_its_budget_is_added_up() -> None:
    """Rows come at any time. A ledger that has more than its anchor knew was not cut."""
    budgets = part("privacy.budget")
    with folder() as place:
        train_toy(place, fresh_source("a"), plan_of(sampling_probability=0.05))
        real = budgets.find_anchor

        def find_anchor(*given: Any) -> Any:
            train_toy(place, fresh_source("b"), plan_of(sampling_probability=0.05))
            return real(*given)

        with mock.patch.object(budgets, "find_anchor", find_anchor):
            read = partial(budgets.budget_of, place / "ledger.jsonl", None, place / "anchors")
            assert not refused(read, "ArtifactRefused", "no longer all there")


@on_a_coarse_grid
def a_budget_adds_up_all_runs_and_holds_its_cap() -> None:
    errors = part("errors")
    accounting = part("privacy.accounting")
    with folder() as place:
        ledger = place / "ledger.jsonl"
        plan = plan_of(sampling_probability=0.05)
        one = accounting.account(plan).epsilon
        train_toy(place, fresh_source("a"), plan)
        train_toy(place, fresh_source("b"), plan, finish=False)
        budget = part("privacy.budget").budget_of(ledger, None)
        assert [run["finished"] for run in budget["runs"]] == [True, False]
        assert one < budget["epsilon"] < 2 * one + 0.01
        together = accounting.account(replace(plan, steps=12)).epsilon
        assert abs(budget["epsilon"] - together) < 1e-3
        before = ledger.read_text()
        try:
            train_toy(place, fresh_source("c"), plan, cap=budget["epsilon"] + 0.01)
        except errors.PrivacyRefused:
            assert ledger.read_text() == before
        else:
            raise AssertionError("a run exceeded the cap")


def a_checkpoint_ahead_of_its_ledger_is_charged() -> None:
    """As after an older copy of the ledger was put back, and its anchor was lost."""
    with folder() as place:
        source = fresh_source()
        plan = plan_of()
        path = place / "ledger.jsonl"
        train_toy(place, source, plan, finish=False)
        cap_opened_and_two_steps = path.read_text().splitlines(keepends=True)[:4]
        path.write_text("".join(cap_opened_and_two_steps))
        shutil.rmtree(place / "anchors")
        assert spendings(place)["run"].charged_steps == 2
        train_toy(place, source, plan)
        charged = spendings(place)["run"].charged_steps
        assert charged == 6, "steps that the checkpoint has taken are not in the ledger"


def a_run_keeps_its_plan() -> None:
    with folder() as place:
        source = fresh_source()
        train_toy(place, source, plan_of(), finish=False)
        try:
            train_toy(place, source, plan_of(noise_multiplier=0.3))
        except part("errors").PrivacyRefused:
            return
        raise AssertionError("a run resumed with less noise than it had started with")


def a_full_disk_stops_a_step_before_its_noise() -> None:
    ledger = part("privacy.ledger")
    with folder() as place, open_ledger(place) as opened:
        run = ledger.LedgerRun(opened, "run", plan_of(), None)
        before = (place / "ledger.jsonl").read_bytes()
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 50, limits[1]))
        try:
            run.intend(0, 0, "a" * 64)
        except part("errors").EnvironmentFault:
            pass
        else:
            raise AssertionError("a step started though its intent is not whole on the disk")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert (place / "ledger.jsonl").read_bytes() == before, "half a row was left"


def refused(call: Callable[[], object], error: str, word: str) -> bool:
    """Return whether a call is refused with an error of this name, and says this word."""
    try:
        call()
    except getattr(part("errors"), error) as found:
        return word in str(found)
    return False


@on_a_coarse_grid
def a_run_is_admitted_by_what_it_will_have_spent() -> None:
    """A repeated step must leave room for the steps that are still to come."""
    accounting = part("privacy.accounting")
    # One repeated step alone is below the cap.
    plan = plan_of(noise_multiplier=2.0, steps=30)
    cap = accounting.account(plan).epsilon + 0.02
    with folder() as place:
        with open_ledger(place) as opened:
            run = part("privacy.ledger").LedgerRun(opened, "run", plan, cap)
            run.intend(0, 0, "a")
        before = (place / "ledger.jsonl").read_text()
        with open_ledger(place) as opened:
            run = part("privacy.ledger").LedgerRun(opened, "run", plan, cap)
            run.intend(0, 0, "a")
            repeat = partial(run.intend, 0, 0, "b")
            assert refused(repeat, "PrivacyRefused", "above its cap"), "a repeat passed the cap"
            assert run.spending.charged_steps == 1
        assert (place / "ledger.jsonl").read_text() == before


@on_a_coarse_grid
def the_cap_belongs_to_the_data() -> None:
    """Neither another delta nor another run file passes it."""
    ledger = part("privacy.ledger")
    plan = plan_of(sampling_probability=0.05)
    cap = part("privacy.accounting").account(plan).epsilon + 0.02
    with folder() as place:
        train_toy(place, fresh_source("a"), plan, cap=cap)
        first = json.loads((place / "ledger.jsonl").read_text().splitlines()[0])
        assert (first["row"], first["epsilon"], first["delta"]) == ("cap", cap, plan.delta)

        def start(cap: float | None, **changes: Any) -> Callable[[], object]:
            def call() -> None:
                with open_ledger(place) as opened:
                    ledger.LedgerRun(opened, "b", replace(plan, **changes), cap)

            return call

        for changes in ({}, {"delta": 0.5}, {"noise_source": "seeded"}):
            for cap_again in (cap, None):
                call = start(cap_again, **changes)
                assert refused(call, "PrivacyRefused", "above its cap"), f"{changes} passed the cap"
        assert refused(start(cap + 9), "PrivacyRefused", "but privacy.max_total_epsilon is")
        # The command changes it, and leaves a row.
        with open_ledger(place) as opened:
            opened.set_cap(part("privacy.spending").Cap(cap + 9, plan.delta))
        start(cap + 9)()
        lines = (place / "ledger.jsonl").read_text().splitlines()
        assert [json.loads(line)["row"] for line in lines].count("cap") == 2


def a_ledger_keeps_all_its_rows() -> None:
    """Cut, emptied, replaced by an older copy, computed anew, with a run that begins twice."""
    with folder() as place:
        path = place / "ledger.jsonl"
        train_toy(place, fresh_source("a"), plan_of())
        older = path.read_text()
        train_toy(place, fresh_source("b"), plan_of())
        lines = path.read_text().splitlines(keepends=True)
        opened_twice = [*lines, chained(lines, json.loads(lines[1]))]
        damaged = {
            "cut": "".join(lines[:-1]),
            "emptied": "",
            "replaced by an older copy": older,
            "computed anew": "".join(computed_anew(lines)),
            "opened twice": "".join(opened_twice),
        }
        for name, text in damaged.items():
            path.write_text(text)
            start = partial(train_toy, place, fresh_source("c"), plan_of())
            assert refused(start, "ArtifactRefused", "restore"), f"a ledger that was {name}"
            assert path.read_text() == text
        path.unlink()
        assert refused(start, "ArtifactRefused", "restore"), "a ledger that was deleted"
        path.write_text("".join(lines))
        train_toy(place, fresh_source("c"), plan_of())


def chained(lines: Sequence[str], row: dict[str, Any]) -> str:
    """Return a row as the next line of a ledger."""
    last = hashlib.sha256(lines[-1].rstrip("\n").encode()).hexdigest()
    return json.dumps(row | {"previous": last}) + "\n"


def computed_anew(lines: Sequence[str]) -> list[str]:
    """Return a ledger with other times, whose chain of hashes holds."""
    written = [json.dumps(json.loads(lines[0]) | {"set": "1970-01-01"}) + "\n"]
    for line in lines[1:]:
        written.append(chained(written, json.loads(line)))
    return written


def copies_of_the_data_share_a_ledger() -> None:
    anchor = part("privacy.anchor")
    with folder() as place:
        data = place / "a" / "private.csv"
        data.parent.mkdir()
        data.write_text("text,label\nx,0\n")

        def find(data: Path, ledger: Path | None = None) -> Any:
            beside = data.with_name(f"{data.name}.ledger.jsonl")
            return anchor.claim_anchor(
                place / "anchors", ledger or beside, marks_of(path=data), may_move=ledger is None
            )

        found = find(data)
        with part("privacy.ledger").lock_ledger(found) as opened:
            part("privacy.ledger").LedgerRun(opened, "run", plan_of(), None)
        elsewhere = place / "b"
        elsewhere.mkdir()
        copies = [elsewhere / name for name in ("copy.csv", "link.csv", "hard.csv")]
        shutil.copy(data, copies[0])
        copies[1].symlink_to(data)
        copies[2].hardlink_to(data)
        for copy in copies:
            of_copy = part("privacy.budget").ledger_for(copy, place / "anchors")
            assert of_copy == found.ledger, f"the budget of {copy.name} is not found"
            assert find(copy).ledger == found.ledger, f"{copy.name} has a ledger of its own"
        plain = hashlib.sha256(data.read_bytes()).hexdigest()
        assert plain not in found.file.read_text(), "an anchor confirms a guess of the data"
        other = partial(find, data, place / "fresh.jsonl")
        assert refused(other, "PrivacyRefused", "their privacy ledger at")
        # A renamed file whose ledger stayed, and one whose ledger went with it.
        renamed = data.rename(elsewhere / "renamed.csv")
        assert find(renamed).ledger == found.ledger
        found.ledger.rename(elsewhere / "renamed.csv.ledger.jsonl")
        assert find(renamed).ledger.parent == elsewhere
        # More examples at the same place are the same data set.
        renamed.write_text("text,label\nx,0\ny,1\n")
        assert find(renamed).ledger.parent == elsewhere
        renamed.write_text("text,label\nx,0\ny,1\nz,1\n")
        other = partial(find, renamed, place / "fresh.jsonl")
        assert refused(other, "PrivacyRefused", "their privacy ledger at"), "edited data"
        find(renamed).ledger.unlink()
        assert refused(partial(find, copies[0]), "PrivacyRefused", "is missing")


def data_with_two_ledgers_are_refused() -> None:
    """An edited copy of the data is saved back, after both have spent."""
    anchor = part("privacy.anchor")
    ledger = part("privacy.ledger")
    with folder() as place:

        def find(data: Path, chosen: Path | None = None) -> Any:
            beside = data.with_name(f"{data.name}.ledger.jsonl")
            return anchor.claim_anchor(
                place / "anchors", chosen or beside, marks_of(path=data), may_move=chosen is None
            )

        data, copy = place / "a.csv", place / "b.csv"
        data.write_text("text,label\nx,0\n")
        copy.write_text("text,label\nx,0\ny,1\n")
        # A ledger that has spent nothing hinders nobody.
        unspent = find(data)
        both = [unspent, find(copy)]
        assert both[0].ledger != both[1].ledger
        for found in both:
            with ledger.lock_ledger(found) as opened:
                ledger.LedgerRun(opened, "run", plan_of(), None)
        shutil.copy(copy, data)
        assert refused(partial(find, data), "PrivacyRefused", "epsilon adds up")
        # The owner may say that they are other people's, and is not asked again.
        assert find(data, both[1].ledger).ledger == both[1].ledger
        twice = partial(refused, error="PrivacyRefused", word="epsilon adds up")
        assert not twice(partial(find, data)), "the owner is asked again"
        assert find(data).ledger == both[1].ledger
        # Later versions at this place stay with the ledger that was chosen.
        for version in range(8):
            data.write_text(f"text,label\nx,0\ny,1\n{version},1\n")
            assert find(data).ledger == both[1].ledger
            assert find(data, both[1].ledger).ledger == both[1].ledger


def the_ledger_beside_the_data_counts_for_every_account() -> None:
    """Another account has written it, so the anchors of this one do not know it."""
    ledger = part("privacy.ledger")
    from post_dist.config.schema import RunConfig

    with folder() as place:

        def write(name: str) -> Path:
            (place / name).mkdir()
            (place / name / "data.csv").write_text("text,label\nx,0\n")
            return place / name / "data.csv"

        words = {"template": "{text} It was", "labels": {"0": ["bad"], "1": ["good"]}}

        def find(account: str, data: Path, **privacy: Path) -> Any:
            task = {"name": "toy", "visibility": "private", "path": str(data)} | words
            section = {"ledger_anchors": place / "anchors" / account} | privacy
            given = {"name": "toy", "private_task": task, "privacy": section}
            return ledger.claim_anchor_for(RunConfig.model_validate(given))

        def spend(account: str, data: Path, cap: float) -> Path:
            with ledger.lock_ledger(find(account, data)) as opened:
                ledger.LedgerRun(opened, "run", plan_of(), cap)
            return ledger.ledger_beside(data)

        data = write("shared")
        beside = spend("first", data, 98.0)
        link = place / "link.csv"
        link.symlink_to(data)
        start = partial(find, "second", data, ledger=place / "fresh.jsonl")
        wanted = f"privacy ledger at {beside}, not at"
        assert refused(start, "PrivacyRefused", wanted), "a fresh ledger"
        assert not (place / "anchors/second").exists()
        assert find("second", link).ledger == beside
        assert find("second", data).ledger == beside
        # Whoever has spent from a ledger of equal data may choose it, and must.
        copy = write("copy")
        own = spend("third", copy, 99.0)
        unchosen = partial(find, "third", data)
        assert refused(unchosen, "PrivacyRefused", "others have spent"), "the sum is unknown"
        assert find("third", data, ledger=own).ledger == own
        # A copied ledger is no second one.
        shutil.copytree(place / "shared", place / "backup")
        assert find("first", place / "backup/data.csv").ledger == beside


def advice_for_a_ledger_that_cannot_be_written_keeps_to_it() -> None:
    with folder() as place:
        path = place / "ledger.jsonl"
        for exists, advice in ((False, "set privacy.ledger"), (True, "get write access")):
            if exists:
                path.touch()
            denied = mock.patch.object(os, "open", side_effect=PermissionError(13, "denied"))
            anchor = part("privacy.anchor").claim_anchor(place / "a", path, (), may_move=True)
            start = part("privacy.ledger").lock_ledger(anchor).__enter__
            with denied:
                assert refused(start, "InputError", advice), f"the file is there: {exists}"


def marks_of(**source: Any) -> tuple[str, ...]:
    """Return what private data from a file or from the hub are known by."""
    from post_dist.config.sources import Task

    return part("privacy.anchor").data_marks(Task(name="toy", visibility="private", **source))


def hub_data_have_one_ledger() -> None:
    anchor = part("privacy.anchor")
    with folder() as place:
        for number, changes in enumerate([{}, {"revision": "2"}, {"hub_split": "train[:50%]"}]):
            marks = marks_of(**{"hub": "me/private", "revision": "1"} | changes)
            path = place / f"{number}.jsonl"
            find = partial(anchor.claim_anchor, place / "anchors", path, marks, may_move=False)
            if not number:
                with part("privacy.ledger").lock_ledger(find()) as opened:
                    part("privacy.ledger").LedgerRun(opened, "run", plan_of(), None)
            else:
                assert refused(find, "PrivacyRefused", "their privacy ledger at"), changes


def no_step_goes_on_without_its_ledger() -> None:
    """An editor has saved the ledger during a run, or somebody has deleted or changed it."""

    def save(path: Path) -> None:
        shutil.copy(path, path.with_suffix(".new"))
        path.with_suffix(".new").rename(path)

    def add(path: Path) -> None:
        with path.open("a") as file:
            file.write("\n")

    for change in (save, Path.unlink, add):
        with folder() as place, open_ledger(place) as opened:
            run = part("privacy.ledger").LedgerRun(opened, "run", plan_of(), None)
            run.intend(0, 0, "a")
            change(place / "ledger.jsonl")
            step = partial(run.intend, 0, 1, "b")
            assert refused(step, "PrivacyRefused", "by another program"), change.__name__
            assert run.spending.charged_steps == 1


def a_file_that_is_no_ledger_stays_as_it_is() -> None:
    change_cap = part("privacy.budget").change_cap
    others = {"data.csv": b"text,label\nx,0", "w.bin": bytes(range(250)) * 9, "a.txt": b"one line"}
    for name, contents in others.items():
        with folder() as place, mock.patch.dict(os.environ, XDG_STATE_HOME=str(place / "state")):
            path = place / name
            path.write_bytes(contents)
            try:
                change_cap(path, 5.0, None)
            except part("errors").PostDistError:
                pass
            else:
                raise AssertionError(f"{name} was taken for a ledger")
            assert path.read_bytes() == contents, f"{name} was changed"
            assert not (place / "state").exists(), f"{name} has an anchor"
    with folder() as place:
        device = part("privacy.anchor").claim_anchor(
            place / "anchors", Path("/dev/null"), (), may_move=False
        )
        start = part("privacy.ledger").lock_ledger(device).__enter__
        assert refused(start, "InputError", "regular file")


def a_row_without_its_line_break_is_charged() -> None:
    """As after an editor that removes the last line break, and the anchor of another machine."""
    with folder() as place:
        path = place / "ledger.jsonl"
        with open_ledger(place) as opened:
            run = part("privacy.ledger").LedgerRun(opened, "run", plan_of(), None)
            for step in range(3):
                run.intend(0, step, f"{step}")
        for cut, charged in ((1, 3), (2, 2)):
            shutil.rmtree(place / "anchors")
            path.write_bytes(path.read_bytes()[:-cut])
            assert spendings(place)["run"].charged_steps == charged
            with open_ledger(place) as opened:
                assert opened.spending.runs["run"].charged_steps == charged
            assert len(path.read_text().splitlines()) == 2 + charged
            assert path.read_bytes().endswith(b"}\n")


def an_anchor_forgets_nothing() -> None:
    """A run that was stopped at its start goes on after others have run."""
    anchor = part("privacy.anchor")
    with folder() as place:
        find = partial(anchor.claim_anchor, place / "anchors", place / "ledger.jsonl")
        stopped = find((), may_move=True)
        edited = find(("edited data",), may_move=True)
        ledger = part("privacy.ledger")
        with ledger.lock_ledger(edited) as opened:
            ledger.LedgerRun(opened, "other", plan_of(), None)
        lines = (place / "ledger.jsonl").read_text().splitlines(keepends=True)
        (place / "ledger.jsonl").write_text(lines[0])
        start = ledger.lock_ledger(stopped).__enter__
        assert refused(start, "ArtifactRefused", "restore"), "a cut was not noticed"
        (place / "ledger.jsonl").write_text("".join(lines))
        with ledger.lock_ledger(stopped) as opened:
            find(("more data",), may_move=True)
            ledger.LedgerRun(opened, "run", plan_of(), None)
        (again,) = place.glob("anchors/*.json")
        for mark in ("edited data", "more data"):
            elsewhere = anchor.claim_anchor(
                place / "anchors", place / "b.jsonl", (mark,), may_move=True
            )
            assert elsewhere.file == again, f"the anchor has forgotten the {mark}"
        assert again.stat().st_mode & 0o077 == 0


def no_plan_of_a_ledger_breaks_the_accountants() -> None:
    bad = [
        {"noise_multiplier": 1e300},
        {"noise_multiplier": 0.0},
        {"noise_multiplier": "1"},
        {"steps": 10**9},
        {"steps": True},
        {"delta": 1.5},
        {"sampling_probability": 2},
        {"max_grad_norm": -1.0},
        {"mean_trials": 3.0},
        {"noise_source": "none"},
        {"more": 1},
    ]
    for changes in bad:
        with folder() as place:
            changed = {"plan": asdict(plan_of()) | changes}
            assert refused_row(place, changed), f"{changes} was read"


def no_name_or_time_of_a_ledger_steers_a_terminal() -> None:
    """`budget` prints both."""
    now = "2026-11-28T07:56:19+00:00"
    names = ["a\x1b[2J", "a\nb", "a b", "", "a" * 65, "\u0661", 7, None, ["a"]]
    times = ["", "2026-11-28", now.replace("T", "\x1b"), f"{now}\n", "today", 2026, None, [now]]
    bad = [{"run": name} for name in names] + [{"opened": time} for time in times]
    for changes in bad:
        with folder() as place:
            assert refused_row(place, changes), f"{changes} was read"
    with folder() as place:
        assert not refused_row(place, {})


def refused_row(place: Path, changes: dict[str, Any]) -> bool:
    """Return whether a ledger whose first row has these changes is refused."""
    row = {"row": "opened", "run": "a", "opened": "2026-11-28T07:56:19+00:00"}
    row |= {"plan": asdict(plan_of())} | changes
    path = place / "ledger.jsonl"
    path.write_text(json.dumps(row | {"previous": part("privacy.spending").NO_ROW}) + "\n")
    read = partial(part("privacy.budget").budget_of, path, None)
    return refused(read, "ArtifactRefused", "is not a ledger row")


def no_delta_below_that_of_a_plan_is_taken() -> None:
    """Far below, an accountant finds an infinite epsilon."""
    budget = part("privacy.budget")
    with folder() as place:
        train_toy(place, fresh_source("a"), plan_of())
        path = place / "ledger.jsonl"
        before = path.read_bytes()
        for delta in (0.0, 1e-300, -1.0, 2.0, math.nan):
            read = partial(budget.budget_of, path, delta, place / "anchors")
            assert refused(read, "InputError", "--delta must be from 1e-12 to 1"), f"{delta}"
            set_cap = partial(budget.change_cap, path, 5.0, delta, place / "anchors")
            assert refused(set_cap, "InputError", "--delta must be from 1e-12"), f"{delta}"
        assert path.read_bytes() == before
        assert budget.budget_of(path, 1e-12, place / "anchors")["private"] is True
        lines = before.decode().splitlines(keepends=True)
        cap = {"row": "cap", "epsilon": 5.0, "delta": 1e-300}
        path.write_text("".join([*lines, chained(lines, cap)]))
        read = partial(budget.budget_of, path, None)
        assert refused(read, "ArtifactRefused", "is not a ledger row")


def an_anchor_that_is_none_is_refused() -> None:
    anchor = part("privacy.anchor")
    with folder() as place:
        find = partial(
            anchor.claim_anchor, place / "anchors", place / "ledger.jsonl", (), may_move=True
        )
        find()
        (file,) = place.glob("anchors/*.json")
        honest = json.loads(file.read_text())
        changes = [
            *({"rows": rows} for rows in (-1, "1", 1.5, True, None)),
            *({name: 7} for name in ("ledger", "first", "last", "salt", "data")),
            {"data": "abc"},
            {"data": [7]},
            {"more": 1},
        ]
        texts = [json.dumps(honest | change) for change in changes]
        texts += ["", "[]", "[" * 100_000, '{"a":' * 100_000, "\0" * 100, "{}"]
        texts.append(file.read_text()[:-1] + ', "rows": 9}')
        for text in texts:
            file.write_text(text)
            assert refused(find, "ArtifactRefused", "is not the anchor"), text[:200]
        file.unlink()
        os.mkfifo(file)
        assert refused(find, "ArtifactRefused", "is not the anchor"), "a pipe"
        file.unlink()
        with file.open("wb") as sparse:
            sparse.truncate(1 << 40)
        assert refused(find, "ArtifactRefused", "is not the anchor"), "an endless file"
        file.write_text(json.dumps(honest))
        assert find().record.rows == 0


CHECKS: list[Callable[[], None]] = [
    every_step_is_charged_and_noised_also_when_empty,
    a_run_is_gradient_descent_on_noisy_sums,
    intents_are_on_disk_before_the_noise,
    a_restart_repeats_or_pays,
    a_home_without_a_fixed_place_keeps_no_anchors,
    a_run_may_go_on_while_its_budget_is_added_up,
    a_budget_adds_up_all_runs_and_holds_its_cap,
    a_checkpoint_ahead_of_its_ledger_is_charged,
    a_run_keeps_its_plan,
    a_full_disk_stops_a_step_before_its_noise,
    a_run_is_admitted_by_what_it_will_have_spent,
    the_cap_belongs_to_the_data,
    a_ledger_keeps_all_its_rows,
    copies_of_the_data_share_a_ledger,
    data_with_two_ledgers_are_refused,
    the_ledger_beside_the_data_counts_for_every_account,
    advice_for_a_ledger_that_cannot_be_written_keeps_to_it,
    hub_data_have_one_ledger,
    no_step_goes_on_without_its_ledger,
    a_file_that_is_no_ledger_stays_as_it_is,
    a_row_without_its_line_break_is_charged,
    an_anchor_forgets_nothing,
    no_plan_of_a_ledger_breaks_the_accountants,
    no_name_or_time_of_a_ledger_steers_a_terminal,
    no_delta_below_that_of_a_plan_is_taken,
    an_anchor_that_is_none_is_refused,
]
