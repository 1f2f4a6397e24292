"""What a prompt is tuned with, whether privately or not.

Shapes: n prompt tokens, d width, C classes.
"""

from dataclasses import dataclass

import torch

from post_dist.config.schema import Tune
from post_dist.data.template import Encoded, Template
from post_dist.data.verbalizer import Verbalizer
from post_dist.models.classifier import BIAS_RATE
from post_dist.models.language_model import LanguageModel
from post_dist.runtime.optimizers import make_optimizer


@dataclass(frozen=True)
class TuningTask:
    """What a prompt is tuned with.

    Attributes:
        model: frozen.
        template: of the task.
        verbalizer: of its classes, if it has any.
        rows: the texts, with the responses behind them if there are any.
        wanted: the classes [N], or the tokens of the responses [N, R].
        start_nd: where the prompt starts.
    """

    model: LanguageModel
    template: Template
    verbalizer: Verbalizer
    rows: list[Encoded]
    wanted: torch.Tensor
    start_nd: torch.Tensor

    def parameters(self, section: Tune) -> list[torch.Tensor]:
        """The prompt [n, d] at its start, and bias parameters [C] of zero if they are tuned; fp32."""
        start = self.start_nd.to(torch.float32).clone()
        return (
            [start, start.new_zeros(len(self.verbalizer.token_ids))]
            if section.class_bias
            else [start]
        )

    @staticmethod
    def optimizer(
        section: Tune, parameters: list[torch.Tensor], learning_rate: float
    ) -> torch.optim.Optimizer:
        """Adam or SGD over the parameters, with its own rate for the class biases."""
        rates = (learning_rate, learning_rate * BIAS_RATE)
        groups = [
            {"params": [parameter], "lr": rate}
            for parameter, rate in zip(parameters, rates, strict=False)
        ]
        return make_optimizer(section.optimizer, groups)
