"""What tokens stand for.

Apart from batches, which need torchrec's tensors, so that a model can be used without them.
"""

from enum import IntEnum


class TokenKind(IntEnum):
    """What a token stands for; a sequence is context, then history and session in time order."""

    CONTEXT = 0
    ITEM = 1
    ACTION = 2
    EVENT = 3
    """Item and action in one (layout merged)."""
    CANDIDATE = 4
    """An item whose action is not known; stands at the end (anchor session)."""
