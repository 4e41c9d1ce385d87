"""Layout of a batch: from events in order to one jagged sequence of tokens each.

Letters: B sequences, E events, L tokens, A tokens that carry an action, P ranking positions,
R retrieval positions, S action signals.
"""

from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from pipelines.config import DataConfig
from pipelines.history import ANCHOR, NUM_EVENTS, NUM_HISTORY, TIMESTAMP, Ints
from pipelines.token_kind import TokenKind

CONTEXT, ITEM, ACTION = int(TokenKind.CONTEXT), int(TokenKind.ITEM), int(TokenKind.ACTION)
EVENT, CANDIDATE = int(TokenKind.EVENT), int(TokenKind.CANDIDATE)


class LayoutRules(NamedTuple):
    """What the kernel needs to know of the configuration."""

    interleaved: bool
    """An item and its action are two tokens."""
    anchor_session: bool
    """The session's events are candidates."""
    supervise_history: bool
    rank: bool
    """There are ranking positions."""
    num_context: int
    """Context tokens of every sequence."""


class Tokens(NamedTuple):
    """A batch after layout; the fields of the same name of SequenceBatch say more."""

    offsets: Ints
    """(B + 1,) int64."""
    kind: Ints
    """(L,) int64."""
    timestamp: Ints
    """(L,) int64 s."""
    query_time: Ints
    """(L,) int64 s."""
    session_start: Ints
    """(B,) int64, index within the sequence."""
    action_codes: Ints
    """(A, S) int64."""
    ranking_positions: Ints
    """(P,) int64: one for each supervised event, in order; P = 0 without a ranking head."""
    retrieval_positions: Ints
    """(R,) int64."""
    target_item_id: Ints
    """(R,) int64."""
    num_targets: Ints
    """(B,) int64: retrieval positions of each sequence."""


def layout_rules(config: DataConfig) -> LayoutRules:
    """Return the rules that a configuration, valid by its own checks, stands for."""
    return LayoutRules(
        interleaved=config.layout == "interleaved",
        anchor_session=config.anchor == "session",
        supervise_history=config.supervise != "session",
        rank=bool(config.tasks),
        num_context=token_counts(config).context,
    )


class TokenCounts(NamedTuple):
    """Tokens of what a sequence is made of."""

    context: int
    """Of the prefix of every sequence."""
    per_history_event: int
    per_session_event: int


def token_counts(config: DataConfig) -> TokenCounts:
    """Return the token counts of a configuration, valid by its own checks."""
    per_event = 2 if config.layout == "interleaved" else 1
    return TokenCounts(
        context=len(config.context_features) if config.context == "prefix" else 0,
        per_history_event=per_event,
        per_session_event=1 if config.anchor == "session" else per_event,
    )


def lay_out(
    sequences: Ints, ints_EI: Ints, codes_ES: NDArray[np.uint8], rules: LayoutRules
) -> Tokens:
    """Lay events out as tokens.

    Args:
        sequences: (B, *) int64, columns as in pipelines.history: anchor, events of history, events
            of the session.
        ints_EI: (E, I) int64, columns item id, timestamp, ...: history, then session, of each.
        codes_ES: (E, S + 1) uint8: action codes, and 1 where the event is a target of retrieval.
        rules: the layout.
    """
    num_sequences, num_events = len(sequences), len(ints_EI)
    num_history = int(sequences[:, NUM_HISTORY].sum())
    known = num_history if rules.anchor_session else num_events  # events whose action is a token
    num_tokens = num_sequences * rules.num_context + num_events + known * rules.interleaved
    supervised = num_events if rules.supervise_history else num_events - num_history
    tokens = Tokens(
        offsets=np.zeros(num_sequences + 1, np.int64),
        kind=np.empty(num_tokens, np.int64),
        timestamp=np.empty(num_tokens, np.int64),
        query_time=np.empty(num_tokens, np.int64),
        session_start=np.empty(num_sequences, np.int64),
        action_codes=np.empty((known, codes_ES.shape[1] - 1), np.int64),
        ranking_positions=np.empty(supervised * rules.rank, np.int64),
        retrieval_positions=np.empty(supervised, np.int64),
        target_item_id=np.empty(supervised, np.int64),
        num_targets=np.zeros(num_sequences, np.int64),
    )
    _lay_out(sequences, ints_EI, codes_ES, rules, tokens)
    num_targets = int(tokens.num_targets.sum())
    return tokens._replace(
        retrieval_positions=tokens.retrieval_positions[:num_targets],
        target_item_id=tokens.target_item_id[:num_targets],
    )


@njit(nogil=True, cache=True)
def _lay_out(sequences: Any, ints: Any, codes: Any, rules: Any, out: Any) -> None:
    per_event = 2 if rules.interleaved else 1
    token = event = known = ranked = target = 0
    for b in range(len(sequences)):
        anchor, n, m = sequences[b, ANCHOR], sequences[b, NUM_HISTORY], sequences[b, NUM_EVENTS]
        begin = token
        for _ in range(rules.num_context):
            out.kind[token], out.timestamp[token] = CONTEXT, anchor
            token += 1
        head, session = token, token + n * per_event
        out.session_start[b] = session - begin

        num_known = n if rules.anchor_session else n + m
        _lay_out_known(ints, codes, event, num_known, token, known, rules.interleaved, out)
        token, known = token + num_known * per_event, known + num_known
        for _ in range(n + m - num_known):
            out.kind[token], out.timestamp[token] = CANDIDATE, anchor
            token += 1

        # Retrieval of an event is read before it: at the token in front of it, or at the end of the
        # history where the events of the session do not see each other. With nothing in front there
        # is nothing to predict from.
        for i in range(0 if rules.supervise_history else n, n + m):
            candidate = i >= num_known
            at = session + i - n if candidate else head + i * per_event
            if codes[event + i, -1] and (n if candidate else i) > 0:
                out.retrieval_positions[target] = (session if candidate else at) - 1
                out.target_item_id[target] = ints[event + i, 0]
                out.num_targets[b] += 1
                target += 1
            if rules.rank:
                out.ranking_positions[ranked] = at
                ranked += 1
        event += n + m

        _copy_times(out.query_time, begin, out.timestamp, begin + 1, token - 1 - begin)
        out.query_time[token - 1] = out.timestamp[token - 1]
        out.offsets[b + 1] = token


@njit(inline="always")
def _lay_out_known(
    ints: Any,
    codes: Any,
    event: int,
    num_events: int,
    token: int,
    known: int,
    interleaved: bool,
    out: Any,
) -> None:
    """Lay out events whose action is known."""
    # Unsigned indices: signed ones are tested for wrap-around, which keeps LLVM from vectorising.
    e, k, t = np.uintp(event), np.uintp(known), np.uintp(token)
    two = np.uintp(2)
    if interleaved:
        for i in range(np.uintp(num_events)):
            time = ints[e + i, TIMESTAMP]
            out.kind[t + two * i], out.kind[t + two * i + np.uintp(1)] = ITEM, ACTION
            out.timestamp[t + two * i] = time
            out.timestamp[t + two * i + np.uintp(1)] = time
    else:
        for i in range(np.uintp(num_events)):
            out.kind[t + i] = EVENT
        for i in range(np.uintp(num_events)):
            out.timestamp[t + i] = ints[e + i, TIMESTAMP]
    # Signal after signal: an inner loop over a few signals costs more than it copies.
    for s in range(np.uintp(out.action_codes.shape[1])):
        for i in range(np.uintp(num_events)):
            out.action_codes[k + i, s] = codes[e + i, s]


@njit(inline="always")
def _copy_times(to: Any, first: int, source: Any, begin: int, num_values: int) -> None:
    f, g = np.uintp(first), np.uintp(begin)
    for i in range(np.uintp(num_values)):
        to[f + i] = source[g + i]
