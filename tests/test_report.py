"""The report says what the numbers say, whatever of them is there, and asks nothing of the network."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console
from sklearn.datasets import load_digits

from ret_fl.audit.plots import plane_points
from ret_fl.audit.report import (
    Pictures,
    comparison_table,
    number,
    percent,
    plane_figure,
    verdict,
    with_interval,
    write_report,
)
from ret_fl.audit.schema import (
    Audit,
    CarliniShare,
    CopyRate,
    DataInfo,
    Duplicates,
    Exposure,
    Fidelity,
    Interval,
    Leakage,
    Membership,
    MemorizedQuantity,
    ModelInfo,
    Replication,
    Similarity,
    SuspectedDuplicate,
    Training,
    WorstCopy,
)
from ret_fl.pictures import Pairs

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HOSTILE = """<script>alert("1")</script> & 'x' $\\frac{1}$"""

COPIES = Interval(value=0.252, low=0.226, high=0.280)
FEW = Interval(value=0.002, low=0.0005, high=0.0073)
FLOOR = Interval(value=0.0064, low=0.0034, high=0.0122)


def make_rate(rate: Interval, **changes: Any) -> CopyRate:
    values: dict[str, Any] = {
        "variant": "pixels", "threshold": 0.3, "rate": rate, "floor": FLOOR,
        "above_floor": Interval(value=rate.value - 0.0064, low=rate.low - 0.0122, high=rate.high - 0.0034),
        "distinct": 33, "canary": 0.214, "ordinary": 0.038, "canary_hits": [100, 60, 30, 20, 4],
    }  # fmt: skip
    return CopyRate(**values | changes)


def make_fidelity(**changes: Any) -> Fidelity:
    values: dict[str, Any] = {
        "features": "classifier", "against": "held-out", "images": 254, "frechet": 10.7, "kid": 0.0123,
        "precision": 0.755, "recall": 0.8346, "confident": 0.858, "real_frechet": 7.06, "real_precision": 0.91,
        "real_recall": 0.948,
    }  # fmt: skip
    return Fidelity(**values | changes)


def make_audit(name: str = "central", rate: Interval = COPIES, *, samples: int = 1000, **changes: Any) -> Audit:
    """A full audit; `changes` replace whole parts."""
    auc = Interval(value=0.612, low=0.571, high=0.653)
    caught = Interval(value=0.035, low=0.015, high=0.08)
    values: dict[str, Any] = {
        "created": "2026-01-02T03:04:05Z",
        "versions": {"ret-fl": "0.1.0", "torch": "2.13.0"},
        "model": ModelInfo(name=name, path="runs/a", kind="run", samples=samples, seed=0, steps=50, parameters=1234567),
        "data": DataInfo(
            source="digits", image_shape=(1, 8, 8), train=245, distinct=200, reference=200, held_out=254, canaries=5,
            canary_repeats=10,
        ),
        "replication": make_replication([make_rate(rate)]),
        "similarity": [
            Similarity(
                features="dinov2", mean=0.62, percentile_50=0.6, percentile_95=0.913, above_half=0.8,
                floor_percentile_95=0.88, background_percentile_95=0.9,
            )
        ],
        "fidelity": [make_fidelity()],
        "leakage": Leakage(
            membership=[
                Membership(attack="loss", members=245, non_members=254, auc=auc, tpr_at_1_percent=caught,
                           tpr_at_01_percent=caught)
            ],
            exposure=Exposure(exposures=[4.2, 8.0], mean=6.1, most=10.2),
            duplicates=Duplicates(
                suspects=[SuspectedDuplicate(train=3, log_ratio=-1.21, z=-4.2, copies=9)], precision=1.0, recall=0.5
            ),
        ),
        "training": Training(
            settings={"shards": 4, "agc.mode": "off"}, rounds=3, images=120050, moved=6, skip_rate=0.161, failures=0,
            final_train_loss=0.0571, final_held_out_loss=0.0823,
        ),
        "warnings": ["only 254 held-out images"],
    }  # fmt: skip
    return Audit(**values | changes)


def make_replication(rates: list[CopyRate], **changes: Any) -> Replication:
    values: dict[str, Any] = {
        "copy_rates": rates,
        "k": 50,
        "memorized": [MemorizedQuantity(tau=tau, generated=tau, floor=tau / 2) for tau in (0.15, 0.3, 0.5)],
        "carlini": [CarliniShare(alpha=0.5, generated=0.6, floor=0.3)],
        "distance": 1.05,
        "held_out_distance": 1.77,
        "worst": [WorstCopy(sample=854, train=179, ratio=0.021, distance=0.04)],
    }
    return Replication(**values | changes)


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


def digits(count: int) -> torch.Tensor:
    return torch.as_tensor(load_digits().images[:count], dtype=torch.float32)[:, None] / 16


def make_pictures() -> Pictures:
    images = digits(80)
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


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.002, "0.20 %"), (0.0999, "9.99 %"), (0.09999, "10.0 %"), (0.252, "25.2 %"), (1.0, "100.0 %"), (0.0, "0.00 %"),
     (None, "n/a"), (float("nan"), "n/a")],
)  # fmt: skip
def test_shares_have_two_digits_below_ten_percent(value: float | None, text: str) -> None:
    assert percent(value) == text


def test_intervals_and_numbers() -> None:
    assert with_interval(FEW) == "0.20 % (0.05 to 0.73 %)"
    assert number(10.698) == "10.7"
    assert number(0.01234) == "0.0123"
    assert number(1234.5) == "1,234"
    assert number(float("inf")) == "n/a"


def test_the_page_holds_every_number_and_picture(tmp_path: Path) -> None:
    baseline = make_audit("plain <b>", Interval(value=0.5, low=0.47, high=0.53))
    text = render(tmp_path, make_audit(), make_pictures(), baseline=baseline)
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


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    audit = make_audit(HOSTILE, warnings=[HOSTILE], fidelity=[make_fidelity(features=HOSTILE)])
    audit = audit.model_copy(update={"versions": {HOSTILE: HOSTILE}})
    text = render(tmp_path, audit, make_pictures(), baseline=make_audit(HOSTILE + "2"), others=[make_audit("b")])
    assert text.count(HOSTILE) >= 5
    output = Console(width=300)
    with output.capture() as captured:
        output.print(comparison_table([make_audit("[red]x[/]")], None))
    assert "[red]x[/]" in captured.get()


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_part_may_be_missing(tmp_path: Path, data: st.DataObject) -> None:
    audit, pictures = vary(data, make_audit()), vary_pictures(data)
    baseline = vary(data, make_audit("base")) if data.draw(st.booleans(), "baseline") else None
    others = [vary(data, make_audit("other"))] if data.draw(st.booleans(), "others") else []
    stops = [make_audit("stop")] if data.draw(st.booleans(), "early stop") else []
    text = render(tmp_path, audit, pictures, baseline=baseline, others=others, early_stop=stops)
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
    optional = ("confident", "real_frechet", "real_precision", "real_recall")
    fidelity = drop(drop(audit.fidelity[0], *optional), "frechet", "kid", "real_frechet", empty=float("nan"))
    assert audit.leakage is not None and audit.training is not None
    leakage = drop(drop(audit.leakage, "exposure", "duplicates"), "membership", empty=[])
    training = drop(audit.training, "final_train_loss", "final_held_out_loss")
    similarity = drop(audit.similarity[0], "floor_percentile_95", "background_percentile_95")
    parts = {"replication": replication, "fidelity": [fidelity], "leakage": leakage, "training": training,
             "similarity": [similarity], "model": drop(audit.model, "seed", "steps", "parameters")}  # fmt: skip
    audit = drop(audit.model_copy(update=parts), "leakage", "training")
    return Audit.model_validate_json(drop(audit, "similarity", "fidelity", "warnings", empty=[]).model_dump_json())


def vary_pictures(data: st.DataObject) -> Pictures:
    empty: dict[str, Any] = {"samples": None, "worst": None, "suspects": None, "rows": [], "losses": {},
                             "skip_by_timestep": None}  # fmt: skip
    gone = data.draw(st.sets(st.sampled_from(sorted(empty))), "pictures left out")
    return replace(make_pictures(), **{name: empty[name] for name in gone})


def test_odd_pictures_are_shown(tmp_path: Path) -> None:
    rows = make_rows(1)
    rows[0]["shards"] = {}  # no shard came back in time
    pictures = Pictures(
        samples=torch.rand(3, 3, 200, 200),
        suspects=digits(5),
        rows=rows,
        losses={"memorized": np.array([]), "others": np.array([0.1, 0.1, np.nan]), "high-loss": np.zeros(4)},
        skip_by_timestep=(np.array([10, 20]), np.array([np.nan, 0.0])),
    )
    render(tmp_path, make_audit(), pictures)
    same = Pictures(losses={"others": np.full(3, 0.25)}, skip_by_timestep=(np.array([10]), np.array([np.nan])))
    text = render(tmp_path, make_audit(), same)
    assert "Losses of training samples" in text and "Skip rate over timesteps" not in text


# The verdict


def test_copies_above_the_floor() -> None:
    text = verdict(make_audit(), None)
    assert text.startswith("Samples of central copy training images: 25.2 % (95 % interval 22.6 to 28.0 %) of 1,000")
    assert "0.64 % (0.34 to 1.22 %) of real images" in text


def test_no_copies_above_the_floor() -> None:
    text = verdict(make_audit(rate=FEW), None)
    assert text.startswith("No copying beyond chance shows")
    assert "copy training images" not in text


def test_copies_only_in_a_variant_are_not_missed() -> None:
    rates = [make_rate(FEW), make_rate(COPIES, variant="shift")]
    text = verdict(make_audit(replication=make_replication(rates)), None)
    assert "copy training images: 25.2 %" in text and "moved by a pixel" in text


def test_weak_evidence_is_called_weak() -> None:
    rate = make_rate(Interval(value=0.016, low=0.0099, high=0.0258),
                     above_floor=Interval(value=0.0096, low=0.0005, high=0.02))  # fmt: skip
    assert "evidence is weak" in verdict(make_audit(replication=make_replication([rate])), None)


def test_without_reference_there_is_no_verdict() -> None:
    text = verdict(make_audit(replication=make_replication([])), make_audit("base"))
    assert "cannot be told" in text and "reference" in text


def test_without_held_out_images_the_floor_is_missing() -> None:
    rate = make_rate(COPIES, floor=None, above_floor=None)
    text = verdict(make_audit(replication=make_replication([rate])), None)
    assert "without held-out images" in text and "copy training images" not in text


@pytest.mark.parametrize(("samples", "said"), [(999, True), (1000, False)])
def test_few_samples_are_said(samples: int, said: bool) -> None:
    assert ("are few" in verdict(make_audit(samples=samples), None)) is said


@pytest.mark.parametrize(("distance", "said"), [(4.1, True), (3.9, False)])
def test_a_model_that_hardly_learned_is_said(distance: float, said: bool) -> None:
    replication = make_replication([make_rate(FEW)], distance=distance, held_out_distance=2.0)
    text = verdict(make_audit(replication=replication), None)
    assert ("hardly learned" in text) is said
    assert ("a low copy rate says little" in text) is said


@pytest.mark.parametrize(
    ("rate", "words"),
    [
        (FEW, "that is fewer copies than the baseline base, 25.2 % (22.6 to 28.0 %)"),
        (Interval(value=0.40, low=0.37, high=0.43), "that is more copies than the baseline base"),
        (Interval(value=0.22, low=0.195, high=0.2265), "no clear difference"),
        (Interval(value=0.30, low=0.2799, high=0.33), "no clear difference"),
    ],
)
def test_baselines_differ_only_beyond_their_intervals(rate: Interval, words: str) -> None:
    text = verdict(make_audit("own", rate), make_audit("base"))
    assert words in text
    assert sum(said in text for said in ("fewer copies", "more copies", "no clear difference")) == 1


def test_fewer_copies_at_worse_quality_may_be_less_training() -> None:
    worse = make_audit("own", FEW, fidelity=[make_fidelity(frechet=12.8)])
    assert "worse (12.8 against 10.7), so it may in part be less trained" in verdict(worse, make_audit("base"))
    other_features = make_audit("own", FEW, fidelity=[make_fidelity(frechet=12.8, features="inception")])
    assert "less trained" not in verdict(other_features, make_audit("base"))
    assert "less trained" not in verdict(make_audit("own", FEW), make_audit("base"))


def test_a_baseline_without_the_same_rate_cannot_be_compared() -> None:
    base = make_audit("base", replication=make_replication([make_rate(COPIES, threshold=0.2)]))
    assert "no copy rate to compare with" in verdict(make_audit("own"), base)
    assert "baseline" not in verdict(make_audit(), make_audit())


@given(
    hits=st.integers(0, 1000), floor=st.integers(0, 1000), samples=st.sampled_from([10, 500, 1000, 50000]),
    base=st.none() | st.integers(0, 1000),
)  # fmt: skip
def test_a_verdict_is_one_sentence(hits: int, floor: int, samples: int, base: int | None) -> None:
    def share(of: int) -> Interval:
        return Interval(value=of / 1000, low=max(0, of / 1000 - 0.02), high=min(1, of / 1000 + 0.02))

    rate = make_rate(share(hits), floor=share(floor))
    audit = make_audit(samples=samples, replication=make_replication([rate]))
    text = verdict(audit, None if base is None else make_audit("base", share(base)))
    assert text.endswith(".") and ". " not in text
    assert ("copy training images: " in text) is (rate.rate.low > share(floor).high)


# Comparison


def test_the_table_compares_against_the_baseline() -> None:
    close = make_audit("close", Interval(value=0.22, low=0.195, high=0.23))
    bare = make_audit("bare", replication=make_replication([]), fidelity=[], leakage=None)
    console = Console(width=300)
    with console.capture() as capture:
        console.print(comparison_table([make_audit("few", FEW), close, bare], make_audit("base")))
    rows = {cells[1]: cells[2:] for line in capture.get().splitlines() if len(cells := re.split(r"\s*│\s*", line)) > 5}
    assert list(rows) == ["base", "few", "close", "bare"]
    assert rows["few"][:4] == ["0.20 % (0.05 to 0.73 %)", "0.64 %", "-25.0 points, fewer", "15.0 %"]
    assert rows["few"][4:9] == ["50.0 %", "10.7", "75.5 %", "83.5 %", "0.612"]
    assert rows["close"][2] == "-3.20 points, no clear difference"
    assert rows["base"][2] == "the baseline"
    assert rows["bare"][0] == "n/a" and rows["bare"][5:9] == ["n/a"] * 4


def test_the_plane_holds_every_audit_that_has_a_place(tmp_path: Path) -> None:
    bare = make_audit("bare", fidelity=[])
    stops = [make_audit(f"stop {i}", Interval(value=i / 20, low=i / 21, high=i / 19)) for i in range(4)]
    figure = plane_figure([make_audit("$own$", FEW), bare], make_audit("base"), stops)
    figure.savefig(tmp_path / "plane.png")
    assert Image.open(tmp_path / "plane.png").size[0] > 600
    for axes in figure.axes:
        labels = [text.get_text() for text in axes.texts]
        assert {"$own$", "base", "stop 0", "stop 3"} <= set(labels) and "bare" not in labels
        assert any("good" in label for label in labels)
        low, high = axes.get_xlim()
        assert low == 0 and high >= COPIES.high
    assert len(plane_points([bare], "classifier")) == 0
    with pytest.raises(ValueError, match="audit with a reference set"):
        plane_figure([bare], None, [])


def test_the_report_shows_plane_and_comparison_of_several(tmp_path: Path) -> None:
    others = [make_audit("second", FEW), make_audit("third")]
    text = render(tmp_path, make_audit("first"), others=others, baseline=make_audit("base"), early_stop=[make_audit()])
    assert "The copy-quality plane" in text and "-25.0 points, fewer" in text
    assert "copy-quality plane" not in render(tmp_path, make_audit())


# In a browser


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
def test_the_page_in_chromium(tmp_path: Path, browser: str, width: int) -> None:
    """Within a frame of that width, as windows cannot be narrower than 500 pixels: nothing sticks out, all is drawn."""
    others = [make_audit("second " + "very-long-name" * 9, FEW), make_audit("third")]
    audit = make_audit("first-" + "long" * 30)
    render(tmp_path, audit, make_pictures(), others=others, baseline=make_audit("base"), early_stop=[make_audit()])
    frame = tmp_path / "frame.html"
    frame.write_text(
        f"<body style='margin:0'><iframe src='a/report.html' style='border:0;width:{width}px;height:1400px'></iframe>"
        "<script>onload = () => { const d = document.querySelector('iframe').contentDocument.documentElement;"
        "document.title = [d.scrollWidth, d.clientWidth, d.querySelectorAll('svg').length,"
        "[...d.querySelectorAll('img')].every(i => i.naturalWidth > 0)].join(' ') }</script>"
    )
    shot = tmp_path / "shot.png"
    window = f"--window-size={max(width, 500)},1400"
    dom = run_browser(browser, tmp_path / "profile", window, f"--screenshot={shot}", "--dump-dom", frame.as_uri())
    title = re.search(r"<title>(\d+) (\d+) (\d+) (\w+)</title>", dom)
    assert title is not None, dom
    content, room, charts, images_load = title.groups()
    assert int(content) == int(room) == width
    assert int(charts) == 10 and images_load == "true"
    picture = Image.open(shot).convert("RGB")
    assert picture.size == (max(width, 500), 1400)
    colours = picture.crop((0, 0, width, 1400)).getcolors(2**24)
    assert colours is not None and len(colours) > 50
