"""A model's losses on an audit's images: who is measured, and what the numbers are worth."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from small_models import EPSILON, trained

from ret_fl.audit.attacks import _duplicates, attack, takes
from ret_fl.audit.generate import load_denoiser
from ret_fl.audit.inputs import AuditData, Background, Options, spread_rows
from ret_fl.audit.schema import Leakage
from ret_fl.auditing import open_data
from ret_fl.config import DataConfig, ModelConfig
from ret_fl.data.sources import load_splits
from ret_fl.data.store import SampleStore
from ret_fl.diffusion.models import build_unet
from ret_fl.diffusion.objective import make_scheduler
from ret_fl.diffusion.sampling import save_pipeline

SINGLE, REPEATED, COPIES, HELD_OUT = 55, 5, 10, 200


def silent(stage: str) -> None:
    """Nobody wants to know."""


@pytest.fixture(scope="module")
def repeating() -> AuditData:
    """60 digits of which the first five stand there ten times, and others: the held-out ones twice each."""
    splits = load_splits(DataConfig(limit=SINGLE + REPEATED))
    again = np.repeat(np.arange(REPEATED), COPIES - 1)
    canaries = np.c_[np.arange(REPEATED), SINGLE + REPEATED + np.arange(len(again)).reshape(REPEATED, -1)]
    return AuditData(
        "digits",
        splits.train.subset(np.r_[: SINGLE + REPEATED, again]),
        splits.reference,
        splits.held_out.subset(np.r_[:HELD_OUT, :HELD_OUT]),
        canaries,
    )


@pytest.fixture(scope="module")
def learned(repeating: AuditData) -> Leakage:
    """What a model gives away after 300 steps on them."""
    denoiser = (trained(repeating.train, 300), make_scheduler(EPSILON), 1)
    return attack(denoiser, repeating, Background(), Options(), silent)[0]


def test_members_and_canaries_of_a_model_that_knows_them_stand_apart(repeating: AuditData, learned: Leakage) -> None:
    """Every image once, on either side; none of it shows in a model that has learned nothing."""
    unet = build_unet(ModelConfig(preset="tiny", pixel_unshuffle=1), repeating.train.image_shape, 0, 0)
    fresh, _ = attack((unet, make_scheduler(EPSILON), 1), repeating, Background(), Options(), silent)
    assert repeating.reference is not None
    others = HELD_OUT + len(repeating.reference)
    for leakage in (learned, fresh):
        assert [(m.attack, m.members, m.non_members) for m in leakage.membership] == [
            ("loss", SINGLE + REPEATED, others),
            ("pia", SINGLE + REPEATED, others),
        ]
        assert leakage.exposure is not None and len(leakage.exposure.exposures) == REPEATED
        assert leakage.exposure.most == pytest.approx(math.log2(others))
    assert all(m.auc.low > 0.5 for m in learned.membership)
    assert all(m.auc.low < 0.5 for m in fresh.membership)
    assert learned.exposure is not None and fresh.exposure is not None
    assert learned.exposure.mean > fresh.exposure.mean + 3
    assert min(learned.exposure.exposures) > 4


def test_images_are_spread_over_sets_of_which_one_is_small(repeating: AuditData) -> None:
    """What a small set cannot give the others do, and repeats count once."""
    sets = [repeating.train, repeating.train.subset(np.arange(4))]
    assert [len(rows) for rows in spread_rows(sets, 1000)] == [SINGLE + REPEATED, 4]
    large, small = spread_rows(sets, 32)
    assert (len(large), len(small)) == (30, 2)
    assert len(np.unique(repeating.train.content_hashes[large])) == 30


def test_repeated_images_stand_apart_by_their_losses(learned: Leakage) -> None:
    """All of them and no other; the four low-noise timesteps of the membership grid would tell three of the five."""
    leakage = learned
    assert leakage.duplicates is not None
    assert (leakage.duplicates.precision, leakage.duplicates.recall) == (1, 1)
    assert sorted(s.train for s in leakage.duplicates.suspects) == [*range(REPEATED)]
    assert {s.copies for s in leakage.duplicates.suspects} == {COPIES}


@pytest.mark.parametrize(("fold", "conditional"), [(1, True), (2, False), (2, True)])
def test_folded_and_class_conditional_models_are_attacked(fold: int, conditional: bool, tmp_path: Path) -> None:
    splits = load_splits(DataConfig(limit=24, canaries=1))
    config = ModelConfig(preset="tiny", pixel_unshuffle=fold, class_conditional=conditional)
    unet = build_unet(config, splits.train.image_shape, splits.train.num_classes, 0)
    save_pipeline(tmp_path, unet, make_scheduler(EPSILON), fold)
    denoiser = load_denoiser(tmp_path, "cpu")
    data = AuditData("digits", splits.train, splits.reference, splits.held_out, splits.canaries)
    assert denoiser is not None
    assert takes(denoiser, data)
    leakage, losses = attack(denoiser, data, Background(), Options(members=30), silent)
    assert leakage.exposure is not None and leakage.duplicates is not None
    rates = [i for m in leakage.membership for i in (m.auc, m.tpr_at_1_percent, m.tpr_at_01_percent)]
    numbers = [n for i in rates for n in (i.value, i.low, i.high)] + leakage.exposure.exposures
    assert len(numbers) == 2 * 9 + 1
    assert all(map(math.isfinite, numbers))
    assert all(np.isfinite(values).all() and len(values) for values in losses.values())


def test_labels_reach_a_class_conditional_model() -> None:
    """Its losses on the same images are others under other labels."""
    images = load_splits(DataConfig(limit=24)).train
    assert images.labels is not None
    moved = SampleStore(images.pixels(), (images.labels + 1) % 10, 10)
    unet = build_unet(ModelConfig(preset="tiny", class_conditional=True), images.image_shape, 10, 0)
    denoiser = (unet, make_scheduler(EPSILON), 1)
    own, other = (
        attack(denoiser, AuditData("digits", store), Background(), Options(), silent)[1]["training"]
        for store in (images, moved)
    )
    assert not np.allclose(own, other)


def test_canaries_weigh_no_more_among_members_than_in_the_data(run_dir: Path) -> None:
    data = open_data(run_dir)
    denoiser = load_denoiser(run_dir, "cpu")
    assert denoiser is not None
    leakage, _ = attack(denoiser, data, Background(), Options(members=10), silent)
    assert [a.members for a in leakage.membership] == [10, 10]
    assert leakage.exposure is not None
    assert len(leakage.exposure.exposures) == 2


def test_of_canaries_whose_repeats_differ_only_the_original_is_a_member() -> None:
    splits = load_splits(DataConfig(limit=24, canaries=2, canary_repeats=6, canary_jitter=10))
    unet = build_unet(ModelConfig(preset="tiny"), splits.train.image_shape, 10, 0)
    data = AuditData("digits", splits.train, splits.reference, splits.held_out, splits.canaries)
    leakage, _ = attack((unet, make_scheduler(EPSILON), 1), data, Background(), Options(members=34), silent)
    assert [a.members for a in leakage.membership] == [24, 24]
    assert leakage.exposure is not None and len(leakage.exposure.exposures) == 2


def test_images_that_were_dropped_are_no_members(repeating: AuditData) -> None:
    unet = build_unet(ModelConfig(preset="tiny", pixel_unshuffle=1), repeating.train.image_shape, 0, 0)
    dropped = np.r_[0, 50:60, SINGLE + REPEATED : len(repeating.train)]  # a canary, others, and repeats
    background = Background(dropped=dropped)
    leakage, _ = attack((unet, make_scheduler(EPSILON), 1), repeating, background, Options(), silent)
    assert [m.members for m in leakage.membership] == [SINGLE + REPEATED - 11] * 2
    assert leakage.exposure is not None and len(leakage.exposure.exposures) == REPEATED - 1
    assert leakage.duplicates is not None and leakage.duplicates.examined == SINGLE + REPEATED - 11


def test_suspects_keep_their_ids_where_only_some_images_are_measured() -> None:
    data = load_splits(DataConfig(limit=40, canaries=1, canary_repeats=5)).train
    assert len(data) == 44
    canary = int(np.argsort(np.unique(data.content_hashes, return_counts=True)[1])[-1])
    hash_of = np.unique(data.content_hashes)[canary]
    rows = np.flatnonzero(data.content_hashes == hash_of)
    measured = torch.from_numpy(np.sort(np.r_[rows[0], np.setdiff1d(np.arange(40), rows)[:20]]))
    noise = torch.rand(len(measured), 4, generator=torch.Generator().manual_seed(0))
    losses = 0.1 + 0.01 * noise
    losses[measured == rows[0]] = 0.001
    found = _duplicates(data, measured, losses, torch.tensor([50, 150, 250, 350]), 400)
    assert [(s.train, s.copies) for s in found.suspects] == [(rows[0], 5)]
    assert (found.examined, found.below) == (21, 1)
