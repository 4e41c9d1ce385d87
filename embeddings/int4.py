"""Tables in 4 bits for inference: rows in host memory, a quarter of float16, read-only.

The format is FBGEMM's, and so is what rounds: the least and the largest value of a row become its
float16 bias and scale (largest - least) / 15, values the nearest of the 16 levels between.
"""

from collections.abc import Iterable

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embeddings.tables import Tables
from kernels.int4_rows import dequantize_int4, row_bytes
from kernels.int4_rows.reference import CONSTANTS

FLOAT16_MAX = 65504.0


def quantize_int4(rows_ND: Tensor, *, name: str = "rows", first: int = 0) -> Tensor:
    """Return (N, D / 2 + 4) uint8: each row with its own scale and bias.

    Args:
        rows_ND: (N, D) float32 or float16, D a multiple of 4, finite.
        name: of the table, for messages.
        first: number of the first row, for messages.

    Raises:
        ValueError: if D is not a multiple of 4, or a row is not finite in float16; it names the
            table and the row.
    """
    if rows_ND.dim() != 2 or rows_ND.shape[1] == 0 or rows_ND.shape[1] % 4:
        raise ValueError(
            f"{name}: rows in 4 bits must be (N, D) with D a multiple of 4, got "
            f"{tuple(rows_ND.shape)}"
        )
    is_bad_N = ~(rows_ND.abs() <= FLOAT16_MAX).all(1)
    if bool(is_bad_N.any()):
        row = first + int(is_bad_N.nonzero()[0])
        raise ValueError(
            f"{name}: row {row} holds NaN, or a value beyond {FLOAT16_MAX}, which float16 scales "
            "cannot hold: look at the run that made it (train/nonfinite_rows), or keep this table "
            "in float16"
        )
    import fbgemm_gpu  # noqa: F401  (registers the operators)

    packed: Tensor = torch.ops.fbgemm.FloatToFusedNBitRowwiseQuantizedSBHalf(
        rows_ND.float().contiguous(), 4
    )
    return packed


class Int4Table:
    """Rows of one table in 4 bits, in host memory (page-locked where there is a GPU).

    Args:
        rows_EW: (E, D / 2 + 4) uint8, as `quantize_int4` makes them.
    """

    def __init__(self, rows_EW: Tensor) -> None:
        if rows_EW.dim() != 2 or rows_EW.dtype != torch.uint8 or rows_EW.shape[1] <= CONSTANTS:
            raise ValueError(
                "a table in 4 bits is (E, D / 2 + 4) uint8, got "
                f"{tuple(rows_EW.shape)} {rows_EW.dtype}"
            )
        rows_EW = rows_EW.contiguous()
        is_gpu = torch.cuda.is_available()
        self.rows_EW = rows_EW.pin_memory() if is_gpu and not rows_EW.is_pinned() else rows_EW

    @classmethod
    def of_chunks(
        cls, chunks: Iterable[tuple[int, Tensor]], num_rows: int, dim: int, *, name: str = "rows"
    ) -> "Int4Table":
        """Quantise a table chunk by chunk; it is never whole in another precision.

        Args:
            chunks: (first row, (n, dim) float32) over all rows, as Tables.all_rows yields them.
            num_rows: E.
            dim: D.
            name: of the table, for messages.

        Raises:
            ValueError: as quantize_int4, or if the chunks do not hold every row.
        """
        rows_EW = torch.empty(
            num_rows, row_bytes(dim), dtype=torch.uint8, pin_memory=torch.cuda.is_available()
        )
        reached = 0
        for first, chunk in chunks:
            if first != reached:
                raise ValueError(
                    f"{name}: expected a chunk from row {reached} on, found one from {first} on"
                )
            rows_EW[first : first + len(chunk)] = quantize_int4(chunk, name=name, first=first)
            reached += len(chunk)
        if reached != num_rows:
            raise ValueError(f"{name}: expected {num_rows} rows, the chunks hold {reached}")
        return cls(rows_EW)

    @property
    def num_rows(self) -> int:
        """E."""
        return self.rows_EW.shape[0]

    @property
    def dim(self) -> int:
        """D."""
        return 2 * (self.rows_EW.shape[1] - CONSTANTS)

    @property
    def num_bytes(self) -> int:
        """Host memory of the rows."""
        return self.rows_EW.numel()

    def lookup(
        self,
        index_R: Tensor,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Return (R, D) rows in `dtype`; what crosses the bus to a GPU is 4-bit rows.

        With an index in host memory the host gathers and copies, without waiting for the copy. With
        an index on a GPU the GPU itself reads the rows over the bus: no wait either.

        Args:
            index_R: (R,) int64 row numbers.
            device: where the result is wanted; None: where the index is.
            dtype: of the result.

        Raises:
            IndexError: for a row outside of the table, with an index in host memory; on a GPU such
                a row is NaN.
        """
        device = index_R.device if device is None else torch.device(device)
        if index_R.is_cuda or device.type == "cpu":
            return dequantize_int4(self.rows_EW, index_R.to(device), dtype=dtype)
        gathered = torch.empty(
            len(index_R), self.rows_EW.shape[1], dtype=torch.uint8, pin_memory=True
        )
        torch.index_select(self.rows_EW, 0, index_R, out=gathered)
        return dequantize_int4(gathered.to(device, non_blocking=True), dtype=dtype)


class Int4Tables:
    """Tables of a run in 4 bits, in host memory: they are looked up, and that is all.

    Args:
        tables: of one process, whose rows are quantised chunk by chunk. They are not kept.

    Raises:
        ValueError: as quantize_int4.
    """

    exchange = None
    """As Tables.exchange: no stream brings ids to other ranks."""

    def __init__(self, tables: Tables) -> None:
        self.config, self.device = tables.config, tables.device
        self.rows = {
            name: Int4Table.of_chunks(
                tables.all_rows(name), table.num_embeddings, table.dim, name=f"table {name!r}"
            )
            for name, table in tables.config.tables.items()
        }

    @property
    def num_bytes(self) -> int:
        """Host memory of all rows."""
        return sum(table.num_bytes for table in self.rows.values())

    def lookup(self, rows: KeyedJaggedTensor) -> dict[str, Tensor]:
        """Return the rows of each feature, float32, on the tables' device (see Tables)."""
        table_of = {f: name for name, table in self.config.tables.items() for f in table.features}
        bounds = rows.offset_per_key()
        return {
            feature: self.rows[table_of[feature]].lookup(
                rows.values()[bounds[i] : bounds[i + 1]], device=self.device
            )
            for i, feature in enumerate(rows.keys())
        }

    def local_weight(self, table: str) -> Tensor | None:
        """Return None: there are no rows that can be read as numbers."""
        return None
