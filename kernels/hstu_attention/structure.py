"""Everything about a call but q, k and v, as the flat values that a registered operator takes."""

from typing import Literal, NamedTuple, cast

from torch import Tensor

from kernels.hstu_attention.bias import RelativeBias
from kernels.hstu_attention.mask import AttentionMask


class Structure(NamedTuple):
    """Arguments of kernels.hstu_attention, in the order of SCHEMA."""

    offsets: Tensor
    q_offsets: Tensor
    num_candidates: Tensor | None
    position_table: Tensor | None
    time_table: Tensor | None
    query_time: Tensor | None
    key_time: Tensor | None
    max_len: int
    max_q_len: int
    alpha: float
    scale: float
    """1 / scaling_length; 1 with softmax."""
    softmax: bool
    num_context: int
    context: str
    local_window: int | None
    global_rows: int
    global_columns: int
    hopper: bool = False
    """Whether the kernels for Hopper run, backward too where they take the dims."""
    deterministic: bool = False
    """Whether gradients must have the same bits for the same input."""

    @property
    def mask(self) -> AttentionMask:
        """The mask that num_context .. global_columns describe."""
        return AttentionMask(
            num_context=self.num_context,
            context=cast(Literal["causal", "prefix", "prefix_sees_all"], self.context),
            local_window=self.local_window,
            global_rows=self.global_rows,
            global_columns=self.global_columns,
        )

    @property
    def num_sequences(self) -> int:
        """B."""
        return self.offsets.numel() - 1


SCHEMA = (
    "Tensor offsets, Tensor q_offsets, Tensor? num_candidates, Tensor? position_table, "
    "Tensor? time_table, Tensor? query_time, Tensor? key_time, SymInt max_len, SymInt max_q_len, "
    "float alpha, float scale, bool softmax, SymInt num_context, str context, "
    "SymInt? local_window, SymInt global_rows, SymInt global_columns, bool hopper=False, "
    "bool deterministic=False"
)
"""Of Structure, in the language of torch.library."""


def structure_of(
    offsets: Tensor,
    q_offsets: Tensor,
    num_candidates: Tensor | None,
    bias: RelativeBias | None,
    mask: AttentionMask,
    *,
    max_len: int,
    max_q_len: int,
    alpha: float,
    scaling_length: float | None,
    softmax: bool,
    hopper: bool,
    deterministic: bool,
) -> Structure:
    """Return the arguments of kernels.hstu_attention, which these are, as flat values.

    Raises:
        ValueError: for a mask that these kernels do not have.
    """
    if mask.windowed_candidates:
        raise ValueError(
            "AttentionMask.windowed_candidates is of hstu_attention_cached and of the reference: "
            "call one of them"
        )
    return Structure(
        offsets=offsets,
        q_offsets=q_offsets,
        num_candidates=num_candidates,
        position_table=_of_bias(bias, "position_table"),
        time_table=_of_bias(bias, "time_table"),
        query_time=_of_bias(bias, "query_time"),
        key_time=_of_bias(bias, "key_time"),
        max_len=max_len,
        max_q_len=max_q_len,
        alpha=float(alpha),
        scale=1.0 if scaling_length is None else 1.0 / scaling_length,
        softmax=softmax,
        num_context=mask.num_context,
        context=mask.context,
        local_window=mask.local_window,
        global_rows=mask.global_rows,
        global_columns=mask.global_columns,
        hopper=hopper,
        deterministic=deterministic,
    )


def _of_bias(bias: RelativeBias | None, field: str) -> Tensor | None:
    x: Tensor | None = getattr(bias, field, None)
    return None if x is None else x.contiguous()
