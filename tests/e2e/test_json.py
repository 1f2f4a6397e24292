"""`--json`: one object on standard output, of a result or of an error, and nothing else there."""

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tiny
import typer

from post_dist.cli import app


class Calls(NamedTuple):
    """How a test calls a command. `{w}` is the folder of `world`.

    Attributes:
        success: arguments of a call that succeeds. Later commands read what it has written.
        keys: keys of its object.
        failures: arguments of calls that fail, with their exit codes.
    """

    success: str
    keys: str
    failures: Mapping[str, int]


RUN_FILES = {"{w}/none.yaml": 2, "{w}/malformed.yaml": 2, "{w}/empty.yaml": 2}
"""Run files that a command refuses: missing, not in the schema, without the needed sections."""
FOLDERS = {"{w}/none": 2, "{w}/run.yaml": 2, "one two three": 2}
NOT_WRITABLE = {"{w}/run.yaml --output={w}/run.yaml/runs": 2}
NOT_DISTILLED = {"{w}/run.yaml --set=distill.steps=7": 2}
ARTIFACT = "{w}/runs/tiny/latest/{stage}/artifact"
STUDENT = ARTIFACT.replace("{stage}", "distill")
PROMPT = ARTIFACT.replace("{stage}", "tune")
CALLS = {
    "corpus": Calls("{w}/run.yaml", "path tokens documents sequences", RUN_FILES | NOT_WRITABLE),
    "signals": Calls(
        "{w}/run.yaml", "path files", RUN_FILES | {"{w}/run.yaml --set=distill.cache=none": 2}
    ),
    "distill": Calls(
        "{w}/run.yaml",
        "stage artifact",
        RUN_FILES | NOT_WRITABLE | {"{w}/run.yaml --set=student.num_layers=9": 2},
    ),
    "warm-start": Calls("{w}/run.yaml", "stage artifact", RUN_FILES | NOT_DISTILLED),
    "tune": Calls(
        "{w}/run.yaml",
        "stage artifact",
        RUN_FILES | {"{w}/run.yaml --set=inputs.student={w}/broken": 4},
    ),
    "transfer": Calls(
        "{w}/run.yaml",
        "stage artifact",
        RUN_FILES | {"{w}/run.yaml --set=inputs.source_prompt={w}/broken": 4},
    ),
    "evaluate": Calls(
        "{w}/run.yaml --set=evaluate.baselines=[]",
        "task split test_readings rows",
        RUN_FILES | NOT_DISTILLED,
    ),
    "pipeline": Calls("{w}/run.yaml", "task split test_readings rows report", RUN_FILES),
    "predict": Calls(
        f"{PROMPT} {{w}}/texts.txt --model={STUDENT}",
        "predictions",
        {
            f"{{w}}/none {{w}}/texts.txt --model={STUDENT}": 4,
            f"{{w}}/broken {{w}}/texts.txt --model={STUDENT}": 4,
            f"{PROMPT} {{w}}/none.txt --model={STUDENT}": 2,
            f"{PROMPT} {{w}}/texts.txt --model={{w}}/none": 2,
            f"{PROMPT} {{w}}/texts.txt --model={STUDENT} --format=csv": 2,
        },
    ),
    "export": Calls(
        f"{PROMPT} --to=hub --model={STUDENT} --output={{w}}/hub",
        "format path files",
        {
            f"{{w}}/none --to=hub --model={STUDENT} --output={{w}}/new": 4,
            f"{{w}}/broken --to=hub --model={STUDENT} --output={{w}}/new": 4,
            f"{PROMPT} --to=hub --model={{w}}/none --output={{w}}/new": 2,
            f"{PROMPT} --to=hub --model={STUDENT} --output={{w}}": 2,
            f"{PROMPT} --to=words --model={STUDENT} --output={{w}}/new": 2,
        },
    ),
    "sign": Calls(
        f"{PROMPT} --key={{w}}/key",
        "path signature signer",
        {
            "{w}/none --key={w}/key": 4,
            "{w}/broken --key={w}/key": 4,
            f"{PROMPT} --key={{w}}/none": 2,
            f"{PROMPT} --key={{w}}/texts.txt": 2,
        },
    ),
    "verify": Calls(
        PROMPT,
        "ok kind problems signature epsilon delta unit",
        {"{w}/none": 4, "{w}/broken": 4, f"{PROMPT} --key={{w}}/none.pub": 2},
    ),
    "submit": Calls(
        "{w}/run.yaml pipeline --print",
        "jobs",
        {f"{each} tune": code for each, code in RUN_FILES.items()} | {"{w}/run.yaml words": 2},
    ),
    "init": Calls(
        "{w}/own --data={w}/private.csv --text=text --label=label",
        "run_file files columns",
        {
            "{w}/own --data={w}/private.csv": 2,
            "{w}/new --data={w}/none.csv --text=text --label=label": 2,
            "{w}/new --data={w}/texts.txt --text=text --label=label": 2,
            "{w}/run.yaml": 2,
        },
    ),
    "privacy": Calls(
        "{w}/run.yaml",
        "epsilon delta noise_multiplier sampling_probability steps accountant cross_checks "
        "epsilon_at_delta true_positive_rate_at_1_percent_false mean_trials private",
        RUN_FILES,
    ),
    "budget": Calls(
        "{w}/private.csv",
        "ledger epsilon delta private cap cap_delta anchor runs",
        {"{w}/none.jsonl": 2, "{w}/texts.txt": 4, "{w}/private.csv --delta=2": 2},
    ),
    "audit": Calls(
        "{w}/audited.yaml",
        "epsilon_claimed epsilon_lower_bound epsilon_lower_bound_without_noise delta confidence "
        "canaries runs steps_per_run",
        RUN_FILES | {"{w}/audited.yaml --set=privacy.sampling_probability=1.0e-5": 2},
    ),
    "check": Calls(
        "{w}/run.yaml",
        "ok conflicts label_words epsilon stages not_checked",
        RUN_FILES | {"{w}/run.yaml --set=inputs.student={w}/none": 2},
    ),
    "plan": Calls(
        "{w}/run.yaml --gpus-per-node=1",
        "gpus gpu_memory_gib precision teacher_parameters student_parameters corpus stages "
        "hours gpu_hours not_counted conflicts assumptions long_run gpu",
        RUN_FILES | {"{w}/run.yaml --gpu=none": 2, "{w}/run.yaml --hardware={w}/texts.txt": 2},
    ),
    "report": Calls(
        "{w}/runs/tiny", "reports", {"{w}/none": 2, "{w}/broken": 2, "{w}/texts.txt": 2}
    ),
    "doctor": Calls(
        "{w}/runs",
        "ok checks built",
        {"{w}/runs --ranks --gpu=none": 2, "one two": 2, "--ranks=1": 2},
    ),
    "ls": Calls("{w}/runs", "runs", FOLDERS),
    "status": Calls("{w}/runs/tiny", "stages", FOLDERS),
    "clean": Calls("{w}/runs", "removed leftovers", FOLDERS),
    "bench distill": Calls(
        "{w}/run.yaml", "device rows ratios memory_ratios max_difference settings", RUN_FILES
    ),
    "bench tune": Calls(
        "{w}/run.yaml",
        "device rows ratios memory_ratios max_difference settings",
        RUN_FILES | NOT_DISTILLED,
    ),
    "bench transfer": Calls(
        "{w}/run.yaml",
        "device rows ratios memory_ratios max_difference once settings",
        RUN_FILES | NOT_DISTILLED,
    ),
    "bench scale": Calls(
        "{w}/run.yaml",
        "device ranks hosts precision zero_stage shard_group rows",
        RUN_FILES | {"{w}/run.yaml --submit=0": 2},
    ),
    "bench fabric": Calls(
        "", "device ranks hardware collectives", {"one": 2, "--write={w}/run.yaml/mine.yaml": 2}
    ),
}
"""Calls of each command, in an order in which one finds the results of others."""
FAILURES = [(name, given) for name, calls in CALLS.items() for given in calls.failures]
OWN_ANSWERS = ("check", "verify")
"""Commands whose object lists what is wrong, in place of an error."""

PROGRAM = """
import ctypes, json, os, sys
from pathlib import Path
from post_dist import cli
from post_dist.commands import printing

codes = []
cli.end_process = codes.append
cli.leave_in_seconds = lambda: None
folder = Path(sys.argv[1])
environment = dict(os.environ)
for number, arguments in enumerate(json.loads((folder / "calls.json").read_text())):
    for name, descriptor in (("out", 1), ("err", 2)):
        os.dup2(os.open(folder / f"{number}.{name}", os.O_WRONLY | os.O_CREAT), descriptor)
    printing._Answers.stream = None
    sys.argv = ["post-dist", *arguments]
    cli.main()
    import deepspeed  # which warns when it is first imported
    print("a library's words")
    sys.stdout.flush()
    sys.stderr.flush()
    ctypes.CDLL(None).fflush(None)
    os.environ.clear()
    os.environ.update(environment)
(folder / "codes.json").write_text(json.dumps(codes))
"""
"""Runs many commands in one process. Each has files of its own as standard output and error."""


class Ended(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run file for all stages, and with inputs that are refused."""
    folder = tmp_path_factory.mktemp("world")
    run = tiny.write_run(folder)
    private = "{enabled: true, declared_examples: 160, noise_multiplier: 1, "
    public = 'template: "Review: {text} It was", labels: {0: [bad], 1: [good]}, '
    text = run.read_text()
    text = text.replace("privacy: {", f"privacy: {private}")
    text = text.replace("distill: {", "distill: {cache: hidden, ")
    text = text.replace("public_task: {", f"public_task: {{{public}")
    run.write_text(f"{text}warm_start: {{num_virtual_tokens: 5, steps: 4, batch_size: 4}}\n")
    plan = "noise_multiplier: 1.0, sampling_probability: 0.5, target_delta: 1.0e-5"
    audited = f"privacy: {{enabled: true, max_grad_norm: 0.1, {plan}}}\ntune: {{steps: 2}}\n"
    (folder / "audited.yaml").write_text(f"name: audited\n{audited}")
    (folder / "empty.yaml").write_text("name: empty\n")
    (folder / "malformed.yaml").write_text("name: malformed\ntunes: {}\n")
    (folder / "texts.txt").write_text("a film\n")
    (folder / "broken").mkdir()
    (folder / "broken/post_dist.json").write_text("{")
    subprocess.run(
        ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / "key"], check=True
    )
    return folder


@pytest.fixture(scope="module")
def ended(world: Path) -> dict[tuple[str, str], Ended]:
    """How each call has ended: first those that succeed, then the others."""
    calls = [(name, calls.success) for name, calls in CALLS.items()] + FAILURES
    arguments = [
        [*name.split(), *shlex.split(given.format(w=world)), "--json"] for name, given in calls
    ]
    (world / "calls").mkdir()
    (world / "calls/calls.json").write_text(json.dumps(arguments))
    # DeepSpeed warns on standard output if the variable is not set, as for a user.
    environment = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    subprocess.run(
        [sys.executable, "-c", PROGRAM, world / "calls"], env=environment, check=True, cwd=world
    )
    codes = json.loads((world / "calls/codes.json").read_text())
    found = {}
    for number, (call, code) in enumerate(zip(calls, codes, strict=True)):
        out, err = ((world / f"calls/{number}.{name}").read_text() for name in ("out", "err"))
        found[call] = Ended(code, out, err)
    return found


def commands(group: Any, place: str = "") -> Iterator[str]:
    """The names of all commands of the parser, as a user types them."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{place}{name} ")
        else:
            yield f"{place}{name}"


def test_each_command_is_called() -> None:
    assert set(CALLS) == set(commands(typer.main.get_command(app)))
    # With the unknown option, each has three failures or more.
    assert min(len(calls.failures) for calls in CALLS.values()) >= 2


@pytest.mark.parametrize("name", CALLS)
def test_a_result_is_one_object(ended: Mapping[tuple[str, str], Ended], name: str) -> None:
    code, out, err = ended[name, CALLS[name].success]
    found = json.loads(out)
    # This machine may lack something that `doctor` wants.
    assert code == (0 if found.get("ok", True) else 3), err
    assert list(found) == CALLS[name].keys.split()
    assert "a library's words" in err
    assert "real_accelerator" not in err, "a warning of DeepSpeed's"


@pytest.mark.parametrize(("name", "given"), FAILURES)
def test_an_error_is_one_object(
    ended: Mapping[tuple[str, str], Ended], name: str, given: str
) -> None:
    code, out, err = ended[name, given]
    assert code == CALLS[name].failures[given], err
    found = json.loads(out)
    if name in OWN_ANSWERS and "ok" in found:
        assert found["ok"] is False
        return
    assert list(found)[-3:] == ["error", "hint", "exit_code"]
    assert found["exit_code"] == code
    check_message(found["error"], err)


def check_message(error: str, err: str) -> None:
    """Standard error has the message too. typer draws a frame around its own."""
    assert error
    words = err.replace("│", " ").split()
    assert " ".join(error.split()) in " ".join(words)


@pytest.mark.parametrize("name", CALLS)
def test_an_unknown_option_is_one_object(name: str) -> None:
    command = [sys.executable, "-m", "post_dist", *name.split(), "--bogus", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = json.loads(done.stdout)
    assert (done.returncode, found["exit_code"]) == (2, 2)
    assert found["error"].startswith("No such option: --bogus")
    check_message(found["error"], done.stderr)


BROKEN = """
import signal, sys, time
from post_dist import api, cli
from post_dist.runtime.watchdog import watch

# A run of the tests in the background ignores Ctrl-C, and so would this process.
signal.signal(signal.SIGINT, signal.default_int_handler)

def waits(*given, **named):
    print("ready", file=sys.stderr, flush=True)
    time.sleep(60)

def hangs(*given, **named):
    watch(0, 0.5)
    waits()

def has_a_bug(*given, **named):
    print("ready", file=sys.stderr, flush=True)
    raise RuntimeError("a private text")

api.tune = {"waits": waits, "hangs": hangs, "has a bug": has_a_bug}[sys.argv[1]]
api.account = waits
sys.argv = ["post-dist", *sys.argv[2:], "--json"]
cli.main()
"""
"""Runs a command whose work does not end by itself, or fails with an error of a library."""


@pytest.mark.parametrize(
    ("how", "name", "number", "code", "message"),
    [
        # Only the stages treat SIGTERM as a request to stop.
        ("waits", "tune", signal.SIGTERM, 6, "stopped by SIGTERM in: starting"),
        ("waits", "privacy", signal.SIGINT, 130, "the command was stopped"),
        ("hangs", "tune", 0, 3, "rank 0 has made no progress for 0.5 s in: starting"),
        ("has a bug", "tune", 0, 1, "internal error: RuntimeError"),
    ],
)
def test_a_command_that_does_not_end_by_itself_gives_one_object(
    world: Path, how: str, name: str, number: int, code: int, message: str
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", BROKEN, how, name, world / "empty.yaml"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr.readline() == "ready\n"
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    found = json.loads(out)
    assert (process.returncode, found["exit_code"], found["error"]) == (code, code, message), err
    assert "a private text" not in out + err


def test_an_error_that_nobody_reads_keeps_its_exit_code_and_its_secret(world: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-c", BROKEN, "has a bug", "tune", world / "empty.yaml"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert done.returncode == 1
    assert "internal error: RuntimeError" in done.stderr
    assert "a private text" not in done.stderr
