import hashlib
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from gr.config_io import load_config
from pipelines.config import SessionizeConfig
from pipelines.samples.kuairand_pure import build
from pipelines.sessionize import sessionize

FOLDER = Path(build.__file__).parent
ROWS = {"events": 228_329, "history": 817_187, "users": 27_285, "videos": 7_583}
SHA256 = {
    "events": "82a16f17e104c053a4f6da157e069734199862f61b6c1c911febb8644f5467f5",
    "history": "b8dfe09e18e794a5573fe241c780e2a73d6e08c5dbb3f2fa20ed2a901c63767c",
    "users": "ac27ed2d082d0dfe8355ff4ec77572b613350414dfe57961930105b9628bb2f1",
    "videos": "4f4427832d8ad382daf10840ca7f670d7fa20d6dd29bb0d71e601738c6ec1b0c",
}


def read(name, columns=None):
    return pq.read_table(FOLDER / f"{name}.parquet", columns=columns)


def test_size_licence_and_attribution():
    assert sum(x.stat().st_size for x in FOLDER.iterdir() if x.is_file()) <= 8_000_000
    assert "Attribution-ShareAlike 4.0 International" in (FOLDER / "LICENSE").read_text()
    readme = (FOLDER / "README.md").read_text()
    for words in (
        "kuairand.com",
        "Chongming Gao",
        "ShareAlike 4.0",
        "What was changed",
        "synthetic",
    ):
        assert words in readme
    for rows in ROWS.values():
        assert f"{rows:,}" in readme


@pytest.mark.parametrize("name", list(ROWS))
def test_files_are_those_that_build_made(name):
    content = (FOLDER / f"{name}.parquet").read_bytes()
    assert hashlib.sha256(content).hexdigest() == SHA256[name]
    assert pq.read_metadata(FOLDER / f"{name}.parquet").num_rows == ROWS[name]


def test_events():
    events = read("events")
    china = events["time_ms"].to_numpy() + 8 * 3_600_000
    day, count = np.unique(
        china.astype("datetime64[ms]").astype("datetime64[D]"), return_counts=True
    )
    assert day.tolist() == list(
        np.arange("2022-04-24", "2022-05-09", dtype="datetime64[D]").tolist()
    )
    assert count[0] == 141
    assert count[1:].min() > 1000
    assert pc.count_distinct(events["user_id"]).as_py() == 25_156
    assert pc.count_distinct(events["item_id"]).as_py() == 6_361
    keys = np.stack([events[x].to_numpy() for x in ("user_id", "item_id", "time_ms")])
    assert keys.shape[1] - np.unique(keys, axis=1).shape[1] == 5_885
    assert all(events[x].null_count == 0 for x in events.column_names)


def test_history_is_before_the_events():
    history = read("history")
    user, time = history["user_id"].to_numpy(), history["time_ms"].to_numpy()
    last = np.append(user[1:] != user[:-1], True)
    assert np.array_equal(history["ts_exact"].to_numpy(zero_copy_only=False), last)
    assert (np.diff(time)[~last[:-1]] == 1000).all()
    assert np.bincount(user).max() <= 50
    events = (
        read("events", ["user_id", "time_ms"]).group_by("user_id").aggregate([("time_ms", "min")])
    )
    begin = np.full(user.max() + 1, np.iinfo(np.int64).max)
    begin[events["user_id"].to_numpy()] = events["time_ms_min"].to_numpy()
    # The history's own time has whole seconds.
    assert (time <= begin[user]).all()


def test_every_event_and_history_finds_its_user_and_video():
    users = set(read("users")["user_id"].to_pylist())
    videos = set(read("videos")["video_id"].to_pylist())
    assert len(users) == ROWS["users"]
    assert len(videos) == ROWS["videos"]
    for name in ("events", "history"):
        rows = read(name, ["user_id", "item_id"])
        assert set(pc.unique(rows["user_id"]).to_pylist()) <= users
        assert set(pc.unique(rows["item_id"]).to_pylist()) <= videos


def test_the_quickstart_log_of_some_users(tmp_path):
    for name in ("events", "history"):
        rows = read(name)
        some = rows.filter(pc.equal(pc.bit_wise_and(rows["user_id"], 63), 0))
        pq.write_table(some, tmp_path / f"{name}.parquet")
    overrides = [f"input={tmp_path}/events.parquet", f"history={tmp_path}/history.parquet"]
    config, _ = load_config(
        SessionizeConfig,
        "configs/quickstart_log.yaml",
        [*overrides, f"output={tmp_path}/log", "threads=1"],
    )
    manifest = sessionize(config)
    events = read("events", ["user_id", "item_id", "time_ms"]).to_pandas()
    events = events[events["user_id"] % 64 == 0].drop_duplicates()
    events = events.sort_values(["user_id", "time_ms"])
    silence = events.groupby("user_id")["time_ms"].diff()
    assert manifest.num_events == len(events)
    assert manifest.num_sessions == (silence.isna() | (silence > 12 * 3_600_000)).sum()
    history = read("history", ["user_id"])["user_id"].to_numpy()
    assert manifest.num_history_events == (history % 64 == 0).sum()
    unknown = {x: n for x, n in manifest.nulls.items() if n > 0.3 * manifest.num_events}
    assert list(unknown) == ["tag_2"]
