"""Settings for a run file that `init` writes: what suits a machine, or the paper's."""

from dataclasses import dataclass
from typing import Literal

PresetName = Literal["laptop", "gpu", "cluster", "paper"]

_CLUSTER = """\
cluster:                             # for `post-dist submit` (docs/slurm.md)
  gpus_per_node: 1
  cpus_per_task: 8
  memory: 32G
  time_minutes: 120
"""


@dataclass(frozen=True)
class Preset:
    """Settings of tuning.

    Attributes:
        num_virtual_tokens: number of vectors of the prompt.
        expected_batch_size: expected number of examples in a private step of a prompt. A small data
            set gets a smaller one.
        steps: number of private steps of a prompt; 0 for as many as 20 passes over the data.
        learning_rate: highest learning rate of a prompt.
        tune: further lines of the section `tune`.
        cluster: the section `cluster` of the run file.
        prefers_head: whether a head is tuned if the model allows it.
    """

    num_virtual_tokens: int
    expected_batch_size: int
    steps: int
    learning_rate: str
    tune: str = ""
    cluster: str = ""
    prefers_head: bool = True

    def steps_for(self, examples: int, batch_size: int) -> int:
        """Return the number of private steps for a data set."""
        return self.steps or 20 * examples // batch_size


_GPU_TUNE = "  micro_batch_size_per_gpu: 64       # lower it if the GPU's memory is not enough\n"

PRESETS: dict[PresetName, Preset] = {
    "laptop": Preset(10, 64, 80, "2.0e-2"),
    "gpu": Preset(10, 512, 200, "2.0e-2", _GPU_TUNE),
    "cluster": Preset(10, 512, 200, "2.0e-2", _GPU_TUNE, _CLUSTER),
    "paper": Preset(
        100, 32, 0, "1.0e-3", "  schedule: constant\n  warmup_share: 0\n", prefers_head=False
    ),
}
