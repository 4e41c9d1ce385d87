"""DLRM: dense features and embedding rows of one event, and their pairwise dot products.

Letters: P ranking positions, F dense features, N vectors that interact, D model dim.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from gr.config import DLRMConfig
from gr.numbers import RunningStandardization, sum_over_ranks


class DLRM(nn.Module):
    """What a click model without history knows of an event.

        x = bottom MLP of the dense features, projected to D
        z = [x, row of each feature];   dots = z_i . z_j for i > j
        y = top MLP of [x, dots]                                 (ReLU after every layer of both)

    Args:
        config: widths of the MLPs.
        num_dense: F; 0 leaves x out.
        feature_dims: feature -> width of its rows; rows not D wide are projected.
        dim: D.

    Raises:
        ValueError: if there are fewer than two vectors to interact.

    Source: Naumov et al., "Deep Learning Recommendation Model", arXiv 1906.00091.
    """

    def __init__(
        self, config: DLRMConfig, *, num_dense: int, feature_dims: Mapping[str, int], dim: int
    ) -> None:
        super().__init__()
        self.features = tuple(feature_dims)
        self.normalize = RunningStandardization(num_dense)
        num_vectors = len(self.features) + (num_dense > 0)
        if num_vectors < 2:
            raise ValueError(
                "DLRM needs at least two vectors to interact, got "
                f"{num_dense} dense features and the features {list(self.features)}: add to "
                "data.dense_features, data.item_features or data.context_features"
            )
        self.bottom: nn.Module | None = None
        if num_dense:
            widths = (2 * num_dense, *config.bottom)
            self.bottom = nn.Sequential(_mlp(widths), nn.Linear(widths[-1], dim))
        self.project = nn.ModuleDict(
            {
                name: nn.Linear(width, dim, bias=False)
                for name, width in feature_dims.items()
                if width != dim
            }
        )
        self.pair_index: Tensor
        pairs = torch.tril_indices(num_vectors, num_vectors, offset=-1)
        self.register_buffer("pair_index", pairs[0] * num_vectors + pairs[1], persistent=False)
        width = self.pair_index.numel() + (dim if num_dense else 0)
        self.top = _mlp((width, *config.top))

    def forward(self, dense_PF: Tensor, features: Mapping[str, Tensor]) -> Tensor:
        """Return (P, last width of the top MLP).

        Args:
            dense_PF: float, as in the log; what is not finite is missing.
            features: name -> (P, width) rows.
        """
        vectors = [
            self.project[name](features[name]) if name in self.project else features[name]
            for name in self.features
        ]
        inputs = []
        if self.bottom is not None:
            x_PD = self.bottom(self.normalize(dense_PF))
            vectors.insert(0, x_PD)
            inputs.append(x_PD)
        z_PND = torch.stack(vectors, dim=1)
        dots_PNN = z_PND @ z_PND.transpose(1, 2)
        inputs.append(dots_PNN.flatten(1).index_select(1, self.pair_index))
        return self.top(torch.cat(inputs, dim=1))  # type: ignore[no-any-return]

    @torch.no_grad()
    def observe(self, dense_PF: Tensor) -> None:
        """Add a batch to what dense features are standardised by, on all ranks together."""
        (sums_3F,) = sum_over_ranks([self.normalize.statistics(dense_PF)])
        self.normalize.add(sums_3F)


def _mlp(widths: Sequence[int]) -> nn.Sequential:
    layers = nn.Sequential()
    for width_in, width_out in pairwise(widths):
        layers.extend([nn.Linear(width_in, width_out), nn.ReLU()])
    return layers
