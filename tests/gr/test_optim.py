import math
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from gr.config import OptimConfig
from gr.optim import DenseUpdates, dense_optimizer, lr_factor
from gr.parallel import World
from tests.dist import run_distributed


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", {0: 0.25, 1: 0.5, 3: 1.0, 4: 1.0, 12: 1.0, 99: 1.0}),
        ("linear", {0: 0.25, 3: 1.0, 4: 1.0, 6: 0.8, 8: 0.6, 12: 0.2, 13: 0.2, 99: 0.2}),
        (
            "cosine",
            {
                0: 0.25,
                3: 1.0,
                4: 1.0,
                6: 0.2 + 0.8 * (0.5 + math.sqrt(0.125)),
                8: 0.6,
                12: 0.2,
                99: 0.2,
            },
        ),
    ],
)
def test_the_corners_of_the_schedules(schedule, expected):
    config = OptimConfig(warmup_steps=4, schedule=schedule, decay_steps=12, final_lr_fraction=0.2)
    found = {step: lr_factor(step, config) for step in expected}
    assert found == pytest.approx(expected, rel=1e-12)


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(["constant", "linear", "cosine"]),
    st.integers(0, 6),
    st.integers(1, 8),
    st.floats(0, 1),
)
def test_up_through_the_warm_up_then_never_up(schedule, warmup, span, final):
    config = OptimConfig(
        warmup_steps=warmup, schedule=schedule, decay_steps=warmup + span, final_lr_fraction=final
    )
    factors = [lr_factor(step, config) for step in range(warmup + span + 3)]
    rise, rest = factors[:warmup], factors[warmup:]
    assert rise == sorted(set(rise))
    assert all(0 < x <= 1 for x in rise)
    assert rest[0] == 1
    assert all(b <= a + 1e-12 for a, b in pairwise(rest))
    end = 1.0 if schedule == "constant" else final
    assert rest[span:] == pytest.approx([end] * 3, abs=1e-12)


def test_only_matrices_decay():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 2), nn.LayerNorm(2))
    module[1].weight.requires_grad_(False)
    config = OptimConfig(lr=0.5, weight_decay=0.1, betas=(0.8, 0.9), eps=1e-6)
    optimizer = dense_optimizer(module, config)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in module.named_parameters():
        factor = 1 - 0.5 * 0.1 if name == "0.weight" else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * factor)
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (0.5, (0.8, 0.9), 1e-6)


def _batches(rank: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return [torch.randn(5, 3, generator=generator) for _ in range(4)]


def _network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


def _accumulate() -> tuple[list[torch.Tensor], list[float]]:
    """Updates after batches 1 and 3; batch 3 is left out, so that no backward pass precedes it."""
    world = World(dist.get_rank(), 2, torch.device("cpu"))
    network = _network()
    updates = DenseUpdates(network, world, OptimConfig(accumulate=2, clip_norm=0.01))
    norms = []
    for step, batch in enumerate(_batches(world.rank)):
        with updates.gradients_of(step):
            loss = updates.module(batch).square().mean()
            if step != 3:
                loss.backward()
                updates.add()
        if step == 3:
            updates.sum_over_ranks()
        if updates.is_due(step):
            assert updates.update()
            norms.append(updates.grad_norm)
    return [p.detach() for p in network.parameters()], norms


def test_ranks_and_batches_are_averaged_and_clipped():
    network = _network()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.0)
    norms = []
    for steps in ((0, 1), (2,)):
        optimizer.zero_grad()
        parts = [_batches(rank)[step] for rank in (0, 1) for step in steps]
        loss = sum(network(part).square().mean() for part in parts) / len(parts)
        loss.backward()
        norms.append(math.sqrt(sum(float(p.grad.square().sum()) for p in network.parameters())))
        for p in network.parameters():
            p.grad *= min(1.0, 0.01 / norms[-1])
        optimizer.step()
    for parameters, found in run_distributed(_accumulate, 2):
        assert found == pytest.approx(norms, rel=1e-5)
        for got, expected in zip(parameters, network.parameters(), strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=2e-6)


def _updates(fused: bool) -> DenseUpdates:
    updates = DenseUpdates(_network(), World(0, 1, torch.device("cpu")), OptimConfig())
    # As it is on a GPU.
    updates.optimizer = dense_optimizer(updates.model, OptimConfig(), fused=fused)
    return updates


def test_what_a_gpu_decides_by_itself_is_what_the_cpu_decides():
    both = [_updates(fused) for fused in (False, True)]
    for batch, factor in zip(_batches(0), (1.0, float("nan"), float("inf"), 1.0), strict=True):
        for updates in both:
            before = [p.detach().clone() for p in updates.model.parameters()]
            (updates.module(batch).square().mean() * factor).backward()
            updates.add()
            assert bool(updates.update()) == (factor == 1.0)
            moved = [
                not torch.equal(a, b)
                for a, b in zip(before, updates.model.parameters(), strict=True)
            ]
            assert all(moved) == any(moved) == (factor == 1.0)
        for a, b in zip(*(updates.model.parameters() for updates in both), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    steps = [updates.optimizer.state_dict()["state"][0]["step"] for updates in both]
    assert steps[0] == steps[1] == 2


def test_a_state_of_one_kind_goes_on_in_the_other():
    both = [_updates(fused) for fused in (False, True)]
    for updates in both:
        updates.module(_batches(0)[0]).square().mean().backward()
        updates.add()
        updates.update()
    states = [get_optimizer_state_dict(updates.model, updates.optimizer) for updates in both]
    for updates, state, fused in zip(both, states[::-1], (False, True), strict=True):
        updates.load(state)
        assert [group["fused"] for group in updates.optimizer.param_groups] == [fused, fused]
        updates.module(_batches(0)[1]).square().mean().backward()
        updates.add()
        assert updates.update()
    for a, b in zip(*(updates.model.parameters() for updates in both), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_settings_of_updates_out_of_range():
    with pytest.raises(ValueError, match=r"accumulate must be at least 1.*got 0 and 0"):
        OptimConfig(accumulate=0)
