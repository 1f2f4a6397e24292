"""Kill commands at random moments, run each again, and compare the results.

    export DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 PYTHONPATH=tests
    python tests/border/killed_commands.py FOLDER [--times N] [--commands NAME...]

The reference is a command that was left alone. After a kill, each artifact is whole. The same
command then ends with the same result, and leaves the same files as without the kill.
"""

import argparse
import hashlib
import os
import random
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import tiny
from faults import fork_command

from post_dist.admission.private_folder import PREFIX
from post_dist.artifacts.manifest import FILE_NAME, SIGNATURE
from post_dist.artifacts.run_folder import ADMITTED
from post_dist.verify import verify

_SECONDS_TO_END = 15
"""Time after which the children of a killed command must have ended."""
_PLAN = ("privacy.enabled=true", "privacy.declared_examples=160", "privacy.noise_multiplier=1")

_RANDOM = re.compile(r'"epsilon_lower_bound\w*": [^,]*')
"""What an audit finds with new noise."""


class Command(NamedTuple):
    """A command to kill.

    Attributes:
        arguments: its command line.
        result: pattern of the files that it makes; empty if it prints its result.
    """

    arguments: Sequence[object]
    result: str = ""


class Outcome(NamedTuple):
    """What a command has made.

    Attributes:
        code: its exit code.
        printed: what it has printed as JSON.
        results: digests of its results, by their paths.
        files: the paths of all files in its folder and among the temporary files.
    """

    code: int
    printed: list[str]
    results: dict[str, str]
    files: set[str]


def commands(work: Path) -> dict[str, Command]:
    """Return the commands by name. They read what `prepare` has made."""
    run = work / "run.yaml"
    prompt = work / "received/prompt"
    student = work / "received/student"
    inputs = (f"--set=inputs.student={student}", f"--set=inputs.source_prompt={prompt}")
    transferred = f"--set=inputs.target_prompt={work}/received/transferred"
    # The others are runs of the stages.
    without_baselines = "--set=evaluate.baselines=[]"
    output = f"--output={work}/provider"
    plan = [f"--set={setting}" for setting in _PLAN]
    exported = ("--to", "hub", "--output", work / "exported", "--model", student)
    artifact = "provider/*/{}-*/artifact/{}"
    return {
        "verify": Command(("verify", student, "--json")),
        "sign": Command(("sign", prompt, "--key", work / "key"), f"received/prompt/{SIGNATURE}"),
        "predict": Command(("predict", prompt, work / "public.csv", "--model", student)),
        "export": Command(("export", prompt, *exported), "exported/*"),
        "report": Command(("report", work / "runs/tiny"), "runs/tiny/report.*"),
        "audit": Command(("audit", run, *plan, "--json")),
        "transfer": Command(
            ("transfer", run, *inputs, output),
            artifact.format("transfer", "adapter_model.safetensors"),
        ),
        "evaluate": Command(
            ("evaluate", run, *inputs, transferred, without_baselines, output),
            artifact.format("evaluate", "table.json"),
        ),
    }


def start(command: Command, work: Path) -> int:
    """Start a command, and return its process number."""
    # Only a process that has not asked yet reads the variable.
    variables = {"TMPDIR": str(work / "tmp"), "XDG_STATE_HOME": str(work / "state")}
    arguments = [str(argument) for argument in command.arguments]
    return fork_command(
        arguments, variables, work / "said", lambda: setattr(tempfile, "tempdir", None)
    )


def left_alone(command: Command, work: Path) -> Outcome:
    """Run a command to its end."""
    said = work / "said"
    said.unlink(missing_ok=True)
    _, status = os.waitpid(start(command, work), 0)
    lines = said.read_text().splitlines()
    printed = [_RANDOM.sub("", line) for line in lines if line.startswith("{")]
    results = {}
    for path in sorted(work.glob(command.result)) if command.result else ():
        results[str(path.relative_to(work))] = hashlib.sha256(path.read_bytes()).hexdigest()
    files = {str(path.relative_to(work)) for path in work.rglob("*")}
    return Outcome(os.waitstatus_to_exitcode(status), printed, results, files)


def prepare(work: Path) -> None:
    """Make a finished run, artifacts as if another party had sent them, and a key to sign with."""
    for name in ("tmp", "state"):
        (work / name).mkdir(parents=True)
    pipeline = Command(("pipeline", tiny.write_run(work), "--json"))
    made = left_alone(pipeline, work)
    assert made.code == 0, (work / "said").read_text()
    sent = {"distill": "student", "tune": "prompt", "transfer": "transferred"}
    for stage, name in sent.items():
        shutil.copytree(work / f"runs/tiny/latest/{stage}/artifact", work / f"received/{name}")
    # With the key of its names, the folder of a private run has the same name each time.
    (work / "provider/tiny").mkdir(parents=True)
    shutil.copy(work / "runs/tiny/.name_key", work / "provider/tiny/.name_key")
    key = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(work / "key")]
    subprocess.run(key, check=True)


def children_of(process: int) -> list[int]:
    """Return the process numbers of the children of a process."""
    tasks = Path(f"/proc/{process}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


def kill(command: Command, work: Path, seconds: float) -> bool:
    """Start a command and kill it after a time; return whether it was still running."""
    process = start(command, work)
    time.sleep(seconds)
    children = children_of(process)
    os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    deadline = time.monotonic() + _SECONDS_TO_END
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.monotonic() < deadline, f"children of a killed command go on: {children}"
        time.sleep(0.05)
    return os.WIFSIGNALED(status)


def broken_artifacts(work: Path) -> list[str]:
    """Return the problems of the artifacts that have their final names."""
    problems = []
    for manifest in work.rglob(FILE_NAME):
        folder = manifest.parent
        # The name of a folder that is not finished, or of a private copy, begins with a point.
        is_final = not any(part.startswith(".") for part in folder.relative_to(work).parts)
        # An admitted student has a configuration of its own.
        if is_final and folder.parent.name != ADMITTED:
            problems += verify(folder)["problems"]
    return problems


def let_a_minute_pass(work: Path) -> None:
    """Make the copies of a killed command as old as the next command wants them to be."""
    for copy in work.rglob(f"{PREFIX}*"):
        os.utime(copy, (0, 0))


def faults(wanted: Outcome, again: Outcome) -> list[str]:
    """Return how a command that was run again differs from the reference."""
    found = []
    if again.code != 0:
        found.append(f"exit code {again.code}")
    if (again.printed, again.results) != (wanted.printed, wanted.results):
        found.append("another result")
    found += [f"left {name}" for name in sorted(again.files - wanted.files)]
    return found + [f"lost {name}" for name in sorted(wanted.files - again.files)]


def main() -> None:
    """Kill each command, and print a line for it; fail if anything went wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--times", type=int, default=25)
    parser.add_argument("--commands", nargs="*")
    given = parser.parse_args()
    work = given.folder.resolve() / "work"
    prepared = given.folder.resolve() / "prepared"
    if not prepared.exists():
        prepare(work)
        work.rename(prepared)
    failed = False
    for name in given.commands or commands(work):
        command = commands(work)[name]
        found = Counter()
        renew(prepared, work)
        began = time.monotonic()
        wanted = left_alone(command, work)
        seconds = time.monotonic() - began
        assert wanted.code == 0, (work / "said").read_text()
        killed = 0
        while killed < given.times:
            renew(prepared, work)
            if not kill(command, work, random.uniform(0, seconds)):
                continue
            killed += 1
            found.update(broken_artifacts(work))
            let_a_minute_pass(work)
            found.update(faults(wanted, left_alone(command, work)))
        failed |= bool(found)
        print(f"{name}: {killed} kills within {seconds:.1f} s, {dict(found)}", flush=True)
    shutil.rmtree(work)
    raise SystemExit(failed)


def renew(prepared: Path, work: Path) -> None:
    """Put what `prepare` has made back in its place."""
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(prepared, work, symlinks=True)


if __name__ == "__main__":
    main()
