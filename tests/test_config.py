"""Every knob once: the same defaults everywhere, errors that teach, and texts that read back as what they were."""

from __future__ import annotations

import math
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ret_fl.config import ConfigError, RunConfig, Scalar, describe, off_default
from ret_fl.redistribution import parse_policy
from ret_fl.settings import parse_change, read_preset, to_toml

ROOT = Path(__file__).parent.parent
PRESETS = sorted((ROOT / "simulations/presets").rglob("*.toml"))
FLAT = {s.key: s for s in describe()}


def same_type(a: Scalar, b: Scalar) -> bool:
    return type(a) is type(b)


def flattened(table: dict[str, Any]) -> dict[str, Scalar]:
    flat: dict[str, Scalar] = {}
    for key, value in table.items():
        flat |= {f"{key}.{leaf}": v for leaf, v in value.items()} if isinstance(value, dict) else {key: value}
    return flat


def test_pyproject_repeats_the_defaults_name_by_name() -> None:
    document = tomllib.loads((ROOT / "pyproject.toml").read_text())
    flat = flattened(document["tool"]["flwr"]["app"]["config"])
    defaults = RunConfig().to_flat()
    assert flat | {"optimizer.lr": RunConfig.from_flat(flat).optimizer.lr} == defaults
    # Flower holds an override to the type of the default: 1 for 1.0 would forbid 0.5
    assert [k for k in flat if not same_type(flat[k], defaults[k])] == []


@pytest.mark.parametrize(
    ("flat", "rate"),
    [({}, 7e-3), ({"model.preset": "small"}, 1e-3), ({"model.preset": "ddpm-cifar"}, 2e-4),
     ({"model.preset": "small", "optimizer.lr": 0.5}, 0.5), ({"model.init-from": "a-folder"}, 1e-5)],
)  # fmt: skip
def test_a_learning_rate_that_is_not_given_is_that_of_the_model(flat: dict[str, Scalar], rate: float) -> None:
    config = RunConfig.from_flat(flat)
    assert config.optimizer.lr == rate
    assert RunConfig.from_flat(config.to_flat()) == config


def test_every_setting_says_what_it_means_and_what_is_allowed() -> None:
    assert len(FLAT) > 60
    for setting in FLAT.values():
        assert len(setting.meaning) >= 15 and setting.meaning.endswith("."), setting.key
        assert setting.allowed, setting.key
        assert re.fullmatch(r"[a-z0-9-]+(\.[a-z0-9-]+)?", setting.key)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("agc.memratio", "agc.mem-ratio"),
        ("agc.mem_ratio", "agc.mem-ratio"),
        ("mem-ratio", "agc.mem-ratio"),
        ("shard", "shards"),
        ("num-rounds", "num-server-rounds"),
        ("redistribution.polcy", "redistribution.policy"),
        ("data.sorce", "data.source"),
        ("quarantine.probabilty", "quarantine.probability"),
    ],
)
def test_an_unknown_key_suggests_the_nearest(wrong: str, right: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"unknown setting {wrong!r}; did you mean {right!r}?")):
        RunConfig.from_flat({wrong: 1})


def test_a_key_like_no_other_gets_no_suggestion() -> None:
    with pytest.raises(ConfigError, match=r"unknown setting 'zzzz' \(`ret-fl config` lists them all\)"):
        RunConfig.from_flat({"zzzz": 1})


@pytest.mark.parametrize("section", ["agc", "data"])
def test_a_section_is_no_setting(section: str) -> None:
    with pytest.raises(ConfigError, match="unknown setting"):
        RunConfig.from_flat({section: "off"})


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("agc.mem-ratio", 0.5, "number and > 1"),
        ("agc.mem-ratio", math.nan, "number and > 1"),
        ("taa.mode", "on", "off | next-visit | two-pass-band | two-pass-all"),
        ("shards", 0, "integer and >= 1"),
        ("shards", 2.5, "integer and >= 1"),
        ("redistribution.fraction", 0.6, "number and > 0 and <= 0.5"),
        ("data.held-out", 1.0, "number and >= 0 and < 1"),
        ("quarantine.z", 0.0, "number and < 0"),
        ("compile", "perhaps", "boolean"),
    ],
)
def test_a_value_out_of_range_is_refused_with_key_value_and_what_is_allowed(
    key: str, value: Scalar, allowed: str
) -> None:
    with pytest.raises(ConfigError) as refusal:
        RunConfig.from_flat({key: value})
    assert str(refusal.value).startswith(f"{key} = {value!r} is not allowed ({allowed}). {FLAT[key].meaning}")


def test_all_bad_values_are_named_at_once() -> None:
    with pytest.raises(ConfigError) as refusal:
        RunConfig.from_flat({"shards": 0, "agc.decay": 1.0, "seed": 3})
    assert [line.split(" =")[0] for line in str(refusal.value).splitlines()] == ["shards", "agc.decay"]


@pytest.mark.parametrize(
    ("flat", "message"),
    [
        ({"agc.bins": 2000}, r"agc\.bins \(2000\) must not exceed diffusion\.timesteps"),
        ({"data.path": "photos"}, r"data\.source=digits reads none: set data\.source=image-folder, hf or cifar"),
        ({"data.source": "cifar", "data.held-out-path": "a"}, r"data\.source=cifar reads none.*test batches"),
        ({"partition.path": "a.npy"}, r"set partition\.scheme=file"),
        ({"diffusion.beta-start": 0.5}, r"diffusion\.beta-end must not be below diffusion\.beta-start"),
        ({"agc.warm-passes": 1, "agc.mode": "sample"}, r"agc\.mode=sample does not read \(agc, own and plug-ins may\)"),
        ({"report": "tails"}, r"agc\.mode=own needs every sample's usual loss.*set agc\.mode=off or agc"),
        ({"taa.mode": "next-visit", "agc.mode": "off"}, r"agc\.mode=off has not: set agc\.mode=agc or own"),
        ({"taa.mode": "next-visit", "agc.mode": "ret_fl.mitigation.agc:off"}, r"set agc\.mode=agc or own"),
        ({"aggregate-every": 0, "optimizer.proximal-mu": 0.1}, r"set optimizer\.proximal-mu=0, or aggregate-every"),
        ({"redistribution.policy": "none", "redistribution.control": "all"}, r"set redistribution\.control=off"),
        ({"data.near-duplicates": "phash", "data.duplicates": "keep"}, r"or set data\.near-duplicates=off"),
        ({"dp.audit": True, "dp.delta": 0.1}, r"dp\.delta, dp\.audit set with dp\.mode=off, which adds no noise"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(flat: dict[str, Scalar], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RunConfig.from_flat(flat)


def test_near_duplicates_are_looked_for_where_something_is_done_about_them() -> None:
    for use in ({"data.duplicates": "drop"}, {"data.duplicates": "keep", "partition.clusters": "gather"}):
        assert RunConfig.from_flat({"data.near-duplicates": "cosine", **use}).data.near_duplicates == "cosine"


def test_a_built_in_has_its_name_though_its_path_is_given() -> None:
    paths = {
        "agc.mode": "ret_fl.mitigation.agc:off",
        "partition.scheme": "ret_fl.data.partition:by_class",
        "redistribution.policy": "ret_fl.redistribution:balance + quarantine+own_plugins:First",
    }
    flat = RunConfig.from_flat(paths).to_flat()
    assert {key: flat[key] for key in paths} == {
        "agc.mode": "off",
        "partition.scheme": "class",
        "redistribution.policy": "balance+ quarantine+own_plugins:First",
    }


def test_a_config_cannot_be_changed_in_place() -> None:
    with pytest.raises(ValueError, match="frozen"):
        RunConfig().agc.mem_ratio = 3.0  # type: ignore[misc]


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
changes = st.fixed_dictionaries(
    {},
    optional={
        "shards": st.integers(1, 10_000),
        "seed": st.integers(0, 2**63 - 1),
        "name": texts.filter(bool),
        "data.cache-dir": texts,
        "compile": st.booleans(),
        "agc.mem-ratio": st.floats(1, exclude_min=True, allow_nan=False),
        "optimizer.lr": st.floats(0, exclude_min=True, allow_nan=False),
        "redistribution.topology": st.sampled_from(["ring", "derangement"]),
        "quarantine.z": st.floats(max_value=0, exclude_max=True, allow_nan=False).filter(lambda z: z < 0),
        "aggregate-every": st.integers(0, 9),
    },
)


@settings(deadline=None)
@given(changes)
def test_settings_survive_the_way_to_a_config_and_back(flat: dict[str, Any]) -> None:
    config = RunConfig.from_flat(flat)
    back = config.to_flat()
    assert back == RunConfig().to_flat() | flat
    assert RunConfig.from_flat(back) == config


@settings(deadline=None)
@given(changes)
def test_a_config_survives_the_way_to_a_toml_file_and_back(flat: dict[str, Any]) -> None:
    config = RunConfig.from_flat(flat)
    again = flattened(tomllib.loads(to_toml(config.to_flat())))
    assert RunConfig.from_flat(again) == config
    assert all(same_type(again[k], v) for k, v in config.to_flat().items())


@pytest.mark.parametrize(
    "value",
    [
        'a "quoted" name',
        "back\\slash C:\\temp",
        "two\nlines\tand a tab",
        "naïve 日本 😀",
        "\x7f\x00\x1f",
        "To Infinity and beyond",
        "NaN",
        "# no comment",
        "",
        1e-05,
        1e22,
        5e-324,
        math.inf,
        -math.inf,
        0.1 + 0.2,
        -3,
        2**53 + 1,
        True,
        False,
    ],
)
def test_one_value_reads_back_from_toml_as_it_was(value: Scalar) -> None:
    again = tomllib.loads(to_toml({"data.path": value}))["data"]["path"]
    assert again == value and same_type(again, value)


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("agc.mem-ratio=2", "agc.mem-ratio", 2),
        ("agc.mem-ratio=2.5", "agc.mem-ratio", 2.5),
        ("optimizer.lr=1e-3", "optimizer.lr", 1e-3),
        ("agc.mem-ratio=inf", "agc.mem-ratio", math.inf),
        ("quarantine.z=-3.0", "quarantine.z", -3.0),
        ("compile=true", "compile", True),
        ("agc.mode=off", "agc.mode", "off"),
        ('agc.mode="off"', "agc.mode", "off"),
        (" shards = 8 ", "shards", 8),
        ("data.path=/tmp/a b", "data.path", "/tmp/a b"),
        ("data.path=C:\\images", "data.path", "C:\\images"),
        ("data.path=", "data.path", ""),
        ("data.path=a=b", "data.path", "a=b"),
        ("redistribution.policy=balance+quarantine", "redistribution.policy", "balance+quarantine"),
        ("partition.sizes=0.7,0.3", "partition.sizes", "0.7,0.3"),
    ],
)
def test_a_change_is_read_as_number_truth_or_text(text: str, key: str, value: Scalar) -> None:
    found = parse_change(text)
    assert found == (key, value) and same_type(found[1], value)
    RunConfig.from_flat({"data.source": "hf"} | dict([found]))


@pytest.mark.parametrize("text", ["shards", "=4", "", " =4"])
def test_a_change_without_key_or_equals_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--set wants KEY=VALUE"):
        parse_change(text)


@pytest.mark.parametrize("value", ["[1, 2]", "{a = 1}"])
def test_a_change_to_a_table_or_list_is_refused(value: str) -> None:
    with pytest.raises(ConfigError, match="not one number, true or false, or text"):
        parse_change(f"shards={value}")


class TestPresets:
    def test_there_are_some(self) -> None:
        assert {p.stem for p in PRESETS} >= {"central", "digits"}

    @pytest.mark.parametrize("path", PRESETS, ids=lambda p: p.stem)
    def test_each_is_sound_and_its_first_line_is_its_command(self, path: Path) -> None:
        flat = read_preset(path)
        config = RunConfig.from_flat(flat)
        parse_policy(config.redistribution.policy)
        assert all(config.to_flat()[key] == value for key, value in flat.items())
        first = path.read_text().splitlines()[0]
        assert first.startswith(f"# ret-fl run --preset {path.relative_to(ROOT).as_posix()}")

    @pytest.mark.parametrize("path", PRESETS, ids=lambda p: p.stem)
    def test_each_can_be_printed_and_read_again(self, path: Path, tmp_path: Path) -> None:
        config = RunConfig.from_flat(read_preset(path))
        (tmp_path / "again.toml").write_text(to_toml(config.to_flat()), encoding="utf-8")
        assert RunConfig.from_flat(read_preset(tmp_path / "again.toml")) == config

    def test_sections_and_dotted_keys_are_the_same(self, tmp_path: Path) -> None:
        (tmp_path / "a.toml").write_text('shards = 2\n[agc]\nmode = "off"\nmem-ratio = 2.0\n')
        (tmp_path / "b.toml").write_text('shards = 2\nagc.mode = "off"\nagc.mem-ratio = 2.0\n')
        expected = {"shards": 2, "agc.mode": "off", "agc.mem-ratio": 2.0}
        assert read_preset(tmp_path / "a.toml") == read_preset(tmp_path / "b.toml") == expected

    def test_a_missing_or_broken_file_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"--preset: .*missing\.toml"):
            read_preset(tmp_path / "missing.toml")
        (tmp_path / "broken.toml").write_text("shards = \n")
        with pytest.raises(ConfigError, match=r"--preset .*broken\.toml: "):
            read_preset(tmp_path / "broken.toml")

    def test_a_value_flower_cannot_carry_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "list.toml").write_text("shards = [1, 2]\n")
        with pytest.raises(ConfigError, match=r"shards = \[1, 2\] is not allowed \(integer"):
            RunConfig.from_flat(read_preset(tmp_path / "list.toml"))


def test_a_number_given_for_a_text_is_taken_as_text() -> None:
    assert RunConfig.from_flat({"name": 7}).name == "7"
    assert parse_change("name=2026-01-01") == ("name", "2026-01-01")


def test_a_learning_rate_that_is_the_models_own_is_not_off_its_default() -> None:
    assert off_default(RunConfig()) == []
    small = RunConfig.from_flat({"model.preset": "small", "shards": 3})
    assert {s.key for s in off_default(small)} == {"model.preset", "shards"}
    tuned = RunConfig.from_flat({"model.preset": "small", "optimizer.lr": 0.012})
    assert {s.key for s in off_default(tuned)} == {"model.preset", "optimizer.lr"}
