"""What ranks tell each other: a stop or refusal of rank 0, its view of the disk, its progress."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
from started import Command, rank_variables, run_ranks
from torch.distributed import TCPStore


def two_ranks(
    *arguments: object, prepare: tuple[str, str] = ("nothing", "nothing")
) -> tuple[list[int], list[str]]:
    """Run the command line on two ranks; return their exit codes and standard errors."""
    ranks = run_ranks(*arguments, preparations=prepare)
    return [rank.returncode for rank in ranks], [rank.stderr for rank in ranks]


def two_processes(program: list[str]) -> tuple[list[int], list[str]]:
    """Run a program as two ranks, without a launcher that would end one after the other."""
    running = []
    for variables in rank_variables(2):
        running.append(
            subprocess.Popen(
                [sys.executable, *program],
                env=os.environ | variables,
                stderr=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                text=True,
            )
        )
    said = [process.communicate(timeout=500)[1] for process in running]
    return [process.returncode for process in running], said


@pytest.fixture(scope="module")
def distilled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a run file whose student exists already."""
    folder = tmp_path_factory.mktemp("distilled")
    run = tiny.write_run(folder)
    tiny.write_student(folder / "student")
    return run


def test_all_ranks_stop_with_rank_0_while_it_tunes(distilled: Path, tmp_path: Path) -> None:
    command = (
        "tune",
        distilled,
        f"--set=inputs.student={distilled.parent / 'student'}",
        f"--output={tmp_path}",
    )
    codes, said = two_ranks(*command, prepare=("stopped at its third step", "nothing"))
    assert codes == [6, 6], said
    assert "is saved at step 3 of 6" in said[0]
    assert "another rank was stopped" in said[1]
    codes, said = two_ranks(*command)
    assert codes == [0, 0], said
    assert "resuming from step 3" in said[0]


def test_one_rank_of_a_node_asks_the_hub(
    distilled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HUB_CACHE_OF_THIS_TEST", str(distilled.parent / "teacher"))
    settings = ["teacher.path=some/teacher", f"teacher.revision={'a' * 40}", "distill.steps=1"]
    codes, said = two_ranks(
        "distill",
        distilled,
        *(f"--set={setting}" for setting in settings),
        f"--output={tmp_path}",
        prepare=2 * ("told when the hub is asked",),
    )
    assert codes == [0, 0], said
    assert "asked the hub for some/teacher" in said[0]
    assert "asked the hub" not in said[1]


def test_all_ranks_are_refused_with_rank_0(distilled: Path, tmp_path: Path) -> None:
    settings = [
        "privacy.enabled=true",
        "privacy.declared_examples=160",
        "privacy.noise_multiplier=1",
        "privacy.max_total_epsilon=0.01",
    ]
    settings += [
        f"privacy.ledger={tmp_path / 'ledger'}",
        f"inputs.student={distilled.parent / 'student'}",
    ]
    codes, said = two_ranks(
        "tune", distilled, *(f"--set={setting}" for setting in settings), f"--output={tmp_path}"
    )
    assert codes == [5, 5], said
    assert "above its cap" in said[0]
    assert "another rank failed" in said[1]
    assert not list(tmp_path.glob("tiny/*/artifact"))


def test_another_node_looks_for_nothing_before_it_is_there(distilled: Path, tmp_path: Path) -> None:
    command = (
        "pipeline",
        distilled,
        f"--output={tmp_path / 'new'}",
        "--set=distill.cache=hidden",
        "--set=distill.alpha_cos=0",
    )
    codes, said = two_ranks(
        *command, prepare=("nothing", "on a node that remembers what it missed")
    )
    assert codes == [0, 0], said


def test_models_and_data_are_hashed_once(distilled: Path, tmp_path: Path) -> None:
    command = (
        "pipeline",
        distilled,
        f"--output={tmp_path}",
        "--set=distill.cache=hidden",
        "--set=distill.alpha_cos=0",
    )
    codes, said = two_ranks(*command, prepare=("nothing", "allowed to hash prompts alone"))
    assert codes == [0, 0], said


def test_rank_0_alone_holds_the_student_whole(distilled: Path, tmp_path: Path) -> None:
    command = ("distill", distilled, f"--output={tmp_path}", "--set=engine.zero_stage=3")
    codes, said = two_ranks(*command, prepare=("nothing", "given no whole model"))
    assert codes == [0, 0], said


@pytest.mark.parametrize(
    ("rank", "said"),
    [
        (0, "rank 1 of 2 has not started within 2 s"),
        (1, "rank 1 of 2 has not reached rank 0 on 127.0.0.1"),
    ],
)
def test_a_rank_that_never_comes_is_named(distilled: Path, rank: int, said: str) -> None:
    command = Command(
        "distill",
        distilled,
        "--set=engine.join_timeout_seconds=2",
        variables=rank_variables(2)[rank],
    )
    message = command.communicate()[1]
    assert command.returncode == 3, message
    assert said in message


def test_a_rank_of_an_earlier_start_does_not_count(distilled: Path) -> None:
    variables = rank_variables(2)[0]
    # torchrun's own store, in which both ranks of the first start have met.
    store = TCPStore("127.0.0.1", int(variables["MASTER_PORT"]), is_master=True)
    for key in ("started/0", "started/1", "started/0/0", "started/0/1"):
        store.set(key, "node")
    restarted = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "1"}
    command = Command(
        "distill",
        distilled,
        "--set=engine.join_timeout_seconds=2",
        variables=variables | restarted,
    )
    message = command.communicate()[1]
    assert command.returncode == 3, message
    assert "rank 1 of 2 has not started within 2 s" in message


def test_a_rank_that_waits_for_others_leaves_in_seconds(distilled: Path) -> None:
    variables = rank_variables(2)[0]
    command = Command("distill", distilled, variables=variables)
    # It waits ten minutes for rank 1, once its store is there.
    place = ("127.0.0.1", int(variables["MASTER_PORT"]))
    for _ in range(600):
        with contextlib.suppress(OSError), socket.create_connection(place):
            break
        time.sleep(0.1)
    command.send_signal(signal.SIGTERM)
    asked = time.monotonic()
    message = command.communicate(30)[1]
    assert command.returncode == 6, message
    assert "stopped by SIGTERM in: waiting for all ranks to start" in message
    print(f"left {time.monotonic() - asked:.1f} s after SIGTERM")


WATCHED = """
import sys, time
from post_dist.runtime.distributed import start
from post_dist.runtime.watchdog import phase, watch

world = start(0)
world.barrier()
watch(world.rank, 4)

def work():
    for part in range(5):
        phase(f"part {part}")
        time.sleep(2 if sys.argv[1] == "works" else 600)

world.on_main(work)
world.leave()
"""


def test_who_waits_for_rank_0_is_not_ended_while_that_works() -> None:
    codes, said = two_processes(["-c", WATCHED, "works"])
    assert codes == [0, 0], said


def test_a_rank_0_that_hangs_is_ended_by_its_own_watchdog_and_the_others_follow() -> None:
    codes, said = two_processes(["-c", WATCHED, "hangs"])
    assert codes[0] == 3, said
    assert "rank 0 has made no progress for 4 s in: part 0" in said[0]
    assert codes[1] not in (0, 3), (
        "it has lost its connection, and no watchdog of its own has ended it"
    )
    assert "/gloo/" in said[1]
