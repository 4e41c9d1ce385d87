"""Losses as (sum, weight) pairs, so that a caller can divide by the weight of all ranks.

Letters: P ranking positions, R retrieval positions, M negatives, D width of an item row, E table
rows.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import kernels.sampled_softmax
from kernels.dispatch import Impl
from pipelines.config import TaskConfig

MAX_KERNEL_DIM = 512
"""Widest item row that the kernel of sampled softmax holds; wider ones take its reference."""


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

    A negative with the id of the positive (an accidental hit) does not count, as often as it was
    drawn. Any other item counts as often as it was drawn: the negatives are a sample with
    replacement. A row whose group has no other negative has loss 0. With q uniform the correction
    cancels, so it may be left out.

    The arithmetic is kernels/sampled_softmax: (R, M) is never stored on a GPU, (R, M, D) nowhere.

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
        ValueError: if one of the two groups is given without the other, or (on a CPU, where
            looking does not wait for a device) they are not ascending numbers below num_groups.

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
        loss_R = kernels.sampled_softmax.sampled_softmax(
            user_RD.to(dtype),
            positive_RD.to(dtype),
            negative_MD.to(dtype),
            _group_offsets("rows", group_R, len(user_RD), num_groups, user_RD.device),
            _group_offsets("negatives", group_M, len(negative_MD), num_groups, user_RD.device),
            positive_id_R=positive_ids_R,
            negative_id_N=negative_ids_M,
            temperature=temperature,
            positive_log_q_R=positive_log_q_R,
            negative_log_q_N=negative_log_q_M,
            impl=Impl.AUTO if user_RD.shape[1] <= MAX_KERNEL_DIM else Impl.REFERENCE,
        )
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
    chunk_rows: int = 0,
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
        chunk_rows: rows whose logits are held at a time; 0: 1024, on a GPU as many as 2^26 logits
            (256 MB) are if those are more, since each chunk costs some twenty launches.

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
    if not chunk_rows:
        chunk_rows = max(1024, (1 << 26) // len(item_ED)) if user_RD.is_cuda else 1024
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


def position_softmax(
    user_RD: Tensor,
    item_ED: Tensor,
    positive_rows_R: Tensor,
    *,
    num_negatives: int,
    weights_R: Tensor | None = None,
    temperature: float,
    generator: torch.Generator | None = None,
) -> LossSum:
    """Return the softmax loss of each positive against negatives that it has for itself.

    `sampled_softmax` with a group for each row, its M negatives drawn here: uniform on rows
    1 .. E - 1, with replacement; those that are the positive do not count. Takes R min(E, M D)
    floats: the scores of every item, of which those of the draws are picked, or the drawn rows.

    Args:
        user_RD: user vectors.
        item_ED: every item vector, in the order of the table; row 0 is not an item.
        positive_rows_R: int64, 1 .. E - 1.
        num_negatives: M.
        weights_R: weight of each row; None means 1.
        temperature: divides the dot products.
        generator: of the draws, on the device of the vectors; None means the default one.

    Source: generative-recommenders, research/modeling/sequential/losses/sampled_softmax.py.
    """
    dtype = torch.promote_types(user_RD.dtype, torch.float32)
    weight_R = user_RD.new_ones(len(user_RD)) if weights_R is None else weights_R
    weight_R = weight_R.to(dtype)
    (R, D), E, M = user_RD.shape, len(item_ED), num_negatives
    drawn_RM = torch.randint(1, E, (R, M), generator=generator, device=user_RD.device)
    row_RC = torch.cat([positive_rows_R[:, None], drawn_RM], 1)  # C = 1 + M
    is_hit_RC = row_RC == positive_rows_R[:, None]
    is_hit_RC[:, 0] = False
    with torch.autocast(user_RD.device.type, enabled=False):
        user_RD, item_ED = user_RD.to(dtype) / temperature, item_ED.to(dtype)
        if M * D < E:
            logit_RC = (item_ED[row_RC] @ user_RD[:, :, None])[:, :, 0]
        else:
            logit_RC = (user_RD @ item_ED.T).gather(1, row_RC)
        logit_RC = logit_RC.masked_fill(is_hit_RC, -torch.inf)
        loss_R = logit_RC.logsumexp(1) - logit_RC[:, 0]
        return LossSum((weight_R * loss_R).sum(), weight_R.sum())


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

    @torch.no_grad()
    def forget(self, rows: Tensor) -> None:
        """Take back what was counted of rows, alike on all ranks; repeats are allowed."""
        rows = torch.unique(rows)
        self.total -= self.count_E[rows].sum()
        self.count_E[rows] = 0


def _full_chunk(user_RD: Tensor, item_ED: Tensor, rows_R: Tensor, weight_R: Tensor) -> Tensor:
    logit_RE = user_RD @ item_ED[1:].T
    return (weight_R * functional.cross_entropy(logit_RE, rows_R - 1, reduction="none")).sum()


def _group_offsets(
    of: str, group: Tensor | None, size: int, num_groups: int, device: torch.device
) -> Tensor:
    """Return (num_groups + 1,) int64: where each group starts; groups are checked on a CPU only.

    Raises:
        ValueError: if groups are not ascending numbers below num_groups.
    """
    if group is None:
        return torch.arange(2, device=device) * size
    if (
        group.numel()
        and not group.is_cuda
        and bool((group.diff() < 0).any() | (group[0] < 0) | (group[-1] >= num_groups))
    ):
        raise ValueError(
            f"the groups of the {of} must be ascending numbers 0 .. num_groups - 1 = "
            f"{num_groups - 1}, got {group[:8].tolist()} ... {group[-1:].tolist()}"
        )
    return torch.searchsorted(group, torch.arange(num_groups + 1, device=device))


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
