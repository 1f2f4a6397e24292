"""What a prompt answers to a text: a class with its probability, or a generated text.

Shapes: C classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ClassPrediction:
    """The class of a text.

    Attributes:
        label: name of the class: its value in the owner's label column.
        index: number of the class, from 0.
        scores: probability of each class, by its name.
    """

    label: str
    index: int
    scores: dict[str, float]


@dataclass(frozen=True)
class Response:
    """The text that the model generates for a text.

    Attributes:
        response: the generated text.
    """

    response: str


Predictions = list[ClassPrediction] | list[Response]


def class_prediction(names: Sequence[str], scores_C: torch.Tensor) -> ClassPrediction:
    """Return the class with the highest score.

    Args:
        names: name of each class.
        scores_C: score of each class, up to a constant.
    """
    # Two probabilities may be equal where their scores still differ.
    index = int(scores_C.argmax())
    shares = scores_C.softmax(dim=0).tolist()
    return ClassPrediction(names[index], index, dict(zip(names, shares, strict=True)))
