"""Losses against fp64 loops written from their formulae."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gr.losses import (
    ItemFrequency,
    full_softmax,
    in_batch_softmax,
    multitask_loss,
    position_softmax,
    sampled_softmax,
)
from pipelines.config import TaskConfig

TASKS = {
    "click": TaskConfig(action="is_click"),
    "watch_time": TaskConfig(action="play_ms", type="regression"),
}


def softmax_loss_by_loops(user, positive, positive_ids, negative, negative_ids, groups, options):
    """Sum over rows, one row and one negative at a time."""
    group_r, group_m = groups
    total = user.new_zeros(())
    for r in range(len(user)):

        def score(vector, log_q, r=r):
            return (user[r] * vector).sum() / options["temperature"] - log_q

        target = score(positive[r], options["positive_log_q"][r])
        z = target.exp()
        for m in range(len(negative)):
            if group_m[m] == group_r[r] and negative_ids[m] != positive_ids[r]:
                z = z + score(negative[m], options["negative_log_q"][m]).exp()
        total = total + options["weights"][r] * (z.log() - target)
    return total


def gradients(total, *inputs):
    found = torch.autograd.grad(total, inputs, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True)]


@st.composite
def cases(draw):
    num_groups = draw(st.integers(1, 5))
    rows = [draw(st.integers(0, 6)) for _ in range(num_groups)]
    negatives = [draw(st.integers(0, 5)) for _ in range(num_groups)]
    return num_groups, rows, negatives, draw(st.integers(0, 2**16))


@settings(deadline=None, max_examples=60)
@given(cases())
def test_sampled_softmax_equals_loops_in_value_and_gradients(case):
    num_groups, rows, negatives, seed = case
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        x = torch.randn(*shape, dtype=torch.float64, generator=generator)
        return x.requires_grad_()

    group_r = torch.arange(num_groups).repeat_interleave(torch.tensor(rows))
    group_m = torch.arange(num_groups).repeat_interleave(torch.tensor(negatives))
    num_rows, num_negatives = sum(rows), sum(negatives)
    user, positive, negative = normal(num_rows, 3), normal(num_rows, 3), normal(num_negatives, 3)
    # Four ids only: accidental hits and repeated negatives are frequent.
    positive_ids = torch.randint(0, 4, (num_rows,), generator=generator)
    negative_ids = torch.randint(0, 4, (num_negatives,), generator=generator)
    options = {
        "temperature": 0.7,
        "weights": torch.rand(num_rows, dtype=torch.float64, generator=generator),
        "positive_log_q": normal(num_rows).detach(),
        "negative_log_q": normal(num_negatives).detach(),
    }
    expected = softmax_loss_by_loops(
        user, positive, positive_ids, negative, negative_ids, (group_r, group_m), options
    )
    got = sampled_softmax(
        user,
        positive,
        positive_ids,
        negative,
        negative_ids,
        group_r,
        group_m,
        num_groups=num_groups,
        weights_R=options["weights"],
        temperature=0.7,
        positive_log_q_R=options["positive_log_q"],
        negative_log_q_M=options["negative_log_q"],
    )
    torch.testing.assert_close(got.total, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got.weight, options["weights"].sum())
    inputs = (user, positive, negative)
    if num_rows:
        for a, b in zip(gradients(got.total, *inputs), gradients(expected, *inputs), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_one_group_needs_no_group_numbers():
    torch.manual_seed(0)
    user, positive, negative = (torch.randn(n, 4, dtype=torch.float64) for n in (5, 5, 7))
    ids, negative_ids = torch.arange(5), torch.tensor([0, 0, 1, 9, 9, 9, 4])
    zeros_r, zeros_m = torch.zeros(5, dtype=torch.int64), torch.zeros(7, dtype=torch.int64)
    arguments = (user, positive, ids, negative, negative_ids)
    without = sampled_softmax(*arguments, temperature=0.5)
    with_one = sampled_softmax(*arguments, zeros_r, zeros_m, num_groups=1, temperature=0.5)
    options = {
        "temperature": 0.5,
        "weights": torch.ones(5),
        "positive_log_q": torch.zeros(5),
        "negative_log_q": torch.zeros(7),
    }
    expected = softmax_loss_by_loops(*arguments, (zeros_r, zeros_m), options)
    torch.testing.assert_close(without.total, expected)
    torch.testing.assert_close(with_one.total, expected)
    assert without.weight == 5


def test_uniform_log_q_cancels():
    torch.manual_seed(0)
    user, positive, negative = (torch.randn(n, 4, dtype=torch.float64) for n in (5, 5, 7))
    arguments = (user, positive, torch.arange(5), negative, torch.arange(5, 12))
    plain = sampled_softmax(*arguments, temperature=0.5)
    corrected = sampled_softmax(
        *arguments,
        temperature=0.5,
        positive_log_q_R=torch.full((5,), -3.0),
        negative_log_q_M=torch.full((7,), -3.0),
    )
    torch.testing.assert_close(plain.total, corrected.total)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=5), st.integers(0, 2**16))
def test_in_batch_equals_loops_over_the_other_positives(rows, seed):
    generator = torch.Generator().manual_seed(seed)
    num_rows = sum(rows)
    group = torch.arange(len(rows)).repeat_interleave(torch.tensor(rows))
    user, positive = (
        torch.randn(num_rows, 3, dtype=torch.float64, generator=generator).requires_grad_()
        for _ in range(2)
    )
    ids = torch.randint(0, 4, (num_rows,), generator=generator)
    log_q = torch.randn(num_rows, dtype=torch.float64, generator=generator)
    options = {
        "temperature": 0.3,
        "weights": torch.ones(num_rows, dtype=torch.float64),
        "positive_log_q": log_q,
        "negative_log_q": log_q,
    }
    expected = softmax_loss_by_loops(user, positive, ids, positive, ids, (group, group), options)
    got = in_batch_softmax(
        user, positive, ids, group, num_groups=len(rows), temperature=0.3, log_q_R=log_q
    )
    torch.testing.assert_close(got.total, expected, rtol=1e-11, atol=1e-12)
    if num_rows:
        for a, b in zip(
            gradients(got.total, user, positive), gradients(expected, user, positive), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("chunk_rows", [2, 3, 100])
def test_full_softmax_equals_loops_over_the_catalogue_in_any_chunks(chunk_rows):
    torch.manual_seed(0)
    user = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    items = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    rows = torch.tensor([1, 8, 3, 3, 5, 1, 2])
    weights = torch.tensor([1.0, 0, 2, 1, 1, 0.5, 1], dtype=torch.float64)
    expected = torch.zeros((), dtype=torch.float64)
    for r in range(7):
        scores = [(user[r] * items[e]).sum() / 0.2 for e in range(1, 9)]
        z = sum((s.exp() for s in scores), torch.zeros((), dtype=torch.float64))
        expected = expected + weights[r] * (z.log() - scores[rows[r] - 1])
    got = full_softmax(user, items, rows, weights_R=weights, temperature=0.2, chunk_rows=chunk_rows)
    torch.testing.assert_close(got.total, expected, rtol=1e-12, atol=1e-12)
    assert got.weight == weights.sum()
    for a, b in zip(
        gradients(got.total, user, items), gradients(expected, user, items), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_full_softmax_holds_one_chunk_of_logits():
    user, items = torch.randn(64, 4, requires_grad=True), torch.randn(50, 4)
    saved = []

    def remember(x):
        saved.append(x.shape)
        return x

    for chunk_rows, largest in ((8, 50 * 4), (64, 64 * 49)):
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(remember, lambda x: x):
            full_softmax(user, items, torch.ones(64).long(), temperature=1.0, chunk_rows=chunk_rows)
        assert max(math.prod(shape) for shape in saved) == largest


def test_full_softmax_refuses_the_unknown_item_and_rows_beyond_the_table():
    for bad in (0, 9, -1):
        with pytest.raises(ValueError, match=rf"rows 1 \.\. 8 .* 1 of 2 .* first is {bad}"):
            full_softmax(torch.ones(2, 4), torch.ones(9, 4), torch.tensor([3, bad]), temperature=1)


def test_losses_of_nothing_are_zero_and_differentiable():
    user = torch.empty(0, 4, requires_grad=True)
    negative = torch.randn(6, 4, requires_grad=True)
    no_ids, ids = torch.empty(0, dtype=torch.int64), torch.arange(6)
    losses = [
        sampled_softmax(user, user, no_ids, negative, ids, temperature=0.1),
        sampled_softmax(
            user, user, no_ids, negative, ids, no_ids, ids, num_groups=6, temperature=1
        ),
        in_batch_softmax(user, user, no_ids, temperature=0.1),
        full_softmax(user, negative, no_ids, temperature=0.1),
    ]
    for loss in losses:
        assert loss.total == 0
        assert loss.weight == 0
        loss.total.backward()
        assert user.grad is not None
    alone = torch.randn(2, 4, requires_grad=True)
    loss = sampled_softmax(alone, alone, ids[:2], negative[:0], no_ids, temperature=0.1)
    loss.total.backward()
    assert (loss.total, loss.weight) == (0, 2)
    assert torch.equal(alone.grad, torch.zeros(2, 4))


@pytest.mark.parametrize(("rows", "negatives"), [(7, 30), (300, 5)])
def test_position_softmax_equals_loops_over_its_own_draws(rows, negatives):
    generator = torch.Generator().manual_seed(0)
    user = torch.randn(9, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    items = torch.randn(rows, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    target = torch.randint(1, rows, (9,), generator=generator)
    weights = torch.rand(9, generator=generator, dtype=torch.float64)
    got = position_softmax(
        user,
        items,
        target,
        num_negatives=negatives,
        weights_R=weights,
        temperature=0.3,
        generator=torch.Generator().manual_seed(5),
    )
    draws = torch.randint(1, rows, (9, negatives), generator=torch.Generator().manual_seed(5))
    hits, total = 0, 0.0
    for r in range(9):
        others = [int(e) for e in draws[r] if e != target[r]]
        hits += negatives - len(others)
        scores = torch.stack([user[r] @ items[e] / 0.3 for e in [int(target[r]), *others]])
        total = total - weights[r] * torch.log_softmax(scores, 0)[0]
    assert hits > 0  # accidental ones are met
    torch.testing.assert_close(got.total, total)
    torch.testing.assert_close(got.weight, weights.sum())
    expected = gradients(total, user, items)
    for a, b in zip(gradients(got.total, user, items), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_position_softmax_draws_every_item_alike_and_never_the_unknown_one():
    torch.manual_seed(0)
    items = torch.zeros(6, 1)
    items[0] = 100.0  # would dominate every loss
    loss = position_softmax(
        torch.ones(4_000, 1), items, torch.full((4_000,), 3), num_negatives=10, temperature=1.0
    )
    # All scores are alike: the loss is ln(1 + negatives that are no hit), a fifth of them hits.
    assert (loss.total / loss.weight).item() == pytest.approx(2.1865, abs=0.006)


def test_wrong_groups_are_refused():
    x, ids = torch.randn(3, 4), torch.arange(3)
    for group_r, group_m, what in (
        (torch.tensor([0, 2, 1]), ids, "rows"),
        (ids, torch.tensor([1, 0, 2]), "negatives"),
        (ids, torch.tensor([1, 2, 3]), "negatives"),
        (torch.tensor([-1, 0, 2]), ids, "rows"),
    ):
        with pytest.raises(ValueError, match=f"groups of the {what} must be ascending"):
            sampled_softmax(x, x, ids, x, ids, group_r, group_m, num_groups=3, temperature=1.0)
    with pytest.raises(ValueError, match="go together"):
        sampled_softmax(x, x, ids, x, ids, ids, None, num_groups=3, temperature=1.0)


def test_bf16_vectors_are_compared_in_fp32():
    torch.manual_seed(0)
    user, positive, negative = (torch.randn(n, 64).bfloat16() for n in (20, 20, 30))
    ids, negative_ids = torch.arange(20), torch.arange(20, 50)
    expected = sampled_softmax(
        user.double(), positive.double(), ids, negative.double(), negative_ids, temperature=0.05
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = sampled_softmax(user, positive, ids, negative, negative_ids, temperature=0.05)
    assert got.total.dtype == torch.float32
    torch.testing.assert_close(got.total.double(), expected.total, rtol=1e-6, atol=0)


def test_multitask_loss_equals_loops():
    torch.manual_seed(0)
    outputs = {name: torch.randn(8, dtype=torch.float64, requires_grad=True) for name in TASKS}
    labels = {"click": torch.randint(0, 2, (8,)).float(), "watch_time": torch.rand(8)}
    weights = {name: torch.tensor([1.0, 0, 2, 0.5, 1, 1, 0, 1]) for name in TASKS}
    got = multitask_loss(outputs, labels, weights, TASKS)
    click = watch = 0.0
    for p in range(8):
        z, y, w = (x["click"][p].item() for x in (outputs, labels, weights))
        probability = 1 / (1 + math.exp(-z))
        click -= w * (y * math.log(probability) + (1 - y) * math.log(1 - probability))
        z, y, w = (x["watch_time"][p].item() for x in (outputs, labels, weights))
        watch += w * (z - y) ** 2
    assert got["click"].total.item() == pytest.approx(click, rel=1e-12)
    assert got["watch_time"].total.item() == pytest.approx(watch, rel=1e-12)
    assert got["click"].weight == got["watch_time"].weight == 6.5
    for name in TASKS:
        (grad,) = torch.autograd.grad(got[name].total, outputs[name])
        for p in range(8):
            z, y, w = (x[name][p].item() for x in (outputs, labels, weights))
            slope = 1 / (1 + math.exp(-z)) - y if name == "click" else 2 * (z - y)
            assert grad[p].item() == pytest.approx(w * slope, rel=1e-12, abs=1e-15)


def test_cross_entropy_is_finite_for_certain_logits():
    outputs = {"click": torch.tensor([1e4, -1e4, 1e4])}
    labels = {"click": torch.tensor([1.0, 0.0, 0.0])}
    loss = multitask_loss(outputs, labels, {"click": torch.ones(3)}, {"click": TASKS["click"]})
    assert loss["click"].total == 1e4


def test_item_frequency_counts_and_smooths():
    frequency = ItemFrequency(5)
    rows = torch.tensor([1, 1, 4])
    torch.testing.assert_close(frequency.log_q(rows), torch.full((3,), math.log(1 / 5)))
    frequency.update(rows)
    frequency.update(torch.tensor([1]))
    frequency.update(torch.empty(0, dtype=torch.int64))
    expected = torch.tensor([1 / 9, 4 / 9, 1 / 9, 1 / 9, 2 / 9]).log()
    torch.testing.assert_close(frequency.log_q(torch.arange(5)), expected)
    frequency.forget(torch.tensor([4, 4, 0]))
    expected = torch.tensor([1 / 8, 4 / 8, 1 / 8, 1 / 8, 1 / 8]).log()
    torch.testing.assert_close(frequency.log_q(torch.arange(5)), expected)
    restored = ItemFrequency(5)
    restored.load_state_dict(frequency.state_dict())
    assert torch.equal(restored.log_q(rows), frequency.log_q(rows))
