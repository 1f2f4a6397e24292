"""The models and batches that are measured on a GPU, and tiny ones of the same families for a CPU.

This module is not a program itself.
"""

from dataclasses import dataclass
from pathlib import Path

import shapes
import torch
from gpu_page import DEVICE
from transformers import GPT2Config, LlamaConfig, PretrainedConfig

from post_dist.config.load import load_run
from post_dist.config.schema import RunConfig

_TINY = DEVICE.type == "cpu"
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_BATCHES = {
    "corpus.sequence_length": 512,
    "distill.batch_size": 32,
    "distill.micro_batch_size_per_gpu": 32,
    "tune.num_virtual_tokens": 100,
    "tune.batch_size": 128,
    "transfer.batch_size": 64,
}
_TINY_BATCHES = {
    "corpus.sequence_length": 16,
    "distill.batch_size": 2,
    "distill.micro_batch_size_per_gpu": 2,
    "tune.num_virtual_tokens": 20,
    "tune.batch_size": 4,
    "private_task.max_length": 16,
    "public_task.max_length": 24,
    "transfer.batch_size": 4,
}
# Random weights of a small model must be large, or all of its distributions are the same.
_TINY_FIELDS = {"initializer_range": 0.2, "vocab_size": 600}
_TEXTS = 24 if _TINY else 8000
REPEATS = 2 if _TINY else 7
PRECISIONS = ("fp32",) if _TINY else ("bf16", "fp32")
"""A CPU is slow in bf16."""
COMPILED = () if _TINY else ("engine.compile=true",)
"""A CPU takes minutes to compile."""


@dataclass(frozen=True)
class Subject:
    """A large model and the student that is cut from it.

    Attributes:
        name: name in the tables.
        config: configuration of the large model.
        student: configuration of the student.
        settings: settings of the run file that fix the student.
    """

    name: str
    config: PretrainedConfig
    student: PretrainedConfig
    settings: tuple[str, ...]

    def write_run(self, folder: Path) -> Path:
        """Write a run file, its data and the tokenizer, without any weights.

        Args:
            folder: folder to write into; made where it is missing.
        """
        model = folder / "model"
        model.mkdir(parents=True, exist_ok=True)
        self.config.save_pretrained(model)
        shapes.write_tokenizer(model, self.config.vocab_size)
        return shapes.write_run_file(folder, _TEXTS)

    def write_teacher(self, folder: Path) -> Path:
        """Write the large model into the folder of a run file, and return its folder."""
        shapes.write_model(folder / "model", self.config, torch.bfloat16, DEVICE.type)
        return folder / "model"

    def write_student(self, folder: Path) -> Path:
        """Write the student into the folder of a run file, and return its folder."""
        shapes.write_model(folder / "student", self.student, torch.bfloat16, DEVICE.type)
        return folder / "student"

    def load_config(self, run: Path, precision: str, *more: str) -> RunConfig:
        """Load the run file with the batches of this device.

        Args:
            run: the run file.
            precision: precision of the models.
            *more: further settings, as `KEY=VALUE`.
        """
        batches = _TINY_BATCHES if _TINY else _BATCHES
        settings = [f"{key}={value}" for key, value in batches.items()]
        settings += [f"engine.precision={precision}", *self.settings, *more]
        return load_run(run, settings)


def subjects() -> list[Subject]:
    """Return what each step is measured on. One is enough to try a program on a CPU."""
    return [gpt2_xl()] if _TINY else [demo(), gpt2_xl()]


def demo() -> Subject:
    """Return the demo's shapes: SmolLM2-135M, and 18 of its layers with the lower 15 frozen."""
    whole = _llama(width=576, layers=30, heads=9, groups=3, mlp=1536, vocabulary=49152)
    layers = [*range(17), 29]
    frozen = 15
    if _TINY:
        layers = [0, 1, 3]
        frozen = 1
    settings = (*_keep(layers), f"student.frozen_lower_layers={frozen}")
    return Subject("SmolLM2-135M", whole, _with_layers(whole, len(layers)), settings)


def gpt2_xl() -> Subject:
    """Return the shapes of the paper's rows: GPT2-XL, and a student of four layers."""
    whole = GPT2Config(n_embd=1600, n_layer=48, n_head=25, n_positions=1024)
    if _TINY:
        whole = GPT2Config(n_embd=64, n_layer=5, n_head=4, n_positions=256, **_TINY_FIELDS)
    layers = [0, 1, 2, 4] if _TINY else [0, 1, 46, 47]
    return Subject("GPT2-XL", whole, _with_layers(whole, 4), _keep(layers))


def llama_8b() -> Subject:
    """Return Llama-3-8B, and a student of two layers with 1.5 billion parameters."""
    whole = _llama(width=4096, layers=32, heads=32, groups=8, mlp=14336, vocabulary=128256)
    # The teacher leaves room for the activations of a few sequences.
    settings = () if _TINY else ("distill.micro_batch_size_per_gpu=8",)
    return Subject("Llama-3-8B", whole, _with_layers(whole, 2), settings)


def _llama(
    *, width: int, layers: int, heads: int, groups: int, mlp: int, vocabulary: int
) -> LlamaConfig:
    """Return a Llama of these sizes, or a tiny one on a CPU. A small one has a tied head."""
    fields = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "intermediate_size": mlp,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": width < 4096,
    }
    if _TINY:
        sizes = {"hidden_size": 64, "num_hidden_layers": 4, "intermediate_size": 128}
        heads_of_tiny = {"num_attention_heads": 4, "num_key_value_heads": 2}
        fields |= sizes | heads_of_tiny | _TINY_FIELDS
    return LlamaConfig(**fields, **_TOKENS)


def _keep(layers: list[int]) -> tuple[str, ...]:
    """Return the settings of a student of these layers."""
    return f"student.layers={layers}", f"student.num_layers={len(layers)}"


def _with_layers(config: PretrainedConfig, layers: int) -> PretrainedConfig:
    """Return the configuration with another number of layers."""
    fields = config.to_dict()
    fields.pop("layer_types", None)
    fields["num_hidden_layers" if "num_hidden_layers" in fields else "n_layer"] = layers
    return type(config).from_dict(fields)
