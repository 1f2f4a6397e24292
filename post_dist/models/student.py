"""The student: some layers of the teacher, with its embeddings and head.

The weights are copied from file to file, so the teacher need not be in memory.

Shapes: B sequences, T tokens, V vocabulary.
"""

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion

from post_dist.config.schema import Student
from post_dist.conflicts import Conflict, raise_conflicts
from post_dist.errors import InputError
from post_dist.models.agreement import agree
from post_dist.models.cut import check_same_layers, cut_config
from post_dist.models.facts import meta_from_config, meta_model
from post_dist.models.families import layer_list_name
from post_dist.models.language_model import LanguageModel
from post_dist.models.load import check_has_weights, read_config
from post_dist.models.lower_block import count_layer_outputs, without_layers
from post_dist.models.model_checks import running
from post_dist.models.weight_units import WeightReader, weight_units
from post_dist.runtime.distributed import World
from post_dist.runtime.watchdog import phase

log = logging.getLogger(__name__)


def layer_conflicts(section: Student, num_teacher_layers: int) -> list[Conflict]:
    """Check that the teacher has the layers that `section` asks for.

    Args:
        section: the section `student` of the run file.
        num_teacher_layers: number of layers of the teacher.
    """
    wanted = _num_layers(section)
    highest = wanted - 1
    if isinstance(section.layers, tuple):
        highest = section.layers[-1]
    if max(wanted, highest + 1) > num_teacher_layers:
        return [
            Conflict(
                f"student.layers asks for {wanted} layers, up to number {highest}; "
                f"the teacher has layers 0 to {num_teacher_layers - 1}",
                "lower student.num_layers, or list other layers in student.layers",
            )
        ]
    if section.layers == "auto":
        # The measured choice of layers always keeps the frozen block.
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
    """Return the teacher's layers for `student.layers`, which must be a rule or a list, not `auto`.

    Raises:
        InputError: the teacher has too few layers, or the frozen ones are not its own first.
    """
    raise_conflicts("student", layer_conflicts(section, num_teacher_layers))
    return _named_layers(section, num_teacher_layers)


def stand_in_layers(section: Student, num_teacher_layers: int) -> tuple[int, ...]:
    """Return the layers of `listed_layers`; for `auto`, return evenly spaced layers.

    A student with these layers costs as much as the student that `auto` finds.

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
    """Apply the rule or list of `student.layers`, without checks."""
    if isinstance(section.layers, tuple):
        return section.layers
    wanted = _num_layers(section)
    if section.layers == "first_last":
        first = (wanted + 1) // 2
        first_of_last = num_teacher_layers - (wanted - first)
        return (*range(first), *range(first_of_last, num_teacher_layers))
    # `even`: the frozen block, then evenly spaced layers up to the teacher's last one.
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
    """Choose layers: remove each one in turn, and drop those whose removal costs least.

    The cost is KL(teacher || teacher without the layer) at the last position. A causal model
    predicts the next token there, and a masked model the last token itself.

    Args:
        teacher: the teacher, which may be sharded. All ranks must call this with equally many
            batches.
        batches: this rank's sequences of public text, each [B, T], with their weight in the mean.
        num_layers: number of layers to keep.
        frozen_lower_layers: number of first layers that are always kept.
        world: the ranks. All of them get the same mean.

    Returns:
        The layers to keep, ascending.
    """
    # Compute the whole teacher's predictions once for all layers.
    whole = [_last_log_probabilities(teacher, input_ids_BT) for input_ids_BT, _ in batches]
    # Call this before any layer is replaced, because it runs the first layer.
    num_outputs = count_layer_outputs(teacher)
    costs: dict[int, float] = {}
    for layer in range(frozen_lower_layers, len(teacher.layers)):
        weighted = []
        with without_layers(teacher, [layer], num_outputs=num_outputs):
            for (input_ids_BT, weight), whole_BV in zip(batches, whole, strict=True):
                cut_BV = _last_log_probabilities(teacher, input_ids_BT)
                kl = nn.functional.kl_div(cut_BV, whole_BV, reduction="batchmean", log_target=True)
                weighted.append(weight * kl)
        costs[layer] = float(world.mean(torch.stack(weighted).mean()))
        log.info("layer %d: removing it costs %.3f nats at the last position", layer, costs[layer])
    # Each cost is that of one layer. Two layers with the same function may both look cheap.
    num_dropped = len(teacher.layers) - num_layers
    cheapest_first = sorted(costs, key=lambda layer: costs[layer])
    dropped = set(cheapest_first[:num_dropped])
    return tuple(layer for layer in range(len(teacher.layers)) if layer not in dropped)


def check_cut(teacher: LanguageModel, student: LanguageModel, layers: Sequence[int]) -> None:
    """Check that an untrained student computes what its teacher does without the other layers.

    In some families, what a layer computes depends on its place among the layers. All ranks of a
    sharded teacher must call this together.

    Args:
        teacher: the teacher.
        student: the untrained student.
        layers: the teacher's layers that the student keeps.

    Raises:
        InputError: the hidden states differ.
    """
    # Any tokens will do, but the first few are often special tokens.
    input_ids = torch.arange(4, 12, device=teacher.model.device)[None]
    skipped = [layer for layer in range(len(teacher.layers)) if layer not in layers]
    with torch.no_grad(), running(teacher, "without some of its layers"):
        num_outputs = count_layer_outputs(teacher)
        with without_layers(teacher, skipped, num_outputs=num_outputs):
            expected = teacher(input_ids).float()
        ours = student(input_ids).float()
    if not agree(ours, expected):
        raise InputError(
            f"a layer of a {type(teacher.model).__name__} depends on its place among the layers, "
            f"so a student of the layers {list(layers)} is not its teacher without the others",
            "use a teacher of another family",
        )


def write_student(
    folder: Path, teacher_folder: Path, layers: tuple[int, ...], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Write the untrained student in Hugging Face format.

    Args:
        folder: folder to write to.
        teacher_folder: folder with the teacher's configuration and weights.
        layers: the teacher's layers to keep. The student's configuration lists them.
        tokenizer: the teacher's tokenizer.

    Raises:
        InputError: the list of layers of the teacher's family cannot be identified.
    """
    teacher = meta_model(teacher_folder)
    check_has_weights(teacher_folder)
    config = cut_config(read_config(teacher_folder), layers)
    student = meta_from_config(config)
    check_same_layers(teacher, student, layers)
    places = teacher.model.state_dict(keep_vars=True)
    tensors: dict[str, torch.Tensor] = {}
    # Read only the weights to keep, unit by unit, because the teacher may not fit in memory.
    with WeightReader(teacher_folder) as reader:
        for unit in weight_units(teacher.model, teacher_folder):
            if _name_in_student(unit.name, teacher, layers) is None:
                continue
            phase(f"reading the student's {unit.name}")
            for name, values in unit.whole(teacher.model, reader).items():
                kept = str(_name_in_student(name, teacher, layers))
                tensors[kept] = values.view(places[name].shape)
    phase("writing the untrained student")
    # The files have the names of the hub, as in `save_pretrained`.
    stored = revert_weight_conversion(student.model, tensors)
    for name, tensor in stored.items():
        stored[name] = tensor.contiguous()
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _name_in_student(name: str, teacher: LanguageModel, layers: tuple[int, ...]) -> str | None:
    """Return the student's name of a weight of the teacher; None if its layer is not kept."""
    prefix = f"{layer_list_name(teacher.model)}."
    if not name.startswith(prefix):
        return name
    number, rest = name.removeprefix(prefix).split(".", 1)
    if int(number) not in layers:
        return None
    return f"{prefix}{layers.index(int(number))}.{rest}"


def freeze(student: LanguageModel, section: Student) -> None:
    """Freeze the lower block of a student, and its embeddings and head if `section` says so.

    A parameter outside the layers counts as part of the head if only the head uses it. Otherwise it
    counts as part of the embeddings. `stages/distill/conflicts.py` refuses to freeze only one of
    two tied tables.
    """
    # Unfreeze everything first, so that the result does not depend on the state before.
    student.requires_grad_(True)
    for layer in student.layers[: section.frozen_lower_layers]:
        layer.requires_grad_(False)
    # Compare by identity, because tied parameters have two names.
    layer_ids = _identities(student.layers.parameters())
    head_ids = _identities(student.head_module.parameters())
    embedding_ids = _identities(student.model.get_input_embeddings().parameters())
    head_only_ids = head_ids - embedding_ids
    for parameter in student.parameters():
        if id(parameter) in layer_ids:
            continue
        is_head = id(parameter) in head_only_ids
        frozen = section.freeze_head if is_head else section.freeze_embeddings
        if frozen:
            parameter.requires_grad_(False)


def _identities(parameters: Iterable[nn.Parameter]) -> set[int]:
    return {id(parameter) for parameter in parameters}


@torch.no_grad()
def _last_log_probabilities(model: LanguageModel, input_ids_BT: torch.Tensor) -> torch.Tensor:
    """Return the log-probabilities [B, V] at the last position."""
    sequences, length = input_ids_BT.shape
    last_B = torch.full((sequences,), length - 1, device=input_ids_BT.device)
    return model(input_ids_BT, answer=last_B).float().log_softmax(dim=-1)
