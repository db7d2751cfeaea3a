"""The kit: certificates that verify, keys Flower reads, secrets only where they belong, files their readers accept."""

from __future__ import annotations

import configparser
import re
import shutil
import ssl
import stat
import subprocess
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ret_fl
from cryptography import x509
from flwr.cli.supernode.register import try_load_public_key
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supernode.cli.flower_supernode import _try_setup_client_authentication

from ret_fl.config import ConfigError
from ret_fl.deploy.certificates import Authority, load_node_key, make_node_key
from ret_fl.deploy.federation import EXAMPLE, Federation, parse_federation
from ret_fl.deploy.kit import REACTIVATION_SECONDS, Kit, write_kit

NODES = ("alpha-gpu0", "alpha-gpu1", "beta-gpu0")


def example(**changes: object) -> Federation:
    """The example, installed where no machine has anything."""
    return parse_federation(tomllib.loads(EXAMPLE) | {"folder": "/no/ret-fl"} | changes)


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Kit:
    return write_kit(example(), tmp_path_factory.mktemp("deploy") / "kit")


def handshake(server: Path, ca: Path, name: str) -> None:
    """A TLS handshake in memory between a server with the kit's certificate and a client that wants `name`."""
    accept = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    accept.load_cert_chain(server / "server.pem", server / "server.key")
    trust = ssl.create_default_context(cafile=ca)
    trust.verify_flags |= ssl.VERIFY_X509_STRICT  # the default from Python 3.13
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    sides = [
        trust.wrap_bio(to_client, to_server, server_hostname=name),
        accept.wrap_bio(to_server, to_client, server_side=True),
    ]
    for _ in range(4):
        for side in sides:
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue


# --- certificates and keys --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["superlink.example.org", "10.0.0.5", "localhost", "127.0.0.1", "::1", "superlink"])
def test_the_certificate_is_for_every_name_the_superlink_is_called_by(kit: Kit, name: str) -> None:
    handshake(kit.superlink, kit.host(example().hosts[0]) / "ca.crt", name)


def test_the_certificate_is_for_no_other_name_and_no_other_authority(kit: Kit, tmp_path: Path) -> None:
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        handshake(kit.superlink, kit.operator / "ca.crt", "other.example.org")
    Authority.open(tmp_path, "other")
    with pytest.raises(ssl.SSLCertVerificationError, match="local issuer"):
        handshake(kit.superlink, tmp_path / "ca.crt", "localhost")


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
def test_openssl_verifies_the_chain(kit: Kit) -> None:
    command = [
        "openssl",
        "verify",
        "-x509_strict",
        "-purpose",
        "sslserver",
        "-verify_hostname",
        "superlink.example.org",
    ]
    done = subprocess.run(
        [*command, "-CAfile", kit.ca / "ca.crt", kit.superlink / "server.pem"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_the_certificate_is_in_force_for_as_long_as_the_federation_file_says(kit: Kit) -> None:
    certificate = x509.load_pem_x509_certificate((kit.superlink / "server.pem").read_bytes())
    assert 396 <= (certificate.not_valid_after_utc - certificate.not_valid_before_utc).days <= 398


@pytest.mark.parametrize("node", NODES)
def test_flower_reads_both_halves_of_a_node_key(kit: Kit, node: str) -> None:
    private_file = kit.path / node.partition("-")[0] / f"{node}.key"
    arguments = SimpleNamespace(auth_supernode_private_key=str(private_file), auth_supernode_public_key=None)
    private, public = _try_setup_client_authentication(arguments)
    assert private.curve.name == "secp384r1"
    assert try_load_public_key(kit.operator / "keys" / f"{node}.pub") == public_key_to_bytes(public)


def test_a_key_of_another_kind_is_refused_with_the_command_that_makes_one(tmp_path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "key"], check=True)
    for content in ((tmp_path / "key").read_bytes(), b"nonsense"):
        (tmp_path / "key").write_bytes(content)
        with pytest.raises(ConfigError, match="ssh-keygen -t ecdsa"):
            make_node_key(tmp_path / "key")


def test_a_damaged_authority_is_refused(tmp_path: Path) -> None:
    Authority.open(tmp_path / "a", "one")
    Authority.open(tmp_path / "b", "two")
    shutil.copy(tmp_path / "b" / "ca.key", tmp_path / "a" / "ca.key")
    with pytest.raises(ConfigError, match=r"ca.key is not the key of ca.crt"):
        Authority.open(tmp_path / "a", "one")
    (tmp_path / "b" / "ca.crt").unlink()
    with pytest.raises(ConfigError, match="cannot be read"):
        Authority.open(tmp_path / "b", "two")


# --- folders ----------------------------------------------------------------------------------------------------


def test_each_folder_holds_what_its_host_needs_and_no_more(kit: Kit) -> None:
    def files(folder: str) -> set[str]:
        return {file.name for file in (kit.path / folder).iterdir() if file.is_file()}

    unit = "ret-fl-supernode@.service"
    assert files("alpha") == {"ca.crt", "alpha-gpu0.key", "alpha-gpu1.key", "start", "compose.yaml", unit}
    assert files("beta") == {"ca.crt", "beta-gpu0.key", "start", "compose.yaml", unit}
    assert files("superlink") == {
        "ca.crt",
        "server.pem",
        "server.key",
        "start",
        "compose.yaml",
        "ret-fl-superlink.service",
    }
    assert files("operator") == {"ca.crt", "config.toml", "register"}
    assert files("operator/keys") == {f"{node}.pub" for node in NODES}
    assert files("ca") == {"ca.crt", "ca.key"}


def test_the_authoritys_key_is_in_no_file_but_its_own(kit: Kit) -> None:
    secret = (kit.ca / "ca.key").read_bytes()
    holders = [file for file in kit.path.rglob("*") if file.is_file() and secret in file.read_bytes()]
    assert holders == [kit.ca / "ca.key"]


def test_secrets_are_for_their_owner_only(kit: Kit) -> None:
    secrets = list(kit.path.rglob("*.key"))
    assert len(secrets) == 5
    assert {stat.S_IMODE(file.stat().st_mode) for file in secrets} == {0o600}
    for file in kit.path.rglob("*"):
        if file.is_file() and file not in secrets:
            assert b"PRIVATE KEY" not in file.read_bytes(), file


def test_a_second_init_keeps_authority_and_node_keys_and_renews_the_certificate(tmp_path: Path) -> None:
    file = tmp_path / "federation.toml"
    file.write_text(EXAMPLE)
    assert ret_fl("deploy", "init", file, "--out", tmp_path / "kit").exit_code == 0
    before = {f: f.read_bytes() for f in (tmp_path / "kit").rglob("*") if f.is_file()}
    file.write_text(EXAMPLE.replace('["10.0.0.5"]', '["10.0.0.6"]') + '\n[[hosts]]\nname = "gamma"\n')
    answer = ret_fl("deploy", "init", file, "--out", tmp_path / "kit")
    assert answer.exit_code == 0 and "gamma/" in answer.output
    changed = {f.name for f, content in before.items() if f.read_bytes() != content}
    assert {"server.pem", "server.key"} <= changed
    assert not changed & {"ca.crt", "ca.key", *(f"{node}.key" for node in NODES)}
    handshake(tmp_path / "kit" / "superlink", tmp_path / "kit" / "gamma" / "ca.crt", "10.0.0.6")


def test_without_the_old_authority_a_second_init_makes_one_that_every_folder_trusts(tmp_path: Path) -> None:
    kit = write_kit(example(), tmp_path / "kit")
    shutil.copy(kit.ca / "ca.crt", tmp_path / "old.crt")
    keys = {file: file.read_bytes() for node in NODES for file in kit.path.rglob(f"{node}.key")}
    shutil.rmtree(kit.ca)
    write_kit(example(), kit.path)
    for folder in (kit.operator, kit.path / "alpha", kit.path / "beta"):
        handshake(kit.superlink, folder / "ca.crt", "localhost")
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(kit.superlink, tmp_path / "old.crt", "localhost")
    assert len(keys) == 3 and all(file.read_bytes() == content for file, content in keys.items())


def test_no_secret_is_printed(tmp_path: Path) -> None:
    (tmp_path / "federation.toml").write_text(EXAMPLE)
    printed = ret_fl("deploy", "init", tmp_path / "federation.toml", "--out", tmp_path / "kit").output
    for file in (tmp_path / "kit").rglob("*.key"):
        assert file.read_text().splitlines()[1] not in printed


# --- what starts it ---------------------------------------------------------------------------------------------


def started(script: Path, *arguments: str, tmp_path: Path, **environment: str) -> list[str]:
    """What a `start` script would run: the arguments that a stand-in for its command was given.

    The stand-in's environment is what `environment_of_the_started` then reads.
    """
    tools = tmp_path / "tools"
    tools.mkdir(exist_ok=True)
    for name in ("flower-superlink", "flower-supernode", "ret-fl"):
        (tools / name).write_text(f'#!/bin/sh\nprintf "%s\\n" "$@"\nenv > {tmp_path}/environment\n')
        (tools / name).chmod(0o755)
    search = f"{tools}:/usr/bin:/bin"
    done = subprocess.run(
        [script, *arguments],
        env={"PATH": search, "RET_FL_STATE": str(tmp_path / "state")} | environment,
        capture_output=True,
        text=True,
        timeout=20,
        check=True,
    )
    return done.stdout.split("\n")[:-1]


def environment_of_the_started(tmp_path: Path) -> dict[str, str]:
    lines = (tmp_path / "environment").read_text().splitlines()
    return dict(line.partition("=")[::2] for line in lines)


def test_a_supernode_starts_on_its_gpu_with_its_key_and_data(kit: Kit, tmp_path: Path) -> None:
    words = started(kit.path / "alpha/start", "alpha-gpu1", tmp_path=tmp_path)
    options = dict(zip(words[::2], words[1::2], strict=True))
    assert options["--superlink"] == "superlink.example.org:8000"
    assert options["--auth-supernode-private-key"] == str(kit.path / "alpha" / "alpha-gpu1.key")
    assert options["--root-certificates"] == str(kit.path / "alpha" / "ca.crt")
    assert (options["--host"], options["--port"]) == ("127.0.0.1", "9095")
    state = tmp_path / "state" / "alpha-gpu1" / "proxies"
    assert options["--node-config"].split() == [
        "partition-id=1",
        "num-partitions=3",
        f'state-dir="{state}"',
        "worker=true",
        'data-path="/srv/ret-fl/data"',
        'device="cuda"',
    ]
    environment = environment_of_the_started(tmp_path)
    assert environment["CUDA_VISIBLE_DEVICES"] == "1"
    assert environment["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"  # the numbers of nvidia-smi, which CUDA's own are not


def test_all_that_runs_on_a_host_has_one_cache(kit: Kit, tmp_path: Path) -> None:
    caches = set()
    for folder, *node in (("alpha", "alpha-gpu0"), ("alpha", "alpha-gpu1"), ("superlink",)):
        started(kit.path / folder / "start", *node, tmp_path=tmp_path)
        caches.add(environment_of_the_started(tmp_path)["XDG_CACHE_HOME"])
    assert caches == {str(tmp_path / "state" / "cache")}
    started(kit.path / "alpha/start", "alpha-gpu0", tmp_path=tmp_path, XDG_CACHE_HOME="/own")
    assert environment_of_the_started(tmp_path)["XDG_CACHE_HOME"] == "/own"


def test_where_the_gpu_and_superlink_are_given_from_outside_they_win(kit: Kit, tmp_path: Path) -> None:
    words = started(
        kit.path / "alpha/start", "alpha-gpu1", tmp_path=tmp_path, CUDA_VISIBLE_DEVICES="0", SUPERLINK="superlink:8000"
    )
    assert environment_of_the_started(tmp_path)["CUDA_VISIBLE_DEVICES"] == "0"
    assert words[words.index("--superlink") + 1] == "superlink:8000"


def test_a_supernode_of_another_host_is_refused(kit: Kit, tmp_path: Path) -> None:
    with pytest.raises(subprocess.CalledProcessError) as error:
        started(kit.path / "beta/start", "alpha-gpu0", tmp_path=tmp_path)
    assert error.value.returncode == 2
    assert "one of: beta-gpu0" in error.value.stderr


def test_the_superlink_authenticates_nodes_and_installs_nothing(kit: Kit, tmp_path: Path) -> None:
    words = started(kit.path / "superlink/start", tmp_path=tmp_path)
    assert {"--enable-supernode-auth", "--disable-runtime-dependency-installation"} <= set(words)
    assert "--insecure" not in words
    assert words[words.index("--database") + 1] == str(tmp_path / "state" / "superlink" / "state.db")


def test_without_tls_nothing_is_secret_and_everything_says_insecure(tmp_path: Path) -> None:
    kit = write_kit(example(tls=False), tmp_path / "kit")
    assert not list(kit.path.rglob("*.key")) and not (kit.operator / "register").exists()
    assert "--insecure" in started(kit.path / "superlink/start", tmp_path=tmp_path)
    assert "--insecure" in started(kit.path / "beta/start", "beta-gpu0", tmp_path=tmp_path)
    assert tomllib.loads((kit.operator / "config.toml").read_text())["superlink"]["ret-fl"]["insecure"] is True


def test_flowers_command_finds_the_federation_in_the_operators_folder(kit: Kit) -> None:
    config = tomllib.loads((kit.operator / "config.toml").read_text())["superlink"]
    connection = config[config["default"]]
    assert connection["address"] == "superlink.example.org:8000"
    assert Path(connection["root-certificates"]).read_bytes() == (kit.ca / "ca.crt").read_bytes()


# --- units ---------------------------------------------------------------------------------------------------------


def unit_file(file: Path) -> configparser.ConfigParser:
    parsed = configparser.ConfigParser(interpolation=None)
    parsed.optionxform = str  # type: ignore[assignment, method-assign]
    parsed.read(file)
    return parsed


@pytest.mark.parametrize("unit", ["superlink/ret-fl-superlink.service", "alpha/ret-fl-supernode@.service"])
def test_units_restart_for_ever_and_outlive_the_reactivation_window(kit: Kit, unit: str) -> None:
    parsed = unit_file(kit.path / unit)
    assert parsed["Service"]["Restart"] == "always"
    assert 2 <= int(parsed["Service"]["RestartSec"]) <= REACTIVATION_SECONDS
    assert parsed["Unit"]["StartLimitIntervalSec"] == "0"


def test_superlink_sample_service_and_supernodes_can_share_a_host(tmp_path: Path) -> None:
    srv, file = tmp_path / "srv", tmp_path / "federation.toml"
    (tmp_path / "run.toml").write_text("data.limit = 24")
    file.write_text(
        f'folder = "{srv}"\n[superlink]\nhost = "alpha"\n[samples]\nhost = "alpha"\npreset = "run.toml"\n'
        '[[hosts]]\nname = "alpha"\n'
    )
    said = ret_fl("deploy", "init", file, "--out", tmp_path / "made").output
    sent = re.findall(rf"^ +(\S+)/ +to .*, as ({srv}/[a-z-]+)", said, re.MULTILINE)
    assert [folder for folder, _ in sent] == ["superlink", "samples", "alpha"]
    for folder, there in sent:
        shutil.copytree(tmp_path / "made" / folder, there, dirs_exist_ok=True)  # as rsync does
    for folder, words in zip(sent, ("--database", "serve-samples", "--node-config"), strict=True):
        (unit,) = Path(folder[1]).glob("*.service")
        command = unit_file(unit)["Service"]["ExecStart"].replace("%i", "alpha").split()
        assert words in started(Path(command[0]), *command[1:], tmp_path=tmp_path)


def test_the_window_in_the_unit_is_that_of_the_installed_flower(kit: Kit) -> None:
    unit = (kit.path / "alpha" / "ret-fl-supernode@.service").read_text()
    assert REACTIVATION_SECONDS == 60
    assert "alive until 60 s after" in unit


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_accepts_the_units(tmp_path: Path) -> None:
    kit = write_kit(example(folder=str(tmp_path), user="root"), tmp_path / "made")
    units = tmp_path / "units"
    units.mkdir()
    shutil.copy(kit.superlink / "ret-fl-superlink.service", units)
    shutil.copy(kit.path / "alpha" / "ret-fl-supernode@.service", units / "ret-fl-supernode@alpha-gpu0.service")
    shutil.copytree(kit.superlink, tmp_path / "kit-superlink")  # where ExecStart looks
    shutil.copytree(kit.path / "alpha", tmp_path / "kit")
    done = subprocess.run(["systemd-analyze", "verify", *units.iterdir()], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not done.stderr.strip()


def test_the_authority_and_its_key_load_again(kit: Kit) -> None:
    assert Authority.open(kit.ca, "ignored").certificate.subject.rfc4514_string() == "CN=ret-fl federation CA"
    assert load_node_key(kit.path / "beta" / "beta-gpu0.key").curve.name == "secp384r1"
