"""Losses as (sum, weight) pairs, so that a caller can divide by the weight of all ranks.

Letters: P ranking positions, R retrieval positions, M negatives, D width of an item row, E table
rows; in this file also G tiles, T rows of a tile, N negatives of a tile.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from pipelines.config import TaskConfig

MASKED_LOGIT = -5e4
"""Logit of a negative that must not count; its probability is exactly 0 in fp32."""


class LossSum(NamedTuple):
    """A loss before its mean is taken."""

    total: Tensor
    """() sum of weight * loss, differentiable."""
    weight: Tensor
    """() sum of the weights."""


def multitask_loss(
    outputs: Mapping[str, Tensor],
    labels: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    tasks: Mapping[str, TaskConfig],
) -> dict[str, LossSum]:
    """Return the loss of each task, summed over positions.

        binary:      log(1 + exp(z)) - y z    (cross entropy of the logit z)
        regression:  (z - y)^2

    Args:
        outputs: task -> (P,) as gr.heads.RankingHead returns them.
        labels: task -> (P,); a regression's are transformed as its task says.
        weights: task -> (P,); 0 masks.
        tasks: name -> task.
    """
    sums = {}
    for name, task in tasks.items():
        dtype = torch.promote_types(outputs[name].dtype, torch.float32)
        output, label, weight = (x[name].to(dtype) for x in (outputs, labels, weights))
        if task.type == "binary":
            loss = functional.binary_cross_entropy_with_logits(output, label, reduction="none")
        else:
            loss = (output - label).square()
        sums[name] = LossSum((weight * loss).sum(), weight.sum())
    return sums


def sampled_softmax(
    user_RD: Tensor,
    positive_RD: Tensor,
    positive_ids_R: Tensor,
    negative_MD: Tensor,
    negative_ids_M: Tensor,
    group_R: Tensor | None = None,
    group_M: Tensor | None = None,
    *,
    num_groups: int = 1,
    weights_R: Tensor | None = None,
    temperature: float,
    positive_log_q_R: Tensor | None = None,
    negative_log_q_M: Tensor | None = None,
) -> LossSum:
    """Return the softmax loss of each positive against the negatives of its group.

        s_rx = u_r . x / temperature - log q_x
        loss_r = -log(exp(s_r+) / (exp(s_r+) + sum over m of group_m = group_r of exp(s_rm)))

    A negative with the id of the positive (an accidental hit) has logit -5e4, as often as it was
    drawn. Any other item counts as often as it was drawn: the negatives are a sample with
    replacement. A row whose group has no other negative has loss 0. With q uniform the correction
    cancels, so it may be left out.

    Memory: rows are cut into tiles of one group and about the mean rows a group, so that logits are
    at most about twice sum over groups of R_g * max M_g, and never (R, M, D), for few large and for
    many small groups.

    Args:
        user_RD: user vectors.
        positive_RD: item vectors of the positives.
        positive_ids_R: int64 ids or rows.
        negative_MD: item vectors of the negatives.
        negative_ids_M: int64, numbered as `positive_ids_R`.
        group_R: int64 ascending, 0 .. num_groups - 1: whose negatives a row sees. None with group_M
            None: every row sees every negative.
        group_M: int64 ascending: the group of each negative.
        num_groups: upper bound of the groups; groups may be empty.
        weights_R: weight of each row; None means 1.
        temperature: divides the dot products.
        positive_log_q_R: log of the sampling probability of each positive; None means 0.
        negative_log_q_M: log of the sampling probability of each negative; None means 0.

    Raises:
        ValueError: if one of the two groups is given without the other.

    Source: arXiv 2402.17152; generative-recommenders db1bf8f, SampledSoftmaxLoss (masking after the
    temperature). There each position draws its own negatives; here a group shares them. The
    correction is that of Yi et al., "Sampling-bias-corrected neural modeling", RecSys 2019.
    """
    if (group_R is None) != (group_M is None):
        raise ValueError("group_R and group_M go together: give both, or neither for one group")
    dtype = torch.promote_types(user_RD.dtype, torch.float32)
    weight_R = user_RD.new_ones(len(user_RD)) if weights_R is None else weights_R
    weight_R = weight_R.to(dtype)
    # bf16 products would be wrong by up to 0.1 at temperature 0.05 (logits up to 20).
    with torch.autocast(user_RD.device.type, enabled=False):
        user_RD = user_RD.to(dtype) / temperature
        positive_R = (user_RD * positive_RD.to(dtype)).sum(1)
        if positive_log_q_R is not None:
            positive_R = positive_R - positive_log_q_R
        negative_MD = negative_MD.to(dtype)
        if group_R is None or group_M is None:
            row_GT, negative_GN = _one_tile(len(user_RD), len(negative_MD), user_RD.device)
        else:
            row_GT, negative_GN = _tiles(group_R, group_M, num_groups)
        if row_GT.numel() == 0 or negative_GN.numel() == 0:
            return LossSum((positive_R * 0.0).sum(), weight_R.sum())
        # Absent rows and negatives (-1) read row 0 and are masked.
        is_row_GT, is_negative_GN = row_GT >= 0, negative_GN >= 0
        row_GT, negative_GN = row_GT.clamp_min(0), negative_GN.clamp_min(0)
        # embedding, not indexing: its backward is parallel on the CPU and deterministic on CUDA.
        user_GTD = functional.embedding(row_GT, user_RD)
        negative_GND = functional.embedding(negative_GN, negative_MD)
        logit_GTN = torch.bmm(user_GTD, negative_GND.transpose(1, 2))
        if negative_log_q_M is not None:
            logit_GTN = logit_GTN - negative_log_q_M.to(dtype)[negative_GN][:, None, :]
        hit_GTN = positive_ids_R[row_GT][:, :, None] == negative_ids_M[negative_GN][:, None, :]
        logit_GTN = logit_GTN.masked_fill(hit_GTN | ~is_negative_GN[:, None, :], MASKED_LOGIT)
        negatives_R = logit_GTN.logsumexp(2)[is_row_GT]
        # The default threshold of 20 would be wrong by 2e-9, which fp64 sees.
        loss_R = functional.softplus(negatives_R - positive_R, threshold=80)
    return LossSum((weight_R * loss_R).sum(), weight_R.sum())


def in_batch_softmax(
    user_RD: Tensor,
    positive_RD: Tensor,
    positive_ids_R: Tensor,
    group_R: Tensor | None = None,
    *,
    num_groups: int = 1,
    weights_R: Tensor | None = None,
    temperature: float,
    log_q_R: Tensor | None = None,
) -> LossSum:
    """Return `sampled_softmax` with the positives of the group as negatives.

    A row's own item is masked wherever it stands. Another item counts as often as it is a positive
    of the group, also of the same user; rows of weight 0 count as negatives too. Popular items are
    negatives more often, which `log_q_R` corrects for positives and negatives alike.

    Args:
        user_RD: user vectors.
        positive_RD: item vectors of the positives.
        positive_ids_R: int64 ids or rows.
        group_R: int64 ascending, 0 .. num_groups - 1; None means one group.
        num_groups: upper bound of the groups.
        weights_R: weight of each row; None means 1.
        temperature: divides the dot products.
        log_q_R: log of each positive's frequency, see `ItemFrequency`; None means no correction.

    Source: Yi et al., "Sampling-bias-corrected neural modeling", RecSys 2019, equation 3.
    """
    return sampled_softmax(
        user_RD,
        positive_RD,
        positive_ids_R,
        positive_RD,
        positive_ids_R,
        group_R,
        group_R,
        num_groups=num_groups,
        weights_R=weights_R,
        temperature=temperature,
        positive_log_q_R=log_q_R,
        negative_log_q_M=log_q_R,
    )


def full_softmax(
    user_RD: Tensor,
    item_ED: Tensor,
    positive_rows_R: Tensor,
    *,
    weights_R: Tensor | None = None,
    temperature: float,
    chunk_rows: int = 1024,
) -> LossSum:
    """Return the softmax loss of each positive against every item of the table.

        loss_r = -log softmax over e = 1 .. E - 1 of (u_r . x_e / temperature), at the positive

    Row 0, the unknown item, is not a class. Beyond `chunk_rows` rows the logits are made chunk by
    chunk, and again in the backward pass, so that (chunk_rows, E) of them are held and not (R, E).

    Args:
        user_RD: user vectors.
        item_ED: every item vector, in the order of the table.
        positive_rows_R: int64, 1 .. E - 1.
        weights_R: weight of each row; None means 1.
        temperature: divides the dot products.
        chunk_rows: rows whose logits are held at a time.

    Raises:
        ValueError: if a positive is outside 1 .. E - 1.
    """
    outside = (positive_rows_R < 1) | (positive_rows_R >= len(item_ED))
    if outside.any():
        raise ValueError(
            f"targets must be rows 1 .. {len(item_ED) - 1} of the item table (row 0 stands for the "
            f"unknown item), but {int(outside.sum())} of {len(outside)} are not, the first is "
            f"{int(positive_rows_R[outside][0])}: leave them out of the retrieval positions"
        )
    dtype = torch.promote_types(user_RD.dtype, torch.float32)
    weight_R = user_RD.new_ones(len(user_RD)) if weights_R is None else weights_R
    weight_R = weight_R.to(dtype)
    with torch.autocast(user_RD.device.type, enabled=False):
        user_RD, item_ED = user_RD.to(dtype) / temperature, item_ED.to(dtype)
        total = user_RD.new_zeros(())
        # One chunk at least: no rows is a loss of 0 that can be differentiated.
        for start in range(0, max(1, len(user_RD)), chunk_rows):
            rows = slice(start, start + chunk_rows)
            part = (user_RD[rows], item_ED, positive_rows_R[rows], weight_R[rows])
            if len(user_RD) <= chunk_rows:
                total = total + _full_chunk(*part)
            else:
                total = total + checkpoint(
                    _full_chunk, *part, use_reentrant=False, preserve_rng_state=False
                )
    return LossSum(total, weight_R.sum())


class ItemFrequency(nn.Module):
    """How often each item was a target, as log probabilities for `log_q_R`.

        q_e = (count_e + 1) / (sum of counts + E)

    Call `log_q` before `update`, so that a batch is corrected by what came before it. The counts
    are a buffer, hence part of the state. Every rank adds the rows of all ranks: the correction
    does not depend on their number.

    Args:
        num_rows: E.
    """

    def __init__(self, num_rows: int) -> None:
        super().__init__()
        self.count_E: Tensor
        self.register_buffer("count_E", torch.zeros(num_rows, dtype=torch.int64))
        self.total: Tensor
        self.register_buffer("total", torch.zeros((), dtype=torch.int64))

    def log_q(self, rows: Tensor) -> Tensor:
        """Return the log probability, float32, of each row."""
        total = (self.total + len(self.count_E)).double()
        return ((self.count_E[rows] + 1).double() / total).log().float()

    @torch.no_grad()
    def update(self, rows: Tensor) -> None:
        """Count `rows`, (R,) int64, of this and all other ranks."""
        rows = _rows_of_all_ranks(rows)
        self.count_E.index_add_(0, rows, torch.ones_like(rows))
        self.total += len(rows)


def _full_chunk(user_RD: Tensor, item_ED: Tensor, rows_R: Tensor, weight_R: Tensor) -> Tensor:
    logit_RE = user_RD @ item_ED[1:].T
    return (weight_R * functional.cross_entropy(logit_RE, rows_R - 1, reduction="none")).sum()


def _one_tile(num_rows: int, num_negatives: int, device: torch.device) -> tuple[Tensor, Tensor]:
    return (
        torch.arange(num_rows, device=device)[None],
        torch.arange(num_negatives, device=device)[None],
    )


def _tiles(group_R: Tensor, group_M: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """Return the rows (G, T) and the negatives (G, N) of each tile, -1 where there is none."""
    for group, of in ((group_R, "rows"), (group_M, "negatives")):
        if group.numel() and bool(
            (group.diff() < 0).any() | (group[0] < 0) | (group[-1] >= num_groups)
        ):
            raise ValueError(
                f"the groups of the {of} must be ascending numbers 0 .. num_groups - 1 = "
                f"{num_groups - 1}, got {group[:8].tolist()} ... {group[-1:].tolist()}"
            )
    device = group_R.device
    bounds = torch.arange(num_groups + 1, device=device)
    start_R = torch.searchsorted(group_R, bounds)
    start_M = torch.searchsorted(group_M, bounds)
    rows = start_R.diff()
    # The mean over groups that have rows: then there are at most twice as many tiles as groups.
    height = max(1, -(-len(group_R) // max(1, int((rows > 0).sum()))))
    tiles = (rows + height - 1) // height
    owner_G = torch.repeat_interleave(bounds[:-1], tiles)
    first_tile = tiles.cumsum(0) - tiles
    tile_G = torch.arange(len(owner_G), device=device) - first_tile[owner_G]
    row_GT = (start_R[owner_G] + tile_G * height)[:, None] + torch.arange(height, device=device)
    width = int(start_M.diff()[owner_G].max()) if len(owner_G) else 0
    negative_GN = start_M[owner_G][:, None] + torch.arange(width, device=device)
    return (
        row_GT.masked_fill(row_GT >= start_R[owner_G + 1][:, None], -1),
        negative_GN.masked_fill(negative_GN >= start_M[owner_G + 1][:, None], -1),
    )


def _rows_of_all_ranks(rows: Tensor) -> Tensor:
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return rows
    sizes = rows.new_empty(dist.get_world_size())
    dist.all_gather_into_tensor(sizes, rows.new_tensor([len(rows)]))
    longest = int(sizes.max())
    padded = rows.new_zeros(longest)
    padded[: len(rows)] = rows
    gathered = rows.new_empty(len(sizes) * longest)
    dist.all_gather_into_tensor(gathered, padded)
    parts = gathered.view(len(sizes), longest)
    return torch.cat([part[:size] for part, size in zip(parts, sizes.tolist(), strict=True)])
