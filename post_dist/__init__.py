"""Private soft-prompt transfer in three stages: distill, tune, transfer (POST, arXiv 2506.16196).

The names of the Python API (`post_dist.api`) are here too, as in `post_dist.tune(config)`. They are
imported at their first use, so that `import post_dist` loads neither torch nor pydantic.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from post_dist.api import (
        CorpusResult,
        EvaluationResult,
        PrivacyCost,
        PromptResult,
        PublicPromptResult,
        SignalsResult,
        StudentResult,
        TimedSettings,
        TransferResult,
        account,
        audit_membership,
        distill,
        evaluate,
        load_prompt,
        load_run,
        pipeline,
        settings_for_minutes,
        tokenize_corpus,
        transfer,
        tune,
        warm_start,
        write_signals,
    )

__version__ = "0.2.0"

__all__ = [
    "CorpusResult",
    "EvaluationResult",
    "PrivacyCost",
    "PromptResult",
    "PublicPromptResult",
    "SignalsResult",
    "StudentResult",
    "TimedSettings",
    "TransferResult",
    "account",
    "audit_membership",
    "distill",
    "evaluate",
    "load_prompt",
    "load_run",
    "pipeline",
    "settings_for_minutes",
    "tokenize_corpus",
    "transfer",
    "tune",
    "warm_start",
    "write_signals",
]


def __getattr__(name: str) -> object:
    """Import a name of the API at its first use (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from post_dist import api

    return getattr(api, name)


def __dir__() -> list[str]:
    """List the names of the API too, for completion in a notebook."""
    return sorted({*globals(), *__all__})
