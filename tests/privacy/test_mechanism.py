"""The private mechanism as it is: every check that the planted bugs of test_mutants.py must fail."""

from collections.abc import Callable

import pytest
from privacy.checks import CHECKS


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_mechanism(check: Callable[[], None]) -> None:
    check()
