"""A few lines of each dataset in its publisher's exact format, with lines that do not fit."""

import hashlib
import io
import json
import tarfile
import zipfile
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gr.cli import main
from gr.config_io import load_config
from pipelines.config import SessionizeConfig
from pipelines.datasets import text_reader
from pipelines.datasets.catalogue import DATASETS, find, listing
from pipelines.datasets.convert import convert
from pipelines.datasets.description import Count
from pipelines.datasets.download import download
from pipelines.sessionize import sessionize

ML_CSV = (
    "userId,movieId,rating,timestamp\n1,2,3.5,1112486027\n1,29,3.5,1112484676\n2,32,4.0,974820691\n"
)
ML_ROWS = [(1, 2, 1112486027, 3.5), (1, 29, 1112484676, 3.5), (2, 32, 974820691, 4.0)]
KUAIRAND_HEADER = (
    "user_id,video_id,date,hourmin,time_ms,is_click,is_like,is_follow,is_comment,is_forward,"
    "is_hate,long_view,play_time_ms,duration_ms,profile_stay_time,comment_stay_time,"
    "is_profile_enter,is_rand,tab\n"
)
KUAIRAND = {
    "standard": [
        "0,3784,20220411,800,1649635226041,1,0,0,0,0,0,1,22100,19100,0,0,0,0,1",
        "0,213,20220411,2100,1649683105114,0,0,0,0,0,0,0,0,31100,0,0,0,0,1",
    ],
    "random": ["7,1123,20220422,400,1650572401301,1,1,0,0,0,0,0,9000,104400,5,6,1,1,4"],
}
KUAIREC = (
    "user_id,video_id,play_duration,video_duration,time,date,timestamp,watch_ratio\n"
    "0,3649,13838,10867,2020-07-05 00:08:23.438,20200705,1593878903.438,1.2733965215790926\n"
    "0,9598,13665,10984,2020-07-05 00:13:41.297,20200705,1593879221.297,1.2440823015294975\n"
    "14,148,4381,6067,,,,0.722103\n"
)


def rows_of(output):
    tables = [pq.read_table(path) for path in sorted((output / "events").glob("*.parquet"))]
    return [tuple(row.values()) for table in tables for row in table.to_pylist()]


def summary(output):
    return json.loads((output / "event_log.json").read_text())


def counted(name, *numbers):
    """Return a dataset whose publisher names other counts."""
    dataset = find(name)
    counts = zip(dataset.counts, numbers, strict=True)
    return replace(dataset, counts=tuple(replace(c, num_rows=n) for c, n in counts))


def kuairand_files(name):
    files = {}
    for file in find(name).files:
        kind = "random" if "random" in file else "standard"
        files[file] = KUAIRAND_HEADER + "\n".join(KUAIRAND[kind]) + "\n"
    return files


def put(folder, files):
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


CASES = {
    "movielens-100k": (
        {"ml-100k/u.data": "196\t242\t3\t881250949\n186\t302\t3\t891717742\n"},
        [(196, 242, 881250949, 3.0), (186, 302, 891717742, 3.0)],
    ),
    "movielens-1m": (
        {"ml-1m/ratings.dat": "1::1193::5::978300760\n6040::1097::4::956715569\n"},
        [(1, 1193, 978300760, 5.0), (6040, 1097, 956715569, 4.0)],
    ),
    "movielens-20m": ({"ml-20m/ratings.csv": ML_CSV}, ML_ROWS),
    "movielens-25m": ({"ratings.csv": ML_CSV}, ML_ROWS),
    "movielens-latest-small": ({"a/b/ratings.csv": ML_CSV}, ML_ROWS),
    "amazon-books": (
        {
            "ratings_Books.csv": "AH2L9G3DQHHAJ,0000000116,4.0,1019865600\n"
            "A2IIIDRK3PRRZY,0000000116,1.0,1395619200\n"
        },
        [
            ("AH2L9G3DQHHAJ", "0000000116", 1019865600, 4.0),
            ("A2IIIDRK3PRRZY", "0000000116", 1395619200, 1.0),
        ],
    ),
    "kuairec": (
        {"KuaiRec 2.0/data/big_matrix.csv": KUAIREC},
        [
            (0, 3649, 1593878903438, 13838, 1.2733965215790926, 10867),
            (0, 9598, 1593879221297, 13665, 1.2440823015294975, 10984),
            (14, 148, None, 4381, 0.722103, 6067),
        ],
    ),
    "kuairand-pure": (
        {f"KuaiRand-Pure/data/{n}": t for n, t in kuairand_files("kuairand-pure").items()},
        [
            (7, 1123, 1650572401301, 1, 1, 0, 0, 0, 0, 0, 1, 9000, 5, 6, 104400, 4, 1),
            *[
                (0, 3784, 1649635226041, 1, 0, 0, 0, 0, 0, 1, 0, 22100, 0, 0, 19100, 1, 0),
                (0, 213, 1649683105114, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 31100, 1, 0),
            ]
            * 2,
        ],
    ),
}
CASES |= {
    f"amazon-{name}": ({f"ratings_{file}.csv": CASES["amazon-books"][0]["ratings_Books.csv"]}, rows)
    for name, file, rows in (
        ("beauty", "Beauty", CASES["amazon-books"][1]),
        ("sports", "Sports_and_Outdoors", CASES["amazon-books"][1]),
        ("toys", "Toys_and_Games", CASES["amazon-books"][1]),
    )
}
CASES["kuairec-small"] = ({"data/small_matrix.csv": KUAIREC}, CASES["kuairec"][1])
CASES["kuairand-1k"] = (kuairand_files("kuairand-1k"), CASES["kuairand-pure"][1])
CASES["kuairand-27k"] = (
    kuairand_files("kuairand-27k"),
    CASES["kuairand-pure"][1] + CASES["kuairand-pure"][1][1:],
)


def test_every_dataset_has_a_case():
    assert set(CASES) | {"yambda-50m", "yambda-500m", "yambda-5b"} == set(DATASETS)
    for name in DATASETS:
        assert name in listing()


@pytest.mark.parametrize("name", list(CASES))
def test_lines_of_the_publisher_become_events(name, tmp_path):
    files, expected = CASES[name]
    source = put(tmp_path / "source", files)
    numbers = [sum(expected_in(count, files)) for count in find(name).counts]
    text = convert(counted(name, *numbers), source, tmp_path / "out")
    assert rows_of(tmp_path / "out") == expected
    assert text.startswith(f"wrote {len(expected)} events")
    found = summary(tmp_path / "out")
    assert found["num_rows"] == len(expected)
    assert found["rejects"] == {}
    assert all("as in" in check for check in found["counts"])
    assert not (tmp_path / "out/rejects.parquet").exists()


def expected_in(count, files):
    header = not any(
        name.endswith(("u.data", "ratings.dat")) or "ratings_" in name for name in files
    )
    for name, text in files.items():
        if not count.files or name.rsplit("/", 1)[-1] in count.files:
            yield text.count("\n") - header


@pytest.mark.parametrize("name", ["movielens-100k", "kuairand-pure", "kuairec", "amazon-toys"])
def test_sessionize_takes_the_configuration_written(name, tmp_path):
    source = put(tmp_path / "source", CASES[name][0])
    convert(find(name), source, tmp_path / "out", partial=True)
    config, _ = load_config(
        SessionizeConfig,
        tmp_path / "out/sessionize.yaml",
        ["threads=1", "partitions=2", "max_reject_fraction=1"],
    )
    manifest = sessionize(config)
    untimed = sum(row[2] is None for row in CASES[name][1])
    repeated = manifest.num_duplicates
    assert manifest.num_events + repeated + untimed == len(CASES[name][1])
    assert manifest.folder == tmp_path / "out_log"


def multi_event(rows, path, dictionary=True):
    names = ("uid", "timestamp", "item_id", "is_organic", "event_type", "played_ratio_pct")
    kinds = (pa.uint32(), pa.uint32(), pa.uint32(), pa.uint8(), pa.string(), pa.uint16())
    columns = {n: pa.array([r[i] for r in rows], kinds[i]) for i, n in enumerate((*names,))}
    if dictionary:
        columns["event_type"] = columns["event_type"].dictionary_encode()
    columns["track_length_seconds"] = pa.array([r[6] for r in rows], pa.uint32())
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)


YAMBDA = [
    (100, 39420, 8326270, 0, "listen", 95, 170),
    (100, 39420, 1441281, 1, "like", None, None),
    (200, 39625, 3286641, 1, "dislike", None, None),
    (200, 40110, 3286641, 1, "undislike", None, None),
    (200, 40360, 732449, 0, "unlike", None, None),
]


@pytest.mark.parametrize("name", ["yambda-50m", "yambda-500m", "yambda-5b"])
def test_yambda(name, tmp_path):
    bad = [
        (None, 5, 6, 0, "listen", 9, 9),
        (1, 5, None, 0, "listen", 9, 9),
        (1, 5, 6, 0, "hum", 9, 9),
        (1, 5, 6, 0, None, 9, 9),
    ]
    multi_event(YAMBDA + bad, tmp_path / "source/flat/50m/multi_event.parquet", name[-2:] != "5b")
    dataset = counted(name, 1, 1, 1)
    text = convert(dataset, tmp_path / "source", tmp_path / "out", max_reject_fraction=1)
    assert rows_of(tmp_path / "out") == [
        (100, 8326270, 39420, 95, 0, 170, 1, 0, 0, 0, 0),
        (100, 1441281, 39420, None, 1, None, 0, 1, 0, 0, 0),
        (200, 3286641, 39625, None, 1, None, 0, 0, 1, 0, 0),
        (200, 3286641, 40110, None, 1, None, 0, 0, 0, 0, 1),
        (200, 732449, 40360, None, 0, None, 0, 0, 0, 1, 0),
    ]
    assert summary(tmp_path / "out")["rejects"] == {
        "uid is null or unknown": 1,
        "item_id is null or unknown": 1,
        "event_type is null or unknown": 2,
    }
    assert "rows with is_like: 1, as in arXiv" in text
    rejects = pq.read_table(tmp_path / "out/rejects.parquet").to_pylist()
    assert [r["row"] for r in rejects] == [5, 6, 7, 8]
    with pytest.raises(ValueError, match="found 1 rows with is_dislike"):
        convert(counted(name, 1, 1, 4), tmp_path / "source", tmp_path / "o", max_reject_fraction=1)


MALFORMED = [
    ("1::1193::5::978300760", None),
    ("1::1193::5", "expected 4 fields"),
    ("", "user is empty"),
    ("2::x::5::978300760", "item is no integer"),
    ("2::::5::978300760", "item is empty"),
    ("2::7::five::978300760", "rating is no number"),
    ("2::7::5::9783007601234567890", "timestamp is no integer"),
    ("2:x:7::5::978300760", "expected :: between fields"),
    ("2::7::5::978300760::9", "expected 4 fields"),
    ("2::7::nan::978300760", "rating is no number"),
    ("2::0x10::5::978300760", "item is no integer"),
    ("3::9::4.5::978300761", None),
    ("4::9::4::978300762\xff", "timestamp is no integer"),
    ("-5::9::4e0::978300763", None),
]


@pytest.mark.parametrize("block_bytes", [30, 64, 1 << 20])
def test_lines_that_do_not_fit_are_counted_and_kept(block_bytes, tmp_path, monkeypatch):
    monkeypatch.setattr(text_reader, "BLOCK_BYTES", block_bytes)
    source = tmp_path / "ratings.dat"
    source.write_bytes("\n".join(line for line, _ in MALFORMED).encode("latin-1"))
    dataset = counted("movielens-1m", 3)
    convert(dataset, source, tmp_path / "out", max_reject_fraction=1)
    assert rows_of(tmp_path / "out") == [
        (1, 1193, 978300760, 5.0),
        (3, 9, 978300761, 4.5),
        (-5, 9, 978300763, 4.0),
    ]
    rejects = pq.read_table(tmp_path / "out/rejects.parquet").to_pylist()
    expected = {i: reason for i, (_, reason) in enumerate(MALFORMED, start=1) if reason}
    assert {r["row"]: r["reason"] for r in rejects} == expected
    assert {r["file"] for r in rejects} == {"ratings.dat"}
    assert sum(summary(tmp_path / "out")["rejects"].values()) == len(expected)
    with pytest.raises(ValueError, match=r"11 of 14 rows do not fit .* row 2 of ratings\.dat"):
        convert(dataset, source, tmp_path / "out2", max_reject_fraction=0.5)
    assert not (tmp_path / "out2").exists()


def test_another_number_of_rows_is_refused_or_said(tmp_path):
    source = put(tmp_path / "source", CASES["movielens-20m"][0])
    with pytest.raises(ValueError, match=r"found 3 rows, README of ml-20m\.zip says 20000263"):
        convert(find("movielens-20m"), source, tmp_path / "out")
    assert [x.name for x in tmp_path.iterdir()] == ["source"]
    text = convert(find("movielens-20m"), source, tmp_path / "out", partial=True)
    assert "rows: 3, not the 20000263 of README" in text


def test_archives_are_read_without_unpacking(tmp_path):
    files, expected = CASES["kuairand-pure"]
    with tarfile.open(tmp_path / "KuaiRand-Pure.tar.gz", "w:gz") as archive:
        for name, text in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(text)
            archive.addfile(info, io.BytesIO(text.encode()))
    dataset = counted("kuairand-pure", 4, 1)
    convert(dataset, tmp_path, tmp_path / "out/a")  # the folder that holds the archive
    convert(dataset, tmp_path / "KuaiRand-Pure.tar.gz", tmp_path / "out/b")
    with zipfile.ZipFile(tmp_path / "ml-25m.zip", "w") as archive:
        archive.writestr("ml-25m/ratings.csv", ML_CSV)
        archive.writestr("__MACOSX/ml-25m/ratings.csv", "junk")
    convert(counted("movielens-25m", 3), tmp_path / "ml-25m.zip", tmp_path / "out/c")
    assert rows_of(tmp_path / "out/a") == rows_of(tmp_path / "out/b") == expected
    assert rows_of(tmp_path / "out/c") == ML_ROWS


def test_sources_that_cannot_be_used(tmp_path):
    ml = counted("movielens-25m", 3)
    put(tmp_path / "two", {"a/ratings.csv": ML_CSV, "b/ratings.csv": ML_CSV})
    put(tmp_path / "cut", {"ml-25m.zip": "PK not a zip"})
    put(tmp_path / "other", {"ratings.csv": "a,b\n1,2\n"})
    put(tmp_path / "empty", {"ratings.csv": ""})
    put(tmp_path / "bare", {"ratings.csv": ML_CSV.splitlines()[0] + "\n"})
    (tmp_path / "nothing").mkdir()
    for name, message in (
        ("no", "there is no such file or folder"),
        ("nothing", r"lacks ratings\.csv of movielens-25m.*--download fetches it"),
        ("two", r"holds two files ratings\.csv"),
        ("cut", "is not a readable archive"),
        ("other", r"ratings\.csv has no column \['userId'"),
        ("empty", "cannot be read as movielens-25m"),
        ("bare", "the files of movielens-25m are empty"),
        ("no.parquet", "there is no such file"),
    ):
        with pytest.raises(ValueError, match=message):
            convert(ml, tmp_path / name, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_plain_parquet_with_the_columns_of_the_event_log(tmp_path):
    table = pa.table({"item_id": [7, None], "timestamp": [5, 6], "user_id": [1, 2], "x": [0, 0]})
    pq.write_table(table, tmp_path / "mine.parquet")
    for name, row in (
        ("movielens-100k", (1, 7, 5, None)),
        ("amazon-beauty", ("1", "7", 5, None)),
    ):
        out = tmp_path / name
        convert(find(name), tmp_path / "mine.parquet", out, partial=True, max_reject_fraction=0.5)
        assert rows_of(out) == [row]
        (reason,) = summary(out)["rejects"]
        assert reason.endswith("is null or unknown")
    times = pa.table(
        {"user_id": [1, None], "item_id": [2, 3], "time_ms": [4, 5], "is_like": [1, 1]}
    )
    pq.write_table(times, tmp_path / "both.parquet")
    kuairand = counted("kuairand-pure", 1, 0)
    convert(kuairand, tmp_path / "both.parquet", tmp_path / "k", max_reject_fraction=0.5)
    assert [row[:5] for row in rows_of(tmp_path / "k")] == [(1, 2, 4, None, 1)]
    with pytest.raises(ValueError, match=r"mine\.parquet has no column \['time_ms'\]"):
        convert(find("kuairec"), tmp_path / "mine.parquet", tmp_path / "out", partial=True)
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(ValueError, match="cannot be read as kuairec"):
        convert(find("kuairec"), tmp_path / "bad.parquet", tmp_path / "out", partial=True)


def test_download_compares_the_checksum(tmp_path):
    served = tmp_path / "served/ratings.csv"
    put(tmp_path / "served", {"ratings.csv": ML_CSV})
    md5 = hashlib.md5(ML_CSV.encode()).hexdigest()
    ml = replace(counted("movielens-25m", 3), url=served.as_uri(), md5=md5)
    path, said = download(ml, tmp_path / "got")
    assert path.read_text() == ML_CSV
    assert said == f"MD5 {md5} as the publisher names it"
    served.unlink()
    assert download(ml, tmp_path / "got")[0] == path  # what is there is not fetched again
    convert(ml, path, tmp_path / "out")
    path.write_text("changed")
    with pytest.raises(ValueError, match=r"ratings\.csv has MD5 .*, its publisher names"):
        download(ml, tmp_path / "got")
    with pytest.raises(ValueError, match="cannot fetch file://"):
        download(ml, tmp_path / "again")
    assert list((tmp_path / "again").iterdir()) == []
    served.write_text("cut")
    with pytest.raises(ValueError, match="the file was cut or changed"):
        download(ml, tmp_path / "again")
    assert list((tmp_path / "again").iterdir()) == []
    _, said = download(replace(ml, md5=""), tmp_path / "again")
    assert said.startswith("unchecked: the publisher names no checksum (SHA-256 ")


def test_counts_are_of_files_that_the_dataset_has():
    for dataset in DATASETS.values():
        for count in dataset.counts:
            assert isinstance(count, Count)
            assert set(count.files) <= set(dataset.files)
            assert not count.where or count.where in dataset.schema.names
        used = [*dataset.sessionize["actions"], *dataset.sessionize.get("features", [])]
        assert set(used) <= set(dataset.schema.names)
        assert dataset.url.startswith("https://")


def test_command(tmp_path, capsys):
    source = put(tmp_path / "source", CASES["movielens-100k"][0])
    assert main(["dataset", "movielens-100k", str(source), str(tmp_path / "out")]) == 2
    assert "found 2 rows, README of ml-100k.zip says 100000" in capsys.readouterr().err
    arguments = ["dataset", "movielens-100k", str(source), str(tmp_path / "out"), "--partial"]
    assert main(arguments) == 0
    assert f"next: gr sessionize {tmp_path / 'out'}/sessionize.yaml" in capsys.readouterr().out
    assert main(arguments) == 2
    assert "holds a converted event log already" in capsys.readouterr().err
    assert main([*arguments, "--overwrite"]) == 0
    assert main(["dataset", "list"]) == 0
    assert "yambda-5b" in capsys.readouterr().out
    assert main(["dataset", "netflix", "a", "b"]) == 2
    assert "unknown dataset netflix; there are movielens-100k" in capsys.readouterr().err
    assert main(["dataset", "kuairec"]) == 2
    assert "expected gr dataset kuairec SOURCE OUTPUT" in capsys.readouterr().err
