"""A prefix as an artifact: the order of PEFT, and the shapes that it is made for."""

import json
from pathlib import Path

import pytest
import tiny
import torch

from post_dist.artifacts.prefix import Prefix, PrefixShape
from post_dist.artifacts.prefix_files import holds_prefix, read_prefix, write_prefix
from post_dist.models.facts import read_facts
from post_dist.models.load import load_whole
from post_dist.models.prefix_layers import initial_prefix, prefix_conflicts, prefix_shape

CAUSAL = [family for family in (*tiny.FAMILIES, "mpt", "falcon", "opt") if family != "roberta"]


def random_prefix(layers: int = 3, heads: int = 2, tokens: int = 5, width: int = 4) -> Prefix:
    return Prefix(tuple(torch.randn(heads, tokens, width) for _ in range(2 * layers)))


def test_a_row_holds_the_layers_then_keys_and_values_then_the_heads() -> None:
    prefix = random_prefix()
    by_token = prefix.table().view(5, 3, 2, 2, 4)
    assert torch.equal(by_token[:, 1, 0].transpose(0, 1), prefix.keys_and_values[2])
    assert torch.equal(by_token[:, 2, 1].transpose(0, 1), prefix.keys_and_values[5])


def test_a_prefix_reads_back_as_it_was_written(tmp_path: Path) -> None:
    prefix = random_prefix()
    files = (tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json")
    about = {"task_type": "CAUSAL_LM", "base_model_name_or_path": "model"}
    assert not holds_prefix(Path(__file__))
    write_prefix(*files, prefix, about)
    assert holds_prefix(files[1])
    found = read_prefix(*files, 5)
    assert found.shape == PrefixShape(layers=3, heads=2, width=4)
    assert found.num_virtual_tokens == 5
    assert all(map(torch.equal, found.keys_and_values, prefix.keys_and_values))


@pytest.mark.parametrize("family", CAUSAL)
def test_the_shape_is_known_before_the_weights_are_read(tmp_path: Path, family: str) -> None:
    folder = tiny.write_model(tmp_path / "model", family)
    facts = read_facts(folder)
    (folder / "model.safetensors").rename(tmp_path / "weights")
    shape = prefix_shape(facts)
    assert not prefix_conflicts(facts, 10)
    assert "MiB" in prefix_conflicts(facts, 1 << 20)[0].message
    (tmp_path / "weights").rename(folder / "model.safetensors")
    model = load_whole(folder, "fp32", torch.device("cpu"))
    assert initial_prefix(model, torch.randn(3, 32)).shape == shape


LATENT = {
    "model_type": "deepseek_v3",
    "first_k_dense_replace": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 12,
    "num_key_value_heads": 4,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 6,
    "head_dim": 4,
    "v_head_dim": 8,
}
NO_SHAPE: dict[str, dict] = {
    "a masked model": {},
    "experts": {"model_type": "mixtral"},
    "values of another width": LATENT,
    "a state of convolutions": {
        "model_type": "lfm2",
        "layer_types": ["conv", "full_attention"] * 2,
    },
    "no attention": {"model_type": "mamba"},
}


@pytest.mark.parametrize("kind", NO_SHAPE)
def test_models_that_keep_other_keys_and_values_have_no_shape(tmp_path: Path, kind: str) -> None:
    changes = NO_SHAPE[kind]
    folder = tiny.write_model(tmp_path / "model", "llama" if changes else "roberta")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    facts = read_facts(folder)
    assert prefix_shape(facts) is None
    (conflict,) = prefix_conflicts(facts, 10)
    assert ("is a masked one" in conflict.message) == facts.masked
    assert facts.family in conflict.message


@torch.no_grad()
def test_a_prefix_does_not_decide_whether_prompts_can_be_shared(tmp_path: Path) -> None:
    """A trial run of prompts finds that out, so no prefix may stand in their place."""
    model = load_whole(tiny.write_model(tmp_path / "model", "llama"), "fp32", torch.device("cpu"))
    prefix = [part[None] for part in initial_prefix(model, torch.randn(3, 32)).keys_and_values]
    ran = []
    packed = model._at_answers_of_packed
    model._at_answers_of_packed = lambda *given: ran.append(1) or packed(*given)
    with model.behind(prefix):
        assert model.shares_prompt
        assert ran == [1]
        assert model.has_prefix
    assert not model.has_prefix
