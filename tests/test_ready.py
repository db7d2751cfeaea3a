"""Ready images are read alike from pictures and arrays, and refused by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ret_fl.audit.generate import Generated, generate
from ret_fl.audit.ready import Channels, read_bytes, read_images


def random_bytes(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def save_pictures(folder: Path, images: np.ndarray, suffix: str = ".png") -> Path:
    """uint8 [N, H, W] or [N, H, W, 3], a file each."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:03d}{suffix}")
    return folder


class TestReadyImages:
    @pytest.mark.parametrize("suffix", [".png", ".webp", ".jpg"])
    def test_a_folder_of_pictures(self, tmp_path: Path, suffix: str) -> None:
        images = random_bytes(5, 8, 6, 3)
        folder = save_pictures(tmp_path / "drawn", images, suffix)
        found = generate(folder, samples=4)
        spread = [f for i, f in enumerate(sorted(folder.iterdir())) if i != 3]
        expected = np.stack([np.asarray(Image.open(f).convert("RGB")) for f in spread])
        assert torch.equal(found.images, torch.from_numpy(expected).permute(0, 3, 1, 2) / 255)
        assert found == Generated(found.images, "images", "drawn", None, None, None, left_out=1)
        if suffix == ".png":
            assert np.array_equal(expected, images[[0, 1, 2, 4]])

    def test_nothing_is_left_behind(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "users"))
        folder = save_pictures(tmp_path / "drawn", random_bytes(2, 8, 8))
        read_images(folder)
        generate(folder, cache=tmp_path / "mine")
        assert not (tmp_path / "users").exists()
        assert not (tmp_path / "mine").exists()

    def test_pictures_take_the_size_and_colour_asked_for(self, tmp_path: Path) -> None:
        folder = save_pictures(tmp_path / "drawn", random_bytes(2, 8, 12))
        save_pictures(folder / "more", random_bytes(2, 10, 10))
        assert read_images(folder, image_size=4, channels="rgb").shape == (4, 3, 4, 4)
        with pytest.raises(ValueError, match=r"drawn: the images differ in size \(10x10, 12x8\): set --image-size"):
            read_images(folder)

    def test_an_unreadable_picture_is_named(self, tmp_path: Path) -> None:
        folder = save_pictures(tmp_path / "drawn", random_bytes(3, 8, 8))
        broken = folder / "001.png"
        broken.write_bytes(broken.read_bytes()[:60])
        with pytest.raises(ValueError, match=r"drawn: cannot read 001\.png: [^;]*$"):
            generate(folder)

    def test_an_empty_folder(self, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        for call in (generate, read_images):
            with pytest.raises(ValueError, match=r"no PNG, JPEG, WebP or BMP images") as error:
                call(tmp_path / "empty")
            assert str(error.value).count(str(tmp_path / "empty")) == 1

    @given(
        st.integers(1, 4),
        st.integers(4, 9),
        st.integers(4, 9),
        st.sampled_from([1, 3]),
        st.sampled_from([np.uint8, np.float16, np.float32, np.float64]),
        st.booleans(),
    )
    @settings(max_examples=40, deadline=None)
    def test_every_layout_and_type_of_npy_is_the_same_images(
        self, tmp_path_factory: pytest.TempPathFactory, n: int, h: int, w: int, c: int, dtype: type, last: bool
    ) -> None:
        path = tmp_path_factory.mktemp("npy") / "images.npy"
        pixels = random_bytes(n, c, h, w)
        stored = pixels if dtype == np.uint8 else (pixels / 255).astype(dtype)
        np.save(path, stored.transpose(0, 2, 3, 1) if last else stored)
        expected = torch.from_numpy(pixels.astype(np.float32) / 255)
        torch.testing.assert_close(read_images(path), expected, atol=3e-4 if dtype == np.float16 else 1e-7, rtol=0)
        if c == 1:
            np.save(path, stored[:, 0])
            assert read_images(path).shape == (n, 1, h, w)
        found = generate(path, samples=2)
        assert found.images.shape[0] == min(n, 2) and found.images.is_contiguous()

    @pytest.mark.parametrize("dtype", [np.uint8, np.float32])
    @pytest.mark.parametrize(("side", "channels"), [(0, "auto"), (4, "grey")])
    def test_bytes_are_the_same_images_however_few_are_converted_at_a_time(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: type, side: int, channels: Channels
    ) -> None:
        pixels = random_bytes(7, 3, 8, 6)
        np.save(tmp_path / "images.npy", pixels if dtype == np.uint8 else (pixels / 255).astype(dtype))
        whole = read_images(tmp_path / "images.npy", side, channels)
        monkeypatch.setattr("ret_fl.audit.ready.CHUNK_VALUES", 2 * 3 * 8 * 6)
        images = read_bytes(tmp_path / "images.npy", side, channels)
        assert images.dtype == torch.uint8
        assert torch.equal(images, (whole * 255).round().to(torch.uint8))
        if not side:
            assert torch.equal(images, torch.from_numpy(pixels))
        broken = (pixels / 255).astype(np.float32)
        broken[[1, 6], 0, 0, 0] = np.nan, 2
        np.save(tmp_path / "broken.npy", broken)
        with pytest.raises(ValueError, match="2 of 7 images hold NaN"):
            read_bytes(tmp_path / "broken.npy")

    @pytest.mark.parametrize("colours", [(), (3,)])
    def test_npy_and_pictures_are_resized_and_recoloured_alike(self, tmp_path: Path, colours: tuple[int, ...]) -> None:
        smooth = np.linspace(0, 255, 24 * 30).reshape(24, 30)
        images = np.stack([smooth, 255 - smooth])
        images = (images[..., None] * np.linspace(0.5, 1, 3) if colours else images).astype(np.uint8)
        folder = save_pictures(tmp_path / "drawn", images)
        np.save(tmp_path / "drawn.npy", images)
        for channels in ("auto", "grey", "rgb"):
            a, b = (read_images(path, 12, channels) for path in (folder, tmp_path / "drawn.npy"))
            assert a.shape == b.shape
            torch.testing.assert_close(a, b, atol=1.5 / 255, rtol=0)

    @pytest.mark.parametrize(
        ("array", "message"),
        [
            (np.full((3, 4, 4), np.nan), r"3 of 3 images hold NaN or values outside \[0, 1\]"),
            (np.array([0.5, 1.5]).repeat(16).reshape(2, 1, 4, 4), "1 of 2 images hold NaN"),
            (np.full((1, 4, 4), -0.5, np.float32), "1 of 1 images hold NaN"),
            (np.zeros((2, 4, 4), np.int64), "holds int64: save it as uint8"),
            (np.zeros((4, 4), np.uint8), r"must hold images \[N, C, H, W\].*, not \(4, 4\)"),
            (np.zeros((0, 4, 4), np.uint8), r"is empty: it holds an array \(0, 4, 4\)"),
            (np.zeros((2, 4, 8, 8), np.uint8), r"1 or 3 channels, not \(2, 4, 8, 8\)"),
            (np.array([{"a": 1}], dtype=object), "cannot be read as a .npy file"),
        ],
    )
    def test_a_bad_npy_is_named_with_what_is_wrong(self, tmp_path: Path, array: np.ndarray, message: str) -> None:
        np.save(tmp_path / "bad.npy", array, allow_pickle=True)
        for call in (generate, read_images):
            with pytest.raises(ValueError, match=r"bad\.npy.*" + message):
                call(tmp_path / "bad.npy")

    def test_a_file_that_is_no_npy(self, tmp_path: Path) -> None:
        for content, told in ((b"not numpy", "is no .npy file"), (b"", "is empty"), (b"\x93NUMPY?", "cannot be read")):
            (tmp_path / "images.npy").write_bytes(content)
            with pytest.raises(ValueError, match=rf"images\.npy {told}") as error:
                generate(tmp_path / "images.npy")
            assert "pickle" not in str(error.value)
        (tmp_path / "images.zip").write_bytes(b"")
        with pytest.raises(ValueError, match=r"images\.zip is neither a folder nor a \.npy file"):
            generate(tmp_path / "images.zip")
