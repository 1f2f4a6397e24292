"""Which files hold a model's weights, and tied weights whose stored values differ."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from post_dist.errors import InputError
from post_dist.models.embedding_table import read_embedding_table
from post_dist.models.facts import meta_model
from post_dist.models.load import load_whole
from post_dist.models.weight_files import INDEX, ONE_FILE, check_tied, weight_files
from post_dist.models.weight_units import WeightReader, weight_units

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny.write_model(tmp_path / "model", "llama")


def in_parts(folder: Path) -> Path:
    """Store the weights of a model in several files with an index."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / ONE_FILE).unlink()
    model.save_pretrained(folder, max_shard_size="40KB")
    return folder


def stored_in_units(folder: Path) -> dict[str, torch.Tensor]:
    """Read all weights as a sharded model does."""
    model = meta_model(folder).model
    values = {}
    with WeightReader(folder) as reader:
        for unit in weight_units(model, folder):
            values |= unit.whole(model, reader)
    return values


@pytest.mark.parametrize("change", [lambda folder: folder, in_parts])
def test_other_weights_beside_a_model_are_not_read(
    folder: Path, change: Callable[[Path], Path]
) -> None:
    change(folder)
    expected = stored_in_units(folder)
    table_Vd = read_embedding_table(folder)
    first = weight_files(folder)[0]
    for other in ("a_backup.safetensors", "model_old.safetensors"):
        changed = {name: tensor + 1 for name, tensor in expected.items()}
        save_file(changed, folder / other, metadata={"format": "pt"})
    assert weight_files(folder)[0] == first
    assert stored_in_units(folder).keys() == expected.keys()
    for name, values in stored_in_units(folder).items():
        assert torch.equal(values, expected[name])
    assert torch.equal(read_embedding_table(folder), table_Vd)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("[1]", "names no files"),
        ("{", "names no files"),
        ('{"weight_map": {}}', "names no files"),
        ('{"weight_map": 3}', "names no files"),
        ('{"weight_map": {"a": 7}}', "names 7, which is not a file beside it"),
        ('{"weight_map": {"a": [1]}}', "names no files"),
        (
            '{"weight_map": {"a": "gone.safetensors"}}',
            "names gone.safetensors, which is not a file",
        ),
        ('{"weight_map": {"a": "../other/model.safetensors"}}', "names model.safetensors, which"),
    ],
)
def test_a_damaged_index_is_refused_by_the_loader_and_by_check(
    folder: Path, tmp_path: Path, index: str, message: str, main: Callable
) -> None:
    shutil.copytree(folder, tmp_path / "other")
    in_parts(folder)
    (folder / INDEX).write_text(index)
    with pytest.raises(InputError) as raised:
        load_whole(folder, "fp32", CPU)
    assert message in str(raised.value)
    run = tiny.write_run(tmp_path)
    _, out, _ = main("check", run, f"--set=teacher.path={folder}", "--json")
    assert any(message in conflict["message"] for conflict in json.loads(out)["conflicts"])


def test_an_adapter_beside_the_weights_is_refused(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match=r"an adapter \(adapter_config\.json\) beside"):
        load_whole(folder, "fp32", CPU)


def test_tied_weights_may_be_stored_twice_but_not_differ(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    weights = load_file(folder / ONE_FILE)
    with pytest.raises(InputError, match=r"ties lm_head\.weight to model\.embed_tokens\.weight"):
        load_whole(folder, "fp32", CPU)
    with pytest.raises(InputError, match="their stored values differ"):
        check_tied(folder, meta_model(folder).model.all_tied_weights_keys)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, folder / ONE_FILE, metadata={"format": "pt"})
    load_whole(folder, "fp32", CPU)
    check_tied(folder, meta_model(folder).model.all_tied_weights_keys)
