"""The autoencoder's decode in bounded memory: each layer over horizontal strips, the numbers of the whole.

Tiles decoded apart would differ from the image decoded at once, for group norms and the middle attention see
the whole map. So the map stays whole and only the work on it is cut: a 3×3 convolution reads a strip and one
row on either side, normed on the way, and writes into the finished map; a residual block ends in the memory
it began in. Two maps are alive, where the plain decode holds six. The middle block, small as the latents, is
run as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from fastldm import ops
from fastldm.errors import InvalidArgument
from fastldm.models.layers import Conv2d, GroupNorm, ResBlock, Upsample
from fastldm.models.pixels import Autoencoder, PixelAutoencoder
from fastldm.models.vae import AutoencoderConfig, AutoencoderKL
from fastldm.models.vq import VQModel

UNTILED_BUDGET = 1 << 30  # bytes of activations up to which an image is decoded in one piece
ROWS = 64  # of a strip: what it holds is small beside the maps, and its convolutions are large enough


def decode(vae: Autoencoder, latents: Tensor, run: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """`vae.decode` without gradients, image by image, in strips where the whole would pass UNTILED_BUDGET.

    latents [N, C, h, w] → images [N, 3, f·h, f·w]. An image is the same to the bit whatever stands beside it.
    `run`, if given, is `vae.decode` of one image in another form.
    """
    if isinstance(vae, PixelAutoencoder):
        return vae.decode(latents)
    height, width = (side * vae.config.factor for side in latents.shape[2:])
    whole = peak_bytes(vae.config, height, width, latents.element_size(), None) <= UNTILED_BUDGET
    with torch.no_grad():
        whole_image = run or vae.decode
        images = [whole_image(one) if whole else decode_in_strips(vae, one, ROWS) for one in latents.split(1)]
    return torch.cat(images)


@torch.no_grad()
def decode_in_strips(vae: AutoencoderKL | VQModel, latents: Tensor, rows: int) -> Tensor:
    """`vae.decode` up to rounding and without gradients, each layer `rows` rows of its output at a time."""
    if rows < 1:
        raise InvalidArgument("rows", rows, "at least 1")
    decoder = vae.decoder
    latents = vae.before_decoder(latents.contiguous(memory_format=torch.channels_last))
    x = decoder.mid_block(decoder.conv_in(latents))
    for block in decoder.up_blocks:
        for layer in block.layers():  # type: ignore[operator]
            if isinstance(layer, ResBlock):
                x = _residual(layer, x, rows)
            elif isinstance(layer, Upsample):
                x = _upsample(layer.conv, x, rows)
            else:
                x = layer(x)
    return _convolve(decoder.conv_out, decoder.conv_norm_out, x, rows)


def peak_bytes(config: AutoencoderConfig, height: int, width: int, itemsize: int, rows: int | None) -> int:
    """Bytes of activations at the peak of decoding one image of height × width, in strips or (None) whole.

    The maps alive together in the reference implementation, without what its convolutions need inside.
    """
    widths = config.block_out_channels[::-1]
    last = len(widths) - 1
    # The input, which the caller holds, x, its norm, k, v, their mix, its projection, the sum; or a ResBlock.
    middle = (8 if config.mid_block_add_attention else 6) * widths[0]
    peaks = [middle * (height >> last) * (width >> last) * itemsize]
    for level, channels in enumerate(widths):
        before = widths[max(level - 1, 0)]
        wider = max(before, channels)
        tall, wide = height >> last - level, width >> last - level
        if last - level in config.attention_levels:
            peaks.append(8 * channels * tall * wide * itemsize)  # as in the middle
        if rows is None:
            # The block's input, with x or its shortcut, h, its norm, the convolution and the sum; or with x
            # normed and activated. Enlarged: the block's input, x, four times x and its convolution.
            block = max(before + 5 * channels, 3 * before + channels) * tall * wide * itemsize
            enlarged = (before + 9 * channels) * tall * wide * itemsize
        else:
            # x and h; a shortcut only if wider than x, else it lies in x's memory, which is kept. Of a strip:
            # two in float32; or padded, convolved and summed. Enlarged: x, its convolution; both of a strip.
            block = (before + (channels if channels <= before else 2 * channels)) * tall * wide * itemsize
            block += max(8 * wider, (wider + 2 * channels) * itemsize) * min(rows + 2, tall) * wide
            enlarged = (wider + 4 * channels) * tall * wide * itemsize
            enlarged += 2 * channels * min(rows + 4, 2 * tall) * 2 * wide * itemsize
        peaks += [block, enlarged] if level < last else [block]
    return max(peaks)


def _strips(height: int, rows: int) -> Iterator[tuple[int, int]]:
    for top in range(0, height, rows):
        yield top, min(top + rows, height)


def _map_like(x: Tensor, channels: int, scale: int = 1) -> Tensor:
    """An unwritten channels-last map of x's batch, type and, times `scale`, size."""
    size = (x.shape[0], channels, scale * x.shape[2], scale * x.shape[3])
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _moments(x: Tensor, rows: int) -> Tensor:
    """`ops.channel_moments` of x, merged from those of its strips: a variance is the mean of the strips' own
    and of the squared distances of their means. (Chan, Golub & LeVeque 1979, STAN-CS-79-773)
    """
    cuts = list(_strips(x.shape[2], rows))
    parts = torch.stack([ops.channel_moments(x[:, :, top:bottom]) for top, bottom in cuts])
    shares = parts.new_tensor([(bottom - top) / x.shape[2] for top, bottom in cuts])[:, None, None]
    means, variances = parts.unbind(2)  # [strips, N, C]
    mean = (means * shares).sum(0)
    variance = ((variances + (means - mean).square()) * shares).sum(0)
    return torch.stack((mean, variance), 1)


def _convolve(conv: Conv2d, norm: GroupNorm, x: Tensor, rows: int, onto: Tensor | None = None) -> Tensor:
    """conv(silu(norm(x))) for a 3×3 convolution: a new map, or added to `onto` in place."""
    moments = _moments(x, rows)
    out = _map_like(x, conv.out_channels) if onto is None else onto
    height = x.shape[2]
    for top, bottom in _strips(height, rows):
        strip = norm(x[:, :, max(top - 1, 0) : bottom + 1], moments=moments)
        strip = F.pad(strip, (1, 1, int(top == 0), int(bottom == height)))  # zeros round the map alone
        done = out[:, :, top:bottom]
        done.copy_(ops.conv2d(strip, conv.weight, conv.bias, residual=None if onto is None else done))
    return out


def _residual(block: ResBlock, x: Tensor, rows: int) -> Tensor:
    """The residual block of x, in x's memory: its second convolution reads h alone, so x can take the sum."""
    hidden = _convolve(block.conv1, block.norm1, x, rows)
    if block.conv_shortcut is not None:
        x = _shortcut(block.conv_shortcut, x, rows)
    return _convolve(block.conv2, block.norm2, hidden, rows, onto=x)


def _shortcut(conv: Conv2d, x: Tensor, rows: int) -> Tensor:
    """The 1×1 convolution of x, in x's own first channels if they suffice: a strip is read, then written."""
    out = x[:, : conv.out_channels] if conv.out_channels <= x.shape[1] else _map_like(x, conv.out_channels)
    for top, bottom in _strips(x.shape[2], rows):
        out[:, :, top:bottom] = conv(x[:, :, top:bottom].contiguous(memory_format=torch.channels_last))
    return out


def _upsample(conv: Conv2d, x: Tensor, rows: int) -> Tensor:
    """`ops.upsample_conv` of x: a strip has one more row of x on either side, whose own output is dropped."""
    assert conv.bias is not None
    out = _map_like(x, conv.out_channels, scale=2)
    for top, bottom in _strips(x.shape[2], max(rows // 2, 1)):
        first = max(top - 1, 0)
        strip = x[:, :, first : bottom + 1].contiguous(memory_format=torch.channels_last)
        rim = 2 * (top - first)
        done = out[:, :, 2 * top : 2 * bottom]
        done.copy_(ops.upsample_conv(strip, conv.weight, conv.bias)[:, :, rim : rim + done.shape[2]])
    return out
