r"""Vectors of items from columns of a file about them, for model.cold_start and model.pretrained.

    python -m pipelines.content_vectors videos.parquet content.parquet --id video_id \
        --categories tag upload_type --numbers video_duration

Each category column becomes one number a value, 1 where the item has it (a list: all its values);
each number column log(1 + |x|) with its sign, standardised over the items. Null is all zeros.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray


def content_vectors(
    items: pa.Table, *, categories: Sequence[str] = (), numbers: Sequence[str] = ()
) -> NDArray[np.float32]:
    """Return (items, width) float32; the columns stand in the order given, values ascending.

    Args:
        items: one row an item.
        categories: columns of integers or strings, or lists of them.
        numbers: columns of numbers.

    Raises:
        ValueError: if a column is missing, or none is named.
    """
    names = (*categories, *numbers)
    missing = sorted(set(names) - set(items.column_names))
    if missing or not names:
        raise ValueError(
            f"the file of items has no column(s) {missing}; it has {items.column_names}. Name at "
            "least one of them with --categories or --numbers"
        )
    parts = [_indicators(items[name].combine_chunks()) for name in categories]
    parts += [_standardised(items[name]) for name in numbers]
    return np.concatenate(parts, axis=1).astype(np.float32)


def _indicators(column: pa.Array) -> NDArray[np.float32]:
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        owner, values = pc.list_parent_indices(column), pc.list_flatten(column)
    else:
        owner, values = pa.array(np.arange(len(column))), column
    known = pc.is_valid(values)
    owner, values = owner.filter(known), values.filter(known)
    distinct = pc.unique(values)
    distinct = distinct.take(pc.sort_indices(distinct))
    found = np.zeros((len(column), len(distinct)), np.float32)
    place = pc.index_in(values, value_set=distinct)
    found[owner.to_numpy(zero_copy_only=False), place.to_numpy(zero_copy_only=False)] = 1.0
    return found


def _standardised(column: pa.ChunkedArray) -> NDArray[np.float32]:
    values = column.cast(pa.float64()).to_numpy(zero_copy_only=False)
    known = np.isfinite(values)
    logs = np.sign(values[known]) * np.log1p(np.abs(values[known]))
    found = np.zeros((len(values), 1), np.float32)
    if len(logs):
        found[known, 0] = (logs - logs.mean()) / (logs.std() or 1.0)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Write a Parquet file with columns id and vector."""
    parser = argparse.ArgumentParser("python -m pipelines.content_vectors", description=__doc__)
    parser.add_argument("items", help="Parquet file, one row an item")
    parser.add_argument("output", help="Parquet file to write")
    parser.add_argument("--id", required=True, help="column of the item's id")
    parser.add_argument("--categories", nargs="*", default=[], help="columns of values")
    parser.add_argument("--numbers", nargs="*", default=[], help="columns of numbers")
    arguments = parser.parse_args(argv)
    try:
        items = pq.read_table(arguments.items)
        named = {"categories": arguments.categories, "numbers": arguments.numbers}
        vectors = content_vectors(items, **named)
        if arguments.id not in items.column_names:
            raise ValueError(f"--id {arguments.id} is no column of it: {items.column_names}")
    except (OSError, ValueError) as error:
        sys.stderr.write(f"{arguments.items}: {error}\n")
        return 2
    width = vectors.shape[1]
    flat = pa.array(vectors.reshape(-1))
    lists = pa.FixedSizeListArray.from_arrays(flat, width).cast(pa.list_(pa.float32()))
    Path(arguments.output).parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"id": items[arguments.id], "vector": lists}), arguments.output)
    sys.stdout.write(f"wrote {len(vectors)} vectors of {width} numbers to {arguments.output}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
