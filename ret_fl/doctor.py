"""Would a run work on this machine? Packages, device, memory, data, disk: one finding each, with what to do.

Figures of memory and disk are estimates from the model's size; what they leave out is said where they are made.
"""

from __future__ import annotations

import importlib.metadata
import shutil
import sys
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import psutil
import torch
from packaging.requirements import Requirement

from ret_fl.aggregation import make_base
from ret_fl.averaging import needs_the_mean_only
from ret_fl.config import ConfigError, RunConfig
from ret_fl.data.sources import DataSplits, deal, load_splits
from ret_fl.devices import resolve_device
from ret_fl.diffusion.proxymodel import ProxyModel, open_model, trained_parameters
from ret_fl.diffusion.text_to_image import data_read, require_captions
from ret_fl.files import user_cache
from ret_fl.samples.access import open_access
from ret_fl.samples.client import SampleServiceError
from ret_fl.samples.records import Description, DescriptionError

FLOAT = 4
"""Bytes of a weight; weights, moments and gradients are float32 under every `precision`."""
GIB = 2**30

MEAN_REPLIES = 6
"""Sizes of a reply that a round takes on a server that averages replies as they come."""

SERVICE_SECONDS = 5.0
"""How long a sample service may be away before it is called a failure."""

_SERVICE_ADVICE = {
    "CERTIFICATE_VERIFY_FAILED": "set service.ca (on a node sample-ca) to the CA that signed the service's "
    "certificate: the kit's ca.crt",
    "Hostname Verification": "call the service by a name in its certificate, or add this one to samples.also, `ret-fl "
    "deploy init` again, copy samples/ and restart the service",
    "WRONG_VERSION_NUMBER": "the service runs with --insecure: start it with the kit's `start`, or set "
    "service.insecure (on a node sample-insecure)",
    "Socket closed": "the service wants TLS: leave service.insecure out and set service.ca; with a --client-ca it "
    "wants service.certificate and service.key, too",
    "Connection refused": "start the service (systemctl status ret-fl-samples); check the port, and that it binds "
    "more than 127.0.0.1",
    "errors resolving": "check the name in service.address, DNS or /etc/hosts",
}
"""What gRPC says of a connection that fails -> what to do."""


class Verdict(StrEnum):
    """ok: nothing to do; warning: it may run, worse or not for long; failure: it will not run."""

    OK = "ok"
    WARNING = "warning"
    FAILURE = "failure"


@dataclass(frozen=True)
class Finding:
    """What one check found, and what to do about it (empty if all is well)."""

    check: str
    verdict: Verdict
    found: str
    advice: str = ""

    @classmethod
    def ok(cls, check: str, found: str) -> Finding:
        return cls(check, Verdict.OK, found)

    @classmethod
    def warning(cls, check: str, found: str, advice: str) -> Finding:
        return cls(check, Verdict.WARNING, found, advice)

    @classmethod
    def failure(cls, check: str, found: object, advice: str) -> Finding:
        return cls(check, Verdict.FAILURE, str(found), advice)


def examine_machine(config: RunConfig, fingerprint: str = "") -> list[Finding]:
    """Every check that needs no SuperLink, in the order in which things are needed.

    Args:
        fingerprint: the data fingerprint, or its first digits, that this machine's data must have; empty: any.
    """
    findings = [check_python(), check_packages(), check_device(config)]
    data: DataSplits | None = None
    if config.service.address:
        finding, known = check_service(config, fingerprint)
    else:
        finding, data = check_data(config, fingerprint)
        known = Description.of(data.train, data.kind) if data else None
    findings.append(finding)
    if known is None:
        return findings
    try:
        require_captions(config, data.train if data else None)
        model = open_model(config, known.image_shape, known.num_classes)
    except ConfigError as error:
        return [*findings, Finding.failure("model", error, "change the setting it names")]
    trained = trained_parameters(model.unet)
    parameters = sum(p.numel() for p in trained.values())
    name = config.model.init_from or config.model.preset
    findings.append(Finding.ok("model", f"{name}, {parameters:,} parameters trained"))
    findings.append(check_client_memory(config, client_memory(config, model, known.image_shape)))
    findings.append(check_server_memory(config, parameters))
    results = checkpoint_bytes(config, parameters) + history_bytes(config, known.samples)
    findings.append(check_disk("disk, results", Path(config.out or "runs"), results))
    state = Path(config.state_dir) if config.state_dir else user_cache("proxies")
    findings.append(check_disk("disk, client state", state, client_state_bytes(config, parameters)))
    return findings


def check_python() -> Finding:
    """The interpreter against what the package asks for."""
    version = ".".join(map(str, sys.version_info[:3]))
    if (3, 11) <= sys.version_info[:2] <= (3, 12):
        return Finding.ok("python", version)
    return Finding.failure("python", version, "install Python 3.11 or 3.12, then: make setup PYTHON=python3.12")


def check_packages(package: str = "ret-fl") -> Finding:
    """Installed versions against the requirements of `package`."""
    try:
        required = [Requirement(text) for text in importlib.metadata.requires(package) or ()]
    except importlib.metadata.PackageNotFoundError:
        return Finding.failure("packages", f"{package} is not installed", "in the repository: make setup")
    problems = []
    for requirement in required:
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            problems.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            problems.append(f"{requirement.name} is {version}, not {requirement.specifier}")
    if problems:
        return Finding.failure(
            "packages", "; ".join(problems), "in the repository: make setup (it installs the right ones)"
        )
    named = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("flwr", "torch", "diffusers"))
    return Finding.ok("packages", named)


def check_device(config: RunConfig) -> Finding:
    """The device the run asks for."""
    try:
        device = resolve_device(config.device)
    except ConfigError as error:
        return Finding.failure("device", error, "set device=auto, or make the device available to this process")
    if device.type == "cuda":
        return Finding.ok("device", f"{device}: {torch.cuda.get_device_name(device)}")
    return Finding.ok("device", f"{device}, {psutil.cpu_count(logical=False) or psutil.cpu_count()} cores")


def check_data(config: RunConfig, fingerprint: str = "") -> tuple[Finding, DataSplits | None]:
    """Load the data as a client does, and compare its fingerprint with the expected one."""
    try:
        data = load_splits(data_read(config))
        Description.of(data.train, data.kind)
        deal(config, data)
    except (ConfigError, DescriptionError, OSError) as error:
        return Finding.failure(
            "data", error, "check data.source and data.path, and that this account may read it"
        ), None
    found = f"{data.describe()}; fingerprint {data.train.fingerprint}"
    if fingerprint and not data.train.fingerprint.startswith(fingerprint.lower()):
        advice = (
            "copy the very same files here and use the same data.* settings: clients with other data are sent no orders"
        )
        return Finding.failure("data", f"{found}, expected {fingerprint}", advice), data
    if data.unreadable:
        return Finding.warning("data", found, f"replace or remove: {', '.join(data.unreadable[:5])}"), data
    return Finding.ok("data", found), data


def check_service(config: RunConfig, fingerprint: str = "") -> tuple[Finding, Description | None]:
    """Ask the sample service what it has, as a client does; compare its fingerprint with the expected one."""
    service = config.service.model_copy(update={"patience": min(config.service.patience, SERVICE_SECONDS)})
    try:
        known = open_access(service, data_read(config)).describe()
    except (ConfigError, OSError) as error:
        return Finding.failure("data", error, "check the service.* settings, and that this account may read them"), None
    except SampleServiceError as error:
        told = (advice for said, advice in _SERVICE_ADVICE.items() if said in str(error))
        return Finding.failure(
            "data",
            error,
            next(told, "check what listens at service.address, the firewalls in between, the service's log"),
        ), None
    shape = "x".join(map(str, known.image_shape))
    found = (
        f"{known.samples:,} training images of {shape} from the sample service {service.address}; fingerprint "
        f"{known.fingerprint}"
    )
    if fingerprint and not known.fingerprint.startswith(fingerprint.lower()):
        advice = (
            "serve the very same files with the run's data.* settings (samples.preset of the kit): clients with other "
            "data are sent no orders"
        )
        return Finding.failure("data", f"{found}, expected {fingerprint}", advice), known
    if service.insecure:
        advice = "use TLS (service.ca) unless nobody else is on the network: whoever is in between reads the samples"
        return Finding.warning("data", found, advice), known
    return Finding.ok("data", found), known


def client_memory(config: RunConfig, model: ProxyModel, image_shape: tuple[int, int, int]) -> int:
    """Bytes a client takes on its device: weights, EMA, gradients, two Adam moments, and what backward needs.

    The last is measured on one sample in float32 and multiplied by what goes through the U-Net at once, halved under
    16 bits. Left out: the allocator's slack, workspaces of kernels, the framework itself (about 0.5 GB), the images,
    and the encoders of a text-to-image model, which are gone while it trains.
    """
    unet, objective = model.unet, model.objective(torch.device("cpu"))
    if config.model.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
        unet.train()
    x0, condition = objective.imagined(1, image_shape)
    t, noise = objective.draw(x0)
    weights = {p.untyped_storage().data_ptr() for p in unet.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        # the graph must live as long as its tensors are counted, or addresses are used again
        output = objective.losses(unet, x0, t, noise, condition)
    activations = sum(kept.values()) * (config.micro_batch or config.batch_size)
    del output
    device = resolve_device("auto") if config.device == "auto" else torch.device(config.device)
    halved = config.precision in ("bf16", "fp16") or (config.precision == "auto" and device.type == "cuda")
    trained = sum(p.numel() for p in trained_parameters(unet).values())
    moments = 2 if config.optimizer.kind == "adamw-8bit" else 2 * FLOAT
    each = FLOAT + moments + (FLOAT if config.ema.decay else 0)  # gradient, moments, EMA
    return FLOAT * sum(p.numel() for p in unet.parameters()) + each * trained + activations // (2 if halved else 1)


def check_client_memory(config: RunConfig, needed: int) -> Finding:
    """Free memory of the device against the estimate of what one client takes on it."""
    try:
        device = resolve_device(config.device)
    except ConfigError as error:
        return Finding.failure("memory, client", error, "see device")
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    found = f"about {_size(needed)} for one client at batch-size={config.batch_size}, {_size(free)} free on {device}"
    if needed > free:
        advice = "lower batch-size, choose a smaller model.preset or data.image-size, or free memory on the device"
        return Finding.failure("memory, client", found, advice)
    if needed > 0.8 * free:
        return Finding.warning("memory, client", found, "the estimate may be low: lower batch-size if memory runs out")
    return Finding.ok("memory, client", found)


def server_replies(config: RunConfig) -> int:
    """The most that a round takes on the server, in sizes of a reply, rounded up from `benchmarks.server_memory`.

    Replies that are averaged as they come take 4.6 to 5.4, whatever the number of shards; a strategy that needs all of
    them took 2.7 more than there are. Proxies kept apart (not measured) lie there twice at the end of a round: old and
    new. Left out: what server optimizers remember, and the process itself. Raises `ConfigError` as `make_base`.
    """
    if not config.averages:
        return 2 * config.shards + 3
    return MEAN_REPLIES if needs_the_mean_only(make_base(config)) else max(MEAN_REPLIES, config.shards + 3)


def check_server_memory(config: RunConfig, parameters: int) -> Finding:
    """Memory of the machine against what a round takes on the server."""
    try:
        replies = server_replies(config)
    except ConfigError as error:
        return Finding.failure("memory, server", error, "change the setting it names")
    needed = replies * (2 if config.ema.decay else 1) * parameters * FLOAT
    free = psutil.virtual_memory().available
    found = f"about {_size(needed)} for a round, {replies} sizes of a reply, {_size(free)} free"
    if needed > free:
        advice = "matters where the SuperLink runs: use a machine with more memory, or a smaller model.preset"
        if replies != MEAN_REPLIES:
            advice += ", or fewer shards"
            if config.averages:
                advice += ", or an aggregation.strategy that averages replies as they come (fedavg without dp.mode)"
        return Finding.warning("memory, server", found, advice)
    return Finding.ok("memory, server", found)


def checkpoint_bytes(config: RunConfig, parameters: int) -> int:
    """Bytes of the checkpoints a run keeps, one more while it is written, and the final model, or models."""
    kept, models = (1, 1) if config.averages else (1 + config.shards, config.shards)
    return ((config.keep_checkpoints + 1) * 2 * kept + models) * parameters * FLOAT


def history_bytes(config: RunConfig, samples: int) -> int:
    """Bytes of `history/`: in every round shard, visits and skips of each sample, which are 3 bytes once packed."""
    return config.num_server_rounds * (3 * samples + 1024)


def client_state_bytes(config: RunConfig, parameters: int) -> int:
    """Bytes of what a client keeps for one shard: moments, and unaveraged weights, of the last rounds."""
    arrays = (2 if config.optimizer.carry_moments else 0) + (2 if config.aggregate_every > 1 else 0)
    return (config.keep_checkpoints + 1) * arrays * parameters * FLOAT


def check_disk(check: str, folder: Path, needed: int) -> Finding:
    """Free disk where `folder` is, or will be made, against `needed` bytes."""
    there = folder.expanduser().absolute()
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    found = f"about {_size(needed)} needed in {folder}, {_size(free)} free"
    if needed > free:
        return Finding.failure(
            check, found, "free disk, lower keep-checkpoints, or choose another folder (out, state-dir)"
        )
    if 3 * needed > free:
        return Finding.warning(check, found, "pictures, logs and other runs need room, too: free some disk")
    return Finding.ok(check, found)


def _size(count: int) -> str:
    return f"{count / GIB:,.2f} GiB"
