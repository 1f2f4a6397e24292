"""What is not in the product: ideas for a better prompt, each the change of one function, beside the same run without it.

    python benchmarks/variants.py average --seeds 0 1 2            the mean of the prompt over the second half of the transfer's steps
    python benchmarks/variants.py balanced --seeds 0 1 2           as many public texts of each class that the prompted student names
    python benchmarks/variants.py prefixes --seeds 0 1 2           distillation behind random soft prefixes, teacher and student alike
    python benchmarks/variants.py private-average --seeds 0 1 2    the mean of the private prompt over the second half of its steps
    python benchmarks/variants.py low-rank --seeds 0 1 2           a private prompt that moves in 32 random directions

All on the validation split; rows go where those of `utility.py` do, and `utility.py show` prints them. What they are to be compared with is
`option, ours` of `utility.py options` (for the prefixes, `option, ours - documents kept apart`) and `private, ours` of its part `private`.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import utility

if TYPE_CHECKING:
    import torch

PREFIX = 10
RANK = 32


@contextmanager
def replaced(owner: Any, name: str, value: object) -> Iterator[None]:
    """While entered, something has another value."""
    kept = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, kept)


class Mean:
    """Of parameters over the steps that it was shown from a step on."""

    def __init__(self, parameters: "Sequence[torch.Tensor]", first: int) -> None:
        self._parameters, self._first = parameters, first
        self._sums, self._count = [parameter.detach().clone().zero_() for parameter in parameters], 0

    def note(self, step: int) -> None:
        """Add what the parameters are before a step."""
        if step >= self._first:
            self._count += 1
            for total, parameter in zip(self._sums, self._parameters, strict=True):
                total += parameter.detach()

    def take(self, steps: int) -> None:
        """Put the mean in the parameters' place, the last values counted."""
        self.note(steps)
        for total, parameter in zip(self._sums, self._parameters, strict=True):
            parameter.data.copy_(total / self._count)


def average() -> Any:
    """Ours ends with the last step's prompt."""
    from post_dist.stages import transfer

    train = transfer.train_prompts

    @wraps(train)
    def trained(runs: Sequence[Any], losses_at: Callable[[int], Any], first_step: int, world: Any) -> None:
        means = [Mean(run.parameters, run.section.steps // 2) for run in runs]

        def noted(step: int) -> Any:
            for mean in means:
                mean.note(step)
            return losses_at(step)

        train(runs, noted, first_step, world)
        for mean, run in zip(means, runs, strict=True):
            mean.take(run.section.steps)

    return replaced(transfer, "train_prompts", trained)


def balanced() -> Any:
    """Ours takes the texts as they come; IMDb's are balanced by their authors' ratings, which is luck."""
    from post_dist.data.order import rows_of_like_length
    from post_dist.stages.lesson import Lesson

    def rows_at(lesson: Lesson, step: int, seed: int) -> list[int]:
        named = lesson.source_prompted.argmax(dim=1)
        pools = [(named == index).nonzero().flatten().tolist() for index in named.unique().tolist()]
        lengths = [[len(lesson.rows[row].token_ids) for row in pool] for pool in pools]
        each = lesson.section.batch_size // len(pools)
        return [pool[place] for pool, own in zip(pools, lengths, strict=True) for place in rows_of_like_length(step, each, own, seed)]

    return replaced(Lesson, "rows_at", rows_at)


@contextmanager
def prefixes() -> Iterator[None]:
    """The student is to agree with the teacher where a prompt is; the prefixes are embeddings of random tokens, new in each batch."""
    import torch

    from post_dist.losses import TeacherSignal
    from post_dist.stages import distill

    noted: list[torch.Tensor] = []
    inputs_of = distill._inputs

    def ask_teacher(teacher: Any, lower_layers: int) -> Any:
        def note(module: Any, given: Any, made: torch.Tensor) -> None:
            noted[:] = [made]

        teacher.layers[lower_layers - 1].register_forward_hook(note)

        @torch.no_grad()
        def ask(numbers: Sequence[int], input_ids: torch.Tensor, positions: torch.Tensor | None) -> TeacherSignal:
            generator = torch.Generator().manual_seed(numbers[0])
            tokens = torch.randint(teacher.vocabulary_size, (PREFIX,), generator=generator).to(input_ids.device)
            hidden = teacher(input_ids, prompt=teacher.embed(tokens))
            return TeacherSignal(hidden=hidden, below=noted[0])

        return ask

    def inputs(*given: Any) -> Any:
        input_ids, labels, _ = inputs_of(*given)
        return input_ids, torch.cat([labels.new_full((len(labels), PREFIX), -100), labels], dim=1), None

    with replaced(distill, "ask_teacher", ask_teacher), replaced(distill, "_inputs", inputs):
        yield


def private_average() -> Any:
    """The noise of many steps is in the last one's prompt; their mean has less of it, and costs no epsilon."""
    from post_dist.stages import private_tuning

    train = private_tuning.train_privately

    @wraps(train)
    def trained(parameters: Any, gradients_of: Any, optimizer: Any, rate_at: Any, run: Any, checkpoints: Path, **options: Any) -> None:
        mean = Mean(parameters, run.plan.steps // 2)

        def noting(step: int) -> float:
            mean.note(step)
            return float(rate_at(step))

        train(parameters, gradients_of, optimizer, noting, run, checkpoints, **options)
        mean.take(run.plan.steps)

    return replaced(private_tuning, "train_privately", trained)


def low_rank() -> Any:
    """Noise has a norm that grows with the root of how many numbers are tuned."""
    import torch

    from post_dist.stages import private_tuning

    train = private_tuning.train_privately

    @wraps(train)
    def trained(parameters: Any, gradients_of: Any, optimizer: Any, rate_at: Any, run: Any, checkpoints: Path, **options: Any) -> None:
        prompt_nd, *biases = parameters
        start_nd, width = prompt_nd.detach().clone(), prompt_nd.shape[1]
        basis_rd = torch.linalg.qr(torch.randn(width, RANK, generator=torch.Generator().manual_seed(0)))[0].T.to(prompt_nd.device)
        moves_nr = prompt_nd.new_zeros(len(prompt_nd), RANK)
        prompt_nd.requires_grad_(True)
        groups = [dict(group) for group in optimizer.param_groups]
        groups[0] |= {"params": [moves_nr], "lr": groups[0]["lr"] * (width / RANK) ** 0.5}
        for group, bias in zip(groups[1:], biases, strict=True):
            group["params"] = [bias]

        def set_prompt() -> None:
            prompt_nd.data.copy_(start_nd + moves_nr.detach() @ basis_rd)

        def of_moves(rows: list[int]) -> Iterator[list[torch.Tensor]]:
            set_prompt()
            for first, *others in gradients_of(rows):
                yield [first @ basis_rd.T, *others]

        train([moves_nr, *biases], of_moves, torch.optim.Adam(groups), rate_at, run, checkpoints, **options)
        set_prompt()

    return replaced(private_tuning, "train_privately", trained)


ON_TARGET: dict[str, Any] = {"average": average, "balanced": balanced, "prefixes": prefixes}
PRIVATE: dict[str, Any] = {"private-average": private_average, "low-rank": low_rank}


def main() -> None:
    """Measure what is asked for and not there yet."""
    chosen = utility.asked_for(str(__doc__), [*ON_TARGET, *PRIVATE])
    from laboratory import Laboratory

    plain = Laboratory(chosen.demo / "demo.yaml", chosen.output)
    # A changed function leaves a run's signature as it is, so its runs stand in a folder of their own.
    changed = Laboratory(chosen.demo / "demo.yaml", chosen.output / chosen.part)
    for seed in chosen.seeds:
        for epsilon in utility.PRIVATE_EPSILONS if chosen.part in PRIVATE else (None,):
            ours = utility.jobs("options" if epsilon is None else "private", seed)
            settings = ours["option, ours" if epsilon is None else f"private, ours, epsilon {epsilon}"]
            name = f"variant, {chosen.part}{'' if epsilon is None else f', epsilon {epsilon}'}, seed {seed}"
            if name in utility.read_results(chosen.results):
                continue
            start, settings = time.monotonic(), settings + chosen.set
            if chosen.part == "prefixes":
                settings = given = [*settings, "corpus.separate_documents=false"]
            else:
                given = [*settings, *plain.made(settings, with_prompt=epsilon is None)]
            with (ON_TARGET | PRIVATE)[chosen.part]():
                rows = changed.table(given) if epsilon is None else changed.student(given, epsilon)
            utility.add_result(chosen.results, name, plain.device, start, settings, rows)


if __name__ == "__main__":
    main()
