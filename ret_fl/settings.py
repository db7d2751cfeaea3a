"""Settings from the outside: preset files, KEY=VALUE changes, and the folders of new and resumed runs."""

from __future__ import annotations

import datetime
import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ret_fl.config import ConfigError, RunConfig, Scalar
from ret_fl.rundir import RunDir

FIXED = ("shards", "seed", "data.", "partition.", "model.", "text.", "lora.", "diffusion.", "agc.bins", "dp.mode")
"""What a resumed run cannot change: its checkpoint was made with it."""
MOVABLE = (
    "data.path",
    "data.held-out-path",
    "data.cache-dir",
    "model.init-from",
    "model.gradient-checkpointing",
    "text.cache",
    "text.guidance",
)
"""What it can: where the same data and model lie now, whose fingerprints are checked; what saves memory; how it draws
at its end."""


def parse_change(text: str) -> tuple[str, Scalar]:
    """'agc.mem-ratio=2' -> ('agc.mem-ratio', 2). Values are numbers, true or false, or text (quotes optional)."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set wants KEY=VALUE (got {text!r})")
    try:
        parsed = tomllib.loads(f"value = {value.strip()}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value.strip()
    if isinstance(parsed, datetime.date | datetime.time):
        parsed = value.strip()
    if not isinstance(parsed, bool | int | float | str):
        raise ConfigError(f"--set {key}: {value!r} is not one number, true or false, or text")
    return key.strip(), parsed


EXTENDS = "extends"


def read_preset(path: Path, within: Path | None = None) -> dict[str, Scalar]:
    """Settings of a TOML file, dotted (`agc.mode = "off"`) or in sections (`[agc]`).

    `extends = "other.toml"` starts from the settings of that file, beside this one. within: only of files that lie in
    this folder; what one of them extends outside of it is left out.
    """
    return _read_preset(path, (), within)


def _read_preset(path: Path, extended_by: tuple[Path, ...], within: Path | None) -> dict[str, Scalar]:
    if path.resolve() in extended_by:
        raise ConfigError(f"--preset {path}: it extends itself")
    try:
        with path.open("rb") as file:
            own = flatten(tomllib.load(file))
    except OSError as error:
        raise ConfigError(f"--preset: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"--preset {path}: {error}") from None
    base = own.pop(EXTENDS, None)
    if base is None:
        return own
    extended = path.parent / str(base)
    if within is not None and extended.resolve().parent != within.resolve():
        return own
    return _read_preset(extended, (*extended_by, path.resolve()), within) | own


def from_options(preset: Path | None, changes: Sequence[str] | None) -> dict[str, Scalar]:
    """What --preset and --set say, the latter on top. Raises `ConfigError`."""
    return (read_preset(preset) if preset else {}) | dict(parse_change(text) for text in changes or [])


def flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, Scalar]:
    """Nested tables as flat settings: {"agc": {"mode": "off"}} -> {"agc.mode": "off"}; dotted keys stay as they are."""
    flat: dict[str, Scalar] = {}
    for key, value in table.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


def to_toml(flat: Mapping[str, Scalar]) -> str:
    """Flat settings as the text of a TOML file."""
    return "".join(f"{key} = {_toml_value(value)}\n" for key, value in flat.items())


def _toml_value(value: Scalar) -> str:
    if isinstance(value, float):
        return repr(value)  # 1e-05, inf and nan are TOML's too
    # JSON's other scalars are TOML's, but for the surrogate pairs it escapes to and the DEL it does not escape
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def new_run(settings: Mapping[str, Scalar], out: Path | None) -> tuple[RunDir, RunConfig]:
    """Folder and config of a new run; the folder exists, and its clients keep their state inside it."""
    config = RunConfig.from_flat(settings)
    chosen = RunDir.choose(config, out)
    local = {"out": str(chosen.path), "state-dir": config.state_dir or str(chosen.path / "proxies")}
    chosen.path.mkdir(parents=True, exist_ok=True)
    return chosen, RunConfig.from_flat(config.to_flat() | local)


def change_run(path: Path, settings: Mapping[str, Scalar]) -> tuple[RunDir, RunConfig]:
    """Folder and config of a run to resume, with `settings` changed in its config.json.

    Raises `ConfigError` for a change that does not fit the checkpoint, such as another number of shards.
    """
    run = RunDir.existing(path)
    before = run.read_config().to_flat()
    frozen = [k for k, v in settings.items() if k.startswith(FIXED) and k not in MOVABLE and v != before.get(k)]
    if frozen:
        raise ConfigError(
            f"a resumed run keeps its {', '.join(frozen)} (it has {', '.join(str(before.get(k)) for k in frozen)}): "
            "start a new run to change that"
        )
    config = RunConfig.from_flat(before | dict(settings))
    norm = "dp.clipping-norm"
    if "adaptive" in config.dp.mode and settings.get(norm, before[norm]) != before[norm]:
        raise ConfigError(
            f"{norm} is where dp.mode={config.dp.mode} starts from, and a resumed run goes on with the norm it has "
            "come to (clipping_norm in metrics.jsonl); start a new run to change that"
        )
    if config.averages != RunConfig.from_flat(before).averages:
        raise ConfigError(
            f"a resumed run keeps its proxies together or apart: aggregate-every={before['aggregate-every']} cannot "
            f"become {config.aggregate_every}; start a new run to change that"
        )
    if settings:
        run.write_config(config)
    return run, config
