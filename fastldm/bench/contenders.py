"""Those who race, each in a process of its own: fastldm and diffusers at the same work, by the same inputs.

A contender's `call(case, sample)` makes a function that does the work once; another sample is another input.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastldm.bench.cases import Case, Model, read

OURS, REFERENCE = "fastldm", "fastldm, reference ops"
EAGER, CHANNELS_LAST = "diffusers, eager", "diffusers, channels last"
COMPILED = "diffusers, torch.compile"
AUTOTUNED, UNFUSED = "diffusers, max-autotune", "diffusers, max-autotune without fused epilogues"
# As the user names them.
CONTENDERS = {
    "fastldm": OURS,
    "reference": REFERENCE,
    "eager": EAGER,
    "channels-last": CHANNELS_LAST,
    "compile": COMPILED,
    "max-autotune": AUTOTUNED,
    "max-autotune-unfused": UNFUSED,
}
STEPS, STEP = 25, 12  # of the step part: the timesteps that are prepared, and the one that is run
GUIDANCE = 7.5
COLOURS = ("red", "blue", "yellow", "green", "purple")

Call = Callable[[], Tensor]


def missing(contender: str) -> str | None:
    """Why this contender cannot be had here, or None."""
    if contender in (OURS, REFERENCE):
        return None
    absent = [name for name in ("diffusers", "transformers") if importlib.util.find_spec(name) is None]
    return f"{' and '.join(absent)} not installed" if absent else None


class Contender:
    """One network or pipeline, loaded. `parts`: seconds by stage of the last call, where it tells them."""

    def __init__(self, name: str, model: Model, device: torch.device, dtype: torch.dtype) -> None:
        self.name, self.model, self.device, self.dtype = name, model, device, dtype
        self.folder = Path(model.folder)
        self.parts: dict[str, float] = {}
        # All in true float32; on a GPU the eager baseline keeps cuDNN's first choice of algorithm.
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.benchmark = name not in (EAGER, OURS, REFERENCE)
        self.load()

    @property
    def is_ours(self) -> bool:
        """Whether fastldm does the work."""
        return self.name in (OURS, REFERENCE)

    def load(self) -> None:
        """Load what the work needs."""
        raise NotImplementedError

    def call(self, case: Case, sample: int) -> Call:
        """Does the work of this case once; the timed form."""
        raise NotImplementedError

    def exact(self, case: Case, sample: int) -> Tensor:
        """The numbers that such a call makes, as exact as it can tell them."""
        return self.call(case, sample)()

    def settled(self, network: Any) -> Any:
        """The network on the device, laid out as this contender has it."""
        layout = torch.contiguous_format if self.name == EAGER else torch.channels_last
        return network.to(self.device, self.dtype).to(memory_format=layout).eval().requires_grad_(False)

    def compiled(self, network: Any, method: str) -> None:
        """Compile a method of a network in place, where this contender compiles: as strongly as is known."""
        if self.name not in (COMPILED, AUTOTUNED, UNFUSED):
            return
        options: dict[str, Any] = {"dynamic": False}
        if self.name == COMPILED and self.device.type == "cpu":
            options["options"] = {"freezing": True}
        elif self.name == COMPILED:
            options |= {"mode": "reduce-overhead", "fullgraph": True}
        else:
            from torch._inductor import config

            config.conv_1x1_as_mm = config.coordinate_descent_tuning = True
            config.coordinate_descent_check_all_directions = True
            config.epilogue_fusion = self.name == AUTOTUNED
            network.fuse_qkv_projections()
            options |= {"mode": "max-autotune", "fullgraph": True}
        setattr(network, method, torch.compile(getattr(network, method), **options))


class Network(Contender):
    """The UNet or the autoencoder alone. `rounded` is the dtype of the race: the truth sees inputs of its
    precision too.
    """

    part: str

    def __init__(self, *arguments: Any, rounded: str) -> None:
        self.rounded = getattr(torch, rounded)
        super().__init__(*arguments)

    def drawn(self, seed: int, *shape: int) -> Tensor:
        """Unit noise, the same numbers for all contenders."""
        chance = torch.Generator().manual_seed(seed)
        return torch.randn(shape, generator=chance).to(self.rounded).to(self.device, self.dtype)

    def theirs(self, kind: Any) -> Any:
        """The network of diffusers."""
        return self.settled(kind.from_pretrained(self.folder / self.part, torch_dtype=self.dtype))

    def ours(self, kind: Any, config: Any) -> Any:
        """Our network with the folder's weights."""
        from safetensors.torch import load_file

        from fastldm.checkpoint.save import WEIGHTS
        from fastldm.models.layers import channels_last

        weights = load_file(find(self.folder / self.part, WEIGHTS[self.part]))
        with torch.device("meta"):
            network = kind(config.from_dict(read(self.folder / self.part)))
        state = {key: weights[key].to(self.device, self.dtype) for key in network.state_dict()}
        network.load_state_dict(state, assign=True)
        return channels_last(network.eval().requires_grad_(False))

    def bound(self, run: Call, as_graph: bool = True) -> Call:
        """The call with this contender's backends, captured where fastldm runs on a GPU and can be."""
        from fastldm import ops

        if self.name == REFERENCE:

            def by_reference() -> Tensor:
                with ops.use_backends("reference"):
                    return run()

            return by_reference
        return captured(run) if as_graph and self.name == OURS and self.device.type == "cuda" else run


class Step(Network):
    """One guided step of the UNet; what does not depend on the latents is prepared as its owner would."""

    part = "unet"

    def load(self) -> None:
        if self.is_ours:
            from fastldm.models.unet import UNet, UNetConfig

            self.network = self.ours(UNet, UNetConfig)
            return
        import diffusers

        self.network = self.theirs(diffusers.UNet2DConditionModel)
        self.compiled(self.network, "forward")

    def call(self, case: Case, sample: int) -> Call:
        model, side = self.model, case.side // self.model.factor
        latents = self.drawn(2 * sample, case.batch, model.in_channels, side, side)
        context = self.drawn(2 * sample + 1, 2 * case.batch, model.tokens, model.context_width)
        timesteps = torch.linspace(999, 0, STEPS, device=self.device)
        if self.is_ours:  # both halves of guidance begin with the same latents, given once
            return self.bound(unet_step(self.network, latents, context, timesteps, STEP))
        both = torch.cat((latents, latents))
        if self.name != EAGER:
            both = both.contiguous(memory_format=torch.channels_last)
        return lambda: self.network(both, timesteps[STEP], context, return_dict=False)[0]


def unet_step(unet: Any, latents: Tensor, context: Tensor, timesteps: Tensor, step: int) -> Call:
    """Our guided step: latents have a row for each picture, the context one for each half of it."""
    condition = unet.condition(context, timesteps)
    steps = torch.full((len(latents),), step, device=latents.device)
    return lambda: unet(latents, condition, steps)


class Decode(Network):
    """The autoencoder's decode."""

    part = "vae"

    def load(self) -> None:
        if self.is_ours:
            from fastldm.models.vae import AutoencoderKL, VAEConfig

            self.network = self.ours(AutoencoderKL, VAEConfig)
            return
        import diffusers

        self.network = self.theirs(diffusers.AutoencoderKL)
        self.compiled(self.network, "decode")

    def call(self, case: Case, sample: int) -> Call:
        side = case.side // self.model.factor
        latents = self.drawn(sample, case.batch, self.model.latent_channels, side, side)
        if self.is_ours:
            from fastldm.models.vae_strips import UNTILED_BUDGET, decode, peak_bytes

            size = peak_bytes(self.network.config, case.side, case.side, latents.element_size(), None)
            return self.bound(lambda: decode(self.network, latents), as_graph=size <= UNTILED_BUDGET)
        return lambda: self.network.decode(latents, return_dict=False)[0]


class Picture(Contender):
    """A whole picture, from the prompt to a PIL image; each sample is another prompt and seed."""

    def __init__(self, *arguments: Any, steps: int) -> None:
        self.steps = steps
        super().__init__(*arguments)

    def load(self) -> None:
        if self.is_ours:
            import fastldm

            backends = "reference" if self.name == REFERENCE else None
            self.pipe: Any = fastldm.load(
                self.folder, device=self.device, dtype=self.dtype, backends=backends
            )
            return
        import diffusers

        pipe = diffusers.StableDiffusionPipeline.from_pretrained(
            self.folder, torch_dtype=self.dtype, safety_checker=None
        )
        pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
        pipe.set_progress_bar_config(disable=True)
        pipe.to(self.device)
        for network, method in ((pipe.unet, "forward"), (pipe.vae, "decode")):
            self.settled(network)
            self.compiled(network, method)
        if shift := pipe.vae.config.shift_factor:  # which this pipeline, unlike later ones, leaves out
            decode = pipe.vae.decode
            pipe.vae.decode = lambda latents, *rest, **named: decode(latents + shift, *rest, **named)
        self.pipe = pipe
        self._timed(pipe, "encode_prompt", "text")
        self._timed(pipe.vae, "decode", "decode")
        self._timed(pipe.image_processor, "postprocess", "decode")

    def _timed(self, owner: Any, method: str, stage: str) -> None:
        """Book what a method takes on a stage; on a GPU with what was launched."""
        run = getattr(owner, method)

        def timed(*arguments: Any, **named: Any) -> Any:
            self.wait()
            began = time.perf_counter()
            made = run(*arguments, **named)
            self.wait()
            self.parts[stage] = self.parts.get(stage, 0.0) + time.perf_counter() - began
            return made

        setattr(owner, method, timed)

    def wait(self) -> None:
        """Until the device has done all."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def call(self, case: Case, sample: int) -> Callable[[], Any]:
        return partial(self.picture, case, sample, "pil")

    def exact(self, case: Case, sample: int) -> Tensor:
        return torch.from_numpy(self.picture(case, sample, "np"))

    def picture(self, case: Case, sample: int, kind: str) -> Any:
        """The pictures of a case as `kind`, "pil" or "np"."""
        prompt, seed = f"a large {COLOURS[sample % len(COLOURS)]} fish on a white background", 100 * sample
        if self.is_ours:
            result = self.pipe.generate(
                prompt,
                steps=self.steps,
                guidance_scale=GUIDANCE,
                seed=seed,
                num_images=case.batch,
                width=case.side,
                height=case.side,
                sampler="ddim",
                output_type=kind,
            )
            spent = result.timings
            before = {"text": spent["text"] + spent["condition"]}
            self.parts = before | {"loop": spent["denoise"], "decode": spent["decode"]}
            return result.images
        self.parts = {}
        began = time.perf_counter()
        images = self.pipe(
            prompt,
            num_inference_steps=self.steps,
            guidance_scale=GUIDANCE,
            generator=[torch.Generator().manual_seed(seed + image) for image in range(case.batch)],
            num_images_per_prompt=case.batch,
            width=case.side,
            height=case.side,
            output_type=kind,
        ).images
        text, decode = self.parts["text"], self.parts["decode"]
        loop = time.perf_counter() - began - text - decode
        self.parts = {"text": text, "loop": loop, "decode": decode}
        return images


def captured(run: Call) -> Call:
    """The call as one CUDA graph. Its result must be that of the plain call to the bit."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            plain = run()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run()

    def replay() -> Tensor:
        graph.replay()
        return output

    if not torch.equal(replay(), plain):
        raise RuntimeError("a replay of the graph differs from the plain call")
    return replay


def find(folder: Path, usual: str) -> Path:
    """The weights of a network: the usual file, or the one that there is."""
    files = [folder / usual] if (folder / usual).exists() else sorted(folder.glob("*.safetensors"))
    if len(files) != 1:
        raise FileNotFoundError(f"{folder} holds {len(files)} files of weights; the benchmark reads one")
    return files[0]


PARTS: dict[str, Any] = {"step": Step, "vae": Decode, "image": Picture}
