"""Histories of users that stay cached from one request to the next, within a budget of memory."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from gr.inference.cache import KeyValueStore, pages_for
from gr.inference.requests import Requests
from pipelines.history import Ints


@dataclass
class CachedUser:
    """What is cached of a user: all events of the last request but the newest."""

    ints: Ints
    """(E, I) int64, the encoded events."""
    codes: NDArray[np.uint8]
    """(E, S + 1)."""
    context: Ints
    """(X,) int64 of the request."""
    num_tokens: int
    """Of the whole sequence, context included."""
    lengths: list[int]
    """The same of what each stack reads."""
    pages: list[list[int]]
    """Of each stack; they may hold more than `lengths`, which is written over."""
    first_time: list[int]
    """s, of the first token that each stack reads."""
    whole_first_time: int
    """s, of the first token."""
    last_time: int
    """s, of the last token."""
    known: Ints
    """(I,) int64: a row of an event with the context values known last (data.context=merged)."""
    is_pinned: bool = field(default=False)
    """Whether a request reads it now."""


class UserCache:
    """Cached histories by user: the least recently used give way.

    Args:
        stores: pages of each stack.
        has_context: whether tokens of the request's context come before the history.
    """

    def __init__(self, stores: Sequence[KeyValueStore], *, has_context: bool) -> None:
        self.stores = stores
        self.has_context = has_context
        self.evictions = 0
        self._users: OrderedDict[int, CachedUser] = OrderedDict()

    def __len__(self) -> int:
        return len(self._users)

    def find(self, requests: Requests, b: int) -> tuple[CachedUser | None, str]:
        """Return what can be used for a request, or None and why nothing can.

        Args:
            requests: all of them.
            b: which one.
        """
        user = self._users.get(int(requests.user_id[b]))
        if user is None:
            return None, "not cached"
        if user.is_pinned:
            return None, "in use by another request"
        end = int(requests.counts[: b + 1].sum())
        begin = end - int(requests.counts[b])
        count = len(user.ints)
        if end - begin <= count:
            return None, "the history is shorter than what is cached"
        ints, codes = requests.ints[begin : begin + count], requests.codes[begin : begin + count]
        if not (np.array_equal(ints, user.ints) and np.array_equal(codes, user.codes)):
            return None, "the cached events are not the oldest of the history"
        if self.has_context and not np.array_equal(requests.context[b], user.context):
            return None, "the context has changed"
        return user, ""

    def reserve(self, num_tokens: Sequence[int]) -> list[list[int]] | None:
        """Return pages for so many tokens of each stack; None if what is in use leaves no room."""
        needed = [pages_for(n) for n in num_tokens]
        if not self._make_room(needed):
            return None
        return [store.allocate(n) for store, n in zip(self.stores, needed, strict=True)]

    def extend(self, pages: list[list[int]], num_tokens: Sequence[int]) -> bool:
        """Add to pages so that each stack holds so many tokens; false if there is no room."""
        have = [len(mine) for mine in pages]
        needed = [max(0, pages_for(n) - h) for n, h in zip(num_tokens, have, strict=True)]
        if not self._make_room(needed):
            return False
        for store, mine, n in zip(self.stores, pages, needed, strict=True):
            mine.extend(store.allocate(n))
        return True

    def keep(self, user_id: int, user: CachedUser) -> None:
        """Cache a user, pinned, as the most recently used, in the place of what was cached."""
        old = self._users.get(user_id)
        if old is not None and old.pages is not user.pages:
            assert not old.is_pinned
            self.release(old.pages)
        user.is_pinned = True
        self._users[user_id] = user
        self._users.move_to_end(user_id)

    def can_keep(self, user_id: int) -> bool:
        """Return whether no request reads what is cached of a user."""
        user = self._users.get(user_id)
        return user is None or not user.is_pinned

    def forget(self, user_id: int) -> None:
        """Drop a user that no request reads."""
        user = self._users.pop(user_id)
        assert not user.is_pinned
        self.release(user.pages)

    def clear(self) -> None:
        """Drop every user; those that a request reads once it is done."""
        for user_id, user in list(self._users.items()):
            if user.is_pinned:
                del self._users[user_id]
                user.ints = user.ints[:0]
            else:
                self.forget(user_id)

    def unpin(self, user_id: int, user: CachedUser) -> None:
        """Let a user whose request is done be used, or dropped."""
        user.is_pinned = False
        if self._users.get(user_id) is not user:
            self.release(user.pages)

    def release(self, pages: Sequence[Sequence[int]]) -> None:
        """Take pages back."""
        for store, mine in zip(self.stores, pages, strict=True):
            store.release(mine)

    def _make_room(self, needed: Sequence[int]) -> bool:
        """Drop users, the least recently used first, until there are as many free pages."""

        def lacks() -> bool:
            return any(n > s.num_free for n, s in zip(needed, self.stores, strict=True))

        if not lacks():
            return True
        idle = [(u, x) for u, x in self._users.items() if not x.is_pinned]
        free = [s.num_free for s in self.stores]
        for index in range(len(free)):
            free[index] += sum(len(x.pages[index]) for _, x in idle)
        if any(n > f for n, f in zip(needed, free, strict=True)):
            return False
        for user_id, _ in idle:
            if not lacks():
                break
            self.forget(user_id)
            self.evictions += 1
        return True
