"""Autotune search spaces."""

import os
from typing import Any


def interpretable(candidates: list[Any]) -> list[Any]:
    """Return the search space, or its first entry under the interpreter, which cannot time."""
    return candidates[:1] if os.environ.get("TRITON_INTERPRET") == "1" else candidates
