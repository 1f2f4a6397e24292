"""No public section of a run file may name the private data."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny

from post_dist.config.sources import Corpus, Task
from post_dist.data.private_as_public import check_not_private
from post_dist.errors import PrivacyRefused

ROWS = {
    "name": "toy",
    "visibility": "private",
    "template": "{text}",
    "labels": {"0": ("a",), "1": ("b",)},
}
HUB = {"hub": "some/reviews", "revision": "a" * 40}
WAYS: dict[str, Callable[[Path, Path], object]] = {
    "symbolic link": lambda private, other: other.symlink_to(private),
    "hard link": lambda private, other: os.link(private, other),
    "copy": shutil.copyfile,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny.write_csv(tmp_path / "private.csv", tiny.sentences(40, 1))
    tiny.write_csv(tmp_path / "public.csv", tiny.sentences(40, 2))
    return tmp_path


def private_task(folder: Path) -> Task:
    return Task(**ROWS, path=folder / "private.csv")


@pytest.mark.parametrize("way", WAYS)
def test_the_private_file_is_no_public_text_under_any_name(folder: Path, way: str) -> None:
    private = private_task(folder)
    other = folder / "more" / "other.csv"
    other.parent.mkdir()
    WAYS[way](folder / "private.csv", other)
    named = [
        Corpus(path=folder / "private.csv"),
        Corpus(path=other),
        Corpus(path=(folder / "public.csv", other)),
        Corpus(path=folder / "more"),
        Corpus(path=folder / "mo*" / "*.csv"),
        Task(name="public", visibility="public", path=other),
    ]
    for public in named:
        with pytest.raises(PrivacyRefused, match=r"names the private data: .*\.csv is that of"):
            check_not_private(private, public, "corpus")


def test_other_text_is_read_without_a_look_at_the_private_file(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    public = Corpus(path=folder / "public.csv")
    check_not_private(None, public, "corpus")
    with (folder / "public.csv").open("a") as file:
        file.write("one more,0\n")
    monkeypatch.setattr("post_dist.data.private_as_public.fingerprint", None)
    check_not_private(private_task(folder), public, "corpus")


@pytest.mark.parametrize(
    "public",
    [
        {},
        {"hub_split": "test"},
        {"hub_split": "unlabeled+train[:50%]"},
        {"hub_split": "all"},
        {"hub": "Some/Reviews"},
        {"hub_config": "default"},
    ],
)
def test_a_private_split_of_a_hub_data_set_is_no_public_text(public: dict[str, str]) -> None:
    private = Task(**ROWS, **HUB, test_hub_split="test")
    with pytest.raises(PrivacyRefused, match="public_task names the private data: some/reviews"):
        check_not_private(
            private, Task(name="public", visibility="public", **HUB | public), "public_task"
        )


def test_another_split_of_a_hub_data_set_may_be_public() -> None:
    private = Task(**ROWS, **HUB, test_hub_split="test")
    others = [{"hub_split": "unlabeled"}, {"hub": "other/reviews"}, {"hub_config": "german"}]
    for other in others:
        check_not_private(private, Corpus(**HUB | other), "corpus")


@pytest.mark.parametrize(
    ("command", "section"),
    [("corpus", "corpus"), ("distill", "corpus"), ("transfer", "public_task")],
)
def test_no_stage_of_the_provider_reads_it(
    tmp_path: Path, main: Callable, command: str, section: str
) -> None:
    run = tiny.write_run(tmp_path)
    tiny.write_student(tmp_path / "student")
    change = [f"--set={section}.path={tmp_path / 'private.csv'}"]
    if command == "transfer":
        change += [f"--set=inputs.student={tmp_path / 'student'}"]
        assert main("tune", run, *change[1:])[0] == 0
    code, _, err = main(command, run, *change)
    assert code == 5, err
    assert f"{section} names the private data" in err
    code, out, _ = main("check", run, *change)
    assert code == 2
    assert f"{section} names the private data" in out
