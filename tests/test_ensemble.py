"""Proxies that are never averaged: how they train, what is kept of them, and how images are drawn from them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MEMORIZED, PLAIN, Federation, fresh_weights, make_trainer, ret_fl, run_server
from diffusers import DDPMPipeline
from federations import Recorder, assert_equal_states, spoiling
from flwr.app import Message
from flwr.serverapp.strategy import FedMedian
from outcomes import SETTINGS, Outcome, assert_same_outcome, killed_at, uninterrupted
from safetensors.numpy import load_file
from tiny_pipelines import assert_same, drawn, small_pipeline, small_unet

from ret_fl.audit.folder import load_audit
from ret_fl.audit.generate import generate, load_denoiser
from ret_fl.audit.pipelines import load_pixels
from ret_fl.checkpoint import load_latest
from ret_fl.comparison import checkpoint_models
from ret_fl.config import ConfigError, RunConfig, Scalar
from ret_fl.data.sources import load_splits
from ret_fl.diffusion.ensemble import AveragedUNet, Ensemble, read_ensemble, write_ensemble
from ret_fl.packing import State, unpack_state
from ret_fl.protocol import TrainOrder
from ret_fl.proxy import train_proxy
from ret_fl.rundir import RunDir
from ret_fl.trainer import part_of

Tiny = Callable[..., RunConfig]
Federate = Callable[..., Federation]
APART: dict[str, Scalar] = {"aggregate-every": 0, "redistribution.policy": "none"}


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two proxies that were never averaged, with unequal shards."""
    flat = MEMORIZED | APART | {"partition.sizes": "0.7,0.3", "evaluate-every": 3, "local-epochs": 1, "samples": 0}
    return run_server(RunConfig.from_flat(flat), tmp_path_factory.mktemp("apart") / "run").path


def saved(run: Path, shard: int) -> State:
    return load_file(next((run / "final" / f"shard-{shard}" / "unet").glob("*.safetensors")))


def ema_of(state: State) -> State:
    return {name: value.numpy() for name, value in part_of(state, "ema.").items()}


# --- training ---------------------------------------------------------------------------------------------------


def test_every_proxy_trains_as_if_it_were_alone(tiny: Tiny, federate: Federate) -> None:
    """Each comes to what a plain loop over its own shard, from the common start, comes to."""
    config = tiny(PLAIN, APART, {"num-server-rounds": 3})
    fed = federate(config)
    fed.run()
    data, cells = load_splits(config.data), config.diffusion.timesteps
    for shard in range(2):
        ids, weights, state = fed.strategy.ledger.ids(shard), fresh_weights(config), None
        for round in (1, 2, 3):
            n = len(ids)
            order = TrainOrder(
                config, "x", data.train.fingerprint, shard, round, 0, "global", True, ids, np.ones(n, np.float32),
                np.zeros(n, np.float32), np.zeros(n, np.float32), np.zeros(n, np.float32),
                np.zeros(cells, np.float32), np.zeros(cells, np.int64),
            )  # fmt: skip
            trained = train_proxy(make_trainer(config), order, weights, data.train, data.kind, state)
            weights, state = trained.weights, trained.state
        kept = fed.strategy.shards[shard].weights
        assert kept is not None
        assert_equal_states(unpack_state(kept), weights)


def test_an_order_brings_its_own_proxy_and_a_reply_takes_it_back(tiny: Tiny, tmp_path: Path) -> None:
    seen = Recorder()
    run = run_server(tiny(APART, {"num-server-rounds": 2}), tmp_path / "run", seen)
    assert [(order.start, order.upload) for _, order in seen.orders] == [("sent", True)] * 4
    for report, state in seen.replies[2:]:
        assert state is not None and report.moments == "carried"
        ema = ema_of(state)
        final = saved(run.path, report.shard)
        assert ema.keys() == final.keys() and all(np.array_equal(ema[name], final[name]) for name in final)
    assert any((saved(run.path, 0)[name] != saved(run.path, 1)[name]).any() for name in saved(run.path, 0))
    assert [row["aggregated"] for row in run.rows()] == [False, False]


def test_a_reply_that_is_lost_leaves_the_proxy_as_it_was_and_says_so(tiny: Tiny, tmp_path: Path) -> None:
    def empty(request: Message, reply: Message) -> None:
        reply.content.clear()

    config = tiny(APART, {"retries": 0, "num-server-rounds": 2})
    lossy = Recorder(spoiling(1, empty, rounds=()))
    whole = run_server(config, tmp_path / "whole", lossy)
    before = next(state for report, state in lossy.replies if (report.shard, report.round) == (1, 1))
    run = run_server(config, tmp_path / "run", spoiling(1, empty, rounds=(2,)))
    assert list(run.rows()[1]["failed_shards"]) == ["1"]
    assert "| failed shard rounds | 1 |" in run.summary.read_text()
    assert before is not None
    ema = ema_of(before)
    assert all(np.array_equal(ema[name], value) for name, value in saved(run.path, 1).items())
    assert all(np.array_equal(saved(whole.path, 0)[name], value) for name, value in saved(run.path, 0).items())


def test_a_checkpoint_without_one_of_its_proxies_is_not_taken(apart: Path, tmp_path: Path) -> None:
    shutil.copytree(apart / "checkpoints", tmp_path / "checkpoints")
    assert load_latest(tmp_path / "checkpoints").round == 3
    (tmp_path / "checkpoints" / "round-00003" / "shard-1.safetensors").unlink()
    assert load_latest(tmp_path / "checkpoints").round == 2


def test_what_averages_nothing_takes_no_base_and_no_way_to_draw_what_is_not_there(federate: Federate) -> None:
    with pytest.raises(ValueError, match="leave out base=FedMedian"):
        federate(RunConfig.from_flat({"aggregate-every": 0, "data.limit": 24}), base=FedMedian())
    with pytest.raises(ConfigError, match=r"aggregation.strategy=krum is not used where nothing is averaged"):
        RunConfig.from_flat({"aggregate-every": 0, "aggregation.strategy": "krum"})
    with pytest.raises(ConfigError, match="set aggregate-every=0"):
        RunConfig.from_flat({"ensemble": "average"})


def test_losses_during_training_are_the_means_of_the_proxies(apart: Path) -> None:
    from ret_fl.diffusion.objective import Objective
    from ret_fl.evaluation import fixed_losses

    data = load_splits(RunDir(apart).read_config().data)
    sizes = read_ensemble(apart / "final").samples
    expected = 0.0
    for folder, size in zip(read_ensemble(apart / "final").members, sizes, strict=True):
        unet, scheduler, fold = load_pixels(folder)
        objective = Objective(scheduler, torch.device("cpu"), fold=fold)
        own = fixed_losses(unet, objective, data.train, torch.arange(len(data.train))).mean()
        expected += size / sum(sizes) * float(own)
    assert RunDir(apart).rows()[-1]["train_loss"] == pytest.approx(expected, rel=1e-5)


# --- drawing ----------------------------------------------------------------------------------------------------


@pytest.fixture
def ensemble(tmp_path: Path) -> Path:
    """Three random pipelines of classes, for shards of 1, 1 and 2 samples."""
    folder = tmp_path / "ensemble"
    for shard in range(3):
        small_pipeline(folder / f"shard-{shard}", seed=shard, num_class_embeds=3)
    write_ensemble(folder, "choose", [1, 1, 2])
    return folder


def test_each_image_is_that_of_the_proxy_chosen_for_it(ensemble: Path) -> None:
    images, alone = drawn(ensemble, 12), [drawn(member, 12) for member in read_ensemble(ensemble).members]
    which = read_ensemble(ensemble).chosen(0, range(12))
    assert set(which) == {0, 1, 2}
    for i, shard in enumerate(which):
        assert_same(images[i], alone[shard][i])
    for size in (1, 5):
        assert_same(drawn(ensemble, 12, batch_size=size), images)


def test_proxies_are_chosen_by_share_of_samples_and_by_seed(tmp_path: Path) -> None:
    ensemble = Ensemble(tmp_path, "choose", (10, 30, 60))
    which = ensemble.chosen(0, range(4000))
    np.testing.assert_allclose(np.bincount(which) / 4000, [0.1, 0.3, 0.6], atol=0.03)
    np.testing.assert_array_equal(ensemble.chosen(0, range(100, 200)), which[100:200])
    assert (ensemble.chosen(1, range(4000)) != which).any()


def test_an_average_predicts_the_mean_weighted_by_samples(ensemble: Path) -> None:
    write_ensemble(ensemble, "average", [1, 1, 2])
    unet, _, _ = load_pixels(ensemble)
    assert isinstance(unet, AveragedUNet)
    x, t, labels = torch.randn(4, 1, 8, 8), torch.tensor([0, 10, 50, 99]), torch.tensor([0, 1, 2, 0])
    own = [small_unet(seed=k, num_class_embeds=3)(x, t, class_labels=labels).sample for k in range(3)]
    with torch.no_grad():
        predicted = unet(x, t, class_labels=labels, return_dict=False)[0]
    torch.testing.assert_close(predicted, own[0] / 4 + own[1] / 4 + own[2] / 2)
    found = generate(ensemble, samples=3, steps=3)
    assert found.ensemble == "average" and found.parameters == 3 * small_unet(num_class_embeds=3).num_parameters()


def test_equal_proxies_draw_as_one_of_them_would(tmp_path: Path) -> None:
    for shard in range(2):
        small_pipeline(tmp_path / f"shard-{shard}")
    for how in ("choose", "average"):
        write_ensemble(tmp_path, how, [3, 5])  # type: ignore[arg-type]
        assert_same(drawn(tmp_path, 6), drawn(tmp_path / "shard-0", 6))


def test_kept_images_are_of_one_way_to_draw_and_of_all_proxies(ensemble: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    before = drawn(ensemble, 6, cache=cache)
    write_ensemble(ensemble, "average", [1, 1, 2])
    assert not torch.allclose(drawn(ensemble, 6, cache=cache), before, atol=1e-3)
    small_pipeline(ensemble / "shard-2", seed=9, num_class_embeds=3)
    assert_same(drawn(ensemble, 6, cache=cache), drawn(ensemble, 6))
    assert len(list(cache.iterdir())) == 3


@pytest.mark.parametrize("damage", ["a proxy gone", "not JSON", "another size"])
def test_a_damaged_ensemble_is_named(ensemble: Path, damage: str) -> None:
    write_ensemble(ensemble, "average", [1, 1, 2])
    if damage == "a proxy gone":
        shutil.rmtree(ensemble / "shard-1")
    elif damage == "not JSON":
        (ensemble / "ensemble.json").write_text("{")
    else:
        small_pipeline(ensemble / "shard-1", side=16, num_class_embeds=3)
    with pytest.raises(ValueError, match={"a proxy gone": "shard-1", "not JSON": "damaged"}.get(damage, "differ")):
        generate(ensemble, samples=2, steps=2)


def test_sample_draws_from_one_proxy_or_from_all(apart: Path, tmp_path: Path) -> None:
    def draw(*more: object) -> np.ndarray:
        out = tmp_path / "x.npy"
        done = ret_fl("sample", apart, "--count", 8, "--steps", 4, "--out", out, "--device", "cpu", *more)
        assert done.exit_code == 0, done.output
        return np.load(out).astype(int)

    chosen, averaged, alone = draw(), draw("--ensemble", "average"), [draw("--shard", k) for k in (0, 1)]
    which = read_ensemble(apart / "final").chosen(0, range(8))
    expected = np.stack([alone[shard][i] for i, shard in enumerate(which)])
    assert np.abs(chosen - expected).max() <= 1
    np.testing.assert_array_equal(draw("--ensemble", "choose"), chosen)
    for other in (*alone, chosen):
        assert np.abs(averaged - other).max() > 1


@pytest.mark.parametrize(
    ("one_model", "options", "words"),
    [
        (True, ["--ensemble", "choose"], "--ensemble: "),
        (True, ["--shard", "0"], "--shard: "),
        (False, ["--shard", "2"], "has the shards 0..1"),
        (False, ["--shard", "1", "--ensemble", "average"], "leave out --ensemble"),
    ],
)
def test_sample_refuses_what_the_model_has_not(apart: Path, one_model: bool, options: list[str], words: str) -> None:
    result = ret_fl("sample", apart / "final" / "shard-0" if one_model else apart, *options)
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit)
    assert words in result.stderr.replace("\n", " ")


# --- audits -----------------------------------------------------------------------------------------------------


def test_a_run_is_audited_by_what_its_ensemble_draws(apart: Path, tmp_path: Path) -> None:
    done = ret_fl("audit", apart, "--samples", 8, "--steps", 2, "--members", 10, "--out", tmp_path)
    assert done.exit_code == 0, done.output
    audit, pictures = load_audit(tmp_path)
    assert (audit.model.ensemble, audit.model.samples) == ("choose", 8)
    assert audit.leakage is not None and audit.leakage.membership
    again = generate(apart, samples=8, seed=5, steps=2, cache=tmp_path / "samples").images
    torch.testing.assert_close(pictures.samples, again, rtol=0, atol=1 / 255)
    assert ret_fl("report", tmp_path).exit_code == 0
    assert "drawn from proxies kept apart" in (tmp_path / "report.html").read_text()


def test_leakage_looks_at_the_mean_of_the_predictions_and_a_proxy_can_be_looked_at_alone(apart: Path) -> None:
    whole, alone = load_denoiser(apart, "cpu"), load_denoiser(apart / "final" / "shard-1", "cpu")
    assert whole is not None and isinstance(whole[0], AveragedUNet)
    assert whole[0].shares == pytest.approx((24 / 34, 10 / 34))
    assert alone is not None
    assert_equal_states({k: v.detach().numpy() for k, v in alone[0].named_parameters()}, saved(apart, 1))


def test_diffusers_opens_every_proxy_as_the_summary_says(apart: Path) -> None:
    assert 'DDPMPipeline.from_pretrained("final/shard-0")  # one of 2 proxies' in (apart / "summary.md").read_text()
    for shard in range(2):
        pipeline = DDPMPipeline.from_pretrained(apart / "final" / f"shard-{shard}", local_files_only=True)
        opened = {name: value.detach().numpy() for name, value in pipeline.unet.named_parameters()}
        assert_equal_states(opened, saved(apart, shard))


def test_its_checkpoints_are_ensembles_too(apart: Path, tmp_path: Path) -> None:
    models = checkpoint_models([apart], tmp_path)
    assert [read_ensemble(model).samples for model in models] == [(24, 10)] * 3
    for shard in range(2):
        assert_equal_states(load_file(next((models[-1] / f"shard-{shard}" / "unet").glob("*.safetensors"))),
                            saved(apart, shard))  # fmt: skip


def test_how_it_draws_is_a_setting_of_the_run(apart: Path, tmp_path: Path) -> None:
    config = RunDir(apart).read_config()
    shutil.copytree(apart, tmp_path / "run")
    again = RunConfig.from_flat(config.to_flat() | {"ensemble": "average"})
    RunDir(tmp_path / "run").write_config(again)
    run = run_server(again, tmp_path / "run", resume=True)
    assert json.loads((run.final / "ensemble.json").read_text())["ensemble"] == "average"
    assert generate(run.path, samples=2, steps=2).ensemble == "average"


def test_proxies_apart_resume_bit_for_bit_with_dropped_copies_in_quarantine(tiny: Tiny, tmp_path: Path) -> None:
    copies: dict[str, Scalar] = {"data.canaries": 2, "data.canary-repeats": 3, "data.duplicates": "drop"}
    config = tiny(SETTINGS, APART, copies, {"redistribution.policy": "high-loss+quarantine", "num-server-rounds": 3})
    killed_at(config, tmp_path / "run", 3, 0)
    resumed = Outcome.of(run_server(config, tmp_path / "run", resume=True))
    dropped = load_splits(config.data).canaries[:, 1:]
    assert np.isinf(resumed.ledger.copies[dropped]).all() and (resumed.ledger.visits[dropped] == 0).all()
    assert sum(row["moved"] for row in resumed.rows) > 0 and resumed.rows[-2]["quarantined"] > 0
    assert_same_outcome(resumed, uninterrupted(config))
