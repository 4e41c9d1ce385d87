"""The whole log of the quickstart through the stream, against the plain-Python oracle.

pytest -m slow tests/pipelines/test_whole_log.py      # some minutes
"""

from collections import Counter
from dataclasses import replace

import pyarrow.parquet as pq
import pytest

from gr.config import TrainConfig
from gr.config_io import load_config
from pipelines.config import SessionizeConfig
from pipelines.schema import history_name, part_name
from pipelines.sessionize import sessionize
from pipelines.stream import SessionStream
from tests.pipelines.logs import SEED, as_float32, take_apart
from tests.pipelines.oracle import Oracle

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
EVENTS = "pipelines/samples/kuairand_pure/events.parquet"
MODES = {
    "quickstart": {},
    "candidates": {"layout": "merged", "anchor": "session", "max_history_tokens": 32},
}


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    output = tmp_path_factory.mktemp("whole") / "log"
    config, _ = load_config(
        SessionizeConfig, "configs/quickstart_log.yaml", [f"output={output}", "threads=2"]
    )
    return output, sessionize(config)


def rows_of(folder, name):
    return pq.read_table(folder / name).to_pylist()


def supervised(sequence):
    """Yield (user, item, time) of each event whose labels are read, and check its anchor."""
    item_of, time_of, items = {}, {}, iter(sequence["item_id"])
    for t, kind in enumerate(sequence["kind"]):
        if kind in (1, 3, 4):
            item_of[t], time_of[t] = next(items), sequence["timestamp"][t]
    history = [t for t in time_of if t < sequence["session_start"]]
    anchor = sequence["timestamp"][sequence["session_start"]]
    assert all(time_of[t] < anchor for t in history)
    assert sequence["timestamp"] == sorted(sequence["timestamp"])
    for position, *_ in sequence["ranking"]:
        yield sequence["user_id"], item_of[position], time_of[position]


@pytest.mark.parametrize("mode", MODES)
def test_the_whole_log_equals_the_oracle(mode, log):
    folder, manifest = log
    train, _ = load_config(TrainConfig, "configs/quickstart.yaml", [f"data.log={folder}"])
    config = replace(train.data, num_negatives=2, prefetch=0, **MODES[mode])
    numbers = range(manifest.partitions)
    oracle = Oracle(
        config,
        [rows_of(folder, part_name(p)) for p in numbers],
        [rows_of(folder, history_name(p)) for p in numbers],
        seed=SEED,
    )
    sessions, found_events = 0, Counter()
    for batch, (window, rows, sequences, refused) in zip(
        SessionStream(config, seed=SEED), oracle.steps(), strict=True
    ):
        found = [as_float32(s) for s in take_apart(batch, config)]
        assert sum(s.pop("clipped") for s in sequences) == batch.num_clipped
        assert sum(s.pop("num_events") for s in sequences) == batch.num_events
        assert sum(s.pop("num_cut") for s in sequences) == batch.num_cut_bags
        assert found == [as_float32(s) for s in sequences]
        assert (batch.window, batch.position.rows, refused) == (window, rows, [])
        sessions += len(sequences)
        for sequence in found:
            found_events.update(supervised(sequence))
    assert sessions >= manifest.num_sessions == 116_448
    log_events = pq.read_table(EVENTS, columns=["user_id", "item_id", "time_ms"]).to_pandas()
    log_events = log_events.drop_duplicates()
    assert found_events.total() == len(log_events) == manifest.num_events
    if mode == "quickstart":  # a candidate has the time of its anchor, not its own
        seconds = log_events["time_ms"] // 1000
        expected = Counter(zip(log_events["user_id"], log_events["item_id"], seconds, strict=True))
        assert found_events == expected
    else:
        both = Counter()
        for (user, item, _), n in found_events.items():
            both[user, item] += n
        pairs = log_events.groupby(["user_id", "item_id"]).size()
        assert both == Counter(pairs.to_dict())
