"""What the plan's formulas and `hardware.yaml` say where large systems have published a figure.

python benchmarks/published.py            # writes published.md
"""

from dataclasses import dataclass
from pathlib import Path

from post_dist.models.facts import ModelFacts
from post_dist.models.size import LayerSize, ModelSize
from post_dist.planning.cost import (
    backward_pass_bytes,
    forward_flops,
    forward_pass_bytes,
    head_flops,
    logit_bytes,
)
from post_dist.planning.hardware import read_hardware
from post_dist.planning.simulation import GPU_HOURS_BETWEEN_FAILURES, Run, best_interval, simulate

FOUNDRY = "mosaicml/llm-foundry, scripts/train/benchmarking/README.md at 061f2c7"


@dataclass(frozen=True)
class Trained:
    """A row of llm-foundry's table for H100 80GB BF16, FULL_SHARD, sequences of 2,048: GPT-like models whose MLP is four times as wide."""

    name: str
    width: int
    layers: int
    gpus: int
    recomputes: bool
    tokens_per_second_per_gpu: float


ROWS = (
    Trained("7B", 4096, 32, 8, False, 10_643),
    Trained("13B", 5120, 40, 8, False, 4_792),
    Trained("13B", 5120, 40, 64, False, 4_800),
    Trained("30B", 7168, 48, 32, True, 2_308),
    Trained("70B", 8192, 80, 32, True, 882),
    Trained("70B", 8192, 80, 64, True, 1_039),
)
LINKS = (
    (
        "H100, 8 in a node: all-reduce busbw, NVLink SHARP",
        "h100",
        "node",
        476,
        "NVIDIA/nccl-tests issue 290: in the expected range",
    ),
    (
        "H100, between nodes, one 400 Gbit/s card a GPU",
        "h100",
        "network",
        47,
        "the same issue: 46 to 48 a card",
    ),
    (
        "A100, 8 in a node: all-reduce busbw",
        "a100",
        "node",
        208,
        "NVIDIA/nccl-tests issues 178 (208) and 149 (about 200)",
    ),
)


def size(row: Trained) -> ModelSize:
    """The sizes that operations depend on."""
    attention, mlp = 4 * row.width**2, 8 * row.width**2
    layers = (LayerSize((attention, mlp), attention, mlp),) * row.layers
    facts = ModelFacts(
        family="GPT",
        layers=row.layers,
        width=row.width,
        vocabulary=50368,
        context_length=2048,
        masked=False,
        tied=True,
        matrix_head=True,
        linear_head=True,
        scales_attention_by_layer=False,
    )
    return ModelSize(
        facts=facts,
        layers=layers,
        others=(50368 * row.width,),
        head=0,
        attention_width=row.width,
        kv_width=row.width,
        mlp_width=4 * row.width,
        shares_prompt=True,
    )


def main() -> None:
    """Write the tables."""
    h100 = read_hardware("h100", None)
    text = """# The plan beside published systems

`python benchmarks/published.py`. Ours are formulas and the assumed shares of `hardware.yaml`.

## Training with all weights sharded, bf16, tokens a second and GPU

| model | GPUs | published | ours | ours over it |
|---|---|---|---|---|
"""
    for row in ROWS:
        model = size(row)
        forward = forward_flops(model, 1 / 2048, 2048) + head_flops(model, 1)
        twice = int(row.recomputes)
        passed = (
            (1 + twice) * forward_pass_bytes(model, 1, 2)
            + backward_pass_bytes(model, 1, 2)
            + logit_bytes(model, 1)
        )
        seconds = (3 + twice) * forward / h100.flops_per_second(
            "bf16"
        ) + passed / h100.memory_bytes_per_second()
        ours = 1 / seconds
        published = row.tokens_per_second_per_gpu
        again = ", activations computed again" if row.recomputes else ""
        text += f"| {row.name}{again} | {row.gpus} | {published:,.0f} | {ours:,.0f} | {ours / published:.2f} |\n"
    text += f"\nPublished: {FOUNDRY} (FSDP, which shards and gathers as ZeRO-3 does).\n"
    text += "\n## Links, GB/s into a GPU\n\n| | published | ours | source |\n|---|---|---|---|\n"
    for name, gpu, link, published, source in LINKS:
        reached = read_hardware(gpu, None).bytes_per_second(link) / 1e9  # type: ignore[arg-type]
        text += f"| {name} | {published} | {reached:.0f} | {source} |\n"
    text += "\nSHARP sums inside the switch; a gather of weights has no use of it, and its ring ends at the links' 450.\n"
    llama = Run(
        step=10,
        ranks=16_384,
        steps=54 * 8640,
        save=2.4,
        interval=1,
        restart=600,
        hours_between_failures=GPU_HOURS_BETWEEN_FAILURES,
    )
    interval, goodput = best_interval(llama)
    failures = simulate(Run(**{**vars(llama), "interval": interval}), 0).failures
    text += f"""
## Llama 3 405B: 16,384 H100 for 54 days

| | published | ours |
|---|---|---|
| unexpected interruptions | 419 | {failures} |
| effective training time | more than 90% | {goodput:.1%} |

Published: arXiv 2407.21783, section 3.3.4. Ours: `planning/simulate.py` with its failure rate, steps of 10 s, saves of 2.4 s (4.9 TB at the
2 TB/s of its storage) every {interval * 10} s, and 600 s from a failure to the next step, which is an assumption.
"""
    (Path(__file__).parent / "published.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
