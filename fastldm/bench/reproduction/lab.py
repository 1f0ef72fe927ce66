"""Where models are trained, kept and asked: every piece of work goes on from where it was stopped."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastldm.bench.reproduction import nets
from fastldm.bench.reproduction.nets import OBJECTIVES, Denoiser, Model
from fastldm.bench.reproduction.settings import FirstStage, Settings
from fastldm.bench.reproduction.world import NULL, World, enlarged, pictures
from fastldm.checkpoint.atomic import save_tensors
from fastldm.diffusion import Chain, Criterion, bits_per_dimension, build_table, sample, unit_noise
from fastldm.models.vae import AutoencoderKL
from fastldm.models.vq import VQModel
from fastldm.scenes import KINDS
from fastldm.scenes.judge import Judge
from fastldm.training.autoencoder import encode_all, reconstruction_loss
from fastldm.training.data import to_model
from fastldm.training.fit import FitSettings, fit, numbered_generator
from fastldm.training.reconstruction import given_back, psnr, to_pixels

KL_WEIGHT = 1e-6
SAVES = 20  # of a training run
NAMED_FROM = 0.6  # chance from which a kind counts as read; kept rows are of it
_RENDERS = 100


class OutOfTime(Exception):
    """The minutes are up; what was reached is kept."""


@dataclass(frozen=True)
class Sampling:
    """How a model is sampled. `learned`: with the variance that it learnt, where it did."""

    steps: int = 20
    sampler: str = "ddim"
    eta: float = 0.0
    guidance: float = 1.0
    learned: bool = True

    @property
    def name(self) -> str:
        said = f"{self.sampler} S{self.steps} eta{self.eta:g} g{self.guidance:g}"
        return said if self.learned else f"{said} fixed-variance"


@dataclass(frozen=True)
class Samples:
    """Of each picture: the judge's features [N, D] and whether its kind was read; and the seconds it took to
    sample and decode all.
    """

    features: Tensor
    right: Tensor
    seconds: float


class Lab:
    """One reproduction at work, in its folder: weights, and for each judge the samples it is at.

    judge_name: what tells judges apart. deadline: of time.monotonic, at which work raises OutOfTime.
    """

    def __init__(
        self,
        settings: Settings,
        folder: Path,
        judge: Judge,
        judge_name: str,
        say: Callable[[str], None],
        deadline: float = float("inf"),
    ) -> None:
        self.settings, self.judge, self.say, self.deadline = settings, judge, say, deadline
        self.folder = folder / settings.digest()
        self.judged = self.folder / judge_name
        self._latents: tuple[tuple[int, int], tuple[Tensor, Tensor, float]] | None = None
        self._reconstructed: tuple[tuple[FirstStage, int], tuple[Tensor, float]] | None = None

    def check_time(self) -> None:
        if time.monotonic() >= self.deadline:
            raise OutOfTime

    @cached_property
    def world(self) -> World:
        self.say("the world is rendered")
        return World.draw(self.settings)

    @cached_property
    def reference(self) -> Tensor:
        """The features of renders that samples are held against."""
        return self.judge.features(enlarged(self.world.reference.images))

    def reconstructions(self, stage: FirstStage, seed: int) -> tuple[Tensor, float]:
        """The features of these renders as an autoencoder gives them back, the best that a model of its
        latents can do, and their PSNR in dB; of pixels, the renders' own.
        """
        if stage.factor == 1:
            return self.reference, math.inf
        if self._reconstructed is None or self._reconstructed[0] != (stage, seed):
            images = self.world.reference.images
            back = given_back(self.autoencoder(stage, seed), images, batch=50)
            made = self.judge.features(enlarged(back)), float(psnr(images, back).mean())
            self._reconstructed = (stage, seed), made
        return self._reconstructed[1]

    def renders(self, seed: int) -> tuple[Tensor, Tensor]:
        """Features of as many renders more, another set for each seed, and whether their kind is read: what a
        perfect model would draw.
        """
        more = pictures(self.settings.samples, self.settings.side, _RENDERS + seed)
        return self._judged(more.images, more.labels)

    def autoencoder(self, stage: FirstStage, seed: int) -> AutoencoderKL | VQModel:
        """Trained from a seed, or as it was kept."""
        settings = self.settings
        vae = nets.new_autoencoder(settings, stage, seed)
        flops = nets.autoencoder_flops(settings, stage)
        batch = settings.autoencoder_batch
        images = self.world.training.images

        def loss(generator: torch.Generator) -> Tensor:
            rows = torch.randint(len(images), (batch,), generator=generator)
            given = to_model(images[rows])
            if isinstance(vae, VQModel):
                decoded, quantised = vae(given)
                return reconstruction_loss(given, decoded) + quantised.loss
            posterior = vae.encode(given)
            noise = torch.randn(posterior.mean.shape, generator=generator)
            decoded = vae.decode(posterior.sample(noise))
            return reconstruction_loss(given, decoded) + KL_WEIGHT * posterior.kl().mean()

        steps = nets.steps_of(settings.autoencoder_flops, flops, batch)
        self._fit(f"{stage.name}-seed{seed}", vae, loss, steps, batch, seed)
        return vae

    def latents(self, factor: int, seed: int) -> tuple[Tensor, Tensor, float]:
        """Means and deviations of the training pictures' latents, scaled to variance 1, and that scale."""
        if factor == 1:
            clean = to_model(self.world.training.images)
            return clean, torch.zeros(1).expand_as(clean), 1.0
        if self._latents is None or self._latents[0] != (factor, seed):
            vae = self.autoencoder(FirstStage(factor), seed)
            assert isinstance(vae, AutoencoderKL)
            means, deviations = encode_all(vae, self.world.training.images)
            scale = 1 / float(means.std())
            self._latents = (factor, seed), (means * scale, deviations * scale, scale)
        return self._latents[1]

    def denoiser(self, model: Model, seed: int) -> Denoiser:
        """Trained from a seed, or as it was kept."""
        settings = self.settings
        net = nets.new_denoiser(settings, model, seed)
        batch = settings.shape(model.factor).batch
        steps = nets.steps_of(settings.diffusion_flops, nets.diffusion_flops(settings, model), batch)
        means, deviations, _ = self.latents(model.factor, seed)
        labels = self.world.training.labels
        criterion = Criterion(OBJECTIVES[model.objective][0], model.scheduler(settings))

        def loss(generator: torch.Generator) -> Tensor:
            rows = torch.randint(len(means), (batch,), generator=generator)
            dropped = torch.rand(batch, generator=generator) < settings.label_dropout
            shown = labels[rows].masked_fill(dropped, NULL)
            clean = means[rows] + deviations[rows] * torch.randn(means[rows].shape, generator=generator)
            return criterion(net, clean, shown, generator=generator).mean()

        self._fit(f"{model.name}-seed{seed}", net, loss, steps, batch, seed)
        return net

    def _fit(
        self,
        name: str,
        module: torch.nn.Module,
        loss: Callable[[torch.Generator], Tensor],
        steps: int,
        batch: int,
        seed: int,
    ) -> None:
        """As `fit`; out of time it stops where the state has just been saved."""
        every = max(1, steps // SAVES)

        def timed(step: int, generator: torch.Generator) -> Tensor:
            if step % every == 0:
                self.check_time()
            return loss(generator)

        settings = FitSettings(
            steps,
            batch,
            self.settings.learning_rate,
            warmup=min(100, steps),
            ema_decay=self.settings.ema_decay,
            save_every=every,
        )
        fit(name, module, timed, settings, self.folder, seed, self.say, bfloat16=True)

    def samples(self, model: Model, sampling: Sampling, seed: int) -> Samples:
        """Sample as many pictures as there are renders to compare with, classes in turn.

        The net runs in bfloat16, its steps in float32. Batch b draws from the generator of (seed, b), and is
        kept when it is done. The seconds are those of sampling and decoding, not of judging.
        """
        settings, file = self.settings, self.judged / f"{model.name}-seed{seed} {sampling.name}.pt"
        kept: dict[str, Any] = {"features": [], "right": [], "seconds": 0.0}
        if file.exists():
            kept = torch.load(file, weights_only=True)
        draw = self._drawer(model, sampling, seed)
        labels = torch.arange(settings.samples) % len(KINDS)
        for number, part in enumerate(labels.split(settings.sample_batch)):
            if number < len(kept["features"]):
                continue
            self.check_time()
            began = time.perf_counter()
            images = draw(part, numbered_generator(seed, number))
            kept["seconds"] += time.perf_counter() - began
            features, right = self._judged(images, part)
            kept["features"].append(features)
            kept["right"].append(right)
            file.parent.mkdir(parents=True, exist_ok=True)
            save_tensors(file, kept)
        file.unlink(missing_ok=True)
        return Samples(torch.cat(kept["features"]), torch.cat(kept["right"]), kept["seconds"])

    def _judged(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Features of pictures uint8 [N, side, side, 3], and whether the surest object that the judge reads
        is of the class asked for, float32 [N].
        """
        readings, features = self.judge.read_with_features(enlarged(images))
        kinds = [reading.objects[0].kind if reading.objects else None for reading in readings]
        hits = [kind == KINDS[label] for kind, label in zip(kinds, labels.tolist(), strict=True)]
        return features, torch.tensor(hits, dtype=torch.float32)

    def _drawer(
        self, model: Model, sampling: Sampling, seed: int
    ) -> Callable[[Tensor, torch.Generator], Tensor]:
        """Labels [n] and a generator → pictures uint8 [n, side, side, 3]."""
        settings, scale = self.settings, self.latents(model.factor, seed)[2]
        net = self.denoiser(model, seed).to(torch.bfloat16)
        vae = self.autoencoder(FirstStage(model.factor), seed) if model.factor > 1 else None
        config, channels = model.scheduler(settings), settings.shape(model.factor).channels
        uses = model.learned and sampling.learned and sampling.sampler == "ddpm"
        if model.learned and not uses:
            config = Model(model.factor).scheduler(settings)
        table = build_table(
            config,
            sampling.steps,
            sampler=sampling.sampler,
            eta=sampling.eta,
            guidance_scale=sampling.guidance,
        )
        side = settings.side // model.factor

        @torch.inference_mode()
        def draw(labels: Tensor, generator: torch.Generator) -> Tensor:
            asked = labels
            if sampling.guidance != 1:
                asked = torch.cat([torch.full_like(labels, NULL), labels])

            def predict(x: Tensor, t: Tensor) -> Tensor:
                out = net(x, t, asked).float()
                return out if uses else out[:, :channels]

            x = torch.randn((len(labels), channels, side, side), generator=generator)
            x = sample(table, predict, table.initial_scale * x, unit_noise(x, generator))
            return to_pixels(x if vae is None else vae.decode(x / scale))

        return draw

    def bound(self, model: Model, seed: int) -> dict[str, Any]:
        """Bits per dimension of renders that no training sees; and at some times, from the last to the first,
        the bits sent by then and the RMS error of x0 in grey levels: rate against distortion.

        (Ho et al. 2020, section 4.3)
        """
        settings = self.settings
        net = self.denoiser(model, seed)
        chain = Chain.of(model.scheduler(settings))
        held = self.world.reference
        images, labels = (t[: settings.bound_pictures] for t in (held.images, held.labels))
        terms, errors, totals = [], [], []
        for number, rows in enumerate(torch.arange(len(images)).split(settings.bound_batch)):
            self.check_time()
            x0, shown = to_model(images[rows]), labels[rows]
            noise = unit_noise(x0, numbered_generator(seed, number))
            found = bits_per_dimension(partial(_asked, net, shown), x0, chain, noise, clamp=1.0)
            terms.append(found.terms)
            errors.append(found.x0_mse)
            totals.append(found.total)
        # Progressive coding sends the last times first: what has been sent down to a time.
        sent = torch.cat(terms).mean(0).flip(0).cumsum(0)
        distortion = 127.5 * torch.cat(errors).mean(0).flip(0).sqrt()
        places = torch.linspace(0, len(sent) - 1, min(21, len(sent))).round().long()
        return {
            "bits": float(torch.cat(totals).mean()),
            "rate": [round(value, 5) for value in sent[places].tolist()],
            "distortion": [round(value, 3) for value in distortion[places].tolist()],
        }


def _asked(net: Denoiser, labels: Tensor, x: Tensor, t: Tensor) -> Tensor:
    return net(x, t, labels)
