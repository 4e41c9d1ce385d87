"""How many bytes a table takes, and where: what the planner places and the run prints."""

from dataclasses import dataclass

from embeddings.config import EmbeddingsConfig, TableConfig

GIB = 2**30
_SLOT_BYTES = 20
"""Of a row in the cache, beside its weights: which row it is, when it was used, who holds it."""
_CACHED_ROW_BYTES = 4
"""In HBM for each row of a cached table, whether in the cache or not: the number of its table."""


@dataclass(frozen=True, kw_only=True)
class Bytes:
    """Bytes of a table or of a part of it, with the moments of its optimizer."""

    hbm: int
    """On the GPU."""
    host: int
    """In host memory."""


def weight_bytes(config: EmbeddingsConfig) -> int:
    """Return the bytes of one weight."""
    return 4 if config.weights == "fp32" else 2


def cache_fraction(config: EmbeddingsConfig, table: TableConfig) -> float | None:
    """Return the share of the rows that HBM holds; None if it holds them all."""
    whole = table.num_embeddings * table.dim * weight_bytes(config)
    if not table.hbm_gb or table.hbm_gb * GIB >= whole:
        return None
    return table.hbm_gb * GIB / whole


def table_bytes(
    config: EmbeddingsConfig, table: TableConfig, num_rows: int, *, on_gpu: bool
) -> Bytes:
    """Return what `num_rows` rows of `table` take with their moments.

    The second moment, 4 bytes a row, stands beside the rows on the GPU, also of a cached table. The
    first, 4 bytes a weight whatever the weights are, is on the host for embeddings.momentum=host
    and for cached tables.

    Args:
        config: of all tables.
        table: one of them.
        num_rows: of it.
        on_gpu: whether it is trained on a GPU; else all is on the host.
    """
    weights = num_rows * table.dim * weight_bytes(config)
    moment = 4 * num_rows * table.dim
    first = moment if config.update_rule != "row_wise_adagrad" else 0
    second = moment if config.update_rule == "adamw" else 4 * num_rows
    if not on_gpu:
        return Bytes(hbm=0, host=weights + first + second)
    cached = cache_fraction(config, table)
    if cached is not None:
        slots = round(num_rows * cached)
        in_cache = slots * (table.dim * weight_bytes(config) + _SLOT_BYTES)
        return Bytes(hbm=in_cache + second + _CACHED_ROW_BYTES * num_rows, host=weights + first)
    if config.momentum == "host":
        return Bytes(hbm=weights + second, host=first)
    return Bytes(hbm=weights + first + second, host=0)


def map_bytes(table: TableConfig) -> int:
    """Return the bytes, on the device of every rank, of the map from dynamic ids to rows.

    The id, its copy in order, its row and its last step; with ttl_days its last time; and three
    numbers for each id that may wait. While ids come, some of it stands there twice.
    """
    if table.ids != "dynamic":
        return 0
    per_row = 24 + (8 if table.dynamic.ttl_days else 0)
    num_waiting = table.dynamic.max_waiting or table.num_embeddings
    waiting = 24 * num_waiting if table.dynamic.admit_after > 1 else 0
    return per_row * table.num_embeddings + waiting


def describe_bytes(config: EmbeddingsConfig, *, on_gpu: bool) -> str:
    """Return the bytes of every table with its moments, over all ranks, the largest first."""
    sizes = {
        name: table_bytes(config, table, table.num_embeddings, on_gpu=on_gpu)
        for name, table in config.tables.items()
    }
    by_size = sorted(sizes.items(), key=lambda item: -(item[1].hbm + item[1].host))
    tables = config.tables
    return "; ".join(
        f"{name}: {tables[name].num_embeddings} x {tables[name].dim}, "
        + (f"{size.hbm} bytes of HBM and " if on_gpu else "")
        + f"{size.host} bytes of host memory"
        for name, size in by_size
    )
