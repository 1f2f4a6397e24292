"""A baseline without a language model, at the epsilon of a private prompt.

It is logistic regression on words, trained by noisy gradient descent on all examples. An owner
whose prompt loses to it needs neither a language model nor a provider.

Shapes: N examples, C classes, d features.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_array
from scipy.special import softmax

from post_dist.data.tasks import Examples
from post_dist.errors import InputError
from post_dist.privacy.plan import ONE_EXAMPLE, PrivacyPlan

# Chosen on the demo's task, which the baseline gains from: of 2^10 and 2^12 features, 30 and 100
# steps, norms 0.3 and 1, rates 4 to 64.
_FEATURES = 2**12
_STEPS = 100
_CLIPPING_NORM = 0.5
_LEARNING_RATE = 32.0


def plan_like(statement: dict[str, Any]) -> PrivacyPlan | None:
    """Return the plan of the baseline with the epsilon, delta and examples of a prompt's statement.

    Returns:
        The plan; None if the statement is for users, declares no number of examples, or has an
        epsilon that no noise in range gives.
    """
    from post_dist.privacy.calibration import calibrated  # takes a second

    declared = statement["declared_examples"]
    if statement["unit"] != ONE_EXAMPLE or declared is None:
        return None
    plan = PrivacyPlan(
        noise_multiplier=1.0,
        sampling_probability=1.0,
        steps=_STEPS,
        max_grad_norm=_CLIPPING_NORM,
        delta=statement["delta"],
        expected_batch_size=float(declared),
        declared_examples=declared,
    )
    try:
        return calibrated(plan, statement["epsilon"])
    except InputError:
        return None


def private_text_scores(
    training: Examples, texts: Sequence[str], num_classes: int, plan: PrivacyPlan
) -> torch.Tensor:
    """Classify texts by their words, with a classifier that was trained privately.

    The noise is that of a floating-point generator: good enough for a row of a table, and not for a
    classifier that leaves the owner's machine.

    Args:
        training: the private examples.
        texts: the texts [N] to classify.
        num_classes: number C of classes.
        plan: see `plan_like`.

    Returns:
        Class scores [N, C].
    """
    features_Nd = _features(training.texts)
    classes_N = np.asarray(training.classes)
    noise = np.random.default_rng()
    weight_Cd = np.zeros((num_classes, _FEATURES))
    mean_Cd = np.zeros_like(weight_Cd)
    for step in range(plan.steps):
        total_Cd = _clipped_sum(features_Nd, classes_N, weight_Cd, plan.max_grad_norm)
        deviation = plan.noise_multiplier * plan.max_grad_norm
        total_Cd += noise.normal(0.0, deviation, total_Cd.shape)
        weight_Cd -= _LEARNING_RATE * total_Cd / plan.expected_batch_size
        # The mean over the last half of the steps has less noise than the last step.
        if step >= plan.steps // 2:
            mean_Cd += weight_Cd / (plan.steps - plan.steps // 2)
    return torch.from_numpy(_features(texts) @ mean_Cd.T).float()


def _features(texts: Sequence[str]) -> csr_array:
    """Return hashed word counts [N, d] of length 1.

    A vocabulary would be taken from the private texts. Hashing needs none.
    """
    from sklearn.feature_extraction.text import HashingVectorizer  # slow to import

    words = HashingVectorizer(n_features=_FEATURES, norm="l2", token_pattern=r"\w+")
    return csr_array(words.transform(texts))


def _clipped_sum(
    features_Nd: csr_array, classes_N: np.ndarray, weight_Cd: np.ndarray, norm: float
) -> np.ndarray:
    """Return the sum [C, d] of the examples' gradients, each clipped to a norm."""
    error_NC: np.ndarray = softmax(features_Nd @ weight_Cd.T, axis=1)
    error_NC[np.arange(len(classes_N)), classes_N] -= 1
    # A gradient is the outer product of error and feature, and no feature is longer than 1.
    lengths_N = np.linalg.norm(error_NC, axis=1)
    error_NC *= np.minimum(1.0, norm / np.maximum(lengths_N, 1e-12))[:, None]
    total_Cd: np.ndarray = (features_Nd.T @ error_NC).T
    return total_Cd
