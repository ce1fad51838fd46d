"""YAML files and ``key.path=value`` overrides, read strictly into frozen dataclasses.

Every dataclass lives beside the code that uses it; this file only fills them. An unknown key, a wrong type, or a value
that a dataclass refuses raises ConfigError with the path of the key, the value, and the valid values.
"""
import dataclasses
import re
import types
import typing
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

import yaml

T = TypeVar("T")


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key, the value and the valid values."""


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which here refuses repeated keys and reads ``1e-3`` as a number (YAML 1.2)."""


def _mapping_without_duplicates(loader: _Loader, node: yaml.MappingNode) -> dict:
    seen: set = set()
    for key_node, _ in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            raise ConfigError(f"line {key_node.start_mark.line + 1}: a key must be a word, not a list or a mapping")
        key = loader.construct_object(key_node)
        if key in seen:
            raise ConfigError(f"line {key_node.start_mark.line + 1}: key '{key}' is given twice")
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


def _float(loader: _Loader, node: yaml.ScalarNode) -> Any:
    return float(loader.construct_scalar(node))


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping_without_duplicates)
_Loader.add_constructor("!exponent", _float)
# YAML 1.1 reads 1e-3 as a string because it has no dot; in a configuration it is always meant as a number
_Loader.add_implicit_resolver("!exponent", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
                              list("-+0123456789"))


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises ConfigError for a missing, unreadable or non-mapping file."""
    path = Path(path)
    if not path.is_file():
        near = sorted(str(p) for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        raise ConfigError(f"no config file {path}" + (f"; found there: {', '.join(near)}" if near else ""))
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ConfigError(f"{path} is not valid YAML: it is nested too deeply") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must hold a mapping of keys, not {type(data).__name__}")
    return data


def apply_overrides(data: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """A copy of ``data`` with every ``key.path=value`` of ``overrides`` set; values are read as YAML."""
    data = _copy(data)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"override '{override}' is not of the form key.path=value")
        try:
            value = yaml.load(text, Loader=_Loader)
        except (yaml.YAMLError, RecursionError):
            raise ConfigError(f"override '{override[:200]}': the value is not valid YAML") from None
        *parents, last = key.split(".")
        node = data
        for name in parents:
            if node.get(name) is None:
                node[name] = {}
            node = node[name]
            if not isinstance(node, dict):
                raise ConfigError(f"override '{override}': '{name}' is a value, it has no keys below it")
        node[last] = value
    return data


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    return list(value) if isinstance(value, list) else value


def from_dict(cls: type[T], data: Any, path: str = "") -> T:
    """An instance of the dataclass ``cls`` from plain YAML data; raises ConfigError naming the key otherwise.

    A class whose keys have changed has a static method ``upgrade(data)``, which gives older data its present keys.
    """
    where = path or "the configuration"
    if not isinstance(data, dict):
        raise ConfigError(f"{where}: expected a mapping of keys, got {data!r}")
    data = getattr(cls, "upgrade", dict)(data)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]
    for key in data:
        if key not in fields:
            raise ConfigError(f"unknown key '{_join(path, key)}'; valid keys here: {', '.join(sorted(fields))}")
    hints = typing.get_type_hints(cls)
    values = {}
    for name, field in fields.items():
        if name in data:
            values[name] = _convert(hints[name], data[name], _join(path, name))
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"missing key '{_join(path, name)}' ({_describe(hints[name])})")
    try:
        return cls(**values)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{path + '.' if path else ''}{error}") from None


def to_dict(config: Any) -> Any:
    """A dataclass as plain YAML data, such that ``from_dict(type(config), to_dict(config)) == config``."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {field.name: to_dict(getattr(config, field.name)) for field in dataclasses.fields(config) if field.init}
    if isinstance(config, (list, tuple)):
        return [to_dict(item) for item in config]
    if isinstance(config, dict):
        return {key: to_dict(item) for key, item in config.items()}
    return config


def _join(path: str, name: Any) -> str:
    return f"{path}.{name}" if path else str(name)


def _describe(hint: Any) -> str:
    """The values that a type allows, in words."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(map(str, args))
    if origin is tuple:
        return f"a list{'' if args[-1] is Ellipsis else f' of {len(args)}'}, each {_describe(args[0])}"
    if origin in (Union, types.UnionType):
        return " or ".join("null" if arg is type(None) else _describe(arg) for arg in args)
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return names.get(hint, "a mapping of keys" if dataclasses.is_dataclass(hint) else str(hint))


def _convert(hint: Any, value: Any, path: str) -> Any:
    """``value`` as the type ``hint``; raises ConfigError naming ``path`` if it is none of its values."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        kinds = [arg for arg in args if arg is not type(None)]
        if len(kinds) == 1:
            return _convert(kinds[0], value, path)
        if type(value) in kinds:
            return value
    if dataclasses.is_dataclass(hint):
        return from_dict(hint, value, path)  # type: ignore[arg-type]
    if origin is tuple and isinstance(value, (list, tuple)):
        items = args[:1] * len(value) if args[-1] is Ellipsis else args
        if len(items) == len(value):
            return tuple(_convert(item, v, f"{path}[{i}]") for i, (item, v) in enumerate(zip(items, value)))
    elif origin is dict and isinstance(value, dict):
        return {_convert(args[0], k, path): _convert(args[1], v, _join(path, k)) for k, v in value.items()}
    elif origin is Literal:
        if value in args and type(value) in {type(arg) for arg in args}:
            return value
    elif hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        if isinstance(value, float) and value == value or abs(value) < 1e300:  # neither NaN nor too large for a float
            return float(value)
    elif hint is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    elif hint in (bool, str) and isinstance(value, hint):
        return value
    raise ConfigError(f"{path}: got {value!r}; valid: {_describe(hint)}")
