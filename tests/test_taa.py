"""Threshold-Aware Augmentation: each image as strongly as it is close to the threshold, and never a false character."""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ret_fl.mitigation.taa import AugmentQueue, RandAugment, strength, threshold_ratio

Policy = Literal["glyph", "photo"]
policies = st.sampled_from(["glyph", "photo"])


def noise_images(count: int, channels: int = 3, side: int = 12) -> Tensor:
    return torch.rand(count, channels, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


def letter(side: int = 16) -> Tensor:
    """An L, far from its mirror image: float [1, side, side]."""
    image = torch.full((1, side, side), -1.0)
    image[:, 2:-2, 3:6] = 1
    image[:, -5:-2, 3:-4] = 1
    return image


def closer_to_mirror(images: Tensor, original: Tensor) -> Tensor:
    """bool [B]: nearer to the mirrored original than to the original."""
    to_original = (images - original).square().flatten(1).sum(1)
    return (images - original.flip(-1)).square().flatten(1).sum(1) < to_original


@settings(deadline=None)
@given(st.lists(st.floats(0, 20), min_size=2, max_size=20), st.floats(0.1, 20))
def test_strength_is_one_up_to_the_threshold_and_falls_above_it(ratios: list[float], kappa: float) -> None:
    ratio = torch.tensor(sorted(ratios), dtype=torch.float64)
    a = strength(ratio, kappa)
    assert (a[ratio <= 1] == 1).all()
    assert ((a >= 0) & (a <= 1)).all()
    assert (a.diff() <= 0).all()
    above = ratio > 1
    torch.testing.assert_close(
        a[above], torch.tensor([math.exp(-kappa * (r - 1)) for r in ratio[above].tolist()]).double()
    )


def test_strength_falls_strictly_with_the_distance_to_the_threshold() -> None:
    a = strength(torch.tensor([1.0, 1.01, 1.1, 1.5, 2.0]), 5.0)
    assert (a.diff() < 0).all()
    assert a[3].item() == pytest.approx(math.exp(-2.5))


def test_the_ratio_is_one_at_the_gate_and_an_empty_bank_means_far_above_it() -> None:
    ratio = threshold_ratio(torch.tensor([0.5, 0.25, 0.5]), torch.tensor([1.0, 1.0, 0.0]), 2.0)
    assert ratio[:2].tolist() == [1.0, 0.5]
    assert ratio[2] > 1e9 and strength(ratio, 5.0)[2] == 0


@settings(deadline=None, max_examples=30)
@given(policies, st.integers(0, 10_000), st.lists(st.sampled_from([0.0, 0.3, 1.0]), min_size=4, max_size=4))
def test_strength_zero_leaves_an_image_bit_identical_whatever_its_neighbours_get(
    policy: Policy, seed: int, strengths: list[float]
) -> None:
    torch.manual_seed(seed)
    images = noise_images(4)
    a = torch.tensor(strengths)
    out = RandAugment(policy, magnitude=30.0)(images, a)
    assert torch.equal(out[a == 0], images[a == 0])


@pytest.mark.parametrize("policy", ["glyph", "photo"])
def test_each_image_has_its_own_strength(policy: Policy) -> None:
    torch.manual_seed(0)
    images = noise_images(1).expand(900, -1, -1, -1)
    a = torch.tensor([0.0, 0.2, 1.0]).repeat(300)
    out = RandAugment(policy)(images, a)
    changed = (out - images).abs().flatten(1).amax(1) > 1e-3
    assert not changed[a == 0].any()
    # two operations on the same axis may undo each other: a tenth of the draws at most
    assert changed[a == 1].float().mean() > 0.85
    distance = (out - images).square().flatten(1).mean(1)
    assert distance[a == 0.2].median() < 0.5 * distance[a == 1].median()


def test_magnitude_zero_augments_nothing() -> None:
    torch.manual_seed(0)
    images = noise_images(16)
    torch.testing.assert_close(RandAugment("glyph", magnitude=0.0)(images, torch.ones(16)), images, atol=1e-5, rtol=0)


def test_glyphs_are_never_mirrored() -> None:
    torch.manual_seed(0)
    out = RandAugment("glyph")(letter().expand(1000, -1, -1, -1), torch.ones(1000))
    assert not closer_to_mirror(out, letter()).any()


def test_photographs_are_mirrored_half_of_the_time_at_full_strength_and_less_below() -> None:
    torch.manual_seed(0)
    images = letter().expand(1000, -1, -1, -1)
    full, weak = (closer_to_mirror(RandAugment("photo")(images, torch.full((1000,), a)), letter()) for a in (1.0, 0.2))
    assert abs(full.float().mean() - 0.5) < 0.08
    assert abs(weak.float().mean() - 0.1) < 0.05


@settings(deadline=None, max_examples=40)
@given(
    policies,
    st.integers(0, 10_000),
    st.sampled_from([1, 3]),
    st.integers(1, 4),
    st.floats(0, 30),
    st.lists(st.floats(0, 1, width=32), min_size=1, max_size=5),
)
def test_augmented_images_keep_range_shape_and_type(
    policy: Policy, seed: int, channels: int, ops: int, magnitude: float, strengths: list[float]
) -> None:
    torch.manual_seed(seed)
    # saturated images: what overshoots shows
    images = noise_images(len(strengths), channels, 7).sign()
    before = images.clone()
    out = RandAugment(policy, ops, magnitude)(images, torch.tensor(strengths))
    assert out.shape == images.shape and out.dtype == torch.float32
    assert out.abs().max() <= 1 + 1e-5
    assert torch.equal(images, before)


@pytest.mark.parametrize("magnitude", [5.0, 10.0])
def test_two_shifts_move_a_shape_no_farther_than_magnitude_allows(magnitude: float) -> None:
    torch.manual_seed(0)
    side, count = 41, 2000
    dot = torch.full((count, 1, side, side), -1.0)
    dot[:, :, side // 2 - 1 : side // 2 + 2, side // 2 - 1 : side // 2 + 2] = 1
    mass = (RandAugment("glyph", magnitude=magnitude)(dot, torch.ones(count)) + 1)[:, 0]
    along = torch.arange(side) - side // 2
    centre = (
        torch.stack([(mass * along).sum((1, 2)), (mass * along[:, None]).sum((1, 2))], dim=1)
        / mass.sum((1, 2))[:, None]
    )
    moved = centre.norm(dim=1)
    farthest = 2 * 0.45 * magnitude / 30 * side
    assert moved.max() <= 1.05 * farthest + 0.1
    assert moved.max() > 0.9 * farthest
    # either way along either axis
    assert (centre.amax(0) > 0.4 * farthest).all() and (centre.amin(0) < -0.4 * farthest).all()


def test_colour_operations_blend_as_pil_does_and_glyphs_get_none() -> None:
    torch.manual_seed(0)
    # a plain colour: moving it changes nothing, so what changes is brightness, or contrast and colour
    colour = torch.tensor([0.2, 0.4, 0.6])
    images = (2 * colour - 1)[None, :, None, None].expand(600, 3, 6, 6)
    amount = 0.9 * 5 / 30
    grey = colour.mean()
    expected = [
        colour,
        *(colour * (1 + s * amount) for s in (-1, 1)),
        *(grey + (colour - grey) * (1 + s * amount) for s in (-1, 1)),
    ]
    out = (RandAugment("photo", ops=1)(images, torch.ones(600)) + 1) / 2
    nearest = (out[:, None] - torch.stack(expected)[None, :, :, None, None]).abs().flatten(2).amax(2).min(dim=1)
    assert nearest.values.max() < 1e-5
    shares = torch.bincount(nearest.indices, minlength=5) / 600
    # of nine operations six leave a plain colour alone: the five moves and sharpness
    assert (shares - torch.tensor([6 / 9, 1 / 18, 1 / 18, 1 / 9, 1 / 9])).abs().max() < 0.08
    torch.testing.assert_close(RandAugment("glyph")(images, torch.ones(600)), images, atol=1e-5, rtol=0)


def test_a_seed_repeats_an_augmentation() -> None:
    images, a = noise_images(4), torch.ones(4)
    first, second, third = (RandAugment("photo")(images, a) for seed in (3, 3, 4) if torch.manual_seed(seed))
    assert torch.equal(first, second) and not torch.equal(first, third)


@settings(deadline=None)
@given(st.lists(st.integers(0, 9), max_size=12), st.integers(1, 6))
def test_the_queue_loses_nothing_keeps_order_and_gives_whole_batches_until_flushed(
    pushes: list[int], batch_size: int
) -> None:
    queue = AugmentQueue(batch_size)
    out: list[tuple[Tensor, Tensor]] = []
    pushed = 0
    for size in pushes:
        position = torch.arange(pushed, pushed + size)
        queue.push(position, position / 1000)
        pushed += size
        out += queue.batches()
        assert all(len(p) == batch_size for p, _ in out)
        assert pushed - batch_size * len(out) < batch_size  # nothing waits that could go
    out += queue.batches(flush=True)
    assert all(0 < len(p) <= batch_size for p, _ in out)
    position = torch.cat([p for p, _ in out]) if out else torch.empty(0)
    assert position.tolist() == list(range(pushed))
    assert all(torch.equal(a, p / 1000) for p, a in out)
    assert list(queue.batches(flush=True)) == []
