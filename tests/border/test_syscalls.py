"""What an admission asks of the kernel: which files it opens, and that it makes no connection."""

import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
from border import test_prompts, test_students
from border.hostile import Change, sign

from post_dist.admission.private_folder import PREFIX
from post_dist.artifacts.manifest import FILE_NAME

OPENINGS = "?open,?creat,openat,openat2,open_by_handle_at"
OTHERS = "socket,socketpair,io_uring_setup,?fork,?vfork,clone,clone3,execve,execveat"
TRACE = ("strace", "-f", "--seccomp-bpf", "-y", "-s", "200", "-e", f"trace={OPENINGS},{OTHERS}")
OPENED = re.compile(r"(?:open|creat).* = \d+<(.*)>$")
SECTION = re.compile(r'openat\(.*"/section:([^"]*)"')
SOCKET = re.compile(r"(?:socket|socketpair)\((\w+)")
PROGRAM = re.compile(r"execve\w*\((.*)")
PROCESS = re.compile(r"\b(v?fork|clone3?)\((.*)")
TRIAL = (
    f'"{sys.executable}", ["{sys.executable}", "-I", "-c", "\\nimport json, resource, sys\\nfrom '
)
SYSTEM = (
    *("/usr/lib", "/lib", "/etc/ld.so.cache", "/etc/locale.alias", "/usr/share/zoneinfo"),
    *("/proc", "/dev/null"),
)
"""What Python and the C library open on their own."""


def listing(name: str) -> Change:
    """Return a change that lists a file outside the folder in the manifest."""

    def change(folder: Path) -> None:
        path = folder / FILE_NAME
        manifest = json.loads(path.read_text())
        manifest["files"][name] = "0" * 64
        path.write_text(json.dumps(manifest))

    return change


LISTED = {"the secret by a path": "../../../secret", "a device by a path": "/dev/zero"}
"""Files outside the folder that a manifest names."""
PLANTED = ("file", "program", "process", "connection")
"""What `traced.py` does that no admission may do."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Honest and hostile artifacts, and a link to a file that no admission may open."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    if subprocess.run([*TRACE, "-o", "/dev/null", "true"], check=False).returncode:
        pytest.skip("this process may not trace others")
    folder = tmp_path_factory.mktemp("traced")
    (folder / "secret").write_text("secret")
    (folder / "link").symlink_to(folder / "secret")
    honest = {
        "prompts": shutil.copytree(test_prompts.HONEST, folder / "prompts/honest/sent"),
        "students": tiny.write_student(folder / "students/honest/sent"),
    }
    attacks = {
        "prompts": test_prompts.REFUSED,
        "students": test_students.REFUSED | {"fields of others": test_students.fields_of_others},
    }
    for kind, changes in attacks.items():
        for name, change in changes.items():
            sent = shutil.copytree(honest[kind], folder / kind / name / "sent")
            change(sent)
            sign(sent)
        for name, listed in LISTED.items():
            listing(listed)(shutil.copytree(honest[kind], folder / kind / name / "sent"))
    return folder


def calls(trace: Path) -> Iterator[tuple[str, str]]:
    """Read a trace: each call behind the first section, with the name of its section."""
    section = ""
    for line in trace.read_text(errors="replace").splitlines():
        if found := SECTION.search(line):
            section = found.group(1)
        elif section:
            yield section, line


def is_within(path: str, folders: tuple[str, ...]) -> bool:
    """Return whether a path is one of the folders, or below one."""
    return any(path == folder or path.startswith(f"{folder}/") for folder in folders)


def forbidden(line: str, allowed: tuple[str, ...]) -> str:
    """Return what an admission may not do in a line of a trace, or nothing."""
    if found := OPENED.search(line):
        path = found.group(1)
        # Copies of commands that were killed are looked for among the temporary files.
        is_listed = path == tempfile.gettempdir()
        is_copy = path.startswith(f"{tempfile.gettempdir()}/{PREFIX}")
        if not (is_listed or is_copy or is_within(path, allowed)):
            return f"opened {path}"
    if found := SOCKET.search(line):
        return f"made a socket {found.group(1)}"
    if (found := PROGRAM.search(line)) and not found.group(1).startswith(TRIAL):
        return f"started {found.group(1)}"
    # A thread is no process, and a child of `subprocess` runs a program at once.
    if (found := PROCESS.search(line)) and not re.search("vfork|VFORK|THREAD", found.group()):
        return f"started a process by {found.group(1)}"
    return "used io_uring" if "io_uring_setup(" in line else ""


@pytest.mark.slow
def test_an_admission_opens_its_folder_alone_and_makes_no_connection(place: Path) -> None:
    trace = place / "trace"
    script = str(Path(__file__).with_name("traced.py"))
    command = [*TRACE, "-o", str(trace), sys.executable, script, str(place)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # Where Python and its libraries are, and the private copies of students.
    libraries = (sys.prefix, sys.base_prefix, *filter(None, sys.path), str(place / "admitted"))
    found: dict[str, list[str]] = {}
    sections = set()
    for section, line in calls(trace):
        sections.add(section)
        if problem := forbidden(line, (str(place / section), *libraries, *SYSTEM)):
            found.setdefault(section, []).append(problem)
    assert sections >= {str(sent.relative_to(place)) for sent in place.glob("*/*/sent")}
    planted = {name: found.pop(f"planted {name}") for name in PLANTED}
    assert planted["file"] == [f"opened {place / 'secret'}"]
    assert any("started " in each and "true" in each for each in planted["program"])
    assert len(planted["process"]) == 1
    assert "made a socket AF_INET" in planted["connection"]
    assert found == {}, found
