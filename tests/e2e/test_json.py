"""`--json`: one object on standard output, of a result or of an error, and nothing else there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import tiny
from started import Command

from post_dist.cli import app

STUDENT = Path(__file__).parents[1] / "data/artifacts_0_1_0/student"
RUN_FILE = ("{folder}/none.yaml",)
FAILURES = {
    **dict.fromkeys(
        ["pipeline", "corpus", "distill", "warm-start", "tune", "transfer", "evaluate", "plan"],
        RUN_FILE,
    ),
    **dict.fromkeys(
        ["privacy", "audit", "bench distill", "bench tune", "bench transfer"], RUN_FILE
    ),
    "bench scale": RUN_FILE,
    "bench fabric": ("--bogus",),
    "submit": (*RUN_FILE, "tune"),
    "budget": ("{folder}/none.jsonl",),
    "report": ("{folder}/none",),
    "doctor": ("--bogus",),
    "check": (),
    "ls": ("--bogus",),
    "clean": ("{folder}/none",),
    "status": (),
    "verify": (),
}


def commands_with_json() -> set[str]:
    """The commands that take `--json`."""
    found = set()
    groups = [
        ("", app),
        *((f"{group.name} ", group.typer_instance) for group in app.registered_groups),
    ]
    for prefix, group in groups:
        for command in group.registered_commands:
            if "json_" in command.callback.__annotations__:
                found.add(prefix + command.callback.__name__.replace("_", "-"))
    return found


def test_each_command_fails_with_one_object(tmp_path: Path) -> None:
    assert set(FAILURES) == commands_with_json()
    started = {}
    for name, arguments in FAILURES.items():
        given = [each.format(folder=tmp_path) for each in arguments]
        started[name] = Command(*name.split(), *given, "--json")
    for name, command in started.items():
        out, err = command.communicate()
        assert command.returncode == 2, (name, err)
        error = json.loads(out)
        assert list(error) == ["error", "hint", "exit_code"]
        assert error["exit_code"] == 2
        assert error["error"]
        # Standard error is as it is without the option.
        assert error["error"].split("\n")[0][:40] in " ".join(err.split("│")) or "Usage" in err


PROGRAM = """
import json, sys
from post_dist import cli
codes = []
cli.end_process = codes.append
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["post-dist", *arguments, "--json"]
    cli.main()
    import deepspeed
print("a library's words")
sys.exit(int(codes != [0] * len(codes)))
"""


def test_libraries_do_not_print_between_the_objects(tmp_path: Path) -> None:
    """DeepSpeed warns on standard output if DS_ACCELERATOR is not set, as for a user."""
    run = tiny.write_run(tmp_path)
    plan = "privacy: {declared_examples: 160, noise_multiplier: 1, ledger_anchors: anchors}"
    run.write_text(run.read_text().replace("privacy: {ledger_anchors: anchors}", plan))
    commands = [
        ["verify", str(STUDENT)],
        ["check", str(run)],
        ["plan", str(run)],
        ["privacy", str(run)],
        ["distill", str(run)],
        ["report", str(tmp_path / "none")],
    ]
    environment = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(commands)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    objects = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(objects) == len(commands), done.stderr
    assert "a library's words" in done.stderr
    assert "real_accelerator" not in done.stderr
