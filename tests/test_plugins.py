"""Plug-ins are found, checked and called; what cannot be used is refused in words, and loses nothing."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import own_plugins
import pytest
import torch
from conftest import TINY, make_federation, ret_fl, run_server
from federations import furthest
from ledgers import ledger_of, report, rng
from orders import ALL_T, SKIP_ALL, Tiny, differ, make_order, train
from outcomes import killed_at

from ret_fl import loading, plugins, redistribution
from ret_fl.aggregation import STRATEGIES, make_base
from ret_fl.config import ConfigError, PartitionConfig, RedistributionConfig, RunConfig, Scalar
from ret_fl.data.partition import partition
from ret_fl.ledger import LedgerError
from ret_fl.loading import foreign_plugins, load
from ret_fl.mitigation.agc import gated_mean
from ret_fl.plugins import AUDITORS, AUGMENTERS, GATES, POINTS, POLICIES, SHARD_POLICIES, Point
from ret_fl.redistribution import parse_policy, propose
from ret_fl.roster import FederationError
from ret_fl.rundir import RunDir

# --- lookup -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("point", POINTS, ids=lambda p: p.kind)
def test_every_built_in_plugin_is_one_of_its_point_and_says_what_it_is(point: Point) -> None:
    for name in point.built_in:
        (found,) = load(point, name)
        assert (found.name, found.source) == (name, "built-in")
        assert len(found.about) > 10 and found.about.endswith("."), name


def test_a_path_names_a_function_or_a_class_with_settings() -> None:
    gate, policy = load(GATES, "own_plugins:one_weight"), load(POLICIES, "own_plugins:First", "count = 3")
    assert gate[0].call is own_plugins.one_weight and gate[0].settings is None
    assert policy[0].source == "by its path" and policy[0].about == "The first samples of each shard go to the next."
    assert policy[0].settings == own_plugins.First.Settings(count=3, from_shard=-1)


def test_plugins_and_built_in_policies_join_in_their_order() -> None:
    policies, quarantine = parse_policy("own_plugins:First + quarantine + balance", "from-shard = 1, count = 2")
    assert quarantine and [type(p).__name__ for p in policies] == ["First", "function"]
    moves = propose(policies, ledger_of(4, 4), [], rng(), RedistributionConfig())
    assert (moves.ids.tolist(), moves.target.tolist()) == ([4, 5], [0, 0])


REFUSED: dict[str, tuple[Point, str, str, list[str]]] = {
    "a name that is not there": (GATES, "agcc", "", ["agc.mode: no gate 'agcc'", "off | agc", "`ret-fl policies`"]),
    "a module that is not there": (GATES, "nowhere.at:all", "", ["agc.mode: 'nowhere.at:all'", "No module named"]),
    "a name its module lacks": (POLICIES, "own_plugins:Last", "", ["own_plugins:Last", "has no attribute 'Last'"]),
    "a plug-in of another point": (
        GATES, "own_plugins:First", "",
        ["is no gate", "called with (ledger, reports, rng, config)", "(loss, t, seen, config)"],
    ),
    "what cannot be called": (AUGMENTERS, "own_plugins:Uncallable", "", ["taa.policy", "is no augmenter", "cannot be"]),
    "one that cannot be made": (AUDITORS, "own_plugins:Unmakeable", "", ["cannot be made: RuntimeError: no luck"]),
    "settings of another kind": (AUDITORS, "own_plugins:PlainSettings", "", ["Settings", "pydantic BaseModel"]),
    "an option out of range": (
        POLICIES, "own_plugins:First", "count = 0",
        ["redistribution.options: count = 0 is not allowed", "greater than or equal to 1", "How many go."],
    ),
    "an option of another type": (POLICIES, "own_plugins:First", 'count = "x"', ["count = 'x' is not allowed"]),
    "an unknown option": (
        POLICIES, "own_plugins:First+balance", "counts = 1",
        ["redistribution.options", "has a setting 'counts'", "count, from-shard"],
    ),
    "options that nobody takes": (POLICIES, "quarantine", "top = 3", ["redistribution.options", "there are: none"]),
    "options for a built-in": (SHARD_POLICIES, "iid", "top = 3", ["partition.options", "'top'"]),
    "a missing option": (POLICIES, "own_plugins:Demanding", "", ["redistribution.options", "goal. Which goal."]),
    "options that are no TOML": (POLICIES, "own_plugins:First", "count 3", ["redistribution.options must be KEY"]),
    "options that are two tables": (POLICIES, "own_plugins:First", "count = 2}\nmore = {a = 1", ["more than one"]),
    "a plug-in named twice": (
        POLICIES, "balance + ret_fl.redistribution:balance", "", ["redistribution.policy: 'balance' is named twice"],
    ),
    "a word named twice": (POLICIES, "quarantine+balance+quarantine", "", ["'quarantine' is named twice"]),
    "none with others": (AUDITORS, "none+variety", "", ["audit.auditors: 'none' stands alone"]),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_used_is_refused_with_its_setting(case: tuple[Point, str, str, list[str]]) -> None:
    point, text, options, told = case
    with pytest.raises(ConfigError) as refusal:
        load(point, text, options)
    assert [part for part in told if part not in str(refusal.value)] == []


@pytest.mark.parametrize(
    "path", ["/tmp/evil.py:Gate", "../evil:Gate", ".evil:Gate", "https://x.org/evil:Gate", "evil:Gate()", "evil:",
             ":Gate", "evil:a.b", "evil mod:Gate", "évil:Gate", "evil:Gate\nimport os"],
)  # fmt: skip
def test_only_names_of_modules_are_paths_of_plugins(path: str) -> None:
    with pytest.raises(ConfigError, match=r"write package\.module:name"):
        load(GATES, path)


@pytest.mark.parametrize("path", ["os:system", "subprocess:Popen", "builtins:exec", "own_plugins:OfAnotherPoint"])
def test_what_an_order_names_is_neither_made_nor_called_unless_it_is_a_plugin(path: str) -> None:
    for point in (GATES, AUGMENTERS):
        with pytest.raises(ConfigError, match=rf"{point.setting}: .* is no {point.kind}"):
            load(point, path)
    assert own_plugins.made == []


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of packages that Python and its metadata see, with one that registers some plug-ins."""
    info = tmp_path / "some_package-2.5.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: some-package\nVersion: 2.5\n")
    (info / "entry_points.txt").write_text(
        "[ret_fl.policies]\nbalance = own_plugins:First\nquarantine = own_plugins:First\nnone = own_plugins:First\n"
        "first = own_plugins:First\ngone = nowhere:Gone\n"
        "[ret_fl.strategies]\nhalfway = test_aggregation:halfway\nshell = os:system\nkrum = test_aggregation:halfway\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    loading._installed.cache_clear()
    yield tmp_path
    monkeypatch.undo()
    loading._installed.cache_clear()


def test_a_package_registers_a_plugin_by_name_and_replaces_no_other(installed: Path) -> None:
    (found,) = load(POLICIES, "first", "count = 2")
    assert (found.source, found.settings) == ("some-package 2.5", own_plugins.First.Settings(count=2))
    assert [(p.source, p.call) for p in load(POLICIES, "balance+quarantine")] == [("built-in", redistribution.balance)]
    assert load(POLICIES, "none") == []
    assert foreign_plugins(RunConfig()) == []
    (path,) = load(POLICIES, "ret_fl.redistribution:balance")
    assert (path.name, path.source, path.call) == ("balance", "built-in", redistribution.balance)


def test_two_packages_of_one_name_are_told_apart_by_path(installed: Path) -> None:
    second = installed / "other-1.dist-info"
    second.mkdir()
    (second / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1\n")
    (second / "entry_points.txt").write_text("[ret_fl.policies]\nfirst = own_plugins:Demanding\n")
    with pytest.raises(
        ConfigError, match=r"both have a plug-in 'first': name it by its path, own_plugins:\w+ or own_p"
    ):
        load(POLICIES, "first")


def test_a_package_registers_a_strategy(installed: Path, tiny: Tiny) -> None:
    config = tiny({"aggregation.strategy": "halfway", "aggregation.options": "share = 0.25"})
    assert type(make_base(config)).__name__ == "Halfway"
    assert foreign_plugins(config) == [
        "aggregation.strategy: halfway (some-package 2.5, aggregation.options: share = 0.25)"
    ]
    with pytest.raises(ConfigError, match=r"aggregation\.strategy=shell is a builtin_\w+ that is neither"):
        make_base(tiny({"aggregation.strategy": "shell", "aggregation.options": "command = 'true'"}))
    five: Mapping[str, Scalar] = {"shards": 5, "quorum": 1.0, "aggregation.strategy": "krum"}
    assert type(make_base(tiny(five))).__name__ == "Krum"


def test_the_command_lists_every_plugin_with_its_package_and_settings(
    installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    shown = ret_fl("policies").output
    for point in POINTS:
        assert f"{point.setting}  called with ({', '.join(point.parameters)}), {point.side}" in shown
        assert [name for name in (*point.built_in, *point.words) if name not in shown] == []
    told = [line for line in shown.splitlines() if line.startswith("  ") and line[2] != " "]
    lines = {line.split()[0]: line for line in told}
    assert "some-package 2.5" in lines["first"] and own_plugins.First.__doc__ in lines["first"]
    assert "cannot be used" in lines["gone"] and "No module named 'nowhere'" in lines["gone"]
    assert "redistribution.options: from-shard = -1: Only from this shard; -1: from all." in shown
    assert "aggregation.strategy  called with (options), server, entry points ret_fl.strategies" in shown
    assert [name for name in STRATEGIES if name not in lines] == []
    assert "aggregation.options: server_momentum = 0.9" in shown and "eta_l" not in shown
    assert "aggregation.options: share = 0.5" in shown and "that is neither a subclass" in lines["shell"]
    hidden = [line for line in told if "by its path only" in line]
    assert [line.split()[0] for line in hidden] == ["balance", "quarantine", "none", "krum"]
    assert "own_plugins:First" in hidden[0] and "test_aggregation:halfway" in hidden[3]


# --- what plug-ins give back ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "told"), [("bad_moves", "moves from shards that do not own"), ("no_moves", "Moves, not list")]
)
def test_moves_that_the_ledger_cannot_take_are_refused_with_the_policys_name(name: str, told: str) -> None:
    ledger = ledger_of(3, 3)
    (policy,) = load(POLICIES, f"own_plugins:{name}")
    with pytest.raises(LedgerError, match=rf"redistribution\.policy: {name}.*{told}"):
        propose([policy.call], ledger, [report(0, [0, 1])], rng(), RedistributionConfig())


def dealt(how: str) -> np.ndarray:
    config = PartitionConfig(scheme="own_plugins:Dealt", options=f'how = "{how}"')
    return partition(7, None, 0, 3, config, 0)


def test_a_shard_policy_deals_samples() -> None:
    assert dealt("in turn").tolist() == [0, 1, 2, 0, 1, 2, 0]


@pytest.mark.parametrize(
    ("how", "told"),
    [("shares", "float64"), ("too many", r"0\.\.2"), ("too few", r"shape \(6,\)"), ("below", r"0\.\.2"),
     ("one", "leaves shards")],
)  # fmt: skip
def test_samples_dealt_badly_are_refused(how: str, told: str) -> None:
    with pytest.raises(ConfigError, match=rf"partition\.scheme=own_plugins:Dealt .*{told}"):
        dealt(how)


def gated(gate: str, **more: Scalar) -> Mapping[str, Scalar]:
    return ALL_T | {"agc.mode": gate} | {f"agc.{key}": value for key, value in more.items()}


@pytest.mark.parametrize("micro_batch", [0, 3])
def test_weights_of_0_and_1_train_bit_for_bit_as_agc_does(tiny: Tiny, micro_batch: int) -> None:
    micro: Mapping[str, Scalar] = {"micro-batch": micro_batch, "local-epochs": 3}
    results = []
    for gate in ("agc", "own_plugins:same_as_agc"):
        config = tiny(gated(gate), micro)
        results.append(train(config, make_order(config, bank=1.3)))
    agc, weighed = results
    assert 0 < agc.report.skip_rate < 1 and weighed.report.skip_rate == agc.report.skip_rate
    assert not differ(agc.weights, weighed.weights)
    assert np.array_equal(agc.report.skips, weighed.report.skips)


def test_the_loss_of_a_batch_is_its_weighted_mean() -> None:
    loss, weight = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1.0, 0.0, 0.5])
    assert gated_mean(loss, weight).item() == pytest.approx((1 + 2) / 1.5)
    assert gated_mean(loss, 0.1 * weight).item() == pytest.approx(0.3)  # not scaled up: less to learn from


def test_a_weight_of_a_half_changes_the_mean_by_nothing_and_zero_takes_no_step(tiny: Tiny) -> None:
    off, half = (train(tiny(gated(g))) for g in ("off", "own_plugins:Constant"))
    assert half.report.skip_rate == 0
    for name, value in off.weights.items():
        np.testing.assert_allclose(half.weights[name], value, atol=1e-5)
    none = tiny(gated("own_plugins:Constant", options="weight = 0.0"))
    skipped = train(none)
    assert skipped.report.skip_rate == 1 and not differ(
        skipped.weights, train(tiny(gated("agc")), make_order(tiny(gated("agc")), bank=SKIP_ALL)).weights
    )


def test_a_soft_gate_in_parts_of_a_batch_comes_to_what_it_does_in_the_whole(tiny: Tiny) -> None:
    whole, parts = (
        train(config, make_order(config, bank=1.3))
        for config in (tiny(gated("examples.gate:Soft"), {"micro-batch": size, "precision": "fp32"}) for size in (0, 3))
    )
    ungated = train(tiny(gated("off")), make_order(tiny(gated("off")), bank=1.3))
    # the first steps of Adam magnify the rounding of gradients that are almost 0
    assert 5 * furthest(parts.weights, whole.weights) < furthest(ungated.weights, whole.weights)


def test_a_gate_remembers_within_a_round_and_is_new_in_the_next(tiny: Tiny) -> None:
    config = tiny(gated("own_plugins:Alternating"))
    first, second = (train(config, make_order(config, round=n)) for n in (1, 2))
    assert first.report.skips.sum() == second.report.skips.sum() > 0
    assert first.report.skip_rate == pytest.approx(1 / 3, abs=0.05)  # 3 batches of 7, 7 and 6


@pytest.mark.parametrize(
    ("gate", "options", "told"),
    [("own_plugins:one_weight", "", r"one weight a sample, bool or float32 \(7,\)"),
     ("own_plugins:Constant", "weight = 1.5", r"do not lie in \[0, 1\]"),
     ("own_plugins:Constant", "weight = nan", r"do not lie in \[0, 1\]")],
)  # fmt: skip
def test_weights_that_are_none_are_refused(tiny: Tiny, gate: str, options: str, told: str) -> None:
    with pytest.raises(ConfigError, match=rf"agc\.mode={gate}.*{told}"):
        train(tiny(gated(gate, options=options)))


def test_an_augmenter_changes_what_trains_and_only_what_has_a_strength(tiny: Tiny) -> None:
    def trained(policy: str, strength: float) -> Any:
        config = tiny(ALL_T, {"taa.mode": "next-visit", "taa.policy": policy, "taa.momentum": 0.99})
        return train(config, make_order(config, strength=np.full(20, strength, np.float32))).report

    with pytest.raises(ConfigError, match=r"taa\.policy=own_plugins:cropped.*images as it got them"):
        trained("own_plugins:cropped", 1.0)
    assert trained("own_plugins:Shift", 1.0).loss != trained("own_plugins:Shift", 0.0).loss


# --- runs -------------------------------------------------------------------------------------------------------


def test_a_node_without_the_gate_is_refused_and_the_run_says_what_is_missing(tiny: Tiny) -> None:
    with pytest.raises(FederationError, match=r"Node 2 answered: ConfigError: agc\.mode: 'nowhere:Gate' cannot be imp"):
        make_federation(tiny({"agc.mode": "nowhere:Gate"})).run()


@pytest.mark.parametrize(
    "change",
    [{"redistribution.policy": "nowhere:Policy"}, {"agc.options": "soft = true"},
     {"audit.auditors": "own_plugins:First"}, {"taa.policy": "photos"},
     {"redistribution.policy": "memorized+random"}, {"aggregation.strategy": "nowhere:Make"},
     {"aggregation.strategy": "krum"}, {"aggregation.options": "eta = 1"}],
    ids=lambda c: "=".join(next(iter(c.items()))),
)  # fmt: skip
def test_a_run_with_a_bad_plugin_ends_before_it_begins(
    change: Mapping[str, Scalar], tiny: Tiny, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        run_server(tiny(change), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    told = ret_fl("run", "--out", tmp_path / "run", *(f"--set={k}={v}" for k, v in change.items()))
    assert told.exit_code == 1 and next(iter(change)) in told.output
    assert not (tmp_path / "run").exists()
    told = ret_fl("doctor", *(f"--set={k}={v}" for k, v in change.items()))
    assert told.exit_code == 1 and next(iter(change)) in told.output


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_run_goes_on_only_where_its_plugins_are_and_loses_nothing_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The policy's module is taken away after round 1 and put back; the shard policy's is not needed any more."""
    for name in ("lent_policy", "lent_shards"):
        shutil.copy(own_plugins.__file__, tmp_path / f"{name}.py")
    monkeypatch.syspath_prepend(str(tmp_path))
    own: dict[str, Scalar] = {
        "redistribution.policy": "lent_policy:First", "redistribution.options": "count = 2",
        "partition.scheme": "lent_shards:Dealt", "num-server-rounds": 3,
    }  # fmt: skip
    out = tmp_path / "run"
    config = RunConfig.from_flat(TINY | own)
    killed_at(config, out, 2, 1)

    def take_away(name: str) -> None:
        (tmp_path / f"{name}.py").unlink()
        sys.modules.pop(name, None)
        shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)

    take_away("lent_policy")
    take_away("lent_shards")
    before = files_of(out)
    with pytest.raises(ConfigError, match=r"redistribution\.policy: 'lent_policy:First' cannot be imported here"):
        run_server(config, out, resume=True)
    told = ret_fl("run", "--resume", out, "--set", "num-server-rounds=9", "--engine", "inline")
    assert told.exit_code == 1 and "lent_policy:First" in told.output
    assert files_of(out) == before
    shutil.copy(own_plugins.__file__, tmp_path / "lent_policy.py")
    run_server(config, out, resume=True)
    run = RunDir(out)
    assert [row["moved"] for row in run.rows()] == [4, 4, 0]
    flat = json.loads(run.config.read_text())
    assert flat["redistribution.policy"] == "lent_policy:First" and flat["redistribution.options"] == "count = 2"
    told_policy = "redistribution.policy: lent_policy:First (by its path, redistribution.options: count = 2)"
    assert f"| plug-in | {told_policy} |" in run.summary.read_text()


def test_the_points_read_their_parameters_from_their_protocols() -> None:
    assert [p.parameters for p in POINTS] == [
        ["num_samples", "labels", "shards", "config", "rng"],
        ["loss", "t", "seen", "config"],
        ["images", "strength", "config"],
        ["ledger", "reports", "rng", "config"],
        ["evidence"],
    ]
    flat = RunConfig().to_flat()
    assert [(p.setting in flat, p.options in flat) for p in plugins.POINTS] == [(True, True)] * 5
