"""What a sequence costs: the arithmetic of training the encoder on it, or its tokens.

Letters: n events of history, m events of the session, L tokens, R tokens of the tail, from the
first that a loss reads.
"""

from typing import Any, NamedTuple

from numba import njit

from pipelines.config import DataConfig
from pipelines.unify import TokenCounts, token_counts

WHOLE = 1 << 40
"""More tokens than a sequence has: no window, no truncation."""


class SequenceCost(NamedTuple):
    """Coefficients, in any unit.

    cost = per_token L + per_pair (query-key pairs of L)
           + per_kept_token K + per_kept_pair (pairs of K)
           + per_tail_token R + per_tail_pair (pairs of the queries of R with keys of K)

    K are the tokens that are left with `kept_history` tokens of history.
    """

    per_token: float
    per_tail_token: float
    per_pair: float
    per_tail_pair: float
    per_kept_token: float = 0.0
    per_kept_pair: float = 0.0
    kept_history: int = WHOLE
    """L' of attention truncation."""
    window: int = WHOLE
    """K1 of semi-local attention."""
    global_rows: int = 0
    """K2 by rows."""
    global_columns: int = 0
    """K2 by columns."""
    most_events: int = WHOLE
    """Of history, the newest: what one stack of a mixture reads at most."""


TOKENS = SequenceCost(1.0, 0.0, 0.0, 0.0)
"""The cost of a sequence is its tokens."""


class CostRules(NamedTuple):
    """What the kernels need to know of model and configuration."""

    costs: tuple[SequenceCost, ...]
    """The cost is their sum: one for each stack of a mixture."""
    tokens: TokenCounts
    candidates: bool
    """The session's events see context, history and themselves only."""
    tail_is_all: bool
    """A loss reads the history too."""


def cost_rules(config: DataConfig, cost: SequenceCost | tuple[SequenceCost, ...]) -> CostRules:
    """Return the rules that coefficients, of one stack or of several, and a configuration mean."""
    return CostRules(
        costs=(cost,) if isinstance(cost, SequenceCost) else cost,
        tokens=token_counts(config),
        candidates=config.anchor == "session",
        tail_is_all=config.supervise != "session",
    )


@njit(inline="always")
def sequence_cost(n: Any, m: Any, rules: Any, series: Any = 0) -> Any:
    """Return the cost of a sequence; the last token of history counts as read by a loss.

    Pairs are those of the mask: a row sees itself and all before it, or what a window leaves of
    that, but a token of the prefix sees the prefix, all of it, and a candidate sees prefix,
    history and itself. The tokens of series (data.context=merged) count as history: all others
    stand in front of the session.
    """
    total = 0.0
    for cost in rules.costs:
        total += _stack_cost(min(n, cost.most_events), m, cost, rules, series)
    return total


@njit(inline="always")
def _stack_cost(n: Any, m: Any, cost: Any, rules: Any, series: Any) -> Any:
    """Return the cost of a sequence in one stack."""
    tokens = rules.tokens
    context = tokens.context
    before = context + n * tokens.per_history_event + series
    session = m * tokens.per_session_event
    kept = context + min(before - context, cost.kept_history)
    pairs = _pairs(context, before, session, cost, rules)
    kept_pairs = _pairs(context, kept, session, cost, rules)
    tail, tail_pairs = session, kept_pairs[1]
    if rules.tail_is_all:
        tail, tail_pairs = kept + session, kept_pairs[0] + kept_pairs[1]
    elif n > 0:
        last = _windowed(kept - 1, kept, kept, context, cost, rules.candidates)
        tail, tail_pairs = session + 1, kept_pairs[1] + last
    return (
        cost.per_token * (before + session)
        + cost.per_pair * (pairs[0] + pairs[1])
        + cost.per_kept_token * (kept + session)
        + cost.per_kept_pair * (kept_pairs[0] + kept_pairs[1])
        + cost.per_tail_token * tail
        + cost.per_tail_pair * tail_pairs
    )


@njit(inline="always")
def _pairs(context: Any, before: Any, session: Any, cost: Any, rules: Any) -> Any:
    """Return the pairs of context and history, and those of the session."""
    history_pairs = context * context + _windowed(
        context, before, before, context, cost, rules.candidates
    )
    if rules.candidates:
        return history_pairs, session * (before + 1.0)
    end = before + session
    return history_pairs, _windowed(before, end, end, context, cost, False)


@njit
def _windowed(first: Any, end: Any, history: Any, context: Any, cost: Any, has_rows: Any) -> Any:
    """Return the pairs of the rows first .. end - 1, which are after the context.

    Args:
        first: row.
        end: row.
        history: tokens before candidates; the last `global_rows` of them see all before them.
        context: tokens at the head, which every row sees.
        cost: has the window.
        has_rows: whether there may be global rows, which need candidates.
    """
    local_end = end
    if has_rows:
        local_end = min(max(history - cost.global_rows, first), end)
    pairs = _below(end + 1) - _below(first + 1)
    # Of the keys before a row's window, those of context and global columns are seen.
    far = context + cost.global_columns
    hidden = _below(local_end - cost.window) - _below(first - cost.window)
    seen = _capped(local_end - cost.window, far) - _capped(first - cost.window, far)
    return pairs - hidden + seen


@njit(inline="always")
def _below(x: Any) -> Any:
    """Return 0 + 1 + ... + (x - 1)."""
    return x * (x - 1) / 2 if x > 0 else 0.0


@njit(inline="always")
def _capped(x: Any, cap: Any) -> Any:
    """Return min(0, cap) + min(1, cap) + ... + min(x - 1, cap)."""
    return _below(x) if x <= cap else _below(cap) + cap * (x - cap) * 1.0
