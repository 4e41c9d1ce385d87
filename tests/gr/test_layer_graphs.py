"""Layers replayed at rounded sizes: on a CPU, where a replay is the call itself, and on a GPU."""

import copy

import pytest
import torch

from gr import layer_graphs
from gr.config import HSTUConfig, ModelConfig, RotaryConfig, TruncationConfig
from gr.hstu import HSTUEncoder
from tests.gr.hstu_oracle import make_info, make_sequences
from tests.gr.test_hstu import (
    OPTIONS,
    STRUCTURES,
    assert_equal_fp64,
    assert_matches_oracle,
    make_batch,
    make_encoder,
)

QUICK = ("global_rows", "rotary_heads")  # bias of position and time among it
CAPTURED = [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in OPTIONS]


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setattr(layer_graphs, "_is_capturable", lambda x_LD: True)


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("options", CAPTURED)
def test_rounded_tokens_change_nothing(options):
    """Against the equations, in float64, batch after batch of several sizes, twice."""
    config, encoder = make_encoder({**OPTIONS[options], "graph_tokens": 5}, num_layers=3)
    for seed, structure in enumerate([*STRUCTURES, *STRUCTURES]):
        sequences, num_context, x_LD = make_batch(structure, seed % len(STRUCTURES))
        assert_matches_oracle(config, encoder, sequences, num_context, x_LD)
    assert encoder.graphs.captured


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("layers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_truncated_layers_are_called(layers):
    truncation = TruncationConfig(layers=layers, history=2)
    options = {"truncation": truncation, "bias": "position", "graph_tokens": 4}
    config, encoder = make_encoder(options, num_layers=3)
    for structure in STRUCTURES:
        assert_matches_oracle(config, encoder, *make_batch(structure))
    assert {size.layers for size in encoder.graphs.captured} == {3 - layers}


@pytest.mark.usefixtures("on_cpu")
def test_gradients_of_several_batches_add_up():
    """What a parameter's .grad holds is the buffer of the graphs, which the next batch fills."""
    _, encoder = make_encoder({"bias": "position", "graph_tokens": 8})
    _, plain = make_encoder({"bias": "position"})
    plain.load_state_dict(encoder.state_dict())
    for model in (encoder, plain):
        for seed, structure in enumerate(("context_and_candidates", "long_history", "context")):
            sequences, num_context, x_LD = make_batch(structure, seed)
            model(x_LD, make_info(sequences, num_context)).square().sum().backward()
    for actual, expected in zip(encoder.parameters(), plain.parameters(), strict=True):
        assert_equal_fp64(actual.grad, expected.grad)


@pytest.mark.usefixtures("on_cpu")
def test_a_backward_pass_that_comes_too_late_is_refused():
    _, encoder = make_encoder({"graph_tokens": 8})
    info, x_LD = make_info(make_sequences([5], [5])), torch.randn(5, 6, dtype=torch.float64)
    first = encoder(x_LD, info)
    encoder(x_LD, info)
    with pytest.raises(RuntimeError, match="graph_tokens: the layers were called again"):
        first.sum().backward()


@pytest.mark.usefixtures("on_cpu")
def test_what_is_not_training_is_not_replayed():
    _, encoder = make_encoder({"graph_tokens": 8})
    sequences, num_context, x_LD = make_batch("context_and_candidates")
    info = make_info(sequences, num_context)
    with torch.no_grad():
        encoder(x_LD, info)
    encoder.eval()
    encoder(x_LD, info)
    encoder.train()
    seen = []
    hook = encoder.layers[0].register_forward_hook(lambda m, args, y: seen.append(y))
    encoder(x_LD, info)
    encoder(x_LD, info)
    hook.remove()
    assert not encoder.graphs.captured
    assert len(seen) == 2
    assert not copy.deepcopy(encoder).graphs.captured


@pytest.mark.usefixtures("on_cpu")
def test_sizes_are_bounded(monkeypatch):
    monkeypatch.setattr(layer_graphs, "MOST_SIZES", 2)
    monkeypatch.setattr(layer_graphs, "LONG", 3)
    config, encoder = make_encoder({"graph_tokens": 1}, num_layers=2)
    kept = []
    for length in (9, 7, 5, 9, 3, 5):
        sequences, x_LD = make_sequences([length], [length]), torch.randn(length, 6).double()
        assert_matches_oracle(config, encoder, sequences, 0, x_LD)
        kept.append([size.tokens for size in encoder.graphs.captured])
    # 5 and 3 are launched at first; then 7 has not come for four calls.
    assert kept == [[10], [10, 8], [10, 8], [10, 8], [10, 8], [10, 6]]


def test_nothing_is_captured_on_a_cpu():
    _, encoder = make_encoder({"graph_tokens": 8})
    sequences, num_context, x_LD = make_batch("context_and_candidates")
    encoder(x_LD, make_info(sequences, num_context)).sum().backward()
    assert encoder.graphs.buffers is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"graph_tokens": -1}, "at least 0, got -1"),
        ({"graph_tokens": 8, "impl": "composed"}, "impl=composed runs is not captured"),
    ],
)
def test_what_cannot_be_captured_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        HSTUConfig(**options)


GPU_OPTIONS = {
    "benchmark": {"recompute": ()},
    "recomputed": {},
    "position_time": {"bias": "position_time"},
    "affine_u_only": {"norm_affine": True, "uvqk_activation": "u_only", "norm": "group"},
    "fp8": {"precision": "fp8"},
    "dropout": {"dropout": 0.3},
    "rotary": {"rotary": RotaryConfig(angles="sum")},
    "plain_triton": {"impl": "triton"},
    "softmax": {"attention": "softmax", "bias": "position_time", "alpha": 0.0},
    # As published on MovieLens-1M: odd widths, and nothing is rounded to 16 bits.
    "float32": {
        **{"qk_dim": 50, "v_dim": 50, "bias": "position_time", "dropout": 0.2},
        "recompute": (),
    },
}


@pytest.mark.gpu
@pytest.mark.parametrize("options", GPU_OPTIONS)
def test_graphs_equal_launches(options):
    """Ten batches of other sizes: results and gradients of both, and what AdamW makes of them."""
    given = {"num_heads": 2, "qk_dim": 64, "v_dim": 64, **GPU_OPTIONS[options]}
    is_bf16 = options != "float32"
    models = []
    for graph_tokens in (0, 256):
        torch.manual_seed(0)
        config = HSTUConfig(**given, graph_tokens=graph_tokens, scaling_length=300)
        model = HSTUEncoder(ModelConfig(dim=128, num_layers=4, hstu=config)).cuda()
        models.append((model, torch.optim.AdamW(model.parameters(), lr=1e-3)))
    # As DDP does: leaves of autograd made here, in the stream that is not captured.
    held = [p.expand_as(p).grad_fn.next_functions[0][0] for p in models[1][0].parameters()]
    generator = torch.Generator().manual_seed(1)
    for batch in range(10):
        lengths = torch.randint(1, 300, (9 + batch % 3,), generator=generator).tolist()
        tails = lengths if batch % 2 else [max(1, n // 3) for n in lengths]
        info = make_info(make_sequences(lengths, tails))
        for name in ("offsets", "tail_offsets", "timestamp", "query_time", "session_start"):
            object.__setattr__(info, name, getattr(info, name).cuda())
        object.__setattr__(info, "num_candidates", info.num_candidates.cuda())
        x_LD = torch.randn(sum(lengths), 128, generator=generator).cuda()
        weights = torch.randn(sum(tails), 128, generator=generator).cuda()
        found = []
        for model, optimizer in models:
            torch.cuda.manual_seed(batch)
            x = x_LD.clone().requires_grad_()
            with torch.autocast("cuda", torch.bfloat16, enabled=is_bf16):
                y = model(x, info)
            (y.float() * weights).sum().backward()
            found.append(
                [y.detach().clone(), x.grad, *(p.grad.clone() for p in model.parameters())]
            )
            optimizer.step()
            optimizer.zero_grad()
        # Products of other numbers of rows may be summed in another order.
        for expected, actual in zip(*found, strict=True):
            error = (actual.float() - expected.float()).norm()
            assert error <= (2e-2 if is_bf16 else 1e-3) * expected.float().norm() + 1e-6
    graphs = models[1][0].graphs
    assert {bool(size.max_tail_len) for size in graphs.captured} == {False, True}
    assert models[0][0].graphs is None
    assert len(held) == len([*models[1][0].parameters()])


@pytest.mark.gpu
def test_many_sizes_take_the_memory_of_the_largest():
    torch.manual_seed(0)
    config = HSTUConfig(num_heads=2, qk_dim=64, v_dim=64, graph_tokens=256, recompute=())
    model = HSTUEncoder(ModelConfig(dim=128, num_layers=8, hstu=config)).cuda()
    reserved = [torch.cuda.memory_reserved()]
    for num_sequences in (160, *range(158, 100, -2)):
        info = make_info(make_sequences([200] * num_sequences, [200] * num_sequences))
        for name in ("offsets", "tail_offsets", "timestamp", "query_time", "session_start"):
            object.__setattr__(info, name, getattr(info, name).cuda())
        object.__setattr__(info, "num_candidates", info.num_candidates.cuda())
        x = torch.randn(200 * num_sequences, 128, device="cuda", requires_grad=True)
        with torch.autocast("cuda", torch.bfloat16):
            model(x, info).float().sum().backward()
        model.zero_grad()
        reserved.append(torch.cuda.memory_reserved())
    assert len(model.graphs.captured) >= 20
    first, rest = reserved[1] - reserved[0], reserved[-1] - reserved[1]
    assert rest < first / 2
