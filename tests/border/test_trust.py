"""Students that cannot be checked, and prompts that do not belong to their student."""

import os
import shutil
from pathlib import Path
from typing import Any, get_args
from unittest import mock

import pytest
import tiny
import torch
from border.hostile import Change, edit_json, put_text, sign

from post_dist.admission import door
from post_dist.admission.door import admit_student
from post_dist.admission.private_folder import PREFIX
from post_dist.admission.quarantine import quarantined
from post_dist.artifacts.manifest import (
    FILE_NAME,
    ArtifactKind,
    parse_manifest,
    read_manifest,
    write_artifact,
)
from post_dist.artifacts.prompt import PromptContents, Provenance, write_prompt
from post_dist.artifacts.task import PromptTask
from post_dist.errors import EnvironmentFault
from post_dist.files import fingerprint
from post_dist.verify import verify

TASK = PromptTask("Review: {text} It was", (("bad",), ("good",)), 48, False, "Classify")


def test_a_student_without_a_manifest_is_refused_unless_it_is_trusted(
    tmp_path: Path, main: Any
) -> None:
    run = tiny.write_run(tmp_path)
    student = tiny.write_model(tmp_path / "student", "llama", layers=2)
    command = ("tune", run, f"--set=inputs.student={student}", "--set=tune.steps=1")
    code, _, err = main(*command)
    assert code == 4
    assert "has no post_dist.json, so it cannot be checked" in err
    assert "set inputs.trust_model: true" in err
    assert not (tmp_path / "runs").exists()

    code, out, err = main(*command, "--set=inputs.trust_model=true")
    assert code == 0, err
    assert "student has no post_dist.json: it is trusted, and not checked" in err
    prompt = Path(out.strip())
    assert read_manifest(prompt, "soft prompt").config["student_checked"] is False
    assert "Soft prompt for student, which was not checked" in (prompt / "README.md").read_text()


def test_a_place_without_room_for_a_copy_is_not_the_sender_s_fault(tmp_path: Path) -> None:
    place = tmp_path / "admitted"
    place.symlink_to("/proc/self")
    with pytest.raises(EnvironmentFault, match=f"cannot make a folder in {place}: "):
        admit_student(tmp_path / "student", place)


@pytest.mark.parametrize("kind", get_args(ArtifactKind))
def test_no_kind_of_artifact_passes_without_its_files(
    tmp_path: Path, kind: ArtifactKind, main: Any
) -> None:
    parents = dict.fromkeys(("teacher", "student", "model"), "0" * 64)
    folder = tmp_path / "sent"
    write_artifact(folder, kind, lambda partial: None, parents=parents, config={})
    found = verify(folder)
    assert (found["ok"], found["kind"], len(found["problems"])) == (False, kind, 1)
    code, _, err = main("sign", folder, "--key", tmp_path / "key")
    assert code == 4
    assert "`verify` refuses it" in err


@pytest.mark.parametrize(
    ("table", "problem"),
    [
        ('{"task": "t", "split": "test", "rows": NaN}', "not plain JSON"),
        ('{"task": "t", "split": "test", "rows": []}', "is not a table of `evaluate`: rows"),
        ("[]", "not a JSON object"),
    ],
)
def test_verify_reads_the_table_of_an_evaluation(tmp_path: Path, table: str, problem: str) -> None:
    def fill(folder: Path) -> None:
        (folder / "table.json").write_text(table)

    parents = {"teacher": "0" * 64, "student": "1" * 64}
    write_artifact(tmp_path / "sent", "evaluation", fill, parents=parents, config={})
    found = verify(tmp_path / "sent")
    assert not found["ok"]
    assert problem in found["problems"][0]


def test_trust_does_not_replace_a_check(tmp_path: Path, main: Any) -> None:
    """A student with a manifest is checked all the same."""
    run = tiny.write_run(tmp_path)
    student = tiny.write_student(tmp_path / "student")
    put_text("config.json", "{}")(student)
    code, _, err = main("tune", run, f"--set=inputs.student={student}", "--trust-model")
    assert code == 4
    assert "config.json is not the file that was written" in err


def test_a_prompt_far_larger_than_the_embeddings_is_refused(tmp_path: Path, main: Any) -> None:
    run = tiny.write_run(tmp_path)
    student = tiny.write_student(tmp_path / "student")
    manifest = read_manifest(student, "student")
    provenance = Provenance("m", manifest.tokenizer, {"model": manifest.digest}, {})
    embeddings = torch.zeros(5, 32)
    # The largest embedding of the student has a norm of 0.2.
    embeddings[3, 7] = 300
    prompt = tmp_path / "prompt"
    write_prompt(prompt, PromptContents(embeddings, TASK, None), provenance, lambda _: None)
    given = (f"--set=inputs.student={student}", f"--set=inputs.source_prompt={prompt}")
    code, _, err = main("transfer", run, *given)
    assert code == 4
    assert f"{prompt}: it has a vector of norm 300, and the largest embedding" in err


CHANGES: dict[str, Change] = {
    "config.json": edit_json("config.json", rms_norm_eps=1e-5),
    "tokenizer.json": lambda folder: (folder / "tokenizer.json").open("a").write("\n"),
    "tokenizer_config.json": edit_json("tokenizer_config.json", add_bos_token=True),
    "model.safetensors": lambda folder: (folder / "model.safetensors").open("ab").write(b"0"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_prompt_is_bound_to_every_file_of_its_student(tmp_path: Path, name: str) -> None:
    """The digest that a prompt names is another one after a change of any file."""
    honest = Path(__file__).parents[1] / "data/artifacts_0_1_0/student"
    student = shutil.copytree(honest, tmp_path / "student")
    before = parse_manifest(student / FILE_NAME).digest
    CHANGES[name](student)
    sign(student)
    assert parse_manifest(student / FILE_NAME).digest != before


MANIFEST_CHANGES: dict[str, Change] = {
    "a setting": edit_json(FILE_NAME, config={"distill": {"steps": 9}}),
    "what it gives away": edit_json(FILE_NAME, config={"given_away": {}}),
    "the tokenizer": edit_json(FILE_NAME, tokenizer="f" * 64),
    "a version": edit_json(FILE_NAME, versions={"torch": "0"}),
    "the version of its format": edit_json(FILE_NAME, schema_version=1),
}


@pytest.mark.parametrize("name", MANIFEST_CHANGES)
def test_a_prompt_is_bound_to_the_whole_manifest_of_its_student(tmp_path: Path, name: str) -> None:
    student = tiny.write_student(tmp_path / "student")
    before = parse_manifest(student / FILE_NAME).digest
    assert read_manifest(student, "student").digest == before
    MANIFEST_CHANGES[name](student)
    assert parse_manifest(student / FILE_NAME).digest != before


def test_the_fingerprint_of_a_model_covers_every_byte(tmp_path: Path) -> None:
    content = bytearray(12 << 20)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(content)
    before = fingerprint(tmp_path)
    content[6 << 20] = 1
    (tmp_path / "model.safetensors").write_bytes(content)
    assert fingerprint(tmp_path) != before


def test_a_part_of_an_admitted_student_is_replaced(tmp_path: Path) -> None:
    """As after a removal that was killed. Two processes may also admit a student at once."""
    student = tiny.write_student(tmp_path / "student")
    place = tmp_path / "admitted"
    admitted = admit_student(student, place)
    assert admitted.name == parse_manifest(student / FILE_NAME).digest
    whole = {file.name: file.read_bytes() for file in admitted.iterdir()}
    for name in ("model.safetensors", "tokenizer.json"):
        (admitted / name).unlink()
        assert admit_student(student, place) == admitted
        assert {file.name: file.read_bytes() for file in admitted.iterdir()} == whole

    def after_another(copy: Path, place: Path) -> None:
        shutil.copytree(copy, place)
        os.rename(copy, place)

    shutil.rmtree(admitted)
    with mock.patch.object(door, "put_in_place", after_another):
        assert admit_student(student, place) == admitted


def test_copies_of_killed_commands_are_removed_by_the_next(tmp_path: Path) -> None:
    prompt = Path(__file__).parents[1] / "data/artifacts_0_1_0/source_prompt"
    with quarantined(prompt, tmp_path) as held:
        killed = shutil.copytree(held.folder, tmp_path / f"{PREFIX}killed")
        foreign = tmp_path / f"{PREFIX}link"
        foreign.symlink_to(tmp_path / "elsewhere")
        young = shutil.copytree(held.folder, tmp_path / f"{PREFIX}young")
        for folder in (killed, held.folder):
            os.utime(folder, (0, 0))
        with quarantined(prompt, tmp_path):
            assert not killed.exists()
            assert held.folder.exists()
            assert young.exists()
            assert foreign.is_symlink()
