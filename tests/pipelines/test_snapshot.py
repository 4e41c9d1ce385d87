import os
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipelines.event_memory import Spill
from pipelines.history import CLIPPED, HistoryStore, empty_progress
from pipelines.snapshot import Standing, read_snapshot, write_snapshot
from pipelines.stream import SessionStream, Snapshots
from tests.pipelines.logs import MODES, content, logs, make_config
from tests.pipelines.session_log import session, write_log
from tests.pipelines.test_history import draw_sessions, make_rules, room_for

FEW = settings(
    max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
HERE = Standing(partition=1, rows=800, rejected={"no events": 2}, encoding="x", log=("a", "b"))


@pytest.fixture(autouse=True)
def small_blocks_and_regions(monkeypatch):
    monkeypatch.setattr("pipelines.partition.ROWS_PER_BLOCK", 3)
    monkeypatch.setattr("pipelines.stream.EXTRA_ROWS", 2)
    monkeypatch.setattr("pipelines.snapshot._EVENTS_PER_BATCH", 16)
    monkeypatch.setattr("pipelines.snapshot._USERS_PER_BATCH", 5)


@pytest.mark.parametrize("mode", [MODES[0], MODES[3], MODES[-1]], ids="-".join)
@given(log=logs(max_partitions=3), data=st.data())
@FEW
def test_what_follows_a_snapshot_is_what_follows_the_log(mode, log, data):
    partitions, histories = log
    if not any(partitions):
        return
    with tempfile.TemporaryDirectory() as folder:
        write_log(Path(folder), partitions, histories)
        config = make_config(
            folder, *mode, sessions_per_partition=1, prefetch=data.draw(st.sampled_from([0, 2]))
        )
        written = Snapshots(Path(folder, "snapshots"), lambda step: step % 2 == 1)
        whole = list(SessionStream(config, seed=1, snapshots=written))
        steps = [s for s in range(1, len(whole)) if s % 2 == 1] + [len(whole)]
        assert sorted(p.name for p in written.folder.iterdir()) == sorted(
            f"step_{step}" for step in steps
        )
        world_size = data.draw(st.integers(1, len(partitions)))
        for step in steps:
            streams = [
                SessionStream(
                    config,
                    seed=1,
                    rank=rank,
                    world_size=world_size,
                    position=whole[step - 1].position,
                    histories=written.path(step),
                )
                for rank in range(world_size)
            ]
            rests = [[content(b) for b in stream] for stream in streams]
            if world_size == 1:
                assert rests[0] == [content(b) for b in whole[step:]]
            else:
                replayed = [
                    list(
                        SessionStream(
                            config,
                            seed=1,
                            rank=rank,
                            world_size=world_size,
                            position=whole[step - 1].position,
                        )
                    )
                    for rank in range(world_size)
                ]
                assert rests == [[content(b) for b in each] for each in replayed]


def test_the_log_before_the_snapshot_is_not_decoded_again(tmp_path, monkeypatch):
    rows = [session(3, n, [{"t": 10 * n + 1, "item": n, "click": True}]) for n in range(30)]
    write_log(tmp_path, [rows], [[session(3, -1, [{"t": 0, "item": 1}])]], row_group_size=3)
    written = Snapshots(tmp_path / "snapshots", lambda step: step == 10)
    config = make_config(tmp_path, *MODES[0])
    whole = list(SessionStream(config, seed=0, snapshots=written))
    decoded = []
    import pipelines.reader as reader

    decode = reader._decode
    monkeypatch.setattr(
        reader,
        "_decode",
        lambda batch, *rest: decoded.append(batch.num_rows) or decode(batch, *rest),
    )
    rest = SessionStream(config, seed=0, position=whole[9].position, histories=written.path(10))
    assert [content(b) for b in rest] == [content(b) for b in whole[10:]]
    assert sum(decoded) == 12  # rows 18 .. 29: whole row groups of 3 from row 20 on


def test_rejects_before_the_snapshot_count_against_the_limit(tmp_path):
    rows = [session(3, n, [{"t": 10 * n + 1, "item": n}]) for n in range(12)]
    for n in (0, 11):
        rows[n]["events"][0]["item_id"] = None
    write_log(tmp_path, [rows])
    config = make_config(tmp_path, *MODES[0])
    written = Snapshots(tmp_path / "snapshots", lambda step: step == 2)
    position = list(SessionStream(config, seed=0, snapshots=written))[1].position
    strict = make_config(tmp_path, *MODES[0], max_reject_fraction=0.1)
    rest = SessionStream(strict, seed=0, position=position, histories=written.path(2))
    with pytest.raises(ValueError, match="2 of 12 sessions"):
        list(rest)


def fill(store, last=800):
    sessions, events = draw_sessions(np.random.default_rng(1), 900, 30, 5)
    store.extend(sessions, events, 0, last)
    return sessions, events


def read_on(store, sessions, events):
    out, progress = room_for(100, 2000), empty_progress()
    store.advance(sessions, events, 800, 900, partition=0, out=out, progress=progress)
    _, num_events, num_supervised = progress[1:4]
    ints, floats, codes = out.events
    return (
        progress.tolist(),
        ints[: num_events * 3].tolist(),
        codes[: num_events * 2].tolist(),
        floats[:num_supervised].tolist(),
        out.rows[: progress[1]].tolist(),
    )


@pytest.mark.parametrize("kept_floats", [0, 1])
def test_a_store_and_its_restored_twin_read_alike(tmp_path, kept_floats):
    rules = make_rules(max_events=6, slack=4, kept_floats=kept_floats)
    store, twin = HistoryStore(rules), HistoryStore(rules)
    sessions, events = fill(store)
    write_snapshot(tmp_path / "a", store, HERE)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert read_snapshot(tmp_path / "a", twin, HERE) == HERE.rejected
    assert twin.num_users == store.num_users
    expected = read_on(store, sessions, events)
    assert expected[0][4] > 0  # clipped sequences: `total` came along
    assert read_on(twin, sessions, events) == expected


@pytest.mark.parametrize("num_events", [9, 10, 11, 25])
def test_the_number_of_events_ever_seen_comes_along(tmp_path, num_events):
    # Of 10 events that are kept none is before time 0: history was lost if there were more.
    rules = make_rules(max_events=6, slack=4)
    store, twin = HistoryStore(rules), HistoryStore(rules)
    sessions, events = draw_sessions(np.random.default_rng(1), num_events + 1, 1, 1)
    sessions.reason[:] = 0
    store.extend(sessions, events, 0, num_events)
    write_snapshot(tmp_path / "a", store, HERE)
    read_snapshot(tmp_path / "a", twin, HERE)
    assert twin.arena.total[0] == store.arena.total[0] == num_events
    sessions.start_ts[-1] = 0
    for each in (store, twin):
        out, progress = room_for(1, 11), empty_progress()
        each.advance(
            sessions, events, num_events, num_events + 1, partition=0, out=out, progress=progress
        )
        assert progress[CLIPPED] == (num_events > 10)


def test_a_snapshot_of_many_batches_is_sent_to_the_disk_as_it_grows(tmp_path, monkeypatch):
    monkeypatch.setattr("pipelines.snapshot._BYTES_PER_SYNC", 1000)
    synced = []
    fdatasync = os.fdatasync
    monkeypatch.setattr(os, "fdatasync", lambda handle: synced.append(1) or fdatasync(handle))
    rules = make_rules(max_events=6, slack=4)
    store, twin = HistoryStore(rules), HistoryStore(rules)
    sessions, events = fill(store)
    write_snapshot(tmp_path / "a", store, HERE)
    assert len(synced) > 5
    read_snapshot(tmp_path / "a", twin, HERE)
    assert read_on(twin, sessions, events) == read_on(store, sessions, events)

    def full(handle):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fdatasync", full)
    with pytest.raises(OSError, match="no space left"):
        write_snapshot(tmp_path / "b", store, HERE)
    assert not (tmp_path / "b").exists()


def test_a_snapshot_of_another_place_or_configuration_is_refused(tmp_path):
    rules = make_rules(max_events=6, slack=4)
    store = HistoryStore(rules)
    fill(store)
    path = tmp_path / "histories-00001.arrow"
    write_snapshot(path, store, HERE)
    for changed in ({"rows": 7}, {"partition": 2}, {"encoding": "y"}, {"log": ("a",)}):
        expected = Standing(**{f: getattr(HERE, f) for f in Standing.__slots__} | changed)
        (key,) = changed
        with pytest.raises(ValueError, match=rf"histories-00001.arrow: its histories have {key}"):
            read_snapshot(path, HistoryStore(rules), expected)
    with pytest.raises(ValueError, match=r"histories-00002.arrow is missing"):
        read_snapshot(tmp_path / "histories-00002.arrow", HistoryStore(rules), HERE)
    wider = make_rules(max_events=6, slack=4, kept_floats=0)
    with pytest.raises(ValueError, match="do not have the sizes of the configuration"):
        read_snapshot(path, HistoryStore(wider), HERE)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, pa.schema({"a": pa.int8()})):
        pass
    with pytest.raises(ValueError, match="expected format 'gr histories 1', found None"):
        read_snapshot(path, HistoryStore(rules), HERE)


def test_a_damaged_snapshot_is_refused(tmp_path):
    rules = make_rules(max_events=6, slack=4)
    store = HistoryStore(rules)
    fill(store)
    path = tmp_path / "histories-00001.arrow"
    write_snapshot(path, store, HERE)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="is damaged"):
        read_snapshot(path, HistoryStore(rules), HERE)
    # A flipped bit inside the values, which no format check sees.
    value = int(store.arena.events.ints[store.arena.base[0] * 3 + store.arena.length[0] * 3 - 3])
    place = whole.index(value.to_bytes(8, "little"))
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
    with pytest.raises(ValueError, match="is damaged in batch"):
        read_snapshot(path, HistoryStore(rules), HERE)


def test_histories_that_outgrow_their_budget_move_to_files(tmp_path):
    rules = make_rules(max_events=6, slack=4)
    plain = HistoryStore(rules)
    sessions, events = fill(plain)
    spilled = HistoryStore(rules, Spill(max_bytes=1, folder=str(tmp_path)))
    late = HistoryStore(rules, Spill(max_bytes=200_000, folder=str(tmp_path)))
    for store in (spilled, late):
        assert not store.in_files
        fill(store, 10)
    assert (spilled.in_files, late.in_files) == (True, False)
    for store in (spilled, late):
        store.extend(sessions, events, 10, 800)
        for user in range(100, 4000):  # new users, so that files grow and the late one moves
            more = sessions._replace(user_id=np.full_like(sessions.user_id, user))
            store.extend(more, events, 0, 2)
        assert store.in_files
        assert list(tmp_path.iterdir()) == []  # nothing is left behind, whatever ends the process
        assert read_on(store, sessions, events)[1:] == read_on(plain, sessions, events)[1:]
        plain = HistoryStore(rules)
        fill(plain)
    with pytest.raises(ValueError, match=r"data.spill_folder='.*nowhere' cannot be written"):
        fill(HistoryStore(rules, Spill(max_bytes=1, folder=str(tmp_path / "nowhere"))))
