import pytest
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embeddings.collection import build_tables
from embeddings.config import EmbeddingsConfig, RowWiseAdamWConfig, TableConfig
from embeddings.optim import build_optimizer, row_gradient, sum_duplicates
from tests.embeddings.oracle import RowWiseOracle

ROWS, DIM = 23, 8


def optimizer_config(rule: str, decay: float) -> EmbeddingsConfig:
    return EmbeddingsConfig(
        tables={"item": TableConfig(num_embeddings=ROWS, dim=DIM, features=("item_id",))},
        optimizer=RowWiseAdamWConfig(lr=0.03, betas=(0.8, 0.97), eps=1e-5, weight_decay=decay),
        update_rule=rule,
    )


@pytest.mark.parametrize(("rule", "decay"), [("adamw", 0.0), ("adamw", 0.1), ("adagrad", 0.0)])
@pytest.mark.parametrize("form", ["pairs", "sparse", "coalesced"])
def test_a_hundred_steps_match_the_oracle(rule: str, decay: float, form: str):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(ROWS, DIM, generator=generator, dtype=torch.float64)
    config = optimizer_config(f"row_wise_{rule}", decay)
    oracle = RowWiseOracle(weight, rule, lr=0.03, betas=(0.8, 0.97), eps=1e-5, weight_decay=decay)
    optimizer = build_optimizer({"item": weight}, config)
    for step in range(100):
        count = int(torch.randint(0, 40, (1,), generator=generator))
        rows = torch.randint(0, ROWS - 1, (count,), generator=generator)
        grads = torch.randn(count, DIM, generator=generator, dtype=torch.float64)
        grads[rows == 3] = 0  # touched without a gradient: its moments still decay
        optimizer.lr = oracle.lr = 0.03 / (1 + step)
        oracle.step(rows, grads)
        sparse = torch.sparse_coo_tensor(rows[None], grads, (ROWS, DIM), check_invariants=True)
        gradient = {
            "pairs": (rows, grads),
            "sparse": sparse,
            "coalesced": sparse.coalesce(),
        }[form]
        optimizer.step({"item": gradient})
    state = optimizer.state["item"]
    torch.testing.assert_close(weight, torch.tensor(oracle.w).double(), rtol=0, atol=1e-6)
    exact = {"rtol": 1e-11, "atol": 1e-12}
    torch.testing.assert_close(weight, torch.tensor(oracle.w, dtype=torch.float64), **exact)
    torch.testing.assert_close(
        state["second_moment"], torch.tensor(oracle.v, dtype=torch.float64), **exact
    )
    if rule == "adamw":
        torch.testing.assert_close(
            state["first_moment"], torch.tensor(oracle.m, dtype=torch.float64), **exact
        )
    assert optimizer.steps == 100


def test_a_dense_gradient_touches_every_row():
    weight = torch.randn(ROWS, DIM, dtype=torch.float64)
    oracle = RowWiseOracle(weight, "adamw", lr=0.03, betas=(0.8, 0.97), eps=1e-5, weight_decay=0.1)
    optimizer = build_optimizer({"item": weight}, optimizer_config("row_wise_adamw", 0.1))
    dense = torch.randn(ROWS, DIM, dtype=torch.float64)
    dense[5] = 0
    optimizer.step({"item": dense})
    oracle.step(torch.arange(ROWS), dense)
    torch.testing.assert_close(weight, torch.tensor(oracle.w, dtype=torch.float64))


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adamw_is_that_of_torch_on_every_row(decay: float, monkeypatch):
    # It has every row once: to look for equal ones, a host waits for its GPU.
    monkeypatch.setattr(torch, "unique", None)
    config = EmbeddingsConfig(
        tables={"item": TableConfig(num_embeddings=ROWS, dim=6, features=("item_id", "other"))},
        optimizer=RowWiseAdamWConfig(lr=0.03, betas=(0.8, 0.97), eps=1e-5, weight_decay=decay),
        update_rule="adamw",
        form="replicated",
    )
    tables = build_tables(
        config, device=torch.device("cpu"), seed=0, num_sequences_hint=1, mean_length_hint=1.0
    )
    weight = torch.nn.Parameter(tables.full_weight("item").detach().clone())
    reference = torch.optim.AdamW(
        [weight], lr=0.03, betas=(0.8, 0.97), eps=1e-5, weight_decay=decay
    )
    generator = torch.Generator().manual_seed(0)
    for step in range(20):
        lots = [torch.randint(0, ROWS, (n,), generator=generator) for n in (5, 9)]
        factors = [torch.randn(len(x), 6, generator=generator) for x in lots]
        ids = KeyedJaggedTensor.from_lengths_sync(
            ["item_id", "other"], torch.cat(lots), torch.tensor([5, 9])
        )
        found = tables.lookup(ids)
        loss = sum((found[f] * x).sum() for f, x in zip(found, factors, strict=True))
        if step % 2:
            loss = loss + tables.full_weight("item").square().sum()
        loss.backward()
        tables.set_lr(0.03 / (1 + step))
        tables.optimizer_step()
        loss = sum((weight[x] * f).sum() for x, f in zip(lots, factors, strict=True))
        if step % 2:
            loss = loss + weight.square().sum()
        reference.zero_grad()
        loss.backward()
        reference.param_groups[0]["lr"] = 0.03 / (1 + step)
        reference.step()
    torch.testing.assert_close(tables.full_weight("item"), weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"update_rule": "adamw"}, "set embeddings.form=replicated"),
        ({"dim": 6}, "item.dim must be a multiple of 4, got 6"),
    ],
)
def test_what_only_replicated_tables_have_is_refused(settings, message):
    table = TableConfig(num_embeddings=9, dim=settings.pop("dim", 8), features=("item_id",))
    EmbeddingsConfig(tables={"item": table}, form="replicated", **settings)
    with pytest.raises(ValueError, match=message):
        EmbeddingsConfig(tables={"item": table}, **settings)


def test_a_table_without_a_gradient_stays_but_the_step_counts():
    weight = torch.ones(ROWS, DIM)
    optimizer = build_optimizer({"item": weight}, optimizer_config("row_wise_adamw", 0.1))
    optimizer.step({})
    assert torch.equal(weight, torch.ones(ROWS, DIM))
    assert optimizer.steps == 1


def test_sum_duplicates_against_a_dense_sum():
    rows = torch.tensor([4, 0, 4, 4, 2])
    grads = torch.randn(5, DIM, dtype=torch.float64)
    distinct, sums = sum_duplicates(
        (rows[:3], grads[:3]), (rows[:0], grads[:0]), (rows[3:], grads[3:])
    )
    dense = torch.zeros(ROWS, DIM, dtype=torch.float64)
    for row, grad in zip(rows, grads, strict=True):
        dense[row] += grad
    assert distinct.tolist() == [0, 2, 4]
    torch.testing.assert_close(sums, dense[distinct])
    assert row_gradient(torch.zeros(3, 2))[0].tolist() == [0, 1, 2]


def test_wrong_gradients_are_refused():
    optimizer = build_optimizer(
        {"item": torch.ones(ROWS, DIM)}, optimizer_config("row_wise_adamw", 0.0)
    )
    with pytest.raises(ValueError, match="'user'"):
        optimizer.step({"user": torch.ones(ROWS, DIM)})
    with pytest.raises(ValueError, match="width 8"):
        optimizer.step({"item": (torch.tensor([1]), torch.ones(1, 4))})
    with pytest.raises(ValueError, match=r"weight_decay=0\.1"):
        optimizer_config("row_wise_adagrad", 0.1)
