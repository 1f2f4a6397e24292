"""What an admission asks of the kernel: which files it opens, and that it makes no connection."""

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
from border.hostile import sign

from post_dist.admission.quarantine import PREFIX

CALLS = "trace=open,openat,openat2,socket,execve,execveat"
TRACE = ("strace", "-f", "--seccomp-bpf", "-y", "-s", "200", "-e", CALLS)
OPENED = re.compile(r"open.* = \d+<(.*)>$")
SECTION = re.compile(r'openat\(.*"/section:([^"]*)"')
SOCKET = re.compile(r"socket\((\w+)")
PROCESS = re.compile(r"execve\w*\((.*)")
TRIAL = (
    f'"{sys.executable}", ["{sys.executable}", "-I", "-c", "\\nimport json, resource, sys\\nfrom '
)
SYSTEM = (
    *("/usr/lib", "/lib", "/etc/ld.so.cache", "/etc/locale.alias", "/usr/share/zoneinfo"),
    *("/proc/", "/dev/null", "pipe:"),
)
"""What Python and the C library open on their own."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Honest and hostile artifacts, and a link to a file that no admission may open."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    if subprocess.run(
        ["strace", "-f", "--seccomp-bpf", "-o", "/dev/null", "true"], check=False
    ).returncode:
        pytest.skip("this process may not trace others")
    folder = tmp_path_factory.mktemp("traced")
    shutil.copytree(test_prompts.HONEST, folder / "prompt")
    tiny.write_student(folder / "student")
    for kind, cases in (("prompt", test_prompts), ("student", test_students)):
        for name, change in cases.REFUSED.items():
            if re.search("link|outside|path|FIFO", name):
                sent = shutil.copytree(folder / kind, folder / f"{kind}s" / name / "sent")
                change(sent)
                sign(sent)
    (folder / "secret").write_text("secret")
    (folder / "link").symlink_to(folder / "secret")
    return folder


def calls(trace: Path) -> Iterator[tuple[str, str]]:
    """Read a trace: each call behind the first section, with the name of its section."""
    section = ""
    for line in trace.read_text(errors="replace").splitlines():
        if found := SECTION.search(line):
            section = found.group(1)
        elif section:
            yield section, line


def forbidden(line: str, allowed: tuple[str, ...]) -> str:
    """Return what an admission may not do in a line of a trace, or nothing."""
    found = OPENED.search(line)
    # Copies of commands that were killed are looked for among the temporary files.
    listed = found is not None and found.group(1) == tempfile.gettempdir()
    if found is not None and not listed and not found.group(1).startswith(allowed):
        return f"opened {found.group(1)}"
    if found := SOCKET.search(line):
        return f"made a socket {found.group(1)}"
    if (found := PROCESS.search(line)) and not found.group(1).startswith(TRIAL):
        return f"started {found.group(1)}"
    return ""


@pytest.mark.slow
def test_an_admission_opens_its_folder_alone_and_makes_no_connection(place: Path) -> None:
    trace = place / "trace"
    script = str(Path(__file__).with_name("traced.py"))
    command = [*TRACE, "-o", str(trace), sys.executable, script, str(place)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    libraries = [sys.prefix, sys.base_prefix, *filter(None, sys.path)]
    # The folders of the artifacts, and the private copies of them.
    own = [str(place / name) for name in ("prompt", "student", "admitted")]
    own.append(f"{tempfile.gettempdir()}/{PREFIX}")
    found: dict[str, list[str]] = {}
    for section, line in calls(trace):
        if problem := forbidden(line, (*own, *libraries, *SYSTEM)):
            found.setdefault(section, []).append(problem)
    planted = {name: found.pop(f"planted {name}") for name in ("file", "process", "connection")}
    assert planted["file"] == [f"opened {place / 'secret'}"]
    assert any("started " in each and "true" in each for each in planted["process"])
    assert "made a socket AF_INET" in planted["connection"]
    assert found == {}, found
