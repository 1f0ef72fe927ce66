"""How much memory a request will need, found by running it on the meta device: all the shapes, no numbers.

Each network is run once as the request will run it, and what is alive is counted. Ops count what their
kernels allocate, which is less than their references: no enlarged map, no separate bias and activation.
"""

from __future__ import annotations

import copy
import inspect
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastldm import ops
from fastldm.arguments import Request
from fastldm.checkpoint import Components
from fastldm.errors import OutOfMemory
from fastldm.models.pixels import PixelConfig
from fastldm.models.unet import UNetCondition
from fastldm.models.vae_strips import decode, peak_bytes
from fastldm.ops.registry import REFERENCE, order_outside, watch

Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True)
class Footprint:
    """Bytes of one request. The stages follow each other, so the largest counts."""

    weights: int  # of the networks, there already
    kept: int  # packed copies of weights that its kernels make at their first call, those not yet made
    text: int
    encode: int  # of the input image, 0 without one
    denoise: int
    decode: int  # 0 where latents are asked for

    @property
    def needed(self) -> int:
        """What has to be free."""
        return self.kept + max(self.text, self.encode, self.denoise, self.decode)

    def check(self, asked: str, free: int) -> None:
        """OutOfMemory, which says what was asked for, where more is needed than is free."""
        if self.needed > free:
            sizes = f"{self.needed / 2**30:.1f} GiB are needed, {free / 2**30:.1f} GiB are free"
            raise OutOfMemory(f"{asked}: {sizes}")


def surely_fits(
    request: Request, components: Components, dtype: torch.dtype, slots: int, weights: int, free: int
) -> bool:
    """Whether a request in so many slots fits beyond doubt, so that no estimate is needed. `weights`: their
    bytes.

    No stage takes more for an image than its decode in one piece, packed weights apart. Where the latents are
    pixels, steps do.
    """
    config = components.vae.config
    if isinstance(config, PixelConfig):
        return False
    whole = peak_bytes(config, request.height, request.width, dtype.itemsize, None)
    return 4 * whole * max(request.count, slots) + 2 * weights <= free


def of(
    request: Request,
    components: Components,
    dtype: torch.dtype,
    together: int,
    guided: bool,
    text_visits: bool = False,
) -> Footprint:
    """The footprint of a request in so many slots, guided ones or not."""
    embeds = request.prompt_embeds
    return estimate(
        components,
        dtype,
        width=request.width,
        height=request.height,
        images=request.count,
        together=together,
        guided=guided,
        steps=request.steps,
        tokens=components.context_length if embeds is None else embeds.shape[1],
        from_image=request.image is not None,
        to_pixels=request.output_type != "latent",
        text_visits=text_visits,
    )


def estimate(
    components: Components,
    dtype: torch.dtype,
    *,
    width: int,
    height: int,
    images: int = 1,
    together: int = 1,
    guided: bool = True,
    steps: int = 25,
    tokens: int = 77,
    from_image: bool = False,
    to_pixels: bool = True,
    text_visits: bool = False,
) -> Footprint:
    """The footprint of a request for so many images of width × height pixels, by the backends in force.

    `together`: how many are denoised at a time. `tokens`: of each context. `text_visits`: the text encoder's
    weights are there for its call only. A first estimate takes 0.1 s for
    a small model and half a second for SD1.5; nothing is allocated.
    """
    weights = {name: sum(w.nbytes for w in each.parameters()) for name, each in components.networks.items()}
    of_text = weights.pop("text_encoder", 0)
    with torch.inference_mode(False), torch.no_grad():
        counter = Counter()
        unet, vae = counter.on_meta(components.unet), counter.on_meta(components.vae)
        text_encoder = components.text_encoder and counter.on_meta(components.text_encoder)
        factor = vae.config.factor
        latent = vae.config.latent_channels, height // factor, width // factor
        rows = together * (1 + guided)

        def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        def denoise() -> None:
            slots = [empty(together, *latent, dtype=torch.float32) for _ in ("latents", "x0", "noise")]
            text = empty(1, tokens, unet.config.cross_attention_dim or 0)
            context = [unet.keys_values(text) for _ in range(rows)]
            time_bias = unet.time_bias(empty(steps, dtype=torch.float32), dtype)
            condition = UNetCondition(torch.cat(context), time_bias[None])
            model_input = empty(together, *latent).to(memory_format=torch.channels_last)
            unet(model_input, condition, empty(together, dtype=torch.long))
            del slots

        def read_text() -> None:
            if text_encoder is not None:
                text_encoder(empty(1, text_encoder.config.max_position_embeddings, dtype=torch.long))

        def make_pixels() -> None:
            pixels = decode(vae, empty(images, *latent)).float()
            pixels.mul(0.5).add(0.5).clamp_(0, 1)

        return Footprint(
            weights=sum(weights.values()) + (0 if text_visits else of_text),
            text=counter.peak(read_text) + text_visits * of_text,
            encode=counter.peak(lambda: vae.encode(empty(1, 3, height, width))) if from_image else 0,
            denoise=counter.peak(denoise),
            decode=counter.peak(make_pixels) if to_pixels else 0,
            kept=counter.kept,
        )


class Counter(TorchDispatchMode):
    """Counts the bytes of meta tensors alive together, and of the packed weights that kernels will keep."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = self._alive = self._peak = 0
        self._seen: set[int] = set()  # storages
        self._weights: dict[int, Tensor] = {}  # the real weight, by the storage of its double
        self._kernels = order_outside()[0] != REFERENCE
        self._packs = "cpp" in order_outside()
        self._packed = packed_weights() if self._packs else set()

    def on_meta(self, network: Network) -> Network:
        """The network with weights that have no numbers, and count for nothing."""
        doubles: dict[int, Any] = {}
        for weight in network.parameters():
            double = nn.Parameter(torch.empty_like(weight, device="meta"), False)
            doubles[id(weight)] = double
            self._weights[_storage(double)] = weight
            self._seen.add(_storage(double))
        return copy.deepcopy(network, doubles)

    def peak(self, run: Callable[[], Any]) -> int:
        """The most bytes alive together while it runs."""
        before = self._peak = self._alive
        with self, watch(self._call):
            run()
        return self._peak - before

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and (key := _storage(tensor)) not in self._seen:
                self._seen.add(key)
                self._alive += tensor.untyped_storage().nbytes()
                self._peak = max(self._peak, self._alive)
                gone = weakref.finalize(
                    tensor.untyped_storage(), self._gone, key, tensor.untyped_storage().nbytes()
                )
                gone.atexit = False
        return made

    def _gone(self, key: int, nbytes: int) -> None:
        self._seen.discard(key)
        self._alive -= nbytes

    def _call(self, op: ops.Op[..., Any], *args: Any, **kwargs: Any) -> Any:
        """An op call as its kernels allocate: a result, and what has to be there until it is done."""
        given = inspect.signature(op.reference).bind(*args, **kwargs).arguments
        if op is ops.attention:
            return torch.empty_like(given["q"])  # the reference, too, keeps no scores
        if op in (ops.conv2d, ops.geglu, ops.linear, ops.upsample_conv):
            self._keep(op, given)
        if self._kernels and op in (ops.group_norm_silu, ops.layer_norm):
            return torch.empty_like(given["x"])
        if self._kernels and op is ops.geglu:
            x, weight = given["x"], given["weight"]
            result = x.new_empty(*x.shape[:-1], weight.shape[0] // 2)
            rows = x.flatten(0, -2)
            both = ops.linear.reference(rows[: strip(x, weight)] if self._packs else rows, weight)
            del both
            return result
        return op.reference(*args, **kwargs)

    def _keep(self, op: ops.Op[..., Any], given: Mapping[str, Any]) -> None:
        weight = self._weights.get(_storage(given["weight"]))
        if not self._packs or weight is None or weight.data_ptr() in self._packed or not weight.is_cpu:
            return
        if op is not ops.upsample_conv and not packs(given["x"], given["weight"], given.get("stride", 1)):
            return
        self._packed.add(weight.data_ptr())
        windows = 16 / 9 if op is ops.upsample_conv else 1  # four of 2 × 2 for one of 3 × 3
        self.kept += int(weight.nbytes * windows)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def packed_weights() -> set[int]:
    """The addresses of weights of which a C++ kernel keeps a packed copy."""
    from fastldm.ops.cpp import packed

    return packed.addresses()


def packs(x: Tensor, weight: Tensor, stride: int) -> bool:
    """Whether the C++ backend packs this weight: of a product that gains, or of a 3×3 convolution with few
    pixels in the result.
    """
    from fastldm.ops.cpp import onednn, panels
    from fastldm.ops.cpp.conv2d import MOST_PIXELS
    from fastldm.ops.cpp.linear import unfit

    is_map = weight.dim() == 4
    if is_map:
        pixels = x.shape[0] * (x.shape[2] // stride) * (x.shape[3] // stride)
    else:
        pixels = x.numel() // x.shape[-1]
    if panels.fits(weight, pixels):
        return True
    fits = is_map and weight.shape[2] > 1 or unfit(weight, pixels) is None
    return fits and (pixels <= MOST_PIXELS or not is_map) and onednn.missing(weight.dtype) is None


def strip(x: Tensor, weight: Tensor) -> int:
    """Rows of a geglu's product that the C++ backend holds at a time."""
    from fastldm.ops.cpp.geglu import strip_of

    return strip_of(x, weight)
