"""What a sequence costs: the arithmetic of training the encoder on it, or its tokens.

Letters: n events of history, m events of the session, L tokens, R tokens of the tail, from the
first that a loss reads.
"""

from typing import Any, NamedTuple

from numba import njit

from pipelines.config import DataConfig
from pipelines.unify import TokenCounts, token_counts


class SequenceCost(NamedTuple):
    """Coefficients, in any unit.

    cost = per_token L + per_tail_token R + per_pair (query-key pairs of L)
           + per_tail_pair (those of the queries of R)
    """

    per_token: float
    per_tail_token: float
    per_pair: float
    per_tail_pair: float


TOKENS = SequenceCost(1.0, 0.0, 0.0, 0.0)
"""The cost of a sequence is its tokens."""


class CostRules(NamedTuple):
    """What the kernels need to know of model and configuration."""

    cost: SequenceCost
    tokens: TokenCounts
    candidates: bool
    """The session's events see context, history and themselves only."""
    tail_is_all: bool
    """A loss reads the history too."""


def cost_rules(config: DataConfig, cost: SequenceCost) -> CostRules:
    """Return the rules that coefficients and a configuration stand for."""
    return CostRules(
        cost=cost,
        tokens=token_counts(config),
        candidates=config.anchor == "session",
        tail_is_all=config.supervise != "session",
    )


@njit(inline="always")
def sequence_cost(n: Any, m: Any, rules: Any, series: Any = 0) -> Any:
    """Return the cost of a sequence; the last token of history counts as read by a loss.

    Pairs are those of the mask: a row sees itself and all before it, but a token of the prefix
    sees the prefix, all of it, and a candidate sees prefix, history and itself. The tokens of
    series (data.context=merged) count as history: all others stand in front of the session.
    """
    cost, tokens = rules.cost, rules.tokens
    context = tokens.context
    before = context + n * tokens.per_history_event + series
    session = m * tokens.per_session_event
    history_pairs = before * (before + 1) / 2 + context * (context - 1) / 2
    session_pairs = session * (before + 1.0)
    if not rules.candidates:
        session_pairs += session * (session - 1) / 2
    tail, tail_pairs = session, session_pairs
    if rules.tail_is_all:
        tail, tail_pairs = before + session, history_pairs + session_pairs
    elif n > 0:
        tail, tail_pairs = session + 1, session_pairs + before
    return (
        cost.per_token * (before + session)
        + cost.per_tail_token * tail
        + cost.per_pair * (history_pairs + session_pairs)
        + cost.per_tail_pair * tail_pairs
    )
