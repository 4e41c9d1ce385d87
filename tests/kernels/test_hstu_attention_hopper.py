"""The Hopper kernels against the reference in fp64: they run on a GPU of that generation only."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.hstu_attention import AttentionMask, RelativeBias, hstu_attention
from tests.checks import assert_within_reference_error
from tests.kernels.hstu_attention_oracle import Case, offsets_of
from tests.kernels.test_hstu_attention_triton import COMBINATIONS, check

SILU = {name: x for name, x in COMBINATIONS.items() if "activation" not in x}
# The same masks as COMBINATIONS has with softmax.
MASKS = {
    "prefix_window": AttentionMask(num_context=5, context="prefix", local_window=9, global_rows=3),
    "sees_all": AttentionMask(num_context=18, context="prefix_sees_all"),
    "everything": AttentionMask(
        num_context=2, context="prefix", local_window=130, global_rows=5, global_columns=20
    ),
}
BLOCK_EDGES = [0, 1, 2, 63, 64, 65, 127, 128, 129, 191, 192, 193, 255, 256, 257]
deterministic = pytest.mark.parametrize("deterministic", [False, True], ids=["fast", "fixed"])


@pytest.mark.gpu
@deterministic
@pytest.mark.parametrize("options", SILU.values(), ids=SILU.keys())
def test_combinations(options, deterministic):
    lengths, candidates = [300, 1, 0, 129, 128, 64], [20, 1, 0, 0, 128, 3]
    options = {"candidates": candidates, "position_reach": 200, **options}
    options |= {"qk_dim": 64, "v_dim": options.get("v_dim", 128)}
    case = Case(lengths, [300, 1, 0, 70, 128, 5], **options)
    check(case, torch.bfloat16, "cuda", "hopper", deterministic=deterministic)


@pytest.mark.gpu
@pytest.mark.parametrize("bias", ["none", "position_time"])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_masks(mask, bias):
    lengths, candidates, tails = [520, 1, 0, 257], [9, 1, 0, 140], [390, 1, 0, 257]
    case = Case(lengths, tails, candidates=candidates, mask=mask, bias=bias, qk_dim=128, v_dim=64)
    check(case, torch.bfloat16, "cuda", "hopper")


@pytest.mark.gpu
@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.sampled_from(BLOCK_EDGES) | st.integers(0, 700), max_size=6),
    seed=st.integers(0, 2**16),
    deterministic=st.booleans(),
)
def test_lengths(lengths, seed, deterministic):
    case = Case(lengths, qk_dim=64, v_dim=64, seed=seed)
    check(case, torch.bfloat16, "cuda", "hopper", deterministic=deterministic)


@pytest.mark.gpu
@settings(max_examples=15, deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**16))
def test_candidates_and_tails(data, seed):
    lengths = data.draw(st.lists(st.sampled_from(BLOCK_EDGES) | st.integers(0, 400), max_size=4))
    tails = [data.draw(st.integers(0, n)) for n in lengths]
    candidates = [data.draw(st.integers(0, n)) for n in lengths]
    mask = AttentionMask(num_context=3, context="prefix", local_window=70, global_rows=20)
    case = Case(lengths, tails, candidates=candidates, mask=mask, qk_dim=64, v_dim=64, seed=seed)
    check(case, torch.bfloat16, "cuda", "hopper")


@pytest.mark.gpu
@pytest.mark.parametrize(
    "dims", [(32, 32), (32, 256), (64, 128), (128, 128), (256, 64), (256, 256)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_dims(dims, dtype):
    case = Case([400, 65], qk_dim=dims[0], v_dim=dims[1], candidates=[5, 0], bias="position")
    check(case, dtype, "cuda", "hopper")


def attend(q, k, v, lengths, **options):
    return hstu_attention(
        *(q, k, v, offsets_of(lengths, "cuda")),
        max_len=max(lengths),
        alpha=0.1,
        scaling_length=max(lengths),
        impl="hopper",
        **options,
    )


@pytest.mark.gpu
def test_strided_views_give_what_copies_give():
    """Of one UVQK buffer; where the copy engine cannot follow the strides, of a copy."""
    lengths, H, D = [200, 77], 2, 64
    torch.manual_seed(0)
    packed = torch.randn(277, 4 * H * D, device="cuda", dtype=torch.bfloat16)
    views = [x.unflatten(1, (H, D)) for x in packed.split(H * D, 1)][1:]
    by_head = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in views]
    odd = torch.randn(277, 3 * H * D + 1, device="cuda", dtype=torch.bfloat16)
    misaligned = [x.unflatten(1, (H, D)) for x in odd[:, 1:].split(H * D, 1)]
    for given_views in (views, by_head, misaligned):
        got = [x.detach().requires_grad_() for x in given_views]
        want = [x.detach().contiguous().requires_grad_() for x in given_views]
        outs = [attend(*x, lengths, deterministic=True) for x in (got, want)]
        assert torch.equal(*outs)
        dout = torch.randn_like(outs[0])
        pairs = zip(
            torch.autograd.grad(outs[0], got, dout),
            torch.autograd.grad(outs[1], want, dout),
            strict=True,
        )
        assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.gpu
@deterministic
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_value_stays_in_its_sequence(bad, deterministic):
    """Also one in the rows behind the last sequence, where no sequence is."""
    lengths, H, D = [190, 37, 150], 2, 64
    torch.manual_seed(0)
    clean = [torch.randn(400, H, D, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
    dirty = [x.clone() for x in clean]
    for x in dirty:
        x[190:227] = bad
        x[377:] = bad
    results = []
    for q, k, v, dout in (clean, dirty):
        inputs = [x.requires_grad_() for x in (q, k, v)]
        out = attend(*inputs, lengths, deterministic=deterministic)
        results.append((out, *torch.autograd.grad(out, inputs, dout)))
    for a, b in zip(*results, strict=True):
        for rows in (slice(0, 190), slice(227, 377)):
            assert b[rows].isfinite().all()
            torch.testing.assert_close(a[rows], b[rows], atol=1e-3, rtol=0.02)


@pytest.mark.gpu
def test_200_runs_give_the_same_bits():
    case = Case([500, 30, 200], candidates=[9, 0, 3], bias="position_time", qk_dim=64, v_dim=64)
    first = case.run("hopper", torch.bfloat16, "cuda", deterministic=True)
    for _ in range(200):
        again = case.run("hopper", torch.bfloat16, "cuda", deterministic=True)
        assert all(torch.equal(again[name], first[name]) for name in first)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 256])
def test_a_long_sequence(window):
    """The last rows of 64k tokens against the reference on those rows: out and dQ."""
    mask = AttentionMask(local_window=window)
    case = Case([65536], heads=1, qk_dim=64, v_dim=64, mask=mask)
    full = case.run("hopper", torch.bfloat16, "cuda")
    tail = Case([65536], [16], heads=1, qk_dim=64, v_dim=64, mask=mask)
    tail.tensors = {**case.tensors, "q": case.tensors["q"][-16:]}
    tail.grad = case.grad[-16:]
    low = tail.run("reference", torch.bfloat16, "cuda")
    high = tail.run("reference", torch.float64, "cuda", rounded_to=torch.bfloat16)
    for name in ("out", "q"):
        assert_within_reference_error(full[name][-16:], low[name], high[name])


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.xdist_group("large")
@deterministic
def test_more_than_2_31_elements(deterministic):
    """The last sequence of 2.4e9 elements gives what it gives alone."""
    length, count, heads, dim = 512, 4600, 8, 128
    torch.manual_seed(0)
    q, k, v, dout = (
        torch.randn(length * count, heads, dim, device="cuda", dtype=torch.bfloat16)
        for _ in range(4)
    )
    assert q.numel() > 2**31
    last = slice(-length, None)

    def run(rows, lengths):
        x = [t[rows].detach().requires_grad_() for t in (q, k, v)]
        out = attend(*x, lengths, deterministic=deterministic)
        return [y[last].clone() for y in (out, *torch.autograd.grad(out, x, dout[rows]))]

    together = run(slice(None), [length] * count)
    for i, (a, b) in enumerate(zip(together, run(last, [length]), strict=True)):
        if i == 1 and not deterministic:  # dQ adds up in any order
            torch.testing.assert_close(a, b, rtol=2**-7, atol=1e-5 * b.abs().max().item())
        else:
            assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("bias", ["none", "position_time"])
def test_new_rows_against_cached_keys(bias):
    """Candidates alone as queries (M-FALCON) give what the whole sequence gives for them."""
    lengths, new = [700, 30, 129], [20, 30, 1]
    whole = Case(lengths, candidates=new, bias=bias, qk_dim=64, v_dim=128, position_reach=300)
    rows = torch.cat(
        [
            torch.arange(n - m, n) + start
            for n, m, start in zip(lengths, new, [0, 700, 730], strict=True)
        ]
    )
    part = Case(lengths, new, candidates=new, bias=bias, qk_dim=64, v_dim=128, position_reach=300)
    part.tensors = {**whole.tensors, "q": whole.tensors["q"][rows]}
    part.key_time, part.query_time = whole.key_time, whole.query_time[rows]
    expected = whole.run("hopper", torch.bfloat16, "cuda")["out"][rows.cuda()]
    got = part.run("hopper", torch.bfloat16, "cuda")["out"]
    torch.testing.assert_close(got, expected, rtol=2**-6, atol=2**-8 * expected.abs().max().item())


@pytest.mark.gpu
@pytest.mark.parametrize("candidates", [0, 20])
@pytest.mark.parametrize("dim", [64, 128])
def test_table_gradients_of_both_passes_agree(dim, candidates):
    """Summed in the backward kernel, and in a pass of their own: long rows, times as in a log."""
    lengths, reach = [2100, 333], 1500  # distances beyond the table too
    L = sum(lengths)
    torch.manual_seed(0)
    time = torch.randint(0, 14400, (L,), device="cuda").cumsum(0)
    inputs = [torch.randn(L, 4, dim, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
    tables = [0.1 * torch.randn(n, device="cuda") for n in (2 * reach + 1, 129)]
    found = []
    for fixed in (False, True):
        x = [t.clone().requires_grad_() for t in (*inputs[:3], *tables)]
        out = attend(
            *x[:3],
            lengths,
            bias=RelativeBias(*x[3:], time + 7200, time),
            num_candidates=torch.full((2,), candidates, device="cuda"),
            deterministic=fixed,
        )
        found.append(torch.autograd.grad(out, x[3:], inputs[3]))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * b.abs().max().item())


@pytest.mark.gpu
def test_what_the_kernels_do_not_take_is_named():
    q = torch.zeros(2, 1, 48, device="cuda", dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="dims of 32, 64, 128 and 256, got 48 of q and k"):
        attend(q, q, q, [2])
    with pytest.raises(ValueError, match=r"takes bfloat16 and float16, got torch\.float32"):
        attend(q.float(), q.float(), q.float(), [2])
    with pytest.raises(ValueError, match="SiLU weights only, got activation='softmax'"):
        hstu_attention(
            *(q, q, q, offsets_of([2], "cuda")),
            max_len=2,
            alpha=1.0,
            scaling_length=None,
            activation="softmax",
            impl="hopper",
        )
