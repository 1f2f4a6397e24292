"""Settings for a run file that `init` writes: what suits a machine, or the paper's."""

from dataclasses import dataclass
from typing import Literal

PresetName = Literal["laptop", "gpu", "cluster", "paper"]

_OURS = """\
transfer:                            # for the provider, who has the large LLM (docs/method.md)
  objective: proxy                   # toward the LLM's answers plus what the prompt taught
  scores: classes                    # compares the label words alone
  match_class_shares: true           # the LLM takes over how often the student names each class
  trained_share: 1.0                 # starts from the tuned prompt; the student must be as wide
  temperature: 1.0
  steps: {steps}
  batch_size: 16
  learning_rate: 1.0e-2
  schedule: cosine
"""
_PAPERS = """\
transfer:                            # for the provider, who has the large LLM: the paper's loss
  objective: published
  scores: vocabulary
  alpha: 0.5
  temperature: 2.0
  trained_share: 0                   # starts from the words of init_text
  steps: 5000
  batch_size: 8
  learning_rate: 1.0e-3
  schedule: constant
"""
_CLUSTER = """\
cluster:                             # for `post-dist submit` (docs/slurm.md)
  gpus_per_node: 1
  cpus_per_task: 8
  memory: 32G
  time_minutes: 120
"""


@dataclass(frozen=True)
class Preset:
    """Settings of tuning and transfer.

    Attributes:
        num_virtual_tokens: number of vectors of the prompt.
        expected_batch_size: expected number of examples in a private step. A small data set gets a
            smaller one.
        steps: number of private steps; 0 for as many as 20 passes over the data.
        learning_rate: highest learning rate of tuning.
        tune: further lines of the section `tune`.
        sections: further sections of the run file.
    """

    num_virtual_tokens: int
    expected_batch_size: int
    steps: int
    learning_rate: str
    tune: str = ""
    sections: str = ""

    def steps_for(self, examples: int, batch_size: int) -> int:
        """Return the number of private steps for a data set."""
        return self.steps or 20 * examples // batch_size


_GPU_TUNE = "  micro_batch_size_per_gpu: 64       # lower it if the GPU's memory is not enough\n"

PRESETS: dict[PresetName, Preset] = {
    "laptop": Preset(10, 64, 80, "2.0e-2", sections=_OURS.format(steps=100)),
    "gpu": Preset(10, 512, 200, "2.0e-2", _GPU_TUNE, _OURS.format(steps=400)),
    "cluster": Preset(10, 512, 200, "2.0e-2", _GPU_TUNE, _OURS.format(steps=400) + _CLUSTER),
    "paper": Preset(100, 32, 0, "1.0e-3", "  schedule: constant\n  warmup_share: 0\n", _PAPERS),
}
