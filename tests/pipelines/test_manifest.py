import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.config import SessionizeConfig
from pipelines.manifest import read_manifest, verify_checksums
from pipelines.sessionize import sessionize


@pytest.fixture
def log(tmp_path):
    table = {"user_id": [1, 1, 2, 3], "item_id": [5, 6, 5, 5], "timestamp": [10, 20, 30, 40]}
    pq.write_table(pa.table(table | {"click": [1, 0, 1, 1]}), tmp_path / "log.parquet")
    out = tmp_path / "out"
    source = str(tmp_path / "log.parquet")
    sessionize(
        SessionizeConfig(
            input=source, history=source, output=str(out), actions=("click",), partitions=2
        )
    )
    return out


def edit(log, **changes):
    path = log / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_reads_what_was_written(log):
    manifest = read_manifest(str(log))
    content = json.loads((log / "manifest.json").read_text())
    assert manifest.folder == log
    assert (manifest.num_sessions, manifest.num_events, manifest.num_history_events) == (3, 4, 4)
    assert content["num_sessions"] == 3
    assert content["partition_hash"] == "portable-31"
    assert [part["num_events"] for part in content["parts"]] == [
        x.num_events for x in manifest.parts
    ]
    for file in (*manifest.parts, *manifest.histories):
        assert (log / file.name).stat().st_size == file.num_bytes
        ends = pq.read_table(log / file.name)["end_ts"].to_pylist() or [None]
        assert (file.first_end_ts, file.last_end_ts) == (ends[0], ends[-1])
    verify_checksums(manifest)


def test_a_missing_folder_says_how_to_make_it(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere: there is no such folder.*gr sessionize"):
        read_manifest(tmp_path / "nowhere")


@pytest.mark.parametrize("content", [None, "", "[1]", '{"format": "other"}', "\x80"])
def test_a_folder_that_is_no_log(tmp_path, content):
    if content is not None:
        (tmp_path / "manifest.json").write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=r"holds no manifest.json.*gr sessionize"):
        read_manifest(tmp_path)


def test_another_version_or_hash_or_a_cut_manifest(log):
    edit(log, version=2)
    with pytest.raises(ValueError, match=r"has version 2, this release reads 1: make the log anew"):
        read_manifest(log)
    edit(log, version=1, partition_hash="murmur")
    with pytest.raises(
        ValueError, match="partition_hash is murmur, this release knows portable-31"
    ):
        read_manifest(log)
    edit(log, partition_hash="portable-31", partitions=3)
    with pytest.raises(ValueError, match=r"says 3 partitions but names .*'parts': 2"):
        read_manifest(log)
    content = json.loads((log / "manifest.json").read_text())
    del content["timezone"]
    (log / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"lacks \['timezone'\]"):
        read_manifest(log)


@pytest.mark.parametrize("name", ["part-00001.parquet", "history-00000.parquet"])
def test_files_must_be_those_of_the_manifest(log, name):
    path = log / name
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    with pytest.raises(ValueError, match=f"{name} is not a readable Parquet file"):
        read_manifest(log)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=f"{name} is not a readable Parquet file"):
        read_manifest(log)
    table = pq.read_table(pa.BufferReader(whole))
    extra = pq.read_table(log / "part-00000.parquet")
    pq.write_table(pa.concat_tables([table, extra]), path)
    rows = len(table) + len(extra)
    with pytest.raises(ValueError, match=rf"{name} has {rows} rows.* says {len(table)}"):
        read_manifest(log)
    path.unlink()
    with pytest.raises(ValueError, match=f"{name} is missing, though manifest.json names it"):
        read_manifest(log)


def test_a_changed_byte_fails_the_checksum(log):
    path = log / "part-00000.parquet"
    content = bytearray(path.read_bytes())
    content[10] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"part-00000.parquet has sha256 .* changed or damaged"):
        verify_checksums(read_manifest(log))
