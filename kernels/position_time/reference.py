"""Input encoding in eager PyTorch; computes in float32, or in float64 for float64 inputs."""

import torch
from torch import Tensor


def position_time(
    x_LD: Tensor,
    position_table_PD: Tensor,
    position_L: Tensor,
    time_table_TD: Tensor | None,
    time_L: Tensor | None,
    scale: float,
) -> Tensor:
    """Return scale * x + position_table[position] + time_table[time], in the dtype of x."""
    compute = torch.promote_types(x_LD.dtype, torch.float32)
    y = scale * x_LD.to(compute) + position_table_PD.index_select(0, position_L)
    if time_table_TD is not None:
        assert time_L is not None
        y = y + time_table_TD.index_select(0, time_L)
    return y.to(x_LD.dtype)
