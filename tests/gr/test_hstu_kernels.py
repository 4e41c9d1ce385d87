"""The encoder on the kernels: against the equations, and learning what the reference learns."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional

from gr.config import HSTUConfig, ModelConfig
from gr.hstu import HSTUEncoder
from kernels.hstu_attention import hstu_attention
from tests.checks import assert_within_reference_error
from tests.gr import hstu_oracle
from tests.gr.hstu_oracle import make_info, make_sequences
from tests.gr.test_hstu import OPTIONS, make_batch, make_encoder

EVERYTHING = ["paper", "dlrm_v3", "softmax_rab", "u_only_rab", "group_rab", "final_norm"]


def on_device(info, device):
    moved = {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in vars(info).items()
    }
    return replace(info, **moved)


def run(encoder, x_LD, info, dy_RD, impl, dtype, device):
    """Return the result, the gradient of x and of each parameter, by name."""
    hstu = replace(encoder.layers[0].config, impl=impl)
    copy = HSTUEncoder(ModelConfig(dim=x_LD.shape[1], num_layers=len(encoder.layers), hstu=hstu))
    copy.load_state_dict(encoder.state_dict())
    copy.to(device, dtype)
    x_LD = x_LD.to(device, dtype).requires_grad_()
    y_RD = copy(x_LD, on_device(info, device))
    y_RD.backward(dy_RD.to(device, dtype))
    gradients = {name: p.grad for name, p in copy.named_parameters()}
    return {"y": y_RD.detach(), "x": x_LD.grad, **gradients}


@pytest.mark.interpret
@pytest.mark.parametrize("options", EVERYTHING)
def test_matches_the_equations(options, device):
    """Forward and all gradients through two layers, the second of tails."""
    config, encoder = make_encoder(OPTIONS[options])
    sequences, num_context, x_LD = make_batch("context_and_candidates")
    info = make_info(sequences, num_context)
    parameters = {n: p.detach().clone().requires_grad_() for n, p in encoder.named_parameters()}
    x_exact = x_LD.clone().requires_grad_()
    y_exact = hstu_oracle.encoder(x_exact, sequences, num_context, config, parameters)
    dy_RD = torch.randn(y_exact.shape, dtype=torch.float64)
    y_exact.backward(dy_RD)
    exact = {"y": y_exact.detach(), "x": x_exact.grad, **{n: p.grad for n, p in parameters.items()}}
    got, low = (
        run(encoder, x_LD, info, dy_RD, impl, torch.float32, device)
        for impl in ("triton", "reference")
    )
    # Sixteen operators in a row, each rounding in an order of its own.
    for name, expected in exact.items():
        assert_within_reference_error(
            got[name].cpu(), low[name].cpu(), expected, times=2.0 if name == "y" else 5.0
        )


@pytest.mark.parametrize(
    ("impl", "attention"), [("composed", "auto"), ("reference", "reference"), ("auto", "reference")]
)
def test_composed_is_the_reference_around_the_default_attention(impl, attention, monkeypatch):
    """By default; on a CPU `auto` is the reference throughout."""
    assert HSTUConfig().impl == "composed"
    _, encoder = make_encoder({"impl": impl})
    seen, whole = [], hstu_attention
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(
        "kernels.hstu_layer.reference.hstu_attention",
        lambda *inputs, **options: seen.append(options["impl"]) or whole(*inputs, **options),
    )
    sequences, num_context, x_LD = make_batch("context_and_candidates")
    encoder(x_LD, make_info(sequences, num_context))
    assert seen == [attention, attention]


@pytest.mark.gpu
def test_auto_is_the_kernels_and_autocast_sets_their_dtype():
    _, encoder = make_encoder({"qk_dim": 32, "v_dim": 32, "impl": "auto"}, dim=64)
    encoder.float().cuda()
    info = on_device(make_info(make_sequences([40, 9], [5, 9])), "cuda")
    x_LD = torch.randn(49, 64, device="cuda")
    with torch.autocast("cuda", torch.bfloat16), torch.profiler.profile() as profile:
        y_RD = encoder(x_LD, info)
    seen = {event.key for event in profile.key_averages()}
    assert "aten::native_layer_norm" not in seen
    assert y_RD.dtype == torch.bfloat16


class NextItem(nn.Module):
    """A toy model: the encoder between a table of items and scores of the next."""

    def __init__(self, impl, num_items=50, dim=64):
        super().__init__()
        hstu = HSTUConfig(
            qk_dim=32, v_dim=32, scaling_length=64, bias="position_time", final_norm=True, impl=impl
        )
        self.items = nn.Embedding(num_items, dim)
        self.encoder = HSTUEncoder(ModelConfig(dim=dim, num_layers=2, hstu=hstu))
        self.scores = nn.Linear(dim, num_items)

    def forward(self, item_L, info):
        return self.scores(self.encoder(self.items(item_L), info))


def learn(impl, seed, steps=200):
    """Return the loss of each step on sequences whose next item follows from the last, mostly."""
    torch.manual_seed(seed)
    model = NextItem(impl).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    data, losses = torch.Generator().manual_seed(seed), []
    for _ in range(steps):
        lengths = torch.randint(20, 60, (32,), generator=data).tolist()
        items = torch.randint(0, 50, (sum(lengths),), generator=data).tolist()
        follows = (torch.rand(sum(lengths), generator=data) < 0.8).tolist()
        for i in range(1, sum(lengths)):
            if follows[i]:
                items[i] = (7 * items[i - 1] + 3) % 50
        info = on_device(make_info(make_sequences(lengths, lengths, seed=0)), "cuda")
        item_L = torch.tensor(items, device="cuda")
        with torch.autocast("cuda", torch.bfloat16):
            scores = model(item_L, info)
        loss = functional.cross_entropy(scores[:-1].float(), item_L[1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses).cpu()


@pytest.mark.gpu
def test_200_steps_in_bfloat16_are_those_of_the_reference():
    """The kernels and the reference, from one seed, are nearer than the reference from two."""
    reference, other_seed = (learn("reference", seed) for seed in (0, 1))
    kernels = learn("auto", 0)

    def distance(a, b):
        return (a - b).unfold(0, 20, 20).mean(1).abs().max().item()

    assert kernels[-20:].mean() < 0.6 * kernels[0]  # something was learnt
    assert distance(kernels, reference) < distance(reference, other_seed)
