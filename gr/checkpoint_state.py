"""The state that a checkpoint keeps: nested dicts of tensors and plain values, by dotted key."""

import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType, MethodType
from typing import Any

import torch

Tensors = dict[str, torch.Tensor]
_SHOWN = 5


def split_state(state: dict[str, Any]) -> tuple[Tensors, dict[str, Any]]:
    """Return the tensors and the plain values of a nested state, by dotted key.

    Raises:
        ValueError: if two leaves share a key, or a leaf is neither a tensor nor plain.
    """
    tensors, values = split_early(state)
    return call_late(tensors, values)


def split_early(state: dict[str, Any]) -> tuple[Tensors, dict[str, Any]]:
    """Do as `split_state` does, but leave functions among the values for `call_late`.

    Raises:
        ValueError: likewise.
    """
    tensors: Tensors = {}
    values: dict[str, Any] = {}
    for key, leaf in _leaves(state, ""):
        if _is_tensor(leaf):
            _add(tensors, key, leaf, values)
        else:
            _add(values, key, leaf if _is_late(leaf) else _plain(key, leaf), tensors)
    return tensors, values


def call_late(tensors: Tensors, values: dict[str, Any]) -> tuple[Tensors, dict[str, Any]]:
    """Return tensors and values with what functions among the values return, nested as a state is.

    Raises:
        ValueError: as `split_state` does.
    """
    tensors = dict(tensors)
    called = {key: value for key, value in values.items() if not _is_late(value)}
    for key, value in values.items():  # in their order: ranks may meet in what is called
        if not _is_late(value):
            continue
        late_tensors, late_values = split_early({key: value()})
        for name, tensor in late_tensors.items():
            _add(tensors, name, tensor, called)
        for name, leaf in late_values.items():
            _add(called, name, _plain(name, leaf), tensors)  # and no function again
    return tensors, called


def _add(part: dict[str, Any], key: str, leaf: Any, other: dict[str, Any]) -> None:
    if key in part or key in other:
        raise ValueError(f"two parts of the state have the key {key!r}: rename one")
    part[key] = leaf


def fingerprint(tensors: dict[str, dict[str, Any]]) -> str:
    """Return a hash of keys, shapes and dtypes: equal for equal models."""
    rows = [[key, each["shape"], each["dtype"]] for key, each in sorted(tensors.items())]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


def _leaves(node: dict[Any, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        name = f"{prefix}.{key}" if prefix else str(key)
        if isinstance(value, dict):
            yield from _leaves(value, name)
        else:
            yield name, value


def _is_late(leaf: Any) -> bool:
    return isinstance(leaf, FunctionType | MethodType)


def _is_tensor(leaf: Any) -> bool:
    # A ShardedTensor is no subclass of Tensor.
    return isinstance(leaf, torch.Tensor) or hasattr(leaf, "local_shards")


def _plain(key: str, value: Any) -> Any:
    """Return the value as JSON gives it back (tuples are lists)."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_plain(key, inner) for inner in value]
    if isinstance(value, dict) and all(isinstance(name, str) for name in value):
        return {name: _plain(key, inner) for name, inner in value.items()}
    raise ValueError(
        f"state {key!r}: expected a tensor, number, text, or list of plain values, found "
        f"{type(value).__name__}. Tensors go into dicts, not into lists."
    )


def put(state: dict[Any, Any], key: str, value: Any) -> None:
    """Set the leaf of a nested state at a dotted key, whose parts may hold dots themselves."""
    names = {str(name): name for name in state}
    for name, original in names.items():
        if key == name:
            state[original] = value
            return
        if key.startswith(f"{name}.") and isinstance(state[original], dict):
            put(state[original], key[len(name) + 1 :], value)
            return
    first, _, rest = key.partition(".")
    if rest:
        state[first] = {}  # absent, or a placeholder such as None
        put(state[first], rest, value)
    else:
        state[first] = value


def describe(tensors: Tensors) -> dict[str, dict[str, Any]]:
    """Return global shape, dtype and bytes of each tensor, for JSON."""
    described = {}
    for key, tensor in tensors.items():
        if hasattr(tensor, "local_shards"):
            # A ShardedTensor's own size() and dtype warn that the class is on its way out.
            metadata = tensor.metadata()  # type: ignore[attr-defined]
            shape, dtype = metadata.size, metadata.tensor_properties.dtype
        else:
            shape, dtype = tensor.shape, tensor.dtype
        described[key] = {
            "shape": list(shape),
            "dtype": str(dtype).removeprefix("torch."),
            "bytes": math.prod(shape) * dtype.itemsize,
        }
    return described


def check_same_model(path: Path, found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Compare the descriptions of a checkpoint's tensors with those of a run.

    Raises:
        ValueError: naming the first tensors that only one has, or that differ in shape or dtype.
    """
    differences = []
    for key in sorted({*expected, *found}):
        if key not in found:
            differences.append(f"only this run has {key}")
        elif key not in expected:
            differences.append(f"only the checkpoint has {key}")
        elif expected[key] != found[key]:
            theirs, ours = (_shape_text(each[key]) for each in (found, expected))
            differences.append(f"{key} is {theirs} in the checkpoint, {ours} in this run")
    if differences:
        more = f"; and {len(differences) - _SHOWN} more" if len(differences) > _SHOWN else ""
        raise ValueError(
            f"{path} is a checkpoint of another model (fingerprint {fingerprint(found)}, this run "
            f"{fingerprint(expected)}): {'; '.join(differences[:_SHOWN])}{more}. Resume it with "
            "the configuration that it was trained with, or start a new run_dir."
        )


def _shape_text(each: dict[str, Any]) -> str:
    return f"{tuple(each['shape'])} {each['dtype']}"


def check_values(path: Path, stored: dict[str, Any], expected: dict[str, Any]) -> None:
    """Compare the keys of a checkpoint's plain values with those that a run restores.

    Raises:
        ValueError: naming the keys that the checkpoint lacks.
    """
    lacking = [key for key in expected if key not in stored]
    # A value that is a dict in the checkpoint may be None or a number in a fresh state.
    lacking = [k for k in lacking if not any(name.startswith(f"{k}.") for name in stored)]
    if lacking:
        raise ValueError(
            f"{path} lacks the value(s) {lacking[:_SHOWN]} that this run restores. It was saved by "
            "another version of this code: resume with that version, or start a new run_dir."
        )
