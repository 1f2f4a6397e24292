"""What the cluster needs of this machine.

Root on Debian 12, namespaces, and Debian's packages of Slurm, munge and MariaDB.
"""

import os
import platform
import shutil
import subprocess
from pathlib import Path

PACKAGES = {  # and a program by which each is recognized
    "munge": "munged",
    "slurmctld": "slurmctld",
    "slurmdbd": "slurmdbd",
    "slurmd": "slurmd",
    "slurm-client": "sbatch",
    "mariadb-server-core": "mariadbd",
    "mariadb-client-core": "my_print_defaults",
    "iproute2": "ip",
}
PATH = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
POLICY = Path("/usr/sbin/policy-rc.d")
NAMESPACES = (
    "unshare",
    "--net",
    "--uts",
    "--ipc",
    "--mount",
    "--pid",
    "--fork",
    "--kill-child",
    "--mount-proc",
)


class Unavailable(Exception):
    """The cluster cannot run on this machine; one line says why."""


def missing() -> list[str]:
    return [
        package for package, program in PACKAGES.items() if not shutil.which(program, path=PATH)
    ]


def check() -> None:
    """Pass where the cluster can run once the packages are there."""
    if os.geteuid() != 0:
        raise Unavailable("the Slurm cluster needs root")
    release = platform.freedesktop_os_release() if Path("/etc/os-release").exists() else {}
    if (release.get("ID"), release.get("VERSION_ID")) != ("debian", "12"):
        raise Unavailable("the Slurm cluster needs Debian 12, whose Slurm its settings are for")
    tried = subprocess.run([*NAMESPACES, "true"], capture_output=True, text=True)
    if tried.returncode:
        raise Unavailable(f"the Slurm cluster needs namespaces: {tried.stderr.strip()}")


def install() -> None:
    """Install what is missing, without starting any of the packages' own services."""
    check()
    if not missing():
        return
    ours = not POLICY.exists()
    if ours:  # the packages ask this script whether they may start their services
        POLICY.write_text("#!/bin/sh\nexit 101\n")
        POLICY.chmod(0o755)
    try:
        if _apt("install", "--no-install-recommends", *missing()).returncode:
            # The package lists may be old, or not there at all.
            _apt("update")
            tried = _apt("install", "--no-install-recommends", *missing())
            if tried.returncode:
                lines = tried.stderr.strip().splitlines() or ["no reason given"]
                raise Unavailable(f"apt-get cannot install the Slurm packages: {lines[-1]}")
    finally:
        if ours:
            POLICY.unlink()


def _apt(*arguments: str) -> subprocess.CompletedProcess:
    settings = ("Acquire::Retries=1", "Acquire::http::Timeout=20", "DPkg::Lock::Timeout=120")
    options = [f"--option={setting}" for setting in settings]
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive", "PATH": PATH, "LC_ALL": "C"}
    return subprocess.run(
        ["apt-get", "-qq", "--yes", *options, *arguments],
        env=environment,
        capture_output=True,
        text=True,
    )
