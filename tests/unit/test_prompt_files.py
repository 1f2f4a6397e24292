"""A soft prompt's folder: what is written is read, and what was tampered with is refused."""

import json
import struct
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from post_dist.artifacts.manifest import FILE_NAME, read_manifest, write_artifact
from post_dist.artifacts.prompt import (
    PromptContents,
    Provenance,
    read_prompt,
    write_prompt,
    write_prompt_files,
)
from post_dist.artifacts.task import PromptTask
from post_dist.errors import ArtifactRefused, EnvironmentFault
from post_dist.files import file_digest
from post_dist.stages import prompt_origin

TASK = PromptTask("{text} It was", (("bad",), ("good", "fine")), 64, False, "predict it")
NOWHERE = Provenance(model_name="m", tokenizer="0", parents={}, config={})


def open_prompt(embeddings: torch.Tensor) -> PromptContents:
    """A prompt that was tuned without privacy."""
    return PromptContents(embeddings, TASK, None)


def write(folder: Path, embeddings: torch.Tensor) -> Path:
    """Write a prompt without its check, so that its values may be anything."""
    contents = open_prompt(embeddings)
    write_artifact(
        folder,
        "soft prompt",
        lambda path: write_prompt_files(path, contents, "m"),
        parents={"model": "0"},
        config={},
    )
    return folder


def sign_again(folder: Path) -> None:
    """Put the right hashes into the manifest, as an attacker would."""
    manifest = json.loads((folder / FILE_NAME).read_text())
    manifest["files"] = {name: file_digest(folder / name) for name in manifest["files"]}
    (folder / FILE_NAME).write_text(json.dumps(manifest))


def test_written_and_read(tmp_path: Path) -> None:
    embeddings = torch.randn(7, 12)
    prompt = read_prompt(write(tmp_path / "p", embeddings))
    assert torch.equal(prompt.embeddings, embeddings)
    assert prompt.task == TASK


@pytest.mark.parametrize("value", [float("nan"), 1e6])
def test_a_prompt_that_its_receiver_would_refuse_is_never_left(
    tmp_path: Path, value: float
) -> None:
    spoiled = torch.full((3, 4), value)
    with pytest.raises(ArtifactRefused):
        write_prompt(tmp_path / "p", open_prompt(spoiled), NOWHERE, lambda folder: None)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_gives_back_something_else_is_told(tmp_path: Path) -> None:
    def spoil(folder: Path) -> None:
        save_file({"prompt_embeddings": torch.zeros(3, 4)}, folder / "adapter_model.safetensors")

    with pytest.raises(EnvironmentFault, match="does not read back"):
        write_prompt(tmp_path / "p", open_prompt(torch.ones(3, 4)), NOWHERE, spoil)
    assert list(tmp_path.iterdir()) == []


def test_hidden_and_changed_files_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "p", torch.randn(7, 12))
    (folder / "extra.bin").write_bytes(b"x")
    with pytest.raises(ArtifactRefused, match=r"extra\.bin is not in the manifest"):
        read_prompt(folder)
    (folder / "extra.bin").unlink()
    (folder / "task.json").write_text("{}")
    with pytest.raises(ArtifactRefused, match=r"task\.json is not the file"):
        read_prompt(folder)
    (folder / "task.json").unlink()
    with pytest.raises(ArtifactRefused, match=r"task\.json is missing"):
        read_prompt(folder)


def test_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactRefused, match="is a soft prompt, not a student"):
        read_manifest(write(tmp_path / "p", torch.randn(7, 12)), "student")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"prompt_embeddings": torch.full((3, 4), float("nan"))}, "not finite"),
        ({"prompt_embeddings": torch.full((3, 4), 1e30)}, "norm"),
        ({"prompt_embeddings": torch.zeros(3)}, "dimensions"),
        ({"prompt_embeddings": torch.zeros(600, 4)}, "600 prompt tokens"),
        ({"prompt_embeddings": torch.zeros(3, 4, dtype=torch.int64)}, "dtype"),
        (
            {"prompt_embeddings": torch.zeros(3, 4), "more": torch.zeros(1)},
            "does not hold prompt_embeddings alone",
        ),
        ({"other": torch.zeros(3, 4)}, "does not hold prompt_embeddings alone"),
    ],
)
def test_bad_tensors_are_refused(
    tmp_path: Path, tensors: dict[str, torch.Tensor], message: str
) -> None:
    folder = write(tmp_path / "p", torch.randn(3, 4))
    save_file(tensors, folder / "adapter_model.safetensors")
    sign_again(folder)
    with pytest.raises(ArtifactRefused, match=message):
        read_prompt(folder)


def test_a_header_that_claims_terabytes_is_refused_before_it_is_parsed(tmp_path: Path) -> None:
    folder = write(tmp_path / "p", torch.randn(3, 4))
    header = json.dumps(
        {"prompt_embeddings": {"dtype": "F32", "shape": [500, 1 << 40], "data_offsets": [0, 48]}}
    ).encode()
    (folder / "adapter_model.safetensors").write_bytes(
        struct.pack("<Q", len(header)) + header + bytes(48)
    )
    sign_again(folder)
    with pytest.raises(ArtifactRefused, match="do not fit its shape"):
        read_prompt(folder)


def head_tensors(**changes: torch.Tensor) -> dict[str, torch.Tensor]:
    """The tensors of a head for two classes and vectors of width 4."""
    tensors = {
        "mean": torch.zeros(4),
        "scale": torch.ones(4),
        "weight": torch.eye(2, 4),
        "bias": torch.tensor([0.5, -0.5]),
    }
    return {name: value.double() for name, value in (tensors | changes).items()}


def write_with_head(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """Write a prompt of width 4 with a head, without its check."""

    def fill(path: Path) -> None:
        write_prompt_files(path, open_prompt(torch.randn(3, 4)), "m")
        save_file(tensors, path / "head.safetensors")

    write_artifact(folder, "soft prompt", fill, parents={"model": "0"}, config={})
    return folder


def test_a_head_adds_to_the_scores_of_standardized_states_of_length_1(tmp_path: Path) -> None:
    tensors = head_tensors(mean=torch.full((4,), 1.0), scale=torch.full((4,), 2.0))
    head = read_prompt(write_with_head(tmp_path / "p", tensors)).adapter
    # (7 - 1) / 2 = 3 and (9 - 1) / 2 = 4, of length 5.
    states = torch.tensor([[7.0, 9.0, 1.0, 1.0]])
    torch.testing.assert_close(head.scores(states), torch.tensor([[0.6 + 0.5, 0.8 - 0.5]]))
    # A state in the middle of all has no direction.
    torch.testing.assert_close(head.scores(torch.ones(1, 4)), torch.tensor([[0.5, -0.5]]))


def test_a_head_of_several_layers_reads_the_last_ones(tmp_path: Path) -> None:
    tensors = head_tensors(mean=torch.full((8,), 2e4), scale=torch.ones(8), weight=torch.ones(2, 8))
    head = read_prompt(write_with_head(tmp_path / "p", tensors)).adapter
    assert head.depth(4) == 2


def test_a_head_below_the_last_layers_says_where_it_reads(tmp_path: Path) -> None:
    tensors = head_tensors(mean=torch.zeros(8), scale=torch.ones(8), weight=torch.ones(2, 8))
    head = read_prompt(write_with_head(tmp_path / "p", tensors | {"above": torch.ones(1)})).adapter
    assert head.above == 1
    # Two layers of width 4 below one; the label words need the last one.
    assert head.layers(4, 6) == [3, 4, 5]
    hidden = torch.arange(12.0)[None]
    assert torch.equal(head.read(hidden), hidden[:, :8])
    # A head of the last layers is written as it was before heads could be elsewhere.
    last = read_prompt(write_with_head(tmp_path / "q", tensors)).adapter
    assert last.layers(4, 6) == [4, 5]
    assert set(last.tensors) == set(tensors)
    assert set(head.tensors) == {*tensors, "above"}
    write_prompt(
        tmp_path / "r",
        replace(open_prompt(torch.randn(3, 4)), adapter=head),
        NOWHERE,
        lambda _: None,
    )
    assert read_prompt(tmp_path / "r").adapter.above == 1


def test_a_head_needs_the_layers_above_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = head_tensors(mean=torch.zeros(8), scale=torch.ones(8), weight=torch.ones(2, 8))
    prompt = read_prompt(write_with_head(tmp_path / "p", tensors | {"above": torch.ones(1)}))
    named = prompt.manifest.tokenizer
    monkeypatch.setattr(prompt_origin, "tokenizer_fingerprint", lambda tokenizer: named)
    prompt_origin.check_belongs(prompt, SimpleNamespace(width=4, layers=3), None)
    with pytest.raises(ArtifactRefused, match="the head needs 3 layers, but the student has 2"):
        prompt_origin.check_belongs(prompt, SimpleNamespace(width=4, layers=2), None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"above": torch.full((1,), -1.0)}, "above is not a number of layers"),
        ({"above": torch.full((1,), 0.5)}, "above is not a number of layers"),
        ({"above": torch.full((1,), 1e9)}, "above is not a number of layers"),
        ({"above": torch.zeros(2)}, "above is not a number of layers"),
        ({"above": torch.zeros(1, 1)}, "dimensions"),
        ({"weight": torch.full((2, 4), float("nan"))}, "not finite"),
        ({"weight": torch.full((2, 4), 1e9)}, "above"),
        ({"mean": torch.full((4,), 1e7)}, "a mean or scale above"),
        ({"scale": torch.full((4,), 1e7)}, "a mean or scale above"),
        ({"scale": torch.zeros(4)}, "a scale below"),
        ({"scale": -torch.ones(4)}, "a scale below"),
        ({"weight": torch.zeros(3, 4)}, "does not fit 2 classes and width 4"),
        ({"weight": torch.zeros(2, 5)}, "does not fit 2 classes and width 4"),
        ({"mean": torch.zeros(5)}, "does not fit 2 classes and width 4"),
        ({"scale": torch.ones(3)}, "does not fit 2 classes and width 4"),
        ({"weight": torch.zeros(2, 8)}, "does not fit 2 classes and width 4"),
        (
            {"mean": torch.zeros(0), "scale": torch.ones(0), "weight": torch.zeros(2, 0)},
            "without a shape",
        ),
        ({"bias": torch.zeros(3)}, "does not fit 2 classes and width 4"),
        ({"bias": torch.zeros(2, 1)}, "dimensions"),
        ({"more": torch.zeros(1)}, "does not hold bias, mean, scale, weight, perhaps above alone"),
    ],
)
def test_a_head_that_does_not_fit_is_refused(
    tmp_path: Path, changes: dict[str, torch.Tensor], message: str
) -> None:
    folder = write_with_head(tmp_path / "p", head_tensors(**changes))
    with pytest.raises(ArtifactRefused, match=message):
        read_prompt(folder)


def test_tensors_that_overlap_are_refused(tmp_path: Path) -> None:
    folder = write_with_head(tmp_path / "p", head_tensors())
    path = folder / "head.safetensors"
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    # Mean and scale read the same bytes, and the file has as many bytes as before.
    header["scale"]["data_offsets"] = header["mean"]["data_offsets"]
    text = json.dumps(header, separators=(",", ":")).encode().ljust(length)
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
    sign_again(folder)
    with pytest.raises(ArtifactRefused, match="do not fit its shapes"):
        read_prompt(folder)


@pytest.mark.parametrize("dtype", [["F32"], {}, None, 32])
def test_a_dtype_that_is_no_name_is_refused(tmp_path: Path, dtype: object) -> None:
    folder = write(tmp_path / "p", torch.randn(3, 4))
    entry = {"dtype": dtype, "shape": [3, 4], "data_offsets": [0, 48]}
    header = json.dumps({"prompt_embeddings": entry}).encode()
    content = struct.pack("<Q", len(header)) + header + bytes(48)
    (folder / "adapter_model.safetensors").write_bytes(content)
    sign_again(folder)
    with pytest.raises(ArtifactRefused, match="has dtype"):
        read_prompt(folder)


@settings(
    max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)
@given(data=st.data())
def test_mutated_weights_are_refused_or_read_whole(tmp_path: Path, data: st.DataObject) -> None:
    folder = tmp_path / "p"
    if not folder.exists():
        write(folder, torch.randn(3, 4))
        (tmp_path / "original").write_bytes((folder / "adapter_model.safetensors").read_bytes())
    content = bytearray((tmp_path / "original").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        if data.draw(st.booleans()):
            content[place] = data.draw(st.integers(0, 255))
        else:
            del content[place : place + data.draw(st.integers(1, 20))]
            content += b"\0"
    (folder / "adapter_model.safetensors").write_bytes(content)
    sign_again(folder)
    try:
        embeddings = read_prompt(folder).embeddings
    except ArtifactRefused:
        return
    assert embeddings.ndim == 2
    assert torch.isfinite(embeddings).all()


@settings(
    max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)
@given(
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_any_json_as_task_or_manifest_is_refused(tmp_path: Path, value: object) -> None:
    folder = tmp_path / "p"
    if not folder.exists():
        write(folder, torch.randn(3, 4))
        (tmp_path / "manifest").write_bytes((folder / FILE_NAME).read_bytes())
    (folder / FILE_NAME).write_bytes((tmp_path / "manifest").read_bytes())
    (folder / "task.json").write_text(json.dumps(value))
    sign_again(folder)
    with pytest.raises(ArtifactRefused):
        read_prompt(folder)
    (folder / FILE_NAME).write_text(json.dumps(value))
    with pytest.raises(ArtifactRefused):
        read_prompt(folder)


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    def fill(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_artifact(tmp_path / "p", "soft prompt", fill, parents={}, config={})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "content",
    [
        "{}",
        "[]",
        "{",
        '{"epsilon": -1}',
        '{"epsilon": "8"}',
        '{"epsilon": Infinity}',
        '{"epsilon": 1' + 400 * "0" + "}",
        '{"epsilon": true}',
        "x" * 70_000,
    ],
)
def test_a_privacy_statement_that_is_none_is_refused(tmp_path: Path, content: str) -> None:
    folder = tmp_path / "prompt"

    def fill(path: Path) -> None:
        write_prompt_files(path, PromptContents(torch.zeros(2, 4), TASK, {"epsilon": 8.0}), "m")
        (path / "privacy.json").write_text(content)

    write_artifact(folder, "soft prompt", fill, parents={"model": "0"}, config={})
    with pytest.raises(ArtifactRefused, match="not a privacy statement"):
        read_prompt(folder)


BIASES = [[1.0], [1.0, 2.0, 3.0], [1e9, 0.0], ["x", "y"], [float("nan"), 0.0], [10**400, 0]]


@pytest.mark.parametrize(
    "changes", [*({"class_biases": biases} for biases in BIASES), {"init_text": " "}], ids=str
)
def test_a_task_that_does_not_fit_is_refused(tmp_path: Path, changes: dict) -> None:
    folder = tmp_path / "prompt"

    def fill(path: Path) -> None:
        write_prompt_files(path, open_prompt(torch.zeros(2, 4)), "m")
        task = json.loads((path / "task.json").read_text())
        (path / "task.json").write_text(json.dumps(task | changes))

    write_artifact(folder, "soft prompt", fill, parents={"model": "0"}, config={})
    with pytest.raises(ArtifactRefused, match="not a task description"):
        read_prompt(folder)
