"""Embeddings of items that begin with their content: a place for an item that nobody met yet.

Letters: E items with a vector, W width of a vector, n items, D width of an item row.
"""

import math
from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from gr.config import ColdStartConfig
from gr.pretrained import FrozenVectors, find_rows
from pipelines.batch import SequenceBatch
from pipelines.config import ITEM_ID, NEGATIVE_ITEM_ID, TARGET_ITEM_ID

NAME = "cold_start"
ITEM_FEATURES = (ITEM_ID, TARGET_ITEM_ID, NEGATIVE_ITEM_ID)


def vectors_key(feature: str) -> str:
    """Return the key in SequenceBatch.vector_rows of the content of a feature's items."""
    return f"{NAME}.{feature}"


class ContentTower(FrozenVectors):
    """e = row + f(v), with the frozen vector v of the item: in tokens, as target, negative, result.

        f(v) = W_n silu(... silu(W_1 norm(v) + b_1)),   norm(v) = (v - mean(v)) / std(v)

    Without `with_rows`, e = f(v). An item without a vector has a learned f of its own, the same for
    all such. Rows that start at zero learn what content does not tell. In fp32, since users are
    compared with it.

    Args:
        config: the file, and the hidden widths.
        dim: D.

    Raises:
        ValueError: if the file cannot be read, or repeats an id.
    """

    def __init__(self, config: ColdStartConfig, dim: int) -> None:
        super().__init__("model.cold_start", config)
        self.with_rows = config.with_rows
        # A copy on the device of the model, for rows whose ids only the device knows.
        self.ids_E: Tensor
        self.register_buffer("ids_E", self.sorted_ids.clone(), persistent=False)
        widths = (self.vectors_EW.shape[1], *config.hidden)
        self.hidden = nn.Sequential()
        for width_in, width_out in pairwise(widths):
            self.hidden.extend([nn.Linear(width_in, width_out), nn.SiLU()])
        self.readout = nn.Linear(widths[-1], dim, bias=False)
        # As wide as rows at the start, with hidden values of about 0.4.
        nn.init.normal_(self.readout.weight, std=0.05 / math.sqrt(widths[-1]))
        self.missing_D = nn.Parameter(torch.randn(dim) * 0.02)

    def forward(self, row_n: Tensor) -> Tensor:
        """Return f, (n, D), dtype of the weights, of rows that `find` or `find_on_device` gave."""
        with torch.autocast(row_n.device.type, enabled=False):
            vector_nW = self.vectors_EW[row_n.clamp_min(0)].to(self.missing_D.dtype)
            normed_nW = functional.layer_norm(vector_nW, vector_nW.shape[1:])
            content_nD: Tensor = self.readout(self.hidden(normed_nW))
            return torch.where((row_n >= 0)[:, None], content_nD, self.missing_D)

    def find_on_device(self, ids_n: Tensor) -> Tensor:
        """Return what `find` returns, where the model is."""
        return find_rows(self.ids_E, ids_n)

    def add(self, batch: SequenceBatch, rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return `rows` with the content of items added to theirs.

        Args:
            batch: `vector_rows` has the content of each feature of items.
            rows: feature -> looked-up rows.
        """
        of_items = [name for name in ITEM_FEATURES if name in rows]
        found = [batch.vector_rows[vectors_key(name)] for name in of_items]
        parts = self(torch.cat(found)).split([len(x) for x in found])
        whole = {n: self.join(rows[n], part) for n, part in zip(of_items, parts, strict=True)}
        return {**rows, **whole}

    def join(self, rows_nD: Tensor, content_nD: Tensor) -> Tensor:
        """Return the embeddings of items, of their rows and what `forward` returned."""
        # Rows that count nothing still get a gradient, of zeros, on every rank.
        return rows_nD * float(self.with_rows) + content_nD
