"""What the preset files say of themselves in their first comment: command, title, data, size.

# ret-fl run --preset simulations/presets/NAME.toml
#
# A title of one sentence, that may go on
# over lines.
# Data: what must lie where
#   (indented lines go on)
# Size: parameters, memory, images seen
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ret_fl.config import ConfigError

FOLDER = Path("simulations/presets")
CONTROLS = "controls"
"""Sub-folder of the controls: what a method is to be compared with. Studies name them, too."""
FIELDS = ("Data", "Size")


@dataclass(frozen=True)
class Preset:
    """A preset file's first comment; `command` is the line that runs it."""

    path: Path
    command: str
    title: str
    data: str
    size: str

    @property
    def name(self) -> str:
        """As `ret-fl presets` lists it: cifar10, controls/central."""
        return f"{CONTROLS}/{self.path.stem}" if self.path.parent.name == CONTROLS else self.path.stem

    @classmethod
    def read(cls, path: Path) -> Preset:
        """Raises `ConfigError` if the file's first comment is none of this form."""
        lines = list(_first_comment(path))
        command, parts = lines[0] if lines else "", {"title": ""}
        filled = "title"
        for line in lines[2:]:
            name, colon, text = line.partition(": ")
            if not line:
                break
            if colon and name in FIELDS:
                filled = name
                parts[name] = text
            else:
                parts[filled] = f"{parts[filled]} {line.strip()}".strip()
        missing = [field for field in ("title", *FIELDS) if not parts.get(field)]
        if not command.startswith("ret-fl ") or missing:
            raise ConfigError(
                f"{path}: its first comment must be the command, an empty line, a title, and lines that begin with "
                f"{' and '.join(f'{field}:' for field in FIELDS)}"
            )
        return cls(path, command, parts["title"], parts["Data"], parts["Size"])


def _first_comment(path: Path) -> Iterator[str]:
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            return
        yield line.removeprefix("#").removeprefix(" ")


def all_presets(app: Path) -> list[Preset]:
    """The presets of an app folder by name, controls last. Raises `ConfigError` as `Preset.read`."""
    folders = (app / FOLDER, app / FOLDER / CONTROLS)
    return [Preset.read(path) for folder in folders for path in sorted(folder.glob("*.toml"), key=lambda p: p.stem)]


def named(presets: Sequence[Preset], names: Sequence[str]) -> list[Preset]:
    """Those of these names, in their order; all without names. Raises `ConfigError` for a name that is none."""
    by_name = {preset.name: preset for preset in presets}
    unknown = [name for name in names if name not in by_name]
    if unknown:
        raise ConfigError(f"no preset is called {', '.join(unknown)}: there are {', '.join(by_name)}")
    return [by_name[name] for name in names] or list(presets)
