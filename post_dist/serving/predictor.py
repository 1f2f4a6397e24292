"""Predict with a soft prompt on its model, on one device.

Shapes: N texts, C classes.
"""

from collections.abc import Sequence

from post_dist.artifacts.prompt import SoftPromptArtifact
from post_dist.config.arguments import Text, checked
from post_dist.config.models import Engine
from post_dist.config.precision import PrecisionChoice
from post_dist.config.sections import PositiveInt
from post_dist.conflicts import raise_conflicts
from post_dist.data.task_reader import TaskReader
from post_dist.models.answers import answers_of
from post_dist.models.batch_inference import InferenceRun
from post_dist.models.language_model import LanguageModel
from post_dist.models.load import load_whole
from post_dist.runtime.distributed import World, single_process
from post_dist.runtime.precision import choose_precision, precision_conflicts
from post_dist.runtime.torch_modes import default_modes
from post_dist.serving.model import fitting_model
from post_dist.serving.predictions import Predictions, Response, class_prediction


class Predictor:
    """A prompt on its loaded model.

    Args:
        prompt: the prompt.
        model: the model that it was made for, frozen.
        reader: the prompt's task, bound to the model's tokenizer.
        world: this process and its device.
    """

    def __init__(
        self, prompt: SoftPromptArtifact, model: LanguageModel, reader: TaskReader, world: World
    ) -> None:
        self._prompt = prompt
        self._model = model
        self._reader = reader
        self._world = world

    @checked
    @default_modes()
    def predict(self, texts: Sequence[Text], batch_size: PositiveInt = 32) -> Predictions:
        """Predict the class of each text, or generate the response to it.

        Args:
            texts: the texts, without the template.
            batch_size: number of texts in a forward pass. Texts of like length go together.

        Returns:
            One prediction for each text, in their order.

        Raises:
            InputError: `texts` is not a list of strings, or `batch_size` is no number above zero.
        """
        if not texts:
            return []
        # The stages strip a text too, after composing it from its columns.
        encoded = self._reader.encode([text.strip() for text in texts])
        run = InferenceRun(batch_size, self._world, "predict")
        answers = answers_of(self._model, encoded, self._reader, self._prompt, run)
        if self._reader.generates:
            return [Response(text) for text in self._reader.texts_of(answers)]
        scores_NC = self._prompt.task.with_biases(answers)
        return [class_prediction(self._prompt.task.class_names, row) for row in scores_NC]


def load_predictor(
    prompt: SoftPromptArtifact, model: str, revision: str | None, precision: PrecisionChoice
) -> Predictor:
    """Load a model, and check that a prompt belongs to it.

    Args:
        prompt: the prompt.
        model: folder or hub name of the model.
        revision: commit of a hub model.
        precision: precision of the weights.

    Raises:
        ArtifactRefused: the prompt belongs to another model, or the model is a student that does
            not pass its checks.
        InputError: the model cannot be loaded.
        EnvironmentFault: the hub cannot be reached.
    """
    world = single_process()
    engine = Engine(precision=precision)
    raise_conflicts("predict", precision_conflicts(engine, world.device.type))
    with fitting_model(prompt, model, revision) as found:
        loaded = load_whole(found.folder, choose_precision(engine, world.device), world.device)
    return Predictor(prompt, loaded, found.reader, world)
