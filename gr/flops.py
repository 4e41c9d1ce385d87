"""Arithmetic of a training step, counted from the shapes.

A multiply-add is two operations. Element-wise work is not counted. Training is three times the
forward pass: the backward pass multiplies each matrix twice.
"""

import torch

from gr.config import ModelConfig, SemiLocalConfig
from gr.hstu import EVERYTHING, attention_mask, kept_history
from gr.sequence import SequenceInfo, sequence_index, tail_index, truncate
from kernels.hstu_attention.mask import AttentionMask, num_visible
from pipelines.cost import WHOLE, SequenceCost

# Dense bf16 peak of one device, FLOP/s, by a part of its name (vendor data sheets, no sparsity).
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}


def visible_pairs(info: SequenceInfo, semi_local: SemiLocalConfig = EVERYTHING) -> tuple[int, int]:
    """Return the query-key pairs of a full layer and of the last one, which reads tails only."""
    lengths, candidates = info.offsets.diff(), info.num_candidates
    mask = attention_mask(info, semi_local)
    if mask == AttentionMask() and not candidates.any():
        # Each token sees all before it and itself: no need to look at every one, in each step.
        unread = lengths - info.tail_offsets.diff()
        pairs = (lengths * (lengths + 1)).sum() // 2
        return int(pairs), int(pairs - (unread * (unread + 1)).sum() // 2)
    sequence_L = sequence_index(info.offsets, int(info.offsets[-1]))
    row_L = torch.arange(len(sequence_L), device=sequence_L.device) - info.offsets[sequence_L]
    keys_L = num_visible(row_L, lengths[sequence_L], candidates[sequence_L], mask)
    return int(keys_L.sum()), int(keys_L[tail_index(info)].sum())


def training_flops(model: ModelConfig, info: SequenceInfo) -> int:
    """Return the FLOPs of forward and backward of the encoder on one batch.

    Args:
        model: the configuration; encoder dlrm has no sequence part and counts 0.
        info: lengths and tails of the batch.
    """
    return 3 * inference_flops(model, info)


def inference_flops(model: ModelConfig, info: SequenceInfo) -> int:
    """Return the FLOPs of the encoder's forward pass on one batch, as `training_flops`."""
    if model.mixture:
        return sum(_stack_flops(model, group.info) for group in info.groups)
    return _stack_flops(model, info)


def _stack_flops(model: ModelConfig, info: SequenceInfo) -> int:
    per_key, per_query, per_pair = layer_flops(model)
    semi_local = model.hstu.semi_local if model.encoder == "hstu" else EVERYTHING

    def counts(structure: SequenceInfo) -> tuple[int, int]:
        """Return the FLOPs of a layer on all rows, and of the last layer."""
        tokens, tail = int(structure.offsets[-1]), int(structure.tail_offsets[-1])
        pairs, tail_pairs = visible_pairs(structure, semi_local)
        return (
            tokens * (per_key + per_query) + pairs * per_pair,
            tokens * per_key + tail * per_query + tail_pairs * per_pair,
        )

    full, last = counts(info)
    if model.encoder == "cross_attention":  # every layer computes the tails only
        full = last
    truncated = num_truncated(model)
    if not truncated:
        return (model.num_layers - 1) * full + last
    kept, last = counts(truncate(info)[1])
    return (model.num_layers - truncated) * full + (truncated - 1) * kept + last


def sequence_costs(model: ModelConfig) -> tuple[SequenceCost, ...]:
    """Return the training FLOPs of the encoder on one sequence, as the data side reads them.

    One for each stack. The data side knows how many events there are and not which actions they
    have: of a group of a mixture it is an upper bound, as if every event belonged to it.
    """
    cost = _stack_cost(model)
    if not model.mixture:
        return (cost,)
    return tuple(
        cost._replace(most_events=group.history or WHOLE) for group in model.mixture.values()
    )


def _stack_cost(model: ModelConfig) -> SequenceCost:
    per_key, per_query, per_pair = layer_flops(model)
    if model.encoder == "cross_attention":
        layers = 3.0 * model.num_layers
        return SequenceCost(
            per_token=layers * per_key,
            per_tail_token=layers * per_query,
            per_pair=0.0,
            per_tail_pair=layers * per_pair,
        )
    truncated = num_truncated(model)
    full_layers = model.num_layers - (truncated or 1)
    kept_layers = max(truncated - 1, 0)
    semi_local = model.hstu.semi_local if model.encoder == "hstu" else EVERYTHING
    last = "per_kept_token" if truncated else "per_token"
    cost = SequenceCost(
        per_token=3.0 * full_layers * (per_key + per_query),
        per_tail_token=3.0 * per_query,
        per_pair=3.0 * full_layers * per_pair,
        per_tail_pair=3.0 * per_pair,
        per_kept_token=3.0 * kept_layers * (per_key + per_query),
        per_kept_pair=3.0 * kept_layers * per_pair,
        kept_history=kept_history(model) if truncated else WHOLE,
        window=semi_local.window or WHOLE,
        global_rows=semi_local.global_rows,
        global_columns=semi_local.global_columns,
    )
    return cost._replace(**{last: getattr(cost, last) + 3.0 * per_key})


def num_truncated(model: ModelConfig) -> int:
    """Return N2, the layers that compute what attention truncation keeps."""
    return model.hstu.truncation.layers if model.encoder == "hstu" else 0


def layer_flops(model: ModelConfig) -> tuple[int, int, int]:
    """Return the forward FLOPs of a layer for each token as key, as query, and for each pair."""
    D = model.dim
    if model.encoder == "dlrm":
        return 0, 0, 0
    if model.encoder == "hstu":
        c = model.hstu
        uq = c.num_heads * (c.v_dim + c.qk_dim)
        out = c.num_heads * c.v_dim * (3 if c.concat_ua else 1)
        return 2 * D * uq, 2 * D * uq + 2 * out * D, 2 * uq
    t = model.transformer
    if model.encoder == "sasrec":
        ffn = 2 * 2 * D * (t.ffn_dim or D)
    else:
        ffn = 3 * 2 * D * (t.ffn_dim or transformer_ffn_dim(D))
    return 4 * D * D, 4 * D * D + ffn, 4 * D


def transformer_ffn_dim(dim: int) -> int:
    """Return the default hidden width of SwiGLU: 8/3 of `dim`, up to a multiple of 8."""
    return -(-8 * dim // 3 // 8) * 8


def peak_flops(device: torch.device) -> float | None:
    """Return the peak of a known device in FLOP/s, else None."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)
