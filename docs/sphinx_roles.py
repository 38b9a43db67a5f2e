"""Show ``:class:`kfac.KFAC``` and its kind, as docstrings write them, as plain code."""

import re
from typing import Any

import griffe


class SphinxRoles(griffe.Extension):
    """Replaces roles in every docstring that is loaded."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite one docstring."""
        if obj.docstring:
            obj.docstring.value = re.sub(r":[a-z]+:`~?([^`]+)`", r"`\1`", obj.docstring.value)
