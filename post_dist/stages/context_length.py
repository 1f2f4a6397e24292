"""Check that a soft prompt and a text fit into a model's context together."""

from post_dist.conflicts import Conflict


def context_conflicts(
    whose: str, context_length: float, num_virtual_tokens: int, max_length: int, hint: str
) -> list[Conflict]:
    """Compare the length of prompt and text with the context length of a model.

    Args:
        whose: name of the model in the message, such as `the student`.
        context_length: most tokens that the model can read; infinite if it has no limit.
        num_virtual_tokens: tokens of the soft prompt; 0 without one.
        max_length: most tokens of a text with its response.
        hint: what the user can shorten.
    """
    if num_virtual_tokens + max_length <= context_length:
        return []
    too_long = f"{max_length} tokens do not fit into the context of {whose} ({context_length})"
    message = f"texts of {too_long}"
    if num_virtual_tokens:
        message = f"a prompt of {num_virtual_tokens} tokens and texts of {too_long}"
    return [Conflict(message, hint)]
