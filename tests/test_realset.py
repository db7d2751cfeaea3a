"""Sets of real images are checked, never copied, and searched in every position that a variant allows."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from image_sets import STEPS, moved, noise
from torch import Tensor

from ret_fl.audit.realset import Variant, deduplicate
from ret_fl.audit.replication import copy_rate, copy_report, neighbour_ratio

PEAK = """
import torch
from ret_fl.audit.replication import neighbour_ratio

def kilobytes(name):
    return int(next(line for line in open("/proc/self/status") if line.startswith(name)).split()[1])

torch.set_num_threads(1)
train = torch.randint(0, 256, (40000, 3072), dtype=torch.uint8)
train[7] = train[3]
neighbour_ratio(train[:64], train[:300], memory_mb=32)  # what the libraries load once
before = kilobytes("VmRSS")
neighbour_ratio(train[:64], train, memory_mb=32)
print((kilobytes("VmHWM") - before) / 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux' /proc")
def test_a_large_uint8_set_is_never_held_as_floats() -> None:
    # The set is 117 MB, a float copy would be 469 MB more and a copy without the duplicate 117.
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 32 + 48


def test_deduplicate_keeps_first_occurrences() -> None:
    images = noise(0, 6, 1, 8, 8)
    assert deduplicate(images[[3, 1, 3, 0, 1, 5]]).tolist() == [0, 1, 3, 5]
    assert deduplicate(torch.tensor([[0.0, 1.0], [-0.0, 1.0], [1e-6, 1.0]])).tolist() == [0, 2]


def test_shifted_copies_are_found_by_the_shift_variant_alone(real: tuple[Tensor, Tensor, Tensor]) -> None:
    train, reference, held_out = real
    copies = torch.cat([moved(train[i::8], *step) for i, step in enumerate(s for s in STEPS if s != (0, 0))])
    originals = torch.cat([torch.arange(i, 200, 8) for i in range(8)])
    copies = (copies + 0.02 * noise(0, *copies.shape)).clamp(0, 1)
    raw, shifted = (copy_report(copies, train, reference, variant=v) for v in ("pixels", "shift"))
    assert raw.rate < 0.05
    assert shifted.rate == 1.0
    assert torch.equal(shifted.index, originals)
    assert copy_report(held_out, train, reference, variant="shift").rate < 0.03


def test_mirrored_copies_are_found_by_the_flip_variant_alone(real: tuple[Tensor, Tensor, Tensor]) -> None:
    train, reference, held_out = real
    raw, flipped = (copy_report(train[:60].flip(3), train, reference, variant=v) for v in ("pixels", "flip"))
    # 0 and 8 may be their own mirror images
    assert raw.rate < 0.25
    assert flipped.rate == 1.0
    assert torch.equal(flipped.distance, torch.zeros(60, dtype=torch.float64))
    assert torch.equal(flipped.index, torch.arange(60))
    assert copy_report(held_out, train, reference, variant="flip").rate < 0.03


@pytest.mark.parametrize("variant", ["shift", "flip"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 5, 2), (2, 1, 6)])
def test_moved_distances_equal_a_brute_force_over_all_positions(variant: Variant, shape: tuple[int, int, int]) -> None:
    generated, train, reference = (noise(i, n, *shape) for i, n in enumerate((40, 60, 60)))

    def closest(points: Tensor) -> tuple[Tensor, Tensor]:
        versions = [moved(points, *step) for step in STEPS] if variant == "shift" else [points, points.flip(3)]
        gaps = [generated.double().flatten(1)[:, None] - v.double().flatten(1) for v in versions]
        return torch.stack([gap.square().sum(-1) for gap in gaps]).amin(0).min(1)

    report = copy_report(generated, train, reference, variant=variant)
    torch.testing.assert_close(report.distance, closest(train)[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(report.ratio, closest(train)[0] / closest(reference)[0], rtol=1e-5, atol=0)
    assert torch.equal(report.index, closest(train)[1])


def test_an_image_that_both_sets_hold_in_some_position_is_no_copy(real: tuple[Tensor, Tensor, Tensor]) -> None:
    train, reference, _ = real
    reference = torch.cat([train[:1].flip(3), reference[1:]])
    assert copy_report(train[:2], train, reference, variant="flip").ratio.tolist() == [1.0, 0.0]


def test_images_that_cannot_move_are_refused() -> None:
    flat = [noise(i, 60, 64) for i in range(3)]
    with pytest.raises(ValueError, match=r"'shift' moves images \[N, C, H, W\].*train are \[N, 64\]"):
        copy_report(*flat, variant="shift")
    with pytest.raises(ValueError, match="W >= 2"):
        copy_report(*(images[:, None, :, None] for images in flat), variant="flip")
    with pytest.raises(ValueError, match="one of pixels, shift, flip, got 'rotate'"):
        copy_report(*flat, variant="rotate")  # type: ignore[arg-type]


def test_a_reference_that_holds_training_images_is_refused(real: tuple[Tensor, Tensor, Tensor]) -> None:
    train, reference, held_out = real
    with pytest.raises(ValueError, match="shares 1 images"):
        copy_rate(held_out, train, torch.cat([reference[1:], train[:1]]))


def test_a_reference_of_another_size_is_reported(real: tuple[Tensor, Tensor, Tensor]) -> None:
    train, reference, held_out = real
    with pytest.warns(UserWarning, match="200 distinct images, reference 150"):
        copy_rate(held_out, torch.cat([train, train]), reference[:150])


def test_a_mixed_value_range_is_reported(real: tuple[Tensor, Tensor, Tensor]) -> None:
    train, reference, held_out = real
    with pytest.warns(UserWarning, match=r"generated range over -1\.\.1"):
        copy_rate(2 * held_out - 1, train, reference)


def test_k_counts_distinct_training_images() -> None:
    with pytest.raises(ValueError, match="number of distinct training images, got 50"):
        neighbour_ratio(noise(0, 3, 64), noise(1, 30, 64).repeat(4, 1))
