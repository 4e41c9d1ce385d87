"""From gathered events to the tensors of a SequenceBatch."""

import numpy as np
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from pipelines.batch import SequenceBatch, StreamPosition
from pipelines.config import ITEM_ID, DataConfig, id_features
from pipelines.gather import Gathered
from pipelines.history import (
    FIRST_CONTEXT,
    NUM_EVENTS,
    NUM_HISTORY,
    PARTITION,
    PIECE,
    SESSION,
    TIMESTAMP,
    USER,
    Ints,
)
from pipelines.keyed_random import Purpose, draw_items
from pipelines.unify import Tokens, lay_out, layout_rules


def assemble(
    gathered: Gathered,
    config: DataConfig,
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
        config: how they are laid out.
        seed: of the run; keys the negatives.
        window: of the batch.
        position: after the batch.
        num_rejected: sessions skipped since the last batch, by reason.
        is_frozen: whether the sessions come again to be learnt from.
        expected_load: before stochastic length was balanced.
        num_sessions: of the global batch.
    """
    sequences = gathered.sequences
    tokens = lay_out(sequences, gathered.ints, gathered.codes, layout_rules(config))
    at_session = config.anchor == "session"
    num_tasks = len(config.tasks)
    labels = gathered.floats[:, :num_tasks].T
    return SequenceBatch(
        ids=_ids(gathered, tokens, config, seed),
        offsets=torch.from_numpy(tokens.offsets),
        max_len=int(np.diff(tokens.offsets).max(initial=0)),
        token_kind=torch.from_numpy(tokens.kind),
        timestamp=torch.from_numpy(tokens.timestamp),
        query_time=torch.from_numpy(tokens.query_time),
        num_context=layout_rules(config).num_context,
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
    )


def _ids(gathered: Gathered, tokens: Tokens, config: DataConfig, seed: int) -> KeyedJaggedTensor:
    """Return the ids, feature after feature in one array."""
    sequences, ints = gathered.sequences, gathered.ints
    num_sequences, num_negatives = len(sequences), config.num_negatives
    keys = id_features(config)
    item_keys = [ITEM_ID, *config.item_features]

    ones = np.ones(num_sequences, np.int64)
    num_events = sequences[:, NUM_HISTORY] + sequences[:, NUM_EVENTS]
    lengths = [num_events for _ in item_keys] + [ones for _ in config.context_features]
    lengths.append(tokens.num_targets)
    values = [ints[:, i] for i in range(ints.shape[1]) if i != TIMESTAMP]
    values += list(sequences[:, FIRST_CONTEXT:].T)
    values.append(tokens.target_item_id)
    if num_negatives > 0:
        negatives = np.empty((num_sequences, num_negatives), np.int64)
        draw_items(
            sequences[:, USER],
            sequences[:, SESSION],
            sequences[:, PIECE],
            seed,
            int(Purpose.NEGATIVES),
            config.num_items,
            negatives,
        )
        lengths.append(ones * num_negatives)
        values.append(negatives.reshape(-1))
    return KeyedJaggedTensor(
        keys=list(keys),
        values=torch.from_numpy(np.concatenate(values)),
        lengths=torch.from_numpy(np.concatenate(lengths)),
        stride=num_sequences,
        length_per_key=[len(x) for x in values],
    )


def _tensor(values: Ints) -> torch.Tensor:
    return torch.from_numpy(np.array(values, np.int64))
