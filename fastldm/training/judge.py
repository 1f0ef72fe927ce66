"""How the judge learns: on renders of every style, some soft and noisy as models draw them, some spoilt."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from fastldm.checkpoint.container import write_safetensors
from fastldm.checkpoint.tensors import payload
from fastldm.models.layers import channels_last
from fastldm.scenes import COLOURS, IMAGE_SIZE, KINDS, Rendered, render, sample_scene
from fastldm.scenes.judge import CLASSES, FACTS, NO_SKY, new_net
from fastldm.scenes.judge_net import BOX_UNIT, CELL, Conv, JudgeNet
from fastldm.scenes.palette import LANDSCAPES, STYLES
from fastldm.training.config import JudgeConfig
from fastldm.training.data import to_model
from fastldm.training.fit import fit
from fastldm.training.soften import soften
from fastldm.training.spoil import NONE, OURS, UNASKED, Pixels, Spoilt, bounds, chaos, spoil

GRID = IMAGE_SIZE // CELL
IGNORED = -1

BACKGROUND_WEIGHT = 0.1
"""Of a pixel of the map, for most of a picture is background."""

_HELD_OUT, _LANDSCAPE, _EMPTY, _CHAOS = 0.2, 0.4, 0.02, 0.02
"""Shares of pictures."""

Picture: TypeAlias = Rendered | Spoilt | Pixels


@dataclass(frozen=True)
class Targets:
    """A batch and what it shows; class indices are IGNORED where nothing is asked."""

    images: Tensor  # uint8 [N, 128, 128, 3]
    heat: Tensor  # [N, 16, 16], 1 at a centre and less around it
    box: Tensor  # [N, 4, 16, 16] in BOX_UNIT
    boxed: Tensor  # [N, 16, 16] weight of a cell's box
    kind: Tensor  # [N, 16, 16]
    colour: Tensor  # [N, 16, 16]
    segmentation: Tensor  # [N, 128, 128]
    facts: Tensor  # [N, 3]


def train_judge(config: JudgeConfig, report: Callable[[str], None] = print) -> Path:
    """Train from the seed, or resume, and write the weights, float16, with the norms folded in."""
    torch.manual_seed(config.seed)
    net = channels_last(new_net(norm=nn.BatchNorm2d))
    section = config.judge

    def loss(step: int, generator: torch.Generator) -> Tensor:
        batch = draw(section.fit.batch, generator, section.spoilt)
        images = soften(batch.images, generator)
        with torch.autocast("cpu", torch.bfloat16):
            return judge_loss(net, batch, images, generator)

    fit("judge", net, loss, section.fit, config.folder, config.seed, report)
    save_judge(net, config.output)
    report(f"wrote {config.output}")
    return config.output


def draw(count: int, generator: torch.Generator, spoilt: float = 0.25) -> Targets:
    """So many fresh pictures; `spoilt`: the share of which object 0 is to be spoilt."""
    rng = np.random.default_rng(int(torch.randint(2**62, (1,), generator=generator)))
    return collate([_picture(rng, spoilt) for _ in range(count)])


def _picture(rng: np.random.Generator, share: float) -> Picture:
    if rng.random() < _CHAOS:
        return chaos(rng)
    scene = sample_scene(
        rng,
        int(rng.integers(1, 5)),
        alike=rng.random() < 0.25,
        background=_pick(rng, LANDSCAPES) if rng.random() < _LANDSCAPE else None,
        style=_pick(rng, STYLES),
        held_out=rng.random() < _HELD_OUT,
    )
    if rng.random() < _EMPTY:
        return render(replace(scene, objects=()))
    whole = render(scene)
    spoilt = spoil(whole, rng) if rng.random() < share else None
    return whole if spoilt is None else spoilt


def _pick(rng: np.random.Generator, names: tuple[str, ...]) -> str:
    return names[int(rng.integers(len(names)))]


def collate(pictures: Sequence[Picture]) -> Targets:
    """The targets of pictures: whole, spoilt, or of no scene at all."""
    n = len(pictures)
    cells = n, GRID, GRID
    targets = Targets(
        images=torch.from_numpy(np.stack([p if isinstance(p, np.ndarray) else p.image for p in pictures])),
        heat=torch.zeros(cells),
        box=torch.zeros(n, 4, GRID, GRID),
        boxed=torch.zeros(cells),
        kind=torch.full(cells, IGNORED),
        colour=torch.full(cells, IGNORED),
        segmentation=torch.full((n, IMAGE_SIZE, IMAGE_SIZE), IGNORED),
        facts=torch.full((n, len(FACTS)), IGNORED),
    )
    for i, picture in enumerate(pictures):
        if isinstance(picture, np.ndarray):
            targets.kind[i] = len(KINDS)
        else:
            _fill(targets, i, picture)
    return targets


def _fill(targets: Targets, i: int, picture: Rendered | Spoilt) -> None:
    """Row i of the targets."""
    spoilt, whole = (picture, picture.rendered) if isinstance(picture, Spoilt) else (None, picture)
    scene = whole.scene
    values = scene.background, scene.sky or NO_SKY, scene.style
    targets.facts[i] = torch.tensor([names.index(v) for names, v in zip(FACTS.values(), values, strict=True)])
    targets.segmentation[i] = torch.from_numpy(whole.segmentation.astype(np.int64))
    for k, thing in enumerate(scene.objects):
        box, kind, colour = thing.box, KINDS.index(thing.kind), COLOURS.index(thing.colour)
        if k == 0 and spoilt is not None:
            left, top, right, bottom = map(round, box)
            targets.segmentation[i, top:bottom, left:right] = IGNORED
            box = bounds(spoilt.mask)
            kind = {OURS: kind, NONE: len(KINDS), UNASKED: IGNORED}[spoilt.kind]
            colour = {OURS: colour, NONE: len(COLOURS), UNASKED: IGNORED}[spoilt.colour]
        x0, y0, x1, y1 = box
        cx, cy = (x0 + x1) / 2 / CELL, (y0 + y1) / 2 / CELL
        column, row = (min(int(side), GRID - 1) for side in (cx, cy))
        rows, columns = (slice(max(at - 1, 0), at + 2) for at in (row, column))
        y, x = (torch.arange(GRID)[part] + 0.5 for part in (rows, columns))
        # A cell's distance is a weight of 0.4, a diagonal's 0.17.
        bell = torch.exp(-0.9 * ((y - cy)[:, None] ** 2 + (x - cx) ** 2))
        targets.heat[i, rows, columns] = torch.maximum(targets.heat[i, rows, columns], bell)
        targets.heat[i, row, column] = 1.0
        targets.boxed[i, rows, columns] = bell
        targets.kind[i, rows, columns] = kind
        targets.colour[i, rows, columns] = colour
        y, x = torch.meshgrid(y * CELL, x * CELL, indexing="ij")
        targets.box[i, :, rows, columns] = torch.stack([x - x0, y - y0, x1 - x, y1 - y]) / BOX_UNIT


def judge_loss(net: JudgeNet, targets: Targets, images: Tensor, generator: torch.Generator) -> Tensor:
    """A weighted sum of: the heat's focal loss, |box|, the cross entropies of kind, colour, map and facts.

    images: uint8, those of the targets, softened or not. The focal loss is CornerNet's (Law and Deng 2018,
    arXiv:1808.01244, equation 1).
    """
    fine, merged, deep = net.levels(to_model(images))
    cells = net.cells(merged)
    logits = cells.heat.float().squeeze(1)
    chance, positive = logits.sigmoid(), targets.heat == 1
    focal = torch.where(
        positive,
        -((1 - chance) ** 2) * F.logsigmoid(logits),
        -((1 - targets.heat) ** 4) * chance**2 * F.logsigmoid(-logits),
    ).sum() / positive.sum().clamp_min(1)
    box = (
        (cells.box.float() - targets.box).abs().mean(1) * targets.boxed
    ).sum() / targets.boxed.sum().clamp_min(1)
    kind = _cross_entropy(cells.kind, targets.kind)
    colour = _cross_entropy(cells.colour, targets.colour)
    # A pixel of the map at half resolution lies between four: which of them it answers for is drawn by lot.
    y, x = torch.randint(2, (2,), generator=generator).tolist()
    weight = torch.ones(1 + len(KINDS))
    weight[0] = BACKGROUND_WEIGHT
    segmentation = F.cross_entropy(
        net.map(fine, merged).float(),
        targets.segmentation[:, y::2, x::2],
        weight,
        ignore_index=IGNORED,
    )
    facts = sum(
        _cross_entropy(whole, targets.facts[:, i]) for i, whole in enumerate(net.whole(net.pooled(deep)))
    )
    return focal + box + kind + colour + 2 * segmentation + 0.3 * facts


def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Over what is asked; 0 where nothing is."""
    losses = F.cross_entropy(logits.float(), target, ignore_index=IGNORED, reduction="sum")
    return losses / (target != IGNORED).sum().clamp_min(1)


def folded(net: JudgeNet) -> JudgeNet:
    """The same function without norms, which the convolutions have taken up.

    The map's background alone differs: its logit gets what its weight in the loss had taken from it.
    """
    plain = new_net()
    plain.load_state_dict(net.state_dict(), strict=False)
    ours = [module for module in plain.modules() if isinstance(module, Conv)]
    theirs = [module for module in net.eval().modules() if isinstance(module, Conv)]
    for to, of in zip(ours, theirs, strict=True):
        assert isinstance(of.norm, nn.BatchNorm2d)
        to.conv = fuse_conv_bn_eval(of.conv, of.norm)
    last = plain.map_head[-1]
    assert isinstance(last, nn.Conv2d) and last.bias is not None
    with torch.no_grad():
        last.bias[:4] -= math.log(BACKGROUND_WEIGHT)  # class 0 of the four pixels that a cell is shuffled to
    return plain


def save_judge(net: JudgeNet, file: Path) -> None:
    """Write what `Judge.load` reads; parent folders are made as needed."""
    file.parent.mkdir(parents=True, exist_ok=True)
    weights = {key: payload(tensor.to(torch.float16)) for key, tensor in folded(net).state_dict().items()}
    write_safetensors(file, weights, {"format": "pt", **CLASSES})
