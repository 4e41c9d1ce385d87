"""Arithmetic of a training step, counted from the shapes.

A multiply-add is two operations. Element-wise work is not counted. Training is three times the
forward pass: the backward pass multiplies each matrix twice.
"""

import torch
from torch import Tensor

from gr.config import ModelConfig
from gr.sequence import SequenceInfo

# Dense bf16 peak of one device, FLOP/s, by a part of its name (vendor data sheets, no sparsity).
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}


def visible_pairs(info: SequenceInfo) -> Tensor:
    """Return (B, 2) int64: query-key pairs of a full layer and of the last one, causal mask.

    A candidate sees the history and itself.
    """
    lengths = info.offsets.diff()
    candidates = info.num_candidates
    history = lengths - candidates
    of_candidates = candidates * (history + 1)
    full = history * (history + 1) // 2 + of_candidates
    unread = lengths - info.tail_offsets.diff()
    return torch.stack([full, full - unread * (unread + 1) // 2], 1)


def training_flops(model: ModelConfig, info: SequenceInfo) -> float:
    """Return the FLOPs of forward and backward of the encoder on one batch.

    Args:
        model: the configuration; encoder dlrm has no sequence part and counts 0.
        info: lengths and tails of the batch.
    """
    if model.encoder == "dlrm":
        return 0.0
    tokens = int(info.offsets[-1])
    tail = int(info.tail_offsets[-1])
    full_pairs, tail_pairs = (int(x) for x in visible_pairs(info).sum(0))
    D = model.dim
    if model.encoder == "hstu":
        c = model.hstu
        uq = c.num_heads * (c.v_dim + c.qk_dim)
        out = c.num_heads * c.v_dim * (3 if c.concat_ua else 1)
        per_key, per_query, per_pair = 2 * D * uq, 2 * D * uq + 2 * out * D, 2 * uq
    else:
        t = model.transformer
        if model.encoder == "sasrec":
            ffn = 2 * 2 * D * (t.ffn_dim or D)
        else:
            ffn = 3 * 2 * D * (t.ffn_dim or transformer_ffn_dim(D))
        per_key, per_query, per_pair = 4 * D * D, 4 * D * D + ffn, 4 * D
    full_layer = tokens * (per_key + per_query) + full_pairs * per_pair
    last_layer = tokens * per_key + tail * per_query + tail_pairs * per_pair
    return 3.0 * ((model.num_layers - 1) * full_layer + last_layer)


def transformer_ffn_dim(dim: int) -> int:
    """Return the default hidden width of SwiGLU: 8/3 of `dim`, up to a multiple of 8."""
    return -(-8 * dim // 3 // 8) * 8


def peak_flops(device: torch.device) -> float | None:
    """Return the peak of a known device in FLOP/s, else None."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)
