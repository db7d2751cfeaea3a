"""The folder of an audit: audit.json for tools, report.html for people, pictures.npz to render the report again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from ret_fl.audit.report import Pictures, write_report
from ret_fl.audit.schema import Audit
from ret_fl.files import write_atomically
from ret_fl.pictures import Pairs

NUMBERS, PAGE, PICTURES = "audit.json", "report.html", "pictures.npz"


def save_audit(
    folder: Path,
    audit: Audit,
    pictures: Pictures,
    *,
    baseline: Audit | None = None,
    others: Sequence[Audit] = (),
    early_stop: Sequence[Audit] = (),
) -> None:
    """Write numbers, pictures and report into `folder`; the others as in `write_report`."""
    folder.mkdir(parents=True, exist_ok=True)
    _save_pictures(folder / PICTURES, pictures)
    write_report(folder / PAGE, audit, pictures, baseline=baseline, others=others, early_stop=early_stop)
    write_atomically(folder / NUMBERS, audit.model_dump_json(indent=2) + "\n")


def load_audit(folder: Path) -> tuple[Audit, Pictures]:
    """An audit saved before. `folder` may be a run's, whose audit lies in its audit/.

    Raises:
        FileNotFoundError: no audit there.
        ValueError: audit.json is damaged or of another version.
    """
    found = find_audit(folder)
    try:
        audit = Audit.model_validate_json((found / NUMBERS).read_text(encoding="utf-8"))
    except ValidationError as error:
        raise ValueError(f"{found / NUMBERS} is damaged or of another version: {error.errors()[0]['msg']}") from None
    return audit, _load_pictures(found / PICTURES)


def find_audit(folder: Path) -> Path:
    """The folder that holds audit.json: this one, or audit/ in a run's. Raises `FileNotFoundError`."""
    found = next((f for f in (folder, folder / "audit") if (f / NUMBERS).is_file()), None)
    if found is None:
        raise FileNotFoundError(f"{folder} holds no audit ({NUMBERS}): make one with `ret-fl audit {folder}`")
    return found


def _save_pictures(path: Path, pictures: Pictures) -> None:
    arrays: dict[str, np.ndarray] = {"rows": np.array(json.dumps(list(pictures.rows)))}
    images = {"samples": pictures.samples, "suspects": pictures.suspects}
    if pictures.worst is not None:
        images |= {"generated": pictures.worst.generated, "originals": pictures.worst.originals}
        arrays["ratio"] = pictures.worst.ratio.numpy()
    arrays |= {name: _to_bytes(values) for name, values in images.items() if values is not None}
    arrays |= {f"losses/{name}": values for name, values in pictures.losses.items()}
    if pictures.skip_by_timestep is not None:
        arrays["skip_timesteps"], arrays["skip_share"] = pictures.skip_by_timestep
    temporary = path.with_suffix(".tmp.npz")
    np.savez_compressed(temporary, **arrays)  # type: ignore[arg-type]
    temporary.replace(path)


def _load_pictures(path: Path) -> Pictures:
    """The pictures saved beside an audit; none where the file was taken away."""
    if not path.is_file():
        return Pictures()
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}

    def unit(name: str) -> Tensor | None:
        return torch.from_numpy(arrays[name]).float() / 255 if name in arrays else None

    generated, originals = unit("generated"), unit("originals")
    worst = None
    if generated is not None and originals is not None:
        worst = Pairs("", generated, originals, torch.from_numpy(arrays["ratio"]))
    skips = (arrays["skip_timesteps"], arrays["skip_share"]) if "skip_share" in arrays else None
    return Pictures(
        samples=unit("samples"),
        worst=worst,
        suspects=unit("suspects"),
        rows=json.loads(str(arrays["rows"])),
        losses={n.removeprefix("losses/"): values for n, values in arrays.items() if n.startswith("losses/")},
        skip_by_timestep=skips,
    )


def _to_bytes(images: Tensor) -> np.ndarray:
    return (images.clamp(0, 1) * 255).round().byte().numpy()
