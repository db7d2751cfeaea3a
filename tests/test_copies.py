"""All scores at once are those of each alone."""

import pytest
import torch
from image_sets import brute_force, moved, noise
from torch import Tensor

from ret_fl.audit import schema
from ret_fl.audit.copies import replication
from ret_fl.audit.finding import find_copies
from ret_fl.audit.replication import carlini_ratio, copy_report, excess, memorized_quantity, neighbour_ratio


def audited(real: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Samples of which 20 copy (8 of them two canaries, 6 of them shifted), training, reference, held-out, canaries."""
    train, reference, held_out = real
    repeated = torch.cat([train, train[[3, 7]].repeat(4, 1, 1, 1)])
    canaries = torch.tensor([[3, 200, 202, 204, 206], [7, 201, 203, 205, 207]])
    copies = torch.cat([train[[3] * 6 + [7] * 2], train[20:26] + 0.01, moved(train[30:36], 1, -1)])
    return torch.cat([held_out[:80], copies]), repeated, reference, held_out[80:], canaries


def test_replication_holds_what_each_score_says_alone(real: tuple[Tensor, Tensor, Tensor]) -> None:
    generated, train, reference, held_out, canaries = audited(real)
    found, details = replication(generated, train, reference, held_out, canaries, worst=5)
    assert found == schema.Replication.model_validate_json(found.model_dump_json())
    assert [entry.variant for entry in found.copy_rates] == ["pixels", "shift", "flip"]
    for entry in found.copy_rates:
        report = copy_report(generated, train, reference, variant=entry.variant, canaries=canaries)
        floor = copy_report(held_out, train, reference, variant=entry.variant)
        assert (entry.rate.value, entry.rate.low, entry.rate.high) == (report.rate, report.low, report.high)
        assert entry.floor == schema.Interval(value=floor.rate, low=floor.low, high=floor.high)
        assert entry.above_floor is not None
        assert (entry.above_floor.value, entry.above_floor.low, entry.above_floor.high) == excess(report, floor)
        assert (entry.distinct, entry.canary, entry.ordinary) == (
            report.distinct,
            report.canary_rate,
            report.ordinary_rate,
        )
        assert torch.equal(details.generated.reports[entry.variant].ratio, report.ratio)
        assert torch.equal(details.generated.reports[entry.variant].index, report.index)
    ratio, index = neighbour_ratio(generated, train)
    assert found.k == 50
    assert {entry.tau: entry.generated for entry in found.memorized} == memorized_quantity(ratio)
    floors = memorized_quantity(neighbour_ratio(held_out, train)[0])
    assert {entry.tau: entry.floor for entry in found.memorized} == floors
    (carlini,) = found.carlini
    assert carlini.alpha == 0.5
    assert carlini.generated == float((carlini_ratio(generated, train)[0] <= 1).double().mean())
    assert carlini.floor == float((carlini_ratio(held_out, train)[0] <= 1).double().mean())
    assert found.distance == pytest.approx(brute_force(generated, train, 1)[0].quantile(0.5).item())
    assert found.held_out_distance == pytest.approx(brute_force(held_out, train, 1)[0].quantile(0.5).item())
    assert torch.equal(details.generated.index, index)
    assert torch.equal(details.generated.neighbour_ratio, ratio)


def test_replication_counts_canaries_and_shifted_copies(real: tuple[Tensor, Tensor, Tensor]) -> None:
    generated, train, reference, held_out, canaries = audited(real)
    found, _ = replication(generated, train, reference, held_out, canaries)
    raw, shifted, _ = found.copy_rates
    assert raw.canary_hits == shifted.canary_hits == [6, 2]
    assert raw.canary == pytest.approx(0.08)
    assert 0.14 <= raw.rate.value < 0.18
    assert 0.2 <= shifted.rate.value < 0.24
    assert raw.above_floor is not None
    assert raw.above_floor.low > 0.05


def test_the_worst_copies_are_one_for_each_training_image(real: tuple[Tensor, Tensor, Tensor]) -> None:
    generated, train, reference, held_out, canaries = audited(real)
    found, _ = replication(generated, train, reference, held_out, canaries, worst=8)
    assert [copy.train for copy in found.worst[:2]] == [3, 7]
    assert {copy.train for copy in found.worst[2:]} == set(range(20, 26))
    assert [copy.sample for copy in found.worst[:2]] == [80, 86]
    assert [copy.ratio for copy in found.worst] == sorted(copy.ratio for copy in found.worst)
    assert found.worst[0].distance == found.worst[0].ratio == 0.0
    assert len(replication(generated, train, reference, held_out, canaries, worst=1000)[0].worst) < 100


def test_where_only_moved_images_show_copies_the_worst_are_those(real: tuple[Tensor, Tensor, Tensor]) -> None:
    """The verdict speaks of images moved by a pixel: so do the pairs shown beside it."""
    train, reference, held_out = real
    copies = moved(train[30:60], 1, -1)
    found, _ = replication(torch.cat([held_out[:70], copies]), train, reference, held_out[100:], None)
    assert find_copies(found.copy_rates)[1] == found.copy_rates[1]
    assert found.worst_variant == "shift"
    assert [w.ratio for w in found.worst] == [0.0] * 24
    assert all(w.distance == 0 and w.train == w.sample - 70 + 30 for w in found.worst)
    by_pixels, _ = replication(torch.cat([held_out[:70], train[:30]]), train, reference, held_out[100:], None)
    assert by_pixels.worst_variant == "pixels"


def test_replication_without_reference_held_out_or_canaries(real: tuple[Tensor, Tensor, Tensor]) -> None:
    generated, train, _, _, _ = audited(real)
    found, details = replication(generated, train, None, None, None)
    assert found.copy_rates == []
    assert details.held_out is found.held_out_distance is None
    assert {entry.floor for entry in found.memorized} == {None}
    assert [copy.train for copy in found.worst[:2]] == [3, 7]
    assert {copy.ratio for copy in found.worst} == {None}
    empty, _ = replication(generated, train, real[1], None, torch.zeros(0, 5, dtype=torch.int64))
    assert empty.copy_rates[0].canary is empty.copy_rates[0].canary_hits is empty.copy_rates[0].floor is None


def test_uint8_sets_are_audited_like_floats(real: tuple[Tensor, Tensor, Tensor]) -> None:
    generated, train, reference, held_out, canaries = audited(real)
    whole = [(images * 255).round().to(torch.uint8) for images in (generated, train, reference, held_out)]
    floats = [images.float() / 255 for images in whole]
    found, _ = replication(whole[0].numpy(), *whole[1:], canaries, memory_mb=2)
    assert found == replication(*floats, canaries)[0]


def test_few_training_images_need_a_smaller_k(real: tuple[Tensor, Tensor, Tensor]) -> None:
    train, reference, held_out = real
    few = train[:24], reference[:24], held_out[:50], None
    with pytest.raises(
        ValueError, match=r"k must lie in 1\.\.24, the number of distinct training images, got 50: lower k"
    ):
        replication(train[:9], *few)
    with pytest.warns(UserWarning, match="only 24 distinct training images: .* k = 24"):
        found, _ = replication(train[:9], *few, k=None)
    assert found.k == 24
    assert replication(train[:9], train, None, None, None, k=None)[0].k == 50


def test_held_out_images_of_another_set_are_refused(real: tuple[Tensor, Tensor, Tensor]) -> None:
    """A model that copies all it knows would have a floor as high as its copy rate."""
    train, reference, held_out = real
    with pytest.raises(ValueError, match="held_out shares 2 images with train"):
        replication(train, train, reference, torch.cat([held_out[:50], train[:2]]), None)
    with pytest.raises(ValueError, match="held_out shares 3 images with reference"):
        replication(train, train, reference, torch.cat([held_out[:50], reference[:3]]), None)


def test_grey_columns_are_not_mirrored() -> None:
    sets = [noise(i, 60, 1, 8, 1) for i in range(3)]
    assert [entry.variant for entry in replication(*sets, None, None)[0].copy_rates] == ["pixels", "shift"]


def test_bad_settings_are_refused(real: tuple[Tensor, Tensor, Tensor]) -> None:
    train, _, held_out = real
    with pytest.raises(ValueError, match="worst must be >= 0"):
        replication(held_out, train, None, None, None, worst=-1)
    with pytest.raises(ValueError, match="held_out have 49 values each and train 64"):
        replication(held_out, train, None, held_out[:, :, 1:, 1:], None)
