"""Hugging Face datasets as they lie on disk: saved ones and parquet files."""

from __future__ import annotations

from pathlib import Path

import datasets
import numpy as np
import pytest
from pictures import assert_disjoint, load, picture, raw

from ret_fl.config import ConfigError
from ret_fl.data.sources import DataSplits


def table(count: int = 20) -> datasets.Dataset:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])})
    rows = {"image": [picture(i) for i in range(count)], "label": [i % 2 for i in range(count)]}
    return datasets.Dataset.from_dict(rows, features=features)


def from_hf(path: Path | str, tmp_path: Path, **settings: object) -> DataSplits:
    fixed = {"source": "hf", "path": str(path), "cache_dir": str(tmp_path / "cache"), "held_out": 0, "reference": False}
    return load(**(fixed | settings))


def assert_is_table(splits: DataSplits) -> None:
    stored = {(int(label), image.numpy().tobytes()) for label, image in zip(*raw(splits), strict=True)}
    assert stored == {(i % 2, np.asarray(picture(i)).transpose(2, 0, 1).tobytes()) for i in range(20)}


def test_a_saved_dataset_is_read(tmp_path: Path) -> None:
    table().save_to_disk(tmp_path / "saved")
    splits = from_hf(tmp_path / "saved", tmp_path)
    assert_is_table(splits)
    assert splits.train.num_classes == 3  # as declared, though only two occur
    assert_disjoint(from_hf(tmp_path / "saved", tmp_path, held_out=0.2, reference=True))


def test_a_split_of_a_saved_dataset_is_chosen_by_name(tmp_path: Path) -> None:
    datasets.DatasetDict({"train": table(), "test": table(5)}).save_to_disk(str(tmp_path / "saved"))
    assert len(from_hf(tmp_path / "saved", tmp_path).train) == 20
    assert len(from_hf(tmp_path / "saved", tmp_path, split="test").train) == 5
    with pytest.raises(ConfigError, match=r"data\.split: .*\['test', 'train'\], not 'validation'"):
        from_hf(tmp_path / "saved", tmp_path, split="validation")


def test_parquet_is_read_as_file_folder_and_glob(tmp_path: Path) -> None:
    (tmp_path / "table").mkdir()
    table().select(range(12)).to_parquet(tmp_path / "table" / "train-0.parquet")
    assert len(from_hf(tmp_path / "table" / "train-0.parquet", tmp_path).train) == 12
    table().select(range(12, 20)).to_parquet(tmp_path / "table" / "train-1.parquet")
    assert_is_table(from_hf(tmp_path / "table", tmp_path))
    assert_is_table(from_hf(tmp_path / "table" / "*.parquet", tmp_path))
    with pytest.raises(ConfigError, match=r"data\.split=test"):
        from_hf(tmp_path / "table", tmp_path, split="test")


def test_columns_of_any_name_and_string_classes_are_read(tmp_path: Path) -> None:
    plain = table().rename_column("image", "img").remove_columns("label")
    plain.add_column("kind", ["cat" if i % 2 else "ant" for i in range(20)]).to_parquet(tmp_path / "t.parquet")
    splits = from_hf(tmp_path / "t.parquet", tmp_path, image_column="img", label_column="kind")
    assert_is_table(splits)
    assert from_hf(tmp_path / "t.parquet", tmp_path, image_column="img").train.labels is None
    with pytest.raises(ConfigError, match=r"data\.image-column: no 'image' among \['img', 'kind'\]"):
        from_hf(tmp_path / "t.parquet", tmp_path)
    plain.add_column("number", list(range(20))).to_parquet(tmp_path / "n.parquet")
    with pytest.raises(ConfigError, match=r"data\.image-column: 'number' does not hold images"):
        from_hf(tmp_path / "n.parquet", tmp_path, image_column="number")


def test_the_test_split_in_files_of_its_own_never_trains(tmp_path: Path) -> None:
    table().select(range(14)).to_parquet(tmp_path / "train.parquet")
    table().select(range(14, 20)).to_parquet(tmp_path / "test.parquet")
    splits = from_hf(tmp_path / "train.parquet", tmp_path, held_out_path=str(tmp_path / "test.parquet"))
    assert (len(splits.train), len(splits.held_out)) == (14, 6)
    expected = {np.asarray(picture(i)).transpose(2, 0, 1).tobytes() for i in range(14, 20)}
    assert {x.numpy().tobytes() for x in splits.held_out.pixels()} == expected
    datasets.DatasetDict({"train": table(), "test": table(5)}).save_to_disk(str(tmp_path / "saved"))
    saved = from_hf(tmp_path / "saved", tmp_path, held_out_path=str(tmp_path / "saved"))
    assert (len(saved.train), len(saved.held_out)) == (20, 0)  # the 5 of test are train's own: on neither side


@pytest.mark.parametrize(
    ("held_out", "message"),
    [
        (datasets.ClassLabel(names=["a", "b", "c", "d"]), r"each in its own way \(3 classes: a, b, c; 4 classes: a, b"),
        (datasets.ClassLabel(names=["b", "a", "c"]), "each in its own way"),
        (datasets.Value("int64"), r"a row has class 3, and only 3 are declared"),
        (datasets.Value("string"), "holds texts in one of"),
    ],
)
def test_held_out_classes_that_are_not_those_of_training_are_refused(
    tmp_path: Path, held_out: object, message: str
) -> None:
    table().to_parquet(tmp_path / "train.parquet")
    texts = isinstance(held_out, datasets.Value) and held_out.dtype == "string"
    labels = ["c", "d"] if texts else [1, 3] if isinstance(held_out, datasets.Value) else [1, 2]
    features = datasets.Features({"image": datasets.Image(), "label": held_out})
    rows = {"image": [picture(30), picture(31)], "label": labels}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "test.parquet")
    with pytest.raises(ConfigError, match=rf"data\.label-column: .*{message}"):
        from_hf(tmp_path / "train.parquet", tmp_path, held_out_path=str(tmp_path / "test.parquet"))


def test_a_corrupt_row_is_named_and_skipped(tmp_path: Path) -> None:
    rows = table().cast_column("image", datasets.Image(decode=False)).to_list()
    rows[3]["image"] = {"bytes": b"broken", "path": None}
    rows[7]["image"] = None
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    datasets.Dataset.from_list(rows, features=features).save_to_disk(tmp_path / "saved")
    splits = from_hf(tmp_path / "saved", tmp_path)
    assert splits.unreadable == ("row 3", "row 7") and len(splits.train) == 18
    with pytest.raises(ConfigError, match=r"cannot read row 3"):
        from_hf(tmp_path / "saved", tmp_path, on_corrupt="refuse")


def test_a_cached_saved_dataset_needs_no_decoding_until_it_changes(tmp_path: Path) -> None:
    table().save_to_disk(tmp_path / "saved")
    from_hf(tmp_path / "saved", tmp_path)
    (entry,) = (tmp_path / "cache").glob("*.npy")
    from_hf(tmp_path / "saved", tmp_path)
    assert list((tmp_path / "cache").glob("*.npy")) == [entry]
    table(10).save_to_disk(tmp_path / "saved")
    assert len(from_hf(tmp_path / "saved", tmp_path).train) == 10


def test_a_path_that_is_no_dataset_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    for path, message in [
        ("", r"needs data\.path"),
        (str(tmp_path / "missing"), r"does not exist"),
        (str(tmp_path / "*.parquet"), r"no file matches"),
        (str(tmp_path / "other"), r"set data\.source=image-folder"),
    ]:
        with pytest.raises(ConfigError, match=message):
            from_hf(path, tmp_path)
