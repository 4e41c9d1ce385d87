"""What is to be done for some requests: whose cached events are used, where the new ones go.

Letters: B requests.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from gr.inference.cache import KeyValueStore
from gr.inference.encoded import NewTokens, Part, before_last_event
from gr.inference.requests import RequestEncoder, Requests
from gr.inference.users import CachedUser, UserCache
from pipelines.batch import SequenceBatch
from pipelines.history import TIMESTAMP, Ints
from pipelines.unify import token_counts

FRESH, KNOWN, ALONE = range(3)
"""Encoded whole into pages of the cache; after cached events; whole, into memory of its own."""


class Plan:
    """Pins and pages of requests, until `release`.

    Args:
        encoder: of the requests.
        requests: all of them.
        cache: of users; None: there is none.
        unstable: why nothing can be cached across requests; "": it can.
    """

    def __init__(
        self,
        encoder: RequestEncoder,
        requests: Requests,
        cache: UserCache | None,
        unstable: str,
    ) -> None:
        self.encoder, self.requests, self.cache = encoder, requests, cache
        self.is_stable = not unstable
        B = requests.num_requests
        self.kind = np.full(B, ALONE)
        self.reasons = [unstable or "there is no cache (cache_bytes=0)"] * B
        self.reused = np.zeros(B, np.int64)
        self._users: dict[int, CachedUser] = {}
        """By request: pinned."""
        self._pages: dict[int, list[list[int]]] = {}
        """By request: those that no cached user has."""
        if cache is not None:
            for b in range(B):
                self._place(b, cache, unstable)

    def _place(self, b: int, cache: UserCache, unstable: str) -> None:
        count = int(self.requests.counts[b])
        user = None
        if not unstable:
            user, self.reasons[b] = cache.find(self.requests, b)
        if user is not None:
            user.is_pinned = True
            self._users[b] = user
            more = self.encoder.most_tokens(count - len(user.ints))
            if cache.extend(user.pages, [n + more for n in user.lengths]):
                self.kind[b], self.reused[b] = KNOWN, user.num_tokens
                return
            self.reasons[b] = "the cache has no room"
            self._unpin(b)
        pages = cache.reserve([self.encoder.most_tokens(count)] * len(cache.stores))
        if pages is None:
            self.reasons[b] = "the cache has no room"
        else:
            self.kind[b], self._pages[b] = FRESH, pages

    def groups(self) -> Iterator[Ints]:
        """Yield (n,) int64: requests that go through the layers together."""
        for kind in (FRESH, KNOWN, ALONE):
            chosen = np.flatnonzero(self.kind == kind)
            if len(chosen):
                yield chosen

    def users_of(self, chosen: Ints) -> list[CachedUser]:
        """Return what is cached of each request of a group; empty: nothing is."""
        return [self._users[b] for b in chosen.tolist() if b in self._users]

    def pages_of(
        self, chosen: Ints, new_stores: Callable[[Sequence[int]], list[KeyValueStore]]
    ) -> tuple[list[KeyValueStore], list[list[list[int]]]]:
        """Return the store of each stack, and in it the pages of each request of a group.

        Args:
            chosen: the group.
            new_stores: makes stores with room for sequences of so many tokens.
        """
        if self.kind[chosen[0]] == ALONE:
            sizes = [self.encoder.most_tokens(int(self.requests.counts[b])) for b in chosen]
            stores = new_stores(sizes)
            by_request = [[s.allocate_for(n) for s in stores] for n in sizes]
        else:
            assert self.cache is not None
            stores = list(self.cache.stores)
            by_request = [
                self._users[b].pages if b in self._users else self._pages[b]
                for b in chosen.tolist()
            ]
        return stores, [list(pages) for pages in zip(*by_request, strict=True)]

    def keep(
        self, chosen: Ints, batch: SequenceBatch, new: Sequence[NewTokens], part: Part
    ) -> None:
        """Cache the events but the newest of a group that went through the layers.

        Args:
            chosen: the group.
            batch: what was laid out for it.
            new: what of it each stack computed.
            part: what came out.
        """
        cache, requests = self.cache, self.requests
        if cache is None or not self.is_stable or self.kind[chosen[0]] == ALONE:
            return
        has_events = batch.session_start > batch.num_context
        per_event = token_counts(self.encoder.data).per_history_event
        end_B = before_last_event(batch, per_event)
        ends = np.cumsum(requests.counts)
        for i, b in enumerate(chosen.tolist()):
            user_id, old = int(requests.user_id[b]), self._users.get(b)
            count = int(requests.counts[b])
            if not has_events[i] or count < 2 or (old is None and not cache.can_keep(user_id)):
                continue
            rows = slice(int(ends[b]) - count, int(ends[b]) - 1)
            end = int(end_B[i])
            begin = int(batch.offsets[i]) + (0 if old is None else batch.num_context)
            lengths = []
            for each in new:
                first, last = each.info.offsets[i], each.info.offsets[i + 1]
                own = each.tokens[first:last]
                lengths.append(int(each.cached[i]) + int(torch.searchsorted(own, end)))
            last_time = 0 if old is None else old.last_time
            if end > begin:
                last_time = int(batch.timestamp[end - 1])
            user = CachedUser(
                ints=requests.ints[rows].copy(),
                codes=requests.codes[rows].copy(),
                context=requests.context[b].copy(),
                num_tokens=(0 if old is None else old.num_tokens) + end - begin,
                lengths=lengths,
                pages=self._pages.pop(b) if old is None else old.pages,
                first_time=[int(each.first_time[i]) for each in new],
                whole_first_time=int(part.behind.before.first_time[i]),
                last_time=last_time,
                known=self.encoder.known_before_last(requests, b),
            )
            cache.keep(user_id, user)
            self._users[b] = user

    def keep_next(self, chosen: Ints, after: Requests) -> None:
        """Cache the events but the newest of users of whom something is cached.

        Of layouts without series of the context, where each event has as many tokens.

        Args:
            chosen: a group that went through the layers.
            after: RequestEncoder.after of it.
        """
        assert self.cache is not None
        requests, ends = self.requests, np.cumsum(after.counts)
        per_event = token_counts(self.encoder.data).per_history_event
        whole_ends = np.cumsum(requests.counts)
        for i, b in enumerate(chosen.tolist()):
            user_id, user = int(requests.user_id[b]), self._users[b]
            added = int(after.counts[i]) - 1
            rows = slice(int(whole_ends[b] - requests.counts[b]), int(whole_ends[b]) - 1)
            if added:
                user.ints, user.codes = requests.ints[rows].copy(), requests.codes[rows].copy()
                user.num_tokens += added * per_event
                user.lengths = [n + added * per_event for n in user.lengths]
                user.last_time = int(after.ints[ends[i] - 2, TIMESTAMP])
            self.cache.keep(user_id, user)

    def release(self) -> None:
        """Let go of everything that the requests hold."""
        for b in list(self._users):
            self._unpin(b)
        if self.cache is not None:
            for pages in self._pages.values():
                self.cache.release(pages)
        self._pages.clear()

    def _unpin(self, b: int) -> None:
        assert self.cache is not None
        self.cache.unpin(int(self.requests.user_id[b]), self._users.pop(b))
