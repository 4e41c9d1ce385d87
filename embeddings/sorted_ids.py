"""A map from 64-bit ids to numbers, as sorted tensors: one search finds the ids of a batch.

Letters: n ids of the map, m ids that are asked for or added.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

MISSING = -1


class SortedIds:
    """Distinct ids in ascending order, and named columns of numbers beside them.

    A hash table that torch's operators build needs a pass over the batch a probe; the search is one
    kernel. In return an insertion copies the map (python -m embeddings.bench_ids).

    Args:
        columns: name -> dtype.
        device: of all tensors.

    Attributes:
        ids: (n,) int64.
        columns: name -> (n,).
    """

    def __init__(self, columns: Mapping[str, torch.dtype], device: torch.device) -> None:
        self.ids = torch.zeros(0, dtype=torch.int64, device=device)
        self.columns = {
            name: torch.zeros(0, dtype=dtype, device=device) for name, dtype in columns.items()
        }

    def __len__(self) -> int:
        return self.ids.numel()

    def find(self, ids_m: Tensor) -> Tensor:
        """Return (m,) int64 places of ids in the map, MISSING where it lacks one."""
        if not len(self):
            return torch.full_like(ids_m, MISSING)
        # In their order the ids share what they read of the map: a third of the time on a CPU.
        ascending_m, order_m = ids_m.sort()
        found_m = torch.searchsorted(self.ids, ascending_m).clamp_max_(len(self) - 1)
        found_m = found_m.where(self.ids[found_m] == ascending_m, MISSING)
        return torch.empty_like(found_m).index_copy_(0, order_m, found_m)

    def insert(self, ids_m: Tensor, columns: Mapping[str, Tensor]) -> None:
        """Add ids with their numbers.

        Args:
            ids_m: distinct, ascending, none of them in the map.
            columns: name -> (m,), all of them.
        """
        # Where the new and the old stand afterwards: their rank among their own and the others'.
        count = torch.arange(max(len(self), ids_m.numel()), device=ids_m.device)
        new_m = torch.searchsorted(self.ids, ids_m) + count[: ids_m.numel()]
        old_n = torch.searchsorted(ids_m, self.ids) + count[: len(self)]

        def merge(old: Tensor, new: Tensor) -> Tensor:
            merged = old.new_empty(old.numel() + new.numel())
            merged[old_n] = old
            merged[new_m] = new.to(old.dtype)
            return merged

        for name, column in self.columns.items():
            self.columns[name] = merge(column, columns[name])
        self.ids = merge(self.ids, ids_m)

    def keep(self, mask_n: Tensor) -> None:
        """Forget the ids where `mask_n`, (n,) bool, is false."""
        self.columns = {name: column[mask_n] for name, column in self.columns.items()}
        self.ids = self.ids[mask_n]
