"""Scored batches as Arrow tables: what `gr recommend` writes.

Letters: B sequences, L tokens, P ranking positions, R retrieval positions.
"""

from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from gr.scoring import Scored
from gr.sequence import sequence_index
from gr.tokens import carries_item
from pipelines.batch import SequenceBatch
from pipelines.config import ITEM_ID, TARGET_ITEM_ID, TaskConfig

RANKING, RETRIEVAL = "ranking", "retrieval"
_KEYS = [
    ("user_id", pa.int64()),
    ("session_id", pa.int64()),
    ("item_id", pa.int64()),
    ("timestamp", pa.int64()),
]


def schemas(tasks: Mapping[str, TaskConfig], *, retrieval: bool) -> dict[str, pa.Schema]:
    """Return the schema of each table that is written.

    ranking has a row a supervised event: its keys, and for each task TASK (a probability, or the
    value that is predicted), TASK_output (the logit, or the value as it was trained) and TASK_label
    (null where it is unknown). retrieval has a row a positive event with something before it: its
    rank in the catalogue and its log probability.

    Args:
        tasks: name -> task.
        retrieval: whether ranks are computed.
    """
    made = {}
    if tasks:
        columns = [(f"{n}{x}", pa.float32()) for n in tasks for x in ("", "_output", "_label")]
        made[RANKING] = pa.schema([*_KEYS, *columns])
    if retrieval:
        made[RETRIEVAL] = pa.schema([*_KEYS, ("rank", pa.int64()), ("log_prob", pa.float32())])
    return made


def tables_of(
    raw: SequenceBatch, scored: Scored, tasks: Mapping[str, TaskConfig]
) -> dict[str, pa.Table]:
    """Return the tables of a batch, rows in the order of the log.

    Args:
        raw: the batch as the stream made it: raw ids, on the CPU.
        scored: the same batch.
        tasks: name -> task.
    """
    ranks, log_probs = scored.ranks, scored.log_probs
    made = {}
    sequence_L = sequence_index(raw.offsets, raw.num_tokens)
    for name, schema in schemas(tasks, retrieval=ranks is not None).items():
        if name == RANKING:
            positions = raw.ranking_positions
            item_P = (carries_item(raw.token_kind).cumsum(0) - 1)[positions]
            items = raw.ids[ITEM_ID].values()[item_P]
            values = _ranking_columns(raw, scored, tasks)
        else:
            assert ranks is not None
            assert log_probs is not None
            positions, items = raw.retrieval_positions, raw.ids[TARGET_ITEM_ID].values()
            values = [pa.array(_numpy(ranks)), pa.array(_numpy(log_probs.float()))]
        owner = sequence_L[positions]
        # A target's time is that of its prediction, which is read at the token before it.
        time = raw.timestamp if name == RANKING else raw.query_time
        keys = (raw.user_id[owner], raw.session_id[owner], items, time[positions])
        arrays = [*(pa.array(_numpy(x)) for x in keys), *values]
        made[name] = pa.Table.from_arrays(arrays, schema=schema)
    return made


def prediction(output: Tensor, task: TaskConfig) -> Tensor:
    """Return what an output of the ranking head means.

    Args:
        output: (n,) as gr.heads.RankingHead returns it.
        task: binary: the probability; regression: the value in the unit of the log's column.
    """
    output = output.double()
    if task.type == "binary":
        return output.sigmoid()
    value = output.clamp_max(100).expm1() if task.log1p else output
    if task.maximum > 0:
        value = value.clamp_max(task.maximum)
    return value * task.scale


def _ranking_columns(
    raw: SequenceBatch, scored: Scored, tasks: Mapping[str, TaskConfig]
) -> list[pa.Array]:
    columns = []
    for name, task in tasks.items():
        output = scored.predictions.ranking[name].float().cpu()
        columns.append(pa.array(_numpy(prediction(output, task).float())))
        columns.append(pa.array(_numpy(output)))
        unknown = _numpy(raw.weights[name]) == 0
        columns.append(pa.array(_numpy(raw.labels[name]), mask=unknown))
    return columns


def _numpy(x: Tensor) -> NDArray[np.generic]:
    found: NDArray[np.generic] = x.detach().to(torch.device("cpu")).numpy()
    return found
