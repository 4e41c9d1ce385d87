"""Retrieval: the items whose vectors are nearest to a user's, of the whole catalogue.

Letters: B users, D item dim, E items, k results.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gr.inference.catalogue import ItemCatalogue
from kernels.top_k import top_k
from kernels.top_k.reference import select

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Found:
    """The best items of each user, best first."""

    ids: Ids
    """(B, k) int64 item ids; -1 where fewer than k items may be found."""
    scores: NDArray[np.float32]
    """(B, k) float32: dot products with the user's vector; -inf where the id is -1."""


class ExactIndex:
    """Exact top-k over the whole catalogue: equal scores go by item id.

    Args:
        catalogue: ids and vectors of the items.
    """

    def __init__(self, catalogue: ItemCatalogue) -> None:
        self.catalogue = catalogue

    def search(
        self,
        users_BD: Tensor,
        k: int,
        *,
        exclude: Sequence[Ids] | None = None,
        allow: Sequence[Ids | None] | None = None,
    ) -> Found:
        """Return the k best items of each user.

        Args:
            users_BD: user vectors, as `Scorer.encode_history` returns them.
            k: how many, at least 1.
            exclude: of each user, ids that must not be found (what was seen); others than the
                catalogue's do no harm.
            allow: of each user, the only ids that may be found; None: all.

        Raises:
            ValueError: if k is below 1, a vector is not finite, an allowed id is not in the
                catalogue, or the lists are not one a user.
        """
        exclude, allow = _checked(users_BD, k, exclude, allow)
        users_BD = users_BD.to(self.catalogue.vectors_ED.dtype)
        scores = np.full((len(users_BD), k), -np.inf, np.float32)
        ids = np.full((len(users_BD), k), -1, np.int64)
        excluded = [self.catalogue.rows_of(x) for x in exclude]
        free = [b for b, allowed in enumerate(allow) if allowed is None]
        if free:
            # However many of the best are excluded, k others are among so many.
            wanted = min(k + max(len(excluded[b]) for b in free), len(self.catalogue.ids))
            for b, row_n, score_n in self._best(users_BD, free, max(1, wanted)):
                is_free = (row_n >= 0) & ~np.isin(row_n, excluded[b])
                row_n, score_n = row_n[is_free][:k], score_n[is_free][:k]
                ids[b, : len(row_n)] = self.catalogue.ids[row_n]
                scores[b, : len(row_n)] = score_n
        for b, allowed in enumerate(allow):
            if allowed is not None:
                rows = np.setdiff1d(self.catalogue.known_rows(allowed), excluded[b])
                found = self._among(users_BD[b], rows, k)
                ids[b, : len(found[0])], scores[b, : len(found[0])] = found
        return Found(ids, scores)

    def _best(self, users_BD: Tensor, users: list[int], k: int) -> list[tuple[int, Ids, Any]]:
        found = top_k(users_BD[users], self.catalogue.vectors_ED, k)
        rows, scores = found.rows.cpu().numpy(), found.scores.float().cpu().numpy()
        return list(zip(users, rows, scores, strict=True))

    def _among(self, user_D: Tensor, rows: Ids, k: int) -> tuple[Ids, NDArray[np.float32]]:
        index = torch.from_numpy(rows).to(user_D.device)
        vectors_nD = self.catalogue.vectors_ED[index]
        dtype = torch.promote_types(user_D.dtype, torch.float32)
        score_1n = (vectors_nD.to(dtype) @ user_D.to(dtype))[None]
        best = select(score_1n, k)
        scores = score_1n.gather(1, best)[0].float().cpu().numpy()
        return self.catalogue.ids[rows[best[0].cpu().numpy()]], scores


class FaissIndex(ExactIndex):
    """A FAISS index in the place of the scan: approximate, unless `description` is Flat.

    What it finds is scored and ordered exactly. Searches for allowed ids scan these only.

    Args:
        catalogue: ids and vectors of the items.
        description: as faiss.index_factory takes it, for instance "IVF1024,Flat" or "HNSW32".
        probes: lists that an inverted file looks into.

    Raises:
        ValueError: if FAISS is not installed, or does not know the description.
    """

    def __init__(self, catalogue: ItemCatalogue, description: str, *, probes: int = 16) -> None:
        super().__init__(catalogue)
        try:
            import faiss
        except ImportError as error:
            raise ValueError(
                "a FAISS index needs the package faiss-cpu, which is not installed: pip install "
                "faiss-cpu==1.15.1, or use the exact index"
            ) from error
        vectors = catalogue.vectors_ED.float().cpu().numpy()
        try:
            self._faiss = faiss.index_factory(
                vectors.shape[1], description, faiss.METRIC_INNER_PRODUCT
            )
        except RuntimeError as error:
            raise ValueError(
                f"FAISS does not know the index {description!r}: expected a description as "
                "faiss.index_factory takes it, such as Flat, IVF1024,Flat or HNSW32"
            ) from error
        if "IVF" in description:
            faiss.extract_index_ivf(self._faiss).nprobe = probes
        self._faiss.train(vectors)
        self._faiss.add(vectors)

    def _best(self, users_BD: Tensor, users: list[int], k: int) -> list[tuple[int, Ids, Any]]:
        queries = users_BD[users].float().cpu().numpy()
        # One more: of equal scores it may have kept any.
        _, rows_Bn = self._faiss.search(queries, min(k + 1, len(self.catalogue.ids)))
        found = []
        for b, row_n in zip(users, rows_Bn, strict=True):
            row_n = np.sort(row_n[row_n >= 0])
            index = torch.from_numpy(row_n).to(users_BD.device)
            score_1n = (self.catalogue.vectors_ED[index].float() @ users_BD[b].float())[None]
            best = select(score_1n, k)[0].cpu().numpy()
            found.append((b, row_n[best], score_1n[0].cpu().numpy()[best]))
        return found


def _checked(
    users_BD: Tensor,
    k: int,
    exclude: Sequence[Ids] | None,
    allow: Sequence[Ids | None] | None,
) -> tuple[Sequence[Ids], Sequence[Ids | None]]:
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if not bool(users_BD.isfinite().all()):
        raise ValueError("user vectors must be finite: the model's weights are not, or its input")
    num_users = len(users_BD)
    exclude = [np.empty(0, np.int64)] * num_users if exclude is None else exclude
    allow = [None] * num_users if allow is None else allow
    if len(exclude) != num_users or len(allow) != num_users:
        raise ValueError(
            f"expected exclude and allow of each of {num_users} users, got {len(exclude)} and "
            f"{len(allow)}"
        )
    return exclude, allow
