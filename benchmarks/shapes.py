"""Models with random weights and data of random words, for benchmarks: what a step costs depends on shapes alone."""

import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

WORDS = 3000
ROWS = 400


def words() -> list[str]:
    """Random syllables."""
    source = random.Random(0)
    return [
        "".join(
            source.choice("aeiou") + source.choice("bdfgklmnprstv")
            for _ in range(source.randint(1, 4))
        )
        for _ in range(WORDS)
    ]


def write_model(folder: Path, *, width: int, layers: int, vocabulary: int) -> None:
    """A Llama with heads of 64, and a tokenizer of at most `vocabulary` tokens."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=min(vocabulary, 3000),
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([" ".join(words())], trainer)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        intermediate_size=width * 27 // 10 // 16 * 16,
        max_position_embeddings=1024,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=True,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=core, **names).save_pretrained(folder)


def write_run(folder: Path, **shape: int) -> Path:
    """A model, its data and a run file."""
    folder.mkdir(parents=True, exist_ok=True)
    write_model(folder / "model", **shape)
    source, known = random.Random(1), words()
    lengths = [
        min(100, max(4, round(source.lognormvariate(3, 0.5)))) for _ in range(ROWS)
    ]  # about 20 words, as in SST-2 and tweets
    lines = [" ".join(source.choices(known, k=length)) for length in lengths]
    (folder / "public.csv").write_text(
        "text,label\n" + "".join(f"{line},{index % 2}\n" for index, line in enumerate(lines))
    )
    run = folder / "run.yaml"
    run.write_text(
        """\
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
transfer: {batch_size: 8}
engine: {precision: fp32}
"""
    )
    return run
