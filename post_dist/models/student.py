"""The student: chosen layers of the teacher with its embeddings and head, copied from the weight files.

The teacher is never loaded for it. Shapes: B rows, T tokens, V vocabulary.
"""

import copy
import logging
import re
from collections.abc import Iterator
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
from post_dist.errors import InputError
from post_dist.models.families import layer_list_name
from post_dist.models.language_model import LanguageModel
from post_dist.models.load import is_masked, load_config
from post_dist.models.lower_block import Passage, layers_give_tuples
from post_dist.runtime.distributed import World
from post_dist.runtime.watchdog import phase

log = logging.getLogger(__name__)


def listed_layers(section: Student, num_teacher_layers: int) -> tuple[int, ...]:
    """The teacher's layers that a rule or a list names; not for `auto`.

    Raises:
        InputError: the teacher has too few layers, or the frozen ones are not its own first.
    """
    layers = _listed_layers(section, num_teacher_layers)
    if layers[: section.frozen_lower_layers] != tuple(range(section.frozen_lower_layers)):
        raise InputError(
            f"student.frozen_lower_layers is {section.frozen_lower_layers}, and the student's layers are {list(layers)}",
            "frozen are the teacher's own first layers (0, 1, 2, ...); freeze fewer, or name them in student.layers",
        )
    return layers


def _listed_layers(section: Student, num_teacher_layers: int) -> tuple[int, ...]:
    wanted = (
        len(section.layers) if isinstance(section.layers, tuple) else int(section.num_layers or 0)
    )
    highest = section.layers[-1] if isinstance(section.layers, tuple) else wanted - 1
    if max(wanted, highest + 1) > num_teacher_layers:
        raise InputError(
            f"student.layers asks for {wanted} layers up to number {highest}; the teacher has 0 to {num_teacher_layers - 1}"
        )
    if isinstance(section.layers, tuple):
        return section.layers
    if section.layers == "first_last":
        first = (wanted + 1) // 2
        return (*range(first), *range(num_teacher_layers - (wanted - first), num_teacher_layers))
    block = max(section.frozen_lower_layers, 1)
    apart = (num_teacher_layers - block) / max(wanted - block, 1)
    return (
        *range(block),
        *(block - 1 + round(index * apart) for index in range(1, wanted - block + 1)),
    )


def stand_in_layers(section: Student, num_teacher_layers: int) -> tuple[int, ...]:
    """The layers that a rule or a list names, or for `auto` as many others: a student that costs the same."""
    return listed_layers(
        section if section.layers != "auto" else section.model_copy(update={"layers": "even"}),
        num_teacher_layers,
    )


def least_harmful_layers(
    teacher: LanguageModel,
    batches: list[tuple[torch.Tensor, float]],
    num_layers: int,
    frozen_lower_layers: int,
    world: World,
) -> tuple[int, ...]:
    """The layers that are left when those are dropped whose removal, one at a time, hurts the last position least.

    Hurt is KL(teacher || teacher without the layer) of the next token, or of the last token's own place in a masked model.

    Args:
        teacher: may be sharded; all ranks call this with equally many batches.
        batches: this rank's rows of public text, each [B, T], with the weight of their mean.
        num_layers: how many layers to leave.
        frozen_lower_layers: how many of the first layers are left whatever it costs.
        world: the ranks, which agree on the mean.
    """
    whole = [_last_log_probabilities(teacher, rows) for rows, _ in batches]
    in_tuple = layers_give_tuples(teacher)
    hurt: dict[int, float] = {}
    for index in range(frozen_lower_layers, len(teacher.layers)):
        with _without_layer(teacher, index, in_tuple=in_tuple):
            without = [_last_log_probabilities(teacher, rows) for rows, _ in batches]
        divergences = [
            weight * nn.functional.kl_div(bare, full, reduction="batchmean", log_target=True)
            for bare, full, (_, weight) in zip(without, whole, batches, strict=True)
        ]
        hurt[index] = float(world.mean(torch.stack(divergences).mean()))
        log.info("without layer %d the last position is off by %.3f nats", index, hurt[index])
    dropped = sorted(hurt, key=hurt.__getitem__)[: len(teacher.layers) - num_layers]
    return tuple(index for index in range(len(teacher.layers)) if index not in dropped)


def write_student(
    folder: Path, teacher_folder: Path, layers: tuple[int, ...], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Write the untrained student into `folder`, in Hugging Face format; its config names the layers that were kept.

    Raises:
        InputError: the teacher's family cannot be cut by layers.
    """
    config = load_config(teacher_folder)
    prefix = _layer_prefix(config)
    layer_key = re.compile(rf"^(.*?){re.escape(prefix)}\.(\d+)\.(.*)$")
    place = {layer: index for index, layer in enumerate(layers)}
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(teacher_folder.glob("*.safetensors")):
        phase(f"reading the student's weights from {file.name}")
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():
                match = layer_key.match(name)
                if match is None:
                    tensors[name] = weights.get_tensor(name)
                elif int(match[2]) in place:
                    tensors[f"{match[1]}{prefix}.{place[int(match[2])]}.{match[3]}"] = (
                        weights.get_tensor(name)
                    )
    phase("writing the untrained student")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _cut_config(config, layers).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def freeze(student: LanguageModel, section: Student) -> None:
    """Mark what of the student is trained: the layers above the frozen block, and what the run file adds.

    Raises:
        InputError: embeddings and head are one tensor in this model, and only one of them is to be frozen.
    """
    student.requires_grad_(True)
    for layer in student.layers[: section.frozen_lower_layers]:
        layer.requires_grad_(False)
    inside = {id(parameter) for parameter in student.layers.parameters()}
    head = {id(parameter) for parameter in student.head_module.parameters()}
    input_embeddings = {
        id(parameter) for parameter in student.model.get_input_embeddings().parameters()
    }
    if head & input_embeddings and section.freeze_embeddings != section.freeze_head:
        raise InputError(
            "this model's embeddings and head are one tensor",
            "set freeze_embeddings and freeze_head alike",
        )
    for parameter in student.parameters():
        is_head = id(parameter) in head and id(parameter) not in input_embeddings
        if id(parameter) not in inside and (
            section.freeze_head if is_head else section.freeze_embeddings
        ):
            parameter.requires_grad_(False)


@contextmanager
def _without_layer(language_model: LanguageModel, index: int, *, in_tuple: bool) -> Iterator[None]:
    layers = language_model.layers
    layer = layers[index]
    layers[index] = Passage(in_tuple=in_tuple)
    try:
        yield
    finally:
        layers[index] = layer


@torch.no_grad()
def _last_log_probabilities(language_model: LanguageModel, input_ids: torch.Tensor) -> torch.Tensor:
    last = torch.full((len(input_ids),), input_ids.shape[1] - 1, device=input_ids.device)
    return language_model(input_ids, answer=last).float().log_softmax(dim=-1)


def _layer_prefix(config: PretrainedConfig) -> str:
    """How the layers' weights are named, without the trunk's own prefix: some checkpoints leave that out."""
    auto_class = AutoModelForMaskedLM if is_masked(config) else AutoModelForCausalLM
    with torch.device("meta"):
        model = auto_class.from_config(config)
    return layer_list_name(model).removeprefix(f"{model.base_model_prefix}.")


def _cut_config(config: PretrainedConfig, layers: tuple[int, ...]) -> PretrainedConfig:
    if getattr(config, "scale_attn_by_inverse_layer_idx", False):
        raise InputError(
            "this model scales attention by the layer's number, which changes when layers are left out"
        )
    cut = copy.deepcopy(config)
    cut.num_hidden_layers = len(layers)
    cut.post_dist_layers = list(layers)
    kinds = getattr(config, "layer_types", None)
    if kinds:
        cut.layer_types = [kinds[layer] for layer in layers]
    return cut
