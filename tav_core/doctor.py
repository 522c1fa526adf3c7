"""What a machine can do: its device and versions, what fits into its memory, and how long it takes, by real steps."""

import os
import platform
import time
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import diffusers
import psutil
import torch
import transformers
from torch import nn

from . import __version__, attention_choice, pipeline, sampling
from .checkpoint import Checkpoint, encode_prompt
from .condition import Condition
from .control import each_of
from .errors import Cancelled
from .events import Callback, DDIMStep, Event, Note, Step
from .inflation import VideoUNet
from .job import EditJob
from .memory import MARGIN, free_memory, offloaded
from .precision import DTYPES
from .recompute import MEMORY
from .remaining import CONTROL, clock_time, plan_of
from .take import Take
from .tuning import step_memory, tune

_STEPS = 2  # that are timed, behind a first one
_FRAMES = (4, 12)  # of the estimates that others are told from: what a step needs grows by as much with each frame
_SIDES = (1, 0.75, 0.5)  # of the size that is asked for
_MOST = 999


def versions() -> dict[str, str]:
    """What a result depends on beside its settings."""
    return {
        "tune-a-video": __version__,
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
    }


def cpu_name() -> str:
    """As lscpu tells it; elsewhere what Python knows of it."""
    told = Path("/proc/cpuinfo")
    lines = told.read_text().splitlines() if told.exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")),
        platform.processor() or platform.machine(),
    )


def about_machine(device: torch.device) -> Iterator[str]:
    """Lines on versions, device and memory."""
    yield ", ".join(f"{name} {version}" for name, version in versions().items())
    if device.type == "cuda":
        total = torch.cuda.mem_get_info(device)[1]
        yield f"device: {device}, {torch.cuda.get_device_name(device)}"
    else:
        total = psutil.virtual_memory().total
        kind = torch.backends.cpu.get_cpu_capability()
        told = f"{cpu_name()} ({kind}), {os.cpu_count()} cores, {torch.get_num_threads()} threads"
        yield f"device: {device}, {told}"
    yield f"memory: {free_memory(device) / 1e9:.1f} GB free of {total / 1e9:.1f} GB"


def examine(
    checkpoint: Checkpoint,
    job: EditJob,
    frames: int,
    width: int,
    height: int,
    callback: Callback,
    done: Collection[str] = (),
) -> Iterator[str]:
    """Lines on what fits and how long a job takes, for a clip of so many frames of `width` x `height`.

    Its first steps are computed, on noise in the place of a clip; nothing is written.

    Args:
        done: what needn't be computed any more (see `done_in`).

    Raises:
        TavError: what `run_edit` refuses; not even the smallest memory mode fits.
    """
    job.check_fits(checkpoint, frames, height, width)
    preset, scale = job.preset, checkpoint.downscale
    latents = torch.randn(1, checkpoint.unet.config.in_channels, frames, height // scale, width // scale)
    with torch.no_grad():
        told = Condition(encode_prompt(checkpoint, job.prompt))
    take = Take(latents, told).to(checkpoint.vae.device)
    source = pipeline.Source(torch.zeros(frames, height, width, 3, dtype=torch.uint8), job.prompt, take)
    yield f"checkpoint: {checkpoint.name}, made for {checkpoint.size} x {checkpoint.size}"
    yield f"clip: {frames} frames of {width} x {height}, in {preset.tuning.dtype}"
    unet = pipeline.video_unet(checkpoint, **job.inflation)
    nets = [each.model for each in each_of(job.control)]
    if nets:
        size = sum(weight.nbytes for weight in {weight for net in nets for weight in net.parameters()})
        yield f"ControlNets: {size / 1e9:.2f} GB of weights on the device, while edits are drawn and not before"
    with offloaded(checkpoint.vae, checkpoint.text_encoder, *nets):
        yield from _what_fits(unet, take, job, (width, height), scale)
    yield f"timing {1 + _STEPS} steps of each stage ..."  # on a CPU this may take minutes
    yield from _how_long(checkpoint, unet, source, job, callback, done)


def _what_fits(unet: VideoUNet, take: Take, job: EditJob, size: tuple[int, int], scale: int) -> Iterator[str]:
    device, config = take.latents.device, replace(job.preset.tuning, context_length=None)
    free, (few, many) = free_memory(device), _FRAMES
    frames = job.preset.tuning.context_length or take.latents.shape[2]
    sizes = [tuple(max(scale, round(side * part / scale) * scale) for side in size) for part in _SIDES]
    columns = [f"{w} x {h}" for w, h in sizes]
    yield f"what fits into {free / 1e9:.1f} GB, in frames at most, by the memory mode of the tuning (estimated):"
    yield f"  {'':<14} {'needs here':>11}  " + "  ".join(f"{column:>11}" for column in columns)
    for memory in MEMORY:
        shapes = (take.latents[:, :, :1].expand(-1, -1, count, -1, -1) for count in _FRAMES)
        needed = [MARGIN * step_memory(unet, [replace(take, latents=x, latents_std=None)], config, memory, device)
                  for x in shapes]  # fmt: skip
        each = (needed[1] - needed[0]) / (many - few)
        rest, cells = needed[0] - few * each, []
        for w, h in sizes:
            most = max(0, int((free - rest) / (each * w * h / (size[0] * size[1]))))
            cells.append(str(most) if most < _MOST else f"over {_MOST}")
        here = f"{(rest + frames * each) / 1e9:.2f} GB"
        yield f"  {memory:<14} {here:>11}  " + "  ".join(f"{cell:>11}" for cell in cells)


def _how_long(
    checkpoint: Checkpoint,
    unet: VideoUNet,
    source: pipeline.Source,
    job: EditJob,
    callback: Callback,
    done: Collection[str],
) -> Iterator[str]:
    preset, clock = job.preset, _Clock(callback)
    timed = replace(preset, sampling_steps=max(1 + _STEPS, preset.sampling_steps))
    config = replace(preset.tuning, steps=max(2 + _STEPS, preset.tuning.steps), probe_every=100, probe_size=1)
    controls = [replace(each, start=0.0, end=1.0) for each in each_of(job.control) if each.strength]
    waiting = checkpoint.vae, checkpoint.text_encoder, *(each.model for each in controls)
    if "tune" not in done:
        with offloaded(*waiting), suppress(Cancelled):
            tune(unet, checkpoint.scheduler, [source.take], config, callback=clock)
    nn.Module.to(unet, DTYPES[config.dtype])
    noise = source.take.latents
    with suppress(Cancelled):
        pipeline.invert(checkpoint, unet, source, timed, callback=clock)
    with suppress(Cancelled):
        sampling.sample(checkpoint, unet, noise, job.prompt, timed, source_prompt=job.prompt, control=controls,
                        callback=clock)  # fmt: skip
    seconds, plan = clock.seconds, plan_of(job, done)
    kernels = Counter(attention_choice.CHOSEN.values())
    told = ", ".join(f"{name} for {count}" for name, count in kernels.most_common())
    yield f"attention: {told} of {kernels.total()} shapes, as measured" if told else "attention: PyTorch's"
    told = ", ".join(f"{name} {seconds[stage]:.2f} s" for stage, name in _NAMES.items() if stage in seconds)
    yield f"a step, the mean of {_STEPS}: {told}"
    # the first steps of a sampling are its dearest: the clip walks beside them
    guided, walks = preset.guidance_scale > 1, preset.attention_injection > 0
    dearest = (1 + guided) * (1 + CONTROL * len(controls)) + walks
    sample = next(stage.cost for stage in plan.stages if stage.name == "sample") / dearest * seconds["sample"]
    rates = {"encode": 0.0, **seconds, "subject": seconds["invert"], "sample": sample}
    probes = seconds["invert"] * preset.tuning.probe_size * (1 + preset.tuning.steps // preset.tuning.probe_every)
    taken = {stage: stage.steps * rates[stage.name] + probes * (stage.name == "tune") for stage in plan.stages}
    told = ", ".join(
        f"{_NAMES.get(stage.name, 'finding the subject')} {clock_time(each)} ({stage.steps} steps)"
        for stage, each in taken.items() if stage.name != "encode"
    )  # fmt: skip
    edits = f"{len(job.edits)} edit{'s' * (len(job.edits) > 1)}"
    verb = "take" + "s" * (len(job.edits) == 1) if "reconstruction" in done else "and the reconstruction take"
    yield f"{edits} {verb} about {clock_time(sum(taken.values()))}, beside coding frames: {told}"


_NAMES = {"tune": "tuning", "invert": "inversion", "sample": "sampling"}


class _Clock:
    """A callback that times a few steps of each stage, and stops it then."""

    def __init__(self, callback: Callback):
        self.callback, self.began = callback, {}
        self.seconds: dict[str, float] = {}

    def __call__(self, event: Event):
        if isinstance(event, DDIMStep):
            event.latents.flatten()[0].item()  # a GPU has computed then
        if isinstance(event, Note):
            self.callback(event)
        if isinstance(event, Step):
            count, at = self.began.setdefault(event.stage, (event.step, time.monotonic()))
            if event.step - count == _STEPS:
                self.seconds[event.stage] = (time.monotonic() - at) / _STEPS
                raise Cancelled
