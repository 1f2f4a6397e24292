"""Compare the plan's formulas and `hardware.yaml` with numbers that large systems have published.

    python benchmarks/published.py

It computes for a few seconds, measures nothing, and writes published.md.
"""

from dataclasses import dataclass, replace
from typing import Literal

from markdown_table import markdown_table
from processor import BENCHMARKS

from post_dist.models.facts import ModelFacts
from post_dist.models.families import AttentionWidths
from post_dist.models.size import LayerSize, ModelSize
from post_dist.planning.cost import (
    backward_pass_bytes,
    forward_flops,
    forward_pass_bytes,
    head_flops,
    logit_bytes,
)
from post_dist.planning.hardware import Hardware, read_hardware
from post_dist.planning.simulation import GPU_HOURS_BETWEEN_FAILURES, Run, best_interval, simulate

FOUNDRY = "mosaicml/llm-foundry, scripts/train/benchmarking/README.md at 061f2c7"
SEQUENCE_LENGTH = 2048
VOCABULARY = 50368
BF16_BYTES = 2


@dataclass(frozen=True)
class TrainedModel:
    """A row of llm-foundry's table for H100 80GB BF16, FULL_SHARD, sequences of 2,048 tokens.

    The models are like GPT. Their MLP is four times as wide as the model.
    """

    name: str
    width: int
    layers: int
    gpus: int
    checkpoints_activations: bool
    tokens_per_second_per_gpu: float


@dataclass(frozen=True)
class PublishedLink:
    """The rate of a link that others have measured.

    Attributes:
        name: the link and what was measured.
        gpu: entry of `hardware.yaml`.
        link: the entry's link.
        gb_per_second: published rate into one GPU.
        source: where it was published.
    """

    name: str
    gpu: str
    link: Literal["node", "network"]
    gb_per_second: float
    source: str


TRAINED_MODELS = (
    TrainedModel("7B", 4096, 32, 8, False, 10_643),
    TrainedModel("13B", 5120, 40, 8, False, 4_792),
    TrainedModel("13B", 5120, 40, 64, False, 4_800),
    TrainedModel("30B", 7168, 48, 32, True, 2_308),
    TrainedModel("70B", 8192, 80, 32, True, 882),
    TrainedModel("70B", 8192, 80, 64, True, 1_039),
)
LINKS = (
    PublishedLink(
        "H100, 8 in a node: all-reduce busbw, NVLink SHARP",
        "h100",
        "node",
        476,
        "NVIDIA/nccl-tests issue 290: in the expected range",
    ),
    PublishedLink(
        "H100, between nodes, one 400 Gbit/s card per GPU",
        "h100",
        "network",
        47,
        "the same issue: 46 to 48 per card",
    ),
    PublishedLink(
        "A100, 8 in a node: all-reduce busbw",
        "a100",
        "node",
        208,
        "NVIDIA/nccl-tests issues 178 (208) and 149 (about 200)",
    ),
)
LLAMA = Run(
    step=10,
    ranks=16_384,
    steps=54 * 8640,
    save=2.4,
    interval=1,
    restart=600,
    hours_between_failures=GPU_HOURS_BETWEEN_FAILURES,
)
"""Llama 3 405B: 54 days in steps of 10 s. The interval is chosen for it."""


def model_size(model: TrainedModel) -> ModelSize:
    """Return the sizes that the plan's formulas read."""
    # Four square matrices of the attention; two matrices of the MLP, four times as wide.
    attention = 4 * model.width**2
    mlp = 8 * model.width**2
    layer = LayerSize((attention, mlp), attention, mlp)
    facts = ModelFacts(
        family="GPT",
        layers=model.layers,
        width=model.width,
        vocabulary=VOCABULARY,
        context_length=SEQUENCE_LENGTH,
        masked=False,
        tied=True,
        matrix_head=True,
        linear_head=True,
        scales_attention_by_layer=False,
    )
    # The head is the embedding matrix, so it has no weights of its own.
    return ModelSize(
        facts=facts,
        layers=(layer,) * model.layers,
        others=(VOCABULARY * model.width,),
        head=0,
        shares_prompt=True,
        attention=AttentionWidths(model.width, model.width, model.width, model.width),
        mlp_width=4 * model.width,
    )


def tokens_per_second(model: TrainedModel, hardware: Hardware) -> float:
    """Return the plan's rate of training on one GPU, in tokens per second.

    Communication is not counted: FSDP hides it behind computation.
    """
    size = model_size(model)
    # Activation checkpointing runs the forward pass twice. A backward pass costs two forwards.
    forwards = 2 if model.checkpoints_activations else 1
    forward = forward_flops(size, 1 / SEQUENCE_LENGTH, SEQUENCE_LENGTH) + head_flops(size, 1)
    # Each pass also moves its activations through memory, and the loss its logits.
    moved_bytes = (
        forwards * forward_pass_bytes(size, 1, BF16_BYTES)
        + backward_pass_bytes(size, 1, BF16_BYTES)
        + logit_bytes(size, 1)
    )
    compute_seconds = (2 + forwards) * forward / hardware.flops_per_second("bf16")
    memory_seconds = moved_bytes / hardware.memory_bytes_per_second()
    return 1 / (compute_seconds + memory_seconds)


def training_table() -> str:
    """Return the table of training rates."""
    h100 = read_hardware("h100", None)
    rows = []
    for model in TRAINED_MODELS:
        published = model.tokens_per_second_per_gpu
        ours = tokens_per_second(model, h100)
        note = ", activation checkpointing" if model.checkpoints_activations else ""
        name = model.name + note
        ratio = f"{ours / published:.2f}"
        rows.append((name, model.gpus, f"{published:,.0f}", f"{ours:,.0f}", ratio))
    return markdown_table(("model", "GPUs", "published", "ours", "ours / published"), rows)


def link_table() -> str:
    """Return the table of links."""
    rows = []
    for link in LINKS:
        ours = read_hardware(link.gpu, None).bytes_per_second(link.link) / 1e9
        rows.append((link.name, link.gb_per_second, f"{ours:.0f}", link.source))
    return markdown_table(("", "published", "ours", "source"), rows)


def main() -> None:
    """Write the tables."""
    # The interval between saves is not published, so Llama's run is given the best one.
    interval, goodput = best_interval(LLAMA)
    failures = simulate(replace(LLAMA, interval=interval), 0).failures
    llama_rows = [
        ("unexpected interruptions", 419, failures),
        ("effective training time", "more than 90%", f"{goodput:.1%}"),
    ]
    text = f"""# The plan compared with published systems

`python benchmarks/published.py` made this. Our numbers are the plan's formulas with the assumed \
shares of `hardware.yaml`.

## Training with all weights sharded, bf16, tokens per second and GPU

{training_table()}
Published: {FOUNDRY} (FSDP, which shards and gathers as ZeRO-3 does).

## Links, GB/s into a GPU

{link_table()}
SHARP sums inside the switch, which does not help a gather of weights. The ring of a gather is \
limited by the links' 450 GB/s.

## Llama 3 405B: 16,384 H100 for 54 days

{markdown_table(("", "published", "ours"), llama_rows)}
Published: arXiv 2407.21783, section 3.3.4. Ours: `planning/simulation.py` with its failure rate, \
steps of 10 s, and saves of 2.4 s (4.9 TB
at the 2 TB/s of its storage) every {interval * 10} s. The 600 s from a failure to the next step \
are an assumption.
"""
    (BENCHMARKS / "published.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
