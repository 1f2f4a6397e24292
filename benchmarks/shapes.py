"""Models with random weights, and data of random words, for benchmarks.

What a training step costs depends on shapes alone, so the values may be random. The other programs
of this folder import this module. It is not a program itself.
"""

import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)

_NUM_WORDS = 3000
_NUM_TEXTS = 400
_HEAD_WIDTH = 64
_MOST_TOKENS = 3000
"""Largest vocabulary of the tokenizer. The model's may be larger: no text has its other tokens."""

_RUN_FILE = """\
name: bench
teacher: {path: model}
student: {layers: first_last, num_layers: 2}
corpus: {path: public.csv, sequence_length: 64, held_out_sequences: 8}
private_task:
  name: words
  visibility: private
  path: public.csv
  template: "{text} ab"
  labels: {0: [ab], 1: [ed]}
  max_length: 64
public_task: {name: words, visibility: public, path: public.csv, max_length: 128}
distill: {steps: 1, batch_size: 8, micro_batch_size_per_gpu: 8}
tune: {num_virtual_tokens: 100, batch_size: 16}
transfer: {objective: published, batch_size: 8}
engine: {precision: fp32}
"""


def write_run(folder: Path, *, width: int, layers: int, vocabulary: int) -> Path:
    """Write a model, its data and a run file into a folder, and return the run file.

    Args:
        folder: folder to write into; made where it is missing.
        width: width of the model, a multiple of 64.
        layers: layers of the model.
        vocabulary: rows of its embeddings.
    """
    write_model(folder / "model", _llama(width, layers, vocabulary))
    return write_run_file(folder, _NUM_TEXTS)


def write_run_file(folder: Path, num_texts: int) -> Path:
    """Write a run file and its data for the model in `folder / "model"`.

    Args:
        folder: an existing folder.
        num_texts: number of texts.
    """
    _write_texts(folder / "public.csv", num_texts)
    run = folder / "run.yaml"
    run.write_text(_RUN_FILE)
    return run


def write_model(
    folder: Path,
    config: PretrainedConfig,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> None:
    """Write a model with random weights and its tokenizer.

    Args:
        folder: folder to write into; made where it is missing.
        config: configuration of the model.
        dtype: dtype of the weights.
        device: device that draws the weights.
    """
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.save_pretrained(folder)
    write_tokenizer(folder, config.vocab_size)


def write_tokenizer(folder: Path, vocabulary: int) -> None:
    """Write a tokenizer for a model with a vocabulary of this size."""
    _trained_tokenizer(min(vocabulary, _MOST_TOKENS)).save_pretrained(folder)


def _llama(width: int, layers: int, vocabulary: int) -> LlamaConfig:
    """Return the configuration of a small Llama."""
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // _HEAD_WIDTH,
        num_key_value_heads=width // _HEAD_WIDTH,
        # Llama's ratio of 2.7, rounded down to a multiple of 16.
        intermediate_size=width * 27 // 10 // 16 * 16,
        max_position_embeddings=1024,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=True,
    )


def _trained_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer that is trained on the random words."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([" ".join(_words())], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def _write_texts(path: Path, count: int) -> None:
    """Write labeled texts of about 20 words, the length of SST-2's sentences and of tweets."""
    source = random.Random(1)
    words = _words()
    lengths = []
    for _ in range(count):
        length = round(source.lognormvariate(3, 0.5))
        lengths.append(min(100, max(4, length)))
    lines = ["text,label"]
    for index, length in enumerate(lengths):
        text = " ".join(source.choices(words, k=length))
        lines.append(f"{text},{index % 2}")
    path.write_text("\n".join(lines) + "\n")


def _words() -> list[str]:
    """Return words of one to four random syllables, the same in every call."""
    source = random.Random(0)
    words = []
    for _ in range(_NUM_WORDS):
        syllables = []
        for _ in range(source.randint(1, 4)):
            syllables.append(source.choice("aeiou") + source.choice("bdfgklmnprstv"))
        words.append("".join(syllables))
    return words
