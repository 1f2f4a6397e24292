"""Fit a linear head on the large LLM to the wanted class scores, on public text.

The LLM runs forward alone, and the fit is a convex problem. So it has no steps and no learning
rate, and nothing is trained through the layers of the LLM.

Shapes: N public examples, C classes, n prompt tokens, d width, m features of the head, k values of
the hidden states of several layers.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn import functional

from post_dist.artifacts.head import LinearHead
from post_dist.models.answers import check_finite
from post_dist.runtime.watchdog import phase
from post_dist.stages.transfer.objective import TransferObjective
from post_dist.stages.transfer.public_reading import PromptedStates, PublicReading

log = logging.getLogger(__name__)

_PENALTIES = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
"""Weights of the squared norm of a head. The one that is best on held-out text is taken.

Features have length 1, so a head that moves scores by a few nats has a squared norm of thousands.
"""
_PENALTY_OF_LAYERS = 1e-5
"""The weight with which layers are compared."""
_HELD_OUT = 0.25
"""Share of the texts that are held out."""
_ORDER_SEED = 0
"""Texts are drawn at random, because a file may be sorted, or alternate between two sources."""
TEXTS_AT_ALL_LAYERS = 512
"""Largest number of texts of which all layers are read, to choose some of them."""
_ITERATIONS = 100
_TOLERANCE = 1e-6
"""The search ends with a step that gains fewer nats. Stricter ones moved no accuracy."""
_UNEXPLAINED = 0.5
"""Share of the divergence above which a head is little use. That of film reviews leaves 7 to 9%."""


@dataclass(frozen=True)
class FittedHead:
    """A head that was fitted to public text.

    Attributes:
        head: the head.
        scores: class scores [N, C] of the public text with it.
        statistics: `layers_above_head`; and two divergences from the wanted scores on held-out
            texts. `held_out_kl_nats` is that of a head which was fitted to the other texts. It is
            a little too small, because it chose the penalty. `kl_without_head_nats` is that of the
            label words alone.
    """

    head: LinearHead
    scores: torch.Tensor
    statistics: Mapping[str, float]


def fit_head(
    reading: PublicReading,
    objective: TransferObjective,
    prompt_nd: torch.Tensor,
    states: PromptedStates,
) -> FittedHead:
    """Fit a head behind a prompt. All ranks call it.

    Args:
        reading: the target on the public text.
        objective: the scores to imitate.
        prompt_nd: the prompt [n, d] before each text, on the target's device.
        states: hidden states behind the last prompt.

    Raises:
        OutputsNotFinite: the target's outputs with the prompt overflow.
    """
    model = reading.model
    world = reading.world
    count = len(model.layers)
    temperature = objective.section.temperature
    wanted_NC = objective.wanted_scores

    # Choose the layers on some of the texts, because the states of all layers need much memory.
    few = len(wanted_NC) <= TEXTS_AT_ALL_LAYERS
    rows = None if few else sorted(_drawn(len(wanted_NC))[:TEXTS_AT_ALL_LAYERS].tolist())
    sample_Nk = states.of(reading, prompt_nd, range(count), rows)
    check_finite(sample_Nk)
    of_sample_NC = wanted_NC if rows is None else wanted_NC[rows]
    sample = _Scores(reading.headed_scores(sample_Nk), of_sample_NC, temperature)
    depth = min(objective.section.head_layers, count)
    chosen = world.on_main(partial(_best_layers, sample_Nk, sample, depth, model.width))

    # Fit to all texts. The head of the chosen layers says which states that takes.
    layers = chosen.layers(model.width, count)
    if few:
        states_of_layers = sample_Nk.split(model.width, dim=1)
        whole_Nk = torch.cat([states_of_layers[layer] for layer in layers], dim=1)
    else:
        whole_Nk = states.of(reading, prompt_nd, layers)
        check_finite(whole_Nk)
    scores = _Scores(reading.headed_scores(whole_Nk), wanted_NC, temperature)
    return world.on_main(partial(_fitted, chosen, whole_Nk, scores))


@dataclass(frozen=True)
class _Scores:
    """Class scores, and those that they shall become.

    Attributes:
        base_NC: scores of the label words, to which a head adds its own.
        wanted_NC: the scores to imitate.
        temperature: temperature of the distributions that are compared.
    """

    base_NC: torch.Tensor
    wanted_NC: torch.Tensor
    temperature: float

    def rows(self, chosen_N: torch.Tensor) -> "_Scores":
        """Return the scores of some texts."""
        return _Scores(self.base_NC[chosen_N], self.wanted_NC[chosen_N], self.temperature)

    def divergence(self, added_NC: torch.Tensor) -> torch.Tensor:
        """Compute the mean KL divergence from the wanted scores in nats, in fp64.

        Args:
            added_NC: what a head adds to the scores.
        """
        wanted_NC = (self.wanted_NC.double() / self.temperature).softmax(dim=1)
        reached_NC = (self.base_NC.double() + added_NC) / self.temperature
        cross_entropy = functional.cross_entropy(reached_NC, wanted_NC)
        return cross_entropy - torch.special.entr(wanted_NC).sum(dim=1).mean()


def _best_layers(states_Nk: torch.Tensor, scores: _Scores, depth: int, width: int) -> LinearHead:
    """Choose neighboring layers on held-out texts.

    Args:
        states_Nk: states of all layers.
        scores: scores of the same texts.
        depth: number of layers that the head reads.
        width: width d of a state.

    Returns:
        A head of these layers, not trained.
    """
    divergences: list[float] = []
    heads = []
    for head, hidden_Nm in _heads(states_Nk, scores.wanted_NC.shape[1], depth, width):
        divergences += _held_out(_features(head, hidden_Nm), scores, (_PENALTY_OF_LAYERS,))
        heads.append(head)
    return heads[divergences.index(min(divergences))]


def _heads(
    states_Nk: torch.Tensor, num_classes: int, depth: int, width: int
) -> Iterator[tuple[LinearHead, torch.Tensor]]:
    """Yield a head for each place in the model, and the states that it reads."""
    count = states_Nk.shape[1] // width
    # Neighbouring places share half of their layers.
    for above in range(0, count - depth + 1, max(1, depth // 2)):
        end = (count - above) * width
        hidden_Nm = states_Nk[:, end - depth * width : end]
        yield LinearHead.untrained(hidden_Nm, num_classes, above), hidden_Nm


def _fitted(chosen: LinearHead, states_Nk: torch.Tensor, scores: _Scores) -> FittedHead:
    """Fit a head of chosen layers to all texts."""
    hidden_Nm = chosen.read(states_Nk)
    head = LinearHead.untrained(hidden_Nm, len(chosen.bias), chosen.above)
    features_Nm = _features(head, hidden_Nm)
    divergences = _held_out(features_Nm, scores, _PENALTIES)
    least = min(divergences)
    weight_Cm, bias_C = _minimum(features_Nm, scores, _PENALTIES[divergences.index(least)])
    held_out = scores.rows(_is_held_out(len(features_Nm)))
    without = float(held_out.divergence(torch.zeros_like(held_out.base_NC)))
    log.info(
        "transfer: the head has %d layers above it; on held-out text it is %.4f nats from the "
        "wanted scores, and %.4f without it",
        head.above,
        least,
        without,
    )
    if least > _UNEXPLAINED * without:
        log.warning(
            "transfer: the head leaves %.0f%% of that divergence; give it more public text, or "
            "train a prompt",
            100 * least / without,
        )
    statistics = {
        "held_out_kl_nats": least,
        "kl_without_head_nats": without,
        "layers_above_head": head.above,
    }
    fitted = head.with_values(weight_Cm, bias_C)
    return FittedHead(fitted, scores.base_NC + fitted.scores(hidden_Nm), statistics)


def _features(head: LinearHead, hidden_Nm: torch.Tensor) -> torch.Tensor:
    """Return what the head reads in fp32, which takes half the time and memory of fp64."""
    return head.features(hidden_Nm).float()


def _held_out(
    features_Nm: torch.Tensor, scores: _Scores, penalties: Sequence[float]
) -> list[float]:
    """Fit a head to most texts with each penalty, and compute its divergence on the others."""
    held_out_N = _is_held_out(len(features_Nm))
    # Large features are copied once, and not for each penalty.
    fitted_Nm = features_Nm[~held_out_N]
    fitted_scores = scores.rows(~held_out_N)
    other_Nm = features_Nm[held_out_N]
    other_scores = scores.rows(held_out_N)
    divergences = []
    for penalty in penalties:
        weight_Cm, bias_C = _minimum(fitted_Nm, fitted_scores, penalty)
        divergences.append(float(other_scores.divergence(other_Nm @ weight_Cm.T + bias_C)))
    return divergences


def _is_held_out(count: int) -> torch.Tensor:
    """Return a mask [N] of the texts that are held out."""
    mask_N = torch.zeros(count, dtype=torch.bool)
    mask_N[_drawn(count)[: int(_HELD_OUT * count)]] = True
    return mask_N


def _drawn(count: int) -> torch.Tensor:
    """Return the numbers of all texts in a random order, always the same."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(_ORDER_SEED))


def _minimum(
    features_Nm: torch.Tensor, scores: _Scores, penalty: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Minimize the divergence plus the penalty; weight [C, m] and bias [C] of a head."""
    classes = scores.wanted_NC.shape[1]
    weight_Cm = features_Nm.new_zeros(classes, features_Nm.shape[1], requires_grad=True)
    bias_C = features_Nm.new_zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight_Cm, bias_C],
        max_iter=_ITERATIONS,
        tolerance_change=_TOLERANCE,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def loss() -> torch.Tensor:
        # This tells the watchdog that the run is alive. Large heads take minutes.
        phase("fitting a head")
        optimizer.zero_grad()
        divergence = scores.divergence(features_Nm @ weight_Cm.T + bias_C)
        penalized = divergence + penalty * weight_Cm.square().sum()
        penalized.backward()
        return penalized

    optimizer.step(loss)
    return weight_Cm.detach(), bias_C.detach()
