"""Check the files of a student's weights against the model that its configuration describes."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from post_dist.artifacts.strict_json import read_object
from post_dist.artifacts.tensor_file import read_layout
from post_dist.errors import ArtifactRefused
from post_dist.models.facts import meta_model
from post_dist.models.weight_files import INDEX, ONE_FILE

_HEADER_BYTES = 4 << 20
"""Largest header; that of 512 layers with 12 tensors each has 1 MB."""
_MOST_EXPERTS = 1 << 16
"""Most experts of all layers; each takes more than 64 bytes of a header."""
_BUFFER_BYTES = 128 << 20
"""Largest memory of what a model computes for itself, such as masks and rotary tables."""


@dataclass(frozen=True)
class _Expected:
    """The tensors of a model.

    Attributes:
        shapes: the shape of each, by its name.
        first_names: for each name, the first name of the same tensor. Tied tensors are one, and a
            file may hold it under any of its names.
    """

    shapes: Mapping[str, tuple[int, ...]]
    first_names: Mapping[str, str]


def meta_student(folder: Path) -> PreTrainedModel:
    """Build a student from its rebuilt config.json on the meta device, without memory.

    Raises:
        ArtifactRefused: its buffers would need more memory than a model of any size needs.
    """
    model = meta_model(folder).model
    tables = sum(buffer.nbytes for buffer in model.buffers()) + _bytes_of_positions(model)
    if tables > _BUFFER_BYTES:
        raise ArtifactRefused("config.json describes a model that needs too much memory")
    # The experts of a layer are one weight of the model, and each is a weight of its own in a file.
    experts = [len(weight) for weight in model.parameters() if weight.dim() == 3]
    if sum(experts) > _MOST_EXPERTS:
        raise ArtifactRefused("config.json describes more experts than a header has room for")
    return model


def _bytes_of_positions(model: PreTrainedModel) -> int:
    """Return the size of the table of positions that an MPT model makes anew in each pass.

    It has a number for each head and position that the configuration allows, whatever the text is.
    """
    if model.config.model_type != "mpt":
        return 0
    return 4 * int(model.config.n_heads) * int(model.config.max_seq_len)


def check_weights(folder: Path, model: PreTrainedModel) -> None:
    """Check that the files hold the weights of a model, all of them and nothing else.

    So whoever loads the model needs memory for what the sender has sent, whatever the configuration
    claims.

    Args:
        folder: a copy of our own with the files of the weights.
        model: the model on the meta device.

    Raises:
        ArtifactRefused: a tensor is missing, unknown, twice there, or of another shape or type.
    """
    expected = _expected(model)
    found: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        for name, layout in read_layout(path, _HEADER_BYTES).items():
            # The headers alone are read here. A tensor of another shape is never loaded.
            if name in found or expected.shapes.get(name) != layout.shape:
                raise ArtifactRefused(
                    f"{path.name} holds a tensor that the student of config.json does not have"
                )
            found[name] = path
    # A file holds a tied tensor under one of its names. If no name is there, it was not sent.
    first_names = expected.first_names
    missing = set(first_names.values()) - {first_names[name] for name in found}
    if missing:
        raise ArtifactRefused(f"the weights lack {min(missing)}")
    _check_index(folder, found)


def _expected(model: PreTrainedModel) -> _Expected:
    shapes = {}
    first_names: dict[str, str] = {}
    names_by_tensor: dict[int, str] = {}
    # A mixture of experts stores each expert by itself, in the files that transformers writes.
    stored = revert_weight_conversion(model, model.state_dict(keep_vars=True))
    # On the meta device, tied tensors are one object.
    for name, tensor in stored.items():
        shapes[name] = tuple(tensor.shape)
        first_names[name] = names_by_tensor.setdefault(id(tensor), name)
    return _Expected(shapes, first_names)


def _check_index(folder: Path, found: Mapping[str, Path]) -> None:
    """Check that the index of several files says where each tensor is."""
    files = set(found.values())
    if files == {folder / ONE_FILE}:
        if (folder / INDEX).exists():
            raise ArtifactRefused(f"{INDEX} stands beside {ONE_FILE}")
        return
    if not (folder / INDEX).exists():
        raise ArtifactRefused(f"the weights are in several files, and there is no {INDEX}")
    # An index could name files outside the folder, which a library would open.
    places = read_object(folder / INDEX).get("weight_map")
    if places != {name: path.name for name, path in found.items()}:
        raise ArtifactRefused(f"{INDEX} does not name the file of each tensor")
