"""Differential privacy of shards: what is clipped, what noise is added, what it comes to, and that nothing escapes."""

from __future__ import annotations

import io
import json
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from conftest import Federation, ret_fl, run_server
from federations import UNEQUAL, Recorder
from flwr.app import Context, Message, MessageType
from flwr.serverapp.strategy import DifferentialPrivacyServerSideAdaptiveClipping, FedAvg
from hypothesis import given
from hypothesis import strategies as st
from outcomes import Killed
from rich.console import Console
from scipy.stats import norm
from test_bad_replies import array

from clients.app import app as client_app
from ret_fl import recorder
from ret_fl.aggregation import base_state, make_base, restore_base
from ret_fl.background import background_of
from ret_fl.checkpoint import Checkpoint, load_latest, save_checkpoint
from ret_fl.config import ConfigError, RunConfig, Scalar
from ret_fl.packing import State
from ret_fl.privacy import PrivacyLog, Release, ServerSideAdaptive, epsilon, joint, wrapper_of
from ret_fl.progress import describe_row
from ret_fl.prometheus import RunCollector
from ret_fl.protocol import REPORT, TrainOrder
from ret_fl.rundir import RunDir
from ret_fl.settings import change_run
from ret_fl.status import read_status, render
from ret_fl.strategy import FederationError

Tiny = Callable[..., RunConfig]
Federate = Callable[..., Federation]

MODES = ("server-fixed", "server-adaptive", "client-fixed", "client-adaptive")
COVERED: Mapping[str, Scalar] = {
    "redistribution.policy": "none", "data.duplicates": "keep", "agc.mode": "off", "quorum": 1.0, "samples": 0,
}  # fmt: skip
"""What dp.mode asks of other settings."""


def private(mode: str, **dp: Scalar) -> Mapping[str, Scalar]:
    return COVERED | {"dp.mode": mode} | {f"dp.{key.replace('_', '-')}": value for key, value in dp.items()}


QUIET = 1e-6
"""A noise multiplier that leaves what was averaged to be read."""


def vector(state: State) -> np.ndarray:
    return np.concatenate([state[name].ravel() for name in sorted(state)]).astype(float)


def clipped(update: np.ndarray, most: float) -> np.ndarray:
    return update * min(1.0, most / float(np.linalg.norm(update)))


# --- what is clipped, and the noise, by number -------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_the_mean_of_clipped_updates_is_what_a_round_releases(tiny: Tiny, federate: Federate, mode: str) -> None:
    """Raw and EMA weights in one vector, every shard with the same weight though they are of unequal size."""
    config, seen = tiny(UNEQUAL, private(mode, noise_multiplier=QUIET, clipping_norm=0.05)), Recorder()
    config = RunConfig.from_flat(config.to_flat() | {"num-server-rounds": 1})
    fed = federate(config, seen, base=make_base(config))
    start, final = vector(fed.start), vector(fed.run())
    updates = [vector(state) - start for _, state in seen.replies if state is not None]
    lengths = np.array([np.linalg.norm(u) for u in updates])
    if mode.startswith("client"):  # what a client hands over is clipped already
        np.testing.assert_allclose(lengths, 0.05, rtol=1e-3)
    else:
        assert (lengths > 0.1).all()
    expected = np.mean([clipped(u, 0.05) for u in updates], axis=0)
    assert np.linalg.norm(final - start) <= 0.05 * (1 + 1e-3)
    np.testing.assert_allclose(final - start, expected, atol=5e-7)


@pytest.mark.parametrize("mode", ["server-fixed", "client-adaptive"])
def test_the_noise_is_as_large_as_it_says(tiny: Tiny, federate: Federate, mode: str) -> None:
    """Standard deviation z C / K on every one of a million weights, Gaussian, independent between the halves."""
    z, most, shards = 0.5, 0.3, 3
    config, seen = tiny(private(mode, noise_multiplier=z, clipping_norm=most), {"shards": shards}), Recorder()
    config = RunConfig.from_flat(config.to_flat() | {"num-server-rounds": 1})
    fed = federate(config, seen, base=make_base(config))
    start, final = fed.start, fed.run()
    wrapper = wrapper_of(fed.strategy.base)
    assert wrapper is not None
    mean = np.mean([clipped(vector(s) - vector(start), most) for _, s in seen.replies if s is not None], axis=0)
    noise = vector(final) - vector(start) - mean
    # an adaptive norm is told from a count whose noise (as large as z) the noise on weights makes up for
    expected = z * most / shards * (1 if mode.endswith("fixed") else (1 - 0.25) ** -0.5)
    assert wrapper.noise_multiplier * most / shards == pytest.approx(expected)
    assert noise.std() == pytest.approx(expected, rel=0.005)
    assert abs(noise.mean()) < 5 * expected / math.sqrt(noise.size)
    assert np.mean(np.abs(noise) > 2 * expected) == pytest.approx(2 * norm.sf(2), rel=0.03)
    half = noise.size // 2
    assert abs(np.corrcoef(noise[:half], noise[half : 2 * half])[0, 1]) < 5 / math.sqrt(half)


def test_a_server_optimizer_steps_after_the_noise_and_leaves_the_ema_alone(tiny: Tiny, federate: Federate) -> None:
    """Half of the way to the noisy mean, in the raw weights: their noise is halved, that of the EMA is whole."""
    half: Mapping[str, Scalar] = {
        "aggregation.strategy": "fedavgm",
        "aggregation.options": "server_momentum = 0.0, server_learning_rate = 0.5",
        "num-server-rounds": 1,
    }
    fed = federate(tiny(private("server-fixed", noise_multiplier=5.0, clipping_norm=0.2), half))
    final = fed.run()
    for part, share in (("raw.", 0.5), ("ema.", 1.0)):
        moved = np.concatenate([(final[k] - fed.start[k]).ravel() for k in final if k.startswith(part)])
        assert moved.std() == pytest.approx(share * 5.0 * 0.2 / 2, rel=0.01)


def test_two_runs_of_one_seed_have_different_noise(tiny: Tiny, federate: Federate) -> None:
    config = tiny(private("server-fixed"), {"num-server-rounds": 1})
    first, second = (vector(federate(config, base=make_base(config)).run()) for _ in range(2))
    assert np.abs(first - second).mean() > 0.1


@pytest.mark.parametrize(("mode", "first", "direction"), [("server-adaptive", 1e-3, 1), ("client-adaptive", 1e3, -1)])
def test_an_adaptive_norm_goes_towards_the_quantile(
    tiny: Tiny, federate: Federate, mode: str, first: float, direction: int
) -> None:
    """Up by e^(rate (1 - q)) while all are clipped, down by e^(rate q) while none is."""
    config = tiny(private(mode, noise_multiplier=QUIET, clipping_norm=first, norm_rate=0.5, target_quantile=0.25))
    fed = federate(config, base=make_base(config))
    fed.run()
    wrapper = wrapper_of(fed.strategy.base)
    assert wrapper is not None
    step = 0.5 * (0.75 if direction > 0 else -0.25)
    assert wrapper.clipping_norm == pytest.approx(first * math.exp(2 * step), rel=1e-4)


def test_a_norm_settles_where_as_many_are_clipped_as_wanted() -> None:
    """Ten shards with updates of norm 1 to 10: three of ten are clipped at a norm between 7 and 8."""
    lengths, wrapper = np.arange(1, 11), ServerSideAdaptive(FedAvg(), 0.0, 10, 0.1, 0.3, 0.2)
    for _ in range(200):
        wrapper._geometric_update(float(np.mean(lengths > wrapper.clipping_norm)))
    assert 6.5 < wrapper.clipping_norm < 8.5
    plain = DifferentialPrivacyServerSideAdaptiveClipping(FedAvg(), 0.0, 10, 0.1, 0.3, 0.2)
    for _ in range(200):
        plain._geometric_update(float(np.mean(lengths > plain.clipping_norm)))
    assert plain.clipping_norm < 1e-6, "Flower has put its direction right: _TowardsTheQuantile must go"


def test_an_adaptive_norm_outlives_an_interruption(tiny: Tiny) -> None:
    config = tiny(private("client-adaptive"))
    one, other = make_base(config), make_base(config)
    assert isinstance(one, type(other)) and wrapper_of(one) is one
    one.clipping_norm = 0.37  # type: ignore[attr-defined]
    restore_base(other, base_state(one))
    assert other.clipping_norm == 0.37  # type: ignore[attr-defined]


# --- what it comes to --------------------------------------------------------------------------------------------


def exact_delta(z: float, eps: float) -> float:
    """Balle and Wang 2018, theorem 8."""
    return float(norm.cdf(0.5 / z - eps * z) - math.exp(eps) * norm.cdf(-0.5 / z - eps * z))


@pytest.mark.parametrize(("z", "rounds", "delta"), [(1.0, 1, 1e-5), (4.0, 10, 1e-5), (0.7, 3, 1e-3), (20.0, 100, 1e-6)])
def test_epsilon_is_that_of_the_gaussian_mechanism(z: float, rounds: int, delta: float) -> None:
    found = epsilon([z] * rounds, delta)
    assert exact_delta(z / math.sqrt(rounds), found) == pytest.approx(delta, rel=1e-6)


def test_epsilon_lies_below_the_renyi_bound_and_on_the_privacy_loss_distribution() -> None:
    import dp_accounting
    from dp_accounting.pld import PLDAccountant
    from dp_accounting.rdp import RdpAccountant

    multipliers = [1.5, 1.5, 2.0, 3.0]
    renyi, distribution = RdpAccountant(), PLDAccountant()
    for z in multipliers:
        renyi.compose(dp_accounting.GaussianDpEvent(z))
        distribution.compose(dp_accounting.GaussianDpEvent(z))
    found = epsilon(multipliers, 1e-5)
    assert found < renyi.get_epsilon(1e-5)
    assert found == pytest.approx(distribution.get_epsilon(1e-5), rel=1e-3)


@given(st.lists(st.floats(0.3, 30), min_size=1, max_size=20), st.floats(0.3, 30))
def test_every_release_costs(multipliers: list[float], one_more: float) -> None:
    assert joint([*multipliers, one_more]) < joint(multipliers)
    assert epsilon([*multipliers, one_more], 1e-5) > epsilon(multipliers, 1e-5)
    assert epsilon([], 1e-5) == 0


@pytest.mark.parametrize("count_noise", [0.0, 0.6, 5.0])
def test_the_noisy_count_is_accounted_for(tiny: Tiny, count_noise: float) -> None:
    """However the noise is shared between weights and count, both together are one mechanism of multiplier z."""
    config = tiny(private("server-adaptive", noise_multiplier=0.8, count_noise=count_noise))
    wrapper = wrapper_of(make_base(config))
    assert wrapper is not None and wrapper.noise_multiplier > 0.8
    assert Release.of(wrapper, config, 1).noise_multiplier == pytest.approx(0.8)


@pytest.mark.parametrize(("strategy", "every", "released"), [("fedavg", 1, [1, 2, 3]), ("fedadam", 2, [2, 3])])
def test_a_run_tells_epsilon_round_by_round(
    tiny: Tiny, tmp_path: Path, strategy: str, every: int, released: list[int]
) -> None:
    audited: Mapping[str, Scalar] = {"samples": 12, "sample-steps": 3, "dp.audit": True} if every == 1 else {}
    more: Mapping[str, Scalar] = audited | {
        "num-server-rounds": 3, "aggregate-every": every, "aggregation.strategy": strategy, "evaluate-every": 3,
    }  # fmt: skip
    run = run_server(tiny(private("server-fixed", noise_multiplier=3.0, delta=1e-4), more), tmp_path / "run")
    assert [release.round for release in PrivacyLog(run.privacy).releases()] == released
    rows = run.rows()
    for row in rows:
        so_far = sum(round <= row["round"] for round in released)
        assert row["epsilon"] == pytest.approx(epsilon([3.0] * so_far, 1e-4))
        assert math.isnan(row["loss"]) and "train_loss" not in row
    for file in (run.metrics, run.events):
        told = [json.loads(line, parse_constant=pytest.fail) for line in file.read_text().splitlines()]
        assert any("loss" in entry and entry["loss"] is None for entry in told)
    assert "no losses told" in text_of(run) and "nan" not in text_of(run)
    families = {family.name: family.samples for family in RunCollector(run).collect()}
    assert not families["ret_fl_loss"] and not families["ret_fl_shard_loss"] and families["ret_fl_held_out_loss"]
    assert (run.path / "curves.png").is_file()
    assert math.isfinite(rows[-1]["held_out_loss"])
    assert f"epsilon {rows[-1]['epsilon']:.4g} at delta 0.0001" in run.summary.read_text()
    assert describe_row(rows[0], 3).startswith("round 1/3  no losses told  skipped")
    training = background_of(run, load_splits_of(run.read_config())).training
    assert training is not None
    assert (training.epsilon, training.delta) == (rows[-1]["epsilon"], 1e-4)
    if audited:
        assert f"epsilon {rows[-1]['epsilon']:.4g} at delta" in (run.audit / "report.html").read_text()
    assert training.final_train_loss is None and training.final_held_out_loss == rows[-1]["held_out_loss"]


def text_of(run: RunDir) -> str:
    """What `ret-fl status` says."""
    console = Console(record=True, width=200, file=io.StringIO())
    console.print(render(read_status(run)))
    return console.export_text()


def load_splits_of(config: RunConfig):  # type: ignore[no-untyped-def]
    from ret_fl.auditing import data_of

    return data_of(config)


def test_a_round_done_again_counts_again(tiny: Tiny, tmp_path: Path) -> None:
    """Its noisy weights may have been seen before the crash."""

    def dying(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
        if checkpoint.round == 2:
            raise Killed
        return save_checkpoint(folder, checkpoint, keep)

    config, out = tiny(private("server-adaptive")), tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(recorder, "save_checkpoint", dying)
        run_server(config, out)
    before = load_latest(out / "checkpoints").base_state["clipping-norm"]
    run = run_server(config, out, resume=True)
    assert [release.round for release in PrivacyLog(run.privacy).releases()] == [1, 2, 2]
    assert [row["epsilon"] for row in run.rows()] == pytest.approx([epsilon([1.0] * n, 1e-5) for n in (1, 3)])
    assert before != load_latest(out / "checkpoints").base_state["clipping-norm"]
    assert run.rows()[0]["clipping_norm"] == before


# --- that nothing goes past it -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["server-fixed", "client-adaptive"])
def test_reports_tell_nothing_of_samples(tiny: Tiny, federate: Federate, mode: str) -> None:
    config, seen = tiny(private(mode)), Recorder()
    fed = federate(config, seen, base=make_base(config))
    fed.run()
    assert len(seen.replies) == 4
    for report, _ in seen.replies:
        assert math.isnan(report.loss) and report.images == report.num_examples
        assert not any(getattr(report, name).size for name in ("ids", "memorized", "high_loss", "log_ratio_sum"))
        assert not any(getattr(report, name).any() for name in ("bin_mean", "level_draws", "bank_values"))
    assert not fed.strategy.ledger.visits.any() and not fed.strategy.ledger.draws.any()
    for _, order in seen.orders:
        assert np.isnan(order.log_ratio).all() and (order.probability == 1).all() and not order.bank_visits.any()
    told = json.dumps([summary.row() for summary in fed.rounds])
    assert '"loss": NaN' in told and 'high_loss": [1' not in told


def test_a_client_that_tells_of_its_samples_is_dropped(tiny: Tiny, federate: Federate) -> None:
    def talking(message: Message, context: Context) -> Message:
        reply = client_app(message, context)
        if message.metadata.message_type == MessageType.TRAIN and TrainOrder.unpack(message.content)[0].shard == 1:
            array("bin_mean", lambda x: x + 0.5, REPORT)(message, reply)
        return reply

    config = tiny(private("server-fixed"))
    with pytest.raises(FederationError, match=r"shard 1: it tells of its samples, which dp.mode=server-fixed forbids"):
        federate(config, talking, base=make_base(config)).run()


def test_a_base_without_noise_is_refused(tiny: Tiny, federate: Federate) -> None:
    with pytest.raises(ValueError, match="the base adds no noise"):
        federate(tiny(private("server-fixed")), base=FedAvg())
    assert wrapper_of(federate(tiny(private("server-fixed"))).strategy.base) is not None


def test_a_lost_shard_stops_the_run(tiny: Tiny, federate: Federate) -> None:
    """The noise is made for the mean of all of them."""

    def absent(message: Message, context: Context) -> Message:
        if message.metadata.message_type == MessageType.TRAIN and TrainOrder.unpack(message.content)[0].shard == 1:
            raise RuntimeError("away")
        return client_app(message, context)

    config = tiny(private("client-fixed"))
    with pytest.raises(FederationError, match="1 of 2 shards replied soundly, quorum needs 2"):
        federate(config, absent, base=make_base(config)).run()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"redistribution.policy": "balance"}, "redistribution.policy=none"),
        ({"data.duplicates": "weight"}, "data.duplicates=keep"),
        ({"partition.clusters": "spread"}, r"partition\.clusters=any"),
        ({"agc.mode": "agc"}, "agc.mode=off"),
        ({"quorum": 0.5}, "quorum=1"),
        ({"aggregate-every": 0}, "aggregate-every above 0"),
        ({"samples": 10}, r"samples=0, or dp\.audit=true"),
        ({"aggregation.strategy": "krum"}, r"aggregation.strategy=fedavg or fedavgm .* \(got krum"),
        ({"aggregation.strategy": "test_aggregation:halfway"}, r"\(got test_aggregation:halfway"),
        ({"dp.mode": "server-adaptive", "dp.count-noise": 0.5}, r"dp.count-noise \(0.5\) must be above half"),
        ({"dp.noise-multiplier": 0.0}, "dp.noise-multiplier = 0.0 is not allowed"),
        ({"dp.mode": "local"}, "dp.mode = 'local' is not allowed"),
    ],
)
def test_what_it_does_not_cover_is_refused_by_setting(change: Mapping[str, Scalar], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        RunConfig.from_flat({**private("server-fixed"), **change})
    assert RunConfig.from_flat({**private("server-fixed")}).private


def test_all_that_is_missing_is_named_at_once() -> None:
    with pytest.raises(ConfigError) as refusal:
        RunConfig.from_flat({"dp.mode": "client-fixed"})
    for setting in ("redistribution.policy=none", "data.duplicates=keep", "quorum=1", "samples=0"):
        assert setting in str(refusal.value)


def test_a_missing_accountant_is_named_before_training(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    config = tiny(private("server-fixed"))
    with pytest.raises(ConfigError, match=r"pip install 'ret-fl\[dp\]'"):
        run_server(config, tmp_path / "run")
    for command in (["run", "--out", tmp_path / "run"], ["doctor"]):
        told = ret_fl(*command, *(f"--set={k}={v}" for k, v in private("server-fixed").items()))
        assert told.exit_code == 1 and "pip install 'ret-fl[dp]'" in told.output
    assert not (tmp_path / "run").exists()


def test_a_resumed_run_cannot_start_its_norm_anew(tmp_path: Path) -> None:
    adaptive, fixed = (RunDir(tmp_path / mode) for mode in ("server-adaptive", "server-fixed"))
    for run in (adaptive, fixed):
        run.path.mkdir()
        run.write_config(RunConfig.from_flat(private(run.path.name)))
    before = adaptive.config.read_text()
    with pytest.raises(ConfigError, match=r"dp\.clipping-norm is where dp\.mode=server-adaptive starts from"):
        change_run(adaptive.path, {"dp.clipping-norm": 2.0})
    assert adaptive.config.read_text() == before
    change_run(adaptive.path, {"dp.clipping-norm": 1.0, "dp.norm-rate": 0.1})
    assert change_run(fixed.path, {"dp.clipping-norm": 2.0})[1].dp.clipping_norm == 2
