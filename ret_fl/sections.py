"""The sections of a run's settings: names, defaults, ranges, meanings. `RunConfig` (config.py) joins them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from ret_fl.plugins import AGGREGATION, AUDITORS, AUGMENTERS, GATES, POLICIES, SHARD_POLICIES


def dashed(name: str) -> str:
    return name.replace("_", "-")


class Section(BaseModel):
    """A frozen group of settings whose outside names are dashed (`mem_ratio` is ``mem-ratio``)."""

    # numbers are text where text is wanted: `--set name=5`
    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        alias_generator=dashed,
        populate_by_name=True,
        coerce_numbers_to_str=True,
    )


DISK_SOURCES = ("image-folder", "hf", "cifar")
"""Sources that read data.path; the others ship with packages."""


class DataConfig(Section):
    source: Literal["digits", "mnist", "glyphs", "patches", "faces", "image-folder", "hf", "cifar"] = Field(
        "digits",
        description="Where the images come from; 'cifar' reads CIFAR-10 and CIFAR-100 as their author has them.",
    )
    path: str = Field(
        "",
        description="Folder of images (image-folder); hub name, save_to_disk folder or parquet files (hf); the "
        "python version's .tar.gz or its folder (cifar); or a URL that fsspec knows of such a folder or files "
        "(s3://bucket/photos), copied to the cache once.",
    )
    held_out_path: str = Field(
        "",
        description="image-folder, hf: images that never train, in the form of data.path. Held-out and reference "
        "images are then taken from these alone, and all of data.path may train; empty: from those of data.path.",
    )
    limit: int = Field(0, ge=0, description="At most this many distinct training images; 0 takes all there are.")
    skip: int = Field(
        0,
        ge=0,
        description="Leave out the first so many distinct training images: what was trained with limit=n before has no "
        "image in common with skip=n of the same split.",
    )
    image_size: int = Field(0, ge=0, description="Side in pixels images are resized and centre-cropped to; 0 keeps.")
    channels: Literal["auto", "grey", "rgb"] = Field("auto", description="Colour of the images the model sees.")
    held_out: float = Field(
        0.2, ge=0, lt=1, description="Share of the images kept from training, to measure quality and floors against."
    )
    reference: bool = Field(
        True,
        description="Keep a further real set, as large as the training set and disjoint from it, to calibrate the "
        "copy rate. It costs half of the images: turn it off when every image must train.",
    )
    canaries: int = Field(0, ge=0, description="Training images repeated on purpose, to see whether they are copied.")
    canary_repeats: int = Field(10, ge=1, description="How often each canary stands in the training set.")
    canary_jitter: float = Field(
        0.0,
        ge=0,
        description="Standard deviation, in grey levels of 8 bits, of noise on each repeat of a canary: then they are "
        "near-duplicates, which no content hash finds; 0: exact copies.",
    )
    seed: int = Field(0, ge=0, description="Seed of the split into train, held-out and reference, and of the canaries.")
    on_corrupt: Literal["skip", "refuse"] = Field(
        "skip", description="An unreadable image is skipped and counted, or stops the run."
    )
    duplicates: Literal["weight", "keep", "drop"] = Field(
        "weight",
        description="Duplicates, exact ones and those data.near-duplicates finds: 'weight' visits each 1/copies as "
        "often, whatever shards they are in; 'drop' visits the first of each cluster only; 'keep' trains on all.",
    )
    near_duplicates: Literal["off", "phash", "cosine"] = Field(
        "off",
        description="Also count images that are alike as duplicates (docs/duplicates.md): by perceptual hash (needs "
        "imagehash; for photographs) or by the cosine of features (of pixels, or of data.near-features).",
    )
    near_threshold: float = Field(
        0.0,
        ge=0,
        description="phash: bits of 64 that may differ (below 1: none); cosine: the least cosine. 0: 4 bits, .98.",
    )
    near_features: str = Field(
        "",
        description="For cosine: an image model as `ret-fl audit --features` takes it (a transformers folder, a "
        "TorchScript file, 'sscd', 'clip', 'inception'), on the server; empty: the pixels, at most 16x16 of them.",
    )
    flip: bool = Field(
        False,
        description="Mirror every drawn training image left to right with probability 1/2 (the paper: all but AFHQ).",
    )
    noise: float = Field(
        0.0,
        ge=0,
        description="Standard deviation of Gaussian noise put on every drawn training image, which lies in [-1, 1].",
    )
    split: str = Field("train", description="Which split of an hf dataset to read.")
    held_out_split: str = Field("test", description="Which split data.held-out-path is read from.")
    image_column: str = Field("image", description="Column of an hf dataset that holds the image.")
    label_column: str = Field("label", description="Column of an hf dataset that holds the class, if it is there.")
    captions: str = Field(
        "captions.json",
        description="File in an image folder that gives each image a caption or a list of them, by its path; read for "
        "text-to-image only. Without it there are none.",
    )
    caption_column: str = Field(
        "caption", description="Column of an hf dataset that holds a caption or a list of them, if it is there."
    )
    cache_dir: str = Field(
        "", description="Where decoded image sets and encodings of them are kept; empty: ret-fl in the user's cache."
    )


class ServiceConfig(Section):
    address: str = Field(
        "",
        description="host:port of a sample service (docs/samples.md) for clients without data; empty: none.",
    )
    ca: str = Field("", description="File with the CA of the service's certificate, PEM; empty: those of the system.")
    certificate: str = Field("", description="The node's own certificate, PEM, where the service has a --client-ca.")
    key: str = Field("", description="File with the private key of service.certificate, PEM.")
    insecure: bool = Field(False, description="Speak to the service without TLS: on one machine or a closed network.")
    compression: Literal["none", "zlib"] = Field(
        "none", description="zlib for slow links: it costs the service a core, and photographs gain little."
    )
    patience: float = Field(300.0, ge=0, description="Seconds a client waits for a service that is away.")
    cache_mb: int = Field(
        10_000, ge=1, description="Megabytes that fetched samples may take in data.cache-dir, all runs together."
    )
    signing_key: str = Field(
        "",
        description="Server only: file with the key that signs orders for the service (`ret-fl serve-samples "
        "--make-key`); empty: no service will serve this run.",
    )


class PartitionConfig(Section):
    scheme: Annotated[str, AfterValidator(SHARD_POLICIES.by_name)] = Field(
        "iid",
        description="How samples are first dealt to shards: iid (class-balanced), shuffled, class (whole classes a "
        "shard), dirichlet (over classes), file (as it says), or a plug-in (docs/extending.md).",
    )
    alpha: float = Field(0.3, gt=0, description="Dirichlet concentration: small is skewed, large is even.")
    classes_per_shard: int = Field(2, ge=1, description="Classes each shard holds under 'class'.")
    sizes: str = Field(
        "",
        description="Relative shard sizes for 'iid' and 'shuffled', as in '0.7,0.2,0.07,0.03'; empty: equal; 'speed': "
        "as fast as the nodes train, measured at the start; ten times the median counts at most.",
    )
    path: str = Field("", description="For 'file': a .npy or .json list with one shard number a sample.")
    options: str = Field("", description="Settings of a plug-in in partition.scheme, as in 'near = true, top = 3'.")
    clusters: Literal["any", "gather", "spread"] = Field(
        "any",
        description="How 'iid' and 'shuffled' deal duplicates (exact ones and those data.near-duplicates finds). "
        "'gather': all of a cluster to one shard; 'spread': as evenly over all shards as they go.",
    )


class ModelConfig(Section):
    preset: Literal["tiny", "small", "base", "ddpm-cifar", "ddpm-64"] = Field(
        "tiny", description="Size of the diffusers UNet2DModel (ret_fl/diffusion/models.py)."
    )
    pixel_unshuffle: int = Field(
        0,
        ge=0,
        le=8,
        description="Fold pixel blocks of this side into channels before the U-Net: 2 makes 16x16 cost what 8x8 "
        "does. 1 never folds; 0 folds by 2 for images of 16 pixels with the tiny and small presets, and with "
        "model.init-from as the model there does.",
    )
    class_conditional: bool = Field(False, description="Give the U-Net the class label (num_class_embeds).")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout inside the U-Net's residual blocks.")
    init_from: str = Field(
        "",
        description="Start from this diffusers folder (pipeline or UNet2DModel), the same on every machine, instead "
        "of random weights. model.preset and model.dropout are then not read. A StableDiffusionPipeline needs data "
        "with captions (docs/text-to-image.md).",
    )
    gradient_checkpointing: bool = Field(
        False, description="Compute activations again in backward instead of keeping them: less memory, slower steps."
    )


class TextConfig(Section):
    """How captions are read by text-to-image training; the defences of Somepalli et al. 2023 (arXiv 2305.20086)."""

    captions: Literal["first", "random"] = Field(
        "first", description="Of a sample with several captions: its first, or one drawn at every visit."
    )
    insert_tokens: int = Field(
        0, ge=0, description="Random tokens put into a caption at random places, anew at every visit."
    )
    replace_tokens: int = Field(0, ge=0, description="Tokens of a caption replaced by random ones at every visit.")
    noise: float = Field(0.0, ge=0, description="Standard deviation of Gaussian noise on text embeddings.")
    cache: bool = Field(
        True,
        description="Keep latents and text embeddings in data.cache-dir; false encodes images and captions at every "
        "visit.",
    )
    guidance: float = Field(7.5, ge=0, description="Guidance scale of the images drawn at the end.")


class LoraConfig(Section):
    rank: int = Field(
        0,
        ge=0,
        description="Train low-rank adapters of this rank (LoRA) instead of the whole U-Net of a text-to-image model; "
        "only they travel. 0: the whole U-Net.",
    )
    targets: str = Field("to_q,to_k,to_v,to_out.0", description="Layers that get adapters, by the end of their names.")


class DiffusionConfig(Section):
    prediction: Literal["epsilon", "v_prediction"] = Field(
        "v_prediction",
        description="What the U-Net predicts. 'epsilon' is the paper's; with it small models of few images leave haze.",
    )
    timesteps: int = Field(1000, ge=2, description="T, the length of the noising chain.")
    beta_start: float = Field(1e-4, gt=0, lt=1, description="First beta of the schedule.")
    beta_end: float = Field(0.02, gt=0, lt=1, description="Last beta of the schedule.")
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = Field(
        "squaredcos_cap_v2",
        description="Shape of the beta schedule. 'linear' is the paper's; 'squaredcos_cap_v2' (Nichol & Dhariwal 2021) "
        "spends fewer timesteps on pure noise, so fewer images teach as much.",
    )


class OptimizerConfig(Section):
    kind: Literal["adamw", "adamw-8bit"] = Field(
        "adamw", description="adamw-8bit keeps moments in 8 bits: needs bitsandbytes and a CUDA GPU."
    )
    lr: float = Field(
        0.0,
        ge=0,
        description="AdamW learning rate after warm-up; 0: that of model.preset (tiny .007, small .001, base .0005, "
        "ddpm-cifar and ddpm-64 .0002), or 1e-5 to go on from model.init-from.",
    )
    schedule: Literal["constant", "cosine"] = Field(
        "cosine",
        description="'cosine' lowers the learning rate from round to round, towards 0 at num-server-rounds; a run "
        "that is given more rounds later climbs up to its new curve.",
    )
    warmup_steps: int = Field(50, ge=0, description="Steps of linear warm-up, counted from fresh moments.")
    weight_decay: float = Field(0.01, ge=0, description="AdamW weight decay.")
    grad_clip: float = Field(1.0, ge=0, description="Global gradient norm is clipped to this; 0 does not clip.")
    carry_moments: bool = Field(True, description="Keep each shard's Adam moments from round to round on its client.")
    proximal_mu: float = Field(
        0.0,
        ge=0,
        description="FedProx (Li et al. 2020): every step's gradient is increased by this times the way the proxy has "
        "come from the global weights; 0: off.",
    )


LEARNING_RATES = {"tiny": 7e-3, "small": 1e-3, "base": 5e-4, "ddpm-cifar": 2e-4, "ddpm-64": 2e-4}
"""What optimizer.lr=0 means for each model.preset: tiny's is measured (docs/results), ddpm's is DDPM's own."""
FINE_TUNING_RATE = 1e-5


class EmaConfig(Section):
    decay: float = Field(0.995, ge=0, lt=1, description="Decay per step of the averaged weights, which are the result.")


class AgcConfig(Section):
    mode: Annotated[str, AfterValidator(GATES.by_name)] = Field(
        "own",
        description="Anti-Gradient Control. 'agc': a sample whose loss is abnormally low for its timestep gives no "
        "gradient; 'own': abnormally low for its timestep and for itself, beside its usual loss early in training; "
        "'sample': skipped by chance, the more often the lower its mean; 'random': the control, skips at random-rate; "
        "'off'; or a plug-in (docs/extending.md).",
    )
    mem_ratio: float = Field(
        1.45, gt=1, description="A sample is skipped when loss * mem-ratio < bank[t]; lambda = 1/mem-ratio."
    )
    t_max: int = Field(500, ge=1, description="Gate only timesteps below this: at high noise a low loss is luck.")
    usual_share: float = Field(
        0.16,
        gt=0,
        lt=1,
        description="Mode 'own': share of the rounds, from the first, over which each sample's usual loss is measured; "
        "before their end none is skipped.",
    )
    decay: float = Field(
        0.98, ge=0, lt=1, description="How much of the old loss the bank keeps at each visit (the paper: 0.8)."
    )
    bins: int = Field(50, ge=0, description="Pool the timesteps of the bank in this many bins; 0: one a timestep.")
    warm_passes: int = Field(
        0,
        ge=0,
        description="Passes of the starting model over a shard that fill its empty bank before it first trains: for "
        "fine-tuning, where a bank of zeros would let samples through that the model knows well.",
    )
    bias_correct: bool = Field(True, description="Undo the bank's bias towards its zero start.")
    min_visits: int = Field(0, ge=0, description="Skip nothing at a timestep the bank has seen fewer times than this.")
    max_rescale: float = Field(
        0.0, ge=0, description="Upper bound of the rescaling B/kept of what is left of a batch; 0: none."
    )
    random_rate: float = Field(0.2, ge=0, lt=1, description="Share skipped by mode 'random', below t-max.")
    sharpness: float = Field(
        4.0, ge=0, description="Mode 'sample' keeps with probability exp(sharpness * (r - median r)) below the median."
    )
    options: str = Field("", description="Settings of a plug-in in agc.mode, as in 'soft = true, width = 0.5'.")


WITHOUT_BANK = ("off", "sample", "random")
"""Values of agc.mode whose gates do not look at the loss bank."""


class TaaConfig(Section):
    mode: Literal["off", "next-visit", "two-pass-band", "two-pass-all"] = Field(
        "off",
        description="Threshold-Aware Augmentation. 'next-visit': a sample close to being skipped is augmented when "
        "it is next drawn; 'two-pass-band': re-drawn augmented if its ratio is below bar; 'two-pass-all': all are.",
    )
    kappa: float = Field(5.0, gt=0, description="Strength falls as exp(-kappa * (ratio - 1)) above the threshold.")
    bar: float = Field(1.5, gt=1, description="two-pass-band: at this ratio to the threshold an image stays clean.")
    momentum: float = Field(0.5, ge=0, lt=1, description="next-visit: how much of the old strength a visit keeps.")
    magnitude: float = Field(5.0, ge=0, le=30, description="RandAugment magnitude (of 30) at full strength.")
    ops: int = Field(2, ge=1, le=4, description="Random operations an image goes through.")
    policy: Annotated[str, AfterValidator(AUGMENTERS.by_name)] = Field(
        "auto",
        description="Operations: 'glyph' moves shapes only, 'photo' adds flips and colour; auto: by source; or a "
        "plug-in (docs/extending.md).",
    )
    options: str = Field("", description="Settings of a plug-in in taa.policy, as in 'side = 4'.")


class RedistributionConfig(Section):
    policy: Annotated[str, AfterValidator(POLICIES.by_name)] = Field(
        "random",
        description="What the server does with reported sample IDs; several joined by '+'. Exchanges round the ring: "
        "memorized (MSR, the paper's), high-loss, random. balance: high-loss IDs from the worst-fitted shard to the "
        "best. quarantine: memorized IDs are visited less. none. Or plug-ins (docs/extending.md).",
    )
    options: str = Field(
        "", description="Settings of plug-ins in redistribution.policy, as in 'top = 3, strength = 0.5'."
    )
    fraction: float = Field(
        0.25,
        gt=0,
        le=0.5,
        description="Share that moves at a time (the paper's rho): of the smallest shard; of balance's giver.",
    )
    period: int = Field(1, ge=1, description="Move at every n-th opportunity.")
    topology: Literal["ring", "derangement"] = Field(
        "ring", description="memorized, high-loss, random: each shard gives to the next, or to a random other one."
    )
    control: Literal["off", "samples", "all"] = Field(
        "off",
        description="For ablations, every policy by chance: 'samples' moves (or quarantines) as many samples as asked, "
        "whichever they are; 'all' moves them from and to any shards, too.",
    )
    gap: float = Field(
        0.1, ge=0, description="balance acts while the worst shard's mean log-loss exceeds the best's by more."
    )
    size_ratio: float = Field(
        1.5, ge=1, description="balance acts, too, while the largest shard is more than this times the smallest."
    )


class QuarantineConfig(Section):
    share: float = Field(
        0.0, ge=0, lt=1, description="Share of all samples quarantined (lowest log-ratios); 0: those below z."
    )
    z: float = Field(-2.5, lt=0, description="With share 0: samples whose robust z-score is below this.")
    beside: Literal["others", "usual"] = Field(
        "others",
        description="What a sample's mean log-ratio is low beside: 'others', those of all samples, which also takes "
        "easy ones (of MNIST: ones); 'usual', the sample's own of the first agc.usual-share of the rounds.",
    )
    probability: float = Field(0.25, gt=0, le=1, description="How often a quarantined sample is visited.")
    every: int = Field(1, ge=1, description="Choose anew every n rounds.")
    min_draws: int = Field(10, ge=1, description="Losses a sample needs on record before it can be quarantined.")


class AggregationConfig(Section):
    strategy: Annotated[str, AfterValidator(AGGREGATION.by_name)] = Field(
        "fedavg",
        min_length=1,
        description="The Flower Strategy that makes one model of the proxies: fedavg, fedavgm, fedadam, fedyogi, "
        "fedadagrad, fedmedian, fedtrimmedavg, krum, multikrum; or pkg.mod:Factory, a Strategy's class or a function "
        "annotated to return one (docs/aggregation.md).",
    )
    options: str = Field(
        "",
        description="What the strategy is made with, as inside a TOML table: 'eta = 0.01, tau = 1e-3'. Names are those "
        "of Flower's class.",
    )


class DpConfig(Section):
    mode: Literal["off", "server-fixed", "server-adaptive", "client-fixed", "client-adaptive"] = Field(
        "off",
        description="Differential privacy of whole shards (docs/differential-privacy.md): who clips a proxy's update, "
        "at a fixed norm or one that follows target-quantile. The server adds the noise in all of them.",
    )
    noise_multiplier: float = Field(
        1.0, gt=0, description="z. Noise of standard deviation z * norm / shards is added to the averaged weights."
    )
    clipping_norm: float = Field(
        1.0,
        gt=0,
        description="L2 norm that a proxy's update (raw and EMA weights together) is clipped to; adaptive: at first.",
    )
    delta: float = Field(1e-5, gt=0, lt=1, description="The delta that epsilon is told for.")
    target_quantile: float = Field(
        0.5, ge=0, le=1, description="Adaptive: the share of shards whose update should be clipped."
    )
    norm_rate: float = Field(0.2, gt=0, description="Adaptive: how fast the norm follows, in powers of e a round.")
    count_noise: float = Field(
        0.0,
        ge=0,
        description="Adaptive: standard deviation of the noise on how many were clipped; above noise-multiplier / 2. "
        "0: noise-multiplier, which makes the noise on weights 1.155 times what it says.",
    )
    audit: bool = Field(
        False,
        description="Let the run end with an audit (samples above 0). It shows training images and tells of losses on "
        "them: it is for the operator of the server, and epsilon does not cover it.",
    )


class AuditConfig(Section):
    auditors: Annotated[str, AfterValidator(AUDITORS.by_name)] = Field(
        "none",
        description="What the audit at a run's end measures beside its own numbers; several joined by '+': variety "
        "(how far samples lie from each other), swapped (the copy rate by chance), or plug-ins; none: nothing.",
    )
    options: str = Field("", description="Settings of plug-ins in audit.auditors, as in 'parts = 2'.")
