"""Cases that take long and tell little more than others: only ``make test-thorough`` runs them."""

from collections.abc import Iterable

import pytest


def usual(cases: Iterable, kept: Iterable) -> list:
    """All cases for ``parametrize``; the usual run has only those that are ``kept``."""
    kept = list(kept)
    return [
        case if case in kept else pytest.param(case, marks=pytest.mark.thorough) for case in cases
    ]
