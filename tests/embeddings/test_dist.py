import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.dist import run_distributed


def sum_of_ranks(offset: int) -> list[float]:
    total = torch.tensor([float(dist.get_rank() + offset)])
    dist.all_reduce(total)
    return [total.item(), float(os.environ["WORLD_SIZE"])]


def fail_on_rank_1() -> None:
    if dist.get_rank() == 1:
        raise RuntimeError("planted failure")
    dist.barrier()


def hang() -> None:
    if dist.get_rank() == 1:
        time.sleep(60)


def die() -> None:
    os._exit(3)


def test_results_come_in_rank_order():
    assert run_distributed(sum_of_ranks, 2, 10) == [[21.0, 2.0], [21.0, 2.0]]


def test_a_failing_rank_shows_its_traceback_and_ends_the_others():
    start = time.monotonic()
    with pytest.raises(AssertionError, match=r"(?s)rank 1.*planted failure"):
        run_distributed(fail_on_rank_1, 2)
    assert time.monotonic() - start < 30


def test_a_rank_that_dies_or_hangs_is_named():
    with pytest.raises(AssertionError, match="died"):
        run_distributed(die, 1)
    with pytest.raises(AssertionError, match=r"1\] took over 2"):
        run_distributed(hang, 2, timeout_s=2.0)
