"""Change the copied weights of a student, and measure its use and how soon an attack undoes it.

    python benchmarks/changed_student.py measure
    python benchmarks/changed_student.py show

A change that keeps transfers and withstands attacks would let a provider give away less. The
student is the demo's, of which 15 layers and the embeddings are the teacher's own. An attack
distills a copy further, with all layers and the teacher's outputs. Run `make demo` first.

Results go to changed-student-DEVICE.json. A measurement that is in the file is not repeated. All of
them take two hours on two cores.

Shapes: B sequences, T tokens.
"""

import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from arguments import measure_or_show
from experiments import experiments
from markdown_table import markdown_table
from results import Results
from utility import BENCHMARKS, default_results, measure, prepare_environment

if TYPE_CHECKING:
    from harness import Harness
    from transformers import PreTrainedTokenizerBase

    from post_dist.models.language_model import LanguageModel

DEMO = BENCHMARKS.parent / "demo"
FROZEN_LAYERS = 15
EPSILON = 8
ATTACK_STEPS = 96
BATCH = (16, 64)
"""Sequences of a step of the attack, and their tokens."""
HELD_OUT = (32, 256)
"""Sequences on which perplexities are measured, and their tokens."""
RATE = 2.5e-4
READINGS = 4
"""How often the perplexity is measured in an attack."""
CPU = torch.device("cpu")

Change = Callable[[Any], None]
"""Changes the weights of a model of transformers in place."""


def noise(share: float) -> Change:
    """Return the change that adds Gaussian noise to each matrix of the frozen layers.

    Args:
        share: deviation of the noise, as a share of that of the matrix.
    """

    def change(model: Any) -> None:
        for layer in model.model.layers[:FROZEN_LAYERS]:
            for weight in layer.parameters():
                if weight.ndim == 2:
                    weight += share * weight.std() * torch.randn_like(weight)

    return change


def rank(number: int) -> Change:
    """Return the change that projects the embeddings, which are also the head, to a lower rank."""

    def change(model: Any) -> None:
        table = model.model.embed_tokens.weight
        left, values, right = torch.linalg.svd(table, full_matrices=False)
        table.copy_((left[:, :number] * values[:number]) @ right[:number])

    return change


CHANGES: dict[str, Change] = {
    "none": lambda model: None,
    "noise of 0.1": noise(0.1),
    "noise of 0.2": noise(0.2),
    "embeddings of rank 288": rank(288),
}


def main() -> None:
    """Measure the changes that have no result yet, or print the table."""
    chosen = measure_or_show(__doc__).parse_args()
    prepare_environment()
    results = Results(chosen.results or default_results("changed-student"))
    if chosen.part == "show":
        print(table(results.read()))
        return
    # Imported here, because DeepSpeed reads the environment that is set above.
    from harness import Harness

    harness = Harness(BENCHMARKS / "reviews.yaml", chosen.output)
    for name, change in CHANGES.items():
        if name in results:
            continue
        start = time.monotonic()
        student = changed_student(harness, name, change, chosen.output)
        measured = {"perplexities": attacked(student), "rows": head_rows(harness, student)}
        seconds = round(time.monotonic() - start)
        results.add(name, {"device": harness.device, "seconds": seconds, **measured})


def changed_student(harness: "Harness", name: str, change: Change, output: Path) -> Path:
    """Write the demo's student with changed weights, and return its folder.

    Args:
        harness: makes the student.
        name: name of the change.
        change: the change.
        output: folder to write into.
    """
    from transformers import AutoModelForCausalLM

    folder = output / "changed" / name.replace(" ", "-")
    student = harness.student(_experiment().settings)
    shutil.copytree(student, folder, ignore=shutil.ignore_patterns("post_dist.json", "README.md"))
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    torch.manual_seed(7)
    with torch.no_grad():
        change(model)
    model.save_pretrained(folder)
    return folder


def head_rows(harness: "Harness", student: Path) -> list[dict[str, Any]]:
    """Tune a private head on a student, fit one on the LLM, and return the rows of the table."""
    experiment = _experiment()
    given = [f"inputs.student={student}", "inputs.trust_model=true"]
    rows = f"evaluate.private_rows={[EPSILON]}"
    return measure(harness, experiment, [*experiment.settings, *given, rows])


def _experiment() -> Any:
    (found,) = [each for each in experiments("head", 0) if each.name == "head, head on the LLM"]
    return found


def attacked(student_folder: Path) -> list[float]:
    """Distill a copy of a student further, and return its perplexities on the way."""
    from transformers import AutoTokenizer

    from post_dist.models.load import load_whole

    tokenizer = AutoTokenizer.from_pretrained(DEMO / "model")
    lines = (DEMO / "corpus.txt").read_text(errors="replace").splitlines()
    held_out = _sequences(tokenizer, lines[-2000:], HELD_OUT)
    batches = _sequences(tokenizer, lines[:3000], (ATTACK_STEPS * BATCH[0], BATCH[1]))
    teacher = load_whole(DEMO / "model", "bf16", CPU)
    student = load_whole(student_folder, "bf16", CPU)
    for weight in student.layers.parameters():
        weight.requires_grad_()
    found = [perplexity(student, held_out)]
    # An engine keeps the weights in fp32 too, because a step is smaller than a place of bf16.
    in_fp32 = [weight.detach().float() for weight in student.layers.parameters()]
    optimizer = torch.optim.AdamW(in_fp32, lr=RATE, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.0)
    for step, input_ids_BT in enumerate(batches.split(BATCH[0])):
        # As in the distill stage: a warm-up, and a linear decay to zero.
        warm_up = 0.05 * ATTACK_STEPS
        falling = (ATTACK_STEPS - step) / (ATTACK_STEPS - warm_up)
        optimizer.param_groups[0]["lr"] = RATE * min((step + 1) / warm_up, falling)
        _loss(teacher, student, input_ids_BT).backward()
        for weight, copy in zip(student.layers.parameters(), in_fp32, strict=True):
            copy.grad, weight.grad = weight.grad.float(), None
        torch.nn.utils.clip_grad_norm_(in_fp32, 5.0)
        optimizer.step()
        with torch.no_grad():
            for weight, copy in zip(student.layers.parameters(), in_fp32, strict=True):
                weight.copy_(copy)
        if (step + 1) % (ATTACK_STEPS // READINGS) == 0:
            found.append(perplexity(student, held_out))
    return found


def _sequences(
    tokenizer: "PreTrainedTokenizerBase", lines: list[str], shape: tuple[int, int]
) -> torch.Tensor:
    """Return the first tokens of some lines in this shape."""
    tokens = tokenizer("\n".join(lines)).input_ids[: math.prod(shape)]
    return torch.tensor(tokens).view(shape)


def _loss(
    teacher: "LanguageModel", student: "LanguageModel", input_ids_BT: torch.Tensor
) -> torch.Tensor:
    """Return the loss of the distill stage with its defaults."""
    from post_dist.config.schema import Distill
    from post_dist.data.masking import next_token_labels
    from post_dist.losses.distillation import LossSettings, distillation_loss
    from post_dist.losses.heads import Heads
    from post_dist.losses.pieces import logit_pieces
    from post_dist.losses.signals import HiddenSignal
    from post_dist.losses.terms import weights_of

    with torch.no_grad():
        signal = HiddenSignal(hidden=teacher(input_ids_BT).flatten(0, 1))
    pieces = logit_pieces(input_ids_BT.numel(), student.vocabulary_size)
    loss, _ = distillation_loss(
        student(input_ids_BT).flatten(0, 1),
        signal,
        next_token_labels(input_ids_BT).flatten(),
        Heads(student.head, student.head),
        LossSettings(weights_of(Distill()), Distill().temperature, pieces),
    )
    return loss


@torch.no_grad()
def perplexity(model: "LanguageModel", input_ids_BT: torch.Tensor) -> float:
    """Return the perplexity of a causal model on sequences."""
    losses = []
    for rows in input_ids_BT.split(8):
        logits = model.head(model(rows)[:, :-1]).float()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        losses.append(float(loss))
    return math.exp(sum(losses) / len(losses))


def table(results: dict[str, Any]) -> str:
    """Return a Markdown table with a line for each change."""
    tokens = [BATCH[0] * BATCH[1] * ATTACK_STEPS * part // READINGS for part in range(READINGS + 1)]
    rows = [f"student + prompt, epsilon {EPSILON}", f"transferred, epsilon {EPSILON}"]
    lines = []
    for name, measured in results.items():
        accuracies = {row["name"]: 100 * row["accuracy_micro"] for row in measured["rows"]}
        perplexities = [f"{value:.1f}" for value in measured["perplexities"]]
        lines.append((name, *[f"{accuracies[row]:.1f}" for row in rows], *perplexities))
    heads = ["change", *rows, *[f"perplexity after {number:,} tokens" for number in tokens]]
    return markdown_table(heads, lines)


if __name__ == "__main__":
    main()
