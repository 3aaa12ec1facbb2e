"""Choose the cases that `make test` runs; `make test-slow` runs the others."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def only(quick: Collection[Any], cases: Iterable[Any]) -> list[Any]:
    """Mark all cases but the quick ones as slow; a tuple is a case of several parameters."""
    return [case if case in quick else _slow(case) for case in cases]


def _slow(case: Any) -> Any:
    values = case if isinstance(case, tuple) else (case,)
    return pytest.param(*values, marks=pytest.mark.slow)
