"""A proxy trains as a plain loop would, skips what it should, and keeps and tells what it must."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PLAIN, fresh_weights, make_trainer
from federations import assert_equal_states
from hypothesis import given
from hypothesis import strategies as st
from orders import ALL_T, SKIP_ALL, assert_equal_moments, differ, make_order, taa, train
from torch import nn

from ret_fl.config import RunConfig
from ret_fl.data.sources import load_splits
from ret_fl.diffusion.models import build_unet
from ret_fl.diffusion.objective import make_scheduler
from ret_fl.packing import State
from ret_fl.protocol import TrainOrder
from ret_fl.proxy import ProxyDivergedError, TrainedProxy, learning_rate, round_seed, train_proxy, visit_plan
from ret_fl.proxystate import ProxyFiles

Tiny = Callable[..., RunConfig]

# --- the same as a plain loop -----------------------------------------------------------------------------------


class PlainLoop:
    """Denoising training as anyone would write it: no gate, no bank, no report. It owns its model all along."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.data = load_splits(config.data).train
        self.noise = make_scheduler(config.diffusion)
        unet = build_unet(config.model, self.data.image_shape, self.data.num_classes, config.seed)
        self.unet = unet.to(memory_format=torch.channels_last)
        self.ema = {name: p.detach().clone() for name, p in self.unet.state_dict().items()}
        self.optimizer = torch.optim.AdamW(
            self.unet.parameters(), weight_decay=config.optimizer.weight_decay, fused=True
        )
        self.steps = 0
        self.near = [p.detach().clone() for p in self.unet.parameters()]

    def round(self, order: TrainOrder) -> None:
        settings = self.config.optimizer
        seed = round_seed(self.config.seed, order.round, order.shard)
        plan = visit_plan(order.probability, self.config.local_epochs * len(order.ids), np.random.default_rng(seed))
        torch.manual_seed(seed)
        self.unet.train()
        for position in np.array_split(plan, -(-len(plan) // self.config.batch_size)):
            images, _ = self.data.fetch(torch.from_numpy(order.ids[position]))
            t = torch.randint(1000, (len(images),))
            noise = torch.randn_like(images)
            noisy = self.noise.add_noise(images, noise, t).contiguous(memory_format=torch.channels_last)
            loss = (self.unet(noisy, t).sample - noise).square().mean()
            if settings.proximal_mu:
                far = sum((p - g).square().sum() for p, g in zip(self.unet.parameters(), self.near, strict=True))
                loss = loss + settings.proximal_mu / 2 * far
            self.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.unet.parameters(), settings.grad_clip)
            self.steps += 1
            self.optimizer.param_groups[0]["lr"] = settings.lr * min(1.0, self.steps / settings.warmup_steps)
            self.optimizer.step()
            for name, value in self.unet.state_dict().items():
                self.ema[name] += (1 - self.config.ema.decay) * (value - self.ema[name])

    def state(self) -> State:
        raw = {f"raw.{name}": value.numpy() for name, value in self.unet.state_dict().items()}
        return raw | {f"ema.{name}": value.numpy() for name, value in self.ema.items()}


def assert_close_states(left: State, right: State, tolerance: float) -> None:
    assert left.keys() == right.keys()
    assert max(float(np.abs(left[name] - right[name]).max()) for name in left) <= tolerance


def test_without_mitigation_a_round_equals_a_plain_training_loop(tiny: Tiny) -> None:
    config = tiny(PLAIN, {"local-epochs": 3, "diffusion.prediction": "epsilon"})
    order = make_order(config)
    plain = PlainLoop(config)
    plain.round(order)
    trained = train(config, order).weights
    assert_close_states(trained, plain.state(), 1e-6)
    assert differ(trained, fresh_weights(config))


@pytest.mark.parametrize("mu", [0.01, 3.0])
def test_the_proximal_term_is_that_of_fedprox(tiny: Tiny, mu: float) -> None:
    """Against mu / 2 |w - w_global|^2 added to the loss, by autograd; and it keeps proxies nearer."""
    free = tiny(PLAIN, {"local-epochs": 3, "diffusion.prediction": "epsilon"})
    config = tiny(PLAIN, {"local-epochs": 3, "diffusion.prediction": "epsilon", "optimizer.proximal-mu": mu})
    order, start = make_order(config), fresh_weights(config)
    plain = PlainLoop(config)
    plain.round(order)
    trained, unbound = train(config, order).weights, train(free, make_order(free)).weights
    assert_close_states(trained, plain.state(), 2e-6)
    assert differ(trained, unbound)

    def distance(state: State) -> float:
        return sum(float(np.square(state[k] - start[k]).sum()) for k in start if k.startswith("raw."))

    assert distance(trained) < distance(unbound)


def test_a_proxy_that_goes_on_is_pulled_to_the_global_weights(tiny: Tiny) -> None:
    """Between averages it starts from its own weights, which are not what FedProx measures from."""
    config = tiny(PLAIN, {"optimizer.proximal-mu": 50.0, "local-epochs": 4, "optimizer.grad-clip": 0.0})
    held = train(tiny(PLAIN, {"local-epochs": 4}), make_order(tiny(PLAIN), upload=False))
    assert held.state.weights is not None
    start = fresh_weights(config)
    on = train(config, make_order(config, round=2, start="proxy"), start, held.state)

    def distance(state: State) -> float:
        return sum(float(np.square(state[k] - start[k]).sum()) for k in start if k.startswith("raw."))

    assert on.report.start == "proxy"
    assert distance(on.weights) < 0.5 * distance(held.state.weights)


def test_carried_moments_make_three_rounds_one_training_run(tiny: Tiny, tmp_path: Path) -> None:
    """Through the client's files, and through a U-Net whose memory layout is not that of the files."""
    config = tiny(PLAIN, {"local-epochs": 2, "diffusion.prediction": "epsilon"})
    files = ProxyFiles(tmp_path, "test")
    plain, weights = PlainLoop(config), fresh_weights(config)
    for number in (1, 2, 3):
        order = make_order(config, round=number)
        plain.round(order)
        trained = train(config, order, weights, files.load(order.shard, number - 1))
        files.save(order.shard, number, trained.state, keep=1)
        weights = trained.weights
    assert_close_states(weights, plain.state(), 1e-6)


def test_moments_are_carried_only_where_asked_and_there(tiny: Tiny) -> None:
    carrying, forgetting = tiny(PLAIN), tiny(PLAIN, {"optimizer.carry-moments": False})
    first = train(carrying)
    order = make_order(carrying, round=2)
    carried = train(carrying, order, first.weights, first.state)
    lost = train(carrying, order, first.weights, None)
    not_asked = train(forgetting, order, first.weights, first.state)
    assert [r.report.moments for r in (first, carried, lost, not_asked)] == ["fresh", "carried", "fresh", "fresh"]
    assert carried.state.moments.updates == 2 * first.state.moments.updates
    assert lost.state.moments.updates == first.state.moments.updates
    assert differ(carried.weights, lost.weights)
    assert_equal_states(lost.weights, not_asked.weights)


def test_a_proxy_goes_on_from_its_own_weights_only_where_told(tiny: Tiny) -> None:
    config = tiny(PLAIN)
    held = train(config, make_order(config, upload=False))
    assert held.state.weights is not None
    on = train(config, make_order(config, round=2, start="proxy"), fresh_weights(config), held.state)
    anew = train(config, make_order(config, round=2, start="global"), fresh_weights(config), held.state)
    lost = train(config, make_order(config, round=2, start="proxy"), fresh_weights(config), None)
    by_hand = train(config, make_order(config, round=2), held.weights, held.state)
    assert [r.report.start for r in (on, anew, lost)] == ["proxy", "global", "global"]
    assert_equal_states(on.weights, by_hand.weights)
    assert differ(on.weights, anew.weights)


def test_uploaded_weights_are_not_kept_a_second_time(tiny: Tiny) -> None:
    assert train(tiny(PLAIN)).state.weights is None


# --- AGC --------------------------------------------------------------------------------------------------------


def test_the_cosine_schedule_goes_from_the_whole_rate_to_none() -> None:
    config = RunConfig.from_flat({"optimizer.schedule": "cosine", "optimizer.lr": 2e-3, "num-server-rounds": 8})
    rates = [learning_rate(config, round) for round in range(1, 9)]
    assert rates[0] == 2e-3 and rates[4] == pytest.approx(1e-3)
    assert all(a > b > 0 for a, b in itertools.pairwise(rates))
    assert learning_rate(config, 9) == pytest.approx(0, abs=1e-12)


def test_a_scheduled_rate_is_the_rate_trained_with(tiny: Tiny) -> None:
    half_way = {"num-server-rounds": 8, "optimizer.lr": 2e-3, "optimizer.schedule": "cosine"}
    scheduled, constant = tiny(PLAIN, half_way), tiny(PLAIN, {"num-server-rounds": 8, "optimizer.lr": 1e-3})
    half, whole = (train(c, make_order(c, round=5)).weights for c in (scheduled, constant))
    assert_close_states(half, whole, 1e-6)
    earlier = train(scheduled, replace(make_order(scheduled, round=5), round=4)).weights
    assert differ(half, earlier)


def test_a_mem_ratio_without_bound_trains_exactly_as_agc_off(tiny: Tiny) -> None:
    off, infinite = tiny(PLAIN), tiny(PLAIN, ALL_T, {"agc.mode": "agc", "agc.mem-ratio": 1e30})
    left, right = train(off, make_order(off, bank=0.5)), train(infinite, make_order(infinite, bank=0.5))
    assert_equal_states(left.weights, right.weights)
    assert_equal_moments(left.state.moments, right.state.moments)
    assert right.report.skip_rate == 0


def test_agc_changes_training_where_it_skips(tiny: Tiny) -> None:
    off, on = tiny(PLAIN), tiny(PLAIN, ALL_T, {"agc.mode": "agc"})
    left, right = train(off, make_order(off, bank=1.0)), train(on, make_order(on, bank=1.0))
    assert 0 < right.report.skip_rate < 1
    assert differ(left.weights, right.weights)


@pytest.mark.parametrize("carried", [True, False])
def test_batches_skipped_whole_leave_weights_moments_and_ema_alone(tiny: Tiny, carried: bool) -> None:
    """Though AdamW would decay the weights and its moments even at zero gradient."""
    config = tiny(ALL_T, {"optimizer.weight-decay": 0.5, "local-epochs": 2})
    before = train(config)
    state = before.state if carried else None
    after = train(config, make_order(config, round=2, bank=SKIP_ALL), before.weights, state)
    assert after.report.skip_rate == 1
    assert differ(before.weights, fresh_weights(config))
    assert_equal_states(before.weights, after.weights)
    if carried:
        assert_equal_moments(before.state.moments, after.state.moments)
    else:
        assert after.state.moments.updates == 0
        assert all(not m.any() for m in after.state.moments.second.values())
    assert (after.report.skips == after.report.visits).all()
    touched = after.report.bank_visits > 100
    assert (after.report.bank_values[touched] < SKIP_ALL).all()  # the bank learns from skipped losses too
    assert (after.report.bank_values[~touched] == np.float32(SKIP_ALL)).all()


def test_random_skips_come_at_their_rate_and_below_t_max(tiny: Tiny) -> None:
    config = tiny(ALL_T, {"agc.mode": "random", "agc.random-rate": 0.5, "local-epochs": 20, "model.preset": "tiny"})
    assert 0.4 < train(config).report.skip_rate < 0.6  # 400 draws: four standard errors
    assert train(tiny(ALL_T, {"agc.mode": "random", "agc.random-rate": 0.5, "agc.t-max": 1})).report.skip_rate < 0.1


# --- which sample is visited when -------------------------------------------------------------------------------

probabilities = st.lists(st.floats(0.0078125, 1, width=32), min_size=1, max_size=30)


@given(probabilities, st.integers(1, 200), st.integers(0, 2**31))
def test_the_number_of_visits_does_not_depend_on_the_probabilities(
    chances: list[float], visits: int, seed: int
) -> None:
    plan = visit_plan(np.array(chances, np.float32), visits, np.random.default_rng(seed))
    assert plan.shape == (visits,)
    assert plan.min() >= 0
    assert plan.max() < len(chances)


@given(st.integers(1, 30), st.integers(1, 5), st.integers(0, 2**31))
def test_equal_probabilities_give_whole_passes_in_fresh_order(n: int, passes: int, seed: int) -> None:
    plan = visit_plan(np.full(n, 0.3, np.float32), n * passes, np.random.default_rng(seed)).reshape(passes, n)
    assert (np.sort(plan, axis=1) == np.arange(n)).all()


def test_visits_follow_the_probabilities() -> None:
    chance = np.repeat(np.array([1, 0.5, 0.25, 0.05], np.float32), 50)
    counts = np.bincount(visit_plan(chance, 40_000, np.random.default_rng(0)), minlength=len(chance))
    frequency = counts.reshape(4, 50).sum(axis=1) / counts[:50].sum()
    np.testing.assert_allclose(frequency, [1, 0.5, 0.25, 0.05], atol=0.02)


def test_a_quarantined_shard_sees_as_many_images(tiny: Tiny) -> None:
    config = tiny({"local-epochs": 4})
    chance = np.where(np.arange(20) < 5, np.float32(0.25), np.float32(1))
    report = train(config, make_order(config, probability=chance)).report
    assert report.visits.sum() == report.images == 80
    assert report.visits[:5].mean() < report.visits[5:].mean()


# --- reports ----------------------------------------------------------------------------------------------------


def test_a_full_report_speaks_of_every_sample_in_the_orders_order(tiny: Tiny) -> None:
    config = tiny(ALL_T, {"local-epochs": 3})
    order = make_order(config, bank=1.0)
    report = train(config, order).report
    assert report.num_examples == len(order.ids)
    np.testing.assert_array_equal(report.ids, order.ids)
    assert (report.visits == 3).all()
    assert report.skip_rate == pytest.approx(report.skips.sum() / report.visits.sum())
    assert (report.draws <= report.visits).all()
    assert report.draws.sum() == report.bin_count.sum()
    low = int(0.4 * len(report.level_draws))
    np.testing.assert_array_equal(report.level_draws[:low], report.bin_count[:low])
    assert (report.level_draws.sum(), report.level_skips.sum()) == (report.visits.sum(), report.skips.sum())
    assert abs(report.log_ratio_sum.sum()) < 1e-9  # ratios to the shard's own mean


def test_both_tails_are_ranked(tiny: Tiny) -> None:
    config = tiny(ALL_T, {"local-epochs": 5, "report-tail": 0.25})
    report = train(config, make_order(config, bank=1.0)).report
    place = {int(i): k for k, i in enumerate(report.ids)}
    rates = report.skips / report.visits
    ratio = np.where(report.draws > 0, report.log_ratio_sum / np.maximum(report.draws, 1), -np.inf)
    told = [rates[place[int(i)]] for i in report.memorized]
    assert len(told) == 5
    assert told == sorted(rates, reverse=True)[:5]
    np.testing.assert_allclose(report.memorized_score, told, rtol=1e-6)
    np.testing.assert_allclose(report.high_loss_score, sorted(ratio, reverse=True)[:5], rtol=1e-5)


def test_a_tails_report_names_only_the_tails(tiny: Tiny) -> None:
    full, tails = (tiny(ALL_T, {"local-epochs": 5, "report-tail": 0.1, "report": kind}) for kind in ("full", "tails"))
    whole, part = train(full, make_order(full, bank=1.0)), train(tails, make_order(tails, bank=1.0))
    assert_equal_states(whole.weights, part.weights)
    assert set(part.report.ids) == set(part.report.memorized) | set(part.report.high_loss)
    assert 0 < len(part.report.ids) <= 4
    assert part.report.num_examples == 20  # the weight in the average is still the shard's
    place = np.searchsorted(whole.report.ids, part.report.ids)
    for column in ("visits", "skips", "draws", "log_ratio_sum", "strength"):
        np.testing.assert_array_equal(getattr(part.report, column), getattr(whole.report, column)[place])


def test_nobody_is_called_memorized_where_nothing_was_skipped(tiny: Tiny) -> None:
    report = train(tiny(PLAIN)).report
    assert len(report.memorized) == 0
    assert len(report.high_loss) > 0


# --- hygiene ----------------------------------------------------------------------------------------------------


def test_the_same_order_trains_the_same_proxy_and_leaves_everything_it_was_given(tiny: Tiny) -> None:
    config = tiny(taa("next-visit"))
    data, trainer = load_splits(config.data), make_trainer(config)
    first = train_proxy(trainer, make_order(config), fresh_weights(config), data.train, data.kind, None)
    order = make_order(config, round=2, bank=1.0)
    rng = torch.get_rng_state()

    def second() -> TrainedProxy:
        return train_proxy(trainer, order, first.weights, data.train, data.kind, first.state)

    once, twice = second(), second()
    assert_equal_states(once.weights, twice.weights)
    assert_equal_moments(once.state.moments, twice.state.moments)
    np.testing.assert_array_equal(once.report.strength, twice.report.strength)
    assert not order.strength.any()
    assert (order.bank_values == 1).all()
    assert torch.equal(rng, torch.get_rng_state())
    assert_equal_states(first.weights, train(config).weights)


def test_shards_and_rounds_draw_different_noise(tiny: Tiny) -> None:
    config = tiny(PLAIN)
    results = [train(config, make_order(config, **change)) for change in ({}, {"shard": 2}, {"round": 2})]
    assert len({r.report.loss for r in results}) == 3


def test_training_that_diverges_says_what_to_change(tiny: Tiny) -> None:
    config = tiny(PLAIN, {"optimizer.lr": 1e12, "optimizer.warmup-steps": 0, "local-epochs": 4})
    with pytest.raises(ProxyDivergedError, match=r"shard 1, round 1.*optimizer\.lr"):
        train(config)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_a_gpu_trains_the_same_proxy(tiny: Tiny) -> None:
    config = tiny(ALL_T, {"precision": "fp32", "device": "cuda"})
    before = train(config, device="cuda")
    after = train(config, make_order(config, round=2, bank=SKIP_ALL), before.weights, before.state, device="cuda")
    assert differ(before.weights, fresh_weights(config))
    assert_equal_states(before.weights, after.weights)
    assert_equal_moments(before.state.moments, after.state.moments)
    one = train(config, make_order(config, round=2), before.weights, before.state, device="cuda")
    other = train(config, make_order(config, round=2), before.weights, before.state, device="cpu")
    assert one.report.moments == "carried"
    # the CPU draws other noise: the same kind of step, not the same step
    assert one.state.moments.updates == other.state.moments.updates
