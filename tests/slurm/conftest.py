"""A Slurm cluster for the tests of this folder.

It comes up at the first use and goes down at the end, and no jobs are left between two tests.
"""

import contextlib
import fcntl
import itertools
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import Cluster
from debian import Unavailable, check, install

INSTALL_SECONDS = 600  # the first test waits for the packages as well


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip all tests of the cluster where they cannot run, with one line."""
    mark = pytest.mark.timeout(INSTALL_SECONDS)
    try:
        check()
    except Unavailable as reason:
        mark = pytest.mark.skip(str(reason))
    for item in items:
        if "slurm" in getattr(item, "fixturenames", ()):
            item.add_marker(mark)


@contextlib.contextmanager
def own_folder() -> Iterator[Path]:
    """A folder that no other test run holds. The next run ends what a killed run has left in it."""
    for number in itertools.count():
        folder = Path(tempfile.gettempdir()) / f"post_dist-slurm-{number}"
        folder.mkdir(exist_ok=True)
        if folder.is_symlink() or folder.stat().st_uid != os.geteuid():
            continue
        with (folder / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            yield folder
            return


@contextlib.contextmanager
def own_cluster() -> Iterator[Cluster]:
    with own_folder() as folder:
        cluster = Cluster(folder)
        cluster.down()
        try:
            yield cluster
        finally:
            cluster.down()


@pytest.fixture(scope="session")
def slurm() -> Iterator[Cluster]:
    try:
        install()
        with own_cluster() as cluster:
            cluster.up()
            yield cluster
    except Unavailable as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="session")
def second_slurm(slurm: Cluster) -> Iterator[Cluster]:
    """Another cluster on the same machine, as a second test run has; a test starts it."""
    with own_cluster() as cluster:
        yield cluster


@pytest.fixture(autouse=True)
def no_jobs_left(request: pytest.FixtureRequest) -> Iterator[None]:
    cluster = request.getfixturevalue("slurm") if "slurm" in request.fixturenames else None
    yield
    if cluster:
        cluster.cancel_jobs()
