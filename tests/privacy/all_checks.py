"""All checks of private tuning, by name, with the module of each."""

from collections.abc import Callable

from privacy import (
    checks,
    clipping_checks,
    comparison_checks,
    gradient_checks,
    head_checks,
    ledger_checks,
    lora_checks,
    prefix_checks,
    process_checks,
    spending_checks,
    trace_checks,
    user_checks,
)

CHECKS: dict[str, Callable[[], None]] = {}
for module in (
    checks,
    clipping_checks,
    comparison_checks,
    gradient_checks,
    user_checks,
    head_checks,
    ledger_checks,
    lora_checks,
    prefix_checks,
    process_checks,
    spending_checks,
    trace_checks,
):
    for check in module.CHECKS:
        CHECKS[check.__name__] = check
