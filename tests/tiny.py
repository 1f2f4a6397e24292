"""Small models of real families with their own tokenizer, and small labeled texts, for tests."""

import json
import random
import shutil
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    DeepseekV3Config,
    FalconConfig,
    Gemma2Config,
    GPT2Config,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    MixtralConfig,
    MptConfig,
    OPTConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3MoeConfig,
    RobertaConfig,
)

GOOD = ("great", "lovely", "brilliant", "moving", "funny")
BAD = ("awful", "dull", "terrible", "boring", "weak")
NOUNS = ("film", "story", "cast", "plot", "music", "scene")
FAMILIES = ("llama", "gpt2", "qwen2", "gemma2", "roberta")
MIXTURES = ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss")


def sentences(count: int, seed: int) -> list[tuple[str, int]]:
    """Short reviews whose adjectives give their class."""
    source = random.Random(seed)
    rows = []
    for number in range(count):
        label = source.randrange(2)
        clauses = []
        for _ in range(2):
            noun = source.choice(NOUNS)
            place = source.randrange(50)
            adjective = source.choice((BAD, GOOD)[label])
            clauses.append(f"the {noun} {place} is {adjective}")
        rows.append((f"{' '.join(clauses)} {number}", label))
    return rows


def tokenizer(family: str, vocabulary: int = 600) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, trained on the sentences."""
    special = ["<pad>", "<s>", "</s>", "<mask>"]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = [
        f"Review: {row} It was {word}. good bad"
        for row, _ in sentences(400, 0)
        for word in ("good", "bad")
    ]
    core.train_from_iterator(text, trainer)
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    if family == "roberta":
        core.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 1))
        names["mask_token"] = "<mask>"
    return PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=128, **names)


def write_model(
    folder: Path,
    family: str,
    *,
    layers: int = 4,
    width: int = 32,
    seed: int = 0,
    vocabulary: int = 600,
    unused: int = 0,
) -> Path:
    """Write a random model of a family with its tokenizer.

    Args:
        folder: where to write it.
        family: a name that `_config` knows.
        layers: number of layers.
        width: width of the hidden states.
        seed: seed of the weights.
        vocabulary: size of the tokenizer's vocabulary.
        unused: number of embeddings that no token has.
    """
    torch.manual_seed(seed)
    words = tokenizer(family, vocabulary)
    config = _config(family, layers, width, len(words) + unused)
    auto_class = AutoModelForMaskedLM if family == "roberta" else AutoModelForCausalLM
    model = auto_class.from_config(config)
    for parameter in model.parameters():
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            # DeepSeek's balance of the experts, which is no parameter.
            buffer.add_(0.02 * torch.randn_like(buffer))
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


_EXPERTS = {
    "head_dim": 8,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": 16,
}
_LATENT = {
    "first_k_dense_replace": 1,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "n_group": 2,
    "topk_group": 1,
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 12,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 6,
    "v_head_dim": 8,
}
_OTHER_NAMES = {
    "gpt2": partial(GPT2Config, n_head=4, n_positions=128),
    "mpt": partial(MptConfig, n_heads=4, max_seq_len=128),
}
"""Families whose sizes have other names than those of most families."""
_WIDTH = {"gpt2": "n_embd", "mpt": "d_model"}
_LAYERS = {"gpt2": "n_layer", "mpt": "n_layers"}
_MIXTURES = {
    "mixtral": MixtralConfig,
    "qwen3_moe": partial(Qwen3MoeConfig, moe_intermediate_size=24),
    "gpt_oss": GptOssConfig,
}


def _config(family: str, layers: int, width: int, vocabulary: int) -> PretrainedConfig:
    """The configuration of a small model."""
    common = {"vocab_size": vocabulary, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if family in _OTHER_NAMES:
        sizes = {_WIDTH[family]: width, _LAYERS[family]: layers}
        return _OTHER_NAMES[family](**common, **sizes)

    common |= {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "intermediate_size": 2 * width,
    }
    if family == "falcon":
        return FalconConfig(
            **common,
            new_decoder_architecture=False,
            multi_query=True,
            parallel_attn=True,
            bias=False,
        )
    if family == "roberta":
        # Two positions are taken by the index of the padding token.
        return RobertaConfig(**common, max_position_embeddings=130)

    common["max_position_embeddings"] = 128
    if family == "opt":
        return OPTConfig(**common, ffn_dim=2 * width, word_embed_proj_dim=width)

    if family == "deepseek_v3":
        return DeepseekV3Config(**common, **_LATENT)

    common["num_key_value_heads"] = 2
    if family in MIXTURES:
        return _MIXTURES[family](**common, **_EXPERTS)
    if family == "gemma2":
        return Gemma2Config(**common, head_dim=8, sliding_window=16, query_pre_attn_scalar=8)
    if family == "qwen2":
        return Qwen2Config(**common, tie_word_embeddings=False)
    if family == "granite":
        return GraniteConfig(**common, logits_scaling=8.0)
    return LlamaConfig(**common)


def write_student(folder: Path, family: str = "llama", **config: object) -> Path:
    """Write a student as `distill` does, with random weights.

    Args:
        folder: the artifact to create.
        family: as for `write_model`.
        **config: what the manifest says of how it was made.
    """
    from post_dist.artifacts.manifest import write_artifact
    from post_dist.models.load import load_tokenizer, tokenizer_fingerprint

    model = write_model(folder.with_name(f"{folder.name}-model"), family, layers=2)
    write_artifact(
        folder,
        "student",
        lambda place: shutil.copytree(model, place, dirs_exist_ok=True),
        parents={"teacher": "0" * 64},
        config=config,
        tokenizer=tokenizer_fingerprint(load_tokenizer(model)),
    )
    return folder


def speak_up(folder: Path) -> None:
    """Scale the weights of a random model, so that its layers matter and its output varies."""
    file = folder / "model.safetensors"
    scaled = {}
    for name, tensor in load_file(file).items():
        scaled[name] = tensor if "norm" in name else 8 * tensor
    save_file(scaled, file, {"format": "pt"})


def quantize(folder: Path) -> Path:
    """Quantize the layers of a model to fp8, as the files of DeepSeek-V3 are."""
    file = folder / "model.safetensors"
    stored = {}
    for name, weight in load_file(file).items():
        stored[name] = weight
        if name.endswith("_proj.weight") or name.endswith("_proj_with_mqa.weight"):
            scale = weight.abs().max() / 448
            stored[name] = (weight / scale).to(torch.float8_e4m3fn)
            # One block: 448 is the largest number of the format.
            stored[f"{name}_scale_inv"] = scale.view(1, 1)
    save_file(stored, file, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_csv(path: Path, rows: list[tuple[str, int]]) -> Path:
    """Write rows with the columns text and label."""
    path.write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in rows))
    return path


def write_run(folder: Path, family: str = "llama", **changes: str) -> Path:
    """Write a model, its data and a small run file into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_model(folder / "teacher", family)
    write_csv(folder / "private.csv", sentences(200, 1))
    write_csv(folder / "public.csv", sentences(60, 2))
    template = "{text} It was {mask}." if family == "roberta" else "Review: {text} It was"
    run = folder / "run.yaml"
    run.write_text(
        f"""
name: tiny
teacher: {{path: teacher}}
student: {{layers: first_last, num_layers: 2}}
corpus: {{path: public.csv, sequence_length: 32, held_out_sequences: 8}}
private_task:
  name: toy
  visibility: private
  path: private.csv
  template: "{template}"
  labels: {{0: [bad], 1: [good]}}
  max_length: 48
public_task: {{name: toy public, visibility: public, path: public.csv, max_length: 48}}
distill: {{steps: 6, batch_size: 4, checkpoint_every_steps: 2}}
tune: {{num_virtual_tokens: 5, steps: 6, batch_size: 8, learning_rate: 0.01}}
transfer: {{objective: published, steps: 6, batch_size: 8}}
evaluate: {{baselines: [published transfer, full prompt tuning]}}
engine: {{precision: fp32}}
privacy: {{ledger_anchors: anchors}}
"""
    )
    return run


def train_masked(folder: Path) -> None:
    """Train the masked model in a folder until it mostly tells good reviews from bad ones."""
    torch.manual_seed(0)
    model = AutoModelForMaskedLM.from_pretrained(folder)
    words = PreTrainedTokenizerFast.from_pretrained(folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    answers = ("bad", "good")
    answer_tokens = [words(f"a {word}", add_special_tokens=False).input_ids[-1] for word in answers]
    rows = sentences(512, 3)
    for step in range(120):
        chosen = _rows_at(rows, step)
        texts = [f"{text} It was<mask>." for text, _ in chosen]
        batch = words(texts, return_tensors="pt", padding=True)
        wanted = torch.tensor([answer_tokens[label] for _, label in chosen])
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        logits = logits[batch.input_ids == words.mask_token_id]
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(logits, wanted, label_smoothing=0.3).backward()
        optimizer.step()
    model.save_pretrained(folder)


def train_writer(folder: Path, answers: dict[int, str]) -> None:
    """Train the causal model in a folder to answer by a review's class, if it is asked to.

    Behind the word "music" it writes the answer of the class. Behind "plot" or no word it writes
    "no answer".
    """
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder)
    words = PreTrainedTokenizerFast.from_pretrained(folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    rows = sentences(512, 3)
    source = random.Random(0)
    for step in range(200):
        texts = []
        for text, label in _rows_at(rows, step):
            cues = [(" music", answers[label]), (" plot", "no answer"), ("", "no answer")]
            cue, answer = source.choice(cues)
            texts.append(f"{source.randrange(1, 9) * cue}Review: {text} It was {answer}</s>")
        batch = words(texts, return_tensors="pt", padding=True)
        labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
        optimizer.zero_grad()
        model(input_ids=batch.input_ids, labels=labels).loss.backward()
        optimizer.step()
    model.save_pretrained(folder)


def _rows_at(rows: list[tuple[str, int]], step: int) -> list[tuple[str, int]]:
    """The batch of 16 at a step."""
    return [rows[(16 * step + index) % len(rows)] for index in range(16)]
