"""Suggest the settings of a private run for the number of gradients that there is time for.

The rules read nothing of the private data but its declared size. docs/settings.md has the runs that
they come from, and their error.
"""

from collections.abc import Mapping

from post_dist.config.stages import HEAD_DEFAULTS, AdapterName

LEAST_GRADIENTS = 320
"""The shortest run: 20 steps of 16 examples."""
FEW_GRADIENTS = 20_000
"""With fewer gradients, what a private prompt learns is a matter of chance."""

_STEPS_AT = (5_120, 80)
"""So many gradients are so many steps."""
_STEPS_EXPONENT = 0.3
"""The number of steps rises with this power of the number of gradients."""
_LEAST_STEPS = 20
_MOST_STEPS = 1000
_LARGEST_SHARE = 0.25
"""Largest share of the examples in a step. With more time, there are more steps."""
PROMPT_SETTINGS: Mapping[str, float] = {
    "privacy.learning_rate": 0.02,
    "privacy.max_grad_norm": 1.0,
    "tune.num_virtual_tokens": 10,
}
"""Settings of a prompt that are the same for any number of gradients, by field of the run file."""

_HEAD_SHARE = 0.1
"""Share of the examples in a step of a head."""


def suggested_plan(adapter: AdapterName, gradients: float, examples: float) -> dict[str, float]:
    """Divide a number of gradients into steps.

    Args:
        adapter: what is tuned.
        gradients: the number of gradients that there is time for, `LEAST_GRADIENTS` or more.
        examples: the declared number of examples.

    Returns:
        `privacy.expected_batch_size` and `privacy.steps`.
    """
    if adapter == "head":
        # A head has time for all gradients that it needs, as a rule.
        steps = HEAD_DEFAULTS["steps"]
        batch_size = min(_HEAD_SHARE * examples, gradients / steps)
    else:
        # More gradients make longer runs and larger batches at once.
        known_gradients, known_steps = _STEPS_AT
        wanted_steps = known_steps * (gradients / known_gradients) ** _STEPS_EXPONENT
        batch_size = gradients / max(wanted_steps, _LEAST_STEPS)
        batch_size = min(batch_size, _LARGEST_SHARE * examples)
        steps = min(round(gradients / batch_size), _MOST_STEPS)
    return {"privacy.expected_batch_size": max(1, round(batch_size)), "privacy.steps": steps}
