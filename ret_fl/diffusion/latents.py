"""The objective of text-to-image models: latents of images are denoised, told the embedding of a caption.

Images and captions are encoded once and kept on disk (ret_fl/diffusion/encodings.py). What is kept of an image is the
mean and deviation of its latents, so that every visit draws other ones, as diffusers' own training does.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMScheduler, ModelMixin
from numpy.typing import NDArray
from torch import Tensor

from ret_fl.config import ConfigError
from ret_fl.data.store import Samples, SampleStore
from ret_fl.diffusion.encoders import Encoders, fingerprint
from ret_fl.diffusion.encodings import EncodingFile, encoding_file
from ret_fl.diffusion.objective import Change, Objective, as_seen
from ret_fl.diffusion.sampling import start_noise
from ret_fl.sections import TextConfig


@dataclass(frozen=True)
class Captioned:
    """A store with captions, and what is on disk of its encodings.

    texts: distinct captions. rows: int64, for each sample, where its captions are in `texts`. latents: of images as
    they are (False) and mirrored (True), where they were asked for.
    """

    store: SampleStore
    texts: list[str]
    rows: list[NDArray[np.int64]]
    latents: dict[bool, EncodingFile]
    embeddings: EncodingFile | None


class LatentObjective(Objective):
    """Losses of a latent diffusion U-Net, one a sample: means over the latent's values.

    cache: folder of encodings; None encodes at every visit. text: which caption is read, and what is done to it.
    """

    def __init__(
        self,
        scheduler: DDPMScheduler,
        device: torch.device,
        encoders: Encoders,
        text: TextConfig,
        cache: Path | None,
        half: torch.dtype | None = None,
    ) -> None:
        super().__init__(scheduler, device, half=half)
        self.encoders, self.text, self.cache = encoders, text, cache
        self._known: dict[str, Captioned] = {}

    @property
    def _rewrites(self) -> bool:
        """Whether captions are changed at every visit, so that their embeddings cannot be kept."""
        return bool(self.text.insert_tokens or self.text.replace_tokens)

    def prepare(self, store: Samples, ids: Tensor, *, mirrored: bool = False) -> None:
        """Encode what the cache lacks of these samples (int64 [n]); afterwards the encoders' memory is free."""
        captioned = self._captioned(store)
        if self.cache is not None:
            for turned in (False, True) if mirrored else (False,):
                self._filled(captioned, ids, turned)
        if not self._rewrites:
            self._fill_embeddings(captioned, np.concatenate([self._readable(captioned, i) for i in ids.tolist()]))
        self.encoders.release()

    def batch(
        self, store: Samples, ids: Tensor, change: Change | None = None, mirrored: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Latents float32 [B, C, h, w] drawn from their posteriors, and embeddings [B, length, width].

        Images that go through `change` are encoded anew. Raises `ConfigError` for a store without captions.
        """
        captioned = self._captioned(store)
        if change:
            posterior = self.encoders.posterior(as_seen(store.fetch(ids, self.device)[0], change, mirrored))
        else:
            posterior = self._posterior(captioned, ids, mirrored)
        mean, deviation = posterior.unbind(1)
        # contiguous, as what is read from disk is: noise is drawn in the order of memory
        latents = mean + deviation * torch.randn_like(mean, memory_format=torch.contiguous_format)
        return self._scaled(latents), self._disturbed(self._embeddings(captioned, self._chosen(captioned, ids)))

    def fixed(self, store: Samples, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The mean of each latent, and each sample's first caption as it is."""
        captioned = self._captioned(store)
        first = np.array([captioned.rows[i][0] for i in ids.tolist()])
        return self._scaled(self._posterior(captioned, ids)[:, 0]), self._plain(captioned, first)

    def imagined(self, count: int, image_shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
        latents = torch.randn(count, *self.encoders.latent_shape(image_shape), device=self.device)
        return self.formatted(latents), torch.randn(
            count, self.encoders.length, self.encoders.width, device=self.device
        )

    def fixed_noise(self, seed: int, count: int, image_shape: tuple[int, int, int]) -> Tensor:
        shape = self.encoders.latent_shape(image_shape)
        return self.formatted(start_noise(seed, 0, count, shape).to(self.device))

    def _called(self, unet: ModelMixin, x_t: Tensor, t: Tensor, embeddings: Tensor | None) -> Tensor:
        return unet(x_t, t, encoder_hidden_states=embeddings, return_dict=False)[0]

    def _scaled(self, latents: Tensor) -> Tensor:
        return self.formatted(self.encoders.scaling_factor * latents)

    # images

    def _posterior(self, captioned: Captioned, ids: Tensor, mirrored: Tensor | None = None) -> Tensor:
        if self.cache is None:
            images, _ = captioned.store.fetch(ids, self.device)
            return self.encoders.posterior(as_seen(images, None, mirrored))
        turned = torch.zeros(len(ids), dtype=torch.bool) if mirrored is None else mirrored.cpu()
        posterior = torch.empty(len(ids), 2, *self.encoders.latent_shape(captioned.store.image_shape))
        for which in turned.unique().tolist():
            chosen = ids[turned == which]
            posterior[turned == which] = self._filled(captioned, chosen, which).read(chosen.numpy())
        return posterior.to(self.device)

    def _filled(self, captioned: Captioned, ids: Tensor, mirrored: bool) -> EncodingFile:
        """The file of latents, mirrored or not, with those of these samples in it."""
        store, folder = captioned.store, self.encoders.folder
        if mirrored not in captioned.latents:
            assert self.cache is not None, "without a cache nothing is kept"
            captioned.latents[mirrored] = encoding_file(
                self.cache,
                ["mirrored latents" if mirrored else "latents", store.fingerprint, fingerprint(folder, "vae")],
                len(store),
                (2, *self.encoders.latent_shape(store.image_shape)),
            )

        def encode(rows: NDArray[np.int64]) -> Tensor:
            images, _ = store.fetch(torch.from_numpy(rows), self.device)
            return self.encoders.posterior(images.flip(-1) if mirrored else images)

        captioned.latents[mirrored].fill(ids.numpy(), encode)
        return captioned.latents[mirrored]

    # captions

    def _readable(self, captioned: Captioned, i: int) -> NDArray[np.int64]:
        """The rows in `texts` of the captions that sample i may be read by."""
        return captioned.rows[i][:1] if self.text.captions == "first" else captioned.rows[i]

    def _chosen(self, captioned: Captioned, ids: Tensor) -> NDArray[np.int64]:
        """The row in `texts` of the caption that each sample is read by this time."""
        options = [self._readable(captioned, i) for i in ids.tolist()]
        if self.text.captions == "first":
            return np.concatenate(options)
        draw = torch.rand(len(options)).tolist()
        return np.array([rows[int(u * len(rows))] for u, rows in zip(draw, options, strict=True)])

    def _embeddings(self, captioned: Captioned, rows: NDArray[np.int64]) -> Tensor:
        if self._rewrites:
            return self.encoders.embed(self._rewritten([captioned.texts[row] for row in rows]))
        return self._plain(captioned, rows)

    def _plain(self, captioned: Captioned, rows: NDArray[np.int64]) -> Tensor:
        if captioned.embeddings is None:
            return self.encoders.embed(self.encoders.tokens([captioned.texts[row] for row in rows]))
        self._fill_embeddings(captioned, rows)
        return captioned.embeddings.read(rows).to(self.device)

    def _fill_embeddings(self, captioned: Captioned, rows: NDArray[np.int64]) -> None:
        if captioned.embeddings is not None:
            captioned.embeddings.fill(
                rows, lambda part: self.encoders.embed(self.encoders.tokens([captioned.texts[row] for row in part]))
            )

    def _rewritten(self, captions: list[str]) -> Tensor:
        """Tokens int64 [B, length] of captions in which some are replaced and some put in at random."""
        tokenizer, room = self.encoders.tokenizer, self.encoders.length - 2
        changed = []
        for caption in captions:
            ids = tokenizer(caption, truncation=True, max_length=self.encoders.length).input_ids
            words = ids[1:-1]
            for place in torch.randperm(len(words))[: self.text.replace_tokens].tolist():
                words[place] = self._random_token()
            for _ in range(self.text.insert_tokens):
                words.insert(int(torch.randint(len(words) + 1, ())), self._random_token())
            changed.append([ids[0], *words[:room], ids[-1]])
        padded = tokenizer.pad(
            {"input_ids": changed}, padding="max_length", max_length=self.encoders.length, return_tensors="pt"
        )
        return padded.input_ids

    @cached_property
    def _ordinary_tokens(self) -> list[int]:
        tokenizer = self.encoders.tokenizer
        return sorted(set(range(len(tokenizer))) - set(tokenizer.all_special_ids))

    def _random_token(self) -> int:
        return self._ordinary_tokens[int(torch.randint(len(self._ordinary_tokens), ()))]

    def _disturbed(self, embeddings: Tensor) -> Tensor:
        return embeddings + self.text.noise * torch.randn_like(embeddings) if self.text.noise else embeddings

    # the cache

    def _captioned(self, store: Samples) -> Captioned:
        if not isinstance(store, SampleStore) or store.captions is None:
            raise ConfigError(
                "text-to-image training needs captions: data.captions names their file in an image folder, "
                "data.caption-column their column in an hf dataset (a sample service serves none)"
            )
        if store.fingerprint not in self._known:
            self._known[store.fingerprint] = self._open(store, store.captions)
        return self._known[store.fingerprint]

    def _open(self, store: SampleStore, captions: tuple[tuple[str, ...], ...]) -> Captioned:
        place = {text: row for row, text in enumerate(dict.fromkeys(text for own in captions for text in own))}
        rows = [np.array([place[text] for text in own], np.int64) for own in captions]
        texts = list(place)
        if self.cache is None:
            return Captioned(store, texts, rows, {}, None)
        folder, encoders = self.encoders.folder, self.encoders
        embeddings = encoding_file(
            self.cache,
            ["embeddings", texts, fingerprint(folder, "tokenizer", "text_encoder")],
            len(texts),
            (encoders.length, encoders.width),
        )
        return Captioned(store, texts, rows, {}, embeddings)
