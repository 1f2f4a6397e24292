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
        trusted: whether it is a student that has no manifest, and that nobody has checked.
    """

    folder: Path
    digest: str
    name: str
    public_prompt: SoftPromptArtifact | None = None
    trusted: bool = False

    @property
    def title(self) -> str:
        """Its name on the model card."""
        return f"{self.name}, which was not checked" if self.trusted else self.name
