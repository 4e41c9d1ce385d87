"""Bytes that the encoder keeps, against the tensors that autograd saved."""

from dataclasses import replace

import pytest
import torch

from gr.config import HSTUConfig, ModelConfig, SemiLocalConfig, TruncationConfig
from gr.hstu import HSTUEncoder, kept_history
from gr.memory import activation_bytes, run_bytes
from kernels.hstu_layer import RECOMPUTABLE, RECOMPUTED
from tests.gr.batches import data_config, train_config
from tests.gr.hstu_oracle import make_info, make_sequences, on_device

SMALL = HSTUConfig(num_heads=2, qk_dim=16, v_dim=16, impl="triton")
MODELS = {
    "default": SMALL,
    "all kept": replace(SMALL, recompute=()),
    "u alone activated": replace(SMALL, recompute=(), uvqk_activation="u_only"),
    "some kept": replace(SMALL, recompute=("normed", "silu"), concat_ua=True, norm="group"),
    "softmax": replace(SMALL, recompute=("uvqk",), attention="softmax"),
    "input alone": replace(SMALL, recompute=RECOMPUTABLE),
    "ultra": replace(
        SMALL,
        semi_local=SemiLocalConfig(window=3, global_rows=2),
        truncation=TruncationConfig(layers=2, history=4),
    ),
}
INDICES = 8


def saved(encoder, x, info):
    """Return the bytes of all that autograd keeps, weights and integers left out."""
    own = {p.untyped_storage().data_ptr() for p in encoder.parameters()}
    storages = {}

    def pack(tensor):
        if tensor.is_floating_point() and tensor.untyped_storage().data_ptr() not in own:
            storages[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = encoder(x, info)
    storages[y.untyped_storage().data_ptr()] = y
    return sum(t.untyped_storage().nbytes() for t in storages.values())


@pytest.mark.interpret
@pytest.mark.parametrize("name", MODELS)
def test_activations_are_what_autograd_keeps(name, device):
    model = ModelConfig(dim=32, num_layers=3, hstu=MODELS[name])
    sequences = make_sequences([9, 14, 3], [2, 3, 1], [2, 3, 1])
    info = make_info(sequences, keep_history=kept_history(model))
    encoder = HSTUEncoder(model).to(device)
    x = torch.randn(int(info.offsets[-1]), 32, device=device, requires_grad=True)
    assert saved(encoder, x, on_device(info, device)) == activation_bytes(model, info, itemsize=4)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
@pytest.mark.parametrize(
    "recompute",
    [RECOMPUTED, ("silu", "gated"), (), RECOMPUTABLE],
    ids=str,
)
def test_activations_are_what_the_allocator_gives(precision, recompute):
    hstu = HSTUConfig(
        num_heads=4,
        qk_dim=128,
        v_dim=128,
        precision=precision,
        recompute=recompute,
        truncation=TruncationConfig(layers=2, history=512),
    )
    model = ModelConfig(dim=512, num_layers=4, hstu=hstu)
    sequences = make_sequences([8192, 4096, 1000], [64, 64, 64], [64, 64, 64])
    info = make_info(sequences, keep_history=512)
    on_gpu, encoder = on_device(info, "cuda"), HSTUEncoder(model).cuda()
    x = torch.randn(int(info.offsets[-1]), 512, device="cuda", dtype=torch.bfloat16)
    x.requires_grad_()

    def kept():
        before = torch.cuda.memory_allocated()
        with torch.autocast("cuda", torch.bfloat16):
            y = encoder(x, on_gpu)
        after = torch.cuda.memory_allocated()
        assert y.shape == (info.num_rows, 512)
        return after - before + x.numel() * 2

    kept()
    expected = activation_bytes(model, info)
    # Indices, and in fp8 what is kept of norm(X) in fewer bytes.
    assert expected * (0.97 if precision == "bf16" else 0.85) <= kept() <= expected * 1.03


def test_a_run_is_the_sum_of_its_parts():
    config = train_config(data_config("none", ("merged", "session", "session", "none")))
    info = make_info(make_sequences([9, 4], [2, 1]))
    found = run_bytes(config, info, num_parameters=1000, on_gpu=False)
    assert (found.parameters, found.gradients, found.optimizer) == (4000, 4000, 8000)
    assert found.tables == 0
    # Rows of 8, 4 and 12 float32 with a first moment as large and a second of 4 bytes a row.
    rows = {"item": (51, 8), "bins": (9, 4), "context": (7, 12)}
    assert found.host == sum(n * (8 * dim + 4) for n, dim in rows.values())
    assert found.device == found.activations + 16_000
    with pytest.raises(ValueError, match="encoder=sasrec"):
        activation_bytes(replace(config.model, encoder="sasrec"), info)
