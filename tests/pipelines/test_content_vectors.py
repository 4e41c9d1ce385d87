"""Content vectors against values by hand, and a file of them read back as the model reads it."""

import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gr.config import ColdStartConfig
from gr.pretrained import read_vectors
from pipelines.content_vectors import content_vectors, main

ITEMS = pa.table(
    {
        "item": pa.array([7, 3, 5, 1], pa.int16()),
        "tag": [4, None, 2, 4],
        "genres": pa.array([["b", "a"], [], None, ["b", None]], pa.list_(pa.string())),
        "seconds": pa.array([0, 10, None, -3], pa.int32()),
    }
)


def test_values_by_hand():
    found = content_vectors(ITEMS, categories=["tag", "genres"], numbers=["seconds"])
    assert found[:, :2].tolist() == [[0, 1], [0, 0], [1, 0], [0, 1]]  # tag 2, tag 4
    assert found[:, 2:4].tolist() == [[1, 1], [0, 0], [0, 0], [0, 1]]  # a, b
    logs = np.array([0.0, math.log(11), -math.log(4)])
    expected = (logs - logs.mean()) / logs.std()
    np.testing.assert_allclose(found[[0, 1, 3], 4], expected, rtol=1e-6)
    assert found[2, 4] == 0


def test_the_file_is_what_the_model_reads(tmp_path, capsys):
    pq.write_table(ITEMS, tmp_path / "items.parquet")
    output = tmp_path / "more" / "content.parquet"
    arguments = [str(tmp_path / "items.parquet"), str(output), "--id", "item"]
    assert main([*arguments, "--categories", "tag"]) == 0
    assert "wrote 4 vectors of 2 numbers" in capsys.readouterr().out
    ids, vectors = read_vectors("model.cold_start", ColdStartConfig(path=str(output)))
    assert ids.tolist() == [7, 3, 5, 1]
    assert vectors.tolist() == [[0, 1], [0, 0], [1, 0], [0, 1]]


def test_what_is_not_there_is_named(tmp_path, capsys):
    with pytest.raises(ValueError, match=r"no column\(s\) \['colour'\]"):
        content_vectors(ITEMS, categories=["colour"])
    with pytest.raises(ValueError, match="at least one"):
        content_vectors(ITEMS)
    pq.write_table(ITEMS, tmp_path / "items.parquet")
    arguments = [str(tmp_path / "items.parquet"), str(tmp_path / "x.parquet"), "--numbers", "tag"]
    assert main([*arguments, "--id", "nobody"]) == 2
    assert "--id nobody is no column" in capsys.readouterr().err
    assert main(["missing.parquet", "x.parquet", "--id", "item", "--numbers", "tag"]) == 2
    assert "missing.parquet" in capsys.readouterr().err
