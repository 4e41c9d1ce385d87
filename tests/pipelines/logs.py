"""Drawn session-end logs, and batches taken apart into the sequences of the oracle's form."""

import math
from dataclasses import fields

import numpy as np
import torch
from hypothesis import strategies as st

from pipelines.batch import SequenceBatch
from pipelines.config import ActionConfig, DataConfig, FeatureConfig, TaskConfig
from tests.pipelines.session_log import session

SEED = 5
MODES = [
    (layout, anchor, "session", context)
    for layout in ("interleaved", "merged")
    for anchor in ("event", "session")
    for context in ("none", "prefix")
] + [
    (layout, "event", supervise, "none")
    for layout in ("interleaved", "merged")
    for supervise in ("all", "sampled")
]
MERGED_MODES = [
    (layout, anchor, supervise, "merged")
    for layout in ("interleaved", "merged")
    for anchor, supervise in (("event", "session"), ("session", "session"), ("event", "all"))
]
# Bags and numbers beside the features of make_config.
RICH = {
    "item_features": {
        "tab": FeatureConfig(),
        "genres": FeatureConfig(max_values=2),
        "seen_number": FeatureConfig(column="seen", encoding="zscore"),
        "price_bin": FeatureConfig(column="price", boundaries=(1.0, 2.0)),
        "genre_bins": FeatureConfig(column="genres", max_values=3, boundaries=(2.0,)),
    },
    "context_features": {
        "age": FeatureConfig(boundaries=(18.0, 40.0)),
        "creators": FeatureConfig(max_values=2),
        "user": FeatureConfig(column="user_id"),
        "age_number": FeatureConfig(column="age", encoding="quantile", bins=4),
        "country": FeatureConfig(),
    },
}


def make_config(log, layout, anchor, supervise, context, **changes) -> DataConfig:
    ranks = not (layout == "merged" and anchor == "event")
    fields = {
        "log": str(log),
        "layout": layout,
        "anchor": anchor,
        "supervise": supervise,
        "context": context,
        "num_items": 50,
        "num_negatives": 3,
        "prefetch": 0,
        "sampled_rate": 2.0 if supervise == "sampled" else 1.0,
        "max_history_tokens": 6,
        "max_session_events": 3,
        "overlap_slack": 2,
        "sessions_per_partition": 2,
        "window": "hour",
        "max_reject_fraction": 1.0,
        "positive": ("click",),
        "actions": {"watch": ActionConfig(thresholds=(1.0, 3.0)), "click": ActionConfig()},
        "item_features": {
            "tab": FeatureConfig(),
            "price_bin": FeatureConfig(column="price", boundaries=(1.0, 2.0)),
        },
        "context_features": {
            "age": FeatureConfig(boundaries=(18.0, 40.0)),
            "user": FeatureConfig(column="user_id"),
            "country": FeatureConfig(),
        },
        "tasks": {
            "click": TaskConfig(action="click"),
            "watch": TaskConfig(
                action="watch", type="regression", scale=2.0, maximum=1.5, log1p=True
            ),
        }
        if ranks
        else {},
        "dense_features": ("seen", "price") if ranks else (),
    }
    return DataConfig(**(fields | changes))


def bags():
    """Draw a list of ids, which may be null, empty or hold nulls."""
    return st.one_of(st.none(), st.lists(st.one_of(st.none(), st.integers(0, 4)), max_size=4))


def events(start, size):
    """Draw the events of a session from `start` on."""
    optional = lambda values: st.one_of(st.none(), values)  # noqa: E731
    numbers = st.sampled_from([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, math.nan])
    one = st.fixed_dictionaries(
        {
            "gap": st.sampled_from([0, 0, 1, 2, 900]),
            "item": st.integers(0, 49),
            "click": optional(st.booleans()),
            "watch": optional(numbers),
            "tab": optional(st.integers(-3, 9)),
            "price": optional(numbers),
            "seen": optional(numbers),
            "genres": bags(),
        }
    )

    def place(drawn):
        time, placed = start, []
        for event in drawn:
            time += event["gap"]
            placed.append({"t": time, **{k: v for k, v in event.items() if k != "gap"}})
        return placed

    return st.lists(one, min_size=size[0], max_size=size[1]).map(place)


def spoil(row, defect):
    """Return the row with one defect; some leave it usable."""
    rows = [dict(e) for e in row["events"]]
    if not rows:
        return row
    last = rows[-1]
    match defect:
        case "user_id" | "session_id" | "start_ts" | "end_ts":
            return row | {defect: None}
        case "no events":
            return row | {"events": None}
        case "null event":
            return row | {"events": [*rows, None]}
        case "null item":
            last["item_id"] = None
        case "negative item":
            last["item_id"] = -4
        case "negative time":
            rows[0]["timestamp"] = -1
        case "late start":
            return row | {"start_ts": row["start_ts"] + 1}
        case "early start":
            return row | {"start_ts": row["start_ts"] - 2}
        case "unsorted":
            rows.reverse()
        case "infinite":
            last["seen"] = math.inf
        case "no logarithm":
            last["watch"] = -5.0
    return row | {"events": rows}


DEFECTS = (
    "user_id",
    "session_id",
    "start_ts",
    "no events",
    "null event",
    "null item",
    "negative item",
    "negative time",
    "late start",
    "early start",
    "unsorted",
    "infinite",
    "no logarithm",
    "end_ts",
)


@st.composite
def logs(draw, *, defects=True, max_partitions=3, max_sessions=9):
    """Draw (partitions, histories): overlaps, ties, long sessions, unusable ones."""
    partitions, histories = [], []
    with_history = draw(st.booleans())
    for p in range(draw(st.integers(1, max_partitions))):
        rows, starts = [], []
        users = draw(st.lists(st.integers(-3, 1 << 40), min_size=1, max_size=3, unique=True))
        users = [user * 4 + p for user in users]
        for number in range(draw(st.integers(0, max_sessions))):
            start = draw(st.sampled_from([1, 5, 6, 7, 8, 3600, 3605, 3610, 9000]))
            row = session(draw(st.sampled_from(users)), number, draw(events(start, (1, 7))))
            row["context"] = draw(
                st.one_of(
                    st.none(),
                    st.fixed_dictionaries(
                        {
                            "country": st.one_of(st.none(), st.integers(0, 5)),
                            "age": st.one_of(st.none(), st.sampled_from([1.0, 18.0, 50.0])),
                            "creators": bags(),
                        }
                    ),
                )
            )
            rows.append(row)
        rows.sort(key=lambda row: row["end_ts"])
        if with_history:
            for user in users:
                row = session(user, -1, draw(events(draw(st.sampled_from([0, 3, 6])), (0, 9))))
                starts.append(row)
        if defects:
            for table in (rows, starts):
                for i in range(len(table)):
                    if draw(st.integers(0, 5)) == 5:
                        table[i] = spoil(table[i], draw(st.sampled_from(DEFECTS)))
        partitions.append(rows)
        histories.append(starts)
    return partitions, histories if with_history else None


def take_apart(batch, config: DataConfig) -> list[dict]:
    """Return the sequences of a batch in the form of the oracle, without `clipped`."""
    # Not to_dict(), which fails on a batch without sequences (torchrec 1.8).
    jagged = {key: batch.ids[key].to_dense() for key in batch.ids.keys()}  # noqa: SIM118
    bags = {key: batch.bags[key].to_dense() for key in batch.bags.keys()} if batch.bags else {}  # noqa: SIM118
    offsets = batch.offsets.tolist()
    carries_action = ((batch.token_kind == 2) | (batch.token_kind == 3)).tolist()
    action_rows = np.concatenate([[0], np.cumsum(carries_action)]).tolist()
    carries_item = ((batch.token_kind != 0) & (batch.token_kind != 2)).tolist()
    item_rows = np.concatenate([[0], np.cumsum(carries_item)]).tolist()
    codes = batch.action_codes.tolist()
    of = lambda key, b: jagged[key][b].tolist()  # noqa: E731
    sequences = []
    targets = batch.ids["target_item_id"].values().tolist()

    def values(name, feature, tokens, rows, b):
        """Return the value of a feature at each of some tokens, whose rows are `rows`."""
        if feature.is_bag:
            rest = [t for t in range(*offsets[b : b + 2]) if t not in tokens]
            if name in config.item_features:
                assert not any(len(bags[name][t]) for t in rest)
            return [bags[name][t].tolist() for t in tokens]
        if feature.is_number:
            return [None if math.isnan(x) else x for x in batch.numbers[name][rows].tolist()]
        return of(name, b)

    for b in range(batch.num_sequences):
        first, last = offsets[b], offsets[b + 1]
        items = [t for t in range(first, last) if carries_item[t]]
        context = {}
        for i, (name, feature) in enumerate(config.context_features.items()):
            if config.context != "merged":
                context[name] = values(name, feature, [first + i], slice(b, b + 1), b)
                continue
            places = batch.context_positions[name].tolist()
            rows = [i for i, t in enumerate(places) if first <= t < last]
            mine = [places[i] for i in rows]
            found = values(name, feature, mine, rows, b)
            context[name] = [(t - first, v) for t, v in zip(mine, found, strict=True)]
        sequences.append(
            {
                "user_id": int(batch.user_id[b]),
                "session_id": int(batch.session_id[b]),
                "partition": int(batch.partition[b]),
                "kind": batch.token_kind[first:last].tolist(),
                "timestamp": batch.timestamp[first:last].tolist(),
                "query_time": batch.query_time[first:last].tolist(),
                "num_context": batch.num_context,
                "session_start": int(batch.session_start[b]),
                "num_candidates": int(batch.num_candidates[b]),
                "item_id": of("item_id", b),
                "item_features": {
                    name: values(name, x, items, slice(item_rows[first], item_rows[last]), b)
                    for name, x in config.item_features.items()
                },
                "context": context,
                "action_codes": codes[action_rows[first] : action_rows[last]],
                "ranking": [
                    (
                        position - first,
                        {
                            task: float(batch.labels[task][j]) if batch.weights[task][j] else None
                            for task in config.tasks
                        },
                        batch.dense_features[j].tolist(),
                    )
                    for j, position in enumerate(batch.ranking_positions.tolist())
                    if first <= position < last
                ],
                "retrieval": [
                    (position - first, targets[j])
                    for j, position in enumerate(batch.retrieval_positions.tolist())
                    if first <= position < last
                ],
                "negatives": of("negative_item_id", b) if config.num_negatives else [],
            }
        )
        assert [t for _, t in sequences[-1]["retrieval"]] == of("target_item_id", b)
    return sequences


def as_float32(sequence: dict) -> dict:
    """Return a sequence with labels and dense features rounded, unknown dense features as None."""
    ranking = [
        (
            position,
            {k: None if v is None else float(np.float32(v)) for k, v in labels.items()},
            [None if x is None or math.isnan(x) else float(np.float32(x)) for x in dense],
        )
        for position, labels, dense in sequence["ranking"]
    ]
    return sequence | {"ranking": ranking}


def content(batch: SequenceBatch) -> dict[str, object]:
    """Return every field of a batch, tensors as (dtype, shape, list)."""

    def plain(value):
        if isinstance(value, torch.Tensor):
            return value.dtype, tuple(value.shape), repr(value.tolist())  # repr: NaN equals NaN
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return value

    values = {f.name: getattr(batch, f.name) for f in fields(batch)}
    ids = values.pop("ids")
    return {k: plain(v) for k, v in values.items()} | {
        "keys": ids.keys(),
        "values": plain(ids.values()),
        "lengths": plain(ids.lengths()),
    }
