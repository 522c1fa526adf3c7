"""One-shot tuning of a video U-Net on a single clip (Tune-A-Video, arXiv 2212.11565, section 3.3).

Beyond the paper, several takes can be learned in one tuning, so that what they share, a motion, is learned from all.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import SchedulerMixin
from torch import Tensor, nn

from .condition import at_frames
from .errors import OutOfMemory, TavError
from .inflation import VideoUNet, trainable_parameters
from .memory import choose, free_memory, is_out_of_memory, needed_memory, release
from .objective import draw_take, draw_timesteps, generator_for, tuning_loss
from .recompute import MEMORY
from .tuning_state import TuneState, check_same_run, hash_tensors, read_state, restore, save_state
from .windows import check_context_length, even_windows, random_window

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_SCALE_INTERVAL = 2000  # good steps before the fp16 loss scale doubles
_NOT_IN_FINGERPRINT = ("steps", "save_every", "probe_every", "memory")  # may change between the parts of a run


@dataclass(frozen=True)
class TuneConfig:
    """How to tune; the defaults are the paper's.

    Attributes:
        steps: optimisation steps, at least 1 (the paper: 300 to 500).
        learning_rate: of AdamW, 0 < lr <= 1; constant after `warmup_steps` of linear rise.
        max_grad_norm: gradients are scaled down to this L2 norm.
        seed: of every random draw, 0 or more.
        dtype: "fp32", "bf16" or "fp16" computation; the tuned weights stay float32.
        memory: "fast", "selective", "checkpointing" or "low", each with less memory for more time (see
            `VideoUNet.set_memory`), but the same weights, to rounding; or "auto": the first of them that fits (see `memory`).
        probe_every: steps between measurements of the loss on `probe_size` fixed draws.
        save_every: steps between writes of the state file.
        timestep_sampling: "uniform", or "stratified": consecutive draws cover the range evenly.
        loss_weighting: "none", or "min_snr" (gamma 5, arXiv 2303.09556).
        context_length: None, or the frames that a step sees of a long clip: frame 0 and a random run (see `windows`).
    """

    steps: int = 500
    learning_rate: float = 3e-5
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 1e-2
    eps: float = 1e-8
    max_grad_norm: float = 1.0
    warmup_steps: int = 0
    seed: int = 0
    dtype: str = "fp32"
    memory: str = "auto"
    probe_every: int = 25
    probe_size: int = 4
    save_every: int = 100
    timestep_sampling: str = "uniform"
    loss_weighting: str = "none"
    context_length: int | None = None

    def __post_init__(self):
        for name, least in {
            "steps": 1,
            "warmup_steps": 0,
            "seed": 0,
            "probe_every": 1,
            "probe_size": 1,
            "save_every": 1,
        }.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise TavError(f"{name}={value!r} is out of range; give an integer of at least {least}")
        for name, good, remedy in (
            ("learning_rate", lambda x: 0 < x <= 1, "give a number above 0 and up to 1, such as 3e-5"),
            ("weight_decay", lambda x: 0 <= x < math.inf, "give 0 or a positive number, such as 1e-2"),
            ("eps", lambda x: 0 < x < math.inf, "give a positive number, such as 1e-8"),
            ("max_grad_norm", lambda x: x > 0, "give a positive number, such as 1.0"),
            ("betas", lambda x: len(x) == 2 and all(0 <= beta < 1 for beta in x), "give two in [0, 1)"),
            ("dtype", lambda x: x in DTYPES, "choose one of fp32, bf16, fp16"),
            ("memory", lambda x: x in ("auto", *MEMORY), f"choose one of auto, {', '.join(MEMORY)}"),
            ("timestep_sampling", lambda x: x in ("uniform", "stratified"), "choose uniform or stratified"),
            ("loss_weighting", lambda x: x in ("none", "min_snr"), "choose none or min_snr"),
        ):
            if not good(getattr(self, name)):
                raise TavError(f"{name}={getattr(self, name)!r} is out of range; {remedy}")
        if self.context_length is not None:
            check_context_length(self.context_length)


@dataclass(frozen=True)
class Take:
    """A clip and what is said of it: latents and their standard deviation (or None) `b c f h w`, the rest as in `tune`."""

    latents: Tensor
    encoder_hidden_states: Tensor
    latents_std: Tensor | None = None
    class_labels: Tensor | None = None

    def to(self, device: torch.device) -> "Take":
        """In float32 on that device, but for labels that are integers."""
        moved = (None if x is None else x.to(device) for x in vars(self).values())
        return Take(*(x.float() if x is not None and x.is_floating_point() else x for x in moved))

    def at(self, frames: Tensor) -> "Take":
        """Those frames of it."""
        (b, _, f, _, _), std = self.latents.shape, self.latents_std
        text, labels = (
            at_frames(name, getattr(self, name), b, f, frames) for name in ("encoder_hidden_states", "class_labels")
        )
        return Take(self.latents[:, :, frames], text, None if std is None else std[:, :, frames], labels)


@dataclass(frozen=True)
class TuneResult:
    """A finished run.

    Attributes:
        losses: training loss of every step.
        probe_losses: (step, loss on the fixed draws) at step 0, every `probe_every` and the end.
        steps: steps that the weights have seen.
        seconds: time of this call.
        weights: the tuned weights by name, float32 on the CPU, whatever the dtype of the U-Net.
    """

    losses: list[float]
    probe_losses: list[tuple[int, float]]
    steps: int
    seconds: float
    weights: dict[str, Tensor]


def make_optimizer(unet: nn.Module, config: TuneConfig) -> torch.optim.AdamW:
    """AdamW over the trainable parameters alone."""
    return torch.optim.AdamW(
        trainable_parameters(unet).values(),
        lr=config.learning_rate,
        betas=config.betas,
        weight_decay=config.weight_decay,
        eps=config.eps,
    )


def tune(
    unet: VideoUNet,
    scheduler: SchedulerMixin,
    latents: Tensor,
    encoder_hidden_states: Tensor,
    config: TuneConfig,
    *,
    latents_std: Tensor | None = None,
    class_labels: Tensor | None = None,
    more_takes: Sequence[Take] = (),
    state_path: str | Path | None = None,
    resume: bool = True,
    callback: Callable[[dict[str, Any]], None] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> TuneResult:
    """Fit `unet`, in place, to one clip and its caption, or to several.

    A run that was stopped, by an exception of the callback or by force, goes on from its state file and ends
    in the very weights of an uninterrupted one: every draw depends on the seed and the step alone.

    Args:
        unet: from `inflate`; its parameters come back in the dtype they had.
        scheduler: gives alphas_cumprod and the prediction type.
        latents: the clip, mean of the VAE posterior times the scaling factor, `b c f h w`.
        encoder_hidden_states: embedding of the caption, `1 n d`, `b n d` or `(b f) n d`.
        latents_std: standard deviation of the posterior in the scale of `latents`; it is sampled anew at
            every step. Without it the mean is used.
        class_labels: of the clip, one for all (`1`), per video (`b`) or per frame (`(b f)`), where the U-Net has classes.
        more_takes: further clips, each with its own sentence, size and length. Every step learns from one of all,
            in a random order in which all have their turn; the probe loss is the mean of theirs.
        state_path: state file (safetensors), read if it exists and `resume`, written on the way.
        callback: called after every step with a dict of stage "tune", step (from 1), total, loss,
            grad_norm, probe_loss (the latest or None), lr and seconds; raises to stop.
        say: called with a line where `memory` is chosen, or lowered because a step ran out of memory, and where `dtype` is
            one that this CPU has no arithmetic for.

    Raises:
        TavError: the state file belongs to another run or cannot be written; a clip shorter than the
            context_length; a loss or gradient that is not finite, after which the weights are those of the
            last save (or of the start); a step that runs out of memory, and again in the next lower memory mode.
    """
    takes = [Take(latents, encoder_hidden_states, latents_std, class_labels), *more_takes]
    for number, take in enumerate(takes, 1):
        shape, std = tuple(take.latents.shape), take.latents_std
        if len(shape) != 5:
            raise TavError(f"latents must be b c f h w, got shape {shape}; reshape them")
        if std is not None and std.shape != shape:
            raise TavError(f"latents_std has shape {tuple(std.shape)}, latents {shape}; give both one shape")
        if shape[1] != latents.shape[1]:
            raise TavError(
                f"take {number} has {shape[1]} channels, the first {latents.shape[1]}; encode all with one VAE"
            )
        if config.context_length is not None:
            check_context_length(config.context_length, shape[2])
    if not isinstance(unet, VideoUNet):
        raise TavError(f"unet is a {type(unet).__name__}, which has nothing to tune; inflate it first")
    started = time.monotonic()
    state_path = Path(state_path) if state_path is not None else None
    parameters = trainable_parameters(unet)
    device = next(iter(parameters.values())).device
    takes = [take.to(device) for take in takes]
    total, length = len(scheduler.alphas_cumprod), config.context_length

    def loss_at(mean_or_sample: Tensor, noise: Tensor, t: Tensor, seen: Take, weighting: str) -> Tensor:
        return tuning_loss(
            unet,
            scheduler,
            mean_or_sample,
            noise,
            t.to(device),
            seen.encoder_hidden_states,
            weighting,
            seen.class_labels,
        )

    @torch.no_grad()
    def probe() -> float:
        draws = config.probe_size
        generator = generator_for(config.seed, "probe", 0)
        levels = (torch.arange(draws) + 0.5) / draws * total
        losses = []
        for take in takes:
            parts = [take] * draws
            if length is not None:
                parts = [take.at(window) for window in even_windows(take.latents.shape[2], length, draws)]
            for t, seen in zip(levels.long(), parts):
                noise = torch.randn(seen.latents.shape, generator=generator).to(device)
                t = t.expand(len(seen.latents))
                losses.append(loss_at(seen.latents, noise, t, seen, "none").item())
        return sum(losses) / len(losses)

    with computing(unet, config), torch.enable_grad():
        optimizer = make_optimizer(unet, config)
        fingerprint = run_fingerprint(unet, scheduler, takes, config)
        state = TuneState(fingerprint, loss_scale=(2.0**16 if config.dtype == "fp16" else 1.0, 0))
        if state_path is not None and resume and state_path.exists():
            state, tensors = read_state(state_path)
            check_same_run(state_path, state.fingerprint, fingerprint, tensors)
            restore(tensors, parameters, optimizer)
        good = {name: parameter.detach().clone() for name, parameter in parameters.items()}

        def save() -> None:
            for name, parameter in parameters.items():
                good[name].copy_(parameter.detach())
            if state_path is not None:
                save_state(state_path, state, dataclasses.asdict(config), parameters, optimizer)

        def fail(what: str, step: int) -> TavError:
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.copy_(good[name])
            remedy = f"lower learning_rate (now {config.learning_rate:g})"
            remedy += "" if config.dtype == "fp32" else f" or set dtype to fp32 (now {config.dtype})"
            return TavError(f"{what} at step {step + 1} is not finite; {remedy}")

        def differentiated(scale: float, *args) -> Tensor | None:
            """The loss, its gradients (times scale) in the parameters; None, and nothing kept, if the memory runs out."""
            optimizer.zero_grad(set_to_none=True)
            try:
                loss = loss_at(*args)
                if torch.isfinite(loss):
                    (loss * scale).backward()
                return loss.detach()
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
            optimizer.zero_grad(set_to_none=True)
            return None  # only here: the error's traceback held the graph

        if not state.probe_losses:
            state.probe_losses.append((0, probe()))
        if config.memory == "auto" and state.step < config.steps:
            memory, line = choose(lambda memory: step_memory(unet, takes, config, memory, device), free_memory(device))
            unet.set_memory(memory)
            say(line)
        if config.dtype != "fp32" and device.type == "cpu" and (times := half_precision_cost(DTYPES[config.dtype])) > 2:
            say(
                f"dtype: {config.dtype} makes this CPU compute matrix products {times:.0f} times as slowly as fp32 does; use fp32"
            )
        for step in range(state.step, config.steps):
            seen = takes[draw_take(config.seed, step, len(takes))]
            if length is not None:
                window = random_window(seen.latents.shape[2], length, generator_for(config.seed, "window", step))
                seen = seen.at(window)
            mean, std = seen.latents, seen.latents_std
            generator = generator_for(config.seed, "step", step)
            noise = torch.randn(mean.shape, generator=generator).to(device)
            posterior = torch.randn(mean.shape, generator=generator).to(device)
            t = draw_timesteps(config.timestep_sampling, config.seed, step, len(mean), total)
            sample = mean if std is None else mean + std * posterior
            lr = config.learning_rate * min(1.0, (step + 1) / max(1, config.warmup_steps))
            optimizer.param_groups[0]["lr"] = lr

            scale, age = state.loss_scale
            loss = differentiated(scale, sample, noise, t, seen, config.loss_weighting)
            if loss is None and unet.memory != MEMORY[-1]:
                release(device)
                lower = MEMORY[MEMORY.index(unet.memory) + 1]
                say(f"memory: {lower} from step {step + 1} on, since {unet.memory} ran out of memory")
                unet.set_memory(lower)
                loss = differentiated(scale, sample, noise, t, seen, config.loss_weighting)
            if loss is None:
                release(device)
                save()
                lower = "" if unet.memory == MEMORY[-1] else f", --memory {MEMORY[-1]}"
                raise OutOfMemory(
                    f"step {step + 1} ran out of memory, with --memory {unet.memory}; use fewer or smaller frames, "
                    f"--context-length (in ComfyUI: Context Windows){lower} or --dtype bf16"
                )
            if not torch.isfinite(loss):
                raise fail("loss", step)
            for parameter in parameters.values():
                if parameter.grad is not None:
                    parameter.grad.div_(scale)
            grad_norm = nn.utils.clip_grad_norm_(parameters.values(), config.max_grad_norm).item()
            if math.isfinite(grad_norm):
                optimizer.step()
            elif config.dtype != "fp16" or scale <= 1:
                raise fail("gradient", step)
            if config.dtype == "fp16":  # dynamic loss scaling: a step that overflows is left out
                state.loss_scale = _next_scale(scale, age, math.isfinite(grad_norm))

            state.step = step + 1
            state.losses.append(loss.item())
            if state.step % config.probe_every == 0 or state.step == config.steps:
                state.probe_losses.append((state.step, probe()))
            try:
                if callback is not None:
                    callback(
                        {
                            "stage": "tune",
                            "step": state.step,
                            "total": config.steps,
                            "loss": state.losses[-1],
                            "grad_norm": grad_norm,
                            "probe_loss": state.probe_losses[-1][1],
                            "lr": lr,
                            "seconds": time.monotonic() - started,
                        }
                    )
            except BaseException:
                save()
                raise
            if state.step % config.save_every == 0 or state.step == config.steps:
                save()
        weights = {name: parameter.detach().float().cpu().clone() for name, parameter in parameters.items()}
    return TuneResult(state.losses, state.probe_losses, state.step, time.monotonic() - started, weights)


def step_memory(unet: VideoUNet, takes: Sequence[Take], config: TuneConfig, memory: str, device: torch.device) -> int:
    """Bytes that a step of the tuning needs on a device in a memory mode, beyond the weights (see `needed_memory`)."""
    seen = takes if config.context_length is None else [take.at(torch.arange(config.context_length)) for take in takes]
    largest = max(seen, key=lambda take: take.latents.numel())
    return needed_memory(
        unet, largest.latents, largest.encoder_hidden_states, largest.class_labels, DTYPES[config.dtype], memory, device
    )


@functools.cache
def half_precision_cost(dtype: torch.dtype) -> float:
    """How many times longer than in float32 a matrix product in that dtype takes on this CPU; a few hundredths of a second."""
    best = dict.fromkeys((torch.float32, dtype), math.inf)
    for _ in range(6):
        for of in best:
            a = torch.ones(192, 192, dtype=of)
            started = time.perf_counter()
            a @ a
            best[of] = min(best[of], time.perf_counter() - started)
    return best[dtype] / best[torch.float32]


def _next_scale(scale: float, age: int, finite: bool) -> tuple[float, int]:
    if not finite:
        return scale / 2, 0
    return (scale * 2, 0) if age + 1 == _SCALE_INTERVAL else (scale, age + 1)


@contextmanager
def computing(unet: VideoUNet, config: TuneConfig) -> Iterator[None]:
    """Frozen weights in the computing dtype, trainable ones in float32; all as they were on leaving."""
    parameters = trainable_parameters(unet)
    tuned, dtype = set(map(id, parameters.values())), DTYPES[config.dtype]
    # originals wait on the CPU, or computing in half precision would not save device memory
    cast = [(p, p.device, p.data.cpu()) for p in unet.parameters() if id(p) not in tuned and p.dtype != dtype]
    dtypes = {name: parameter.dtype for name, parameter in parameters.items()}
    memory = unet.memory
    try:
        for parameter, _, _ in cast:
            parameter.data = parameter.data.to(dtype)
        for parameter in parameters.values():
            parameter.data = parameter.data.float()
        unet.set_memory(memory if config.memory == "auto" else config.memory)
        yield
    finally:
        for parameter, device, original in cast:
            parameter.data = original.to(device)
        for name, parameter in parameters.items():
            parameter.data, parameter.grad = parameter.data.to(dtypes[name]), None
        unet.set_memory(memory)


def run_fingerprint(
    unet: VideoUNet, scheduler: SchedulerMixin, takes: Sequence[Take], config: TuneConfig
) -> dict[str, Any]:
    """What must be equal for a run to go on from its state file: name to hash or value."""
    parameters = trainable_parameters(unet)
    options = dataclasses.asdict(config) | {"betas": list(config.betas)}  # as JSON has it
    labels = [take.class_labels for take in takes if take.class_labels is not None]
    return {
        "latents": hash_tensors(take.latents for take in takes),
        "latents_std": hash_tensors(take.latents_std for take in takes if take.latents_std is not None),
        "encoder_hidden_states": hash_tensors(take.encoder_hidden_states for take in takes),
        **({"class_labels": hash_tensors(labels)} if labels else {}),
        "noise schedule": hash_tensors([scheduler.alphas_cumprod]),
        "prediction_type": scheduler.config.prediction_type,
        "inflation": unet.inflation,
        "trainable parameters": {name: list(parameter.shape) for name, parameter in parameters.items()},
        "initial weights": hash_tensors(parameters.values()),
        # without None, so that a state from before there was an option goes on
        **{name: value for name, value in options.items() if name not in _NOT_IN_FINGERPRINT and value is not None},
    }
