"""Logs by URL: the same as by path, whole or not there, also from a store that fails at times."""

import itertools
import json
import uuid
from collections import defaultdict
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from pipelines.config import FeatureConfig, SessionizeConfig
from pipelines.datasets.catalogue import find
from pipelines.datasets.convert import convert
from pipelines.event_log_writer import is_event_log
from pipelines.inspection import inspect_log
from pipelines.location import RemotePath, locate, open_input
from pipelines.manifest import is_session_log, read_manifest, verify_checksums
from pipelines.output_folder import UNFINISHED
from pipelines.rejects import REASONS
from pipelines.sessionize import sessionize
from pipelines.stream import SessionStream
from pipelines.synthetic.config import PolyaUrnConfig, SyntheticConfig
from pipelines.synthetic.synthesize import synthesize
from tests.pipelines.logs import MODES, content, make_config

ROWS = [
    {"user_id": n % 7, "item_id": n % 11, "timestamp": 1000 * n, "click": n % 3 == 0, "tab": n % 2}
    for n in range(200)
]
TABLE = pa.Table.from_pylist(ROWS)


class Store(MemoryFileSystem):
    """An object store that fails where `fails(operation, path)` says so."""

    protocol = "faulty"
    store, pseudo_dirs = {}, [""]
    fails = staticmethod(lambda operation, path: False)

    def _try(self, operation, path):
        if type(self).fails(operation, path):
            raise RuntimeError(f"the store does not answer to {operation}")

    def cat_file(self, path, start=None, end=None, **kwargs):
        self._try("read", path)
        data = super().cat_file(path, start=start, end=end, **kwargs)
        return data[: len(data) // 2] if type(self).fails("cut", path) else data

    def put_file(self, lpath, rpath, **kwargs):
        self._try("write", rpath)
        super().put_file(lpath, rpath, **kwargs)

    def mv(self, *args, **kwargs):
        raise AssertionError("an object store has no rename")


@pytest.fixture(autouse=True)
def store(monkeypatch):
    fsspec.register_implementation("faulty", Store, clobber=True)
    monkeypatch.setattr("pipelines.location.WAITS_SECONDS", (0.0, 0.0))
    Store.store.clear()
    Store.pseudo_dirs[:] = [""]
    monkeypatch.setattr(Store, "fails", staticmethod(lambda operation, path: False))
    return Store


@pytest.fixture
def url():
    return f"faulty://{uuid.uuid4().hex}/log"


def settings(tmp_path, output, **changes):
    path = tmp_path / "events.parquet"
    if not path.exists():
        pq.write_table(TABLE, path)
    options = {
        "input": str(path),
        "output": str(output),
        "actions": ("click",),
        "features": ("tab",),
        "partitions": 2,
        "gap_seconds": 2000,
        "threads": 1,
    }
    return SessionizeConfig(**(options | changes))


def stream_config(log, **changes):
    features = {"tab": FeatureConfig()}
    fades = FeatureConfig(counter="item", half_life_hours=1.0, encoding="zscore")
    changes = {"dense_features": (), "tasks": {}, "context_features": {}} | changes
    return make_config(
        log, *MODES[0], actions={}, item_features={**features, "fades": fades}, **changes
    )


def batches_of(config, **changes):
    return [content(batch) for batch in SessionStream(config, seed=0, **changes)]


def test_a_log_by_url_is_the_log_by_path(tmp_path, url):
    local = sessionize(settings(tmp_path, tmp_path / "log"))
    remote = sessionize(settings(tmp_path, url))
    assert [x.sha256 for x in remote.parts] == [x.sha256 for x in local.parts]
    verify_checksums(remote)
    assert str(remote.folder) == url
    assert not (locate(url) / UNFINISHED).exists()
    expected = batches_of(stream_config(tmp_path / "log"))
    assert len(expected) > 10
    assert batches_of(stream_config(url)) == expected
    assert batches_of(stream_config(url, fill="tokens", budget=30.0, sessions_per_partition=8)) == (
        batches_of(
            stream_config(tmp_path / "log", fill="tokens", budget=30.0, sessions_per_partition=8)
        )
    )
    assert inspect_log(remote).num_events == 200


def test_file_urls_are_paths(tmp_path):
    sessionize(settings(tmp_path, f"file://{tmp_path}/log"))
    assert read_manifest(tmp_path / "log") == read_manifest(f"file://{tmp_path}/log")


def test_segments_by_url_are_found_as_they_land(tmp_path, url):
    for name in ("a", "b"):
        sessionize(settings(tmp_path, tmp_path / "log" / name))
    sessionize(settings(tmp_path, f"{url}/a"))
    stream = SessionStream(
        stream_config(url, follow=True, follow_idle_seconds=0.5, window="none"), seed=0
    )
    found = []
    for batch in stream:
        found.append(content(batch))
        if len(found) == 1:
            sessionize(settings(tmp_path, f"{url}/b"))
    assert found == batches_of(stream_config(tmp_path / "log", window="none"))


def test_synthetic_logs_and_datasets_go_to_urls(tmp_path, url):
    urn = PolyaUrnConfig(num_users=40)
    for kind, is_there in (("sessions", is_session_log), ("events", is_event_log)):
        options = {"stream": "polya_urn", "partitions": 2, "threads": 1, "polya_urn": urn}
        both = [f"{url}/{kind}", str(tmp_path / kind)]
        for output in both:
            synthesize(SyntheticConfig(output=output, format=kind, **options))
        assert is_there(locate(both[0]))
        local = {str(p.relative_to(both[1])): p for p in Path(both[1]).rglob("*") if p.is_file()}
        remote = locate(both[0])
        names = [x.removeprefix(remote.path + "/") for x in remote.filesystem.find(remote.path)]
        assert sorted(local) == sorted(names)
        for name, path in local.items():
            if name.endswith(".parquet"):
                assert (remote / name).open().read() == path.read_bytes()
    source = tmp_path / "u.parquet"
    rows = {"user_id": [1, 2], "item_id": [3, 4], "timestamp": [5, 6], "rating": [1.0, 2.0]}
    pq.write_table(pa.table(rows), source)
    convert(find("movielens-100k"), source, locate(f"{url}/ml"), partial=True)
    assert is_event_log(locate(f"{url}/ml"))
    assert f"input: {url}/ml/events" in (locate(f"{url}/ml") / "sessionize.yaml").read_text()


@pytest.mark.parametrize("what", ["read", "cut"])
def test_a_store_that_fails_now_and_then_changes_nothing(tmp_path, url, store, what, monkeypatch):
    sessionize(settings(tmp_path, tmp_path / "log"))
    expected = batches_of(stream_config(tmp_path / "log"))
    # Of each file its own: of all files, threads could let one fail as often as it is tried.
    turns = defaultdict(itertools.count)
    fails = lambda operation, path: operation in (what, "write") and next(turns[path]) % 3 == 1  # noqa: E731
    monkeypatch.setattr(store, "fails", staticmethod(fails))
    sessionize(settings(tmp_path, url))
    assert batches_of(stream_config(url)) == expected
    assert sum(map(next, turns.values())) > 30


def test_what_a_store_lost_is_counted(tmp_path, url, store, monkeypatch):
    for log in (url, tmp_path / "log"):
        sessionize(settings(tmp_path, log))
        num_lost = read_manifest(log).parts[1].num_sessions
        config, rejects = stream_config(log), []
        stream = SessionStream(config, seed=0, on_reject=rejects.append)
        lost = lambda operation, path: path.endswith("part-00001.parquet")  # noqa: E731
        monkeypatch.setattr(store, "fails", staticmethod(lost))
        (tmp_path / "log" / "part-00001.parquet").unlink(missing_ok=True)
        batches = list(stream)  # opened, then it went
        assert sum(batch.num_sequences for batch in batches) > 10
        assert {(r.file, r.reason) for r in rejects} == {("part-00001.parquet", REASONS[9])}
        assert sum(r.num_sessions for r in rejects) == num_lost
        rejects.clear()
        list(SessionStream(config, seed=0, on_reject=rejects.append))  # never there
        (reject,) = rejects
        assert (reject.file, reject.num_sessions) == ("part-00001.parquet", num_lost)
        monkeypatch.setattr(store, "fails", staticmethod(lambda operation, path: False))
    assert "part-00001.parquet is missing" in reject.detail


@pytest.mark.parametrize("fails_at", range(3))
def test_what_could_not_be_written_is_no_log_and_can_be_written_again(
    tmp_path, url, store, fails_at, monkeypatch
):
    for overwrite in (False, True):
        names = []

        def fails(operation, path, names=names):
            if operation == "write" and path not in names:
                names.append(path)
            return operation == "write" and names.index(path) == fails_at

        with monkeypatch.context() as patch:
            patch.setattr(store, "fails", staticmethod(fails))
            with pytest.raises(ValueError, match="the store did not take the files"):
                sessionize(settings(tmp_path, url, overwrite=overwrite))
            assert names[-1].endswith(("part-00000.parquet", "part-00001.parquet")) or (
                names[-1].endswith("manifest.json") and fails_at == 2
            )
            assert not is_session_log(locate(url))
            with pytest.raises(ValueError, match=r"holds no manifest\.json"):
                SessionStream(stream_config(url), seed=0)
        sessionize(settings(tmp_path, url))
        assert len(batches_of(stream_config(url))) > 10
        if not overwrite:
            with pytest.raises(ValueError, match="holds a session-end log already"):
                sessionize(settings(tmp_path, url))


def test_what_is_not_ours_stays(tmp_path, url):
    other = locate(url) / "notes.txt"
    other.filesystem.pipe_file(other.path, b"mine")
    with pytest.raises(ValueError, match="exists and is no session-end log"):
        sessionize(settings(tmp_path, url, overwrite=True))
    assert other.read_text() == "mine"


def test_wrong_urls(tmp_path):
    with pytest.raises(ValueError, match="nosuch"):
        locate("nosuch://bucket/log")
    with pytest.raises(ValueError, match=r"no session-end log at faulty://.*none"):
        read_manifest("faulty://none")
    with pytest.raises(ValueError, match="give engine=spark a path"):
        sessionize(settings(tmp_path, "faulty://none", engine="spark"))


def test_a_file_of_a_store_is_read_only(url):
    path = locate(f"{url}/part")
    with pytest.raises(ValueError, match=r"part: a file of a store is opened to be read.*'wb'"):
        path.open("wb")


def test_ranges_are_those_of_the_file(url):
    path = locate(url)
    assert isinstance(path, RemotePath)
    data = bytes(range(256)) * 9
    path.filesystem.pipe_file(path.path, data)
    with open_input(path) as file:
        assert file.size() == len(data)
        assert file.read(5) == data[:5]
        file.seek(-7, 2)
        assert file.read() == data[-7:]
        assert file.read_at(40, 100) == data[100:140]
    assert path.open().read() == data


IPC = {"file": (pa.ipc.new_file, "events.arrow"), "stream": (pa.ipc.new_stream, "events.arrows")}


def write_ipc(kind, folder, table):
    new, name = IPC[kind]
    with pa.OSFile(str(folder / name), "wb") as sink, new(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=23)
    return folder / name


@pytest.mark.parametrize("kind", IPC)
def test_event_logs_in_arrow_ipc(tmp_path, url, kind):
    rich = TABLE.append_column("place", pa.array(["a", None, "b", "c"] * 50, pa.string_view()))
    rich = rich.append_column("device", rich["place"].cast(pa.string()).dictionary_encode())
    rich = rich.set_column(2, "timestamp", rich["timestamp"].cast(pa.timestamp("s")))
    rich = rich.append_column("unused", pa.array([{"x": 1}] * 200))
    columns = {"features": ("tab", "place", "device"), "max_reject_fraction": 0.1}
    bad = rich.slice(0, 1).set_column(1, "item_id", pa.array([None], pa.int64()))
    path = write_ipc(kind, tmp_path, pa.concat_tables([rich, bad]).unify_dictionaries())
    plain = rich.drop_columns(["unused"])
    plain = plain.set_column(5, "place", plain["place"].cast(pa.string()))
    plain = plain.set_column(6, "device", plain["place"])
    pq.write_table(plain, tmp_path / "events.parquet")
    expected = sessionize(settings(tmp_path, tmp_path / "log", **columns))
    found = sessionize(settings(tmp_path, tmp_path / "ipc", input=str(path), **columns))
    assert [x.sha256 for x in found.parts] == [x.sha256 for x in expected.parts]
    (reject,) = pq.read_table(tmp_path / "ipc" / "rejects.parquet").to_pylist()
    assert (reject["file"], reject["row"]) == (str(path), 200)
    # A folder by URL, with one file of each format.
    store = locate(url)
    half = pq.read_table(tmp_path / "events.parquet").slice(0, 100)
    pq.write_table(half, tmp_path / "half.parquet")
    rest = write_ipc(kind, tmp_path, rich.slice(100).unify_dictionaries())
    store.filesystem.put_file(str(tmp_path / "half.parquet"), (store / "0.parquet").path)
    store.filesystem.put_file(str(rest), (store / f"1{rest.suffix}").path)
    mixed = sessionize(settings(tmp_path, tmp_path / "mixed", input=url, **columns))
    assert [x.sha256 for x in mixed.parts] == [x.sha256 for x in expected.parts]


@pytest.mark.parametrize("kind", IPC)
def test_damaged_arrow_ipc_is_named(tmp_path, kind):
    path = write_ipc(kind, tmp_path, TABLE)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=f"input={path} cannot be read as Arrow IPC"):
        sessionize(settings(tmp_path, tmp_path / "log", input=str(path)))
    assert not (tmp_path / "log").exists()


def test_a_manifest_is_the_last_that_is_sent(tmp_path, url, store, monkeypatch):
    sent = []
    monkeypatch.setattr(
        store, "fails", staticmethod(lambda op, path: op == "write" and sent.append(path))
    )
    sessionize(settings(tmp_path, url))
    assert [x.rsplit("/", 1)[-1] for x in sent][-1] == "manifest.json"
    assert len(sent) == 3
    assert json.loads((locate(url) / "manifest.json").read_text())["partitions"] == 2
