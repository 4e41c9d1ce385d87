"""HSTU, one sequence at a time, row by row and column by column, from the papers' equations.

Nothing of the implementation is used but the names of its parameters. In float64 only; gradients
come from autograd through the loops.
"""

import math
from dataclasses import dataclass, field, replace

import torch

from gr.sequence import Kept, SequenceInfo


@dataclass
class Sequence:
    """One sequence of tokens, without their contents."""

    length: int
    tail: int = 0
    num_candidates: int = 0
    session_start: int = 0
    timestamps: list[int] = field(default_factory=list)
    query_times: list[int] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    """Of a sequence that was truncated: where its tokens stood before."""


def make_sequences(lengths, tails, candidates=None, *, seed=0, max_gap=200_000):
    """Return sequences with rising times; a query has the time of the next token, as in a batch."""
    generator = torch.Generator().manual_seed(seed)
    sequences = []
    for b, (length, tail) in enumerate(zip(lengths, tails, strict=True)):
        count = candidates[b] if candidates is not None else 0
        # Gaps from seconds to days, so that every size of bucket is met.
        exponent = torch.rand(length + 1, generator=generator) * math.log(max_gap)
        times = 1_650_000_000 + exponent.exp().long().cumsum(0)
        start = max(length - max(tail, count), 0)
        if count:
            times[length - count :] = times[length - count]
        sequences.append(
            Sequence(length, tail, count, start, times[:length].tolist(), times[1:].tolist())
        )
    return sequences


def make_info(sequences, num_context=0, extra_len=0, keep_history=0):
    def offsets(counts):
        return torch.tensor([0, *counts], dtype=torch.int64).cumsum(0)

    def column(values):
        return torch.tensor(values, dtype=torch.int64)

    return SequenceInfo(
        offsets=offsets([s.length for s in sequences]),
        tail_offsets=offsets([s.tail for s in sequences]),
        max_len=max((s.length for s in sequences), default=0) + extra_len,
        max_tail_len=max((s.tail for s in sequences), default=0) + extra_len,
        timestamp=column([t for s in sequences for t in s.timestamps]),
        query_time=column([t for s in sequences for t in s.query_times]),
        session_start=column([s.session_start for s in sequences]),
        num_context=num_context,
        num_candidates=column([s.num_candidates for s in sequences]),
        num_rows=sum(s.tail for s in sequences),
        kept=make_kept(sequences, num_context, keep_history),
    )


def make_kept(sequences, num_context, keep_history):
    if not keep_history:
        return None
    lengths = [truncated(s, num_context, keep_history).length for s in sequences]
    return Kept(keep_history, sum(lengths), max(lengths, default=0))


def truncated(sequence, num_context, keep_history):
    """Return the sequence with the newest `keep_history` tokens of its history alone."""
    places = [
        i
        for i in range(sequence.length)
        if i < num_context or i >= sequence.session_start - keep_history
    ]
    gone = sequence.length - len(places)
    return replace(
        sequence,
        length=len(places),
        session_start=sequence.session_start - gone,
        timestamps=[sequence.timestamps[i] for i in places],
        query_times=[sequence.query_times[i] for i in places],
        places=places,
    )


def on_device(info, device):
    """Return info with its tensors on a device."""
    moved = {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in vars(info).items()
    }
    return replace(info, **moved)


def silu(x):
    return x / (1 + torch.exp(-x))


def normalize(x, weight=None, bias=None, eps=1e-6):
    mean = x.sum() / x.numel()
    variance = ((x - mean) ** 2).sum() / x.numel()
    y = (x - mean) / (variance + eps) ** 0.5
    return y if weight is None else y * weight + bias


def sees(row, col, sequence, num_context, semi_local=None):
    history = sequence.length - sequence.num_candidates
    if row >= history:
        return col < history or col == row
    if row < num_context:
        return col < num_context
    if semi_local is None or not semi_local.window or row >= history - semi_local.global_rows:
        return col <= row
    is_global = col < num_context + semi_local.global_columns
    return row - semi_local.window <= col <= row or (is_global and col <= row)


def bias_of_pair(row, col, sequence, position_table, time_table, config):
    history = sequence.length - sequence.num_candidates
    distance = min(row, history) - min(col, history)
    reach = config.bias_max_len - 1
    bias = position_table[max(-reach, min(reach, distance)) + reach]
    if time_table is not None:
        seconds = abs(sequence.query_times[row] - sequence.timestamps[col])
        bucket = math.floor(math.log(max(1, seconds)) / 0.301)
        bias = bias + time_table[max(0, min(config.bias_time_buckets, bucket))]
    return bias


def turned(head, position, seconds, number, config):
    """Return the K numbers of head `number` turned by the angles of TO-RoPE, pair by pair."""
    K, rotary = config.qk_dim, config.rotary
    P = K // 2
    first, last = list(head[:P]), list(head[P:])
    for p in range(P):
        by_position = position * 10000 ** (-2 * p / K)
        shortest, longest = rotary.periods
        period = shortest * (longest / shortest) ** (p / (P - 1) if P > 1 else 0)
        by_time = 2 * math.pi * (seconds % period) / period
        angle = {
            "position": by_position,
            "time": by_time,
            "sum": by_position + by_time,
            "split_dims": by_time if p % 2 else by_position,
            "split_heads": by_time if number % 2 else by_position,
        }[rotary.angles]
        a, b = first[p], last[p]
        first[p] = a * math.cos(angle) - b * math.sin(angle)
        last[p] = a * math.sin(angle) + b * math.cos(angle)
    return torch.stack(first + last)


def layer(x, sequence, num_context, config, parameters, first_time=None):
    """Return the rows of Y, a list of (D,), for the rows x of one sequence."""
    places = [*(sequence.places or range(sequence.length)), None]
    first_time = sequence.timestamps[0] if first_time is None else first_time
    H, K, V = config.num_heads, config.qk_dim, config.v_dim
    weight = parameters["uvqk_weight"]
    u, v, q, k = [], [], [], []
    for token in x:
        normed = normalize(
            token, parameters.get("input_norm.weight"), parameters.get("input_norm.bias")
        )
        p = (normed[:, None] * weight).sum(0)
        if config.uvqk_bias:
            p = p + parameters["uvqk_bias"]
        a, b, c = H * V, 2 * H * V, 2 * H * V + H * K
        active = silu(p) if config.uvqk_activation == "all" else p
        u.append(silu(p[:a]))
        v.append(active[a:b])
        q.append(active[b:c])
        k.append(active[c:])

    if config.rotary.angles != "none":
        history = sequence.length - sequence.num_candidates
        for i in range(sequence.length):
            for rows, times in ((q, sequence.query_times), (k, sequence.timestamps)):
                heads = rows[i].split(K)
                place = places[min(i, history)]
                passed = times[i] - first_time
                turns = [turned(heads[h], place, passed, h, config) for h in range(H)]
                rows[i] = torch.cat(turns)

    alpha = config.alpha if config.alpha > 0 else 1 / math.sqrt(K)
    rows = []
    for i in range(sequence.length):
        keys = [
            j
            for j in range(sequence.length)
            if sees(i, j, sequence, num_context, config.semi_local)
        ]
        heads = []
        for h in range(H):
            scores = {}
            for j in keys:
                score = alpha * (q[i][h * K : (h + 1) * K] * k[j][h * K : (h + 1) * K]).sum()
                if config.bias != "none":
                    score = score + bias_of_pair(
                        i,
                        j,
                        sequence,
                        parameters["position_bias"],
                        parameters.get("time_bias"),
                        config,
                    )
                scores[j] = score
            if config.attention == "silu":
                weights = {j: silu(s) / config.scaling_length for j, s in scores.items()}
            else:
                total = sum(torch.exp(s) for s in scores.values())
                weights = {j: torch.exp(s) / total for j, s in scores.items()}
            heads.append(sum(w * v[j][h * V : (h + 1) * V] for j, w in weights.items()))
        attended = torch.cat(heads)
        if config.norm == "layer":
            normed = normalize(attended)
        else:
            normed = torch.cat([normalize(head) for head in heads])
        if config.norm_affine:
            normed = normed * parameters["attention_norm.weight"]
            normed = normed + parameters["attention_norm.bias"]
        gated = normed * u[i]
        if config.concat_ua:
            gated = torch.cat([u[i], attended, gated])
        projected = (parameters["output.weight"] * gated[None, :]).sum(1)
        rows.append(x[i] + projected + parameters["output.bias"])
    return rows


def encoder(x_LD, sequences, num_context, config, parameters):
    """Return (R, D), the rows of the tails, from a ModelConfig and the named parameters."""
    result, start = [], 0
    for sequence in sequences:
        rows = [x_LD[start + i] for i in range(sequence.length)]
        start += sequence.length
        first_time = sequence.timestamps[0] if sequence.length else 0
        for number in range(config.num_layers):
            if number == config.num_layers - config.hstu.truncation.layers:
                sequence = truncated(sequence, num_context, config.hstu.truncation.history)
                rows = [rows[place] for place in sequence.places]
            prefix = f"layers.{number}."
            own = {
                name.removeprefix(prefix): p
                for name, p in parameters.items()
                if name.startswith(prefix)
            }
            rows = layer(rows, sequence, num_context, config.hstu, own, first_time)
        if config.hstu.final_norm:
            w, b = parameters["final_norm.weight"], parameters["final_norm.bias"]
            rows = [normalize(row, w, b) for row in rows]
        result += rows[sequence.length - sequence.tail :]
    return torch.stack(result) if result else x_LD.new_zeros(0, x_LD.shape[1])
