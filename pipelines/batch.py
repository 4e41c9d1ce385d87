"""A jagged batch of token sequences: what the data side hands to the model.

Letters: B sequences, L tokens of all sequences, I tokens that carry an item, A tokens that carry an
action, P positions at which the ranking head is read, R positions at which retrieval is read.
"""

from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from pipelines.token_kind import TokenKind as TokenKind


@dataclass(frozen=True)
class StreamPosition:
    """Where a stream stands: reader and histories are a function of this and the log."""

    rows: tuple[int, ...]
    """Sessions consumed in each partition of the log, by partition number."""
    step: int
    """Global batches consumed."""
    segments: tuple[str, ...] = ()
    """Segments of the log begun so far, in the order in which they were read."""


@dataclass
class SequenceBatch:
    """One rank's share of a global batch. May be empty (B = 0), so that ranks keep step."""

    ids: KeyedJaggedTensor
    """Stride B. Features of the item: one id for each of the sequence's tokens that carry an item
    (ITEM, EVENT, CANDIDATE), in token order. Features of the context: one id a sequence, merged:
    one for each of its tokens of the feature (`context_positions`).
    target_item_id: one id for each retrieval position of the sequence. negative_item_id: the
    negatives drawn for the sequence. Raw ids, -1 unknown, until a vocabulary maps them to rows."""
    offsets: Tensor
    """(B + 1,) int64: tokens of sequence b are offsets[b]:offsets[b + 1]."""
    max_len: int
    """Longest sequence, in tokens."""
    token_kind: Tensor
    """(L,) int64, TokenKind."""
    timestamp: Tensor
    """(L,) int64 s; context tokens and candidates carry the session's start."""
    query_time: Tensor
    """(L,) int64 s: when the prediction read at the token is made, which is the next token's
    timestamp (its own at the end of the sequence and for candidates)."""
    num_context: int
    """Context tokens at the head of every sequence."""
    num_candidates: Tensor
    """(B,) int64: candidates at the end of the sequence."""
    session_start: Tensor
    """(B,) int64: index within the sequence of the first token of the session."""
    action_codes: Tensor
    """(A, S) int64: code of each of the S configured actions for each token that carries an action
    (ACTION, EVENT), in token order; 0 is unknown."""
    user_id: Tensor
    """(B,) int64."""
    session_id: Tensor
    """(B,) int64."""
    partition: Tensor
    """(B,) int64, ascending."""
    ranking_positions: Tensor
    """(P,) int64 ascending: tokens (0 .. L-1) at which the ranking head is read."""
    labels: dict[str, Tensor]
    """Task -> (P,) float32; 0 where masked."""
    weights: dict[str, Tensor]
    """Task -> (P,) float32; 0 masks."""
    dense_features: Tensor
    """(P, F) float32, data.dense_features at the ranking positions; missing is NaN."""
    retrieval_positions: Tensor
    """(R,) int64 ascending: tokens at which retrieval is read, in the order of target_item_id. A
    token may stand more than once (anchor session: all positives of the session)."""
    retrieval_weights: Tensor
    """(R,) float32."""
    window: int
    """Window of the batch (days or hours since the epoch), 0 without windows."""
    position: StreamPosition
    """Position after this global batch."""
    num_events: int
    """Events supervised in this rank's share."""
    num_rejected: dict[str, int]
    """Sessions skipped since the last batch, by reason."""
    is_frozen: bool = False
    """Only to be scored, with the histories as they stood before the window: the same sessions come
    again to be learnt from. `position` and `num_rejected` are those of before the window."""
    num_clipped: int = 0
    """Sequences of this rank's share that lack some history, because more than data.overlap_slack
    events of sessions that overlap with theirs came first."""
    expected_load: float = 0.0
    """Cost of this rank's share on average over the draws of stochastic length, if it is balanced
    (data.stochastic_length.balance)."""
    num_sessions: int = 0
    """Sessions of the global batch, over all ranks, skipped ones included."""
    bags: KeyedJaggedTensor | None = None
    """Stride L: the ids of each feature that has several a token (data...max_values), none at the
    tokens that do not carry the feature. None without such features."""
    numbers: dict[str, Tensor] = field(default_factory=dict)
    """Feature with encoding zscore or quantile -> (n,) float32, as `ids` would hold its ids;
    missing is NaN."""
    context_positions: dict[str, Tensor] = field(default_factory=dict)
    """Context feature -> (n,) int64 ascending: its tokens, where data.context=merged."""
    vector_rows: dict[str, Tensor] = field(default_factory=dict)
    """Name of pretrained vectors -> (n,) int64, as `ids` holds their feature: the row of each id,
    -1 without one. Set by who has the vectors."""
    num_cut_bags: int = 0
    """Bags of this rank's share that lack values, because the log has more than max_values; those
    of history are not counted again."""

    @property
    def num_sequences(self) -> int:
        """B."""
        return self.offsets.numel() - 1

    @property
    def num_tokens(self) -> int:
        """L."""
        return self.token_kind.numel()

    def lookup_ids(self) -> KeyedJaggedTensor:
        """Return all ids to look up, stride B: `ids`, and those of `bags` joined by sequence."""
        if self.bags is None:
            return self.ids
        num_keys, num_tokens = len(self.bags.keys()), self.num_tokens
        ends_FL = torch.zeros(num_keys, num_tokens + 1, dtype=torch.int64)
        ends_FL[:, 1:] = self.bags.lengths().view(num_keys, num_tokens).cumsum(1)
        lengths = ends_FL[:, self.offsets].diff(dim=1).flatten()
        return KeyedJaggedTensor(
            keys=[*self.ids.keys(), *self.bags.keys()],
            values=torch.cat([self.ids.values(), self.bags.values()]),
            lengths=torch.cat([self.ids.lengths(), lengths]),
            stride=self.num_sequences,
            length_per_key=[*self.ids.length_per_key(), *self.bags.length_per_key()],
        )

    @property
    def lengths(self) -> Tensor:
        """(B,) int64: tokens of each sequence."""
        return self.offsets.diff()

    def to(self, device: torch.device, non_blocking: bool = False) -> Self:
        """Return the batch with every tensor on `device`."""
        return self._map(lambda x: x.to(device=device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """Return the batch with every tensor in page-locked memory."""
        return self._map(lambda x: x.pin_memory())

    def record_stream(self, stream: torch.Stream) -> None:
        """Tell the allocator that every tensor is used on `stream`."""
        self._map(lambda x: x.record_stream(stream))

    def _map(self, apply: Any) -> Self:
        changed: dict[str, Any] = {}
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(value, (Tensor, KeyedJaggedTensor)):
                changed[each.name] = apply(value)
            elif each.name in ("labels", "weights", "numbers", "context_positions", "vector_rows"):
                changed[each.name] = {name: apply(x) for name, x in value.items()}
        return replace(self, **changed)
