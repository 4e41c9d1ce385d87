import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from embeddings.config import TableConfig
from embeddings.initial import BLOCK_ROWS, initial_rows
from tests.dist import run_distributed
from tests.embeddings.oracle import RowWiseOracle
from tests.embeddings.scenario import (
    BETAS,
    DECAY,
    EPS,
    Case,
    catalogue,
    rank_batch,
    train_steps,
)

STEPS = 8
CASE = Case("replicated", "adamw")


def _oracle(weight):
    return RowWiseOracle(weight, "adamw", lr=0.03, betas=BETAS, eps=EPS, weight_decay=DECAY)


def test_without_a_process_group_a_checkpoint_resumes_the_run(tmp_path):
    whole = CASE.build()
    train_steps(whole, 0, 2 * STEPS)
    first = CASE.build()
    train_steps(first, 0, STEPS)
    dcp.save(first.checkpoint_state(), checkpoint_id=tmp_path)
    resumed = CASE.build(seed=99)
    state = resumed.checkpoint_state()
    dcp.load(state, checkpoint_id=tmp_path)
    resumed.load_checkpoint_state(state)
    train_steps(resumed, STEPS, 2 * STEPS)
    for name, rows in catalogue(whole).items():
        assert torch.equal(rows, catalogue(resumed)[name])


def test_gradients_of_two_backward_passes_add_up_and_zero_grad_forgets_them():
    tables = CASE.build()
    tables.set_lr(0.03)
    before = catalogue(tables)["user"]
    oracle = _oracle(before)
    rows, grads = rank_batch(0, 0, 1)
    (tables.lookup(rows)["user_id"] * grads["user_id"]).sum().backward()
    tables.optimizer_zero_grad()
    tables.optimizer_step()
    assert torch.equal(catalogue(tables)["user"], before)
    for _ in range(2):
        (tables.lookup(rows)["user_id"] * grads["user_id"]).sum().backward()
    tables.optimizer_step()
    oracle.t = 1
    oracle.step(rows["user_id"].values(), 2 * grads["user_id"])
    expected = torch.tensor(oracle.w)
    torch.testing.assert_close(catalogue(tables)["user"], expected, rtol=0, atol=1e-6)


def _full_weight_on_one_rank() -> tuple[torch.Tensor, torch.Tensor]:
    """Rank 0 trains the whole table, rank 1 a lookup of it; then rank 1 has nothing at all."""
    tables = CASE.build()
    tables.set_lr(0.03)
    rows, grads = rank_batch(0, 1, 2)
    if dist.get_rank() == 0:
        weight = tables.full_weight("user")
        (weight * _dense_gradient()).sum().backward()
    else:
        (tables.lookup(rows)["user_id"] * grads["user_id"]).sum().backward()
    tables.optimizer_step()
    first = catalogue(tables)["user"]
    if dist.get_rank() == 0:
        (tables.full_weight("user") * _dense_gradient()).sum().backward()
    tables.optimizer_step()
    return first, catalogue(tables)["user"]


def _dense_gradient() -> torch.Tensor:
    return torch.randn(17, 8, generator=torch.Generator().manual_seed(5))


def test_a_whole_weight_trains_beside_lookups_of_other_ranks():
    results = run_distributed(_full_weight_on_one_rank, 2)
    oracle = _oracle(catalogue(CASE.build())["user"])
    rows, grads = rank_batch(0, 1, 2)
    dense = _dense_gradient().double()
    total = dense.clone()
    for row, grad in zip(rows["user_id"].values().tolist(), grads["user_id"], strict=True):
        total[row] += grad
    for step, gradient in enumerate((total, dense)):
        oracle.step(torch.arange(17), gradient / 2)
        for result in results:
            expected = torch.tensor(oracle.w)
            torch.testing.assert_close(result[step], expected, rtol=0, atol=1e-6)


def test_initial_rows_do_not_depend_on_how_they_are_asked_for():
    config = TableConfig(
        num_embeddings=2 * BLOCK_ROWS + 5, dim=4, features=("item_id",), init_std=0.5
    )

    def draw(first: int, last: int, table: str = "item", seed: int = 3) -> torch.Tensor:
        return initial_rows(config, table=table, seed=seed, first=first, last=last)

    last = config.num_embeddings
    whole = draw(0, last)
    cuts = (0, 1, BLOCK_ROWS - 1, BLOCK_ROWS, 2 * BLOCK_ROWS + 1, last)
    for first in cuts:
        for end in cuts:
            if first < end:
                assert torch.equal(draw(first, end), whole[first:end])
    assert not torch.equal(whole, draw(0, last, table="user"))
    assert not torch.equal(whole, draw(0, last, seed=4))
    assert not torch.equal(whole[:BLOCK_ROWS], whole[BLOCK_ROWS : 2 * BLOCK_ROWS])


def test_initial_rows_are_a_truncated_normal():
    config = TableConfig(num_embeddings=20_000, dim=8, features=("item_id",), init_std=0.5)
    rows = initial_rows(config, table="item", seed=0, first=0, last=20_000).double()
    assert rows.abs().max() <= 1.0
    # A normal cut at two standard deviations has 0.8796 of it left; 5 standard errors.
    assert abs(rows.mean()) < 5 * 0.44 / 400
    assert abs(rows.std() / 0.5 - 0.8796) < 0.01


@pytest.mark.gpu
def test_the_stream_of_ids_is_dealt_to_nobody_else():
    own = Case("replicated", "adamw", device="cuda").build().exchange.cuda_stream
    assert own not in {torch.cuda.Stream().cuda_stream for _ in range(64)}
