"""Frozen vectors: the file, the lookup, and that nothing trains them."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from gr.config import PretrainedConfig
from gr.pretrained import PretrainedVectors
from pipelines.portable_hash import string_id


def parquet(path, ids, vectors, kind=None):
    pq.write_table(pa.table({"id": pa.array(ids), "vector": pa.array(vectors, kind)}), path)
    return PretrainedConfig(feature="item_id", path=str(path))


def test_each_id_has_its_vector(tmp_path):
    g = np.random.default_rng(0)
    ids = g.choice(1 << 60, 30, replace=False)
    vectors = g.normal(size=(30, 3)).astype(np.float32)
    module = PretrainedVectors("x", parquet(tmp_path / "v.parquet", ids, vectors.tolist()), 5)
    asked = torch.tensor([int(ids[7]), 3, int(ids[0]), -1, int(ids[7])])
    out = module(module.find(asked))
    weight = module.project.weight.detach().numpy().astype(np.float64)
    for row, i in zip(out.detach().numpy(), [7, None, 0, None, 7], strict=True):
        expected = module.missing_D.detach().numpy() if i is None else weight @ vectors[i]
        np.testing.assert_allclose(row, expected, rtol=1e-5, atol=1e-6)
    out.sum().backward()
    assert {name for name, _ in module.named_parameters()} == {"project.weight", "missing_D"}
    assert module.missing_D.grad.tolist() == [2.0] * 5
    assert set(module.state_dict()) == {"project.weight", "missing_D", "digest"}


def test_rows_of_a_matrix_are_ids(tmp_path):
    vectors = np.arange(8, dtype=np.float16).reshape(4, 2)
    np.save(tmp_path / "v.npy", vectors)
    config = PretrainedConfig(feature="item_id", path=str(tmp_path / "v.npy"))
    module = PretrainedVectors("x", config, 2)
    rows = module.find(torch.tensor([3, 4, 0, -1]))
    assert rows.tolist() == [3, -1, 0, -1]
    assert module.vectors_EW.dtype == torch.float16
    assert module.vectors_EW[3].tolist() == [6.0, 7.0]
    assert module(rows).dtype == torch.float32


def test_text_is_hashed_as_in_a_log(tmp_path):
    config = parquet(tmp_path / "v.parquet", ["a", "b"], [[1.0], [2.0]])
    module = PretrainedVectors("x", config, 2)
    assert module.vectors_EW[module.find(torch.tensor([string_id("b")]))].tolist() == [[2.0]]


@pytest.mark.parametrize(
    ("ids", "vectors", "kind", "message"),
    [
        ([1, 1], [[1.0], [2.0]], None, "id 1 has more than one vector"),
        ([1, None], [[1.0], [2.0]], None, "must hold integers or text without nulls"),
        ([1.5, 2.0], [[1.0], [2.0]], None, "must hold integers or text without nulls"),
        ([1, 2], [[1.0], [2.0, 3.0]], None, r"all of one length .* of lengths \[1, 2\]"),
        ([1, 2], [[1.0], None], None, "all of one length and without nulls"),
        ([1, 2], [[1.0], [None]], None, "all of one length and without nulls"),
        ([1, 2], [[1], [2]], None, "lists of floating numbers"),
        ([1, 2], [1.0, 2.0], None, "lists of floating numbers"),
        ([1, 2], [[1.0], [float("nan")]], None, "the vector in row 1 is not finite; 1 row"),
    ],
)
def test_unusable_files_are_named(tmp_path, ids, vectors, kind, message):
    config = parquet(tmp_path / "v.parquet", ids, vectors, kind)
    with pytest.raises(ValueError, match=message) as caught:
        PretrainedVectors("content", config, 2)
    assert "model.pretrained.content.path=" in str(caught.value)
    assert "v.parquet" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.parquet", None, "there is no such file"),
        ("v.parquet", b"PAR1 nonsense", "not a readable Parquet file"),
        ("v.npy", b"nonsense", "not a readable .npy file"),
        ("pickle.npy", np.array([{}]), "not a readable .npy file"),
        ("ints.npy", np.zeros((2, 2), np.int64), "expected a floating matrix"),
        ("flat.npy", np.zeros(2), "expected a floating matrix"),
    ],
)
def test_other_files_are_refused(tmp_path, name, content, message):
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        np.save(path, content)
    with pytest.raises(ValueError, match=message):
        PretrainedVectors("x", PretrainedConfig(feature="item_id", path=str(path)), 2)


def test_columns_can_be_named(tmp_path):
    pq.write_table(pa.table({"movie": [4], "embedding": [[1.0, 2.0]]}), tmp_path / "v.parquet")
    with pytest.raises(ValueError, match=r"no column\(s\) \['id', 'vector'\]; it has"):
        PretrainedVectors(
            "x", PretrainedConfig(feature="item_id", path=str(tmp_path / "v.parquet")), 2
        )
    config = PretrainedConfig(
        feature="item_id",
        path=str(tmp_path / "v.parquet"),
        id_column="movie",
        vector_column="embedding",
    )
    assert PretrainedVectors("x", config, 2).find(torch.tensor([4])).tolist() == [0]
