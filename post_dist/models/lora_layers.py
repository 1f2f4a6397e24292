"""The linear layers of a model that a LoRA changes."""

from collections.abc import Sequence

from torch import nn

from post_dist.artifacts.lora import Lora, Shapes
from post_dist.config.stages import LoraSettings
from post_dist.conflicts import Conflict
from post_dist.models import families
from post_dist.models.language_model import LanguageModel


def layer_linears(model: LanguageModel) -> list[Shapes]:
    """Return outputs and inputs of the linear modules of each layer, by name in the model."""
    prefix = families.layer_list_name(model.model)
    found: list[Shapes] = []
    for number, layer in enumerate(model.layers):
        shapes = {}
        for name, module in layer.named_modules():
            # A subclass may compute something else, such as a product of quantized weights.
            if type(module) is nn.Linear:
                shapes[f"{prefix}.{number}.{name}"] = (module.out_features, module.in_features)
        found.append(shapes)
    return found


def chosen_shapes(layers: Sequence[Shapes], settings: LoraSettings) -> Shapes:
    """Return the linear modules that a LoRA changes, with their outputs and inputs.

    Args:
        layers: the linear modules of each layer of the model.
        settings: which of them to change.
    """
    # Without a number of upper layers, all of them are chosen.
    upper = layers[-(settings.upper_layers or len(layers)) :]
    chosen = {}
    for layer in upper:
        for name, shape in layer.items():
            # PEFT compares whole parts of a name too.
            if any(name.endswith(f".{target}") for target in settings.target_modules):
                chosen[name] = shape
    return chosen


def untrained_lora(model: LanguageModel, settings: LoraSettings, seed: int) -> Lora:
    """Return a LoRA that changes nothing yet.

    Args:
        model: the model, whole or in ZeRO-3 shards.
        settings: its layers and rank.
        seed: seed of the first factors.
    """
    return Lora.untrained(chosen_shapes(layer_linears(model), settings), settings, seed)


def lora_conflicts(
    section: str, settings: LoraSettings, layers: Sequence[Shapes], family: str
) -> list[Conflict]:
    """List the target modules that a model lacks, and more upper layers than it has.

    Args:
        section: the section of the run file that holds the settings, for messages.
        settings: the settings.
        layers: the linear modules of each layer of the model.
        family: name of the model's family.
    """
    found = []
    if settings.upper_layers is not None and settings.upper_layers > len(layers):
        found.append(
            Conflict(
                f"{section}.lora.upper_layers is {settings.upper_layers}, and the model has "
                f"{len(layers)} layers",
                "lower it",
            )
        )
    for target in settings.target_modules:
        alone = settings.model_copy(update={"target_modules": (target,)})
        if not chosen_shapes(layers, alone):
            names = {name.rsplit(".", 1)[1] for layer in layers for name in layer}
            hint = f"choose from {', '.join(sorted(names))}" if names else "choose another model"
            found.append(
                Conflict(
                    f"{section}.lora.target_modules has {target}, which is not a linear module in "
                    f"the layers of {family}",
                    hint,
                )
            )
    return found


def lowest_layer(model: LanguageModel, lora: Lora) -> int:
    """Return the number of the lowest layer that a LoRA changes, counted from 0."""
    for number, shapes in enumerate(layer_linears(model)):
        if not shapes.keys().isdisjoint(lora.layers):
            return number
    return 0
