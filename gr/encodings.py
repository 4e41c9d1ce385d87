"""What is added to the tokens before the first layer: position, age, gap, hour and weekday.

Letters: B sequences, L tokens, D model dim.
"""

import math

import torch
from torch import Tensor, nn

from gr.config import EncodingConfig
from gr.sequence import SequenceInfo, sequence_index, token_places
from kernels.position_time import position_time

LOG_BUCKET_WIDTH = 0.301
PERIOD_SECONDS = {"hour": 86_400, "weekday": 7 * 86_400}


class TokenEncoding(nn.Module):
    """The sum of a token and of what is known of its place and time.

        x = dropout(sqrt(D) * token + position[p] + time[t] + gap[g]
                    + W [sin, cos of the local time] + b + sinusoid(local hour))

    Args:
        config: which of the terms there are.
        dim: D.
        utc_offset_seconds: added to a timestamp to get the local time that hour and weekday mean.

    Source: the input side of DLRM-v3 in meta-recsys/generative-recommenders (position, time, their
        start, the scale); periodic features as in its timestamp post-processor, here at the input;
        buckets of the gap as those of its relative time bias.
    """

    hours: Tensor

    def __init__(self, config: EncodingConfig, dim: int, *, utc_offset_seconds: int = 0) -> None:
        super().__init__()
        self.config = config
        self.scale = math.sqrt(dim) if config.scale_by_sqrt_dim else 1.0
        self.utc_offset_seconds = utc_offset_seconds
        self.position = _table(config.position_buckets, dim) if config.position != "none" else None
        if self.position is not None and config.position_std:
            nn.init.normal_(self.position.weight, std=config.position_std)
        self.time = _table(config.time_buckets, dim) if config.time != "none" else None
        self.gap = _table(config.gap_buckets, dim) if config.gap != "none" else None
        self.periodic = None
        if config.periodic:
            self.periodic = nn.Linear(2 * len(config.periodic), dim)
            # As small as a token at the start: the default of nn.Linear would drown it.
            nn.init.normal_(self.periodic.weight, std=0.02)
            nn.init.zeros_(self.periodic.bias)
        if config.hour_sinusoid:
            self.register_buffer("hours", sinusoids(24, dim), persistent=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_LD: Tensor, info: SequenceInfo) -> Tensor:
        """Return (L, D).

        Args:
            x_LD: floating, token embeddings.
            info: structure and times of the batch.

        Raises:
            ValueError: if the position table has no room beside the context tokens.
        """
        # From the start on, known places are all that a position is made of.
        has_position = info.places is not None and self.config.position in ("none", "from_start")
        if has_position and self.time is None and self.gap is None:
            sequence_L = info.offsets[:0]
        else:
            sequence_L = sequence_index(info.offsets, x_LD.shape[0])
        looked_up = []
        if self.position is not None:
            index_L = position_index(
                info, sequence_L, kind=self.config.position, buckets=self.config.position_buckets
            )
            looked_up.append((self.position.weight, index_L))
        if self.time is not None:
            age_L = session_time(info, sequence_L) - info.timestamp
            bucket_L = time_bucket(age_L, kind=self.config.time, buckets=self.config.time_buckets)
            looked_up.append((self.time.weight, bucket_L))
        if looked_up:
            tables = [x for pair in looked_up for x in pair]
            encoded_LD = position_time(x_LD, *tables, scale=self.scale)
        else:
            encoded_LD = x_LD * self.scale
        if self.gap is not None:
            gap_L = time_before(info, sequence_L)
            bucket_L = time_bucket(gap_L, kind=self.config.gap, buckets=self.config.gap_buckets)
            encoded_LD = encoded_LD + self.gap(bucket_L)
        if self.config.hour_sinusoid:
            local_L = info.timestamp + self.utc_offset_seconds
            hour_L = local_L.remainder(PERIOD_SECONDS["hour"]) // 3600
            encoded_LD = encoded_LD + self.hours[hour_L].to(x_LD.dtype)
        if self.periodic is not None:
            local_L = info.timestamp + self.utc_offset_seconds
            features = [periodic(local_L, PERIOD_SECONDS[name]) for name in self.config.periodic]
            encoded_LD = encoded_LD + self.periodic(torch.cat(features, 1).to(x_LD.dtype))
        return self.dropout(encoded_LD)  # type: ignore[no-any-return]


def position_index(info: SequenceInfo, sequence_L: Tensor, *, kind: str, buckets: int) -> Tensor:
    """Return (L,) int64, 0 .. buckets - 1: the row of the position table for each token.

    With C context tokens, place p within the sequence (all candidates stand at the end of the
    history) and m = (buckets - C) // 2, the middle of the rows that the context leaves:

        context token   p
        from_start      p
        from_session    C + clamp(m + p - session_start, 0, buckets - C - 1)
        from_end        C + (length - num_candidates) - p

    all clamped to the last row. from_session counts down through the history and up through the
    session, and tells no token of the history how long the session is.

    Args:
        info: structure of the batch.
        sequence_L: int64, the sequence of each token.
        kind: "from_start", "from_session" or "from_end".
        buckets: rows of the table.

    Raises:
        ValueError: if context tokens leave fewer than two rows.

    Source: from_end is the position of DLRM-v3 (meta-recsys/generative-recommenders); from_session
        replaces the end, which is in the future of every row but the last.
    """
    C = info.num_context
    if buckets < C + 2:
        raise ValueError(
            f"model.encoding.position_buckets must be at least 2 more than the {C} context tokens, "
            f"got {buckets}: raise it to {C + 2} or more"
        )
    place_L = token_places(info, sequence_L)
    behind_B: Tensor | int = 0 if info.before is None else info.before.num_tokens
    if kind == "from_start":
        index_L = place_L
    elif kind == "from_session":
        middle = (buckets - C) // 2
        start_L = (info.session_start + behind_B)[sequence_L]
        index_L = C + (middle + place_L - start_L).clamp(min=0)
    else:
        history_B = info.offsets.diff() - info.num_candidates + behind_B
        index_L = C + history_B[sequence_L] - place_L
    if C:
        index_L = torch.where(place_L < C, place_L, index_L)
    return index_L.clamp(max=buckets - 1)


def session_time(info: SequenceInfo, sequence_L: Tensor) -> Tensor:
    """Return (L,) int64 s: when the session of each token's sequence starts.

    That is the timestamp of the session's first token. Where a sequence holds none yet (a request
    for what comes next), it is the query time of its last token.

    Args:
        info: structure and times of the batch.
        sequence_L: int64, the sequence of each token.
    """
    # Of a part of a sequence the session may begin before it, and so does not end before it.
    first_B = info.offsets[:-1] + info.session_start.clamp(min=0)
    last_B = info.offsets[1:] - 1
    has_session_L = (first_B <= last_B)[sequence_L]
    token_L = torch.minimum(first_B, last_B)[sequence_L]
    return torch.where(has_session_L, info.timestamp[token_L], info.query_time[token_L])


def time_before(info: SequenceInfo, sequence_L: Tensor) -> Tensor:
    """Return (L,) int64 s: how long before each token the token before it was.

    Candidates see the history only: theirs counts from its last token. 0 at the head of a sequence.

    Args:
        info: structure and times of the batch.
        sequence_L: int64, the sequence of each token.
    """
    place_L = torch.arange(sequence_L.numel(), device=sequence_L.device)
    first_L = info.offsets[sequence_L]
    history_L = info.offsets[sequence_L + 1] - info.num_candidates[sequence_L]
    before_L = torch.minimum(place_L, history_L) - 1
    time_L = info.timestamp[before_L.clamp(min=0)]
    has_one_L = before_L >= first_L
    if info.before is not None:
        is_left_out_L = (before_L - first_L + 1 == info.num_context) & (
            info.before.num_tokens[sequence_L] > 0
        )
        time_L = torch.where(is_left_out_L, info.before.last_time[sequence_L], time_L)
        has_one_L = has_one_L | is_left_out_L
    return torch.where(has_one_L, info.timestamp - time_L, 0)


def sinusoids(rows: int, dim: int) -> Tensor:
    """Return (rows, D) float32: at row h, sin and cos of h / 10000^(2 i / D) in turn.

    Source: Vaswani et al., "Attention is all you need", section 3.5.
    """
    frequency = 10_000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angle = torch.arange(rows, dtype=torch.float64)[:, None] * frequency
    return torch.stack([angle.sin(), angle.cos()], 2).flatten(1)[:, :dim].float()


def time_bucket(age_L: Tensor, *, kind: str, buckets: int) -> Tensor:
    """Return (L,) int64, 0 .. buckets - 1: the row of the time table for each age.

        sqrt:  clamp(floor(sqrt(max(age, 1e-6) / 60)), 0, buckets - 1)
        log:   clamp(floor(ln(max(age, 1)) / 0.301), 0, buckets - 1)

    Args:
        age_L: int64 s; what lies after the reference (negative) is in bucket 0.
        kind: "sqrt" or "log".
        buckets: rows of the table.

    Source: meta-recsys/generative-recommenders, DLRM-v3 (sqrt) and research code (log).
    """
    # In double: float32 merges seconds from 2^24 on, and misses thresholds by rounding.
    age_L = age_L.double()
    if kind == "sqrt":
        bucket_L = (age_L.clamp(min=1e-6) / 60).sqrt()
    else:
        bucket_L = age_L.clamp(min=1).log() / LOG_BUCKET_WIDTH
    return bucket_L.long().clamp(max=buckets - 1)


def periodic(time_L: Tensor, period_seconds: int) -> Tensor:
    """Return (L, 2) float32: sin and cos of 2 pi (t mod P) / P, equal at both ends of a period.

    Args:
        time_L: int64 s, local time.
        period_seconds: P.
    """
    # The remainder is exact; a float32 of seconds since 1970 is off by a minute.
    phase_L = (2 * math.pi / period_seconds) * time_L.remainder(period_seconds).float()
    return torch.stack([phase_L.sin(), phase_L.cos()], 1)


def _table(rows: int, dim: int) -> nn.Embedding:
    table = nn.Embedding(rows, dim)
    nn.init.uniform_(table.weight, -math.sqrt(1 / rows), math.sqrt(1 / rows))
    return table
