"""Data behind a URL (object stores, NFS gateways, archives: whatever fsspec speaks), copied once to the local cache."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ret_fl.config import ConfigError, DataConfig
from ret_fl.data.decode import cache_dir
from ret_fl.files import write_atomically

logger = logging.getLogger(__name__)

_DOWNLOADS = 8  # at a time: an object store answers slowly, but many at once


def is_url(path: str) -> bool:
    """Whether data.path is a URL (s3://bucket/photos) rather than a path or a hub name."""
    return re.match(r"[a-z][a-z0-9+.-]*(::[a-z][a-z0-9+.-]*)*://", path) is not None


def mirrored(config: DataConfig) -> DataConfig:
    """The same settings with the URL in data.path replaced by the local folder or files that now mirror it.

    Files that have not changed since the last call are not copied again, and files that are gone there are removed
    here. The URL may be a folder, a file or, with * ? [ in its last part, a pattern of files. Credentials are fsspec's
    business (environment, configuration files); no message shows any, even if the URL holds some.

    Raises:
        ConfigError: nothing is there, it cannot be reached, or the package for this kind of URL is missing.
    """
    shown = re.sub(r"//[^/@]*@", "//", config.path)
    folder = cache_dir(config) / "remote" / hashlib.sha256(config.path.encode()).hexdigest()[:32]
    try:
        fs, root, rest, infos = _listing(config.path)
        copies = {_below(root, path): _Copy(path, _version(info)) for path, info in infos.items()}
        if not copies:
            raise ConfigError(f"data.path: no files at {shown}")
        _update(fs, copies, folder)
    except ImportError as error:  # fsspec names the package to install
        raise ConfigError(f"data.path: {shown}: {error}") from None
    except ConfigError:
        raise
    except Exception as error:  # each file system of fsspec raises what it likes, and its text may quote the URL
        raise ConfigError(f"data.path: cannot read {shown}: {type(error).__name__}") from None
    return config.model_copy(update={"path": str(folder / "files" / rest)})


@dataclass(frozen=True)
class _Copy:
    """A remote file, and a text that changes when it does."""

    path: str
    version: str


def _listing(url: str) -> tuple[Any, str, str, dict[str, dict[str, Any]]]:
    """File system, the folder of its files, the file or pattern asked for in it ('' for all), what is told of each.

    Raises `ConfigError` for a pattern of folders.
    """
    import fsspec

    fs, path = fsspec.core.url_to_fs(url)
    parent, _, name = path.rstrip("/").rpartition("/")
    if re.search(r"[*?[]", path):
        if re.search(r"[*?[]", parent):
            raise ConfigError("data.path: in a URL only the last part may be a pattern")
        found = fs.glob(path, detail=True)
        return fs, parent, name, {p: info for p, info in found.items() if info["type"] == "file"}
    if fs.isfile(path):
        return fs, parent, name, {path: fs.info(path)}
    return fs, path.rstrip("/"), "", fs.find(path, detail=True)


def _below(root: str, path: str) -> str:
    """The path relative to `root`. Raises `ConfigError` for a name that would leave the mirror."""
    name = path.removeprefix(root).lstrip("/")
    if "\\" in name or "\0" in name or any(part in ("", ".", "..") for part in name.split("/")):
        raise ConfigError(f"data.path: {name!r} is no name for a file")
    return name


def _version(info: dict[str, Any]) -> str:
    """A hash of all that the file system tells of a file: size, ETag or time of change, ..."""
    told = sorted((key, repr(value)) for key, value in info.items())
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]


def _update(fs: Any, copies: dict[str, _Copy], folder: Path) -> None:
    """Bring folder/files to what `copies` says; folder/versions.json tells which versions it holds.

    Each file appears whole or not at all, so that two processes may do this at once.
    """
    files, notes = folder / "files", folder / "versions.json"
    files.mkdir(parents=True, exist_ok=True)
    held = json.loads(notes.read_text(encoding="utf-8")) if notes.exists() else {}
    stale = [n for n, copy in copies.items() if held.get(n) != copy.version or not (files / n).is_file()]
    if stale:
        logger.info("copying %d of %d files to %s", len(stale), len(copies), folder)

    def download(name: str) -> None:
        scratch = folder / f"{uuid.uuid4().hex}.tmp"
        try:
            fs.get_file(copies[name].path, str(scratch))
            (files / name).parent.mkdir(parents=True, exist_ok=True)
            scratch.replace(files / name)
        finally:
            scratch.unlink(missing_ok=True)

    with ThreadPoolExecutor(_DOWNLOADS) as pool:
        list(pool.map(download, stale))
    for path in files.rglob("*"):
        if path.is_file() and path.relative_to(files).as_posix() not in copies:
            path.unlink()
    write_atomically(notes, json.dumps({name: copy.version for name, copy in copies.items()}))
