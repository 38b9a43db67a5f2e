"""How a test plants a bug in the package."""

from collections.abc import Callable
from typing import Any

import pytest

Replacement = Callable[..., Any]  # of (original, *arguments)


def replace(owner: object, name: str, replacement: Replacement) -> Callable:
    """A mutant: `owner.name(...)` becomes `replacement(original, ...)`."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        original = getattr(owner, name)
        if isinstance(original, property):
            patch.setattr(owner, name, property(lambda self: replacement(original.fget, self)))
        else:
            patch.setattr(owner, name, lambda *a, **k: replacement(original, *a, **k))

    return plant
