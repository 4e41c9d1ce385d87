"""Layout of a batch: from events in order to one jagged sequence of tokens each.

Letters: B sequences, E events, L tokens, A tokens that carry an action, P ranking positions,
R retrieval positions, S action signals.
"""

from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from pipelines.batch import TokenKind
from pipelines.config import DataConfig
from pipelines.history import ANCHOR, NUM_EVENTS, NUM_HISTORY, TIMESTAMP, Ints

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
    token = event = known = ranked = target = 0
    for b in range(len(sequences)):
        anchor, n, m = sequences[b, ANCHOR], sequences[b, NUM_HISTORY], sequences[b, NUM_EVENTS]
        begin = token
        for _ in range(rules.num_context):
            out.kind[token], out.timestamp[token] = CONTEXT, anchor
            token += 1

        last_of_history = token - 1
        for i in range(n + m):
            in_session = i >= n
            candidate = in_session and rules.anchor_session
            time = anchor if candidate else ints[event, TIMESTAMP]
            if i == n:
                last_of_history = token - 1
                out.session_start[b] = token - begin

            # Retrieval of an event is read before it: at the token in front of it, or at the end of
            # the history where the events of the session do not see each other. With nothing in
            # front there is nothing to predict from.
            if in_session or rules.supervise_history:
                precedes = n if candidate else i
                if codes[event, -1] and precedes > 0:
                    out.retrieval_positions[target] = last_of_history if candidate else token - 1
                    out.target_item_id[target] = ints[event, 0]
                    out.num_targets[b] += 1
                    target += 1
                if rules.rank:
                    out.ranking_positions[ranked] = token
                    ranked += 1

            out.kind[token] = CANDIDATE if candidate else (ITEM if rules.interleaved else EVENT)
            out.timestamp[token] = time
            token += 1
            if not candidate:
                if rules.interleaved:
                    out.kind[token], out.timestamp[token] = ACTION, time
                    token += 1
                for s in range(out.action_codes.shape[1]):
                    out.action_codes[known, s] = codes[event, s]
                known += 1
            event += 1

        for t in range(begin, token - 1):
            out.query_time[t] = out.timestamp[t + 1]
        out.query_time[token - 1] = out.timestamp[token - 1]
        out.offsets[b + 1] = token
