import duckdb
import ibis
import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.duckdb_engine import DuckDBEngine
from pipelines.portable_hash import partition_of, string_id, string_id_column
from tests.pipelines import event_log_oracle as oracle

# Fixed for ever: logs in use depend on them.
PARTITIONS = {0: 33, 1: 16, 2: 60, -1: 19, 2**31 - 1: 33, 2**31: 21, 2**62: 27, -(2**63): 23}
STRINGS = {
    "": 0x541D8CD98F00B204,
    "a": 0x0CC175B9C0F1B6A8,
    "user_1": 0x3F49044C1469C699,
    "Zo\u00e9": 0x63288F1E136C3628,
}


def column(engine, values, kind):
    engine.con.register("values_", pa.table({"x": pa.array(values, kind)}))
    return engine.table("values_")


def test_known_vectors():
    assert {x: partition_of(x, 12345, 64) for x in PARTITIONS} == PARTITIONS
    assert {x: string_id(x) for x in STRINGS} == STRINGS


@settings(max_examples=200, deadline=None)
@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**40), st.integers(1, 5000))
def test_partition_equals_arithmetic_without_bit_operations(user, seed, partitions):
    expected = oracle.partition(user, seed, partitions)
    assert partition_of(user, seed, partitions) == expected
    assert partition_of(np.array([user]), seed, partitions).tolist() == [expected]


def test_engine_equals_python(tmp_path):
    rng = np.random.default_rng(0)
    edges = [2**63 - 1, -(2**63), 2**62, -(2**62), 2**31, 2**31 - 1, -(2**31), 0, -1]
    users = np.concatenate([rng.integers(-(2**63), 2**63 - 1, 5000), edges, np.arange(-99, 99)])
    engine = ibis.duckdb.connect(threads=1)
    table = column(engine, users, pa.int64())
    found = engine.to_pyarrow(table.select("x", p=partition_of(table["x"], 12345, 64)))
    assert found["p"].to_pylist() == [oracle.partition(int(x), 12345, 64) for x in found["x"]]
    to_integer = DuckDBEngine(engine, tmp_path).hex_to_integer
    texts = ["", "a", "Zo\u00e9", "\U0001f600", None, *map(str, range(500))]
    table = column(engine, texts, pa.string())
    found = engine.to_pyarrow(
        table.select("x", h=string_id_column(table["x"], to_integer))
    ).to_pylist()
    assert {r["x"]: r["h"] for r in found} == {x: oracle.identity(x) for x in texts}
    engine.disconnect()


def test_string_ids_equal_the_first_digits_of_md5():
    rows = duckdb.sql("SELECT range::VARCHAR x, md5(range::VARCHAR) d FROM range(300)").fetchall()
    assert [string_id(x) for x, _ in rows] == [int(d[:16], 16) % 2**63 for _, d in rows]


def test_partitions_are_even():
    for users in (np.arange(200_000), np.arange(200_000) * 64, -(np.arange(200_000) << 31)):
        counts = np.bincount(partition_of(users, 0, 64), minlength=64)
        # Chi-squared of 63 degrees of freedom: mean 63, standard deviation 11.2.
        assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() < 63 + 6 * 11.2
