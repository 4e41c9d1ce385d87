import pytest
import torch

from kernels.bench import Case
from kernels.hstu_attention import bench


@pytest.mark.parametrize("kind", ["causal", "jagged", "semi-local", "options"])
@pytest.mark.parametrize("mode", ["forward", "backward"])
def test_every_variant_runs(kind, mode):
    case = Case(kind, torch.float32, {"B": 2, "N": 24, "D": 8})
    found = bench.variants(case, mode, "cpu")
    assert next(iter(found)) == "ours"
    for call in found.values():
        call()


def test_counts_by_hand():
    case = Case("causal", torch.bfloat16, {"B": 2, "N": 3, "D": 8})
    pairs = 2 * (1 + 2 + 3)
    assert bench.flops(case, "forward") == 2 * (2 * 8) * 4 * pairs
    assert bench.flops(case, "backward") == 5 * (2 * 8) * 4 * pairs
    assert bench.bytes_moved(case, "forward") == 4 * (2 * 3) * 4 * 8 * 2
