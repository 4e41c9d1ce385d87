"""From gathered events to the tensors of a SequenceBatch.

Letters: B sequences, E events, L tokens.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from pipelines.batch import SequenceBatch, StreamPosition, TokenKind
from pipelines.config import DataConfig, bag_features
from pipelines.context_series import Series, merge_series
from pipelines.feature_columns import Slot, is_cut, read_bags, read_numbers
from pipelines.features import EventEncoder
from pipelines.gather import Gathered
from pipelines.history import (
    FIRST_CONTEXT,
    NUM_EVENTS,
    NUM_HISTORY,
    PARTITION,
    PIECE,
    SESSION,
    USER,
    Ints,
)
from pipelines.keyed_random import Purpose, draw_items
from pipelines.unify import Tokens, lay_out

NO_RANGE = 2**62
"""Negatives of ids without a range (data.num_items=0) are numbers below this, for a vocabulary to
turn into ids."""


def assemble(
    gathered: Gathered,
    encoder: EventEncoder,
    *,
    seed: int,
    window: int,
    position: StreamPosition,
    num_rejected: dict[str, int],
    is_frozen: bool = False,
    expected_load: float = 0.0,
    num_sessions: int = 0,
) -> SequenceBatch:
    """Return the batch of `gathered`, none of whose memory it shares.

    Args:
        gathered: the sequences.
        encoder: of their events; its configuration says how they are laid out.
        seed: of the run; keys the negatives.
        window: of the batch.
        position: after the batch.
        num_rejected: sessions skipped since the last batch, by reason.
        is_frozen: whether the sessions come again to be learnt from.
        expected_load: before stochastic length was balanced.
        num_sessions: of the global batch.
    """
    config, sequences, layout = encoder.config, gathered.sequences, encoder.layout
    tokens = lay_out(sequences, gathered.ints, gathered.codes, layout)
    series = None
    if encoder.merges_context:
        tokens, series = merge_series(tokens, sequences, gathered.ints, encoder.series_slots)
    values = _values(gathered, encoder, tokens, series)
    at_session = config.anchor == "session"
    num_tasks = len(config.tasks)
    labels = gathered.floats[:, :num_tasks].T
    return SequenceBatch(
        ids=_ids(gathered, tokens, values, encoder, seed),
        offsets=torch.from_numpy(tokens.offsets),
        max_len=int(np.diff(tokens.offsets).max(initial=0)),
        token_kind=torch.from_numpy(tokens.kind),
        timestamp=torch.from_numpy(tokens.timestamp),
        query_time=torch.from_numpy(tokens.query_time),
        num_context=layout.num_context,
        num_candidates=_tensor(sequences[:, NUM_EVENTS] * at_session),
        session_start=torch.from_numpy(tokens.session_start),
        action_codes=torch.from_numpy(tokens.action_codes),
        user_id=_tensor(sequences[:, USER]),
        session_id=_tensor(sequences[:, SESSION]),
        partition=_tensor(sequences[:, PARTITION]),
        ranking_positions=torch.from_numpy(tokens.ranking_positions),
        labels={
            task: torch.from_numpy(np.nan_to_num(row, nan=0.0))
            for task, row in zip(config.tasks, labels, strict=True)
        },
        weights={
            task: torch.from_numpy((~np.isnan(row)).astype(np.float32))
            for task, row in zip(config.tasks, labels, strict=True)
        },
        dense_features=torch.from_numpy(
            gathered.floats[: len(tokens.ranking_positions), num_tasks:].copy()
        ),
        retrieval_positions=torch.from_numpy(tokens.retrieval_positions),
        retrieval_weights=torch.ones(len(tokens.retrieval_positions), dtype=torch.float32),
        window=window,
        position=position,
        num_events=len(gathered.floats),
        num_rejected=num_rejected,
        is_frozen=is_frozen,
        num_clipped=gathered.num_clipped,
        expected_load=expected_load,
        num_sessions=num_sessions,
        bags=_bags(values, config, len(tokens.kind)),
        numbers={
            x.slot.name: torch.from_numpy(read_numbers(x.rows, x.slot).astype(np.float32))
            for x in values
            if x.slot.feature.is_number
        },
        context_positions={
            slot.name: torch.from_numpy(series.position[series.feature == i])
            for i, slot in enumerate(encoder.context_slots)
        }
        if series is not None
        else {},
        num_cut_bags=sum(
            _num_cut(x, tokens, layout.num_context) for x in values if x.slot.feature.is_bag
        ),
    )


@dataclass(frozen=True, slots=True)
class _Values:
    """A feature's values in a batch."""

    slot: Slot
    rows: Ints
    """(n, *) int64: rows of events or sessions whose columns `slot` says."""
    lengths: Ints
    """(B,) int64: rows of each sequence."""
    tokens: Ints
    """(n,) int64: token of each row; of bags only."""


def _values(
    gathered: Gathered, encoder: EventEncoder, tokens: Tokens, series: Series | None
) -> list[_Values]:
    """Return the values of the item features, then of the context features."""
    sequences = gathered.sequences
    num_events = sequences[:, NUM_HISTORY] + sequences[:, NUM_EVENTS]
    has_bags = any(slot.feature.is_bag for slot in encoder.item_slots)
    item_token = np.flatnonzero(_carries_item(tokens.kind)) if has_bags else np.empty(0, np.int64)
    values = [_Values(x, gathered.ints, num_events, item_token) for x in encoder.item_slots]
    if series is None:
        context, ones = sequences[:, FIRST_CONTEXT:], np.ones(len(sequences), np.int64)
        for i, slot in enumerate(encoder.context_slots):
            values.append(_Values(slot, context, ones, tokens.offsets[:-1] + i))
        return values
    for i, slot in enumerate(encoder.series_slots):
        mine = series.feature == i
        lengths = np.bincount(series.sequence[mine], minlength=len(sequences))
        rows = gathered.ints[series.event[mine]]
        values.append(_Values(slot, rows, lengths, series.position[mine]))
    return values


def _carries_item(kind: Ints) -> NDArray[np.bool_]:
    flags: NDArray[np.bool_] = (kind != TokenKind.CONTEXT) & (kind != TokenKind.ACTION)
    return flags


def _num_cut(values: _Values, tokens: Tokens, num_context: int) -> int:
    """Return how many bags lack values, those of history left out: each was of a session once."""
    in_history = np.zeros(len(tokens.kind) + 1, np.int64)
    # Between the prefix and the session: +1 where a history begins, -1 behind it.
    np.add.at(in_history, tokens.offsets[:-1] + num_context, 1)
    np.add.at(in_history, tokens.offsets[:-1] + tokens.session_start, -1)
    is_new = np.cumsum(in_history)[values.tokens] == 0
    return int((is_new & is_cut(values.rows, values.slot)).sum())


def _bags(values: list[_Values], config: DataConfig, num_tokens: int) -> KeyedJaggedTensor | None:
    keys = bag_features(config)
    if not keys:
        return None
    lengths = np.zeros((len(keys), num_tokens), np.int64)
    ids = []
    for i, bag in enumerate(x for x in values if x.slot.feature.is_bag):
        found = read_bags(bag.rows, bag.slot)
        lengths[i, bag.tokens] = found.lengths
        ids.append(found.ids)
    return KeyedJaggedTensor(
        keys=list(keys),
        values=torch.from_numpy(np.concatenate(ids)),
        lengths=torch.from_numpy(lengths.reshape(-1)),
        stride=num_tokens,
        length_per_key=[len(x) for x in ids],
    )


def _ids(
    gathered: Gathered, tokens: Tokens, features: list[_Values], encoder: EventEncoder, seed: int
) -> KeyedJaggedTensor:
    """Return the ids, feature after feature in one array."""
    config, sequences, ints = encoder.config, gathered.sequences, gathered.ints
    num_sequences, num_negatives = len(sequences), config.num_negatives
    num_events = sequences[:, NUM_HISTORY] + sequences[:, NUM_EVENTS]
    plain = [x for x in features if not x.slot.feature.is_bag and not x.slot.feature.is_number]
    lengths = [num_events, *(x.lengths for x in plain), tokens.num_targets]
    values = [ints[:, 0], *(x.rows[:, x.slot.first] for x in plain), tokens.target_item_id]
    if num_negatives > 0:
        negatives = np.empty((num_sequences, num_negatives), np.int64)
        draw_items(
            sequences[:, USER],
            sequences[:, SESSION],
            sequences[:, PIECE],
            seed,
            int(Purpose.NEGATIVES),
            config.num_items or NO_RANGE,
            negatives,
        )
        lengths.append(np.full(num_sequences, num_negatives))
        values.append(negatives.reshape(-1))
    return KeyedJaggedTensor(
        keys=list(encoder.id_keys),
        values=torch.from_numpy(np.concatenate(values)),
        lengths=torch.from_numpy(np.concatenate(lengths)),
        stride=num_sequences,
        length_per_key=[len(x) for x in values],
    )


def _tensor(values: Ints) -> torch.Tensor:
    return torch.from_numpy(np.array(values, np.int64))
