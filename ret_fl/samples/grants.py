"""Grants: the server's signed word that an order names certain samples, so that nobody can fetch others.

The server signs with an Ed25519 key that never leaves its host; the sample service knows the public key only. A grant
is rebuilt from the order it came with, so that only its expiry and its signature travel in the order.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from numpy.typing import NDArray

from ret_fl.config import ConfigError
from ret_fl.protocol import TrainOrder
from ret_fl.samples.records import Description, Hashes

_PURPOSE = b"ret-fl sample grant 1\n"  # so that no signature over anything else can pass for one
_MAX_HEADER = 1024
_HOW = "`ret-fl serve-samples --make-key` makes a pair"


class GrantError(ValueError):
    """A grant that does not allow what is asked; the message says why and gives away nothing of a valid one."""


@dataclass(frozen=True)
class Grant:
    """Who trains on a shard may read its samples: int64 [n] IDs of the dataset `fingerprint`, until `expires` (s)."""

    fingerprint: str
    run_key: str
    round: int
    shard: int
    expires: int
    ids: NDArray[np.int64]

    @classmethod
    def of(cls, order: TrainOrder) -> Grant:
        """What an order grants."""
        return cls(order.fingerprint, order.run_key, order.round, order.shard, order.expires, order.ids)

    def to_bytes(self) -> bytes:
        """What is signed: the same for the same grant on every machine."""
        header = json.dumps([self.fingerprint, self.run_key, self.round, self.shard, self.expires])
        return _PURPOSE + header.encode() + b"\n" + self.ids.astype("<u4").tobytes()

    @classmethod
    def from_bytes(cls, data: bytes) -> Grant:
        """Raises `GrantError` if it is none."""
        end = data.find(b"\n", len(_PURPOSE), len(_PURPOSE) + _MAX_HEADER)
        if not data.startswith(_PURPOSE) or end < 0 or (len(data) - end - 1) % 4:
            raise GrantError("this is no grant: do server, client and service run the same ret-fl?")
        try:
            fingerprint, run_key, round, shard, expires = json.loads(data[len(_PURPOSE) : end])
            ids = np.frombuffer(data, "<u4", offset=end + 1).astype(np.int64)
            return cls(str(fingerprint), str(run_key), int(round), int(shard), int(expires), ids)
        except (ValueError, TypeError) as error:
            raise GrantError(f"this is no grant: {error}") from None


class Signer:
    """Signs grants of one dataset on the server.

    key: an Ed25519 private key as PEM, without a pass phrase (`ret-fl serve-samples --make-key`).
    seconds: how long a grant holds. known, hashes: the dataset and each sample (`hash_samples`), for orders.
    Raises `ConfigError` if the file is no such key.
    """

    def __init__(self, key: Path, seconds: float, known: Description, hashes: Hashes) -> None:
        loaded = _load(key, "service.signing-key", lambda pem: serialization.load_pem_private_key(pem, None))
        if not isinstance(loaded, Ed25519PrivateKey):
            raise ConfigError(f"service.signing-key: {key} is no Ed25519 private key ({_HOW})")
        self._key = loaded
        self._seconds = seconds
        self._description = known.to_json()
        self._hashes = hashes

    def signed(self, order: TrainOrder) -> TrainOrder:
        """The order with a grant to read its samples from now on, and their hashes."""
        expires = int(time.time() + self._seconds) + 1
        order = replace(order, expires=expires, description=self._description, hashes=self._hashes[order.ids])
        return replace(order, signature=self._key.sign(Grant.of(order).to_bytes()))


class Verifier:
    """Checks grants at the sample service, which serves the dataset `fingerprint`.

    Raises `ConfigError` if the file is no Ed25519 public key as PEM.
    """

    def __init__(self, key: Path, fingerprint: str) -> None:
        loaded = _load(key, "--verify-key", serialization.load_pem_public_key)
        if not isinstance(loaded, Ed25519PublicKey):
            raise ConfigError(f"--verify-key: {key} is no Ed25519 public key ({_HOW})")
        self._key = loaded
        self._fingerprint = fingerprint

    def check(self, data: bytes, signature: bytes, ids: NDArray[np.int64]) -> Grant:
        """The grant, if it is genuine, current, about this data and names all of `ids`. Raises `GrantError`."""
        try:
            self._key.verify(signature, data)
        except InvalidSignature:
            raise GrantError(
                "the grant is not signed by this service's server: service.signing-key there and --verify-key here "
                "must be one pair"
            ) from None
        grant = Grant.from_bytes(data)
        if grant.fingerprint != self._fingerprint:
            raise GrantError(
                f"the grant is about data {grant.fingerprint[:16]}, this service has {self._fingerprint[:16]}: check "
                "its data settings and files"
            )
        if grant.expires <= time.time():
            raise GrantError(
                "the grant has expired: raise round-timeout, or set the clocks of server and service right"
            )
        outside = np.count_nonzero(~np.isin(ids, grant.ids))
        if outside:
            raise GrantError(f"{outside} of {len(ids)} samples are not in the grant")
        return grant


def make_key_pair(folder: Path) -> tuple[Path, Path]:
    """Write signing-key.pem (readable by its owner only) and verify-key.pem into `folder`.

    Raises `ConfigError` if one of them is there already: a run in progress may depend on it.
    """
    private, public = folder / "signing-key.pem", folder / "verify-key.pem"
    for path in (private, public):
        if path.exists():
            raise ConfigError(f"--make-key: {path} exists: name another folder, or remove it")
    folder.mkdir(parents=True, exist_ok=True)
    key = Ed25519PrivateKey.generate()
    private.touch(mode=0o600)
    private.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    public.write_bytes(
        key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    return private, public


def _load(path: Path, setting: str, parse: Callable[[bytes], object]) -> object:
    try:
        return parse(path.expanduser().read_bytes())
    except OSError as error:
        raise ConfigError(f"{setting}: {error}") from None
    except (ValueError, TypeError, UnsupportedAlgorithm):  # not `from error`: its text could quote the file
        raise ConfigError(f"{setting}: {path} is no PEM key without a pass phrase") from None
