"""What tuning has done to the model's answers, on texts that the model writes itself.

With too little signal for its noise, a private prompt gives one class to every text. Its accuracy
would show that, but no epsilon covers a look at private labels. The model's own texts cost nothing.

Shapes: N texts, C classes.
"""

import logging

from post_dist.artifacts.head import LinearHead
from post_dist.artifacts.prompt import PromptContents
from post_dist.errors import PostDistError
from post_dist.models.answers import answers_of
from post_dist.models.batch_inference import InferenceRun
from post_dist.models.own_texts import own_texts
from post_dist.models.tuning_task import TuningTask
from post_dist.runtime.distributed import World

log = logging.getLogger(__name__)

_TEXTS = 64
_BATCH = 16
_LARGEST_SHARE = 0.9
"""Share of one class above which the answers hardly depend on the text.

Two prompts that had fallen to one of three classes gave it to 94% and 97% of these texts. The
demo's heads give one of two classes to 72% and 73%.
"""


def report_one_class(task: TuningTask, tuned: PromptContents, world: World) -> None:
    """Warn if nearly all texts get one class. Tasks that generate text are not checked.

    The result is on disk by then. A report that fails or is stopped is left out.

    Args:
        task: what was tuned: the model, and the prompt and adapter before tuning.
        tuned: the outcome.
        world: this process, alone.
    """
    try:
        _report(task, tuned, world)
    except (PostDistError, RuntimeError, LookupError, TypeError, ValueError) as error:
        log.warning("tune: no answers to texts of the model: %s", type(error).__name__)


def _report(task: TuningTask, tuned: PromptContents, world: World) -> None:
    # A masked model writes no text.
    if task.reader.generates or task.model.masked:
        return
    # No data goes into these texts, so an answer to them tells nothing of the data.
    texts = own_texts(task.model, task.reader, _TEXTS)
    before = PromptContents(task.start_nd, task.reader.task, None, task.adapter)
    share_before, _ = _largest_class(task, before, texts, world)
    share, label = _largest_class(task, tuned, texts, world)
    log.info(
        "tune: most frequent class: %.0f%% of %d texts that the model wrote, %.0f%% before",
        100 * share,
        len(texts),
        100 * share_before,
    )
    if share > _LARGEST_SHARE:
        log.warning(
            "tune: %.0f%% of %d texts that the model wrote get the class %r, so the answers may "
            "hardly depend on the text; try %s",
            100 * share,
            len(texts),
            label,
            _remedies(tuned),
        )


def _remedies(tuned: PromptContents) -> str:
    """Say what may help where all texts get one class."""
    remedies = ["more examples"]
    if tuned.privacy is not None:
        remedies.append("a larger epsilon")
    # A head needs far less signal than anything else that is tuned.
    if not isinstance(tuned.adapter, LinearHead):
        remedies.append("tune.adapter: head")
    return " or ".join(remedies)


def _largest_class(
    task: TuningTask, prompt: PromptContents, texts: list[str], world: World
) -> tuple[float, str]:
    """Return the share of the most frequent class among the answers, and its first label word."""
    reader = task.reader
    run = InferenceRun(_BATCH, world, "texts of the model", show=False)
    answers = answers_of(task.model, reader.encode(texts), reader, prompt, run)
    scores_NC = prompt.task.with_biases(answers)
    counts_C = scores_NC.argmax(dim=1).bincount(minlength=reader.num_classes)
    largest = int(counts_C.argmax())
    return float(counts_C[largest]) / len(texts), reader.task.label_words[largest][0]
