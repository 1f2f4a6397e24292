"""Looking at paths that a user names: what cannot be looked at is told, and is no bug."""

import errno
import os
from pathlib import Path

import pytest

from post_dist.errors import InputError
from post_dist.files import fingerprint
from post_dist.paths import kind_of


def test_the_kind_of_a_path(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("file")
    os.mkfifo(tmp_path / "pipe")
    names = (".", "file", "link", "pipe", "none", "file/below")
    found = [kind_of(tmp_path / name) for name in names]
    assert found == ["folder", "file", "file", "other", "", ""]


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE])
def test_what_the_system_refuses_is_told_with_its_place(
    number: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    place = tmp_path / "locked" / "file"

    def refuse(path: Path, **options: object) -> None:
        raise OSError(number, os.strerror(number), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "stat", refuse)
        for look in (kind_of, fingerprint):
            with pytest.raises(InputError) as caught:
                look(place)
            assert caught.value.args[0] == f"cannot read {place}: {os.strerror(number)}"
            assert caught.value.hint


@pytest.mark.parametrize("name", ["zero\0byte", "half\ud800character"])
def test_a_name_that_no_file_has_is_told(name: str) -> None:
    with pytest.raises(InputError, match="no file has such a name"):
        kind_of(Path(name))


def test_a_name_that_is_too_long_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="File name too long"):
        kind_of(tmp_path / ("x" * 300))
