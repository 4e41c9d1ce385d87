"""Which values of a batch count towards a row of their id: an event once, though it comes again."""

from collections import Counter
from dataclasses import replace

import pytest

from embeddings.config import DynamicIdsConfig
from gr.config import TrainConfig
from gr.config_io import load_config
from gr.ids import IdRows
from gr.staging import stage
from tests.gr.batches import (
    batches,
    data_config,
    make_tables,
    random_log,
    random_sessions,
    train_config,
)
from tests.gr.test_epochs import CONFIG as EPOCHS
from tests.pipelines.logs import RICH


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    return random_log(tmp_path_factory.mktemp("log") / "log")


@pytest.mark.parametrize("context", ["prefix", "merged"])
@pytest.mark.parametrize(("layout", "anchor"), [("interleaved", "event"), ("merged", "session")])
def test_each_value_of_the_log_counts_once(log, layout, anchor, context):
    never = DynamicIdsConfig(admit_after=10**6, max_waiting=10**4)
    data = data_config(log, (layout, anchor, "session", context), max_session_events=9, **RICH)
    config = train_config(data)
    tables = {
        name: replace(table, ids="dynamic", dynamic=never)
        for name, table in config.embeddings.tables.items()
    }
    config = replace(
        config,
        data=replace(data, num_items=0),
        embeddings=replace(config.embeddings, tables=tables),
    )
    id_rows = IdRows(config, make_tables(config), "item")
    for step, batch in enumerate(batches(config.data)):
        staged = stage(batch, id_rows, id_rows.tables, model=config.model)
        assert not staged.batch.ids.values().any()  # nothing has a row yet
        id_rows.observe(staged.seen, step=step, time=staged.time)

    sessions = [row for part in random_sessions(0) for row in part]
    events = [event for row in sessions for event in row["events"]]
    expected = {
        "item": Counter(event["item_id"] for event in events),
        # Two features: the first two genres, and of the first three whether they are 2 or more.
        "genres": Counter(x for event in events for x in (event["genres"] or [])[:2])
        + Counter(
            int(x >= 2) for event in events for x in (event["genres"] or [])[:3] if x is not None
        ),
    }
    for name, counter in expected.items():
        waiting = id_rows.dynamic.maps[name].waiting
        counter.pop(None, None)
        got = dict(zip(waiting.ids.tolist(), waiting.columns["count"].tolist(), strict=True))
        assert got == dict(counter), name


def test_ids_of_many_epochs_are_static(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(EPOCHS)
    with pytest.raises(ValueError, match=r"tables \['item'\] with ids=dynamic have no use"):
        load_config(TrainConfig, path, ("embeddings.tables.item.ids=dynamic",))
