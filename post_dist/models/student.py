"""The student: some layers of the teacher with its embeddings and head, copied from weight files.

The teacher need not be in memory for that.

Shapes: B sequences, T tokens, V vocabulary.
"""

import copy
import logging
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from post_dist.config.schema import Student
from post_dist.conflicts import Conflict, raise_conflicts
from post_dist.models.families import layer_kinds, layer_list_name
from post_dist.models.language_model import LanguageModel
from post_dist.models.load import is_masked, load_config
from post_dist.models.lower_block import Passage, layers_give_tuples
from post_dist.runtime.distributed import World
from post_dist.runtime.watchdog import phase

log = logging.getLogger(__name__)


def layer_conflicts(section: Student, num_teacher_layers: int) -> list[Conflict]:
    """Check that the teacher has the layers that `section` asks for.

    Args:
        section: the section `student` of the run file.
        num_teacher_layers: number of the teacher's layers.
    """
    wanted = _num_layers(section)
    highest = wanted - 1
    if isinstance(section.layers, tuple):
        highest = section.layers[-1]
    if max(wanted, highest + 1) > num_teacher_layers:
        return [
            Conflict(
                f"student.layers asks for {wanted} layers, up to layer {highest}; "
                f"the teacher has 0 to {num_teacher_layers - 1}",
                "lower student.num_layers, or list other layers in student.layers",
            )
        ]
    if section.layers == "auto":
        # The choice among measured layers always keeps the frozen block.
        return []
    layers = _named_layers(section, num_teacher_layers)
    if layers[: section.frozen_lower_layers] != tuple(range(section.frozen_lower_layers)):
        return [
            Conflict(
                f"student.frozen_lower_layers is {section.frozen_lower_layers}, "
                f"but the student's layers are {list(layers)}",
                "only the teacher's own first layers (0, 1, 2, ...) can be frozen: "
                "freeze fewer, or list them in student.layers",
            )
        ]
    return []


def listed_layers(section: Student, num_teacher_layers: int) -> tuple[int, ...]:
    """Return the teacher's layers that a rule or a list names; `layers: auto` names none.

    Raises:
        InputError: the teacher has too few layers, or the frozen ones are not its own first.
    """
    raise_conflicts("student", layer_conflicts(section, num_teacher_layers))
    return _named_layers(section, num_teacher_layers)


def stand_in_layers(section: Student, num_teacher_layers: int) -> tuple[int, ...]:
    """Return the layers of `listed_layers`, or for `auto` as many others.

    A student of these layers costs as much as the student of `auto`.

    Raises:
        InputError: the teacher has too few layers, or the frozen ones are not its own first.
    """
    if section.layers == "auto":
        section = section.model_copy(update={"layers": "even"})
    return listed_layers(section, num_teacher_layers)


def _num_layers(section: Student) -> int:
    if isinstance(section.layers, tuple):
        return len(section.layers)
    return int(section.num_layers or 0)


def _named_layers(section: Student, num_teacher_layers: int) -> tuple[int, ...]:
    """Apply the rule of `student.layers` without checks."""
    if isinstance(section.layers, tuple):
        return section.layers
    wanted = _num_layers(section)
    if section.layers == "first_last":
        first = (wanted + 1) // 2
        first_of_last = num_teacher_layers - (wanted - first)
        return (*range(first), *range(first_of_last, num_teacher_layers))
    # `even`: the frozen block, then layers at equal distances up to the teacher's last one.
    block = max(section.frozen_lower_layers, 1)
    distance = (num_teacher_layers - block) / max(wanted - block, 1)
    layers = list(range(block))
    for index in range(1, wanted - block + 1):
        layers.append(block - 1 + round(index * distance))
    return tuple(layers)


def least_harmful_layers(
    teacher: LanguageModel,
    batches: list[tuple[torch.Tensor, float]],
    num_layers: int,
    frozen_lower_layers: int,
    world: World,
) -> tuple[int, ...]:
    """Choose layers by removing each one in turn, and dropping those whose removal costs least.

    The cost is KL(teacher || teacher without the layer) at the last position. That is the next
    token of a causal model, or the last token itself in a masked model.

    Args:
        teacher: the teacher, perhaps sharded. All ranks call this with equally many batches.
        batches: this rank's sequences of public text, each [B, T], with their weight in the mean.
        num_layers: number of layers to keep.
        frozen_lower_layers: number of first layers to keep in any case.
        world: the ranks, which agree on the mean.

    Returns:
        The layers to keep, ascending.
    """
    # The teacher's own predictions, once for all layers.
    whole = [_last_log_probabilities(teacher, input_ids_BT) for input_ids_BT, _ in batches]
    # Before any layer is replaced: it runs the first layer as it is.
    in_tuple = layers_give_tuples(teacher)
    costs: dict[int, float] = {}
    for layer in range(frozen_lower_layers, len(teacher.layers)):
        weighted = []
        with _without_layer(teacher, layer, in_tuple=in_tuple):
            for (input_ids_BT, weight), whole_BV in zip(batches, whole, strict=True):
                cut_BV = _last_log_probabilities(teacher, input_ids_BT)
                kl = nn.functional.kl_div(cut_BV, whole_BV, reduction="batchmean", log_target=True)
                weighted.append(weight * kl)
        costs[layer] = float(world.mean(torch.stack(weighted).mean()))
        log.info("layer %d: removing it costs %.3f nats at the last position", layer, costs[layer])
    # The costs are of single layers: layers that replace each other may both look cheap.
    num_dropped = len(teacher.layers) - num_layers
    cheapest_first = sorted(costs, key=lambda layer: costs[layer])
    dropped = set(cheapest_first[:num_dropped])
    return tuple(layer for layer in range(len(teacher.layers)) if layer not in dropped)


def write_student(
    folder: Path, teacher_folder: Path, layers: tuple[int, ...], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Write the untrained student in Hugging Face format.

    Args:
        folder: where to write it.
        teacher_folder: the teacher's config and weights.
        layers: the teacher's layers to keep; the student's config names them.
        tokenizer: the teacher's tokenizer.

    Raises:
        InputError: the layers of the teacher's family cannot be told apart.
    """
    # Only the weights that are kept are read, file by file: the teacher may not fit in memory.
    config = load_config(teacher_folder)
    rename = _LayerRenamer(_layer_prefix(config), layers)
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(teacher_folder.glob("*.safetensors")):
        phase(f"reading the student's weights from {file.name}")
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():
                new_name = rename(name)
                if new_name is not None:
                    tensors[new_name] = weights.get_tensor(name)
    phase("writing the untrained student")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _cut_config(config, layers).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


class _LayerRenamer:
    """Renames weights from the teacher's layer numbers to the student's."""

    def __init__(self, prefix: str, layers: tuple[int, ...]) -> None:
        self._prefix = prefix
        self._layer_name = re.compile(rf"^(.*?){re.escape(prefix)}\.(\d+)\.(.*)$")
        self._new_numbers = {layer: index for index, layer in enumerate(layers)}

    def __call__(self, name: str) -> str | None:
        """Return the student's name of a weight, or None for a layer that is left out."""
        match = self._layer_name.match(name)
        if match is None:
            return name
        before, number, rest = match.groups()
        new_number = self._new_numbers.get(int(number))
        if new_number is None:
            return None
        return f"{before}{self._prefix}.{new_number}.{rest}"


def freeze(student: LanguageModel, section: Student) -> None:
    """Mark which parameters are trained: those above the frozen block, and what `section` adds.

    A parameter outside the layers counts as the head's if only the head uses it, else as one of
    the embeddings. `stages/distill/conflicts.py` refuses to freeze one of two that are tied.
    """
    # Everything is trained first, so that the result does not depend on what was frozen before.
    student.requires_grad_(True)
    for layer in student.layers[: section.frozen_lower_layers]:
        layer.requires_grad_(False)
    # By identity, because tied parameters have two names.
    of_layers = _identities(student.layers.parameters())
    of_head = _identities(student.head_module.parameters())
    of_embeddings = _identities(student.model.get_input_embeddings().parameters())
    only_of_head = of_head - of_embeddings
    for parameter in student.parameters():
        if id(parameter) in of_layers:
            continue
        is_head = id(parameter) in only_of_head
        frozen = section.freeze_head if is_head else section.freeze_embeddings
        if frozen:
            parameter.requires_grad_(False)


def _identities(parameters: Iterable[nn.Parameter]) -> set[int]:
    return {id(parameter) for parameter in parameters}


@contextmanager
def _without_layer(model: LanguageModel, layer: int, *, in_tuple: bool) -> Iterator[None]:
    """Skip a layer of the model while the context is entered."""
    removed = model.layers[layer]
    model.layers[layer] = Passage(in_tuple=in_tuple)
    try:
        yield
    finally:
        model.layers[layer] = removed


@torch.no_grad()
def _last_log_probabilities(model: LanguageModel, input_ids_BT: torch.Tensor) -> torch.Tensor:
    """Return the log-probabilities [B, V] at the last position."""
    sequences, length = input_ids_BT.shape
    last_B = torch.full((sequences,), length - 1, device=input_ids_BT.device)
    return model(input_ids_BT, answer=last_B).float().log_softmax(dim=-1)


def _layer_prefix(config: PretrainedConfig) -> str:
    """Return the name of the list of layers, without the trunk's prefix: some files omit that."""
    auto_class = AutoModelForMaskedLM if is_masked(config) else AutoModelForCausalLM
    with torch.device("meta"):
        model = auto_class.from_config(config)
    return layer_list_name(model).removeprefix(f"{model.base_model_prefix}.")


def _cut_config(config: PretrainedConfig, layers: tuple[int, ...]) -> PretrainedConfig:
    cut = copy.deepcopy(config)
    cut.num_hidden_layers = len(layers)
    cut.post_dist_layers = list(layers)
    # Families that mix kinds of attention name the kind of each layer.
    kinds = layer_kinds(config)
    if kinds:
        cut.layer_types = [kinds[layer] for layer in layers]
    return cut
