"""What a proxy is trained on under threshold-aware augmentation."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from conftest import fresh_weights
from federations import assert_equal_states
from orders import ALL_T, SKIP_ALL, differ, make_order, taa, train

from ret_fl.config import RunConfig

Tiny = Callable[..., RunConfig]


def test_next_visit_raises_the_strength_of_what_was_nearly_skipped(tiny: Tiny) -> None:
    config = tiny(taa("next-visit", momentum=0.25))
    skipped = train(config, make_order(config, bank=SKIP_ALL)).report
    np.testing.assert_allclose(skipped.strength, 0.75)
    far = train(config, make_order(config, bank=1e-6)).report
    assert (far.strength == 0).all()
    between = train(config, make_order(config, bank=1.0)).report.strength
    assert ((between > 0) & (between <= 0.75)).all()
    assert len(np.unique(between)) > 5


def test_next_visit_augments_by_the_strength_the_order_carries(tiny: Tiny) -> None:
    config = tiny(taa("next-visit", magnitude=30.0))
    strong = np.ones(20, np.float32)
    plain, augmented = (train(config, make_order(config, strength=s)) for s in (0 * strong, strong))
    assert differ(plain.weights, augmented.weights)
    assert plain.report.images == augmented.report.images == 20


def test_two_pass_band_trains_clean_where_losses_are_far_from_the_threshold(tiny: Tiny) -> None:
    config, off = tiny(taa("two-pass-band")), tiny(ALL_T)
    far = train(config, make_order(config))
    assert_equal_states(far.weights, train(off).weights)
    assert far.report.images == 20


def test_near_the_threshold_means_near_a_samples_own_where_the_gate_is_its_own(tiny: Tiny) -> None:
    """A usual loss of half of the bank's is the paper's gate with a bank half as high; unknown ones are the paper's."""
    own, papers = (tiny(taa("next-visit"), {"agc.mode": mode, "agc.mem-ratio": 1e-6 + 1}) for mode in ("own", "agc"))
    bank, half = 1.0, np.full(20, np.log(0.5), np.float32)
    strengths = [
        train(config, make_order(config, bank=value, usual=usual)).report.strength
        for config, value, usual in ((own, bank, half), (papers, bank / 2, half), (own, bank, 0 * half))
    ]
    np.testing.assert_allclose(strengths[0], strengths[1], atol=1e-5)
    assert np.abs(strengths[0] - strengths[2]).max() > 1e-4


def test_two_pass_band_redraws_augmented_what_is_in_the_band(tiny: Tiny) -> None:
    config = tiny(taa("two-pass-band", bar=1e12))  # the band holds every kept loss
    trained = train(config, make_order(config, bank=1.0))
    drawn = int(trained.report.visits.sum())
    kept, redrawn = drawn - int(trained.report.skips.sum()), trained.report.images - drawn
    assert 0 < redrawn <= kept < redrawn + 4  # less than half a batch is let go at the end
    assert trained.state.moments.updates == -(-redrawn // 8)  # no clean step, then the redraws in batches of 8


def test_two_pass_band_sees_no_more_images_than_other_modes(tiny: Tiny) -> None:
    config = tiny(taa("two-pass-band", bar=1e12), {"local-epochs": 10})
    report = train(config, make_order(config, bank=1.0)).report
    assert report.visits.sum() < 200 <= report.images < 200 + 2 * 8


@pytest.mark.parametrize("mode", ["next-visit", "two-pass-band"])
def test_taa_leaves_timesteps_alone_that_agc_does_not_gate(tiny: Tiny, mode: str) -> None:
    config = tiny(taa(mode), {"agc.t-max": 1})
    trained = train(config, make_order(config, bank=SKIP_ALL))
    assert trained.report.images == 20
    assert (trained.report.strength == 0).all()
    assert trained.state.moments.updates == 3


def test_two_pass_all_trains_only_on_augmented_redraws(tiny: Tiny) -> None:
    config = tiny(taa("two-pass-all"))
    trained = train(config, make_order(config, bank=1.0))
    kept, images = 20 - int(trained.report.skips.sum()), trained.report.images
    assert 0 < images <= kept < images + 4
    assert trained.state.moments.updates == -(-images // 8)
    assert trained.report.visits.sum() == 20
    nothing = train(config, make_order(config, bank=SKIP_ALL))
    assert nothing.report.images == 0
    assert_equal_states(nothing.weights, fresh_weights(config))
