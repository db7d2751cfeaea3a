"""Keys, certificates, orders and real services for the tests of the sample service."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ret_fl.config import DataConfig, RunConfig, ServiceConfig
from ret_fl.data.store import SampleStore
from ret_fl.deploy import certificates
from ret_fl.protocol import TrainOrder
from ret_fl.samples.access import ServedAccess
from ret_fl.samples.grants import Signer, Verifier, make_key_pair
from ret_fl.samples.records import Description, hash_samples
from ret_fl.samples.server import SampleServer, Tls


def pictures(count: int, shape: tuple[int, int, int] = (3, 8, 8), classes: int = 4, seed: int = 0) -> SampleStore:
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, *shape), dtype=np.uint8)
    return SampleStore(images, rng.integers(0, classes, count) if classes else None, classes)


@dataclass
class Serving:
    """A dataset with keys: its service can be started, and orders for it be signed."""

    folder: Path
    store: SampleStore
    port: int = 0

    def __post_init__(self) -> None:
        self.known = Description.of(self.store, "photo")
        keys = self.folder / "keys"
        self.signing_key, self.verify_key = keys / "signing-key.pem", keys / "verify-key.pem"
        if not keys.exists():
            make_key_pair(keys)

    @contextmanager
    def running(self, tls: Tls | None = None, **options: object) -> Iterator[SampleServer]:
        """The service on its port: a free one, the first time."""
        verifier = Verifier(self.verify_key, self.known.fingerprint)
        server = SampleServer(self.store, self.known, verifier, port=self.port, tls=tls, **options)
        self.port = server.port
        server.start()
        try:
            yield server
        finally:
            server.stop(0)

    def order(self, ids: list[int] | np.ndarray, seconds: float = 60, key: Path | None = None) -> TrainOrder:
        ids = np.asarray(ids, np.int64)
        columns = np.ones(len(ids), np.float32)
        unsigned = TrainOrder(
            config=RunConfig(),
            run_key="test",
            fingerprint=self.known.fingerprint,
            shard=0,
            round=1,
            proxy_round=0,
            start="global",
            upload=True,
            ids=ids,
            probability=columns,
            strength=columns,
            log_ratio=columns,
            usual=columns,
            bank_values=columns,
            bank_visits=ids,
        )
        signer = Signer(key or self.signing_key, seconds, self.known, hash_samples(self.store, self.known))
        return signer.signed(unsigned)

    def service(self, **changes: object) -> ServiceConfig:
        config = ServiceConfig(address=f"localhost:{self.port}", insecure=True, patience=5.0)
        return replace_settings(config, **changes)

    def access(self, cache: str = "cache", **changes: object) -> ServedAccess:
        """A client without data, with a cache of its own name."""
        return ServedAccess(self.service(**changes), DataConfig(cache_dir=str(self.folder / cache)))

    def cached_files(self, cache: str = "cache") -> list[Path]:
        return sorted((self.folder / cache / "samples").glob("*.npy"))


def replace_settings(config: ServiceConfig, **changes: object) -> ServiceConfig:
    return config.model_copy(update=changes)


def changed(order: TrainOrder, **changes: object) -> TrainOrder:
    return replace(order, **changes)  # type: ignore[arg-type]


@dataclass
class Authority:
    """A certificate authority of a test, which signs certificates of localhost."""

    folder: Path
    name: str = "ca"

    def __post_init__(self) -> None:
        self._authority = certificates.Authority.open(self.folder / self.name, self.name)
        self.path = self.folder / self.name / "ca.crt"

    def issue(self, name: str) -> tuple[Path, Path]:
        """Certificate and key files."""
        paths = self.folder / f"{name}.pem", self.folder / f"{name}.key"
        for path, content in zip(paths, self._authority.issue(["localhost", "127.0.0.1"], days=1), strict=True):
            path.write_bytes(content)
        return paths
