"""Private tuning through the command line: claims, charges, refusals, and that nothing leaks."""

import fcntl
import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from post_dist.artifacts.manifest import FILE_NAME, read_manifest
from post_dist.artifacts.prompt import read_prompt
from post_dist.files import file_digest

PRIVATE = (
    "--set=privacy.enabled=true",
    "--set=privacy.declared_examples=160",
    "--set=privacy.target_epsilon=8",
)
CANARY = "zyxw heliotrope quasar"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, post_dist: Callable) -> Path:
    """A folder with a run file, its data and a student."""
    folder = tmp_path_factory.mktemp("base")
    run = tiny.write_run(folder)
    assert post_dist("distill", run).returncode == 0
    shutil.copytree(next(folder.glob("runs/tiny/distill-*/artifact")), folder / "student")
    return folder


@pytest.fixture
def folder(base: Path, tmp_path: Path) -> Path:
    """The same, to be written to."""
    shutil.copytree(base, tmp_path / "work")
    return tmp_path / "work"


def tune(main: Callable, folder: Path, *options: str) -> tuple[int, str, str]:
    return main(
        "tune",
        folder / "run.yaml",
        f"--set=inputs.student={folder / 'student'}",
        *PRIVATE,
        *options,
        "--json",
    )


def artifact(printed: str) -> Path:
    return Path(json.loads(printed)["artifact"])


def budget(main: Callable, folder: Path) -> dict[str, Any]:
    return json.loads(main("budget", folder / "private.csv.ledger.jsonl", "--json")[1])


def claim_of(path: Path) -> dict[str, Any]:
    return json.loads((path / "privacy.json").read_text())


def card_rows(path: Path) -> dict[str, str]:
    """The table of a model card."""
    lines = (path / "README.md").read_text().splitlines()
    cells = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]
    return {name: value for name, value in cells}


@pytest.mark.parametrize("given", ["privacy.learning_rate=null", "privacy.learning_rate=0.25"])
def test_the_card_states_the_settings_that_a_private_run_has_used(
    folder: Path, main: Callable, given: str
) -> None:
    settings = [
        *("tune.adapter=head", "evaluate.baselines=[]"),
        *("transfer.objective=proxy", "transfer.scores=classes"),
        *("privacy.steps=12", "privacy.expected_batch_size=16", given),
    ]
    code, out, err = tune(main, folder, *(f"--set={each}" for each in settings))
    assert code == 0, err
    rows = card_rows(artifact(out))
    (logged,) = re.findall(r"tune: learning rate ([\d.]+)", err)
    assert float(logged) == pytest.approx(float(rows["learning_rate"]), rel=0.01)
    assert float(logged) < 4, "the default of a head is lowered for the noise of the plan"
    assert (rows["steps"], rows["expected_batch_size"]) == ("12", "16.0")
    assert "batch_size" not in rows


def test_the_plan_is_priced_without_data_or_model_in_seconds(
    tmp_path: Path, post_dist: Callable
) -> None:
    run = tmp_path / "run.yaml"
    run.write_text(
        "name: a\n"
        "privacy: {enabled: true, target_epsilon: 8, declared_examples: 67349}\n"
        "tune: {batch_size: 1024, steps: 1315}\n"
    )
    # The first command of a worker also waits for the libraries.
    post_dist("privacy", "--help")
    start = time.monotonic()
    done = post_dist("privacy", run, "--json")
    assert time.monotonic() - start < 20, "10 s are promised on an idle machine"
    found = json.loads(done.stdout)
    assert found["noise_multiplier"] == pytest.approx(0.706, abs=0.001)
    assert 7.98 < found["epsilon"] <= 8
    assert found["delta"] == pytest.approx(67349**-1.1)
    assert found["steps"] == 1315
    assert set(found["cross_checks"]) == {"rdp", "prv"}
    assert found["sampling_probability"] == 1024 / 67349
    assert found["accountant"].startswith("PLD")
    noise = ("--set=privacy.target_epsilon=null", "--set=privacy.noise_multiplier=2")
    given = json.loads(post_dist("privacy", run, "--json", *noise).stdout)
    assert given["noise_multiplier"] == 2
    assert given["epsilon"] < 1.5


def test_a_prompt_carries_its_claim_through_transfer_and_evaluation(
    folder: Path, main: Callable
) -> None:
    settings = (
        "--set=tune.class_bias=true",
        "--set=evaluate.baselines=[]",
        "--set=evaluate.private_rows=[2]",
    )
    code, out, err = main(
        "pipeline",
        folder / "run.yaml",
        f"--set=inputs.student={folder / 'student'}",
        *PRIVATE,
        *settings,
        "--json",
    )
    assert code == 0, err
    rows = {row["name"]: row["epsilon"] for row in json.loads(out)["rows"]}
    assert rows["zero-shot"] is None
    assert 7.9 < rows["student + prompt"] == rows["transferred"] == rows["proxy-tuning"] <= 8
    assert rows["student + prompt, without biases"] == rows["student + prompt"]
    assert rows["student + prompt, epsilon 2, without biases"] == rows["transferred, epsilon 2"]
    assert 1.9 < rows["student + prompt, epsilon 2"] == rows["transferred, epsilon 2"] <= 2
    for path in folder.glob("runs/tiny/*/artifact"):
        assert json.loads(main("verify", path, "--json")[1])["ok"], path
    tuned = [read_prompt(path) for path in folder.glob("runs/tiny/tune-*/artifact")]
    assert all(len(prompt.task.class_biases) == 2 for prompt in tuned)
    assert all(
        not read_prompt(path).task.class_biases
        for path in folder.glob("runs/tiny/transfer-*/artifact")
    )
    card = next(folder.glob("runs/tiny/tune-*/artifact/README.md")).read_text()
    assert "with differential privacy" in card
    assert "| epsilon |" in card
    assert "WITHOUT" not in card
    spent = budget(main, folder)
    assert [run["steps_charged"] for run in spent["runs"]] == [6, 6]
    assert 8 < spent["epsilon"] < 10.1


def test_a_false_claim_is_seen(folder: Path, main: Callable) -> None:
    path = artifact(tune(main, folder)[1])
    claim = claim_of(path)
    changes: list[dict[str, Any]] = [
        {"epsilon": 1.0},
        {"steps": 600},
        {"noise_multiplier": math.inf},
        {"sampling_probability": "x"},
        {"epsilon": None},
    ]
    for change in changes:
        (path / "privacy.json").write_text(json.dumps(claim | change))
        manifest = json.loads((path / FILE_NAME).read_text())
        manifest["files"]["privacy.json"] = file_digest(path / "privacy.json")
        (path / FILE_NAME).write_text(json.dumps(manifest))
        code, out, _ = main("verify", path, "--json")
        assert code == 4, change
        found = json.loads(out)
        assert not found["ok"]
        assert found["kind"] == "soft prompt"
        assert len(found["problems"]) == 1
    (path / "adapter_model.safetensors").write_bytes(b"")
    assert "is not the file that was written" in main("verify", path)[1]


def test_nothing_of_an_example_reaches_a_file_or_the_screen(
    folder: Path, post_dist: Callable
) -> None:
    """Nothing of the examples leaks, even from a run that fails.

    The second run fails because the label of the canary is not among the labels. Lengths do not
    leak either, though some texts are longer than the model's context.
    """
    rows = tiny.sentences(200, 1)
    for number in range(20):
        long = number % 2 * " on and on" * 200
        rows[5 + number] = (f"{CANARY} {number} nonpareil{long}", 1)
    tiny.write_csv(folder / "private.csv", rows)
    good = tune(post_dist_as_main(post_dist), folder)
    assert good[0] == 0, good[2]
    tiny.write_csv(folder / "private.csv", [*rows, (f"{CANARY} at last", 77)])
    bad = tune(post_dist_as_main(post_dist), folder)
    assert bad[0] == 2

    words = {*CANARY.split(), "nonpareil"}
    screen = good[1] + good[2] + bad[1] + bad[2]
    assert "longer than" not in screen
    for word in (*words, "77"):
        assert not re.search(rf"\b{word}\b", screen), word

    written = [path for path in folder.rglob("*") if path.is_file() and path.name != "private.csv"]
    assert len(written) > 10
    for path in written:
        data = path.read_bytes()
        assert not [word for word in words if word.encode() in data], path
    run = next(path for path in folder.glob("runs/tiny/tune-*"))
    assert run.stat().st_mode & 0o77 == 0
    assert not list(run.rglob("*metrics*")), "a private run keeps no losses, norms or sizes"
    assert "checkpoints" not in {path.name for path in run.iterdir()}


def post_dist_as_main(post_dist: Callable) -> Callable:
    """A process of its own, called like the `main` fixture."""

    def call(*arguments: object) -> tuple[int, str, str]:
        done = post_dist(*arguments)
        return done.returncode, done.stdout, done.stderr

    return call


def test_what_a_private_stage_writes_is_for_its_owner_alone(folder: Path, main: Callable) -> None:
    shutil.rmtree(folder / "runs")
    before = os.umask(0)
    try:
        code, out, err = tune(main, folder)
        assert code == 0, err
        options = (f"--set=inputs.source_prompt={artifact(out)}", "--set=evaluate.baselines=[]")
        owner = (f"--set=inputs.student={folder / 'student'}", "--set=teacher=null", *options)
        code, out, err = main("evaluate", folder / "run.yaml", *owner, "--json")
        assert code == 0, err
    finally:
        os.umask(before)
    runs = folder / "runs/tiny"
    # Whoever may write to one of these may put another folder in the place of what is in it.
    for place in (runs.parent, runs, runs / "admitted", runs / "latest"):
        assert place.stat().st_mode & 0o022 == 0, place
    written = [path for name in ("tune-*", "evaluate-*", "answers") for path in runs.glob(name)]
    assert len(written) == 3
    written += [path for place in written for path in place.rglob("*")]
    written.append(folder / "private.csv.ledger.jsonl")
    for path in written:
        allowed = 0o700 if path.is_dir() else 0o600
        assert path.stat().st_mode & 0o777 & ~allowed == 0, path


TUNE_AND_WATCH = """
import os, socket, sys
from pathlib import Path
from post_dist.privacy import trainer

port = int(sys.argv.pop())
sockets = set()
save = trainer.save_tensors


def save_and_call_home(*given):
    for link in Path("/proc/self/fd").iterdir():
        if link.is_symlink() and os.readlink(link).startswith("socket:"):
            sockets.add(os.readlink(link))
    try:
        socket.create_connection(("127.0.0.1", port), 1).sendall(b"a secret")
    except ConnectionError:
        pass
    save(*given)


trainer.save_tensors = save_and_call_home
from post_dist.cli import run_command

code = run_command()
assert not sockets, "a socket was open"
assert not [name for name in sys.modules if name.split(".")[0] == "deepspeed"]
sys.exit(code)
"""


def test_tuning_alone_opens_no_port_and_calls_nobody(folder: Path) -> None:
    """Also where a library tries to report home at each step."""
    with socket.socket() as home:
        home.bind(("127.0.0.1", 0))
        home.listen()
        home.settimeout(0)
        port = str(home.getsockname()[1])
        student = f"--set=inputs.student={folder / 'student'}"
        command = ["tune", str(folder / "run.yaml"), student, *PRIVATE, port]
        done = subprocess.run(
            [sys.executable, "-c", TUNE_AND_WATCH, *command],
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stderr.count("a library tried to use the network") == 6
        with pytest.raises(BlockingIOError):
            home.accept()


def test_a_file_without_a_header_tells_nothing(folder: Path, main: Callable) -> None:
    rows = (folder / "private.csv").read_text().splitlines()[1:]
    (folder / "private.csv").write_text("\n".join(rows))
    code, out, err = tune(main, folder)
    assert code == 2
    assert "there is no column 'text' among 2 columns" in err
    words = set(re.findall(r"[a-z]{4,}", rows[0])) - {"text"}
    assert words
    assert not words & set(re.findall(r"[a-z]{4,}", out + err))


@pytest.mark.parametrize("kind", ["readable by others", "a link"])
def test_a_key_that_others_may_know_is_refused(folder: Path, main: Callable, kind: str) -> None:
    code, _, err = tune(main, folder, "--set=privacy.max_total_epsilon=0.01")
    assert code == 5, err
    (key,) = folder.glob("runs/tiny/tune-*/randomness.json")
    if kind == "a link":
        key.rename(folder / "elsewhere.json")
        key.symlink_to(folder / "elsewhere.json")
    else:
        key.chmod(0o644)
    code, _, err = tune(main, folder)
    assert code == 4
    assert "randomness.json" in err
    assert f"delete {key.parent}, or" in err
    shutil.rmtree(key.parent)
    assert tune(main, folder)[0] == 0


def test_a_run_past_the_cap_is_refused_and_a_new_start_pays_again(
    folder: Path, main: Callable
) -> None:
    capped = "--set=privacy.max_total_epsilon=9"
    assert tune(main, folder, capped)[0] == 0
    code, out, err = tune(main, folder, capped, "--set=tune.learning_rate=0.02")
    assert (code, json.loads(out)["exit_code"]) == (5, 5)
    assert "above its cap of 9" in err
    assert len(list(folder.glob("runs/tiny/tune-*/artifact"))) == 1
    assert len(budget(main, folder)["runs"]) == 1
    shutil.rmtree(next(folder.glob("runs/tiny/tune-*/artifact")))
    assert tune(main, folder, "--resume=never")[0] == 5, "the cap stays without the setting"
    assert main("budget", folder / "private.csv.ledger.jsonl", "--cap", 30)[0] == 0
    assert tune(main, folder, "--resume=never")[0] == 0
    assert [run["steps_charged"] for run in budget(main, folder)["runs"]] == [6, 6]


def test_the_command_changes_the_cap_and_leaves_a_row(folder: Path, main: Callable) -> None:
    ledger = folder / "private.csv.ledger.jsonl"
    assert main("budget", ledger, "--cap", 9)[0] == 2, "there is no ledger yet"
    assert tune(main, folder, "--set=privacy.max_total_epsilon=9")[0] == 0
    # Whoever names the data means their ledger.
    named = main("budget", folder / "private.csv", "--json")
    assert named == main("budget", ledger, "--json")
    assert named[0] == 0
    again = "--set=tune.learning_rate=0.02"
    code, _, err = tune(main, folder, "--set=privacy.max_total_epsilon=20", again)
    assert code == 5
    assert "--cap 20" in err
    code, out, err = main("budget", ledger, "--cap", 20, "--json")
    assert code == 0, err
    told = json.loads(out)
    assert (told["cap"], told["cap_delta"]) == (20, told["delta"])
    assert ledger.read_text().count('"row": "cap"') == 2
    assert tune(main, folder, "--set=privacy.max_total_epsilon=20", again)[0] == 0
    # The command has made an anchor in the owner's home, so it notices a cut as well.
    ledger.write_text("\n".join(ledger.read_text().splitlines()[:3]) + "\n")
    code, _, err = main("budget", ledger)
    assert code == 4
    assert "restore the ledger" in err


def test_a_cut_is_noticed_by_the_anchors_of_the_run_file(folder: Path, main: Callable) -> None:
    ledger = folder / "private.csv.ledger.jsonl"
    anchors = ("--anchors", folder / "anchors")
    assert tune(main, folder)[0] == 0
    code, out, err = main("budget", ledger, *anchors, "--cap", 9, "--json")
    assert code == 0, err
    assert Path(json.loads(out)["anchor"]).parent == folder / "anchors"
    for cap in ((), ("--cap", 10)):
        code, _, err = main("budget", ledger, "--anchors", folder / "none", *cap)
        assert code == 2
        assert f"{folder / 'none'} holds no anchor of {ledger}" in err
        assert "--anchors takes the folder" in err
    assert not (folder / "none").exists()
    # The new cap has gone, and what is left is a ledger.
    ledger.write_text("".join(ledger.read_text().splitlines(keepends=True)[:-1]))
    assert main("budget", ledger)[0] == 0
    code, _, err = main("budget", ledger, *anchors)
    assert code == 4
    assert "restore the ledger" in err


def test_two_runs_cannot_spend_from_one_ledger_at_once(folder: Path, main: Callable) -> None:
    with (folder / "private.csv.ledger.jsonl").open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        code, _, err = tune(main, folder)
    assert code == 5
    assert "another run holds the privacy ledger" in err


def test_a_ledger_that_was_changed_is_refused(folder: Path, main: Callable) -> None:
    ledger = folder / "private.csv.ledger.jsonl"
    assert tune(main, folder)[0] == 0
    lines = ledger.read_text().splitlines(keepends=True)
    changes = (
        lines[:2] + lines[3:],
        [lines[0].replace("0.", "9.", 1), *lines[1:]],
        [*lines, "{}\n"],
        [*lines, "x\n"],
    )
    for changed in changes:
        ledger.write_text("".join(changed))
        assert main("budget", ledger)[0] == 4
        assert tune(main, folder, "--set=tune.learning_rate=0.02")[0] == 4
    ledger.write_text("".join(lines) + lines[1][:40])
    assert main("budget", ledger)[0] == 0, "a row that a kill cut short started nothing"
    assert main("budget", folder / "none.jsonl")[0] == 2


def test_seeded_noise_marks_the_prompt_as_not_private(folder: Path, main: Callable) -> None:
    code, out, err = tune(main, folder, "--set=privacy.noise_source=seeded")
    assert code == 0, err
    assert "NOT private" in (artifact(out) / "README.md").read_text()
    claim = claim_of(artifact(out))
    assert (claim["private"], claim["epsilon"], claim["noise_source"]) == (False, None, "seeded")
    assert budget(main, folder)["epsilon"] is None
    assert main("verify", artifact(out))[0] == 0


def test_system_noise_gives_another_prompt_each_time(folder: Path, main: Callable) -> None:
    prompts = []
    for name in ("a", "b"):
        printed = tune(main, folder, f"--output={folder / name}")[1]
        prompts.append(read_prompt(artifact(printed)).embeddings)
    assert not prompts[0].equal(prompts[1])


@pytest.mark.parametrize("optimizer", ["adam", "sgd", "averaged_sgd"])
@pytest.mark.parametrize("tokens", [5, 24])
def test_optimizers_and_both_gradient_paths_train(
    folder: Path, main: Callable, optimizer: str, tokens: int
) -> None:
    options = (
        f"--set=tune.optimizer={optimizer}",
        f"--set=tune.num_virtual_tokens={tokens}",
        "--set=privacy.max_grad_norm=5",
    )
    code, out, err = tune(main, folder, *options)
    assert code == 0, err
    assert read_prompt(artifact(out)).embeddings.shape == (tokens, 32)


def test_a_search_claims_the_price_of_its_selection_and_hides_its_trials(
    folder: Path, main: Callable
) -> None:
    settings = "{mean_trials: 2, learning_rate: [0.01, 0.1], max_grad_norm: [0.1, 1.0]}"
    search = f"--set=tune.search={settings}"
    code, out, err = tune(main, folder, search)
    assert code == 0, err
    path = artifact(out)
    screen = err + "".join(log.read_text() for log in path.parent.glob("logs/*"))
    assert "tune: epsilon" in screen
    leaked = re.search(r"trial|\d+/\d+", screen)
    assert not leaked, "the numbers of trials and of validation examples are private"

    claim = claim_of(path)
    assert 7.9 < claim["epsilon"] <= 8
    assert claim["epsilon"] > claim["cross_checks"]["pld"] + 0.5, "selection is not free"
    # The chosen candidates stay private, so the card names none of them alone.
    rows = card_rows(path)
    assert rows["search, learning_rate"] == "(0.01, 0.1)"
    assert not {"learning_rate", "max_grad_norm"} & set(rows)
    assert claim["accountant"].startswith("RDP of repeat-and-select")
    assert main("verify", path)[0] == 0
    spent = budget(main, folder)
    assert spent["epsilon"] == pytest.approx(claim["epsilon"], abs=1e-6)
    manifest = read_manifest(path, "soft prompt")
    assert manifest.config["tune"]["search"]["mean_trials"] == 2
    assert "trials" not in set(claim) - {"mean_trials"}
    values = {str(value) for name, value in claim.items() if name != "steps"}
    assert str(spent["runs"][0]["steps_charged"]) not in values

    # The key is destroyed, so a search whose prompt was lost cannot be repeated for free.
    shutil.rmtree(path)
    code, out, err = tune(main, folder, search)
    assert (code, json.loads(out)["exit_code"]) == (4, 4)
    assert "key of run" in err
    assert "has been destroyed" in err
    assert "run `post-dist tune` with --resume never" in err


def audited(folder: Path, *, sampling_probability: float, steps: int) -> Path:
    """Write a run file with a plan of noise multiplier 1."""
    run = folder / "run.yaml"
    plan = (
        f"noise_multiplier: 1.0, sampling_probability: {sampling_probability}, "
        "target_delta: 1.0e-5, max_grad_norm: 0.1"
    )
    run.write_text(
        f"name: a\nprivacy: {{enabled: true, {plan}}}\ntune: {{batch_size: 1000, steps: {steps}}}\n"
    )
    return run


def test_the_audit_stays_below_the_claim_and_sees_missing_noise(
    tmp_path: Path, main: Callable
) -> None:
    code, out, _ = main("audit", audited(tmp_path, sampling_probability=0.5, steps=2), "--json")
    assert code == 0
    found = json.loads(out)
    print(found)
    assert 1.0 < found["epsilon_lower_bound"] <= found["epsilon_claimed"]
    assert found["epsilon_claimed"] < found["epsilon_lower_bound_without_noise"]


def test_the_audit_refuses_an_installation_whose_noise_is_too_small(
    tmp_path: Path, main: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    from post_dist.privacy.randomness import RandomSource

    normal = RandomSource.normal

    def too_small(self: RandomSource, count: int, *purpose: object) -> np.ndarray:
        return 0.4 * normal(self, count, *purpose)

    monkeypatch.setattr(RandomSource, "normal", too_small)
    code, _, err = main("audit", audited(tmp_path, sampling_probability=1.0, steps=1), "--json")
    assert code == 5
    assert "more than the plan claims" in err


def test_an_audit_that_sees_nothing_says_so(tmp_path: Path, main: Callable) -> None:
    code, _, err = main("audit", audited(tmp_path, sampling_probability=1e-5, steps=1), "--json")
    assert code == 2
    assert "even without noise the canaries show no more than the plan claims" in err


def test_the_benchmark_of_a_step(folder: Path, main: Callable) -> None:
    code, out, err = main(
        "bench", "tune", folder / "run.yaml", f"--set=inputs.student={folder / 'student'}", "--json"
    )
    assert code == 0, err
    found = json.loads(out)
    names = [
        "ordinary non-private",
        "opacus hooks",
        "dp",
        "dp shared prefix",
        "non-private shared prefix",
    ]
    assert [row["name"] for row in found["rows"]] == names
    assert list(found["ratios"]) == names
    assert all(row["seconds_per_step"] > 0 and row["peak_memory_mib"] > 0 for row in found["rows"])
    assert found["max_difference"] < 1e-5
