"""Pages of a study's results: Markdown tables, the copy-quality plane of each dataset, pictures, summary.json."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ret_fl.audit import plots
from ret_fl.audit.folder import NUMBERS, load_audit
from ret_fl.audit.plane import place_labels
from ret_fl.files import write_atomically
from ret_fl.pictures import Pairs, save_pairs
from simulations.grid import CellWaitsError, Study
from simulations.results import (
    Point,
    ResultsFile,
    Row,
    at_precision,
    at_share,
    cr_interval,
    curve,
    early_stop_fd,
    of_seeds,
    own_seeds,
)
from simulations.study import point_folder

DEFAULT = "default"
"""The method that stands for the shipped defaults."""
PRECISION_GIVEN_UP = 0.05
PICTURED = 8

COLUMNS = """\
**Columns.** Values are means over seeds; in brackets, where there are several seeds, the 95 % Student interval of the
mean, else (copy rate only) the interval of the one audit. *MQ*: share of samples whose squared distance to the nearest
training image is below .15 of the mean over the 50 nearest. *CR*: share of samples less than .3 as far (squared) from a
training image as from the nearest of as many real images never trained on. *canaries*: the part of it that copies
images repeated on purpose. *CR, moved*: the same where training and reference images may be moved by a pixel. *FD*,
*precision*, *recall*: Frechet distance and k-NN manifold precision and recall against held-out images, in the features
of a small classifier of the data. *AUC*: membership inference by loss. *FD, stopped*: the least FD the baseline has at
any length at which it copies no more than this row; in brackets this row's FD over it: below 1, the row is better than
training less. *similarity*, where it was measured: the memorization score of work on Stable Diffusion, the 95th
percentile over samples of the cosine to the most similar training image, here in whitened pixels (docs/audit.md).
"""
FOUND = """\
*found*: the AUC with which the mean log-ratio of a sample in training, by which quarantine chooses, tells copies of
canaries from other samples; .5 is guessing.
"""


def write_pages(study: Study, file: Path, results: ResultsFile, runs: Path) -> Path:
    """Write <name>.md with its figures beside the results file; the page's path. Only rows of the study's cells count.

    Raises `ValueError` if there are no results yet.
    """
    folder, name = results.path.parent, results.path.stem
    rows = _current(study, results)
    if not rows:
        raise ValueError(f"no results in {results.path} yet: run the study first")
    lines = [f"# {study.title}", "", study.about.strip(), "", *_how(study, file), "", COLUMNS]
    if any(row.canary_auc is not None for row in rows):
        lines[-1] += FOUND
    if study.summary:
        lines += [*_overview(study, rows), ""]
    for dataset in study.datasets:
        methods = [m for m in study.methods if curve(rows, dataset, m)]
        if methods:
            lines += _dataset(study, rows, dataset, methods, folder, name, runs)
    write_atomically(results.path.with_suffix(".md"), "\n".join(lines).rstrip() + "\n")
    if study.summary:
        write_atomically(folder / "summary.json", json.dumps(summary(study, rows), indent=1) + "\n")
    return results.path.with_suffix(".md")


def _current(study: Study, results: ResultsFile) -> list[Row]:
    """The rows that the study as it is now would make; rows of methods no longer in it are left out."""
    found: list[Row] = []
    for cell in study.cells():
        try:
            more = cell.rate(results)
        except CellWaitsError:
            continue
        rows = [results.find(cell.key, share, cell.config(share, more)) for share in cell.points]
        found += [row for row in rows if row is not None]
    return found


def _how(study: Study, file: Path) -> list[str]:
    place = file if not file.is_absolute() else Path("simulations/studies") / file.name
    return [
        f"    python -m simulations.study {place}             # runs what is missing, then writes this page",
        f"    python -m simulations.study {place} --render    # only writes it",
    ]


def _overview(study: Study, rows: Sequence[Row]) -> list[str]:
    """The default against the baseline on every dataset, at equal images seen."""
    lines = [
        f"## The default against {_baseline(study)}",
        "",
        "| dataset | seeds | CR | floor (to) | baseline CR | copies | copies of canaries | FD / baseline | precision "
        "/ baseline | FD over FD, stopped |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for dataset in study.datasets:
        central, own = curve(rows, dataset, study.baseline), curve(rows, dataset, DEFAULT)
        try:
            base, point = at_share(central, 1), at_share(own, 1)
        except KeyError:
            continue
        canaries = [p.mean(lambda r: r.canary_copies) for p in (point, base)]
        floor, highest = point.mean(lambda r: r.cr_floor.value), point.mean(lambda r: r.cr_floor.high)
        cells = [
            dataset,
            f"{len(point.rows)} / {len(base.rows)}",
            f"{_percent(point.cr)} {_cr_range(point)}",
            f"{_percent(floor)} ({_percent(highest)})",
            f"{_percent(base.cr)} {_cr_range(base)}",
            _change(point.cr, base.cr),
            _change(*canaries),
            f"{point.fd:.2f} / {base.fd:.2f}",
            f"{point.precision:.3f} / {base.precision:.3f}",
            f"{point.fd / early_stop_fd(central, point.cr):.2f}x",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _dataset(
    study: Study, rows: Sequence[Row], dataset: str, methods: Sequence[str], folder: Path, name: str, runs: Path
) -> list[str]:
    central = curve(rows, dataset, study.baseline)
    floor = Point([r for r in rows if r.dataset == dataset])
    lines = [f"## {dataset}", "", *_table(study, rows, dataset, methods, central), ""]
    lines.append(
        f"Real held-out images score CR {_percent(floor.mean(lambda r: r.cr_floor.value))} (up to "
        f"{_percent(floor.mean(lambda r: r.cr_floor.high))} is within its interval) and MQ "
        f"{floor.mean(lambda r: r.mq_15_floor):.3f}."
    )
    if math.isfinite(best := floor.mean(lambda r: r.fd_real)):
        lines[-1] = (
            f"{lines[-1][:-1]}; training images in the samples' place have FD {best:.2f} and precision "
            f"{floor.mean(lambda r: r.precision_real):.3f}."
        )
    if math.isfinite(alike := floor.mean(lambda r: r.similarity_floor)):
        lines[-1] += f" Real images never trained on have similarity {alike:.3f}."
    curves = [m for m in methods if len(curve(rows, dataset, m)) > 1]
    if curves:
        picture = f"{name}-{dataset}.png"
        plane(study, rows, dataset, methods).savefig(folder / picture, dpi=130)
        lines += ["", f"![Copies against quality, {dataset}]({picture})", "", *_curves(study, rows, dataset, curves)]
    if study.baseline in methods and DEFAULT in methods:
        lines += ["", *_claims(rows, dataset, study)]
    copies = folder / f"{name}-{dataset}-copies.png"
    _save_copies(study, rows, dataset, methods, runs, copies)
    if copies.is_file():
        lines += ["", "Samples of seed 0 closest to a training image, that image below:", "", f"![]({copies.name})"]
    return [*lines, ""]


def _table(
    study: Study, rows: Sequence[Row], dataset: str, methods: Sequence[str], central: Sequence[Point]
) -> list[str]:
    alike = any(row.similarity is not None for row in rows)
    found = any(row.canary_auc is not None for row in rows)
    more = [name for name, wanted in (("similarity", alike), ("found", found)) if wanted]
    lines = [
        "| method | seeds | images | skipped | moved | MQ | CR | canaries | CR, moved | FD | precision | recall | AUC "
        "| FD, stopped |" + "".join(f" {name} |" for name in more),
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|" + "---|" * len(more),
    ]
    for method in methods:
        whole = [p for p in curve(rows, dataset, method) if math.isclose(p.share, 1)]
        for point in whole:
            stopped = early_stop_fd(central, point.cr) if central and method != study.baseline else math.nan
            cells = [
                study.methods[method].label,
                str(len(point.rows)),
                f"{point.mean(lambda r: r.images):,.0f}",
                _percent(point.mean(lambda r: r.skip_rate), 0),
                f"{point.mean(lambda r: r.moved):.0f}",
                f"{point.mean(lambda r: r.mq_15):.3f}",
                f"{_percent(point.cr)} {_cr_range(point)}",
                _percent(point.mean(lambda r: r.canary_copies)),
                _percent(point.mean(lambda r: r.cr_shift)),
                _with_range(point, "fd", ".2f"),
                _with_range(point, "precision", ".3f"),
                f"{point.mean(lambda r: r.recall):.3f}",
                f"{point.mean(lambda r: r.auc):.2f}",
                f"{stopped:.2f} ({point.fd / stopped:.2f}x)" if math.isfinite(stopped) else "",
            ]
            if alike:
                known = math.isfinite(point.mean(lambda r: r.similarity))
                cells.append(_with_range(point, "similarity", ".3f") if known else "")
            if found:
                auc = point.mean(lambda r: r.canary_auc)
                cells.append(f"{auc:.2f}" if math.isfinite(auc) else "")
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def _curves(study: Study, rows: Sequence[Row], dataset: str, methods: Sequence[str]) -> list[str]:
    lines = [
        "Along training:",
        "",
        "| method | seeds | images | CR | canaries | FD | precision |",
        "|---|---|---|---|---|---|---|",
    ]
    for method in methods:
        lines += [
            f"| {study.methods[method].label} | {len(point.rows)} | {point.mean(lambda r: r.images):,.0f} "
            f"| {_percent(point.cr)} | {_percent(point.mean(lambda r: r.canary_copies))} "
            f"| {point.fd:.2f} | {point.precision:.3f} |"
            for point in curve(rows, dataset, method)
        ]
    return lines


def _baseline(study: Study) -> str:
    return study.methods[study.baseline].label.strip("*")


def _claims(rows: Sequence[Row], dataset: str, study: Study) -> list[str]:
    central, own = curve(rows, dataset, study.baseline), curve(rows, dataset, DEFAULT)
    try:
        base, point = at_share(central, 1), at_share(own, 1)
    except KeyError:
        return []
    base_canaries, canaries = (p.mean(lambda r: r.canary_copies) for p in (base, point))
    stopped = early_stop_fd(central, point.cr)
    lines = [
        f"**The default against {_baseline(study)}.** At equal images: copies {_change(point.cr, base.cr)}, copies "
        f"of canaries {_change(canaries, base_canaries)}, FD {_change(point.fd, base.fd)}, precision "
        f"{point.precision - base.precision:+.3f}. Against the baseline stopped where it copies as little: FD "
        f"{point.fd / stopped:.2f}x."
    ]
    scores = [p.mean(lambda r: r.similarity) for p in (point, base)]
    if all(map(math.isfinite, scores)):
        real = base.mean(lambda r: r.similarity_floor)
        lines.append(
            f"Memorization score (similarity, 95th percentile): {scores[0]:.3f}, the baseline's {scores[1]:.3f} "
            f"({_change(*scores)}); real images never trained on have {real:.3f}."
        )
    lines.append(_at_equal_precision(central, own))
    return ["\n".join(lines)]


def _at_equal_precision(central: Sequence[Point], own: Sequence[Point]) -> str:
    """What training on until the precision is the baseline's, less a little, comes to.

    Over all seeds where all got that far, else over those that got furthest, held against the baseline's same seeds.
    """
    theirs = own_seeds(at_share(central, 1))
    for seeds in (own_seeds(at_share(own, 1)), own_seeds(own[-1])):
        points = of_seeds(own, seeds)
        base = at_share(of_seeds(central, (seeds & theirs) or theirs), 1)
        wanted = base.precision - PRECISION_GIVEN_UP
        whose = f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, sorted(seeds)))}"
        what = f"precision {wanted:.3f} (the baseline's less {PRECISION_GIVEN_UP:g}; {whose})"
        if found := at_precision(points, wanted):
            share, cr, fd = found
            return (
                f"At {what}, reached with {share:.2f}x the images: copies {_change(cr, base.cr)}, "
                f"FD {fd / base.fd:.2f}x."
            )
    last = points[-1]
    return (
        f"With {last.share:g}x the images {what} was not reached: {last.precision:.3f} there, copies "
        f"{_change(last.cr, base.cr)}, FD {last.fd / base.fd:.2f}x."
    )


def plane(study: Study, rows: Sequence[Row], dataset: str, methods: Sequence[str]) -> Figure:
    """The copy-quality plane of a dataset: copy rate against Frechet distance and precision, curves along training."""
    many = [m for m in methods if len(curve(rows, dataset, m)) > 1 or m == DEFAULT]
    others = [m for m in many if m not in (study.baseline, DEFAULT)]
    colours = dict(zip(others, itertools.cycle([plots.GREEN, plots.AMBER, plots.PLUM]), strict=False))
    colours |= {study.baseline: plots.BLUE, DEFAULT: plots.RED}
    single = [m for m in methods if m not in many]
    real = Point([r for r in rows if r.dataset == dataset])
    with plots.style():
        figure = Figure(figsize=(9.6, 4.2))
        panels = figure.subplots(1, 2)
        for axes, quality, real_value, better in zip(
            panels,
            ("fd", "precision"),
            (real.mean(lambda r: r.fd_real), real.mean(lambda r: r.precision_real)),
            ("lower is better", "higher is better"),
            strict=True,
        ):
            for method in many:
                points = curve(rows, dataset, method)
                x, y = [p.cr for p in points], [getattr(p, quality) for p in points]
                label = study.methods[method].label.replace("*", "")
                axes.plot(x, y, "-o", color=colours[method], clip_on=False, ms=3.5, lw=1.3, label=label)
                whole = [p for p in points if math.isclose(p.share, 1)]
                axes.plot(
                    [p.cr for p in whole],
                    [getattr(p, quality) for p in whole],
                    "s",
                    ms=8,
                    color=colours[method],
                    clip_on=False,
                )
            for method in single:
                point = curve(rows, dataset, method)[0]
                axes.plot(point.cr, getattr(point, quality), "o", ms=4.5, color=plots.MUTED)
            axes.axvspan(
                0, real.mean(lambda r: r.cr_floor.high), color=plots.GRID, alpha=0.6, lw=0, label="floor of real images"
            )
            axes.axhline(real_value, color=plots.MUTED, ls=":", lw=1, label="training images themselves")
            plots.share_axis(axes, axes.get_xlim()[1])
            axes.set_xlabel("copy rate (square-root axis)")
            axes.set_ylabel(f"{'Frechet distance' if quality == 'fd' else 'precision'} ({better})")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper left", ncols=2)
        figure.suptitle(f"{dataset}; squares: equal images", x=0.99, ha="right", fontsize=9)
        for axes, quality in zip(panels, ("fd", "precision"), strict=True):
            found = ((method, curve(rows, dataset, method)[0]) for method in single)
            placed = [(method, point.cr, getattr(point, quality)) for method, point in found]
            place_labels(axes, [label for label in placed if math.isfinite(label[2])])
    return figure


def summary(study: Study, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """summary.json: one entry for each dataset and method, at equal images seen."""
    entries = []
    for dataset in study.datasets:
        central = curve(rows, dataset, study.baseline)
        for method in study.methods:
            for point in (p for p in curve(rows, dataset, method) if math.isclose(p.share, 1)):
                cr_low, cr_high = cr_interval(point)
                fd_low, fd_high = point.interval(lambda r: r.fd) or (None, None)
                entries.append(
                    {
                        "dataset": dataset,
                        "method": method,
                        "seeds": len(point.rows),
                        "images": round(point.mean(lambda r: r.images)),
                        "cr": point.cr,
                        "cr_low": cr_low,
                        "cr_high": cr_high,
                        "cr_floor": point.mean(lambda r: r.cr_floor.value),
                        "cr_floor_high": point.mean(lambda r: r.cr_floor.high),
                        "canary_copies": point.mean(lambda r: r.canary_copies),
                        "fd": point.fd,
                        "fd_low": fd_low,
                        "fd_high": fd_high,
                        "precision": point.precision,
                        "early_stop_fd_at_equal_cr": early_stop_fd(central, point.cr) if central else None,
                    }
                )
    return entries


def _save_copies(
    study: Study, rows: Sequence[Row], dataset: str, methods: Sequence[str], runs: Path, path: Path
) -> None:
    """The worst copies of baseline and default side by side, where the folders of both trainings are here."""
    panels = []
    for method in (study.baseline, DEFAULT):
        kept = point_folder(runs / f"{dataset}-{method}-s0", 1)
        own = [r for r in rows if (r.cell, r.share) == ((dataset, method, 0), 1)]
        if method not in methods or not own or not (kept / NUMBERS).is_file():
            return
        worst = load_audit(kept)[1].worst
        assert worst is not None  # a study's audits have reference images
        title = f"{study.methods[method].label.replace('*', '')}\n{_percent(own[0].cr.value)} of samples are copies"
        panels.append(Pairs(title, worst.generated[:PICTURED], worst.originals[:PICTURED], worst.ratio[:PICTURED]))
    save_pairs(panels, path)


def _percent(value: float, digits: int = 2) -> str:
    return f"{100 * value:.{digits}f} %"


def _cr_range(point: Point) -> str:
    low, high = cr_interval(point)
    return f"[{100 * low:.2f}, {100 * high:.2f}]"


def _with_range(point: Point, name: str, form: str) -> str:
    text = format(point.mean(lambda r: getattr(r, name)), form)
    found = point.interval(lambda r: getattr(r, name))
    return text if found is None else f"{text} [{found[0]:{form}}, {found[1]:{form}}]"


def _change(value: float, before: float) -> str:
    return f"{value / before - 1:+.1%}" if before else "n/a"
