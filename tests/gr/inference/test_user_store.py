"""The embedded store against the events that the log was made of."""

import numpy as np
import pytest

from gr.config import TrainConfig
from gr.config_io import load_config
from gr.inference.user_store import read_users
from tests.e2e.toy import events, write_config, write_log


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("users")
    path = write_config(folder, write_log(folder, users=12, days=5))
    # 8 events of history and 8 beside them are kept, of 40 a user.
    changes = ["data.max_history_tokens=16", "data.overlap_slack=8"]
    return load_config(TrainConfig, path, changes)[0].data


@pytest.fixture
def store(data):
    return read_users(data)


def of(user, rows):
    return sorted((r for r in rows if r["user_id"] == user), key=lambda r: r["timestamp"])


def test_it_holds_the_newest_events_of_every_user(store):
    rows = events(users=12, days=5)
    assert store.num_users == 12
    assert store.num_events == 12 * 16
    for user in range(12):
        history = store.history(user)
        wanted = of(user, rows)[-16:]
        assert history.ints[:, 0].tolist() == [r["item_id"] for r in wanted]
        assert history.ints[:, 1].tolist() == [r["timestamp"] for r in wanted]
        # Code of a flag: 1 is no, 2 is yes.
        assert history.codes[:, 0].tolist() == [1 + r["click"] for r in wanted]
        # Interval of the price: below 1, below 2, at least 2.
        assert history.ints[:, 2].tolist() == [int(r["price"]) for r in wanted]
    assert store.history(12) is None
    assert store.history(-1) is None


def test_it_holds_the_newest_features_of_every_item(store):
    rows, known = store.item_rows(np.array([3, 23, 99, 0]))
    assert known.tolist() == [True, True, False, True]
    assert rows[known, 0].tolist() == [3, 23, 0]
    assert rows[known, 2].tolist() == [0, 2, 0]
    newest = {r["item_id"]: r["timestamp"] for r in sorted(events(users=12, days=5), key=time_of)}
    assert rows[known, 1].tolist() == [newest[i] for i in (3, 23, 0)]
    assert store.num_items == 24


def time_of(row):
    return row["timestamp"]


def test_added_events_join_in_the_order_of_time(store):
    before = store.history(4)
    times = before.ints[:, 1]
    new = before.ints[:3].copy()
    new[:, 0] = [7, 8, 9]
    new[:, 1] = [times[2], times[5] + 1, times[-1] + 9]
    codes = before.codes[:3]
    assert store.add(4, new, codes) == 16
    after = store.history(4)
    wanted = [*zip(times.tolist(), before.ints[:, 0].tolist(), strict=True)]
    for event in zip(new[:, 1].tolist(), new[:, 0].tolist(), strict=True):
        place = sum(time <= event[0] for time, _ in wanted)  # behind what was there
        wanted.insert(place, event)
    assert list(zip(*after.ints[:, [1, 0]].T.tolist(), strict=True)) == wanted[-16:]
    assert len(before.ints) == 16
    assert before.ints[:, 1].tolist() == times.tolist()  # what was handed out stays as it was


def test_a_new_user_begins_with_what_is_added(store):
    given = store.history(0)
    assert store.add(777, given.ints[:2], given.codes[:2]) == 2
    assert store.history(777).ints.tolist() == given.ints[:2].tolist()
    assert store.num_users == 13
    store.add(0, given.ints[-1:], given.codes[-1:])
    assert store.num_users == 13
