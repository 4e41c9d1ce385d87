"""Sampled softmax in eager PyTorch, tile by tile; computes in float32, or in float64.

Letters: R rows, N negatives, D width; G tiles, T rows of a tile, M negatives of a tile.
"""

import torch
from torch import Tensor
from torch.nn import functional

MASKED_LOGIT = -5e4
"""Logit of a negative that must not count; its probability is exactly 0 in float32."""


def sampled_softmax(
    query_RD: Tensor,
    positive_RD: Tensor,
    negative_ND: Tensor,
    query_offsets: Tensor,
    negative_offsets: Tensor,
    positive_id_R: Tensor,
    negative_id_N: Tensor,
    positive_log_q_R: Tensor | None,
    negative_log_q_N: Tensor | None,
    temperature: float,
) -> Tensor:
    """Return (R,) losses, in float32 (float64 for float64).

    Rows are cut into tiles of one group and about the mean rows a group, so that logits are at most
    about twice sum over groups of R_g * max N_g, for few large and for many small groups.
    """
    compute = torch.promote_types(query_RD.dtype, torch.float32)
    query, positive, negative = (x.to(compute) for x in (query_RD, positive_RD, negative_ND))
    query = query / temperature
    positive_R = (query * positive).sum(1)
    if positive_log_q_R is not None:
        positive_R = positive_R - positive_log_q_R
    row_GT, negative_GM = _tiles(query_offsets, negative_offsets, len(query))
    if row_GT.numel() == 0 or negative_GM.numel() == 0:
        return positive_R * 0.0 + negative[:0].sum()
    # Absent rows and negatives (-1) read row 0 and are masked.
    is_row_GT, is_negative_GM = row_GT >= 0, negative_GM >= 0
    row_GT, negative_GM = row_GT.clamp_min(0), negative_GM.clamp_min(0)
    # embedding, not indexing: its backward is parallel on the CPU and deterministic on CUDA.
    query_GTD = functional.embedding(row_GT, query)
    negative_GMD = functional.embedding(negative_GM, negative)
    logit_GTM = torch.bmm(query_GTD, negative_GMD.transpose(1, 2))
    if negative_log_q_N is not None:
        logit_GTM = logit_GTM - negative_log_q_N.to(compute)[negative_GM][:, None, :]
    hit_GTM = positive_id_R[row_GT][:, :, None] == negative_id_N[negative_GM][:, None, :]
    logit_GTM = logit_GTM.masked_fill(hit_GTM | ~is_negative_GM[:, None, :], MASKED_LOGIT)
    negatives_R = logit_GTM.logsumexp(2)[is_row_GT]
    # The default threshold of 20 would be wrong by 2e-9, which float64 sees.
    return functional.softplus(negatives_R - positive_R, threshold=80)


def _tiles(query_offsets: Tensor, negative_offsets: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """Return the rows (G, T) and the negatives (G, M) of each tile, -1 where there is none."""
    device, rows = query_offsets.device, query_offsets.diff()
    # The mean over groups that have rows: then there are at most twice as many tiles as groups.
    height = max(1, -(-num_rows // max(1, int((rows > 0).sum()))))
    tiles = (rows + height - 1) // height
    owner_G = torch.repeat_interleave(torch.arange(len(rows), device=device), tiles)
    first_tile = tiles.cumsum(0) - tiles
    tile_G = torch.arange(len(owner_G), device=device) - first_tile[owner_G]
    row_GT = (query_offsets[owner_G] + tile_G * height)[:, None]
    row_GT = row_GT + torch.arange(height, device=device)
    width = int(negative_offsets.diff()[owner_G].max()) if len(owner_G) else 0
    negative_GM = negative_offsets[owner_G][:, None] + torch.arange(width, device=device)
    return (
        row_GT.masked_fill(row_GT >= query_offsets[owner_G + 1][:, None], -1),
        negative_GM.masked_fill(negative_GM >= negative_offsets[owner_G + 1][:, None], -1),
    )
