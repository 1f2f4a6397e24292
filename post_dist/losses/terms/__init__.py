"""The terms of the distillation loss. This list is the only place that names them all."""

from post_dist.config.schema import Distill
from post_dist.losses.terms.base import HiddenTerm, LogitTerm, Term
from post_dist.losses.terms.cosine import HiddenCosine
from post_dist.losses.terms.cross_entropy import LabelCrossEntropy
from post_dist.losses.terms.kl import TeacherKl

TERMS: tuple[Term, ...] = (TeacherKl(), LabelCrossEntropy(), HiddenCosine())
"""All terms. To add one, list it here and add its weight to `Distill` in config/stages.py."""

# The two kinds are computed differently: piece by piece from the logits, or by autograd.
LOGIT_TERMS = tuple(term for term in TERMS if isinstance(term, LogitTerm))
HIDDEN_TERMS = tuple(term for term in TERMS if isinstance(term, HiddenTerm))


def weights_of(section: Distill) -> dict[str, float]:
    """Return the weight of each term in a run file, by the term's metric name."""
    return {term.metric: getattr(section, term.weight_field) for term in TERMS}


def hidden_terms_in_use(section: Distill) -> list[HiddenTerm]:
    """Return the terms with a weight above 0 that compare the teacher's hidden states."""
    return [term for term in HIDDEN_TERMS if getattr(section, term.weight_field) > 0]
