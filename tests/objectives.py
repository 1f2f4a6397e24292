"""The objective of a transfer whose texts matter alone, without the outputs of a student."""

from pathlib import Path

import tiny
import torch

from post_dist.artifacts.task import PromptTask
from post_dist.config.schema import Transfer
from post_dist.data.task_reader import TaskReader
from post_dist.models.language_model import LanguageModel
from post_dist.models.load import load_tokenizer
from post_dist.stages.transfer.objective import FixedOutputs, TransferObjective

TASK = PromptTask("Review: {text} It was", (("bad",), ("good",)), 48, False, "Classify")
INFORMATIVE = {"class_information_nats": 0.3}


def objective_of(folder: Path, target: LanguageModel, task: PromptTask = TASK) -> TransferObjective:
    """Return an objective with 80 public texts.

    Args:
        folder: folder of the target.
        target: the target.
        task: the task.
    """
    reader = TaskReader(
        task, load_tokenizer(folder), masked=target.masked, vocabulary=target.vocabulary_size
    )
    texts = [text for text, _ in tiny.sentences(80, 2)]
    nothing = torch.zeros(0)
    return TransferObjective(
        section=Transfer(objective="published", batch_size=7),
        reader=reader,
        examples=reader.encode(texts, ["good"] * len(texts)),
        outputs=FixedOutputs(nothing, nothing, nothing),
        offsets=nothing,
        statistics=INFORMATIVE,
    )
