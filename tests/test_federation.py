"""The federation file: what it says, and how it refuses."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
from conftest import ret_fl

from ret_fl.config import ConfigError
from ret_fl.deploy.federation import EXAMPLE, parse_federation, read_federation

SMALL: dict[str, Any] = {"superlink": {"host": "sl.example.org"}, "hosts": [{"name": "alpha"}]}


def test_the_example_is_a_federation_of_two_hosts_and_three_gpus(tmp_path: Path) -> None:
    file = tmp_path / "federation.toml"
    file.write_text(ret_fl("deploy", "example").output)
    assert file.read_text() == EXAMPLE
    federation = read_federation(file)
    assert federation.tls
    assert [node.name for node in federation.supernodes] == ["alpha-gpu0", "alpha-gpu1", "beta-gpu0"]
    assert [node.partition for node in federation.supernodes] == [0, 1, 2]
    assert [node.port for node in federation.supernodes] == [9094, 9095, 9094]


def test_every_key_of_the_example_has_the_default_it_is_shown_with() -> None:
    shown = tomllib.loads(EXAMPLE)
    plain = parse_federation(SMALL).model_dump(by_alias=True)
    for key in ("folder", "user", "tls", "image", "certificate-days", "name"):
        assert shown[key] == plain[key], key
    assert (shown["superlink"]["bind"], shown["superlink"]["port"]) == ("0.0.0.0", plain["superlink"]["port"])
    assert shown["hosts"][0]["runtime-port"] == plain["hosts"][0]["runtime-port"]


def test_a_host_without_gpus_has_one_supernode_with_its_name() -> None:
    assert [(node.name, node.gpu) for node in parse_federation(SMALL).supernodes] == [("alpha", None)]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"superlink": {}}, "superlink.host: is missing"),
        ({"hosts": []}, "hosts:"),
        ({"superlink": {"host": "https://sl"}}, "superlink.host: must be a DNS name or an IP address"),
        ({"superlink": {"host": "sl", "port": 70000}}, "superlink.port: "),
        ({"superlink": {"host": "300.1.1.1"}}, "(got '300.1.1.1')"),
        ({"hosts": [{"name": "Alpha"}]}, "hosts[0].name: must be at most 40"),
        ({"hosts": [{"name": "a", "gpus": [0, 0]}]}, "names a GPU twice"),
        ({"hosts": [{"name": "a", "gpus": [-1]}]}, "hosts[0].gpus[0]: "),
        ({"hosts": [{"name": "a"}, {"name": "a"}]}, "a stands twice"),
        ({"hosts": [{"name": "a-gpu0"}, {"name": "a", "gpus": [0]}]}, "a-gpu0 stands twice"),
        ({"hosts": [{"name": "operator"}]}, "operator is the name of a folder of the kit"),
        ({"hosts": [{"name": "a", "data-path": "data"}]}, "hosts[0].data-path: must be an absolute path"),
        ({"hosts": [{"name": "a", "data-path": '/d";rm'}]}, "hosts[0].data-path: must be an absolute path"),
        ({"colour": "red"}, "colour: no such key (`ret-fl deploy example`"),
    ],
)
def test_an_error_names_the_key_and_what_is_wanted(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_federation(SMALL | change, "federation.toml")
    assert words in str(error.value)
    assert str(error.value).startswith("federation.toml: ")


def test_a_missing_or_broken_file_is_named(tmp_path: Path) -> None:
    answer = ret_fl("deploy", "init", tmp_path / "none.toml")
    assert answer.exit_code == 1
    assert "none.toml" in answer.output and "deploy example" in answer.output
    (tmp_path / "bad.toml").write_text("name = ")
    answer = ret_fl("deploy", "init", tmp_path / "bad.toml")
    assert answer.exit_code == 1 and "is not TOML" in answer.output
