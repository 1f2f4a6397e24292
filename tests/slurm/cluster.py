"""A Slurm cluster on one machine: a head and four nodes.

    python tests/slurm/cluster.py install|up|down|status FOLDER

Each node has a host name, an address, processes and a /dev/shm of its own. All daemons live in
namespaces, so the machine's own network and processes see one bridge and five commands. To kill the
first process of a namespace is to crash a node. The bridge claims a subnet, so that clusters of
several folders run side by side.
"""

import argparse
import contextlib
import json
import os
import secrets
import shutil
import signal
import stat
import string
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import debian

HERE = Path(__file__).resolve().parent
ADDRESSES = {
    "head": 250,
    "n1": 1,
    "n2": 2,
    "n3": 3,
    "n4": 4,
}  # the last number; the machine itself is 254
NODES = [name for name in ADDRESSES if name != "head"]
IN_SERVICE = {"idle", "mixed", "allocated", "completing"}  # what sinfo calls a node that answers


class ClusterError(Exception):
    """The cluster does not do what it should; carries the ends of its logs."""


class Cluster:
    """The cluster of one folder.

    What it needs while it is up is in FOLDER/live; FOLDER/log stays when it goes down.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.live = self.folder / "live"
        self.log = self.folder / "log"

    @property
    def environment(self) -> dict[str, str]:
        """The environment of Slurm's commands, without that of a job that this process is in."""
        ours = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("SLURM", "SBATCH", "SRUN", "SALLOC"))
        }
        return ours | {"SLURM_CONF": str(self.live / "slurm.conf"), "PATH": debian.PATH}

    def run(self, *command: object, timeout: float = 120) -> subprocess.CompletedProcess:
        """Run one of Slurm's commands as a user of the cluster does."""
        return subprocess.run(
            list(map(str, command)),
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    def up(self) -> None:
        """Start whatever does not run.

        If the head does not answer, everything is started anew: a crash is not repaired.
        """
        if not (self._process("head") and in_time(self._head_answers, 10)):
            self._prepare()
            self._boot("head")
            self._wait("the start of slurmctld", self._head_answers, 60)
        for name in NODES:
            if not self._process(name):
                self._boot(name)
        self._wait("the start of the nodes", lambda: self.nodes_in_service() == NODES, 60)

    def down(self) -> None:
        """End every machine of the cluster; remove its bridge, and its files except the logs."""
        for name in ADDRESSES:
            self.kill_node(name)
        for bridge in self._bridges():
            for cable in _links("link", "master", bridge):
                _ip("link", "delete", cable["ifname"], check=False)
            _ip("link", "delete", bridge)
        shutil.rmtree(self.live, ignore_errors=True)

    def kill_node(self, name: str) -> None:
        """A crash: all that runs on the machine ends at once, and its cable is dead."""
        outer, first = self._outer_process(name), self._process(name)
        if outer:
            # The kernel ends the other processes of the namespace, and then `unshare`.
            with contextlib.suppress(ProcessLookupError):
                os.kill(first or outer, signal.SIGKILL)
            self._wait(f"the end of {name}", lambda: not self._outer_process(name), 10)

    def start_node(self, name: str) -> None:
        if not self._process(name):
            self._boot(name)
        self._wait(f"the return of {name}", lambda: name in self.nodes_in_service(), 60)

    def nodes_in_service(self) -> list[str]:
        listed = self.run("sinfo", "--noheader", "--Node", "--partition=main", "--format=%N %T")
        names = []
        for line in listed.stdout.splitlines():
            name, state = line.split()
            if state in IN_SERVICE:
                names.append(name)
        return names

    def accounted_states(self, job: str) -> list[str]:
        """The states of a job in accounting, one for each start; it may lag some seconds behind."""
        columns = ["--noheader", "--parsable2", "--allocations", "--duplicates", "--format=State"]
        return self.run("sacct", *columns, "--jobs", job).stdout.splitlines()

    def cancel_jobs(self) -> None:
        """End all jobs of all users, with every node back so that none hangs in COMPLETING."""
        self.up()
        jobs = self._jobs()
        if jobs:
            self.run("scancel", *jobs)
            self._wait("the end of cancelled jobs", lambda: not self._jobs(), 60)

    def processes(self) -> dict[str, int]:
        """The first process of each machine that runs, by the machine's name."""
        found = {}
        for name in ADDRESSES:
            process = self._process(name)
            if process:
                found[name] = process
        return found

    def _jobs(self) -> list[str]:
        return self.run("squeue", "--noheader", "--all", "--format=%A").stdout.split()

    def _head_answers(self) -> bool:
        return " is UP" in self.run("scontrol", "ping").stdout

    def _prepare(self) -> None:
        """Write everything that the daemons need, from nothing."""
        self._check_machine()
        self.down()
        shutil.rmtree(self.log, ignore_errors=True)
        inner = [self.live / name for name in ("run", "spool", "state")]
        for folder in (self.folder, self.live, self.log, *inner):
            folder.mkdir(parents=True, exist_ok=True)
            # Whatever the umask is: munge trusts no folder that others may write to, and other
            # users submit jobs.
            folder.chmod(0o755)
        for gpu in ("gpu0", "gpu1"):
            # A device that is /dev/null.
            os.mknod(self.live / gpu, stat.S_IFCHR | 0o666, os.makedev(1, 3))
        key = self.live / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        values = {"subnet": self._claim_subnet(), "live": self.live, "log": self.log}
        for template in (HERE / "templates").iterdir():
            file = self.live / template.name
            file.write_text(string.Template(template.read_text()).substitute(values))
            # slurmdbd demands that nobody else can read its file.
            file.chmod(0o600 if file.name == "slurmdbd.conf" else 0o644)

    def _check_machine(self) -> None:
        debian.check()
        if absent := debian.missing():
            raise debian.Unavailable(
                f"the Slurm cluster needs Debian's packages {' '.join(absent)}"
            )
        if len(str(self.live)) > 80:
            raise debian.Unavailable(
                f"the Slurm cluster needs a shorter folder name, for its sockets: {self.folder}"
            )
        if not all(folder.stat().st_mode & stat.S_IXOTH for folder in self.folder.parents):
            raise debian.Unavailable(
                f"the Slurm cluster needs a folder that every user may enter: {self.folder}"
            )

    def _claim_subnet(self) -> str:
        """Make a bridge, and return the subnet of its number.

        Of several clusters that start at once, one gets each bridge name.
        """
        for number in range(1, 255):
            subnet = f"10.213.{number}"
            bridge = f"pdist{number}"
            if any(
                address["local"].startswith(f"{subnet}.")
                for link in _links("address")
                for address in link["addr_info"]
            ):
                continue
            made = _ip("link", "add", bridge, "type", "bridge", check=False)
            if made.returncode == 0:
                _ip("link", "set", bridge, "alias", str(self.folder), "up")
                _ip("address", "add", f"{subnet}.254/24", "dev", bridge)
                return subnet
            if "File exists" not in made.stderr:
                raise debian.Unavailable(
                    f"the Slurm cluster needs a network bridge: {made.stderr.strip()}"
                )
        raise debian.Unavailable(
            "the Slurm cluster needs a subnet, and all of 10.213.0.0/16 is in use"
        )

    def _bridges(self) -> list[str]:
        return [
            link["ifname"]
            for link in _links("link", "type", "bridge")
            if link.get("ifalias") == str(self.folder)
        ]

    def _boot(self, name: str) -> None:
        """Start a machine's first process, apart from this one, and plug in its cable."""
        pid_file = self._pid_file(name)
        pid_file.unlink(missing_ok=True)
        apart = ["setsid", "--fork", "bash", "-c", 'echo $$ >"$0"; exec "$@"', str(pid_file)]
        machine = [*debian.NAMESPACES, "bash", str(HERE / "machine.sh"), str(self.folder), name]
        with (self.log / f"{name}.log").open("ab") as log:
            subprocess.run(
                [*apart, *machine],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self.environment,
                check=True,
            )
        self._wait(f"the start of {name}", lambda: self._process(name), 10)
        (bridge,) = self._bridges()
        cable = f"{bridge}-{name}"
        _ip(
            "link", "delete", cable, check=False
        )  # the kernel takes its time over that of a namespace which has just died
        _ip(
            "link",
            "add",
            cable,
            "type",
            "veth",
            "peer",
            "name",
            "eth0",
            "netns",
            str(self._process(name)),
        )
        _ip("link", "set", cable, "master", bridge, "up")

    def _pid_file(self, name: str) -> Path:
        return self.live / "run" / f"{name}.pid"

    def _outer_process(self, name: str) -> int | None:
        """The `unshare` that a machine runs under.

        It is the process of the pid file, unless its number has gone to another process.
        """
        try:
            pid = int(self._pid_file(name).read_text())
            command = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
        except (OSError, ValueError):
            return None
        if command[0] != "unshare" or command[-3:] != [str(self.folder), name, ""]:
            return None
        return pid

    def _process(self, name: str) -> int | None:
        """The first process inside a machine."""
        pid = self._outer_process(name)
        try:
            return int(Path(f"/proc/{pid}/task/{pid}/children").read_text())
        except (OSError, ValueError):
            return None

    def _wait(self, what: str, condition: Callable[[], object], seconds: float) -> None:
        if not in_time(condition, seconds):
            raise ClusterError(f"{what} took longer than {seconds} s\n{self._ends_of_logs()}")

    def _ends_of_logs(self) -> str:
        logs = [log for name in ADDRESSES if (log := self.log / f"{name}.log").exists()]
        return "\n".join(
            f"--- {log}\n" + "\n".join(log.read_text(errors="replace").splitlines()[-15:])
            for log in logs
        )


def in_time(condition: Callable[[], object], seconds: float) -> bool:
    """Whether a condition comes true in so many seconds."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def _ip(*arguments: str, check: bool = True) -> subprocess.CompletedProcess:
    done = subprocess.run(
        ["ip", *arguments], env=os.environ | {"PATH": debian.PATH}, capture_output=True, text=True
    )
    if check and done.returncode:
        raise ClusterError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done


def _links(kind: str, *which: str) -> list[dict]:
    """What `ip link` or `ip address` shows; only the first knows aliases."""
    return [link for link in json.loads(_ip("-json", kind, "show", *which).stdout or "[]") if link]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=["install", "up", "down", "status"])
    parser.add_argument("folder", type=Path, nargs="?", help="not needed to install")
    arguments = parser.parse_args()
    if arguments.action != "install" and not arguments.folder:
        parser.error("a folder is needed")
    try:
        if arguments.action == "install":
            debian.install()
            return
        cluster = Cluster(arguments.folder)
        if arguments.action == "up":
            cluster.up()
            print(f"export SLURM_CONF={cluster.environment['SLURM_CONF']}")
        elif arguments.action == "down":
            cluster.down()
        elif not cluster.processes():
            sys.exit("down")
        else:
            print(cluster.run("sinfo").stdout, end="")
    except (debian.Unavailable, ClusterError) as reason:
        sys.exit(str(reason))


if __name__ == "__main__":
    main()
