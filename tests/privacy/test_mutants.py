"""Plant the bugs of mutants.py, each in a package tree of its own: the checks must kill each."""

import os
import shutil
import sys
import traceback
from importlib import import_module
from pathlib import Path

import pytest
from privacy.mutants import MUTANTS, Mutant

import post_dist

PACKAGE = Path(post_dist.__file__).parent
KILLED: list[str] = []


def plant(mutant: Mutant, tree: Path) -> None:
    """Copy the package into a tree, with the bug in one of its files."""
    shutil.copytree(PACKAGE, tree / PACKAGE.name)
    file = tree / PACKAGE.name / f"{mutant.module.replace('.', '/')}.py"
    source = file.read_text()
    found = source.count(mutant.source)
    assert found == 1, f"{mutant.name}: the source text occurs {found} times"
    file.write_text(source.replace(mutant.source, mutant.bug))


def outcome(tree: Path, check: str) -> str:
    """Run a check on the package of a tree, in a process of its own: passed, failed or crashed."""
    child = os.fork()
    if child:
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return {0: "passed", 1: "failed"}.get(code, "crashed")
    code = 2
    said = (tree / "said.txt").open("w")
    os.dup2(said.fileno(), 1)
    os.dup2(said.fileno(), 2)
    try:
        os.environ["XDG_STATE_HOME"] = str(tree / "state")
        # The libraries stay loaded. The package and the checks are imported again.
        for name in [*sys.modules]:
            if name.split(".")[0] in ("post_dist", "privacy"):
                del sys.modules[name]
        sys.path.insert(0, str(tree))
        package = import_module(PACKAGE.name)
        assert Path(package.__file__).is_relative_to(tree)
        import_module("privacy.all_checks").CHECKS[check]()
        code = 0
    except AssertionError:
        code = 1
    except BaseException:
        traceback.print_exc(file=said)
    finally:
        said.flush()
        os._exit(code)


def one_of_each_check() -> list:
    """Return all mutants. Those whose check has killed another one before are marked as slow."""
    parameters = []
    checks: set[str] = set()
    for mutant in MUTANTS:
        marks = [pytest.mark.slow] if mutant.killer in checks else []
        parameters.append(pytest.param(mutant, id=mutant.name, marks=marks))
        checks.add(mutant.killer)
    return parameters


@pytest.mark.parametrize("mutant", one_of_each_check())
def test_the_checks_kill(mutant: Mutant, tmp_path: Path) -> None:
    plant(mutant, tmp_path)
    found = outcome(tmp_path, mutant.killer)
    said = (tmp_path / "said.txt").read_text()
    assert found == "failed", f"{mutant.killer} {found}: {said[-2000:]}"
    KILLED.append(mutant.name)


def test_every_mutant_was_killed(request: pytest.FixtureRequest) -> None:
    chosen = [item for item in request.session.items if "test_the_checks_kill[" in item.nodeid]
    print(f"mutants killed: {len(KILLED)} of {len(chosen)}", file=sys.__stdout__)
    assert len(KILLED) == len(chosen)
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 110
