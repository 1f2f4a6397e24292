"""The cosine distance of the last hidden states.

Shapes: N positions, d width.
"""

import torch
from torch.nn import functional

from post_dist.losses.terms.base import HiddenTerm


class HiddenCosine(HiddenTerm):
    """One minus the cosine of the last hidden states, the third term of the paper's eq. 1."""

    metric = "cos"
    weight_field = "alpha_cos"

    def value(self, student_Nd: torch.Tensor, teacher_Nd: torch.Tensor) -> torch.Tensor:
        """Return the mean of the term over positions, differentiable by autograd."""
        # In fp32, because the square of a norm can overflow fp16.
        cosines_N = functional.cosine_similarity(student_Nd.float(), teacher_Nd.float(), dim=-1)
        return 1 - cosines_N.mean()
