"""Numbers as vectors, by what earlier training batches held: z-scores and quantile bins.

Statistics change in `observe` only, which the trainer calls once a batch has been learnt from, so
that nothing of a batch enters its own predictions. They are sums over all ranks and buffers, hence
part of a checkpoint.

Letters: n values, F features, P rows, K bins, D model dim.
"""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipelines.config import FeatureConfig

MAX_DEVIATIONS = 10.0
"""Standardised values are cut here: the first batches know the spread of a feature badly."""
MANTISSA_BITS = 4
_CELL_SHIFT = 32 - (1 + 8 + MANTISSA_BITS)
NUM_CELLS = 1 << (1 + 8 + MANTISSA_BITS)
INIT_STD = 0.02


class RunningStandardization(nn.Module):
    """Heavy-tailed features on one scale.

        v = sign(x) log(1 + |x|);   z = clip((v - mean) / deviation, -10, 10), 0 where missing
        result = [z, 1 where missing]

    Mean and deviation are of all values observed. Before the first value: mean 0, deviation 1; so
    too where a feature has not varied yet.

    Args:
        num_features: F.
    """

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.sums_3F: Tensor
        self.register_buffer("sums_3F", torch.zeros(3, num_features, dtype=torch.float64))

    def forward(self, x_PF: Tensor) -> Tensor:
        """Return (P, 2 F) in the dtype of `x_PF`, whose values that are not finite are missing."""
        is_present_PF = x_PF.isfinite()
        value_PF = _squashed(x_PF)
        count_F, sum_F, square_F = self.sums_3F.clone()
        mean_F = sum_F / count_F.clamp_min(1)
        mean_square_F = square_F / count_F.clamp_min(1)
        variance_F = mean_square_F - mean_F.square()
        # Below this the difference of the two may be rounding.
        has_varied_F = variance_F > 1e-9 * mean_square_F
        deviation_F = torch.where(has_varied_F, variance_F, 1.0).sqrt()
        z_PF = ((value_PF - mean_F) / deviation_F).clamp(-MAX_DEVIATIONS, MAX_DEVIATIONS)
        return torch.cat([z_PF.where(is_present_PF, 0.0), ~is_present_PF], 1).to(x_PF.dtype)

    def statistics(self, x_PF: Tensor) -> Tensor:
        """Return (3, F) float64: count, sum and sum of squares of v."""
        value_PF = _squashed(x_PF)  # missing is 0
        count_F = x_PF.isfinite().sum(0).double()
        return torch.stack([count_F, value_PF.sum(0), value_PF.square().sum(0)])

    def add(self, statistics_3F: Tensor) -> None:
        """Observe values by their `statistics`."""
        self.sums_3F += statistics_3F


class RunningQuantiles(nn.Module):
    """Bins that hold equally many of the values observed.

    Values are counted in cells of float32: sign, exponent and the first 4 bits of the mantissa, so
    that a cell is at most 1/16 of its value wide, at any scale. With c(x) values observed in the
    cell of x and b(x) in the cells below:

        bin of x = floor(K (b(x) + c(x) / 2) / number of values), at most K - 1

    Before the first value all are in bin K // 2.

    Args:
        num_bins: K.

    Source: counting by leading bits as in HdrHistogram (G. Tene), here of a floating-point number.
    """

    def __init__(self, num_bins: int) -> None:
        super().__init__()
        self.num_bins = num_bins
        self.counts_C: Tensor
        self.register_buffer("counts_C", torch.zeros(NUM_CELLS, dtype=torch.float64))

    def forward(self, x_n: Tensor) -> Tensor:
        """Return (n,) int64: 0 where `x_n` is not finite, else 1 + its bin."""
        total = self.counts_C.sum()
        middle_C = self.counts_C.cumsum(0) - self.counts_C / 2
        share_C = torch.where(total > 0, middle_C / total.clamp_min(1), 0.5)
        bin_C = (self.num_bins * share_C).long().clamp(max=self.num_bins - 1)
        return torch.where(x_n.isfinite(), 1 + bin_C[float_cell(x_n)], 0)

    def statistics(self, x_n: Tensor) -> Tensor:
        """Return (cells,) float64: how many of the finite values are in each cell."""
        counts_C = torch.zeros_like(self.counts_C)
        return counts_C.index_add(0, float_cell(x_n), x_n.isfinite().double())

    def add(self, statistics_C: Tensor) -> None:
        """Observe values by their `statistics`."""
        self.counts_C += statistics_C


def float_cell(x_n: Tensor) -> Tensor:
    """Return (n,) int64: the cell of each value, ascending with it; not finite: that of 0."""
    # A sum with 0 makes one zero of two.
    bits_n = (x_n.float().nan_to_num(0.0, 0.0, 0.0) + 0.0).view(torch.int32).long()
    key_n = torch.where(bits_n < 0, ~bits_n & 0x7FFFFFFF, bits_n | 0x80000000)
    return key_n >> _CELL_SHIFT


class NumberEncodings(nn.Module):
    """One vector a value.

        zscore:    y = W [z, is missing]
        quantile:  y = row of the bin; missing has a row of its own

    Args:
        features: name -> feature with such an encoding.
        dim: D.
    """

    def __init__(self, features: Mapping[str, FeatureConfig], dim: int) -> None:
        super().__init__()
        self.statistics = nn.ModuleDict()
        self.vectors = nn.ModuleDict()
        for name, feature in features.items():
            vectors: nn.Linear | nn.Embedding
            if feature.encoding == "zscore":
                self.statistics[name] = RunningStandardization(1)
                vectors = nn.Linear(2, dim, bias=False)
            else:
                self.statistics[name] = RunningQuantiles(feature.bins)
                vectors = nn.Embedding(feature.bins + 1, dim)
            # As small as a row of a table at the start.
            nn.init.normal_(vectors.weight, std=INIT_STD)
            self.vectors[name] = vectors

    def encode(self, name: str, x_n: Tensor) -> Tensor:
        """Return (n, D): a vector for each value of a feature; NaN is missing."""
        statistics, vectors = self.statistics[name], self.vectors[name]
        if isinstance(statistics, RunningStandardization):
            return vectors(statistics(x_n[:, None]).to(vectors.weight.dtype))  # type: ignore[no-any-return]
        return vectors(statistics(x_n))  # type: ignore[no-any-return]

    @torch.no_grad()
    def observe(self, values: Mapping[str, Tensor]) -> None:
        """Add values of every feature, on all ranks together: name -> (n,); NaN is missing."""
        modules = {name: _statistics(module) for name, module in self.statistics.items()}
        parts = [
            module.statistics(
                values[name][:, None]
                if isinstance(module, RunningStandardization)
                else values[name]
            )
            for name, module in modules.items()
        ]
        for module, total in zip(modules.values(), sum_over_ranks(parts), strict=True):
            module.add(total)


def _statistics(module: nn.Module) -> RunningStandardization | RunningQuantiles:
    assert isinstance(module, RunningStandardization | RunningQuantiles)
    return module


def sum_over_ranks(parts: list[Tensor]) -> list[Tensor]:
    """Return the sums of float64 tensors over all ranks, in one message."""
    if not parts or not dist.is_initialized() or dist.get_world_size() == 1:
        return parts
    flat = torch.cat([part.flatten() for part in parts])
    dist.all_reduce(flat)
    sums = torch.split(flat, [part.numel() for part in parts])
    return [x.view_as(part) for x, part in zip(sums, parts, strict=True)]


def _squashed(x: Tensor) -> Tensor:
    value = x.where(x.isfinite(), 0.0).double()
    return value.sign() * value.abs().log1p()
