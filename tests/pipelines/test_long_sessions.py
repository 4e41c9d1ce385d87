"""Sessions read in slices: the same sequences as those of whole sessions, over more steps."""

import tempfile
from collections import Counter
from dataclasses import replace
from operator import attrgetter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from pipelines import long_sessions
from pipelines.long_sessions import read_slices
from pipelines.manifest import read_manifest, write_manifest
from pipelines.stream import SessionStream, Snapshots
from tests.pipelines.logs import MODES, content, logs, make_config, take_apart
from tests.pipelines.session_log import session, write_log

FEW = settings(
    max_examples=4,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    phases=(Phase.explicit, Phase.generate),
)
WHOLE = 10**9


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr("pipelines.partition.ROWS_PER_BLOCK", 3)


def by_partition(batches, config):
    """Return partition -> its sequences in order."""
    found = {}
    for batch in batches:
        for p, sequence in zip(batch.partition.tolist(), take_apart(batch, config), strict=True):
            found.setdefault(p, []).append(repr(sequence))
    return found


def read(config, pieces, **changes):
    """Return the batches and rejects of a pass over slices of so many pieces."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(long_sessions, "PIECES_PER_SLICE", pieces)
        rejects = []
        return list(SessionStream(config, seed=1, on_reject=rejects.append, **changes)), rejects


@pytest.mark.parametrize("mode", [MODES[0], MODES[4], MODES[-1]], ids="-".join)
@given(log=logs(max_partitions=3), size=st.integers(1, 2), pieces=st.integers(1, 2))
@FEW
def test_slices_hold_the_sequences_of_whole_sessions(mode, log, size, pieces):
    partitions, histories = log
    if not any(partitions):
        return
    with tempfile.TemporaryDirectory() as folder:
        write_log(Path(folder), partitions, histories)
        config = make_config(folder, *mode, max_session_events=size, sessions_per_partition=1)
        whole, expected_rejects = read(config, WHOLE)
        batches, rejects = read(config, pieces)
        assert by_partition(batches, config) == by_partition(whole, config)
        # Steps are others, so partitions take turns in another order.
        place = attrgetter("partition", "row")
        assert sorted(rejects, key=place) == sorted(expected_rejects, key=place)
        for batch in batches:
            each = Counter(batch.partition.tolist())
            assert max(each.values(), default=0) <= pieces
        # Each step resumes, by replay and from its snapshot, also within a session.
        written = Snapshots(Path(folder, "snapshots"), lambda step: True)
        read(config, pieces, snapshots=written)
        for step in range(1, len(batches), max(1, len(batches) // 4)):
            expected = [content(b) for b in batches[step:]]
            for histories_there in (None, written.path(step)):
                rest, _ = read(
                    config, pieces, position=batches[step - 1].position, histories=histories_there
                )
                assert [content(b) for b in rest] == expected


@pytest.mark.parametrize("fill", ["tokens", "flops"])
@given(log=logs(max_partitions=3), data=st.data())
@FEW
def test_plans_count_slices(fill, log, data):
    partitions, histories = log
    if not any(partitions):
        return
    with tempfile.TemporaryDirectory() as folder:
        write_log(Path(folder), partitions, histories)
        config = make_config(folder, *MODES[1], max_session_events=1, sessions_per_partition=8)
        whole, _ = read(config, WHOLE)
        budget = data.draw(st.sampled_from([1.0, 25.0]))
        filled = replace(config, fill=fill, budget=budget)
        batches, _ = read(filled, 2)
        assert by_partition(batches, filled) == by_partition(whole, config)
        for world_size in range(1, len(partitions) + 1):
            ranks = [read(filled, 2, rank=r, world_size=world_size)[0] for r in range(world_size)]
            merged = {}
            for rank in ranks:
                merged |= by_partition(rank, filled)
            assert merged == by_partition(whole, config)
            assert len({len(rank) for rank in ranks}) == 1
        if fill == "tokens":
            largest = max(len(b.session_id) for b in batches)
            assert all(b.num_tokens <= budget for b in batches if b.num_sessions > 1)
            assert budget > 1.0 or largest <= 2


def test_a_long_session_that_cannot_be_used_counts_once(tmp_path):
    long = session(3, 1, [{"t": 10 + n, "item": n} for n in range(7)])
    long["events"][4]["item_id"] = None
    rows = [session(3, 0, [{"t": 1, "item": 1}] * 5), long, session(3, 2, [{"t": 99, "item": 1}])]
    write_log(tmp_path, [rows], row_group_size=1)
    config = make_config(tmp_path, *MODES[0], max_session_events=1, sessions_per_partition=1)
    batches, rejects = read(config, 2)
    assert len(batches) == 3 + 4 + 1
    assert [(r.row, r.num_sessions, r.session_id) for r in rejects] == [(1, 1, 1)]
    assert sum(sum(b.num_rejected.values()) for b in batches) == 1


def test_long_sessions_are_looked_for_where_they_can_be(tmp_path, monkeypatch):
    events = [{"t": 1, "item": n} for n in range(6)]
    rows = [session(3, 0, events[:1]), session(3, 1, events), session(3, 2, events[:3])]
    write_log(tmp_path, [rows], row_group_size=2)
    path = tmp_path / "part-00000.parquet"
    assert read_slices(path, 3, None).tolist() == [1, 2, 1]
    assert read_slices(path, 2, None).tolist() == [1, 3, 2]
    assert read_slices(path, 6, None) is None
    monkeypatch.setattr(long_sessions, "_slices_of", None)  # the footer says enough
    assert read_slices(path, 6, None) is None
    monkeypatch.setattr(long_sessions, "open_parquet", None)  # the manifest says enough
    assert read_slices(path, 6, 6) is None
    manifest = read_manifest(tmp_path)
    assert [part.longest_session for part in manifest.parts] == [None]
    known = tuple(replace(part, longest_session=6) for part in manifest.parts)
    write_manifest(replace(manifest, parts=known))
    assert read_manifest(tmp_path).parts == known


def test_a_row_group_that_cannot_be_read_is_one_row_a_session(tmp_path):
    events = [{"t": 1, "item": n} for n in range(400)]
    write_log(tmp_path, [[session(3, n, events) for n in range(4)]], row_group_size=2)
    path = tmp_path / "part-00000.parquet"
    config = make_config(
        tmp_path, *MODES[0], max_session_events=100, sessions_per_partition=1,
        max_reject_fraction=1.0,
    )  # fmt: skip
    import pyarrow.parquet as pq

    metadata = pq.ParquetFile(path).metadata
    group = metadata.row_group(1)
    columns = {group.column(i).path_in_schema: group.column(i) for i in range(group.num_columns)}
    column = columns["events.list.element.item_id"]
    data = bytearray(path.read_bytes())
    first = column.data_page_offset
    data[first + 60 : first + 90] = bytes(np.arange(30, dtype=np.uint8))
    path.write_bytes(bytes(data))
    batches, rejects = read(config, 2)
    assert len(batches) == 2 * 2 + 2
    assert sum(r.num_sessions for r in rejects) == 2
