"""The cluster is what the tests of post_dist under Slurm take it for."""

import os
import signal
import subprocess
from pathlib import Path

from cluster import Cluster, in_time

FIRST_START_SLEEPS = '[ -n "$SLURM_RESTART_COUNT" ] || sleep 300'


def submit(slurm: Cluster, script: str, *options: str, output: str = "/dev/null") -> str:
    submitted = slurm.run(
        "sbatch",
        "--parsable",
        f"--output={output}",
        "--open-mode=append",
        *options,
        f"--wrap={script}",
    )
    assert submitted.returncode == 0, submitted.stderr
    return submitted.stdout.strip()


def state(slurm: Cluster, job: str) -> str:
    """What the controller says now; accounting lags behind it."""
    return slurm.run(
        "squeue", "--noheader", "--jobs", job, "--states=all", "--format=%T"
    ).stdout.strip()


def all_in(namespaces: set[str]) -> list[str]:
    """The processes in these network namespaces."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if os.readlink(process / "ns" / "net") in namespaces:
                found.append(process.name)
        except OSError:  # it ended meanwhile
            continue
    return found


def test_nodes_are_machines_of_their_own(slurm: Cluster) -> None:
    name, shm = "$(hostname)", "$(touch /dev/shm/$(hostname); ls /dev/shm)"
    address = "$(ip -4 -brief address show eth0 | tr -s ' ' | cut -d ' ' -f 3)"
    processes = "$(ls -d /proc/[0-9]* | wc -l)"
    listed = slurm.run("srun", "-N2", "bash", "-c", f"echo {name} {shm} {address} {processes}")
    first, second = sorted(line.split() for line in listed.stdout.splitlines())
    assert (first[:2], second[:2]) == (["n1", "n1"], ["n2", "n2"]), listed.stderr
    assert first[2] != second[2]
    assert max(int(first[3]), int(second[3])) < 20


def test_accounting_knows_a_finished_job(slurm: Cluster) -> None:
    job = submit(slurm, "true", "--gres=gpu:1")
    assert in_time(lambda: slurm.accounted_states(job) == ["COMPLETED"], 20), (
        slurm.accounted_states(job)
    )
    assert (
        "gres/gpu=1"
        in slurm.run(
            "sacct", "-X", "--noheader", "--parsable2", "--format=AllocTRES", "--jobs", job
        ).stdout
    )


def test_gpus_are_handed_out_and_counted(slurm: Cluster) -> None:
    both = slurm.run(
        "srun",
        "--gpus-per-node=2",
        "--ntasks=2",
        "--gpus-per-task=1",
        "printenv",
        "CUDA_VISIBLE_DEVICES",
    )
    assert sorted(both.stdout.split()) == ["0", "1"], both.stderr
    refused = slurm.run("sbatch", "--test-only", "--gres=gpu:3", "--wrap=true")
    assert refused.returncode == 1
    assert "Requested node configuration is not available" in refused.stderr


def test_an_unknown_partition_is_refused_without_a_job(slurm: Cluster) -> None:
    assert slurm.run("sbatch", "--test-only", "--partition=low", "--wrap=true").returncode == 0
    refused = slurm.run("sbatch", "--test-only", "--partition=nowhere", "--wrap=true")
    assert refused.returncode == 1
    assert "invalid partition" in refused.stderr


def test_a_requeued_job_starts_again_within_20_s(slurm: Cluster) -> None:
    job = submit(slurm, FIRST_START_SLEEPS)
    assert in_time(lambda: state(slurm, job) == "RUNNING", 20)
    assert slurm.run("scontrol", "requeue", job).returncode == 0
    assert in_time(lambda: state(slurm, job) == "COMPLETED", 20), state(slurm, job)
    assert in_time(lambda: slurm.accounted_states(job) == ["REQUEUED", "COMPLETED"], 20), (
        slurm.accounted_states(job)
    )


def test_a_job_in_low_is_warned_and_makes_room(slurm: Cluster, tmp_path: Path) -> None:
    log = tmp_path / "low.log"
    warned = "trap 'echo warned; scontrol requeue $SLURM_JOB_ID' USR1; while :; do sleep 0.2; done"
    low = submit(
        slurm,
        warned,
        "--partition=low",
        "-N4",
        "--exclusive",
        "--signal=B:USR1@30",
        output=str(log),
    )
    assert in_time(lambda: state(slurm, low) == "RUNNING", 20)
    main = submit(slurm, "true", "-N4", "--exclusive")
    assert in_time(lambda: state(slurm, main) == "COMPLETED", 20), state(slurm, main)
    assert log.read_text().splitlines()[0] == "warned"
    assert in_time(lambda: slurm.accounted_states(low)[:1] == ["REQUEUED"], 20), (
        slurm.accounted_states(low)
    )


def test_a_crashed_node_fails_its_job_which_ends_once_the_node_is_back(slurm: Cluster) -> None:
    job = submit(slurm, FIRST_START_SLEEPS, "-N4")
    assert in_time(lambda: state(slurm, job) == "RUNNING", 20)
    slurm.kill_node("n2")
    assert in_time(lambda: state(slurm, job) == "PENDING", 60), state(slurm, job)
    assert slurm.nodes_in_service() == ["n1", "n3", "n4"]
    slurm.start_node("n2")
    assert in_time(lambda: state(slurm, job) == "COMPLETED", 30), state(slurm, job)
    assert in_time(lambda: slurm.accounted_states(job) == ["NODE_FAIL", "COMPLETED"], 20), (
        slurm.accounted_states(job)
    )


def test_up_changes_nothing_that_is_up(slurm: Cluster) -> None:
    job = submit(slurm, "sleep 300")
    assert in_time(lambda: state(slurm, job) == "RUNNING", 20)
    before = slurm.processes()
    Cluster(slurm.folder).up()
    assert slurm.processes() == before
    assert state(slurm, job) == "RUNNING"


def test_up_clears_what_a_crash_left(slurm: Cluster, second_slurm: Cluster) -> None:
    second_slurm.up()
    wrecked = second_slurm.processes()
    for name in ("head", "n1"):
        os.kill(wrecked[name], signal.SIGKILL)
    second_slurm.kill_node("n2")
    with subprocess.Popen(["sleep", "300"]) as stranger:
        try:
            (second_slurm.live / "run" / "n2.pid").write_text(
                str(stranger.pid)
            )  # its number was given to another process
            (second_slurm.live / "db" / "ibdata1").unlink()
            second_slurm.up()
            assert stranger.poll() is None
        finally:
            stranger.kill()
    assert len(second_slurm.processes()) == 5
    assert not set(second_slurm.processes().values()) & set(wrecked.values())
    assert second_slurm.run("srun", "-N4", "true").returncode == 0
    assert slurm.nodes_in_service() == second_slurm.nodes_in_service()


def test_down_leaves_nothing_behind(slurm: Cluster, second_slurm: Cluster) -> None:
    second_slurm.up()
    namespaces = {
        os.readlink(f"/proc/{first}/ns/net") for first in second_slurm.processes().values()
    }
    assert len(namespaces) == 5
    assert len(all_in(namespaces)) > 10
    second_slurm.down()
    assert all_in(namespaces) == []
    assert second_slurm.processes() == {}
    links = subprocess.run(["ip", "link"], capture_output=True, text=True, check=True).stdout
    assert str(second_slurm.folder) not in links
    assert sorted(entry.name for entry in second_slurm.folder.iterdir()) == ["lock", "log"]
    assert slurm.run("srun", "true").returncode == 0
