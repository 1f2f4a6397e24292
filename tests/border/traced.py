"""Admit artifacts in sections that a trace of the system calls shows.

python tests/border/traced.py PLACE

A section starts with an attempt to open `/section:NAME`, which does not exist. The sections whose
names begin with `planted` do what no admission may do.
"""

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


def main(place: Path) -> None:
    """Admit what lies in `place`."""
    admitted = place / "admitted"
    prompt = place / "prompt"
    student = place / "student"
    # The first admission imports libraries.
    admit_prompt(prompt)
    admit_student(student, admitted)
    section("honest prompt", lambda: admit_prompt(prompt))
    section("honest student", lambda: admit_student(student, admitted))
    for folder in sorted(place.glob("prompts/*/sent")):
        section(f"prompt {folder.parent.name}", partial(admit_prompt, folder))
    for folder in sorted(place.glob("students/*/sent")):
        section(f"student {folder.parent.name}", partial(admit_student, folder, admitted))
    section("planted file", (place / "link").read_bytes)
    section("planted process", lambda: subprocess.run(["true"], check=True))
    section("planted connection", lambda: socket.create_connection(("127.0.0.1", 9)))
    section("end", lambda: None)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
