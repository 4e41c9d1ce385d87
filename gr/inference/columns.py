"""Columns of requests as the data side reads those of a log, and how requests are laid out."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.config import DataConfig, LeaveOneOutConfig, StochasticLengthConfig, TaskConfig
from pipelines.features import Column
from pipelines.history import Ints

Columns = Mapping[str, Any]
"""Column of the log -> its values: whatever pyarrow.array takes."""

TYPES = {
    "integer": pa.int64(),
    "number": pa.float64(),
    "integers": pa.list_(pa.int64()),
    "numbers": pa.list_(pa.float64()),
}


def request_data(data: DataConfig) -> DataConfig:
    """Return the configuration by which requests are laid out: candidates at the end.

    An event that is predicted from all tokens before it (data.anchor=event) is read at its item's
    token, which sees what a candidate sees; so one layout serves both.
    """
    return replace(
        data,
        anchor="session",
        supervise="session",
        sampled_rate=1.0,
        window="none",
        window_offset_seconds=0,
        leave_one_out=LeaveOneOutConfig(),
        stochastic_length=StochasticLengthConfig(),
        fill="sessions",
        budget=0.0,
        sessions_per_partition=8,
        num_negatives=0,
        follow=False,
    )


def integers(name: str, values: Any) -> Ints:
    """Return whole numbers as int64.

    Raises:
        ValueError: if they are something else.
    """
    found = np.asarray(values)
    if found.ndim != 1 or (found.size and not np.issubdtype(found.dtype, np.integer)):
        raise ValueError(f"{name} must be a list of integers, got {found.dtype} {found.shape}")
    return found.astype(np.int64)


def column_array(what: str, column: Column, values: Any, num_rows: int) -> pa.Array:
    """Return the values of a column as the encoder reads them.

    Raises:
        ValueError: if their type or number is wrong.
    """
    try:
        array = values if isinstance(values, pa.Array) else pa.array(values)
        if pa.types.is_null(array.type):
            array = pa.nulls(len(array), TYPES[column.kind])
        if column.kind == "integer" and pa.types.is_floating(array.type):
            raise pa.ArrowInvalid("floating-point numbers where integers are expected")
        array = array.cast(TYPES[column.kind])
    # ArrowNotImplementedError: Arrow has no cast between the two types, of lists to numbers say.
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError) as error:
        raise ValueError(
            f"{what}.{column.name} must hold {column.kind} values, as {column.wanted_by} reads "
            f"them: {error}"
        ) from error
    if len(array) != num_rows:
        raise ValueError(f"{what}.{column.name} must hold {num_rows} values, got {len(array)}")
    return array


def check_finite(
    numbers: Sequence[NDArray[Any]], floats_EG: NDArray[np.float32], tasks: Mapping[str, TaskConfig]
) -> None:
    """Refuse what has a log's sessions rejected.

    Args:
        numbers: values of each feature that is a number.
        floats_EG: labels of the tasks, then dense features.
        tasks: by name, in their order.

    Raises:
        ValueError: naming the task, if it is a label.
    """
    for number, (name, task) in enumerate(tasks.items()):
        if np.isinf(floats_EG[:, number]).any():
            least = f" above {-task.scale:g}" if task.log1p else ""
            raise ValueError(
                f"{task.action} must be null or finite{least}, as data.tasks.{name} reads it"
            )
    if any(bool(np.isinf(x).any()) for x in (*numbers, floats_EG)):
        raise ValueError("numbers must be finite in float32, or null, as a log's must; got inf")
