"""The models and engine settings that `prediction.py` measures and plans."""

from pathlib import Path
from typing import Any, NamedTuple

from post_dist.config.load import load_run
from post_dist.config.schema import RunConfig


class Setting(NamedTuple):
    """A model, a batch and an engine.

    Attributes:
        width: width of the model.
        layers: layers of the model.
        vocabulary: rows of its embeddings.
        batch: examples of a step, over all ranks.
        length: tokens of a sequence of distill.
        zero: ZeRO stage of the student.
        group: ranks that share one copy of the teacher.
    """

    width: int
    layers: int
    vocabulary: int
    batch: int
    length: int
    zero: int
    group: int

    @classmethod
    def of_measurement(cls, measured: dict[str, Any]) -> "Setting":
        """Return the setting that a measurement was made with."""
        return cls(*(measured[name] for name in cls._fields))

    def load_config(self, run: Path) -> RunConfig:
        """Load a run file of `shapes.write_run` with this setting's batch and engine."""
        changes = {
            "distill.batch_size": self.batch,
            "distill.micro_batch_size_per_gpu": 64,
            "corpus.sequence_length": self.length,
            "transfer.batch_size": self.batch,
            "engine.zero_stage": self.zero,
            "engine.shard_group": self.group,
            "tune.num_virtual_tokens": 20,
        }
        return load_run(run, [f"{key}={value}" for key, value in changes.items()], None)


FIT = [
    Setting(256, 4, 4000, 8, 64, 1, 2),
    Setting(512, 4, 4000, 8, 64, 1, 2),
    Setting(256, 8, 16000, 16, 64, 0, 2),
    Setting(512, 8, 8000, 8, 128, 2, 1),
    Setting(384, 6, 16000, 16, 64, 3, 2),
    Setting(256, 12, 4000, 16, 128, 1, 1),
    Setting(512, 6, 16000, 16, 64, 0, 1),
    Setting(640, 4, 4000, 8, 64, 3, 1),
]
"""The machine's rates are fitted to measurements of these."""
HELD_OUT = [
    Setting(320, 6, 8000, 16, 64, 1, 2),
    Setting(448, 8, 4000, 8, 128, 1, 1),
    Setting(512, 4, 16000, 16, 64, 2, 2),
    Setting(256, 10, 8000, 16, 128, 3, 2),
    Setting(640, 6, 8000, 8, 64, 0, 2),
    Setting(384, 12, 4000, 8, 64, 1, 2),
    Setting(576, 4, 12000, 16, 64, 3, 1),
    Setting(384, 8, 8000, 32, 64, 2, 1),
    Setting(704, 4, 6000, 8, 128, 1, 2),
]
"""The plan's times are compared with measurements of these."""
MEMORY = [
    (2, Setting(768, 8, 8000, 8, 64, 1, 2)),
    (2, Setting(768, 8, 8000, 16, 64, 0, 1)),
    (2, Setting(768, 6, 16000, 8, 64, 3, 2)),
    (2, Setting(1024, 6, 8000, 4, 64, 2, 2)),
    (4, Setting(768, 8, 8000, 8, 64, 1, 4)),
    (4, Setting(640, 8, 16000, 8, 64, 1, 2)),
]
"""Ranks and setting of each measurement of memory.

The models are larger than what the libraries allocate for themselves.
"""
