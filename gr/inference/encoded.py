"""Encoded histories, and the passes through a stack of layers that make and read them.

Everything here is in host memory, but for user vectors and the store.

Letters: B requests, L tokens, R new tokens of a pass.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gr.inference.cache import KeyValueStore, page_table, rows_in_pages
from gr.inference.requests import Requests
from gr.inference.stack import Layout, Pass
from gr.inference.users import CachedUser
from gr.sequence import Before, Group, SequenceInfo, sequence_info
from pipelines.batch import SequenceBatch, TokenKind
from pipelines.history import Ints


@dataclass
class StackCache:
    """What one stack of layers keeps of some histories."""

    store: KeyValueStore
    """Holds keys and values."""
    pages: list[list[int]]
    """Of each history."""
    lengths: Tensor
    """(layouts, B) int64: tokens in front of the candidates, in each layout."""
    first_time: Tensor
    """(B,) int64 s: of the first token."""


class Behind(NamedTuple):
    """What candidates of some requests find in front of them."""

    stacks: list[StackCache]
    """Of the encoder; of a mixture one each."""
    before: Before
    """The whole sequences in front of the candidates, without their context tokens."""
    session_start: Tensor
    """(n,) int64: index of the first token of the session, which the candidates are of."""


@dataclass
class Part:
    """Requests that went through the layers together."""

    chosen: Ints
    """(n,) int64: which."""
    made: Callable[[], Behind]
    """Makes `behind`, which nobody reads where the candidates have been scored already."""
    is_scored: bool = False
    """Whether `Scorer.answer` made the candidates' rows with the histories."""

    @functools.cached_property
    def behind(self) -> Behind:
        """What is in front of candidates."""
        return self.made()


@dataclass
class EncodedHistory:
    """Requests whose histories went through the model."""

    requests: Requests
    user_vectors: Tensor | None
    """(B, item dim) float32, for retrieval: to be compared with SequenceModel.item_vectors. None
    without a retrieval head; zeros where `has_history` is false."""
    reused: Ints
    """(B,) int64: tokens whose keys and values were cached, from an earlier request."""
    reasons: list[str]
    """Of each request: why the whole history was encoded; "": it was not."""
    parts: list[Part] = field(default_factory=list)
    """All requests, each in one of them."""

    @property
    def has_history(self) -> Tensor:
        """(B,) bool, on the host: whether there is an event to predict from."""
        return torch.from_numpy(self.requests.counts > 0)


@dataclass(frozen=True)
class Scores:
    """What the model says about candidates."""

    ranking: dict[str, Tensor]
    """Task -> (M,) float32: the logit of a binary task, the transformed value of another; in the
    order of the candidates, request after request."""
    counts: Ints
    """(B,) int64: candidates of each request."""


@dataclass(frozen=True)
class NewTokens:
    """Tokens that a stack has yet to compute."""

    info: SequenceInfo
    """Of them; `before` is what is cached, if anything of any sequence is."""
    tokens: Tensor
    """(R,) int64: which of the batch they are."""
    cached: Tensor
    """(B,) int64."""
    first_time: Tensor
    """(B,) int64 s: of the first token of each sequence, cached or not."""


def read_structure(
    batch: SequenceBatch,
    *,
    before: Before | None = None,
    keep_history: int = 0,
    groups: Sequence[Group] = (),
) -> SequenceInfo:
    """Return the structure of a batch; its tails are candidates and the token in front of them.

    That token is read as training reads it for retrieval.

    Args:
        batch: with raw ids.
        before: what is cached, without context.
        keep_history: as of sequence_info.
        groups: likewise.
    """
    first_B = batch.offsets[1:] - batch.num_candidates
    has_one_B = batch.lengths > batch.num_candidates
    positions = torch.cat([first_B, first_B[has_one_B] - 1])
    read = replace(batch, ranking_positions=positions, retrieval_positions=positions[:0])
    info = sequence_info(read, keep_history=keep_history, groups=groups)
    return replace(info, before=before)


def behind_cache(users: Sequence[CachedUser], num_context: int) -> Before:
    """Return what is cached of users, without context tokens."""
    return Before(
        num_tokens=torch.tensor([x.num_tokens - num_context for x in users]),
        first_time=torch.tensor([x.whole_first_time for x in users]),
        last_time=torch.tensor([x.last_time for x in users]),
    )


def new_tokens(host: SequenceInfo, users: Sequence[CachedUser]) -> list[NewTokens]:
    """Return what each stack has to compute of a batch.

    Args:
        host: `read_structure` of it.
        users: what is cached of each sequence; empty: nothing is. Its context tokens are cached.
    """
    of_all = torch.arange(int(host.offsets[-1]))
    parts = [(x.info, x.tokens) for x in host.groups] or [(replace(host, before=None), of_all)]
    found = []
    for index, (info, tokens) in enumerate(parts):
        if not users:
            cached = torch.zeros_like(info.session_start)
            found.append(NewTokens(info, tokens, cached, info.timestamp[info.offsets[:-1]]))
            continue
        cached = torch.tensor([x.lengths[index] for x in users])
        first_time = torch.tensor([x.first_time[index] for x in users])
        before = Before(cached, first_time, first_time)
        first_B = info.offsets[:-1] + info.num_context
        rows, info = part_of(info, first_B, info.offsets.diff() - info.num_context, before)
        found.append(NewTokens(info, tokens[rows], cached, first_time))
    return found


def history_pass(
    new: NewTokens,
    store: KeyValueStore,
    pages: list[list[int]],
    num_layouts: int,
    *,
    windowed: bool = False,
) -> tuple[Pass, StackCache, Tensor]:
    """Return a pass of new tokens of histories, and of candidates or an unknown item behind them.

    Args:
        new: the tokens.
        store: where keys and values go.
        pages: of each sequence.
        num_layouts: of the stack.
        windowed: whether a window applies to candidates.

    Returns:
        The pass; what it fills; (B,) int64, the row of its result that retrieval reads.
    """
    info, cached = new.info, new.cached
    is_whole = info.before is None
    counts_B = info.offsets.diff() - info.num_candidates
    kept_B = counts_B
    if info.kept is not None:
        dropped_B = info.session_start - info.num_context - info.kept.history
        kept_B = counts_B - dropped_B.clamp(min=0)
    table = page_table(pages)
    layouts = []
    for number, mine_B in enumerate([counts_B, kept_B][:num_layouts]):
        mine, first = mine_B.tolist(), cached.tolist()
        # The tokens of a sequence are the first of it that the layout has.
        starts = (mine_B.cumsum(0) - mine_B + info.num_candidates.cumsum(0)).tolist()
        behind = info.num_candidates.tolist()
        keep = [np.arange(s - c, s - c + n) for s, c, n in zip(starts, behind, mine, strict=True)]
        layouts.append(
            Layout(
                number=number,
                lengths=cached,
                max_len=0 if is_whole else int(cached.max()),
                rows=torch.from_numpy(rows_in_pages(pages, first, mine)),
                keep=torch.from_numpy(np.concatenate(keep)),
            )
        )
    given = Pass(
        info=info,
        pages=table,
        layouts=tuple(layouts),
        of_tails=is_whole,
        windowed_candidates=windowed and not is_whole,
    )
    lengths = torch.stack([cached + counts_B, cached + kept_B][:num_layouts])
    ends = info.tail_offsets if is_whole else info.offsets
    cache = StackCache(store, pages, lengths, new.first_time)
    return given, cache, (ends[1:] - info.num_candidates - 1).clamp(min=0)


def item_rows(given: Pass) -> Tensor:
    """Return (M,) int64: the rows of the result of `history_pass` that are of items behind it."""
    info = given.info
    ends_B = (info.tail_offsets if given.of_tails else info.offsets)[1:]
    counts_B = info.num_candidates
    total = int(counts_B.sum())
    shift_B = ends_B - counts_B.cumsum(0)
    return torch.repeat_interleave(shift_B, counts_B, output_size=total) + torch.arange(total)


def candidate_pass(info: SequenceInfo, cache: StackCache, asked: Tensor, *, windowed: bool) -> Pass:
    """Return a pass of candidates behind what a stack keeps.

    Args:
        info: of the candidates.
        cache: of the stack.
        asked: (n,) int64: the histories that they are of.
        windowed: whether a window applies to them.
    """
    lengths = cache.lengths[:, asked]
    first_time = cache.first_time[asked]
    layouts = tuple(Layout(n, x, int(x.max())) for n, x in enumerate(lengths))
    return Pass(
        info=replace(info, before=Before(lengths[0], first_time, first_time)),
        pages=page_table([cache.pages[b] for b in asked.tolist()]),
        layouts=layouts,
        windowed_candidates=windowed,
        of_one=len(asked) == 1,
    )


def part_of(
    info: SequenceInfo, first_B: Tensor, counts_B: Tensor, before: Before | None = None
) -> tuple[Tensor, SequenceInfo]:
    """Return the index and the structure of some tokens of each sequence that end it or go on.

    Args:
        info: of the batch.
        first_B: int64: first token of each sequence, of the batch.
        counts_B: int64: tokens from there on; candidates among them are those that are left.
        before: of the tokens in front of them.
    """
    total = int(counts_B.sum())
    offsets = torch.zeros(len(counts_B) + 1, dtype=torch.int64)
    offsets[1:] = counts_B.cumsum(0)
    chosen: Tensor | slice
    if len(counts_B) == 1:  # as it lies there: what is long is not copied
        first = int(first_B)
        rows_R, chosen = torch.arange(first, first + total), slice(first, first + total)
    else:
        shift_R = torch.repeat_interleave(first_B - offsets[:-1], counts_B, output_size=total)
        rows_R = chosen = shift_R + torch.arange(total)
    longest = int(counts_B.max()) if len(counts_B) else 0
    part = SequenceInfo(
        offsets=offsets,
        tail_offsets=offsets,
        max_len=longest,
        max_tail_len=longest,
        timestamp=info.timestamp[chosen],
        query_time=info.query_time[chosen],
        session_start=info.session_start,
        num_context=info.num_context,
        num_candidates=torch.minimum(info.num_candidates, counts_B),
        num_rows=total,
        before=before,
    )
    return rows_R, part


def history_end(batch: SequenceBatch, before: Before | None) -> tuple[Before, Tensor]:
    """Return the sequences in front of their candidates, and where their sessions start.

    Args:
        batch: histories, or the ends of them, with candidates or an unknown item behind each.
        before: what was cached, without context; None: nothing.
    """
    num_new = batch.lengths - batch.num_candidates - batch.num_context
    first_time = batch.timestamp[batch.offsets[:-1]]
    last_B = batch.offsets[1:] - batch.num_candidates - 1
    last_time = batch.timestamp[last_B.clamp(min=0)]
    if before is None:
        return Before(num_new, first_time, last_time), batch.session_start
    # There is a new event at least, so that the last token is here.
    whole = Before(before.num_tokens + num_new, before.first_time, last_time)
    return whole, batch.session_start + before.num_tokens


def before_last_event(batch: SequenceBatch, per_event: int) -> Tensor:
    """Return (B,) int64: the token of the batch with which the last event of each history begins.

    The tokens of series that stand in front of it are its own.

    Args:
        batch: histories, each of an event at least.
        per_event: tokens of an event.
    """
    first_B = (batch.offsets[:-1] + batch.session_start - per_event).numpy().copy()
    kind = batch.token_kind.numpy()
    least_B = batch.offsets[:-1].numpy() + batch.num_context
    if batch.context_positions:
        for b in range(len(first_B)):
            while first_B[b] > least_B[b] and kind[first_B[b] - 1] == TokenKind.CONTEXT:
                first_B[b] -= 1
    return torch.from_numpy(np.asarray(first_B, np.int64))
