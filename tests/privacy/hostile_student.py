"""A student whose gradients are rounding, and how far one example then moves a private step.

The MLPs of a small Llama cancel to zero in exact arithmetic, so the prompt has no effect, and its
gradient is zero. In floating-point numbers it is what rounding leaves. Made large enough to be
clipped, it has the norm C, and a direction that follows from the order of additions in a matrix
product. If that order depends on the example's place in a micro-batch, one more example changes all
others. There are two such students:

- `layers`: the second MLP is the first with its hidden units in another order and the opposite
  sign.
- `pairs`: each hidden unit of one MLP has a twin of the opposite sign. They cancel within one
  product, which adds in fp32 in bf16 too.

    python tests/privacy/hostile_student.py --trials 2000

prints the largest change for each student, shape, number of threads and precision.
"""

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import tiny
import torch
from privacy.checks import CPU, noisy_sums, part, quiet_source
from transformers import LlamaConfig, LlamaForCausalLM

ATTACKS = (("layers", "fp32"), ("pairs", "fp32"), ("pairs", "bf16"))
"""Each student with a precision in which its gradients are clipped. `layers` has none in bf16."""
WIDTH = 576
UNITS = 1536
"""Hidden units of an MLP."""
TOKENS = 10
NORM = 1e-6
"""The clipping norm, below the norm of rounding."""

# The constant coordinate of all embeddings. It makes the norm of a hidden state a constant.
_CONSTANT = 1e9
_GAIN = 30.0


def write_hostile_student(folder: Path, kind: str) -> Path:
    """Write a student. Half of the coordinates feed the MLPs, the other half feed the head."""
    torch.manual_seed(0)
    words = tiny.tokenizer("llama")
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=WIDTH,
            intermediate_size=UNITS,
            num_hidden_layers=2,
            num_attention_heads=9,
            num_key_value_heads=9,
            vocab_size=len(words),
            max_position_embeddings=256,
            tie_word_embeddings=False,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )
    half = WIDTH // 2
    with torch.no_grad():
        embeddings = model.model.embed_tokens.weight.normal_()
        embeddings[:, 0] = _CONSTANT
        # A layer norm divides by the constant, and its scale multiplies by it again.
        scale = torch.full((WIDTH,), _CONSTANT / WIDTH**0.5)
        scale[0] = WIDTH**-0.5
        first, second = model.model.layers
        for layer in (first, second):
            layer.input_layernorm.weight.copy_(scale)
            layer.post_attention_layernorm.weight.copy_(scale)
            for weight in layer.self_attn.parameters():
                weight.zero_()
        model.model.norm.weight.copy_(scale)
        # The first layer averages all positions, so the prompt reaches the answer.
        for projection in (first.self_attn.v_proj, first.self_attn.o_proj):
            projection.weight[1:half, 1:half] = torch.randn(half - 1, half - 1) / half**0.5
        # The MLPs read the first half and write to the second.
        gate = torch.zeros(UNITS, WIDTH)
        up = torch.zeros(UNITS, WIDTH)
        gate[:, 1:half] = torch.randn(UNITS, half - 1) / half**0.5
        up[:, 1:half] = torch.randn(UNITS, half - 1) / half**0.5
        down = torch.zeros(WIDTH, UNITS)
        down[half:] = _GAIN * torch.randn(WIDTH - half, UNITS)
        order = torch.randperm(UNITS)
        ones = torch.ones(UNITS)
        if kind == "layers":
            mlps = ((first, ones, torch.arange(UNITS)), (second, -ones, order))
        else:
            # Nothing else is in the second half, which would swallow what rounding leaves.
            embeddings[:, half:] = 0
            twins = order % (UNITS // 2)
            signs = torch.where(order < UNITS // 2, 1.0, -1.0)
            mlps = ((first, signs, twins), (second, 0 * ones, twins))
        for layer, signs, units in mlps:
            layer.mlp.gate_proj.weight.copy_(gate[units])
            layer.mlp.up_proj.weight.copy_(up[units])
            layer.mlp.down_proj.weight.copy_(signs * down[:, units])
        model.lm_head.weight.zero_()
        model.lm_head.weight[:, half:] = torch.randn(len(words), WIDTH - half) / WIDTH**0.5
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def hostile_task(folder: Path, precision: str, lengths: Sequence[int]) -> Any:
    """Return a tuning task of the hostile student, with 40 texts of each length in tokens."""
    from post_dist.artifacts.task import PromptTask
    from post_dist.data.task_reader import TaskReader
    from post_dist.models.load import load_tokenizer, load_whole
    from post_dist.models.tuning_task import TuningTask

    model = load_whole(folder, precision, CPU)
    task = PromptTask(
        template="{text} It was",
        label_words=(("bad",), ("good",)),
        max_length=max(lengths),
        allow_multi_token=False,
        init_text="",
    )
    reader = TaskReader(
        task, load_tokenizer(folder), masked=False, vocabulary=model.vocabulary_size
    )
    texts = [text for length in lengths for text in texts_of(length, 40)]
    examples = reader.encode(texts)
    table = model.model.get_input_embeddings().weight
    start_nd = table[torch.arange(20, 20 + TOKENS)].float().clone()
    return TuningTask(model, reader, examples, torch.zeros(len(texts), dtype=torch.long), start_nd)


@dataclass(frozen=True)
class Attack:
    """How far one example moves the clipped sum of a step.

    Attributes:
        task: the task of the hostile student.
        sizes: number of examples in a micro-batch of each padded length.
    """

    task: Any
    sizes: Mapping[int, int]

    def is_clipped(self) -> bool:
        """Return whether an example's gradient has the clipping norm, so that it can attack."""
        return float(self.sum_of([0]).norm()) > 1 - 1e-3

    def sum_of(self, examples: Sequence[int]) -> torch.Tensor:
        """Return the clipped sum of a step, in units of the clipping norm."""
        parameters = [self.task.start_nd.float()]
        gradients = part("privacy.gradients").unit_gradients
        pieces = gradients(self.task, parameters, list(examples), self.sizes, CPU)
        shapes = [parameters[0].shape]
        (total,) = noisy_sums(pieces, shapes, source=quiet_source(), max_grad_norm=NORM)
        return total / NORM


def texts_of(tokens: int, count: int) -> list[str]:
    """Return texts that fill a micro-batch of a length."""
    generator = torch.Generator().manual_seed(tokens)
    nouns = torch.randint(len(tiny.NOUNS), (count, 200), generator=generator)
    return [" ".join(tiny.NOUNS[noun] for noun in row[: tokens - 6]) for row in nouns.tolist()]


def main() -> None:
    """Print the largest change of a sum for each shape, number of threads and precision."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=2000)
    trials = parser.parse_args().trials
    for kind, precision in ATTACKS:
        with tempfile.TemporaryDirectory() as place:
            student = write_hostile_student(Path(place), kind)
            for threads in (1, 2):
                torch.set_num_threads(threads)
                planned, tried = attacks(student, precision)
                # The planned sizes only show that the attack works.
                for name, attack, count in (
                    ("planned", planned, min(trials, 20)),
                    ("tried", tried, trials),
                ):
                    moved = largest_change(attack, count, seed=threads)
                    print(
                        f"{kind}, {precision}, {threads} threads, {name} sizes, {count} trials: "
                        f"one example moves the sum by {moved:.7f} C",
                        flush=True,
                    )


def attacks(
    student: Path, precision: str, lengths: Sequence[int] = (48, 112)
) -> tuple[Attack, Attack]:
    """Return the attack with the planned sizes of micro-batches, and with the tried ones."""
    from post_dist.config.stages import Tune

    task = hostile_task(student, precision, lengths)
    section = Tune(batch_size=40, micro_batch_size_per_gpu=5)
    planned = part("privacy.micro_batches").planned_sizes(task, 5)
    tried = part("privacy.batch_sizes").independent_sizes(section, task)
    return Attack(task, planned), Attack(task, tried)


def largest_change(attack: Attack, trials: int, seed: int) -> float:
    """Return how far one example moves the sum of 30 others at most, in clipping norms."""
    generator = torch.Generator().manual_seed(seed)
    largest = 0.0
    for trial in range(trials):
        # One sum is the comparison of ten trials.
        if trial % 10 == 0:
            order = torch.randperm(len(attack.task.examples), generator=generator).tolist()
            examples = order[10:40]
            base = attack.sum_of(examples)
        moved = attack.sum_of([order[trial % 10], *examples]) - base
        largest = max(largest, float(moved.norm()))
    return largest


if __name__ == "__main__":
    main()
