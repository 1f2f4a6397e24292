"""Admit artifacts in sections that a trace of the system calls shows.

python tests/border/traced.py PLACE

Each artifact is `PLACE/prompts/NAME/sent` or `PLACE/students/NAME/sent`. A section starts with an
attempt to open `/section:` and the path of its artifact below PLACE, which does not exist. The
sections whose names begin with `planted` do what no admission may do.
"""

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

from post_dist.admission.door import admit_prompt, admit_student
from post_dist.errors import ArtifactRefused


def section(name: str, work: Callable[[], object]) -> None:
    """Do work in a section of the trace."""
    with suppress(FileNotFoundError):
        open(f"/section:{name}").close()
    with suppress(ArtifactRefused, ConnectionRefusedError):
        work()


def fork() -> None:
    """Start a process that runs no program."""
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)


def main(place: Path) -> None:
    """Admit what lies in `place`."""
    admitted = place / "admitted"
    # The first admission imports libraries.
    admit_prompt(place / "prompts/honest/sent")
    admit_student(place / "students/honest/sent", admitted)
    # Nothing but an admission opens a folder in a section.
    prompts = sorted(place.glob("prompts/*/sent"))
    students = sorted(place.glob("students/*/sent"))
    for sent in prompts:
        section(str(sent.relative_to(place)), partial(admit_prompt, sent))
    for sent in students:
        section(str(sent.relative_to(place)), partial(admit_student, sent, admitted))
    section("planted file", (place / "link").read_bytes)
    section("planted program", lambda: subprocess.run(["true"], check=True))
    section("planted process", fork)
    section("planted connection", lambda: socket.create_connection(("127.0.0.1", 9)))
    section("end", lambda: None)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
