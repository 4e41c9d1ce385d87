"""HSTU attention in fp64 from the equations: one sequence and one pair at a time, no padding."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kernels.hstu_attention import AttentionMask, RelativeBias, hstu_attention


def sees(row: int, col: int, length: int, candidates: int, mask: AttentionMask) -> bool:
    history = length - candidates
    if row >= history:
        return col == row or col < history
    if col >= history:
        return False
    if row < mask.num_context and mask.context == "prefix":
        return col < mask.num_context
    if row < mask.num_context and mask.context == "prefix_sees_all":
        return True
    if col > row:
        return False
    if mask.local_window is None or row - col <= mask.local_window:
        return True
    is_global_row = row >= history - mask.global_rows
    is_global_column = col < mask.num_context + mask.global_columns
    return is_global_row or is_global_column


def bias_index(row: int, col: int, history: int, table_size: int) -> int:
    reach = (table_size - 1) // 2
    distance = min(row, history) - min(col, history)
    return max(-reach, min(reach, distance)) + reach


def time_bucket(query_time: int, key_time: int, last: int) -> int:
    return min(last, math.floor(math.log(max(1, abs(query_time - key_time))) / 0.301))


def attention(
    q, k, v, lengths, q_lengths, candidates, *, alpha, scaling, activation, mask, bias, scores=None
):
    """All tensors float64, lengths lists of int; differentiable.

    Each row's scores and the entries of the tables that they use are appended to `scores`.
    """
    out, first_key, first_query = [], 0, 0
    for length, q_length, num_candidates in zip(lengths, q_lengths, candidates, strict=True):
        keys = slice(first_key, first_key + length)
        for r in range(q_length):
            row = length - q_length + r
            cols = [c for c in range(length) if sees(row, c, length, num_candidates, mask)]
            score = alpha * torch.einsum("hk,chk->hc", q[first_query + r], k[keys][cols])
            if bias is not None:
                history, table = length - num_candidates, bias.position_table
                index = [bias_index(row, c, history, table.numel()) for c in cols]
                score = score + table[index]
                entries = {"position_table": index}
                if bias.time_table is not None:
                    asked = int(bias.query_time[first_query + r])
                    when = bias.key_time[keys].tolist()
                    last = bias.time_table.numel() - 1
                    entries["time_table"] = [time_bucket(asked, when[c], last) for c in cols]
                    score = score + bias.time_table[entries["time_table"]]
                if scores is not None:
                    scores.append((score, entries))
            if activation == "silu":
                weight = score / (1 + torch.exp(-score)) / scaling
            else:
                weight = torch.exp(score) / torch.exp(score).sum(dim=1, keepdim=True)
            out.append(torch.einsum("hc,chv->hv", weight, v[keys][cols]))
        first_key += length
        first_query += q_length
    return torch.stack(out) if out else q.new_zeros(0, q.shape[1], v.shape[2]) * q.sum()


@dataclass
class Case:
    """Random inputs in fp64 for the given structure; to be rounded to the dtype under test."""

    lengths: list[int]
    q_lengths: list[int] | None = None
    candidates: list[int] | None = None
    heads: int = 2
    qk_dim: int = 4
    v_dim: int = 3
    mask: AttentionMask = field(default_factory=AttentionMask)
    bias: str = "none"
    activation: str = "silu"
    position_reach: int = 5
    time_buckets: int = 20
    seed: int = 0

    def __post_init__(self):
        draw = torch.Generator().manual_seed(self.seed)

        def normal(*shape):
            return torch.randn(*shape, generator=draw, dtype=torch.float64)

        if self.q_lengths is None:
            self.q_lengths = list(self.lengths)
        if self.candidates is None:
            self.candidates = [0] * len(self.lengths)
        L, R = sum(self.lengths), sum(self.q_lengths)
        self.tensors = {
            "q": normal(R, self.heads, self.qk_dim),
            "k": normal(L, self.heads, self.qk_dim),
            "v": normal(L, self.heads, self.v_dim),
        }
        if self.bias != "none":
            self.tensors["position_table"] = normal(2 * self.position_reach + 1)
        if self.bias == "position_time":
            self.tensors["time_table"] = normal(self.time_buckets + 1)
        self.grad = normal(R, self.heads, self.v_dim)
        # Differences of every magnitude, zero included; queries stand beside thresholds of buckets.
        magnitude = torch.rand(L, generator=draw, dtype=torch.float64) * 16
        self.key_time = magnitude.exp().long() * torch.randint(0, 2, (L,), generator=draw)
        self.query_time = torch.randint(0, 10**6, (R,), generator=draw)
        self.alpha = self.qk_dim**-0.5
        self.scaling = 7.0 if self.activation == "silu" else None

    def relative_bias(self, tensors, device="cpu"):
        if self.bias == "none":
            return None
        if self.bias == "position":
            return RelativeBias(tensors["position_table"])
        return RelativeBias(
            tensors["position_table"],
            tensors["time_table"],
            self.query_time.to(device),
            self.key_time.to(device),
        )

    def oracle(self, dtype=torch.float64):
        """Results and gradients in fp64 for inputs rounded to dtype."""
        tensors = self.inputs(torch.float64, rounded_to=dtype)
        out = self._attention(tensors)
        return self._with_gradients(out, tensors, self.grad.to(dtype).double())

    def table_scales(self):
        """For each table, the largest sum of magnitudes that the gradient of an entry adds up."""
        tensors, scores = self.inputs(torch.float64, rounded_to=torch.float64), []
        out = self._attention(tensors, scores)
        grads = torch.autograd.grad(out, [score for score, _ in scores], self.grad)
        sums = {
            name: torch.zeros_like(tensors[name])
            for name in ("position_table", "time_table")
            if name in tensors
        }
        for grad, (_, entries) in zip(grads, scores, strict=True):
            for name, index in entries.items():
                sums[name].index_add_(0, torch.tensor(index), grad.abs().sum(0))
        return {name: x.max().item() for name, x in sums.items()}

    def _attention(self, tensors, scores=None):
        return attention(
            tensors["q"],
            tensors["k"],
            tensors["v"],
            self.lengths,
            self.q_lengths,
            self.candidates,
            alpha=self.alpha,
            scaling=self.scaling,
            activation=self.activation,
            mask=self.mask,
            bias=self.relative_bias(tensors),
            scores=scores,
        )

    def run(self, impl, dtype, device="cpu", rounded_to=None, **options):
        """Results and gradients of the operator."""
        tensors = self.inputs(dtype, rounded_to=rounded_to or dtype, device=device)
        out = hstu_attention(
            tensors["q"],
            tensors["k"],
            tensors["v"],
            offsets_of(self.lengths, device),
            max_len=max(self.lengths, default=0),
            alpha=self.alpha,
            scaling_length=self.scaling,
            activation=self.activation,
            mask=self.mask,
            num_candidates=torch.tensor(self.candidates, dtype=torch.int64, device=device),
            q_offsets=offsets_of(self.q_lengths, device),
            max_q_len=max(self.q_lengths, default=0),
            bias=self.relative_bias(tensors, device),
            impl=impl,
            **options,
        )
        grad = self.grad.to(rounded_to or dtype).to(device, dtype)
        return self._with_gradients(out, tensors, grad)

    def inputs(self, dtype, *, rounded_to, device="cpu"):
        return {
            name: x.to(rounded_to).to(device, dtype).requires_grad_()
            for name, x in self.tensors.items()
        }

    def _with_gradients(self, out: Tensor, tensors: dict[str, Tensor], grad: Tensor):
        grads = torch.autograd.grad(
            out, list(tensors.values()), grad, allow_unused=True, materialize_grads=True
        )
        return {"out": out.detach(), **dict(zip(tensors, grads, strict=True))}


def offsets_of(lengths: list[int], device="cpu") -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0).to(device)
