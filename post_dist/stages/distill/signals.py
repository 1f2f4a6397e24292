"""What the teacher says of the corpus: asked in every step, or once, and read from files from then on.

What is kept stands under the number of its sequence, so it depends on no batch size, rank or epoch, and another student of the same
teacher reads it too. A file holds a few sequences, is written by one rank, and gets its name when it is whole.

Shapes: B sequences, T tokens, d width, S samples, N = B T.
"""

import logging
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

from post_dist.config.schema import Distill, Student
from post_dist.data.corpus import Corpus
from post_dist.data.order import rank_batches
from post_dist.errors import InputError
from post_dist.files import digest_of, file_digest, write_file
from post_dist.losses.distillation import TeacherSignal, condensed, sampled
from post_dist.models.facts import facts_of
from post_dist.models.language_model import LanguageModel
from post_dist.models.lower_block import forward_with_below
from post_dist.runtime.distributed import World
from post_dist.runtime.progress import progress
from post_dist.runtime.stop import stop_requested, stopped
from post_dist.runtime.watchdog import phase
from post_dist.runtime.zero import gathered
from post_dist.stages.distill.signal_format import SAMPLES, exact_product, kept_names

log = logging.getLogger(__name__)

Signals = Callable[[Sequence[int], torch.Tensor, torch.Tensor | None], TeacherSignal]
"""From the numbers of sequences, their tokens and positions [B, T] to what the teacher says, each tensor [B, T, ...]."""

_SEQUENCES_A_FILE = 64


def ask_teacher(teacher: LanguageModel, lower_layers: int) -> Signals:
    """Run the teacher whenever it is asked; the student has its lowest layers, and need not run them again."""

    def ask(
        numbers: Sequence[int], input_ids: torch.Tensor, positions: torch.Tensor | None
    ) -> TeacherSignal:
        with torch.no_grad():
            hidden, below = forward_with_below(teacher, lower_layers, input_ids, positions)
        return TeacherSignal(hidden=hidden, below=below)

    return ask


def cache_teacher(
    folder: Path,
    teacher: LanguageModel,
    teacher_digest: str,
    corpus: Corpus,
    section: Distill,
    student: Student,
    *,
    seed: int,
    world: World,
) -> Signals:
    """Run the teacher over all sequences that the steps will read and no file holds yet; then read the files.

    Args:
        folder: where folders of files stand, one for each teacher, corpus and kind of signal.
        teacher: in shards; all ranks run it equally often.
        teacher_digest: of its files.
        corpus: the sequences.
        section: kind of signal, steps, batch size and temperature.
        student: what it shares with the teacher.
        seed: of the draws.
        world: the ranks.

    Raises:
        InputError: the teacher fills in masks, and so reads other tokens each time; or samples are to serve the cosine term.
        Interrupted: a rank was asked to stop; what is written stays.
    """
    maker = _Maker(teacher, section, student, seed)
    corpus_digest = world.on_main(partial(file_digest, corpus.path))
    signature = digest_of(
        {
            "teacher": teacher_digest,
            "corpus": corpus_digest,
            "apart": corpus.keeps_apart,
            **maker.facts,
        }
    )
    place = folder / f"teacher-signals-{signature[:8]}"
    known = world.on_main(
        partial(_index, place)
    )  # another run may be adding files, and all ranks must go by the same
    missing = [
        number
        for number in corpus.numbers_of_first(section.steps * section.batch_size)
        if number not in known
    ]
    if missing:
        log.info(
            "teacher signals: %d sequences to run, %d are in %s", len(missing), len(known), place
        )
        own = rank_batches(missing, section.micro_batch_size_per_gpu, world.rank, world.size)
        a_file = -(-_SEQUENCES_A_FILE // section.micro_batch_size_per_gpu)
        with progress("teacher signals", len(own), show=world.is_main) as advance:
            for start in range(0, len(own), a_file):
                # Ranks that have run out run along: a sharded teacher needs them.
                parts = [
                    (share.counted, _make(maker, share.rows, corpus, world))
                    for share in own[start : start + a_file]
                ]
                counted = [part for part in parts if part[0]]
                numbers = [
                    number
                    for share in own[start : start + a_file]
                    for number in share.rows[: share.counted]
                ]
                world.together(partial(_write, place, numbers, [made for _, made in counted]))
                for _ in parts:
                    advance("")
                if stop_requested(world):
                    raise stopped("what the teacher has said so far is kept")
        known = world.on_main(partial(_index, place))
    return _reader(known, maker.names, world.device)


class _Maker:
    """Makes from hidden states what is kept of them."""

    def __init__(
        self, teacher: LanguageModel, section: Distill, student: Student, seed: int
    ) -> None:
        self.teacher, self._section, self._seed = teacher, section, seed
        self._lower_layers = section.layers_in_teacher(student)
        exact = exact_product(facts_of(teacher), fp32=teacher.model.dtype == torch.float32)
        self.names = kept_names(section, student, exact_product=exact)
        if "entropy" in self.names:
            if not isinstance(teacher.head_module, nn.Linear):
                raise InputError(
                    "distill.cache: sampled needs a head that is one matrix",
                    "take distill.cache: hidden",
                )
            # Whole on each rank: gathered as it is used, ranks that use it unequally often would wait for each other for ever.
            with gathered(teacher.head_module), torch.no_grad():
                self._weight = teacher.head_module.weight.clone()
                self._bias = (
                    None if teacher.head_module.bias is None else teacher.head_module.bias.clone()
                )

    @property
    def facts(self) -> dict[str, Any]:
        """What the signal depends on, beside teacher and corpus."""
        softened = {"temperature": self._section.temperature} if "entropy" in self.names else {}
        drawn = {"seed": self._seed, "samples": SAMPLES} if "samples" in self.names else {}
        below = {"lower_layers": self._lower_layers} if self._lower_layers else {}
        return {
            "names": self.names,
            "dtype": str(self.teacher.model.dtype),
            **softened,
            **drawn,
            **below,
        }

    @torch.no_grad()
    def __call__(
        self, numbers: Sequence[int], input_ids: torch.Tensor, positions: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        """By name [B, T, ...], on the CPU."""
        hidden_BTd, below_BTd = forward_with_below(
            self.teacher, self._lower_layers, input_ids, positions
        )
        hidden_Nd, temperature = hidden_BTd.flatten(0, 1), self._section.temperature
        signal = TeacherSignal()
        if "product" in self.names:
            signal = condensed(hidden_Nd, self._head, temperature, self._weight)
        elif "samples" in self.names:
            uniform_BT = torch.stack(
                [self._uniform(number, input_ids.shape[1]) for number in numbers]
            ).to(hidden_Nd.device)
            signal = sampled(
                hidden_Nd, self._head, len(self._weight), temperature, uniform_BT.flatten(), SAMPLES
            )
        made = {
            "hidden": hidden_Nd,
            "product": signal.product,
            "samples": signal.samples,
            "entropy": signal.entropy,
        }
        made["below"] = None if below_BTd is None else below_BTd.flatten(0, 1)
        kept = {
            name: tensor.unflatten(0, input_ids.shape).cpu()
            for name, tensor in made.items()
            if name in self.names and tensor is not None
        }
        return {
            name: tensor.int() if name == "samples" else tensor for name, tensor in kept.items()
        }

    def _head(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.teacher.capped(functional.linear(hidden, self._weight, self._bias))

    def _uniform(self, number: int, length: int) -> torch.Tensor:
        return torch.rand(
            length, generator=torch.Generator().manual_seed(self._seed * 1_000_003 + number)
        )


def _make(
    maker: _Maker, numbers: list[int], corpus: Corpus, world: World
) -> dict[str, torch.Tensor]:
    phase(f"teacher signals: sequence {numbers[0]}")
    input_ids = corpus.sequences(numbers).to(world.device)
    return maker(numbers, input_ids, corpus.positions(input_ids))


def _write(place: Path, numbers: list[int], parts: list[dict[str, torch.Tensor]]) -> None:
    """Keep what a rank has made; under a name that no other run gives, for two may fill one folder."""
    if not numbers:
        return
    tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]} | {
        "numbers": torch.tensor(numbers)
    }
    write_file(
        place / f"{numbers[0]:010d}-{uuid4().hex[:8]}.safetensors",
        lambda partial: save_file(tensors, partial),
    )


def _index(place: Path) -> dict[int, tuple[Path, int]]:
    """Where each sequence's signal stands: the file, and the place in it."""
    found: dict[int, tuple[Path, int]] = {}
    for file in sorted(place.glob("[0-9]*.safetensors")):
        try:
            with safe_open(file, framework="pt") as tensors:
                found |= {
                    number: (file, index)
                    for index, number in enumerate(tensors.get_tensor("numbers").tolist())
                }
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"{file} cannot be read: {error}", "remove it; the teacher then runs for it again"
            ) from None
    return found


def _reader(
    known: dict[int, tuple[Path, int]], names: Sequence[str], device: torch.device
) -> Signals:
    opened = lru_cache(maxsize=256)(lambda file: safe_open(file, framework="pt"))

    def read(
        numbers: Sequence[int], input_ids: torch.Tensor, positions: torch.Tensor | None
    ) -> TeacherSignal:
        places = [known[number] for number in numbers]
        signal = {
            name: torch.cat(
                [opened(file).get_slice(name)[index : index + 1] for file, index in places]
            ).to(device)
            for name in names
        }
        if "samples" in signal:
            signal["samples"] = signal["samples"].long()
        return TeacherSignal(**signal)

    return read
