import pytest

from kernels.linear import bench

SMALLEST = [case for case in bench.CASES if "d=512" in case.name]


@pytest.mark.parametrize("case", SMALLEST, ids=lambda case: case.name)
def test_every_variant_runs(case):
    small = case._replace(shape={"L": 24, "D": 32, "F": case.shape["F"] // 16})
    for mode in case.modes:
        found = bench.variants(small, mode, "cpu")
        assert next(iter(found)) == "ours"
        for call in found.values():
            call()


def test_counts_by_hand():
    case = next(c for c in bench.CASES if c.name == "fp8 output residual d=512")
    L, d = 131072, 512
    assert bench.flops(case, "both") == 3 * 2 * L * d * d
    read_and_written = (x := L * d) + 2 * x + d * d + 2 * x + x + 2 * d * d
    assert bench.bytes_moved(case, "both") == 2 * read_and_written
