"""Under a launcher: what each collective of a step of distillation and of transfer brings to rank 0, as JSON. `wire_bytes.py FOLDER`"""

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from post_dist.artifacts.prompt import PromptTask
from post_dist.config.load import load_run
from post_dist.data.corpus import build_corpus
from post_dist.models.load import load_tokenizer, load_whole
from post_dist.models.sharded import load_sharded
from post_dist.models.student import write_student
from post_dist.runtime.distributed import start
from post_dist.stages.distill import Batches, distill_step, student_engine
from post_dist.stages.lesson import Models, lesson_losses, prepare_lesson
from post_dist.stages.teacher_signals import ask_teacher

class Wires(TorchDispatchMode):
    """Counts what this rank takes in: a ring's share of what a collective moves."""

    def __init__(self, ranks: int) -> None:
        super().__init__()
        self.share = (ranks - 1) / ranks
        self.bytes: dict[str, float] = defaultdict(float)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = str(func)
        if name.startswith("c10d._allgather_base_"):
            self.bytes["gather"] += args[0].nbytes - args[1].nbytes
        elif name.startswith("c10d._reduce_scatter_base_"):
            self.bytes["reduce"] += self.share * args[1].nbytes
        elif name.startswith("c10d.allreduce_"):
            size = sum(tensor.nbytes for tensor in args[0])
            self.bytes["reduce" if size > 64 else "small"] += 2 * self.share * size
        elif name.startswith("c10d."):
            tensors = [tensor for part in args if isinstance(part, list) for tensor in part if isinstance(tensor, torch.Tensor)]
            self.bytes["small"] += sum(tensor.nbytes for tensor in tensors)
        return func(*args, **(kwargs or {}))


def main() -> None:
    folder, options = Path(sys.argv[1]), sys.argv[2:]
    world = start(0)
    tokenizer = load_tokenizer(folder / "teacher")
    found = {}
    for name, settings in {
        "distill, ZeRO-0": ["engine.zero_stage=0"],
        "distill, ZeRO-1": ["engine.zero_stage=1"],
        "distill, ZeRO-2": ["engine.zero_stage=2"],
        "distill, ZeRO-3": ["engine.zero_stage=3"],
        "distill, two passes": ["engine.zero_stage=1", "distill.micro_batch_size_per_gpu=1", f"distill.batch_size={2 * world.size}"],
        "transfer, vocabulary": [],
        "transfer, classes": ["transfer.objective=proxy", "transfer.scores=classes"],
    }.items():
        config = load_run(folder / "run.yaml", [*settings, *options], None)
        large = load_sharded(folder / "teacher", config.engine, "fp32", world)
        if name.startswith("distill"):
            corpus = build_corpus(config.corpus, tokenizer, folder / "corpus.npy", 0, world)
            if world.is_main and not (folder / "student").exists():
                (folder / "student").mkdir()
                write_student(folder / "student", folder / "teacher", (0, 3), tokenizer)
            world.barrier()
            engine = student_engine(load_whole(folder / "student", "fp32", world.device), config, config.student, "fp32", world)
            batches = Batches(corpus, None, ask_teacher(large), config.distill, world)

            def step(number: int, engine: Any = engine, batches: Any = batches) -> None:
                distill_step(engine, batches, number)

        else:
            task = PromptTask("{text} It was", (("bad",), ("good",)), 48, False, "good")
            texts = [text for text, _ in tiny.sentences(8, 3)]
            models = Models(load_whole(folder / "student", "fp32", world.device), large)
            section, words = config.transfer, (tokenizer, tokenizer)
            lesson = prepare_lesson(task, torch.randn(5, 32), config.public_task, (texts, []), models, section, words, world)
            prompt_nd = torch.randn(5, 32, requires_grad=True)

            def step(number: int, models: Any = models, lesson: Any = lesson, prompt_nd: torch.Tensor = prompt_nd) -> None:
                lesson_losses(models, [lesson], [prompt_nd], [[0, 1, 2, 3]], world.device)[0].backward()
                world.mean(prompt_nd.grad)

        step(0)
        step(1)
        with Wires(world.size) as wires:
            step(2)
        found[name] = wires.bytes
    if world.is_main:
        print(json.dumps(found))
    world.leave()


if __name__ == "__main__":
    main()
