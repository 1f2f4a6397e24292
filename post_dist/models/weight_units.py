"""Find which weights of a model's files become which weights of the model, without reading them.

transformers renames, fuses and splits stored weights while it loads a model. For example, the files
of a mixture of experts hold each expert by itself, and the model holds all experts of a layer in
one tensor. The weights that are converted together are a unit. Units are converted one at a time,
so that a model is loaded in bounded memory.
"""

import re
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    ConversionOps,
    Interleave,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.quantizers.base import HfQuantizer

from post_dist.errors import InputError, first_line
from post_dist.models.load import check_none_missing
from post_dist.models.quantized import dequantizer
from post_dist.models.weight_files import weight_files

Transform = WeightRenaming | WeightConverter
"""A conversion of transformers: a new name, or operations on tensors."""


_QUANTIZED_DTYPES = {
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "U8": torch.uint8,
    "I8": torch.int8,
}
"""Formats of stored weights, by their name in a safetensors header."""


@dataclass(frozen=True)
class StoredWeight:
    """Name and header of a weight in a safetensors file.

    Attributes:
        file: the file.
        name: name of the weight in the file.
        shape: its shape.
        dtype: its format if it is quantized. All other formats count as fp32.
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Piece:
    """Consecutive elements of a weight of the model.

    Attributes:
        target: name of the weight in the model.
        first: index of the first element, in the flattened weight.
        values: the elements.
    """

    target: str
    first: int
    values: torch.Tensor


@dataclass(frozen=True)
class WeightUnit:
    """Stored weights that are converted together.

    Attributes:
        name: name of the first weight of the model that they become.
        sources: the stored weights of each source pattern of `transform`.
        transform: the conversion of transformers, without tensors.
        targets: names of all weights of the model that they become.
    """

    name: str
    sources: dict[str, list[StoredWeight]]
    transform: Transform
    targets: tuple[str, ...]

    def pieces(self, model: PreTrainedModel, reader: "WeightReader") -> Iterator[Piece]:
        """Read and convert the unit, one expert at a time where the conversion stacks experts.

        Args:
            model: the model on the meta device. Some conversions read its shapes.
            reader: reads the stored weights.

        Raises:
            InputError: a file is broken.
        """
        for index in range(self._num_slices()):
            sources = self.sources
            if self._num_slices() > 1:
                sources = {pattern: [group[index]] for pattern, group in sources.items()}
            tensors = {}
            for pattern, group in sources.items():
                tensors[pattern] = [reader.read(stored) for stored in group]
            converted = _converted(self.transform, self.name, tensors, model)
            # The unconverted weights of large units must not outlive their conversion.
            del tensors
            for target, values in converted.items():
                yield Piece(target, index * values.numel(), values)

    def whole(self, model: PreTrainedModel, reader: "WeightReader") -> dict[str, torch.Tensor]:
        """Read and convert the unit, and join its pieces to flat weights.

        Args:
            model: the model on the meta device.
            reader: reads the stored weights.

        Raises:
            InputError: a file is broken.
        """
        parts: dict[str, list[torch.Tensor]] = {target: [] for target in self.targets}
        for piece in self.pieces(model, reader):
            parts[piece.target].append(piece.values.reshape(-1))
        joined = {}
        for target, values in parts.items():
            joined[target] = values[0] if len(values) == 1 else torch.cat(values)
        return joined

    def _num_slices(self) -> int:
        """Return the number of slices along the first dimension that convert independently."""
        if not isinstance(self.transform, WeightConverter):
            return 1
        # Dequantization works on each weight by itself.
        operations = [
            operation
            for operation in self.transform.operations
            if not isinstance(operation, Fp8Dequantize)
        ]
        if not operations:
            return 1
        first, *others = operations
        if not isinstance(first, MergeModulelist) or first.dim != 0:
            return 1
        if not all(map(_keeps_first_dimension, others)):
            return 1
        counts = {len(group) for group in self.sources.values()}
        return counts.pop() if len(counts) == 1 else 1


class WeightReader:
    """Reads weights from the files of one folder. Each file is opened once and mapped to memory."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[Path, Any] = {}
        self._open = ExitStack()

    def __enter__(self) -> "WeightReader":
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def read(self, stored: StoredWeight) -> torch.Tensor:
        """Read one weight.

        Raises:
            InputError: the file is broken.
        """
        with _reading(self._folder):
            if stored.file not in self._files:
                opened = safe_open(stored.file, framework="pt")
                self._files[stored.file] = self._open.enter_context(opened)
            tensor: torch.Tensor = self._files[stored.file].get_tensor(stored.name)
        return tensor


def weight_units(model: PreTrainedModel, folder: Path) -> list[WeightUnit]:
    """Return the units of a model's files, in the order of their names.

    Only headers are read. Stored weights that the model does not have are left out.

    Args:
        model: the model on the meta device.
        folder: folder of its safetensors files.

    Raises:
        InputError: weights are missing, have another shape than the model's, or cannot be
            converted.
    """
    stored = _stored_weights(folder)
    places: dict[str, torch.Tensor] = model.state_dict(keep_vars=True)
    quantizer = dequantizer(folder, model.config)
    units = []
    for name, (transform, sources) in _group(model, places, quantizer, stored).items():
        shapes = _converted_shapes(folder, model, name, transform, sources)
        _check_shapes(folder, sources, shapes, places)
        units.append(WeightUnit(name, sources, transform, tuple(shapes)))
    check_none_missing(folder, _missing(model, places, units))
    return units


def _stored_weights(folder: Path) -> list[StoredWeight]:
    """Read the headers of all weight files. Sort them as transformers does, expert by expert."""
    stored = []
    for file in weight_files(folder):
        with _reading(folder), safe_open(file, framework="pt") as weights:
            for name in weights.keys():
                header = weights.get_slice(name)
                dtype = _QUANTIZED_DTYPES.get(header.get_dtype(), torch.float32)
                stored.append(StoredWeight(file, name, tuple(header.get_shape()), dtype))
    return sorted(stored, key=lambda weight: dot_natural_key(weight.name))


def _group(
    model: PreTrainedModel,
    places: dict[str, torch.Tensor],
    quantizer: HfQuantizer | None,
    stored: Iterable[StoredWeight],
) -> dict[str, tuple[Transform, dict[str, list[StoredWeight]]]]:
    """Group stored weights by the first weight of the model that they become."""
    conversions = get_model_conversion_mapping(model, hf_quantizer=quantizer)
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    of_pattern = {}
    for converter in converters:
        for pattern in converter.source_patterns:
            of_pattern[pattern] = converter

    units: dict[str, tuple[Transform, dict[str, list[StoredWeight]]]] = {}
    tied = model.all_tied_weights_keys
    prefix = model.base_model_prefix
    for weight in stored:
        name, pattern = rename_source_key(weight.name, renamings, converters, prefix, places)
        if name not in places and weight.name in places:
            # The files have the model's own names already.
            name, pattern = weight.name, None
        # Skip weights of other heads, and second names of tied weights.
        if name not in places or tied.get(name) in units:
            continue
        if pattern is None:
            units[name] = (WeightRenaming(weight.name, name), {weight.name: [weight]})
            continue
        _, sources = units.setdefault(name, (deepcopy(of_pattern[pattern]), {}))
        sources.setdefault(pattern, []).append(weight)
    return units


def _converted(
    transform: Transform,
    name: str,
    tensors: dict[str, list[torch.Tensor]],
    model: PreTrainedModel,
) -> dict[str, torch.Tensor]:
    """Convert stored weights to weights of the model, by its names.

    Args:
        transform: the conversion.
        name: name of the first weight of the model that the result holds.
        tensors: the stored weights of each source pattern.
        model: the model on the meta device.
    """
    # A conversion of transformers keeps what it was given, so each unit takes a fresh one.
    fresh = deepcopy(transform)
    for pattern, group in tensors.items():
        # pyrefly: ignore[unsupported-operation] - tensors are taken too, as in saving
        fresh.collected_tensors[pattern] = group
    converted = {}
    for target, values in fresh.convert(name, model=model, config=model.config).items():
        converted[target] = values[0] if isinstance(values, list) else values
    return converted


def _converted_shapes(
    folder: Path,
    model: PreTrainedModel,
    name: str,
    transform: Transform,
    sources: dict[str, list[StoredWeight]],
) -> dict[str, tuple[int, ...]]:
    """Convert on the meta device, so that all ranks find the same mistakes without reading."""
    tensors = {}
    for pattern, group in sources.items():
        tensors[pattern] = [
            torch.empty(stored.shape, dtype=stored.dtype, device="meta") for stored in group
        ]
    try:
        converted = _converted(transform, name, tensors, model)
    except (RuntimeError, ValueError, KeyError, IndexError, AttributeError) as error:
        first = _first_source(sources)
        raise InputError(
            f"{folder}: {first.name} cannot be converted for {name}: {first_line(error)}",
            "get the model again; its files do not belong together",
        ) from None
    return {target: tuple(values.shape) for target, values in converted.items()}


def _check_shapes(
    folder: Path,
    sources: dict[str, list[StoredWeight]],
    shapes: dict[str, tuple[int, ...]],
    places: dict[str, torch.Tensor],
) -> None:
    for target, shape in shapes.items():
        expected = tuple(places[target].shape) if target in places else "no such weight"
        if shape == expected:
            continue
        stored = _first_source(sources).name
        made_of = f" for {target}" if target != stored else ""
        raise InputError(
            f"{folder}: {stored} has shape {shape}{made_of}, "
            f"but the configuration asks for {expected}",
            "get the model again; its files do not belong together",
        )


def _first_source(sources: dict[str, list[StoredWeight]]) -> StoredWeight:
    return next(iter(sources.values()))[0]


def _missing(
    model: PreTrainedModel, places: dict[str, torch.Tensor], units: list[WeightUnit]
) -> set[str]:
    """Return the names of weights that no unit gives. Tied weights have several names."""
    found = set()
    for unit in units:
        found.update(id(places[target]) for target in unit.targets)
    missing = {name for name, place in places.items() if id(place) not in found}
    # Some families compute a buffer that older files lack.
    optional = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    return {name for name in missing if not any(pattern.search(name) for pattern in optional)}


def _keeps_first_dimension(operation: ConversionOps) -> bool:
    """Return whether an operation treats each index of the first dimension by itself."""
    if isinstance(operation, Transpose):
        return min(operation.dim0, operation.dim1) > 0
    return isinstance(operation, Chunk | Concatenate | Interleave) and operation.dim > 0


@contextmanager
def _reading(folder: Path) -> Iterator[None]:
    """Convert errors of broken files into an InputError that names the folder."""
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise InputError(f"{folder} cannot be loaded: {error}") from None
