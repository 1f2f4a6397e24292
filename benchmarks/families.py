"""Try every family of transformers as a tiny random teacher, and print what works as a table.

    python benchmarks/families.py FOLDER [FAMILY]...

Each family is loaded whole and in ZeRO-3 shards of two ranks, and compared with transformers' own
forward pass. A student is cut from it. What is refused is listed with its message.
"""

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as multiprocessing
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForMaskedLM
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

TINY = {
    "vocab_size": 600,
    "hidden_size": 32,
    "d_model": 32,
    "n_embd": 32,
    "embed_dim": 32,
    "embedding_size": 32,
    "num_hidden_layers": 4,
    "n_layer": 4,
    "n_layers": 4,
    "num_layers": 4,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "ffn_hidden_size": 64,
    "ffn_dim": 64,
    "n_inner": 64,
    "max_position_embeddings": 128,
    "max_seq_len": 128,
    "n_positions": 128,
    "head_dim": 8,
    "rotary_dim": 8,
    "word_embed_proj_dim": 32,
    "sliding_window": 16,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "top_k": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "shared_intermediate_size": 16,
    "expert_ffn_hidden_size": 16,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "qk_head_dim": 16,
    "v_head_dim": 6,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "moe_layer_start_index": 1,
    "query_pre_attn_scalar": 8,
    "dim_model_base": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""Values for the fields of a configuration that make a model small."""

ALIKE = 1e-5


def families() -> dict[str, bool]:
    """Return every family with a head for language, and whether it is a masked one."""
    found = dict.fromkeys(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, False)
    for family in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        found.setdefault(family, True)
    return {family: found[family] for family in sorted(found) if family in CONFIG_MAPPING}


def write_tiny(folder: Path, family: str, *, masked: bool) -> None:
    """Write a random model of a family."""
    defaults = CONFIG_MAPPING[family]()
    text = defaults.get_text_config()
    fields = {name: value for name, value in TINY.items() if hasattr(text, name)}
    if text is not defaults:
        raise ValueError("not a model of text alone")
    if fields.get("kv_lora_rank") and "num_key_value_heads" in fields:
        # Latent attention has as many key heads as query heads.
        fields["num_key_value_heads"] = 4
    for name in ("layer_types", "mlp_layer_types"):
        kinds = getattr(text, name, None)
        if kinds:
            fields[name] = kinds[:4]
    config = CONFIG_MAPPING[family](**fields)
    auto_class = AutoModelForMaskedLM if masked else AutoModelForCausalLM
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in auto_class.from_config(config).parameters())
    if size > 10_000_000:
        raise ValueError(f"the model has {size:,} parameters")
    torch.manual_seed(0)
    model = auto_class.from_config(config)
    for parameter in model.parameters():
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    model.save_pretrained(folder)


def hidden_of(folder: Path, *, masked: bool) -> torch.Tensor:
    """Return the last hidden states by transformers alone."""
    auto_class = AutoModelForMaskedLM if masked else AutoModelForCausalLM
    model = auto_class.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        return model.base_model(TOKENS, attention_mask=torch.ones_like(TOKENS)).last_hidden_state


TOKENS = torch.arange(4, 28).view(2, 12)
ANSWERS = torch.tensor([11, 5])


def said(error: Exception) -> str:
    """Return an error in one line."""
    if os.environ.get("TRACE"):
        traceback.print_exc()
    return f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"


def try_whole(folder: Path, facts: dict[str, Any]) -> None:
    """Load a model whole, and cut a student."""
    from post_dist.admission.student_config import rebuild_config
    from post_dist.models.load import load_whole
    from post_dist.models.student import check_cut, write_student

    expected = torch.load(folder / "hidden.pt")
    try:
        model = load_whole(folder, "fp32", torch.device("cpu"))
        with torch.no_grad():
            everywhere = model(TOKENS)
            last = [len(model.layers) - 1]
            at_answers = model(TOKENS, torch.ones_like(TOKENS), None, ANSWERS, layers=last)
        apart = [
            (everywhere - expected).abs().max(),
            (at_answers - expected[torch.arange(2), ANSWERS]).abs().max(),
        ]
        facts["whole"] = float(max(apart))
        facts["shares prompt"] = model.shares_prompt
    except Exception as error:
        facts["whole"] = said(error)
        return
    student = folder / "student"
    student.mkdir(exist_ok=True)
    try:
        write_student(student, folder, KEPT, _NoTokenizer())
        small = load_whole(student, "fp32", torch.device("cpu"))
        check_cut(model, small, KEPT)
        facts["student"] = "equal"
    except Exception as error:
        facts["student"] = said(error)
        return
    try:
        rebuild_config(student / "config.json")
        facts["door"] = "admitted"
        again = load_whole(student, "fp32", torch.device("cpu"))
        facts["door"] = float((again(TOKENS) - small(TOKENS)).abs().max())
    except Exception as error:
        facts["door"] = said(error)


KEPT = (0, 3)


class _NoTokenizer:
    def save_pretrained(self, folder: Path) -> None:
        """Write nothing."""


def try_shards(rank: int, folders: list[Path], ranks: int, port: int) -> None:
    """Load the models in shards on one of the ranks."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    from post_dist.runtime.distributed import start

    world = start(0)
    from post_dist.config.schema import Engine
    from post_dist.models.sharded import load_sharded

    for folder in folders:
        facts: dict[str, Any] = {}
        try:
            model = load_sharded(folder, Engine(), "fp32", world)
            with torch.no_grad():
                hidden = model(TOKENS)
            expected = torch.load(folder / "hidden.pt")
            facts["shards"] = float((hidden - expected).abs().max())
        except Exception as error:
            facts["shards"] = said(error)
        (folder / f"shards{rank}.json").write_text(json.dumps(facts))


def main() -> None:
    """Try the families that are named, or all."""
    place = Path(sys.argv[1]).resolve()
    wanted = sys.argv[2:] or list(families())
    made = []
    table: dict[str, dict[str, Any]] = {}
    for family in wanted:
        table[family] = {}
        folder = place / family
        masked = families()[family]
        try:
            write_tiny(folder, family, masked=masked)
            torch.save(hidden_of(folder, masked=masked), folder / "hidden.pt")
        except Exception as error:
            table[family]["made"] = said(error)
            continue
        made.append(folder)
        try_whole(folder, table[family])
        print(family, table[family], flush=True)
    multiprocessing.spawn(try_shards, (made, 2, 29611), nprocs=2)
    for folder in made:
        for rank in range(2):
            table[folder.name] |= json.loads((folder / f"shards{rank}.json").read_text())
    (place / "families.json").write_text(json.dumps(table, indent=1))
    for family, facts in table.items():
        print(f"| {family} | {facts} |")


if __name__ == "__main__":
    main()
