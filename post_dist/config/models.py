"""The run file's sections for models: the teacher, the student, and their layout over the ranks."""

from pathlib import Path
from typing import Literal

from pydantic import ValidationInfo, field_validator, model_validator

from post_dist.config.deepspeed_section import DeepSpeedSettings
from post_dist.config.precision import PrecisionChoice
from post_dist.config.sections import (
    Count,
    FilePath,
    PositiveInt,
    Seconds,
    Section,
    beside_run_file,
)
from post_dist.errors import InputError
from post_dist.paths import kind_of


class Teacher(Section):
    """The provider's large LLM: the teacher in distillation, the target in transfer."""

    path: str
    """A folder in Hugging Face format, or a hub name such as `org/model`."""
    revision: str | None = None
    """Commit of a hub model; required with a hub name. A run file then always means the same
    model."""

    @field_validator("path")
    @classmethod
    def _local_folder_beside_run_file(cls, path: str, info: ValidationInfo) -> str:
        # A hub name looks like a relative path. It is a folder if the folder exists.
        local = beside_run_file(Path(path), info)
        try:
            is_local = path.startswith((".", "/", "~")) or kind_of(local) != ""
        except InputError as problem:
            raise ValueError(str(problem)) from None
        return str(local) if is_local else path

    @model_validator(mode="after")
    def _hub_name_needs_revision(self) -> "Teacher":
        if not Path(self.path).is_absolute() and not self.revision:
            raise ValueError(
                f"'{self.path}' is not a folder; a hub name needs `revision` (a commit)"
            )
        return self


class Student(Section):
    """Which layers of the teacher make the student, and which parameters are not trained."""

    # Which layers are copied.
    layers: Literal["first_last", "even", "auto"] | tuple[int, ...] = "first_last"
    """The teacher's layers that are copied. `first_last`: half from its beginning, half from its
    end. `even`: at equal distances. `auto`: all but those whose removal harms the teacher least, as
    measured on the corpus. A list gives the numbers of the layers, from 0."""
    num_layers: PositiveInt | None = None
    """Number of layers of the student; required unless `layers` is a list."""
    # What is not trained.
    frozen_lower_layers: Count = 0
    """Number of the student's first layers that are not trained. They must be the teacher's own
    first layers. In training they run once for both models."""
    freeze_embeddings: bool = True
    """Do not train the embeddings."""
    freeze_head: bool = True
    """Do not train the head. A model with tied embeddings needs the same value for both."""

    @model_validator(mode="after")
    def _layers_and_number_agree(self) -> "Student":
        if isinstance(self.layers, str):
            if self.num_layers is None:
                raise ValueError(f"layers: {self.layers} needs num_layers")
            if self.layers == "first_last" and self.num_layers < 2:
                raise ValueError("layers: first_last needs num_layers of 2 or more")
            return self
        is_rising = list(self.layers) == sorted(set(self.layers))
        if not self.layers or not is_rising or self.layers[0] < 0:
            raise ValueError("a list of layers holds rising numbers from 0, at least one")
        if self.num_layers not in (None, len(self.layers)):
            raise ValueError(
                f"num_layers is {self.num_layers}, but {len(self.layers)} layers are listed"
            )
        return self

    @model_validator(mode="after")
    def _lower_block_is_possible(self) -> "Student":
        # The rule above has checked that one of the two is given.
        count = self.num_layers or len(self.layers)
        if self.frozen_lower_layers >= count:
            raise ValueError(
                f"frozen_lower_layers: {self.frozen_lower_layers} "
                f"leaves none of {count} layers to train"
            )
        if self.frozen_lower_layers and not self.freeze_embeddings:
            raise ValueError(
                "frozen_lower_layers needs freeze_embeddings: true, "
                "because the frozen layers read the teacher's embeddings"
            )
        return self


class Engine(Section):
    """The layout of the models over the ranks, by DeepSpeed.

    Only `precision`, `quantized_gathers` and `deepspeed` change results by more than rounding.
    """

    # How models are split over the ranks.
    zero_stage: Literal[0, 1, 2, 3] = 1
    """ZeRO stage of the student. Frozen large models always use ZeRO-3."""
    precision: PrecisionChoice = "auto"
    """Precision of weights and activations. `auto` is bf16 on devices with bf16 instructions, and
    fp32 on others. fp16 needs a GPU."""
    shard_group: Literal["all", "node"] | PositiveInt = "all"
    """Ranks that share one copy of a frozen large model: all ranks, those of a node, or a number of
    neighbors. With 1, each rank has its own copy."""
    quantized_gathers: bool = False
    """Send frozen weights as int8 (ZeRO++), which changes them a little. GPUs only."""
    # What is moved out of the memory of the GPUs, or recomputed to save it.
    offload: Literal["none", "cpu", "nvme"] = "none"
    """Place of the shards of frozen large models between uses: the GPU (`none`), host memory
    (`cpu`), or a disk (`nvme`)."""
    nvme_folder: FilePath | None = None
    """A folder on each node's own disk; required with `offload: nvme`."""
    offload_optimizer: bool = False
    """Keep and step the student's optimizer in host memory; needs `zero_stage` 1 or more."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass instead of keeping them."""
    local_checkpoint_folder: FilePath | None = None
    """A folder on each node's own disk for a second copy of the checkpoints of `distill`. A restart
    on the same nodes reads the copies, and of the shared storage only hashes and headers."""
    deepspeed: DeepSpeedSettings | None = None
    """Further settings of DeepSpeed. Private tuning runs without DeepSpeed and does not read
    them."""
    # How operations are run.
    compile: bool = False
    """Let torch compile the layers of the models that training runs, and the loss of `distill`.
    That fuses small operations, so sums are rounded otherwise. It needs whole models, a C++
    compiler, and Triton on a GPU. The first steps take longer, by some minutes on a CPU."""
    # When a rank counts as lost.
    hang_timeout_seconds: Seconds = 1800.0
    """Seconds without progress after which a process reports its phase and stack, and exits; a day
    at most, because the collectives' own limit is two."""
    join_timeout_seconds: Seconds = 600.0
    """Seconds that a rank waits at its start for all others, a day at most. Then it names those
    that are missing, and exits."""

    @model_validator(mode="after")
    def _layout_is_possible(self) -> "Engine":
        # Offloading to a disk needs a folder on it.
        if (self.offload == "nvme") != (self.nvme_folder is not None):
            raise ValueError("offload: nvme and nvme_folder go together")
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError("offload_optimizer needs zero_stage 1, 2 or 3")
        if self.shard_group == 1 and (self.offload != "none" or self.quantized_gathers):
            raise ValueError(
                "shard_group: 1 keeps frozen models whole on each rank: "
                "nothing to offload or to gather"
            )
        return self
