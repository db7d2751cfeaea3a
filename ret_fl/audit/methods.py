"""How each number of the report is computed, in words, and what it misses."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """How a number is computed: where from, and what it misses. `key` tells the report whether it is there."""

    key: str
    title: str
    text: str
    source: str
    misses: str


METHODS = (
    Method(
        "copy-rate",
        "Copy rate",
        "A sample counts as a copy if its squared distance to the nearest training image is below a threshold (0.3 as "
        "a rule) times that to the nearest of as many real images that were never trained on. Where real images lie "
        "dense, both distances shrink alike, so the ratio stays fair. The floor is the same share of real held-out "
        "images. Intervals of shares are Wilson's, those of differences bootstrapped, both 95 %.",
        "Calibration by unseen real data as in Meehan et al. 2020 (arXiv 2004.05675); interval: Wilson 1927.",
        "Copies of parts, crops, other colours, or moves by more than a pixel. The interval covers the drawing of "
        "samples; training again with another seed can move the rate further.",
    ),
    Method(
        "memorized",
        "Memorized quantity (MQ)",
        "Share of samples whose squared distance to the nearest training image is below tau times the mean over the "
        "50 nearest. Exact duplicates are removed from the training images first.",
        "IET, arXiv 2407.15328, and AGC, arXiv 2502.09434.",
        "On small or simple images much of it is chance: read it only beside its floor.",
    ),
    Method(
        "carlini",
        "Carlini's ratio",
        "Distance (not squared) to the nearest training image over alpha times the mean distance to the 50 nearest; "
        "at most 1 counts.",
        "Carlini et al. 2023, arXiv 2301.13188.",
        "As MQ, it is not calibrated against real images.",
    ),
    Method(
        "distance",
        "Distance to the training images",
        "Median over samples of the squared pixel distance to the nearest training image, values in [0, 1], summed "
        "over all pixels and channels. Far above that of held-out images, the model has not learned the data.",
        "Sanity check of this audit.",
        "What images look like: blur lies close to everything.",
    ),
    Method(
        "similarity",
        "Similarity in feature models",
        "Cosine similarity of each sample to its most similar training image in the features of an image model; the "
        "95th percentile in SSCD features is the memorization score of work on Stable Diffusion. Whitened pixels: "
        "principal components of held-out images (99 % of the variance, each scaled to variance 1), with a floor of "
        "reference images. Background: training images against all others.",
        "Somepalli et al. 2023, arXiv 2212.03860; SSCD: Pizzi et al. 2022, arXiv 2202.10261.",
        "A common style or class looks similar too; features trained on photographs say little about other images.",
    ),
    Method(
        "fidelity",
        "Fréchet distance, KID, precision, recall",
        "Samples against real images in the features named. Fréchet: distance of fitted Gaussians. KID: unbiased "
        "kernel distance, about 0 for equal distributions. Precision: share of samples within reach of real images; "
        "recall: share of real images within reach of samples, reach being the third nearest neighbour.",
        "Heusel et al. 2017 (arXiv 1706.08500); Binkowski et al. 2018 (arXiv 1801.01401); Kynkäänniemi et al. 2019 "
        "(arXiv 1904.06991).",
        "Copies score well on all four. Below 1000 samples they move with the seed. Values of different features or "
        "sets of images do not compare.",
    ),
    Method(
        "inception",
        "Inception Score, and FID as published",
        "Of Inception-v3 alone. The score is exp of the mean divergence of a sample's class probabilities from those "
        "of all samples, the mean over 10 parts. FID as papers report it compares with the training images instead of "
        "unseen ones.",
        "Salimans et al. 2016 (arXiv 1606.03498).",
        "Both reward copying: the training images themselves score best.",
    ),
    Method(
        "clip",
        "CLIP score",
        "Mean cosine of each sample and its prompt in CLIP's joint space of images and text, on a scale of -1 to 1. "
        "Beside it, that of training images and their captions.",
        "Hessel et al. 2021, arXiv 2104.08718, without its factor of 2.5.",
        "Quality and variety: an ugly image of the right things scores well. Values of different CLIP models do not "
        "compare.",
    ),
    Method(
        "membership",
        "Membership inference",
        "One score for each image, the model's loss on fixed timesteps and noise or the error of the PIA attack, "
        "should not tell training from held-out images: AUC 0.5 is guessing. Members found at few false alarms show "
        "whether single images are exposed even when the average is not.",
        "Yeom et al. 2018 (arXiv 1709.01604); PIA: Kong et al. 2023 (arXiv 2305.18355); low false alarms: Carlini et "
        "al. 2022 (arXiv 2112.03570).",
        "Stronger attacks that train shadow models. With few held-out images, rates at 0.1 % are mostly noise.",
    ),
    Method(
        "exposure",
        "Canary exposure",
        "log2 of the number of compared images less log2 of the canary's rank by loss among images never seen. Without "
        "memorization about 1.44 bits are expected; the most possible is log2 of the number compared.",
        "Carlini et al. 2019, arXiv 1802.08232.",
        "Images less odd than the canaries.",
    ),
    Method(
        "duplicates",
        "Suspected duplicates",
        "Training images whose loss, compared with others at the same timesteps (below 0.4 T, where T is the length of "
        "the chain), is far below the usual. z counts standard deviations. Copies: exact ones in the data; none found "
        "may still mean near-duplicates.",
        "Loss statistics of AGC, arXiv 2502.09434.",
        "Blank or very simple images have low losses too.",
    ),
    Method(
        "skips",
        "Skip rate",
        "Share of training draws left out because their loss was far below the running mean at their timestep.",
        "AGC, arXiv 2502.09434.",
        "It tells what training avoided, not what the model kept.",
    ),
    Method(
        "losses",
        "Loss histograms",
        "Denoising loss of training samples: those of the lowest losses (memorized), of the highest, and the rest.",
        "IET, arXiv 2407.15328.",
        "Groups are chosen by loss, so they differ by construction; look at how far apart they are.",
    ),
)
