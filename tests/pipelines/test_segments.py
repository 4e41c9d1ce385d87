import threading
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.batch import StreamPosition
from pipelines.config import CounterConfig, FeatureConfig, SessionizeConfig, TaskConfig
from pipelines.rejects import WHOLE_FILE
from pipelines.segments import segment_names
from pipelines.sessionize import sessionize
from pipelines.stream import SessionStream, Snapshots
from tests.pipelines.logs import MODES, content, make_config, take_apart
from tests.pipelines.session_log import session, write_log


def hour(number, partitions=2):
    """Return the sessions of an hour: five of partition 0, three of partition 1."""
    return [
        [
            session(
                p + 2 * (n % 2),
                100 * number + 10 * p + n,
                [{"t": 3600 * number + 60 * n + k, "item": n, "click": True} for k in range(2)],
            )
            for n in range(5 - 2 * p)
        ]
        for p in range(partitions)
    ]


def write_hours(folder, *hours):
    for number in hours:
        write_log(folder / f"h{number:02d}", hour(number))


@pytest.fixture
def log(tmp_path):
    write_log(
        tmp_path / "log" / "h01", hour(1), [[session(p, -1, [{"t": 0, "item": 9}])] for p in (0, 1)]
    )
    write_hours(tmp_path / "log", 2, 3)
    return tmp_path / "log"


def config_of(log, **changes):
    return make_config(log, *MODES[0], **({"window": "none"} | changes))


def ids(batches, config):
    return [s["session_id"] for b in batches for s in take_apart(b, config)]


def test_segments_are_one_log_read_in_the_order_of_names(log, tmp_path):
    (log / ".draft").mkdir()
    (log / "notes").mkdir()
    config = config_of(log)
    batches = list(SessionStream(config, seed=0))
    one = tmp_path / "one"
    rows = [[row for n in (1, 2, 3) for row in hour(n)[p]] for p in (0, 1)]
    write_log(one, rows, [[session(p, -1, [{"t": 0, "item": 9}])] for p in (0, 1)])
    by_hour = config_of(one, window="hour")  # barriers where the segments have theirs
    same = list(SessionStream(by_hour, seed=0))
    drop = ("position", "window")
    assert [{k: v for k, v in content(b).items() if k not in drop} for b in batches] == [
        {k: v for k, v in content(b).items() if k not in drop} for b in same
    ]
    assert [b.position.rows for b in batches] == [b.position.rows for b in same]
    assert batches[0].position.segments == ("h01",)
    assert batches[-1].position.segments == ("h01", "h02", "h03")


@pytest.mark.parametrize("from_snapshot", [False, True])
def test_resume_in_every_segment(log, tmp_path, from_snapshot):
    config = config_of(log)
    written = Snapshots(tmp_path / "snapshots", lambda step: True)
    whole = list(SessionStream(config, seed=0, snapshots=written))
    for done, batch in enumerate(whole, start=1):
        histories = written.path(done) if from_snapshot else None
        rest = SessionStream(config, seed=0, position=batch.position, histories=histories)
        assert [content(b) for b in rest] == [content(b) for b in whole[done:]]


def test_following_reads_what_lands_and_stops_when_nothing_does(log, monkeypatch, tmp_path):
    monkeypatch.setattr("pipelines.stream.POLL_SECONDS", 0.01)
    expected = list(SessionStream(config_of(log), seed=0))
    hidden = {name: log / name for name in ("h02", "h03")}
    for name, path in hidden.items():
        path.rename(tmp_path / name)

    def land():
        for name, path in hidden.items():
            time.sleep(0.2)
            (tmp_path / name).rename(path)

    config = config_of(log, follow=True, follow_idle_seconds=1.0)
    written = Snapshots(tmp_path / "snapshots", lambda step: False)
    stream = SessionStream(config, seed=0, snapshots=written)
    thread = threading.Thread(target=land)
    thread.start()
    batches = list(stream)
    ended = time.monotonic()
    thread.join()
    assert [content(b) for b in batches] == [content(b) for b in expected]
    # Where it stopped there is a snapshot: a later run goes on with what landed since.
    write_hours(log, 4)
    more = SessionStream(
        config, seed=0, position=batches[-1].position, histories=written.path(len(batches))
    )
    replayed = SessionStream(config_of(log), seed=0, position=batches[-1].position)
    rest = [content(b) for b in more]
    assert rest == [content(b) for b in replayed]
    assert len(rest) == 3
    assert time.monotonic() - ended > 1.0


def test_what_lands_late_is_read_next(log, monkeypatch, tmp_path):
    monkeypatch.setattr("pipelines.stream.POLL_SECONDS", 0.01)
    (log / "h02").rename(tmp_path / "h02")
    config = config_of(log, follow=True, follow_idle_seconds=0.5, window="hour")
    batches = []
    for batch in SessionStream(config, seed=0):
        batches.append(batch)
        if len(batches) == 4:  # the first of h03
            (tmp_path / "h02").rename(log / "h02")
    assert batches[-1].position.segments == ("h01", "h03", "h02")
    assert len(ids(batches, config)) == 24
    # Sessions of a window that is over count to the one that is open.
    windows = [b.window for b in batches]
    assert windows == sorted(windows)
    rest = SessionStream(config_of(log, window="hour"), seed=0, position=batches[4].position)
    assert [content(b)["values"] for b in rest] == [content(b)["values"] for b in batches[5:]]


def test_all_ranks_follow_what_rank_0_sees(log, monkeypatch):
    config = config_of(log, follow=True, follow_idle_seconds=0.0)
    told = []

    def broadcast(value):
        told.append(value)
        return value

    main = list(SessionStream(config, seed=0, rank=0, world_size=2, from_rank_0=broadcast))
    assert told == ["h02", "h03", "/"]
    answers = iter(told)
    other = SessionStream(
        config, seed=0, rank=1, world_size=2, from_rank_0=lambda own: next(answers)
    )
    assert len(list(other)) == len(main) == 9


def test_a_segment_whose_files_all_fail_is_counted(log):
    for path in (log / "h03").glob("part-*"):
        path.unlink()
    told = []
    config = config_of(log)
    batches = list(SessionStream(config, seed=0, on_reject=told.append))
    assert len(ids(batches, config)) == 16
    assert [(r.file, r.num_sessions, r.reason) for r in told] == [
        ("h03/part-00000.parquet", 5, WHOLE_FILE),
        ("h03/part-00001.parquet", 3, WHOLE_FILE),
    ]


def test_segments_that_do_not_fit_are_refused(log):
    write_log(log / "h04", hour(4, partitions=1))
    with pytest.raises(ValueError, match="h04: partitions is 1, the segments before it have 2"):
        SessionStream(config_of(log), seed=0)
    write_log(log / "h04", hour(4), [[session(p, -1, [])] for p in (0, 1)])
    with pytest.raises(ValueError, match="h04 holds starting histories"):
        SessionStream(config_of(log), seed=0)


def test_a_position_of_segments_that_are_gone_is_refused(log):
    position = StreamPosition((5, 3), 3, ("h00",))
    with pytest.raises(ValueError, match=r"lacks the segment\(s\) \['h00'\]"):
        SessionStream(config_of(log), seed=0, position=position)
    position = StreamPosition((5, 3), 3, ())
    with pytest.raises(ValueError, match="position: after step 3"):
        SessionStream(config_of(log), seed=0, position=position)


def test_names_of_segments(log, tmp_path):
    assert segment_names(log) == ["h01", "h02", "h03"]
    assert segment_names(log, {"h01", "h02"}) == ["h03"]
    assert segment_names(log / "h01") == [""]
    assert segment_names(tmp_path / "nowhere") == [""]
    assert segment_names(log / "h01", {""}) == []


@pytest.mark.parametrize("use", ["dense_features", "item_features"])
def test_counters_that_know_the_session_are_refused_at_its_start(tmp_path, use):
    pq.write_table(
        pa.table({"user_id": [1, 1], "item_id": [2, 2], "timestamp": [5, 6], "click": [1, 0]}),
        tmp_path / "events.parquet",
    )
    sessionize(
        SessionizeConfig(
            input=str(tmp_path / "events.parquet"),
            output=str(tmp_path / "log"),
            actions=("click",),
            counters={"past": CounterConfig(keys=("user_id",), actions=("click",))},
            partitions=1,
            threads=1,
        )
    )
    plain = {"actions": {}, "item_features": {}, "context_features": {}, "tasks": {}}
    plain |= {"dense_features": (), "tasks": {"click": TaskConfig(action="click")}}
    counted = {
        "dense_features": ("past_click",),
        "item_features": {"n": FeatureConfig(column="past_count", encoding="zscore")},
    }
    changes = plain | {use: counted[use]}
    SessionStream(make_config(tmp_path / "log", *MODES[0], **changes), seed=0)
    with pytest.raises(ValueError, match=r"predicts at the start of the session, but \['past_"):
        SessionStream(make_config(tmp_path / "log", *MODES[2], **changes), seed=0)
