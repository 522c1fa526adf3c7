"""How fast and how small: every stage of the method, measured against the same method written plainly.

**Plain** is the recipe of the authors' implementation in float32: softmax attention step by step, which holds all
scores; the clip and its sentence encoded again in every tuning step; all parameters handed to the optimiser, although,
as there, only the tuned ones have gradients; the whole clip through the VAE at once. **Fast** is what `tune`,
`ddim_invert`, `ddim_sample` and the VAE's functions do. Between them lie the `OPTIMISATIONS`; each can be switched off.
"""

import ctypes
import gc
import json
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from .arguments import path
from .atomic import atomic_path
from .attention import sdpa
from .attention_choice import explicit_attention
from .checkpoint import Checkpoint, decode_video, encode_prompt, encode_video, load_checkpoint
from .checkpoint_parts import CONFIGS
from .condition import Condition
from .ddim import ddim_invert, ddim_sample
from .doctor import cpu_name
from .errors import TavError, field
from .events import Event, Step
from .inflation import VideoUNet, inflate
from .job import check_file
from .limits import LIMITS, Range, check_pixels
from .memory import choose, free_memory, needed_memory, offloaded, without_content
from .objective import tuning_loss
from .precision import DTYPES, computing
from .recompute import MEMORY
from .take import Take
from .tuning import TuneConfig, tune

STAGES = ("tune", "invert", "sample", "encode", "decode")
OPTIMISATIONS = {
    "choice": "on the CPU, the attention that a measurement finds fastest there, where it isn't PyTorch's fused kernel",
    "fused": "attention that never holds all scores",
    "caching": "clip and sentence encoded once; tuned parameters alone in the optimiser; the VAE in chunks of frames",
}
GUIDANCE = 12.5
GROWTH = {"frames": (8, 16, 32, 64), "size": (16, 32, 64)}
GROWING = ("tune", "sample")
COUNTED = ("tune", "invert", "sample")  # stages of the U-Net, whose operations are counted
_PROCESS = Path("/proc/self")


@dataclass(frozen=True)
class Layout:
    """A checkpoint of a certain size, with random weights (the mini one has its own), and a clip for it.

    Attributes:
        size: side of the latents.
    """

    name: str
    frames: int
    size: int

    def checkpoint(self) -> Checkpoint:
        if self.name == "mini":
            return load_checkpoint("mini")
        torch.manual_seed(0)
        parts = ("unet", "vae", "text_encoder")
        unet, vae, text = (json.loads((CONFIGS / "sd1" / part / "config.json").read_text()) for part in parts)
        if self.name in _NARROW:
            width, groups, layers = _NARROW[self.name]
            unet |= dict(
                block_out_channels=[width * n for n in (1, 2, 4, 4)],
                cross_attention_dim=4 * width,
                norm_num_groups=groups,
            )
            vae |= dict(block_out_channels=[width // 2 * n for n in (1, 2, 4, 4)], norm_num_groups=groups // 2)
            text |= dict(
                hidden_size=4 * width, intermediate_size=16 * width, num_attention_heads=4, num_hidden_layers=layers
            )
        tokenizer = CLIPTokenizer.from_pretrained(CONFIGS / "tokenizer", local_files_only=True)
        scheduler = DDIMScheduler.from_pretrained(CONFIGS / "sd1" / "scheduler", clip_sample=False)
        unet, vae, text = ({k: v for k, v in part.items() if k[0] != "_"} for part in (unet, vae, text))
        models = UNet2DConditionModel(**unet), AutoencoderKL(**vae), CLIPTextModel(CLIPTextConfig(**text))
        return Checkpoint(self.name, *(model.eval().requires_grad_(False) for model in models), tokenizer, scheduler)


# Stable Diffusion 1.5, narrower: width of the first level, groups of its norms, layers of the text encoder
_NARROW = {"middle": (64, 32, 12), "small": (32, 16, 2)}
LAYOUTS = {
    name: Layout(name, *clip)
    for name, clip in {"mini": (8, 16), "small": (4, 16), "middle": (8, 32), "sd15": (24, 64)}.items()
}


@dataclass(frozen=True)
class Mode:
    """How the stages run: `dtype` of the U-Net, `memory` of the tuning, and the optimisations that are `off`."""

    dtype: str = "fp32"
    memory: str = "fast"
    off: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        if self == PLAIN:
            return "plain"
        return ", ".join([self.dtype, *[self.memory] * (self.memory != "fast"), *(f"no {name}" for name in self.off)])


PLAIN = Mode(off=tuple(OPTIMISATIONS))


def plain_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """`explicit_attention`; no mask is needed where this is used."""
    return explicit_attention(q, k, v)


def fused_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def set_attention(unet: VideoUNet, off: tuple[str, ...]):
    """Attention without the optimisations that are off."""
    chosen = plain_attention if "fused" in off else fused_attention if "choice" in off else sdpa
    unet.frame_context.set(attention_fn=chosen)


class Enough(Exception):
    """Ends a tuning that was measured."""


class Workload:
    """A checkpoint, its inflated U-Net and a clip, ready to run every stage in any mode. Stages return seconds."""

    def __init__(self, layout: Layout, device: str):
        self.device = torch.device(device)
        with self.device:  # weights are drawn faster there
            self.checkpoint = layout.checkpoint()
        self.unet = inflate(self.checkpoint.unet)
        self.checkpoint.unet = None
        for part in (self.unet, self.checkpoint.vae, self.checkpoint.text_encoder):
            nn.Module.to(part, self.device)
        generator, side = torch.Generator().manual_seed(0), layout.size * self.checkpoint.downscale
        self.pixels = torch.rand(1, 3, layout.frames, side, side, generator=generator) * 2 - 1
        self.latents = torch.randn(1, 4, layout.frames, layout.size, layout.size, generator=generator).to(self.device)
        self.texts = [
            encode_prompt(self.checkpoint, sentence) for sentence in ("a man is skiing", "", "spider man is skiing")
        ]
        self.take = Take(self.latents, Condition(self.texts[0]), self.latents.abs() / 10)

    def run(self, stage: str, mode: Mode) -> float:
        set_attention(self.unet, mode.off)
        half = stage in ("invert", "sample", "edit")  # tuning has its own way with dtypes, the VAE stays in float32
        nn.Module.to(self.unet, DTYPES[mode.dtype] if half else torch.float32)
        return getattr(self, stage)(mode)

    def _timed(self, function: Callable, *args, **kwargs) -> float:
        started = self._now()
        function(*args, **kwargs)
        return self._now() - started

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def tune(self, mode: Mode) -> float:
        """The second step of a tuning."""
        if "caching" in mode.off:
            return self._tune_plainly(mode)
        ends = []

        def callback(event: Event):
            if isinstance(event, Step):
                ends.append(self._now())
                if event.step == 2:
                    raise Enough
            elif event.about == "memory":  # the step would run again, in another mode than this one
                raise TavError("memory", mode.memory, "ran out of memory", "choose modes that take less")

        config = TuneConfig(steps=3, probe_size=1, dtype=mode.dtype, memory=mode.memory)
        try:
            with offloaded(self.checkpoint.vae, self.checkpoint.text_encoder):
                tune(self.unet, self.checkpoint.scheduler, [self.take], config, callback=callback)
        except Enough:
            return ends[1] - ends[0]

    def _tune_plainly(self, mode: Mode) -> float:
        """A step of tuning that encodes the clip and its sentence itself."""

        def step():
            mean, std = encode_video(self.checkpoint, self.pixels, *_whole(mode, self.pixels))
            text, latents = encode_prompt(self.checkpoint, "a man is skiing"), mean + std * torch.randn_like(mean)
            timestep = torch.tensor([500], device=self.device)
            loss = tuning_loss(self.unet, self.checkpoint.scheduler, latents, torch.randn_like(mean), timestep, text)
            optimizer.zero_grad()
            loss.backward()
            tuned = [parameter for parameter in self.unet.parameters() if parameter.grad is not None]
            nn.utils.clip_grad_norm_(tuned, 1.0)
            optimizer.step()

        with computing(self.unet, mode.dtype, mode.memory):
            optimizer = torch.optim.AdamW(self.unet.parameters(), lr=3e-5)
            step()
            return self._timed(step)

    def invert(self, mode: Mode) -> float:
        """A step of DDIM inversion, as most are: after another one."""
        self._invert(1)
        return self._invert(1)

    def _invert(self, steps: int) -> float:
        return self._timed(ddim_invert, self.unet, self.latents, self.texts[1], self.checkpoint.scheduler, steps)

    def sample(self, mode: Mode) -> float:
        """A step of DDIM sampling with guidance, as most are: after another one."""
        self._sample(1)
        return self._sample(1)

    def _sample(self, steps: int) -> float:
        return self._timed(
            ddim_sample,
            self.unet,
            self.latents,
            self.texts[2],
            self.checkpoint.scheduler,
            steps,
            guidance_scale=GUIDANCE,
            negative_hidden_states=self.texts[1],
        )

    def encode(self, mode: Mode) -> float:
        return self._timed(encode_video, self.checkpoint, self.pixels, *_whole(mode, self.pixels))

    def decode(self, mode: Mode) -> float:
        return self._timed(decode_video, self.checkpoint, self.latents, *_whole(mode, self.latents))

    def edit(self, mode: Mode, steps: int = 50) -> float:
        """Inversion and guided sampling."""
        return self._invert(steps) + self._sample(steps)

    def flops(self, stage: str) -> int:
        """Floating-point operations of a step of tuning, inversion or sampling, counted on tensors without content.

        They are those that the method needs: what is computed again to save memory doesn't count.
        """
        with FakeTensorMode(), FlopCounterMode(display=False) as counter, torch.set_grad_enabled(stage == "tune"):
            unet = without_content(self.unet, torch.float32, self.device)
            unet.set_memory("fast")
            unet.frame_context.set(attention_fn=plain_attention)  # whose every product is seen
            prompts = 2 if stage == "sample" else 1
            latents, text = (
                torch.empty(prompts, *x.shape[1:], device=self.device) for x in (self.latents, self.texts[0])
            )
            out = unet(latents, torch.zeros((), dtype=torch.int64, device=self.device), text)
            if stage == "tune":
                out.square().mean().backward()
        return counter.get_total_flops()


def _whole(mode: Mode, clip: Tensor) -> tuple[int, ...]:
    """How many frames go through the VAE at once, where it isn't what the VAE's functions choose."""
    return (clip.shape[2],) if "caching" in mode.off else ()


def seconds(workload: Workload, modes: list[Mode], stages: list[str], runs: int) -> dict[str, dict[str, float]]:
    """Median seconds by mode and stage; the modes take turns, so that what else the machine does hits all alike."""
    medians = {mode.name: {} for mode in modes}
    for stage in stages:
        taken = {mode.name: [] for mode in modes}
        for _ in range(runs + 1):
            for mode in modes:
                taken[mode.name].append(workload.run(stage, mode))
        for name, values in taken.items():
            medians[name][stage] = statistics.median(values[1:])  # the first is a warm-up
    return medians


def memory(layout: Layout, mode: Mode, stage: str, device: str, threads: int) -> dict[str, float]:
    """GB at the peak of a stage and before it: allocated by CUDA, elsewhere resident in a process of its own."""
    if torch.device(device).type == "cuda":
        return _memory(layout, mode, stage, device, threads)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_memory, layout, mode, stage, device, threads).result()


def _memory(layout: Layout, mode: Mode, stage: str, device: str, threads: int) -> dict[str, float]:
    torch.set_num_threads(threads)
    workload = Workload(layout, device)
    gc.collect()
    if workload.device.type == "cuda":
        before = torch.cuda.memory_allocated(workload.device)
        torch.cuda.reset_peak_memory_stats(workload.device)
        workload.run(stage, mode)
        peak = torch.cuda.max_memory_allocated(workload.device)
    else:
        ctypes.CDLL(None).malloc_trim(0)  # what building the models has left
        (_PROCESS / "clear_refs").write_text("5")  # their peak
        before = _resident("VmRSS")
        workload.run(stage, mode)
        peak = _resident("VmHWM")
    return {"peak": peak / 1e9, "before": before / 1e9}


def _resident(field: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at its peak since that was cleared (getrusage counts the parent's)."""
    status = (_PROCESS / "status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(field))


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of the product of two large matrices, the best of a few and of two sizes."""
    cuda = device.type == "cuda"
    best = spent = 0.0
    for side in (4096, 8192) if cuda else (1024, 2048):
        a = torch.randn(side, side, device=device, dtype=dtype)
        for _ in range(20):
            if spent > 3:  # as in a dtype that the CPU has no arithmetic for
                return best
            started = time.perf_counter()
            a @ a
            if cuda:
                torch.cuda.synchronize(device)
            taken = time.perf_counter() - started
            best, spent = max(best, 2 * side**3 / taken), spent + taken
    return best


def shares(workload: Workload, modes: list[Mode], figures: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """By mode and stage, the operations a second that a step achieves, over those of matrix products of its dtype."""
    rates = {dtype: matmul_rate(workload.device, DTYPES[dtype]) for dtype in {mode.dtype: None for mode in modes}}
    print("\nmatrix products: " + ", ".join(f"{rate / 1e9:.1f} GFLOP/s in {dtype}" for dtype, rate in rates.items()))
    flops = {stage: workload.flops(stage) for stage in COUNTED if stage in next(iter(figures.values()))}
    print("a step: " + ", ".join(f"{stage} {count / 1e9:.1f} GFLOP" for stage, count in flops.items()))
    return {
        mode.name: {stage: count / figures[mode.name][stage] / rates[mode.dtype] for stage, count in flops.items()}
        for mode in modes
    }


def growth(layout: Layout, mode: Mode, runs: int, device: str, sizes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """Seconds and working memory over frames and over pixels, and the exponents of the power laws through them."""
    result = {}
    for axis, values in sizes.items():
        points = []
        for value in values:
            grown = replace(layout, **{axis: value})
            points.append({axis: value, **seconds(Workload(grown, device), [mode], list(GROWING), runs)[mode.name]})
            for stage in GROWING:
                used = memory(grown, mode, stage, device, torch.get_num_threads())
                points[-1][f"{stage} GB"] = used["peak"] - used["before"]
        x = [math.log(value) * (2 if axis == "size" else 1) for value in values]  # size: over the number of pixels
        fit = {
            name: statistics.linear_regression(x, [math.log(max(p[name], 1e-6)) for p in points]).slope
            for name in points[0]
            if name != axis
        }
        result[axis] = {"points": points, "exponents": fit}
    return result


def add_arguments(parser):
    parser.add_argument(
        "--layout",
        choices=LAYOUTS,
        help="(middle; with --gpu sd15, Stable Diffusion 1.5 at 512 x 512; with --growth small)",
    )
    parser.add_argument("--frames", type=LIMITS["count"], metavar="N", help="(that of the layout)")
    parser.add_argument("--size", type=Range(1, 512), metavar="N", help="side of the latents (that of the layout)")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, help="of the U-Net (fp32; with --gpu bf16)")
    parser.add_argument("--memory", nargs="+", choices=MEMORY, help="of the tuning (fast; with --gpu all that fit)")
    parser.add_argument(
        "--without",
        nargs="+",
        choices=OPTIMISATIONS,
        help="measures also with each of these switched off. "
        + "; ".join(f"{k}: {v}" for k, v in OPTIMISATIONS.items()),
    )
    parser.add_argument("--stages", nargs="+", choices=STAGES, help="(all)")
    told = "the median of so many is reported (3)"
    parser.add_argument("--runs", type=Range(1, 1000), default=3, metavar="N", help=told)
    parser.add_argument("--threads", type=LIMITS["threads"], metavar="N", help="of the CPU (all)")
    parser.add_argument(
        "--no-memory", action="store_true", help="leaves out the memory, which takes a process for each figure"
    )
    parser.add_argument(
        "--gpu", action="store_true", help="also 50 steps of inversion and sampling; no plain, which wouldn't fit"
    )
    parser.add_argument(
        "--growth", action="store_true", help="instead: over 8 to 64 frames, and latents of 16 to 64, with exponents"
    )
    parser.add_argument("--json", type=path, metavar="FILE", help="writes all figures")


def bench(args):
    if args.json is not None:
        check_file(args.json, (), "json")
    for name in ("stages", "without", "no_memory"):
        if args.growth and getattr(args, name):
            raise TavError(name, None, f"does nothing with {field('growth')}", "leave it out")
    if args.device.type != "cuda" and not _PROCESS.exists() and (args.growth or not args.no_memory):
        problem = "has its resident memory in /proc, which this system lacks"
        raise TavError("device", args.device, problem, f"use {field('no_memory')}, without {field('growth')}")
    torch.set_num_threads(args.threads or torch.get_num_threads())
    layout, device = (
        LAYOUTS[args.layout or ("sd15" if args.gpu else "small" if args.growth else "middle")],
        str(args.device),
    )
    layout = replace(layout, frames=args.frames or layout.frames, size=args.size or layout.size)
    multiple = 1 if layout.name == "mini" else 8
    check_pixels(layout.frames, 8 * layout.size, 8 * layout.size)
    if layout.size % multiple:
        raise TavError("size", layout.size, f"is not a positive multiple of {multiple}", "give one")
    stages = args.stages or STAGES
    dtypes = args.dtype or ["bf16" if args.gpu else "fp32"]
    kinds = args.memory or (_fitting(layout, DTYPES[dtypes[0]], args.device) if args.gpu else ["fast"])
    on = [Mode(dtype, kind) for dtype in dtypes for kind in kinds]
    modes = [*([] if args.gpu else [PLAIN]), *on, *(replace(on[0], off=(name,)) for name in args.without or ())]
    cuda = args.device.type == "cuda"
    machine = {"device": torch.cuda.get_device_name(args.device) if cuda else args.device.type, "cpu": cpu_name(),
               "kernels": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads(),
               "load": os.getloadavg()[0], "torch": torch.__version__}  # fmt: skip
    result = {"layout": asdict(layout), "machine": machine}
    print(f"{layout.name}: {layout.frames} frames, {layout.size} x {layout.size} latents; {machine}", flush=True)
    if args.growth:
        result["growth"] = growth(layout, on[0], args.runs, device, GROWTH)
        for axis, found in result["growth"].items():
            print(*(json.dumps({k: round(v, 3) for k, v in point.items()}) for point in found["points"]), sep="\n")
            over = "pixels" if axis == "size" else axis
            print(
                f"exponents over {over}: "
                + ", ".join(f"{name} {value:.2f}" for name, value in found["exponents"].items())
            )
    else:
        workload = Workload(layout, device)
        result["seconds"] = seconds(workload, modes, list(stages), args.runs)
        _table("seconds", result["seconds"], stages)
        if counted := [stage for stage in stages if stage in COUNTED]:
            result["share"] = shares(workload, modes, result["seconds"])
            _table("share of the matmul rate", result["share"], counted, compared=False)
        if args.gpu:
            result["edit"] = workload.run("edit", on[0])
            print(f"\ninversion and 50 guided steps, {on[0].name}: {result['edit']:.1f} s")
        del workload  # on a GPU it would count
        if not args.no_memory:
            used = {
                mode.name: {stage: memory(layout, mode, stage, device, torch.get_num_threads()) for stage in stages}
                for mode in modes
            }
            result["memory"] = used
            _table(
                "peak GB", {name: {stage: gb["peak"] for stage, gb in of.items()} for name, of in used.items()}, stages
            )
    if args.json:
        with atomic_path(args.json) as temporary:
            temporary.write_text(json.dumps(result, indent=2) + "\n")


def _fitting(layout: Layout, dtype: torch.dtype, device: torch.device) -> list[str]:
    """The memory modes that the device has room for, or else the last; tells which it leaves out."""
    workload = Workload(layout, str(device))
    chosen, line = choose(
        lambda kind: needed_memory(workload.unet, workload.take, dtype, kind, device), free_memory(device)
    )
    if chosen != MEMORY[0]:
        print(line)
    return list(MEMORY[MEMORY.index(chosen) :])


def _table(title: str, figures: dict[str, dict[str, float]], stages: list[str], compared: bool = True):
    """A row a mode; behind each figure that is compared, how many times less than the first row's."""
    (first, *_), width = figures.values(), max(map(len, [title, *figures])) + 2
    print("\n" + title.ljust(width) + "".join(stage.rjust(17) for stage in stages))
    for name, of in figures.items():
        ratios = (f" {f'({first[stage] / of[stage]:.2f}x)':>8}" if compared else "" for stage in stages)
        print(
            name.ljust(width) + "".join(f"{of[stage]:.3f}{ratio}".rjust(17) for stage, ratio in zip(stages, ratios)),
            flush=True,
        )
