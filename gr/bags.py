"""Several ids at one place, as one vector: the mean of their rows, or a learned weighted mean.

Letters: n places, V ids of all places, D width of a row.
"""

import torch
from torch import Tensor, nn


class BagPooling(nn.Module):
    """Pool the rows of bags; an empty bag is the zero vector.

        mean:       y_i = sum over the bag of x_v / size of the bag
        attention:  y_i = sum over the bag of softmax_v(x_v . q / sqrt(D)) x_v,   q learned

    q starts at zero, so that attention starts as the mean.

    Args:
        dim: D.
        kind: mean or attention.
    """

    def __init__(self, dim: int, kind: str) -> None:
        super().__init__()
        self.query_D = nn.Parameter(torch.zeros(dim)) if kind == "attention" else None

    def forward(self, rows_VD: Tensor, lengths_n: Tensor) -> Tensor:
        """Return (n, D).

        Args:
            rows_VD: rows of the ids, place after place.
            lengths_n: int64, ids of each place.
        """
        place_V = torch.repeat_interleave(
            torch.arange(lengths_n.numel(), device=lengths_n.device),
            lengths_n,
            output_size=rows_VD.shape[0],
        )
        if self.query_D is None:
            weight_V = lengths_n.clamp_min(1).to(rows_VD.dtype).reciprocal()[place_V]
        else:
            score_V = rows_VD @ self.query_D.to(rows_VD.dtype) * rows_VD.shape[1] ** -0.5
            weight_V = _softmax(score_V, place_V, lengths_n.numel())
        pooled_nD = rows_VD.new_zeros(lengths_n.numel(), rows_VD.shape[1])
        return pooled_nD.index_add(0, place_V, rows_VD * weight_V.to(rows_VD.dtype)[:, None])


def _softmax(score_V: Tensor, place_V: Tensor, num_places: int) -> Tensor:
    """Return the softmax over the values of each place, in float32 or better."""
    score_V = score_V.to(torch.promote_types(score_V.dtype, torch.float32))
    top_n = score_V.new_full((num_places,), -torch.inf)
    top_n = top_n.scatter_reduce(0, place_V, score_V.detach(), "amax")
    exp_V = (score_V - top_n[place_V]).exp()
    return exp_V / exp_V.new_zeros(num_places).index_add(0, place_V, exp_V)[place_V]
