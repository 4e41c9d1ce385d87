import pytest
import torch

from gr.heads import RankingHead, RetrievalHead
from pipelines.config import TaskConfig

TASKS = {
    "click": TaskConfig(action="is_click"),
    "watch_time": TaskConfig(action="play_ms", type="regression"),
}


@pytest.mark.parametrize("hidden", [(), (5,), (7, 3)])
def test_ranking_head_equals_the_formula_element_by_element(hidden):
    torch.manual_seed(0)
    head = RankingHead(4, TASKS, hidden).double()
    y = torch.randn(6, 4, dtype=torch.float64)
    outputs = head(y)
    assert list(outputs) == ["click", "watch_time"]
    layers = [module for module in head.shared if isinstance(module, torch.nn.Linear)]
    assert [layer.out_features for layer in layers] == list(hidden)
    for p in range(6):
        h = y[p].tolist()
        for layer in layers:
            z = [
                sum(w * x for w, x in zip(row, h, strict=True)) + b
                for row, b in zip(layer.weight.tolist(), layer.bias.tolist(), strict=True)
            ]
            h = [x / (1 + torch.tensor(-x).exp().item()) for x in z]
        for t, name in enumerate(TASKS):
            row, b = head.readout.weight[t].tolist(), head.readout.bias[t].item()
            expected = sum(w * x for w, x in zip(row, h, strict=True)) + b
            assert outputs[name][p].item() == pytest.approx(expected, rel=1e-6, abs=1e-7)


def test_ranking_head_takes_no_rows_and_any_task_name():
    # Names such as these would clash with attributes of nn.ModuleDict.
    head = RankingHead(4, {"keys": TASKS["click"], "a.b": TASKS["click"]}, (8,))
    outputs = head(torch.empty(0, 4))
    assert {name: x.shape for name, x in outputs.items()} == {"keys": (0,), "a.b": (0,)}


def test_outputs_are_not_rounded_to_bf16():
    torch.manual_seed(0)
    head = RankingHead(4, TASKS, (8,))
    y = torch.randn(50, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = head(y)
    assert outputs["click"].dtype == torch.float32
    assert not torch.equal(outputs["click"], outputs["click"].bfloat16().float())
    torch.testing.assert_close(outputs["click"], head(y)["click"], rtol=0.02, atol=0.02)


def test_read_outs_start_at_the_priors():
    tasks = {
        "click": TaskConfig(action="is_click", prior=0.2),
        "watch_time": TaskConfig(action="play_ms", type="regression", prior=1.5),
        "like": TaskConfig(action="is_like"),
    }
    outputs = RankingHead(4, tasks, ())(torch.zeros(1, 4))
    assert outputs["click"].sigmoid().item() == pytest.approx(0.2)
    assert outputs["watch_time"].item() == 1.5
    assert outputs["like"].item() == 0.0


def test_ranking_head_without_tasks_is_refused():
    with pytest.raises(ValueError, match=r"data\.tasks"):
        RankingHead(4, {}, ())


@pytest.mark.parametrize("item_dim", [4, 6])
def test_user_and_item_vectors_have_length_one(item_dim):
    torch.manual_seed(0)
    head = RetrievalHead(4, item_dim)
    y, rows = torch.randn(5, 4) * 10, torch.randn(3, item_dim) * 0.01
    user = head(y)
    assert user.shape == (5, item_dim)
    torch.testing.assert_close(user.square().sum(1), torch.ones(5))
    for row, vector in zip(rows.double(), head.item_vectors(rows), strict=True):
        length = sum(x * x for x in row.tolist()) ** 0.5
        torch.testing.assert_close(vector.double(), row / length, rtol=1e-6, atol=1e-7)
    if item_dim == 4:
        assert list(head.parameters()) == []
        torch.testing.assert_close(user, y / y.square().sum(1, keepdim=True).sqrt())


def test_tiny_rows_are_divided_by_eps_and_zero_rows_stay_zero():
    head = RetrievalHead(4, 4)
    rows = torch.tensor([[0.0, 0, 0, 0], [3e-8, 4e-8, 0, 0]])
    expected = torch.tensor([[0.0, 0, 0, 0], [0.03, 0.04, 0, 0]])
    torch.testing.assert_close(head.item_vectors(rows), expected)


def test_without_normalisation_vectors_are_as_they_are_but_not_in_bf16():
    head = RetrievalHead(4, 4, l2_normalize=False)
    rows = torch.randn(3, 4)
    assert torch.equal(head(rows), rows)
    assert head.item_vectors(rows.bfloat16()).dtype == torch.float32
    assert RetrievalHead(4, 4).item_vectors(rows.bfloat16()).dtype == torch.float32
