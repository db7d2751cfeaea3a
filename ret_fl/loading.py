"""From a setting to the plug-ins it names: found, checked, and made with their own settings.

Nothing is fetched, and no path is added: a plug-in is what Python can import where it is called. Every problem is a
`ConfigError` that names the setting.
"""

from __future__ import annotations

import inspect
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from pydantic import BaseModel, ValidationError

from ret_fl.config import ConfigError, RunConfig
from ret_fl.plugins import AGGREGATION, AUDITORS, POINTS, SHARD_POLICIES, Point

DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", re.ASCII)
"""package.module:name, and nothing else that a file name or URL could be."""
BUILT_IN = "built-in"


@dataclass(frozen=True)
class Plugin:
    """A plug-in ready to be called.

    name: as the setting names it. source: 'built-in', the package that registers it, or 'by its path'. about: the
    first line of its docstring. settings: its own, None where it has none.
    """

    name: str
    source: str
    about: str
    settings: BaseModel | None
    call: Callable[..., Any]


def load(point: Point, text: str, options: str = "") -> list[Plugin]:
    """The plug-ins that the value `text` of the point's setting names, made with `options`; its words name none.

    Every plug-in takes the options its `Settings` knows. Raises `ConfigError` for a name that is not there, cannot be
    imported or is no plug-in of this point, and for an option that is bad or that none of them knows.
    """
    given = parse_options(point.options, options)
    found = [(name, _target(point, name)) for name in names(point, text) if name not in point.words]
    known = {key for _, target in found for key in _fields(point, target)}
    unknown = [key for key in given if plain(key) not in known]
    if unknown:
        takers = ", ".join(sorted(k.replace("_", "-") for k in known))
        raise ConfigError(
            f"{point.options}: nothing in {point.setting}={text!r} has a setting {unknown[0]!r} "
            f"(there are: {takers or 'none'})"
        )
    return [_made(point, name, target, given) for name, target in found]


def require_plugins(config: RunConfig, points: Sequence[Point] = POINTS) -> None:
    """Load every plug-in that a run names, to see that it can be had. Raises as `load`."""
    flat = config.to_flat()
    for point in points:
        load(point, str(flat[point.setting]), str(flat[point.options]))


def points_of(dealt: bool) -> list[Point]:
    """Those a server has need of; a run whose samples are dealt deals no more."""
    return [point for point in POINTS if not (dealt and point is SHARD_POLICIES)]


def foreign_plugins(config: RunConfig) -> list[str]:
    """Each plug-in of a run that did not come with ret-fl, in words: setting, name, package and version, options."""
    flat = config.to_flat()
    told = []
    for point in (*POINTS, AGGREGATION):
        for name in names(point, str(flat[point.setting])):
            source = _source(point, name)
            if source != BUILT_IN and name not in point.words:
                options = f", {point.options}: {flat[point.options]}" if flat[point.options] else ""
                told.append(f"{point.setting}: {name} ({source}{options})")
    return told


def names(point: Point, text: str) -> list[str]:
    """The names in a value of the point's setting. Raises `ConfigError` for one that is there twice."""
    text = point.by_name(text.strip())
    parts = [part.strip() for part in text.split("+")] if point.several else [text]
    if twice := next((part for part in parts if parts.count(part) > 1), None):
        raise ConfigError(f"{point.setting}: {twice!r} is named twice (got {text!r})")
    if "none" in point.words and "none" in parts and len(parts) > 1:
        raise ConfigError(f"{point.setting}: 'none' stands alone (got {text!r})")
    return parts


def parse_options(setting: str, text: str) -> dict[str, Any]:
    """'top = 3, near = true' -> {"top": 3, "near": True}: the inside of an inline table of TOML."""
    try:
        document = tomllib.loads(f"options = {{{text}}}")
        if len(document) > 1:  # the text closed the table and went on
            raise ValueError("it is more than one table")
    except ValueError as error:
        raise ConfigError(
            f"{setting} must be KEY = VALUE, joined by commas, as in TOML (got {text!r}): {error}"
        ) from None
    options: dict[str, Any] = document["options"]
    return options


# Finding


@cache
def _installed(group: str) -> tuple[EntryPoint, ...]:
    return tuple(entry_points(group=group))


def entries(point: Point) -> Iterator[EntryPoint]:
    """All plug-ins of a point that have a name: those that come along, then those of installed packages."""
    for name, value in point.built_in.items():
        yield EntryPoint(name, value, point.group)
    yield from _installed(point.group)


def source_of(entry: EntryPoint) -> str:
    """Where an entry comes from."""
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist else BUILT_IN


def _source(point: Point, name: str) -> str:
    if ":" in name:
        return "by its path"
    return next((source_of(e) for e in entries(point) if e.name == name), "not installed here")


def _entry(point: Point, name: str) -> EntryPoint:
    if ":" in name:
        if not DOTTED.fullmatch(name):
            raise ConfigError(f"{point.setting}: {name!r} is no plug-in's path: write package.module:name")
        return EntryPoint(name, name, point.group)
    every = list(entries(point))
    matching = [entry for entry in every if entry.name == name and not _shadowed(point, entry)]
    if len(matching) > 1:
        owners = " and ".join(source_of(entry) for entry in matching)
        paths = " or ".join(entry.value for entry in matching)
        raise ConfigError(f"{point.setting}: {owners} both have a plug-in {name!r}: name it by its path, {paths}")
    if not matching:
        there = [*dict.fromkeys(entry.name for entry in every), *point.words]
        how = f"join some of {', '.join(there)} by '+'" if point.several else f"take one of {' | '.join(there)}"
        raise ConfigError(
            f"{point.setting}: no {point.kind} {name!r}; {how}, or name one as package.module:name. One of a package "
            "has to be installed here (`ret-fl policies` lists them)"
        )
    return matching[0]


def _shadowed(point: Point, entry: EntryPoint) -> bool:
    """Whether a package registers a name that is ret-fl's own: alone it goes on to mean what comes along."""
    return entry.dist is not None and (entry.name in point.built_in or entry.name in point.words)


def imported(point: Point, name: str) -> Any:
    """What a name or path stands for, neither checked nor called. Raises `ConfigError` if it cannot be imported."""
    entry = _entry(point, name)
    try:
        return entry.load()
    except Exception as error:  # importing runs code of others, which may raise anything
        where = "on the server and on every client" if point.side == "client" else f"where the {point.side} runs"
        raise ConfigError(
            f"{point.setting}: {name!r} cannot be imported here: {type(error).__name__}: {error}. Install the package "
            f"it is in, {where}"
        ) from error


def _target(point: Point, name: str) -> Any:
    """The function or class itself."""
    target = imported(point, name)
    taken = _parameters(target)
    if taken != point.parameters:
        has = "cannot be called" if taken is None else f"is called with ({', '.join(taken)})"
        raise ConfigError(
            f"{point.setting}: {name!r} is no {point.kind}: it {has}, and should be called with "
            f"({', '.join(point.parameters)})"
        )
    _fields(point, target)
    return target


def _parameters(target: Any) -> list[str] | None:
    """The names of what a function, or an instance of a class, is called with; None if it cannot be called."""
    call = target
    if isinstance(target, type):
        call = next((vars(c)["__call__"] for c in target.__mro__ if "__call__" in vars(c)), None)
    if not callable(call):
        return None
    try:
        found = list(inspect.signature(call).parameters)
    except ValueError:  # some built-in functions have no signature
        return None
    return found[1:] if isinstance(target, type) else found


# Settings of their own


def settings_model(target: Any) -> type[BaseModel] | None:
    """The `Settings` of a plug-in's class."""
    return getattr(target, "Settings", None) if isinstance(target, type) else None


def plain(key: str) -> str:
    """Dashes in the names of options count as underscores."""
    return key.replace("-", "_")


def _fields(point: Point, target: Any) -> Mapping[str, Any]:
    model = settings_model(target)
    if model is None:
        return {}
    if not (isinstance(model, type) and issubclass(model, BaseModel)):
        raise ConfigError(f"{point.setting}: the Settings of {target.__qualname__} must be a pydantic BaseModel")
    return model.model_fields


def _made(point: Point, name: str, target: Any, given: Mapping[str, Any]) -> Plugin:
    settings = _settings(point, name, target, given)
    call = target
    if isinstance(target, type):
        try:
            call = target() if settings is None else target(settings)
        except Exception as error:  # as above
            raise ConfigError(f"{point.setting}: {name!r} cannot be made: {type(error).__name__}: {error}") from error
    return Plugin(name, _source(point, name), about(target), settings, call)


def _settings(point: Point, name: str, target: Any, given: Mapping[str, Any]) -> BaseModel | None:
    model = settings_model(target)
    if model is None:
        return None
    own = {plain(key): value for key, value in given.items() if plain(key) in model.model_fields}
    try:
        return model.model_validate(own)
    except ValidationError as error:
        raise ConfigError("\n".join(_explained(point, name, model, error))) from None


def _explained(point: Point, name: str, model: type[BaseModel], error: ValidationError) -> Iterator[str]:
    for problem in error.errors():
        key = ".".join(map(str, problem["loc"]))
        if problem["type"] == "missing":
            yield f"{point.options}: {name} needs a value for {key}. {_meaning(model, key)}".rstrip()
        elif key:
            what = f"{key} = {problem['input']!r} is not allowed: {problem['msg']}"
            yield f"{point.options}: {what}. {_meaning(model, key)} ({name})"
        else:
            yield f"{point.options}: {problem['msg']} ({name})"


def _meaning(model: type[BaseModel], key: str) -> str:
    field = model.model_fields.get(plain(key))
    return (field.description if field else None) or ""


def about(target: Any) -> str:
    """The first line of its docstring."""
    return (inspect.getdoc(target) or "").partition("\n")[0]


def load_auditors(text: str, options: str) -> list[Plugin]:
    """The auditors that `audit.auditors` names."""
    return load(AUDITORS, text, options)


# Listing


@dataclass(frozen=True)
class Line:
    """A plug-in as `ret-fl policies` lists it; settings: 'name = default: meaning' of each of its own."""

    name: str
    source: str
    about: str
    settings: list[str]


def described(point: Point, name: str) -> tuple[str, list[str]]:
    """What a plug-in is about, and its settings in words. Raises `ConfigError` as `load`."""
    target = _target(point, name)
    return about(target), list(_settings_told(point, target))


def overview(point: Point, describe: Callable[[Point, str], tuple[str, list[str]]] = described) -> Iterator[Line]:
    """Every plug-in of a point that has a name, its words too. One that cannot be used says why."""
    for entry in entries(point):
        if _shadowed(point, entry):
            yield Line(entry.name, source_of(entry), f"by its path only, {entry.value}: the name is ret-fl's own", [])
            continue
        try:
            what, settings = describe(point, entry.name)
            yield Line(entry.name, source_of(entry), what, settings)
        except ConfigError as error:
            yield Line(entry.name, source_of(entry), f"cannot be used: {error}", [])
    for name, meaning in point.words.items():
        yield Line(name, BUILT_IN, meaning, [])


def _settings_told(point: Point, target: Any) -> Iterator[str]:
    for name, own in _fields(point, target).items():
        default = "required" if own.is_required() else f"= {own.get_default(call_default_factory=True)!r}"
        yield f"{name.replace('_', '-')} {default}: {own.description or ''}".removesuffix(": ")
