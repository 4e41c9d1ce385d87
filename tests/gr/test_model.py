"""The whole model from the log: no prediction knows what happens at or after the time it is for.

Every event of a small log is changed in turn (its item, its actions, its time), the log is read
again, and all predictions that precede the change must keep every bit. A planted leak must show.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import gr.encodings
import kernels.hstu_attention.reference as attention
from embeddings.vocabulary import Vocabulary
from gr.config import (
    HeadConfig,
    HSTUConfig,
    SemiLocalConfig,
    TransformerConfig,
    TruncationConfig,
)
from gr.hstu import kept_history
from gr.mixture import mixture_groups
from gr.model import dense_model, feature_dims
from gr.sequence import sequence_info
from pipelines.config import DataConfig
from tests.gr.batches import batches, data_config, look_up, make_tables, random_log, train_config
from tests.pipelines.logs import MODES, take_apart
from tests.pipelines.session_log import session, write_log

LATE = 1_650_000_000
# One user; session 1 begins before session 0 has ended; session 2 follows both.
TIMES = {0: [0, 100, 400], 1: [250, 300, 600], 2: [5_000, 5_060, 5_120, 5_190]}
CHANGES = ("item", "action", "time")


def make_rows(change: tuple[int, int, str] | None = None) -> list[dict]:
    rows = []
    for number, times in TIMES.items():
        events = []
        for i, time in enumerate(times):
            event = {
                "t": LATE + time,
                "item": 7 * number + i,
                "click": (number + i) % 2 == 0,
                "watch": float(i),
                "tab": i % 2,
                "price": 0.5,
                "seen": 1.0,
            }
            if change == (number, i, "item"):
                event |= {"item": 40, "tab": 3, "price": 9.0, "seen": 5.0}
            if change == (number, i, "action"):
                event |= {"click": not event["click"], "watch": 9.0}
            if change == (number, i, "time"):
                event["t"] += 40  # stays before the next
            events.append(event)
        row = session(8, number, events)
        rows.append(row | {"context": {"country": 4, "age": 30.0}})
    return sorted(rows, key=lambda row: row["end_ts"])


def read_log(folder: Path, mode, change=None) -> tuple[DataConfig, list]:
    """Return the configuration and one batch a session: a batch-mate must not matter here."""
    write_log(folder, [make_rows(change)])
    data = data_config(
        folder,
        mode,
        positive=(),
        sessions_per_partition=1,
        max_session_events=4,
        overlap_slack=20,
        max_history_tokens=40,
        sampled_rate=1e9 if mode[2] == "sampled" else 1.0,
    )
    return data, batches(data)


SMALL = HSTUConfig(num_heads=2, qk_dim=4, v_dim=4, scaling_length=4, bias="position_time")


def make_model(data: DataConfig, encoder: str, hstu: HSTUConfig = SMALL, mixture=None):
    config = train_config(
        data,
        encoder=encoder,
        transformer=TransformerConfig(num_heads=2),
        hstu=hstu,
        mixture=mixture or {},
    )
    torch.manual_seed(2)
    dense = dense_model(config, feature_dims(config), 0)
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.normal_(std=0.7)  # so that whatever reaches a prediction shows in it
    return config, dense.eval()


def predict(
    folder: Path, mode, encoder: str, change=None, hstu: HSTUConfig = SMALL, mixture=None
) -> dict[tuple, torch.Tensor]:
    """Return (kind, session that is scored, session of the event, its place) -> prediction.

    The events of a session stand in a sequence in the order of time; with `supervise` of all, those
    of the history are predicted as well.
    """
    data, sequences = read_log(folder, mode, change)
    config, model = make_model(data, encoder, hstu, mixture)
    groups = mixture_groups(config.model, data)
    tables = make_tables(config)
    found = {}
    for batch in sequences:
        assert batch.num_sequences == 1
        scored = int(batch.session_id[0])
        rows = {k: v.float() for k, v in look_up(config, tables, batch).items()}
        with torch.no_grad():
            info = sequence_info(batch, keep_history=kept_history(config.model), groups=groups)
            out = model(batch, info, rows)
        history = [e for e in events_in_order(change) if e[0] != scored]
        start = LATE + TIMES[scored][0] + 40 * (change == (scored, 0, "time"))
        history = [e[:2] for e in history if e[2] < start]
        own = [(scored, i) for i in range(len(TIMES[scored]))]
        supervised = own if mode[2] == "session" else [*history, *own]
        if out.ranking:
            stacked = torch.stack(list(out.ranking.values()), 1)
            for event, row in zip(supervised, stacked, strict=True):
                found["ranking", scored, *event] = row
        # With nothing in front there is nothing to predict the next item from.
        has_front = bool(history) if mode[1] == "session" else True
        first = 0 if history and mode[2] == "session" else 1
        targets = supervised[first:] if mode[1] == "event" else supervised * has_front
        assert out.user_vectors is not None
        for event, row in zip(targets, out.user_vectors, strict=True):
            found["retrieval", scored, *event] = row
    return found


def events_in_order(change) -> list[tuple[int, int, int]]:
    """Return (session, place, time) of all events by time."""
    events = [
        (number, i, LATE + time + 40 * (change == (number, i, "time")))
        for number, times in TIMES.items()
        for i, time in enumerate(times)
    ]
    return sorted(events, key=lambda e: e[2])


def precedes(key, mode, change) -> bool:
    """Return whether a prediction must not know of a change."""
    kind, scored, number, i = key
    changed, place, what = change
    anchor = LATE + TIMES[scored][0]
    time_of_change = LATE + TIMES[changed][place]
    if changed == scored:
        if mode[1] == "session":
            # Candidates know the session's start, and each its own item.
            if what == "time":
                return place > 0
            return what == "action" or kind == "retrieval" or i != place
        if number != scored:  # an event of the history, which knows nothing of the session
            return True
        # An action is known after the event; item and time at the event, but not before it: what
        # retrieves the item knows the time of the request and not the item.
        if i < place:
            return True
        return i == place and (what == "action" or (what == "item" and kind == "retrieval"))
    if time_of_change >= anchor:
        return True
    if number == scored:
        return False
    times = {(n, k): LATE + t for n, ts in TIMES.items() for k, t in enumerate(ts)}
    return times[number, i] < time_of_change


def leaks(
    tmp_path, mode, encoder="hstu", hstu: HSTUConfig = SMALL, mixture=None
) -> tuple[set, set]:
    """Return the (change, prediction) pairs that leak, and those that show, as they may."""
    before = predict(tmp_path / "before", mode, encoder, hstu=hstu, mixture=mixture)
    leaking, showing = set(), set()
    for number, times in TIMES.items():
        for place in range(len(times)):
            for what in CHANGES:
                change = (number, place, what)
                name = "-".join(map(str, change))
                after = predict(tmp_path / name, mode, encoder, change, hstu, mixture)
                for key, value in before.items():
                    if precedes(key, mode, change):
                        if not torch.equal(value, after[key]):
                            leaking.add((change, key))
                    elif key in after and not torch.equal(value, after[key]):
                        showing.add((change, key))
    return leaking, showing


@pytest.mark.parametrize("mode", MODES, ids="-".join)
def test_no_prediction_knows_what_comes(tmp_path, mode):
    leaking, showing = leaks(tmp_path, mode)
    assert leaking == set()
    # The past does reach the predictions: each kind of change shows somewhere.
    assert {change[2] for change, _ in showing} == set(CHANGES)


@pytest.mark.parametrize("encoder", ["sasrec", "transformer", "cross_attention"])
def test_nor_does_a_baseline(tmp_path, encoder):
    leaking, showing = leaks(tmp_path, MODES[0], encoder)
    assert leaking == set()
    assert {change[2] for change, _ in showing} >= {"item", "action"}


@pytest.mark.parametrize("mode", [MODES[0], MODES[6]], ids="-".join)
def test_nor_do_layers_that_drop_history(tmp_path, mode):
    hstu = replace(
        SMALL,
        semi_local=SemiLocalConfig(window=2, global_columns=1),
        truncation=TruncationConfig(layers=1, history=2),
    )
    leaking, showing = leaks(tmp_path, mode, hstu=hstu)
    assert leaking == set()
    assert {change[2] for change, _ in showing} >= {"item", "action"}


@pytest.mark.parametrize(
    "mode",
    [MODES[0], MODES[6], *(pytest.param(MODES[i], marks=pytest.mark.slow) for i in (2, 4))],
    ids="-".join,
)
def test_a_mask_that_sees_one_key_too_many_is_caught(tmp_path, mode, monkeypatch):
    real = attention.visible

    def leaky(row, col, length, num_candidates, mask):
        sees = real(row, col, length, num_candidates, mask)
        return sees | ((col == row + 1) & (col < length))

    monkeypatch.setattr(attention, "visible", leaky)
    leaking, _ = leaks(tmp_path, mode)
    assert leaking


def test_a_clock_that_counts_from_the_end_is_caught(tmp_path, monkeypatch):
    def leaky(info, sequence_L):
        return info.timestamp[info.offsets[1:] - 1][sequence_L]

    monkeypatch.setattr(gr.encodings, "session_time", leaky)
    leaking, _ = leaks(tmp_path, MODES[0])
    assert {change[2] for change, _ in leaking} == {"time"}


@pytest.mark.parametrize("mode", MODES[:4], ids="-".join)
def test_dlrm_reads_each_event_by_itself(tmp_path, mode):
    data = data_config(random_log(tmp_path), mode)
    config = train_config(data, encoder="dlrm", dim=8, head=HeadConfig(retrieval=False))
    tables = make_tables(config)
    torch.manual_seed(0)
    model = dense_model(config, feature_dims(config), 0).eval()
    vocabulary = Vocabulary(config.embeddings)
    owner = {f: name for name, t in config.embeddings.tables.items() for f in t.features}

    def row(feature, raw):
        table = owner[feature]
        return tables.weights[table][vocabulary.row_of(table, torch.tensor([raw]))]

    compared = 0
    for batch in batches(data):
        expected = {task: [] for task in data.tasks}
        for sequence in take_apart(batch, data):
            carries = [k in (1, 3, 4) for k in sequence["kind"]]
            for position, _, dense in sequence["ranking"]:
                item = sum(carries[:position])
                features = {"item_id": row("item_id", sequence["item_id"][item])}
                for name, values in sequence["item_features"].items():
                    features[name] = row(name, values[item])
                for name, (value,) in sequence["context"].items():
                    features[name] = row(name, value)
                out = model.ranking(model.dlrm(torch.tensor([dense]), features))
                for task, value in out.items():
                    expected[task].append(value[0])
        rows = {k: v.float() for k, v in look_up(config, tables, batch).items()}
        found = model(batch, sequence_info(batch), rows)
        assert found.user_vectors is None
        for task, values in expected.items():
            compared += len(values)
            if values:
                torch.testing.assert_close(found.ranking[task], torch.stack(values))
    assert compared > 20
