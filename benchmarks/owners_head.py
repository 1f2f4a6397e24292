"""A head on the student, tuned by the owner with DP-SGD, without a public prompt and a transfer.

Shapes: N examples, C classes, m features.
"""

import math

import numpy as np
import torch
from noisy_votes import Budget
from task_model import TaskModel, features_like
from torch.nn import functional

from post_dist.config.schema import RunConfig
from post_dist.data.tasks import Examples
from post_dist.privacy.calibration import calibrated
from post_dist.privacy.plan import PrivacyPlan, declared_plan

_LAYERS = 4
_PUBLIC_TEXTS = 640
_SCORE_NOISE = 0.4
"""The rule of `tune` for the rate of a head: the noise moves a class score by this many nats."""


class OwnersHead:
    """Tunes a linear head on the last layers of the student.

    Args:
        model: the student, bound to the task.
        config: run file with the sections `privacy` and `tune`.
        private: the training examples.
        seed: draws public texts, batches and noise.
    """

    def __init__(self, model: TaskModel, config: RunConfig, private: Examples, seed: int) -> None:
        self._model = model
        self._config = config
        self._seed = seed
        self._layers = model.last_layers(_LAYERS)
        self._public_Nk, _ = model.states(
            model.some_public_texts(_PUBLIC_TEXTS, seed), self._layers
        )
        self._features_Nm, self._scores_NC = self._read(private.texts)
        self._classes_N = torch.tensor(private.classes)

    def scores(self, texts: list[str], budget: Budget) -> torch.Tensor:
        """Return class scores [N, C] of the label words plus those of a private head.

        Args:
            texts: the texts to label.
            budget: target epsilon and delta; without an epsilon, the head is tuned without noise.
        """
        plan = declared_plan(self._config, noise_multiplier=1.0)
        deviation = 0.0
        rate = self._config.tune.learning_rate
        if budget.epsilon is not None:
            plan = calibrated(plan, budget.epsilon)
            deviation = plan.noise_multiplier * plan.max_grad_norm
            noise_of_step = deviation / plan.expected_batch_size
            rate = min(rate, _SCORE_NOISE / (noise_of_step * math.sqrt(plan.steps)))
        weight_Cm, bias_C = self._tuned(plan, deviation, rate)
        features_Nm, of_words_NC = self._read(texts)
        return (of_words_NC + features_Nm @ weight_Cm.T + bias_C).float()

    def _tuned(
        self, plan: PrivacyPlan, deviation: float, rate: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the mean weight [C, m] and bias [C] over the second half of the steps."""
        noise = np.random.default_rng([self._seed, round(100 * deviation)])
        # The bias is the weight of one more feature.
        ones = torch.ones(len(self._classes_N), 1, dtype=torch.float64)
        inputs_Nm = torch.cat([self._features_Nm, ones], dim=1)
        weight_Cm = inputs_Nm.new_zeros(self._model.num_classes, inputs_Nm.shape[1])
        mean_Cm = torch.zeros_like(weight_Cm)
        for step in range(plan.steps):
            drawn_N = noise.random(len(inputs_Nm)) < plan.sampling_probability
            total_Cm = clipped_sum(
                inputs_Nm[drawn_N],
                self._scores_NC[drawn_N],
                self._classes_N[drawn_N],
                weight_Cm,
                plan.max_grad_norm,
            )
            total_Cm += torch.from_numpy(noise.normal(0.0, 1.0, total_Cm.shape)) * deviation
            weight_Cm = weight_Cm - rate * total_Cm / plan.expected_batch_size
            if step >= plan.steps // 2:
                mean_Cm += weight_Cm / (plan.steps - plan.steps // 2)
        return mean_Cm[:, :-1], mean_Cm[:, -1]

    def _read(self, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        states_Nk, scores_NC = self._model.states(texts, self._layers)
        return features_like(states_Nk, self._public_Nk), scores_NC.double()


def clipped_sum(
    inputs_Bm: torch.Tensor,
    scores_BC: torch.Tensor,
    classes_B: torch.Tensor,
    weight_Cm: torch.Tensor,
    norm: float,
) -> torch.Tensor:
    """Return the sum [C, m] of the gradients of the examples, each clipped to a norm.

    Args:
        inputs_Bm: features of the drawn examples.
        scores_BC: scores of the label words.
        classes_B: the classes.
        weight_Cm: weight of the head.
        norm: the clipping norm.
    """
    p_BC = (scores_BC + inputs_Bm @ weight_Cm.T).softmax(dim=1)
    error_BC = p_BC - functional.one_hot(classes_B, p_BC.shape[1])
    # A gradient is the outer product of error and input, so its norm is the product of theirs.
    lengths_B = error_BC.norm(dim=1) * inputs_Bm.norm(dim=1)
    shrunk_BC = error_BC * (norm / lengths_B.clamp_min(1e-12)).clamp(max=1.0)[:, None]
    return shrunk_BC.T @ inputs_Bm
