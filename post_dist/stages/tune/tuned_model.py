"""The model that a prompt is tuned on."""

from dataclasses import dataclass
from pathlib import Path

from post_dist.artifacts.prompt import SoftPromptArtifact


@dataclass(frozen=True)
class TunedModel:
    """A model, and what tuning on it starts from.

    Attributes:
        folder: the student, or the target for the baseline of full prompt tuning.
        digest: digest of its files.
        name: its name in the adapter's configuration and on the model card.
        public_prompt: the public prompt that tuning starts from; None to start from text.
    """

    folder: Path
    digest: str
    name: str
    public_prompt: SoftPromptArtifact | None = None
