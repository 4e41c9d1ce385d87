"""The items that a model knows: ids, and the vectors that users are compared with.

Letters: E items, D item dim.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gr.model import SequenceModel
from gr.trainer import Trainer

Ids = NDArray[np.int64]


class ItemCatalogue:
    """Items in the order of their ids, so that of equal scores the smaller id comes first.

    Args:
        ids: (E,) int64, distinct, in any order.
        vectors_ED: as `SequenceModel.item_vectors` returns them, in the order of the ids.

    Raises:
        ValueError: if shapes do not fit, an id stands twice, or a vector is not finite.
    """

    def __init__(self, ids: Any, vectors_ED: Tensor) -> None:
        ids = np.asarray(ids, np.int64)
        if vectors_ED.dim() != 2 or ids.shape != (len(vectors_ED),):
            raise ValueError(
                f"expected ids (E,) and vectors (E, D), got {ids.shape} and "
                f"{tuple(vectors_ED.shape)}"
            )
        order = np.argsort(ids, kind="stable")
        self.ids: Ids = ids[order]
        """(E,) int64, ascending."""
        if (np.diff(self.ids) == 0).any():
            twice = int(self.ids[1:][np.diff(self.ids) == 0][0])
            raise ValueError(f"item {twice} stands twice in the catalogue")
        index = torch.from_numpy(order).to(vectors_ED.device)
        self.vectors_ED = vectors_ED.detach().index_select(0, index).contiguous()
        """(E, D)."""
        if not bool(self.vectors_ED.isfinite().all()):
            raise ValueError("vectors of items must be finite: the checkpoint's weights are not")

    def rows_of(self, ids: Ids) -> Ids:
        """Return the rows of those of some ids that are in the catalogue, distinct, ascending."""
        ids = np.unique(np.asarray(ids, np.int64))
        return self._places(ids)[self.has(ids)]

    def known_rows(self, ids: Ids) -> Ids:
        """Return the rows of ids, distinct, ascending.

        Raises:
            ValueError: naming an id that is not in the catalogue.
        """
        self.check(ids)
        return self.rows_of(ids)

    def has(self, ids: Ids) -> NDArray[np.bool_]:
        """Return which ids are in the catalogue."""
        ids = np.asarray(ids, np.int64)
        if len(self.ids) == 0:
            return np.zeros(len(ids), bool)
        found: NDArray[np.bool_] = self.ids[self._places(ids)] == ids
        return found

    def check(self, ids: Ids) -> None:
        """Refuse ids that are not in the catalogue.

        Raises:
            ValueError: naming the first.
        """
        is_known = self.has(ids)
        if not is_known.all():
            raise ValueError(
                f"item {int(np.asarray(ids)[~is_known][0])} is not in the catalogue of "
                f"{len(self.ids)} items that the model was trained with"
            )

    def _places(self, ids: Ids) -> Ids:
        places: Ids = np.searchsorted(self.ids, ids)
        return np.minimum(places, max(0, len(self.ids) - 1))


@torch.no_grad()
def catalogue_of(trainer: Trainer, *, dtype: torch.dtype = torch.float32) -> ItemCatalogue:
    """Return the items of a model; all ranks of sharded tables call it together.

    Args:
        trainer: with the weights of a checkpoint.
        dtype: of the vectors; float16 and bfloat16 halve what a search reads.

    Raises:
        ValueError: if the model has no retrieval head, or its item table is hashed.
    """
    model, table = trainer.model, trainer.item_table
    if not isinstance(model, SequenceModel) or model.retrieval is None:
        raise ValueError(
            "the model has no retrieval head (model.head.retrieval), so there is nothing to "
            "compare items with: give candidates instead"
        )
    if trainer.config.embeddings.tables[table].ids == "hashed":
        raise ValueError(
            f"the item table {table!r} is hashed: several items share a row, and rows do not say "
            "which. Retrieval needs ids=static or dynamic"
        )
    raw = trainer.id_rows.dynamic.ids(table) if trainer.id_rows.item_is_dynamic else None
    used = trainer.id_rows.dynamic.is_used(table) if trainer.id_rows.item_is_dynamic else None
    ids, vectors = [], []
    for first, chunk in trainer.tables.all_rows(table):
        row_C = torch.arange(first, first + len(chunk), device=chunk.device)
        id_C = row_C - 1 if raw is None else raw[row_C]
        is_item_C = row_C > 0 if used is None else used[row_C]
        vectors.append(model.item_vectors(chunk, id_C)[is_item_C].to(dtype))
        ids.append(id_C[is_item_C].cpu().numpy())
    return ItemCatalogue(np.concatenate(ids), torch.cat(vectors))
