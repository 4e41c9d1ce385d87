"""Everything about a call but q, k and v, as the flat values that a registered operator takes."""

from typing import Literal, NamedTuple, cast

from torch import Tensor

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
