"""YAML and overrides to a checked configuration object; every failure is one readable message.

Order: defaults of the dataclass < `base:` chain of the file < the file < overrides. Free of torch.
"""

import difflib
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

T = TypeVar("T")
BASE = "base"
_defaults: Any = cache(OmegaConf.structured)  # a quarter of a load


class ConfigError(ValueError):
    """A configuration that cannot be used; the message says where, why and what to do."""


def load_config(
    schema: type[T], path: str | Path | None, overrides: Sequence[str] = ()
) -> tuple[T, DictConfig]:
    """Read a configuration file.

    Args:
        schema: dataclass that defines keys, types and defaults.
        path: YAML file. Its key `base:` names a file, relative to its own folder, that it
            extends, unless the schema has a field of that name. None: defaults and overrides only.
        overrides: `key.path=value`, the value in YAML.

    Returns:
        The object, and the same as plain containers with all interpolations resolved.

    Raises:
        ConfigError: for anything that is wrong with the file or an override.
    """
    config = _defaults(schema)
    extends = BASE not in get_type_hints(schema)
    layers = [] if path is None else _read_chain(Path(path), (), extends)
    layers += [_read_override(text) for text in overrides]
    path = path or "defaults"
    typed = [(source, _typed(schema, layer, (), source)) for source, layer in layers]
    try:
        config = OmegaConf.merge(config, *(layer for _, layer in typed))
    except (OmegaConfBaseException, TypeError):
        for source, layer in typed:  # slower, but it names layer and key
            config = _merge(config, schema, source, layer)
    try:
        resolved = DictConfig(OmegaConf.to_container(config, resolve=True))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {error.full_key}: {_first_line(error)}") from error
    missing = sorted(OmegaConf.missing_keys(resolved))
    if missing:
        raise ConfigError(
            f"{path}: required key(s) not set: {', '.join(missing)}. "
            f"Set them in the file, or on the command line as {missing[0]}=VALUE."
        )
    try:
        built: T = OmegaConf.to_object(config)  # type: ignore[assignment]
    except ValueError as error:
        where = _failing_part(config)
        raise ConfigError(f"{path}: {where}{_first_line(error)}") from error
    return built, resolved


def _read_chain(
    path: Path, parents: tuple[Path, ...], extends: bool
) -> list[tuple[str, dict[str, Any]]]:
    """Return (source, content) of the file and of all that it extends, the remotest base first."""
    if path.resolve() in parents:
        chain = " -> ".join(str(p) for p in (*parents, path.resolve()))
        raise ConfigError(
            f"{path}: `base:` leads back to the file itself ({chain}). Break the circle."
        )
    try:
        content = yaml_mapping(path.read_text(encoding="utf-8"), str(path))
    except FileNotFoundError as error:
        found_in = f" (named by `base:` of {parents[-1]})" if parents else ""
        raise ConfigError(f"{path}: no such file{found_in}. Expected a YAML file.") from error
    except (IsADirectoryError, PermissionError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML: {error}") from error
    base = content.pop(BASE, None) if extends else None
    if base is None:
        return [(str(path), content)]
    if not isinstance(base, str):
        raise ConfigError(f"{path}: base: expected the path of one file, found {base!r}")
    return [
        *_read_chain(path.parent / base, (*parents, path.resolve()), extends),
        (str(path), content),
    ]


def yaml_mapping(text: str, source: str) -> dict[str, Any]:
    """Return the YAML mapping in `text`.

    Args:
        text: YAML, with OmegaConf's reading of numbers (1e-3 is one) and no repeated keys.
        source: names the text in messages.

    Raises:
        ConfigError: if it is no YAML, or no mapping of names.
    """
    try:
        content = OmegaConf.to_container(OmegaConf.create(text))
    except YAMLError as error:
        raise ConfigError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"{source}: {error.full_key}: {_first_line(error)}") from error
    if not isinstance(content, dict) or content == {text.strip(): None}:
        raise ConfigError(f"{source}: expected `key: value` lines, found {text.strip()[:60]!r}")
    for key in _keys(content):
        if not isinstance(key, str):
            raise ConfigError(f"{source}: keys must be text, found {key!r}. Put it in quotes.")
    return {str(key): value for key, value in content.items()}


def _keys(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        yield from value
        for inner in value.values():
            yield from _keys(inner)


def _read_override(text: str) -> tuple[str, dict[str, Any]]:
    source = f"override {text!r}"
    key, separator, value = text.partition("=")
    parts = key.split(".")
    if not separator or not all(parts) or key != key.strip():
        raise ConfigError(f"{source}: expected key=value, as in model.num_layers=4")
    layer: Any = yaml_mapping(f"value: {value}", source)["value"]
    for part in reversed(parts):
        layer = {part: layer}
    return source, layer


def _typed(
    schema: type, layer: Mapping[str, Any], at: tuple[str, ...], source: str
) -> dict[str, Any]:
    """Check the keys of a layer; type the dataclasses in lists, which OmegaConf leaves untyped."""
    hints = get_type_hints(schema)
    known = [f.name for f in fields(schema)]
    typed: dict[str, Any] = {}
    for key, value in layer.items():
        where = (*at, key)
        if key not in hints:
            near = difflib.get_close_matches(key, known, n=1)
            advice = f"Did you mean {'.'.join((*at, near[0]))}? " if near else ""
            raise ConfigError(
                f"{source}: unknown key {'.'.join(where)}. {advice}"
                f"Keys of {'.'.join(at) or 'the file'}: {', '.join(known)}."
            )
        typed[key] = _typed_value(hints[key], value, where, source)
    return typed


def _typed_value(hint: Any, value: Any, at: tuple[str, ...], source: str) -> Any:
    inner = get_args(hint)
    if is_dataclass(hint):
        if not isinstance(value, dict):
            raise _wrong(source, at, hint, value)
        return _typed(hint, value, at, source)  # type: ignore[arg-type]
    if get_origin(hint) is dict and is_dataclass(inner[1]) and isinstance(value, dict):
        return {k: _typed_value(inner[1], v, (*at, k), source) for k, v in value.items()}
    if get_origin(hint) is dict and not isinstance(value, dict):
        raise _wrong(source, at, hint, value)
    if get_origin(hint) is tuple and is_dataclass(inner[0]) and isinstance(value, list):
        elements = []
        for index, element in enumerate(value):
            where = (*at, str(index))
            checked = _typed_value(inner[0], element, where, source)
            node = OmegaConf.structured(inner[0])
            elements.append(_merge(node, inner[0], source, checked, where))  # type: ignore[arg-type]
        return elements
    nested = isinstance(value, list) and any(isinstance(x, dict | list) for x in value)
    if get_origin(hint) is tuple and nested:
        raise _wrong(source, at, hint, value)  # OmegaConf would turn the inner list into text
    return value


def _merge(
    config: Any, schema: type, source: str, layer: Mapping[str, Any], at: tuple[str, ...] = ()
) -> Any:
    """Merge a layer; if that fails, find the key by merging its leaves one at a time."""
    try:
        return OmegaConf.merge(config, layer)
    except (OmegaConfBaseException, TypeError) as failure:
        for path, value in _leaves(layer, ()):
            single: Any = value
            for part in reversed(path):
                single = {part: single}
            try:
                OmegaConf.merge(config, single)
            except (OmegaConfBaseException, TypeError) as error:
                hint, depth = _hint(schema, path)
                found = value if depth == len(path) else {path[depth]: "..."}
                raise _wrong(source, (*at, *path[:depth]), hint, found) from error
        raise ConfigError(f"{source}: {_first_line(failure)}") from failure


def _leaves(layer: Any, at: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(layer, dict) and layer:
        for key, value in layer.items():
            yield from _leaves(value, (*at, key))
    else:
        yield at, layer


def _hint(schema: Any, path: Sequence[str]) -> tuple[Any, int]:
    """Return the type that belongs at `path`, and how far into `path` there is one."""
    hint = schema
    for depth, part in enumerate(path):
        if is_dataclass(hint):
            hint = get_type_hints(hint)[part]
        elif get_origin(hint) is dict:
            hint = get_args(hint)[1]
        else:
            return hint, depth
    return hint, len(path)


def _wrong(source: str, at: tuple[str, ...], hint: Any, value: Any) -> ConfigError:
    found = "nothing" if value is None else f"{value!r} ({type(value).__name__})"
    advice = " Write '' for an empty text." if value is None and hint is str else ""
    return ConfigError(
        f"{source}: {'.'.join(at)}: expected {describe(hint)}, found {found}.{advice}"
    )


def describe(hint: Any) -> str:
    """Return what a type asks for, in words."""
    names = {int: "an integer", float: "a number", bool: "true or false", str: "text"}
    if hint in names:
        return names[hint]
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return f"one of {', '.join(str(choice) for choice in inner)}"
    if origin is tuple and inner[-1] is Ellipsis:
        return f"a list, each element {describe(inner[0])}"
    if origin is tuple:
        return f"a list of {len(inner)}: {', '.join(describe(part) for part in inner)}"
    if origin is dict:
        return f"a mapping from names to {describe(inner[1])}"
    if origin in (Union, types.UnionType):
        return " or ".join(describe(part) for part in inner)
    if is_dataclass(hint):
        return f"a mapping with keys among {', '.join(f.name for f in fields(hint))}"
    return "a value" if hint is Any else str(hint)


def _failing_part(config: DictConfig) -> str:
    """Return "KEY: " of the innermost part whose own checks fail, or nothing if it is the whole."""
    for path, node in _structured_parts(config, ()):
        try:
            OmegaConf.to_object(node)
        except ValueError:
            return f"{'.'.join(path)}: " if path else ""
    return ""


def _structured_parts(
    node: DictConfig, at: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], DictConfig]]:
    for key, value in node.items():
        if isinstance(value, DictConfig):
            yield from _structured_parts(value, (*at, str(key)))
    yield at, node


def _first_line(error: Exception) -> str:
    return str(error).split("\n", 1)[0] if isinstance(error, OmegaConfBaseException) else str(error)
