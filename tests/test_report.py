"""The report shows what the numbers say, whatever of them is there, and asks nothing of the network."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from audits import COPIES, FEW, make_audit, make_fidelity, make_rate, make_replication, on_other_data
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

from ret_fl.audit.plots import interval_figure
from ret_fl.audit.report import Pictures, write_report
from ret_fl.audit.schema import Audit, Interval, MemorizedQuantity
from ret_fl.audit.tables import comparison_table
from ret_fl.audit.verdict import verdict
from ret_fl.pictures import RED, Pairs

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HOSTILE = """<script>alert("1")</script> & 'x' $\\frac{1}$"""


def make_rows(rounds: int = 3) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl of two shards, samples moving from one to the other."""
    return [
        {
            "round": i + 1, "loss": 0.5 / (i + 1), "skip_rate": 0.1 * i, "moved": 3, "quarantined": i,
            "shards": {
                str(s): {"loss": 0.5 / (i + 1) + 0.01 * s, "skip_rate": 0.1 * i, "samples": 60 + (2 * s - 1) * 3 * i}
                for s in range(2)
            },
        }
        | ({"train_loss": 0.1, "held_out_loss": 0.12} if i == rounds - 1 else {})
        for i in range(rounds)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def pictures(digits: tuple[torch.Tensor, torch.Tensor]) -> Pictures:
    images = digits[0][:80]
    rng = np.random.default_rng(0)
    return Pictures(
        samples=images,
        worst=Pairs("", images[:1], images[1:2], torch.tensor([0.021])),
        suspects=images[:1],
        rows=make_rows(),
        losses={name: rng.gamma(5, s, 200) for name, s in (("memorized", 0.01), ("high-loss", 0.05), ("others", 0.03))},
        skip_by_timestep=(np.arange(10, 1000, 20), np.linspace(0.4, 0, 50)),
    )


class Page(HTMLParser):
    """Checks that tags balance; keeps text, attributes and images."""

    VOID = frozenset({"meta", "img", "br", "link", "hr", "input"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.images: list[dict[str, str | None]] = []
        self.ids: list[str] = []
        self.text: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self.ids += [value for name, value in attrs if name == "id" and value]
        if tag == "img":
            self.images.append(dict(attrs))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def check_page(html: str) -> str:
    """The text of a page that is whole, self-contained and labelled."""
    page = Page(html)
    for _, name, value in page.attributes:
        if name in ("src", "href", "xlink:href", "srcset", "data", "action", "poster"):
            assert value.startswith(("data:", "#")), value[:80]
    assert "@import" not in html and "<script" not in html
    assert all(target.startswith("#") for target in re.findall(r"url\(\s*['\"]?([^)]*)\)", html))
    targets = {value for _, name, value in page.attributes if name in ("href", "xlink:href")}
    assert targets <= {f"#{name}" for name in page.ids}
    assert len(page.ids) == len(set(page.ids))
    assert all(image["alt"] for image in page.images)
    assert 'name="viewport"' in html
    return " ".join(" ".join(page.text).split())


def render(path: Path, audit: Audit, pictures: Pictures | None = None, **more: Any) -> str:
    write_report(path / "a" / "report.html", audit, pictures or Pictures(), **more)
    return check_page((path / "a" / "report.html").read_text())


def test_the_page_holds_every_number_and_picture(tmp_path: Path, pictures: Pictures) -> None:
    baseline = make_audit("plain <b>", Interval(value=0.5, low=0.47, high=0.53))
    text = render(tmp_path, make_audit(), pictures, baseline=baseline)
    for expected in (
        "25.2 % (22.6 to 28.0 %)", "0.64 % (0.34 to 1.22 %)", "50.0 % (47.0 to 53.0 %)", "33", "21.4 %", "3.80 %",
        "10.7", "0.0123", "75.5 %", "83.5 %", "7.06", "0.612 (0.571 to 0.653)", "3.50 % (1.50 to 8.00 %)", "6.1 bits",
        "ratio 0.021", "sample 854, training image 179", "log-ratio -1.21, z -4.2", "in the data 9 times", "0.913",
        "0.0571 / 0.0823", "120,050", "agc.mode", "only 254 held-out images", "1,234,567", "arXiv 2502.09434",
        "plain <b>",
    ):  # fmt: skip
        assert expected in text, expected
    sections = ["Key numbers", "Closest to training", "Samples", "Losses and", "Movement", "Training", "gives away",
                "Similarity in", "Comparison", "Warnings", "Settings", "How the numbers"]  # fmt: skip
    page = (tmp_path / "a" / "report.html").read_text()
    places = [re.search(rf"<h2[^>]*>[^<]*{name}", page) for name in sections]
    starts = [place.start() for place in places if place]
    assert len(starts) == len(sections) and starts == sorted(starts)


def test_numbers_of_other_data_do_not_stand_beside_these(tmp_path: Path) -> None:
    others = [on_other_data(make_audit(name, Interval(value=0.5, low=0.47, high=0.53))) for name in ("base", "more")]
    text = render(tmp_path, make_audit(), baseline=others[0], others=others[1:], early_stop=others[1:])
    assert "its baseline base was audited against other images" in text
    assert "more (other data)" not in text  # the same data as the baseline, which stands first
    assert "central (other data)" in text
    assert text.count("50.0 % (47.0 to 53.0 %)") == 2  # in the comparison, and nowhere else
    assert "copy-quality plane" not in text


def test_a_cut_list_of_suspects_says_how_many_there_are(tmp_path: Path) -> None:
    leakage = make_audit().leakage
    assert leakage is not None and leakage.duplicates is not None
    cut = leakage.duplicates.model_copy(update={"below": 1234, "examined": 2000})
    info = make_audit().data.model_copy(update={"distinct": 60_000})
    text = render(tmp_path, make_audit(data=info, leakage=leakage.model_copy(update={"duplicates": cut})))
    assert "Examined: 2,000 of 60,000 distinct training images." in text
    assert "1,234 training images have a loss far below" in text and "The first 1:" in text
    older = render(tmp_path, make_audit())
    assert "1 training image has a loss" in older and "Examined" not in older


def test_pairs_and_counts_follow_the_variant_that_the_verdict_speaks_of(tmp_path: Path, pictures: Pictures) -> None:
    rates = [make_rate(FEW, distinct=2), make_rate(COPIES, variant="shift", distinct=77)]
    moved = make_replication(rates, worst_variant="shift")
    text = render(tmp_path, make_audit(replication=moved), pictures)
    assert "Distinct training images copied, moved by a pixel 77" in text
    assert "moved by up to a pixel, as the verdict's copies show so" in text
    assert "distance 0.04" in text  # of the moved image, not of the one shown
    assert "moved by up to a pixel," not in render(tmp_path, make_audit(), pictures)


def test_distances_of_pairs_are_those_of_the_pictures(tmp_path: Path) -> None:
    generated, original = torch.zeros(1, 1, 8, 8), torch.full((1, 1, 8, 8), 0.5)
    pictures = Pictures(worst=Pairs("", generated, original, torch.tensor([0.021])))
    text = render(tmp_path, make_audit(), pictures)
    assert "distance 16" in text  # 64 pixels of .25
    assert "copy , ratio 0.021" in text
    above = Pictures(worst=Pairs("", generated, original, torch.tensor([0.31])))
    assert "copy , ratio" not in render(tmp_path, make_audit(), above)
    unknown = Pictures(worst=Pairs("", generated, original, torch.tensor([float("nan")])))
    assert "copy , ratio" not in render(tmp_path, make_audit(replication=make_replication([])), unknown)


def test_hostile_names_stay_text(tmp_path: Path, pictures: Pictures) -> None:
    audit = make_audit(HOSTILE, warnings=[HOSTILE], fidelity=[make_fidelity(features=HOSTILE)])
    audit = audit.model_copy(update={"versions": {HOSTILE: HOSTILE}})
    text = render(tmp_path, audit, pictures, baseline=make_audit(HOSTILE + "2"), others=[make_audit("b")])
    assert text.count(HOSTILE) >= 5
    output = Console(width=300)
    with output.capture() as captured:
        output.print(comparison_table([make_audit("[red]x[/]")], None))
    assert "[red]x[/]" in captured.get()


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_part_may_be_missing(tmp_path: Path, pictures: Pictures, data: st.DataObject) -> None:
    audit, shown = vary(data, make_audit()), vary_pictures(data, pictures)
    baseline = vary(data, make_audit("base")) if data.draw(st.booleans(), "baseline") else None
    others = [vary(data, make_audit("other"))] if data.draw(st.booleans(), "others") else []
    stops = [make_audit("stop")] if data.draw(st.booleans(), "early stop") else []
    text = render(tmp_path, audit, shown, baseline=baseline, others=others, early_stop=stops)
    assert " ".join(verdict(audit, baseline).split()) in text


def vary(data: st.DataObject, audit: Audit) -> Audit:
    """Leave parts out, set optional numbers to None, and others to NaN."""

    def drop(part: Any, *names: str, empty: Any = None) -> Any:
        gone = data.draw(st.sets(st.sampled_from(names)), f"without, {audit.model.name}")
        return part.model_copy(update=dict.fromkeys(gone, empty))

    rate = drop(audit.replication.copy_rates[0], "floor", "above_floor", "canary", "ordinary", "canary_hits")
    shifted = rate.model_copy(update={"variant": "shift"})
    replication = drop(audit.replication.model_copy(update={"copy_rates": [rate, shifted]}), "held_out_distance")
    replication = drop(replication, "copy_rates", "memorized", "carlini", "worst", empty=[])
    optional = ("confident", "train_frechet", "inception_score", "real_frechet", "real_precision", "real_recall")
    fidelity = drop(drop(audit.fidelity[0], *optional), "frechet", "kid", "real_frechet", empty=float("nan"))
    assert audit.leakage is not None and audit.training is not None
    leakage = drop(drop(audit.leakage, "exposure", "duplicates"), "membership", empty=[])
    training = drop(audit.training, "final_train_loss", "final_held_out_loss")
    similarity = drop(audit.similarity[0], "floor_percentile_95", "background_percentile_95")
    parts = {"replication": replication, "fidelity": [fidelity], "leakage": leakage, "training": training,
             "similarity": [similarity], "model": drop(audit.model, "seed", "steps", "parameters")}  # fmt: skip
    audit = drop(audit.model_copy(update=parts), "leakage", "training")
    return Audit.model_validate_json(drop(audit, "similarity", "fidelity", "warnings", empty=[]).model_dump_json())


def vary_pictures(data: st.DataObject, pictures: Pictures) -> Pictures:
    empty: dict[str, Any] = {"samples": None, "worst": None, "suspects": None, "rows": [], "losses": {},
                             "skip_by_timestep": None}  # fmt: skip
    gone = data.draw(st.sets(st.sampled_from(sorted(empty))), "pictures left out")
    return replace(pictures, **{name: empty[name] for name in gone})


def test_odd_pictures_are_shown(tmp_path: Path) -> None:
    rows = make_rows(1)
    rows[0]["shards"] = {}  # no shard came back in time
    pictures = Pictures(
        samples=torch.rand(3, 3, 200, 200),
        suspects=torch.rand(5, 1, 8, 8),
        rows=rows,
        losses={"memorized": np.array([]), "others": np.array([0.1, 0.1, np.nan]), "high-loss": np.zeros(4)},
        skip_by_timestep=(np.array([10, 20]), np.array([np.nan, 0.0])),
    )
    render(tmp_path, make_audit(), pictures)
    same = Pictures(losses={"others": np.full(3, 0.25)}, skip_by_timestep=(np.array([10]), np.array([np.nan])))
    text = render(tmp_path, make_audit(), same)
    assert "Losses of training samples" in text and "Skip rate over timesteps" not in text


def test_the_report_shows_plane_and_comparison_of_several(tmp_path: Path) -> None:
    others = [make_audit("second", FEW), make_audit("third")]
    text = render(tmp_path, make_audit("first"), others=others, baseline=make_audit("base"), early_stop=[make_audit()])
    assert "The copy-quality plane" in text and "-25.0 points, fewer" in text
    assert "copy-quality plane" not in render(tmp_path, make_audit())


@pytest.mark.parametrize("high", [0.004, 0.03, 0.2, 0.28, 0.55, 1.0])
def test_ticks_of_the_copy_rates_stand_apart(high: float) -> None:
    share = Interval(value=high / 2, low=high / 3, high=high)
    figure = interval_figure(
        [("a name as long as names are", share, RED), ("real held-out images (floor)", share, RED)]
    )
    figure.draw_without_rendering()
    (axes,) = figure.axes
    boxes = [label.get_window_extent() for label in axes.get_xticklabels()]
    assert len(boxes) >= 2 and all(a.x1 + 2 < b.x0 for a, b in pairwise(boxes))


def test_captions_say_what_is_there(tmp_path: Path) -> None:
    """No dashed line without held-out images, no learning by heart where losses overlap."""
    rng = np.random.default_rng(0)
    apart = {"memorized": rng.uniform(0.01, 0.02, 50), "others": rng.uniform(0.03, 0.05, 50)}
    text = render(tmp_path, make_audit(), Pictures(losses=apart))
    assert "above the dashed line" in text and "by heart" in text and "rewards copying" not in text
    bare = [MemorizedQuantity(tau=tau, generated=tau, floor=None) for tau in (0.15, 0.5)]
    trained_on = [make_fidelity(against="train", real_frechet=None)]
    audit = make_audit(replication=make_replication([], memorized=bare), fidelity=trained_on)
    text = render(tmp_path, audit, Pictures(losses=apart | {"memorized": rng.uniform(0.01, 0.05, 50)}))
    assert "dashed line" not in text and "Without held-out images nobody knows" in text
    assert "by heart" not in text and "The groups overlap" in text
    assert "Quality rewards copying here" in text and "less is better, and rewards copying" in text


@pytest.fixture(scope="module")
def browser() -> str:
    if CHROMIUM is None:
        pytest.skip("no chromium, chromium-browser or google-chrome on PATH: install one to see the report in it")
    return CHROMIUM


def run_browser(browser: str, profile: Path, *options: str) -> str:
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--allow-file-access-from-files")
    command = [browser, *flags, f"--user-data-dir={profile}", *options]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


@pytest.mark.parametrize("width", [390, 1200])
def test_the_page_in_chromium(tmp_path: Path, browser: str, pictures: Pictures, width: int) -> None:
    """Within a frame of that width, as windows cannot be narrower than 500 pixels: nothing sticks out, all is drawn."""
    others = [make_audit("second " + "very-long-name" * 9, FEW), make_audit("third")]
    audit = make_audit("first-" + "long" * 30)
    render(tmp_path, audit, pictures, others=others, baseline=make_audit("base"), early_stop=[make_audit()])
    frame = tmp_path / "frame.html"
    frame.write_text(
        f"<body style='margin:0'><iframe src='a/report.html' style='border:0;width:{width}px;height:1400px'></iframe>"
        "<script>onload = () => { const d = document.querySelector('iframe').contentDocument.documentElement;"
        "document.title = [d.scrollWidth, d.clientWidth, d.querySelectorAll('svg').length,"
        "[...d.querySelectorAll('img')].every(i => i.naturalWidth > 0),"
        "[...d.querySelectorAll('.stack tbody th, .stack td')].some(c => c.scrollWidth > c.clientWidth + 1)].join(' ')"
        "}</script>"
    )
    shot = tmp_path / "shot.png"
    window = f"--window-size={max(width, 500)},1400"
    dom = run_browser(browser, tmp_path / "profile", window, f"--screenshot={shot}", "--dump-dom", frame.as_uri())
    title = re.search(r"<title>(\d+) (\d+) (\d+) (\w+) (\w+)</title>", dom)
    assert title is not None, dom
    content, room, charts, images_load, cells_cut = title.groups()
    assert cells_cut == "false"
    assert int(content) == int(room) == width
    assert int(charts) == 10 and images_load == "true"
    picture = Image.open(shot).convert("RGB")
    assert picture.size == (max(width, 500), 1400)
    colours = picture.crop((0, 0, width, 1400)).getcolors(2**24)
    assert colours is not None and len(colours) > 50
