"""Images are prepared as a model's own preprocessing would show them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_models import MEAN, STD, pictures, write_settings
from PIL import Image
from torch import Tensor

from ret_fl.audit.preprocessing import Preprocessing


def pil_input(image: Tensor, size: tuple[int, int], crop: tuple[int, int], resample: Image.Resampling) -> Tensor:
    """The textbook way: PIL's resize to (height, width), centre crop, normalise; float32 [3, h, w]."""
    resized = Image.fromarray(image.permute(1, 2, 0).numpy()).resize(size[::-1], resample)
    top, left = (size[0] - crop[0]) // 2, (size[1] - crop[1]) // 2
    cut = np.asarray(resized)[top : top + crop[0], left : left + crop[1]] / 255
    return torch.tensor((cut - MEAN) / STD, dtype=torch.float32).permute(2, 0, 1)


@pytest.mark.parametrize("resample", [Image.Resampling.BILINEAR, Image.Resampling.BICUBIC])
@pytest.mark.parametrize("side", [36, 90])
def test_preprocessing_equals_pil_when_shrinking_and_enlarging(
    tmp_path: Path, resample: Image.Resampling, side: int
) -> None:
    images = pictures(3)
    prepare = Preprocessing.from_file(write_settings(tmp_path, size={"shortest_edge": side}, resample=int(resample)))
    expected = torch.stack([pil_input(i, (int(side * 48 / 40), side), (32, 32), resample) for i in images])
    # PIL rounds to 8 bits after each of its two passes.
    torch.testing.assert_close(prepare(images / 255), expected, atol=1.5 / 255 / min(STD), rtol=0)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"size": {"height": 50, "width": 34}},
        {"size": 36, "crop_size": 30},
        {"do_center_crop": False},
        {"do_resize": False},
        {"do_normalize": False},
        {"do_rescale": False},
        {"rescale_factor": 1 / 127.5},
    ],
)
def test_preprocessing_equals_the_processor_of_transformers(tmp_path: Path, changes: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    images = pictures(3)
    prepare = Preprocessing.from_file(write_settings(tmp_path, **changes))
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path, backend="pil", local_files_only=True)
    expected = processor(list(images.numpy()), return_tensors="pt", input_data_format="channels_first")["pixel_values"]
    scale = 255 if changes.get("do_rescale") is False else 2
    torch.testing.assert_close(prepare(images / 255), expected.float(), atol=scale * 1.5 / 255 / min(STD), rtol=1e-4)


def test_without_a_crop_an_integer_size_is_both_sides_as_in_old_vit_files(tmp_path: Path) -> None:
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps({"size": 24, "image_mean": 0.5, "image_std": 0.5, "resample": 2}))
    inputs = Preprocessing.from_file(path)(pictures(2) / 255)
    assert inputs.shape == (2, 3, 24, 24)
    assert inputs.min() >= -1
    assert inputs.max() <= 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resample": 1}, r"resample must be 2 \(bilinear\) or 3 \(bicubic\), got 1"),
        ({"size": {"longest_edge": 40}}, "size must be a positive integer"),
        ({"size": {"shortest_edge": 0}}, "size must be a positive integer"),
        ({"crop_size": None}, "do_center_crop is on, but crop_size is missing"),
        ({"image_std": None}, "image_std must be 3 numbers"),
        ({"image_std": [1, 1, 0]}, "above 0"),
        ({"crop_pct": 0.875}, "asks for crop_pct"),
        ({"rescale_offset": True}, "asks for rescale_offset"),
    ],
)
def test_settings_that_cannot_be_followed_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Preprocessing.from_file(write_settings(tmp_path, **changes))


def test_settings_that_are_no_json_object_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "preprocessor_config.json"
    path.write_text("[]")
    with pytest.raises(ValueError, match="one JSON object"):
        Preprocessing.from_file(path)
    path.write_text("{")
    with pytest.raises(ValueError, match="cannot read"):
        Preprocessing.from_file(path)
