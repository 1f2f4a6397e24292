"""A soft prompt that can be used: what `load_prompt` of the Python API returns."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from post_dist.admission.door import admit_prompt
from post_dist.artifacts.prompt import SoftPromptArtifact
from post_dist.config.arguments import Text, checked
from post_dist.config.precision import PrecisionChoice
from post_dist.config.sections import PositiveInt

if TYPE_CHECKING:  # loads transformers, which a prompt without a model does not need
    from post_dist.serving.predictions import Predictions
    from post_dist.serving.predictor import Predictor

ExportFormat = Literal["vllm", "peft", "hub"]


@dataclass(frozen=True, repr=False)
class Prompt(SoftPromptArtifact):
    """A prompt that has passed all checks, with methods to use it on its model."""

    def __repr__(self) -> str:
        """Describe the prompt in a line. All of its numbers would flood a notebook."""
        kind = "prompt" if self.adapter is None else self.adapter.title
        tokens, width = self.embeddings.shape
        return (
            f"Prompt({kind!r}, {tokens} x {width}, template={self.task.template!r}, "
            f"epsilon={self.epsilon})"
        )

    @classmethod
    def admitted(cls, folder: Path, keys: Sequence[str] = ()) -> "Prompt":
        """Read a prompt from a folder that is not trusted.

        Args:
            folder: the prompt.
            keys: trusted public keys, one of which must have signed it; none to take unsigned ones.

        Raises:
            ArtifactRefused: a check failed.
        """
        return cls(**vars(admit_prompt(folder, keys=keys)))

    @checked
    def on_model(
        self, model: str | Path, *, revision: str | None = None, precision: PrecisionChoice = "auto"
    ) -> "Predictor":
        """Load the model that the prompt was made for, for any number of predictions.

        Args:
            model: folder or hub name of the model.
            revision: commit of a hub model, which must be given with a hub name.
            precision: precision of the weights; `auto` is that of the stages on this device.

        Raises:
            ArtifactRefused: the prompt does not belong to this model, or the model is a student
                that does not pass its checks.
            InputError: the model cannot be loaded.
            EnvironmentFault: the hub cannot be reached.
        """
        from post_dist.serving.predictor import load_predictor

        return load_predictor(self, str(model), revision, precision)

    @checked
    def predict(
        self,
        texts: Sequence[Text],
        model: str | Path,
        *,
        revision: str | None = None,
        precision: PrecisionChoice = "auto",
        batch_size: PositiveInt = 32,
    ) -> "Predictions":
        """Predict the class of each text, or generate the response to it.

        Args:
            texts: the texts, without the template.
            model: folder or hub name of the model that the prompt was made for.
            revision: commit of a hub model, which must be given with a hub name.
            precision: precision of the weights; `auto` is that of the stages on this device.
            batch_size: number of texts in a forward pass.

        Returns:
            One prediction for each text, in their order.

        Raises:
            PostDistError: any error of `on_model`, or an argument is of the wrong type.
        """
        predictor = self.on_model(model, revision=revision, precision=precision)
        return predictor.predict(texts, batch_size)

    @checked
    def export(
        self,
        form: ExportFormat,
        model: str | Path,
        destination: str | Path,
        *,
        revision: str | None = None,
    ) -> None:
        """Write the prompt in the form that other software takes (docs/use.md).

        Args:
            form: `vllm`, `peft` or `hub`.
            model: folder or hub name of the model that the prompt was made for.
            destination: the folder to create.
            revision: commit of a hub model, which must be given with a hub name.

        Raises:
            ArtifactRefused: the prompt does not belong to this model.
            InputError: the form cannot hold this prompt, or the folder exists.
            EnvironmentFault: the hub cannot be reached, or the disk is full.
        """
        from post_dist.serving.export import export_prompt

        export_prompt(self, form, str(model), revision, Path(destination))
