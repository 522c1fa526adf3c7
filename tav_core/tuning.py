"""One-shot tuning of a video U-Net on a single clip (Tune-A-Video, arXiv 2212.11565, section 3.3).

Beyond the paper, several takes can be learned in one tuning, so that what they share, a motion, is learned from all.
"""

import dataclasses
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

from .compact import halved
from .errors import OutOfMemory, TavError, field
from .events import Callback, Event, Note, TuningStep, ignored
from .inflation import VideoUNet
from .limits import Range, check_fields
from .memory import Device, choose, is_out_of_memory, needed_memory, release
from .objective import LOSS_WEIGHTINGS, TIMESTEP_SAMPLINGS, draw_take, draw_timesteps, generator_for, tuning_loss
from .precision import DTYPES, computing, half_precision_cost, next_scale
from .recompute import MEMORY, MEMORY_OR_AUTO
from .take import Take, check_takes
from .trainable import trainable_parameters
from .tuning_state import TuneState, check_same_run, hash_tensors, read_state, restore, save_state
from .windows import even_windows, random_window

KEPT_STEPS = 8  # at most: all of them are held in memory, and written with every state
_NOT_IN_FINGERPRINT = ("steps", "save_every", "save_minutes", "probe_every", "memory", "keep")  # may change in a run


@dataclass(frozen=True)
class TuneConfig:
    """How to tune; the defaults are the paper's. The limits of numbers stand in `limits`.

    Attributes:
        steps: optimisation steps, at least 1 (the paper: 300 to 500).
        learning_rate: of AdamW; constant after `warmup_steps` of linear rise.
        max_grad_norm: gradients are scaled down to this L2 norm.
        seed: of every random draw.
        dtype: "fp32", "bf16" or "fp16" computation; the tuned weights stay float32.
        memory: "fast", "selective", "checkpointing" or "low", each with less memory for more time (see
            `VideoUNet.set_memory`), but the same weights, to rounding; or "auto": the first of them that fits (see
            `memory`).
        probe_every: steps between measurements of the loss on `probe_size` fixed draws.
        save_every: steps between writes of the state file.
        save_minutes: minutes after which it is written, too, however few steps these were.
        timestep_sampling: "uniform", or "stratified": consecutive draws cover the range evenly.
        loss_weighting: "none", or "min_snr" (gamma 5, arXiv 2303.09556).
        context_length: None, or the frames that a step sees of a long clip: frame 0 and a random run (see `windows`).
        weight_average: decay of a running average of the weights, which is the result then; 0 for none, as in the
            paper. It is (1 + step) / (10 + step) in the first steps, where that is less.
        keep: steps whose weights are a result as well, to choose from; eight at most.
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
    save_minutes: float = 2.0
    timestep_sampling: str = "uniform"
    loss_weighting: str = "none"
    context_length: int | None = None
    weight_average: float = 0.0
    keep: Sequence[int] = ()

    def __post_init__(self):
        check_fields(self)
        for name, good, remedy in (
            ("max_grad_norm", lambda x: isinstance(x, int | float) and x > 0, "give a positive number, such as 1.0"),
            ("betas", lambda x: len(x) == 2 and all(0 <= beta < 1 for beta in x), "give two in [0, 1)"),
            ("dtype", lambda x: x in DTYPES, f"choose one of {', '.join(DTYPES)}"),
            ("memory", lambda x: x in MEMORY_OR_AUTO, f"choose one of {', '.join(MEMORY_OR_AUTO)}"),
            ("timestep_sampling", lambda x: x in TIMESTEP_SAMPLINGS, f"choose {' or '.join(TIMESTEP_SAMPLINGS)}"),
            ("loss_weighting", lambda x: x in LOSS_WEIGHTINGS, f"choose {' or '.join(LOSS_WEIGHTINGS)}"),
        ):
            if not good(getattr(self, name)):
                raise TavError(name, getattr(self, name), "is out of range", remedy)
        for step in self.keep:
            if step not in Range(1, self.steps):
                raise TavError("keep", step, f"is no step of {self.steps}", f"give steps from 1 to {self.steps}")
        if len(self.keep) > KEPT_STEPS or len(set(self.keep)) < len(self.keep):
            problem = f"has {len(self.keep)} steps"
            raise TavError("keep", None, problem, f"give {KEPT_STEPS} or fewer, each of them once")


@dataclass(frozen=True)
class TuneResult:
    """A finished run.

    Attributes:
        losses: training loss of every step.
        probe_losses: (step, loss on the fixed draws) at step 0, every `probe_every` and the end.
        steps: steps that the weights have seen.
        started: steps of them that earlier calls had done.
        seconds: time of this call.
        weights: the tuned weights by name, float32 on the CPU, whatever the dtype of the U-Net.
        kept: those of the steps to keep, by step, small (see `halved`).
    """

    losses: list[float]
    probe_losses: list[tuple[int, float]]
    steps: int
    started: int
    seconds: float
    weights: dict[str, Tensor]
    kept: dict[int, dict[str, Tensor]]

    def __repr__(self) -> str:
        (_, before), (_, after) = self.probe_losses[0], self.probe_losses[-1]
        before_this = f", {self.started} of them before" if self.started else ""
        kept = f", kept at {', '.join(map(str, self.kept))}" if self.kept else ""
        told = f"{self.steps} steps{before_this}, {self.seconds:.1f} s, probe loss {before:.4f} -> {after:.4f}"
        return f"TuneResult({told}, {len(self.weights)} tuned weights{kept})"


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
    takes: Sequence[Take],
    config: TuneConfig,
    *,
    state_path: str | Path | Callable[[dict[str, Any]], Path] | None = None,
    resume: bool = True,
    device: Device | None = None,
    callback: Callback = ignored,
) -> TuneResult:
    """Fit `unet`, in place, to a clip and its caption, or to several.

    A run that was stopped, by an exception of the callback or by force, goes on from its state file and ends
    in the very weights of an uninterrupted one: every draw depends on the seed and the step alone.

    Args:
        unet: from `inflate`; its parameters come back in the dtype they had.
        scheduler: gives alphas_cumprod and the prediction type.
        takes: the clip, or several, each with its own sentence, size and length. Every step learns from one of all,
            in a random order in which all have their turn; the probe loss is the mean of theirs. Where a take has a
            standard deviation, its posterior is sampled anew at every step.
        state_path: state file (safetensors), read if it exists and `resume`, written on the way; or what chooses one by
            the run's fingerprint (see `run_fingerprint`), before anything is computed.
        device: where the U-Net is, or comes to by `Device.make_room`, and what may be held there.
        callback: gets a `TuningStep` after every step, and a `Note` where `memory` is chosen, or lowered because a step
            ran out of memory, and where `dtype` is one that this CPU has no arithmetic for; raises to stop.

    Raises:
        TavError: the state file belongs to another run, is beyond a step to keep, or cannot be written; a clip shorter
            than the context_length; a loss or gradient that is not finite, after which the weights are those of the
            last save (or of the start); a step that runs out of memory, and again in the next lower memory mode.
    """
    check_takes(takes, config.context_length)
    if not isinstance(unet, VideoUNet):
        raise TavError("unet", None, f"is a {type(unet).__name__}, which has nothing to tune", "inflate it first")
    started = time.monotonic()
    path = state_path(run_fingerprint(unet, scheduler, takes, config)) if callable(state_path) else state_path
    device = device or Device(next(unet.parameters()).device)
    best = MEMORY[0] if config.memory == "auto" else config.memory
    device.make_room(lambda: step_memory(unet, takes, config, best, device.device))
    takes = [take.to(device.device) for take in takes]
    with computing(unet, config.dtype, config.memory), torch.enable_grad():
        fingerprint = run_fingerprint(unet, scheduler, takes, config)
        run = TuningRun(unet, scheduler, takes, config, fingerprint, path, callback)
        if path is not None and resume and Path(path).exists():
            run.resume()
        first = run.state.step
        if not run.state.probe_losses:
            run.state.probe_losses.append((0, run.probe()))
        if config.memory == "auto" and first < config.steps:
            memory, line = choose(lambda mode: step_memory(unet, takes, config, mode, device.device), device.free())
            unet.set_memory(memory)
            run.tell(Note(line, "memory"))
        if config.dtype != "fp32" and device.device.type == "cpu":
            _warn_of_slow_dtype(config.dtype, run.tell)
        while run.state.step < config.steps:
            loss, grad_norm, lr = run.step()
            if run.state.step in config.keep:  # before anything can stop the run or write its state
                run.state.kept[run.state.step] = halved(run.state.average or run.parameters)
            step, probe_loss, seconds = run.state.step, run.state.probe_losses[-1][1], time.monotonic() - started
            run.tell(TuningStep("tune", step, config.steps, loss, grad_norm, probe_loss, lr, seconds, first, unet))
            late = time.monotonic() - run.saved >= 60 * config.save_minutes
            if late or step % config.save_every == 0 or step == config.steps:
                run.save()
        with torch.no_grad():
            for name, average in run.state.average.items():
                run.parameters[name].copy_(average)
        weights = {name: parameter.detach().float().cpu().clone() for name, parameter in run.parameters.items()}
    state, kept = run.state, {step: run.state.kept[step] for step in sorted(config.keep)}
    return TuneResult(state.losses, state.probe_losses, state.step, first, time.monotonic() - started, weights, kept)


def _warn_of_slow_dtype(dtype: str, callback: Callback):
    if (times := half_precision_cost(DTYPES[dtype])) > 2:
        slow = f"makes this CPU compute matrix products {times:.0f} times as slowly as fp32 does; use fp32"
        callback(Note(f"dtype: {dtype} {slow}", "dtype"))


class TuningRun:
    """A tuning between two steps: the optimiser, what the state file holds, and the weights of the last save."""

    def __init__(
        self,
        unet: VideoUNet,
        scheduler: SchedulerMixin,
        takes: Sequence[Take],
        config: TuneConfig,
        fingerprint: dict[str, Any],
        state_path: str | Path | None,
        callback: Callback,
    ):
        self.unet, self.scheduler, self.takes, self.config = unet, scheduler, takes, config
        self.state_path, self.callback = None if state_path is None else Path(state_path), callback
        self.device = takes[0].latents.device
        self.parameters = trainable_parameters(unet)
        self.optimizer = make_optimizer(unet, config)
        self.saved = time.monotonic()
        self.state = TuneState(fingerprint, loss_scale=(2.0**16 if config.dtype == "fp16" else 1.0, 0))
        self.keep()
        if config.weight_average:
            self.state.average = {name: weight.clone() for name, weight in self.good.items()}

    def keep(self):
        """Weights to go back to, if a later step fails."""
        self.good = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    def tell(self, event: Event):
        """Calls back; if that stops the run, what was learned is kept."""
        try:
            with self.averaged():
                self.callback(event)
        except BaseException:
            self.save()
            raise

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The U-Net has the average of the weights, if there is one."""
        own = {name: self.parameters[name].data for name in self.state.average}
        for name, weight in self.state.average.items():
            self.parameters[name].data = weight
        try:
            yield
        finally:
            for name, weight in own.items():
                self.parameters[name].data = weight

    def save(self):
        for name, parameter in self.parameters.items():
            self.good[name].copy_(parameter.detach())
        if self.state_path is not None:
            save_state(self.state_path, self.state, dataclasses.asdict(self.config), self.parameters, self.optimizer)
        self.saved = time.monotonic()  # behind the write, so that one on a slow disk doesn't call for the next

    def resume(self):
        """Goes on from the state file.

        Raises:
            TavError: it belongs to another run, or is beyond a step to keep.
        """
        state, tensors = read_state(self.state_path)
        check_same_run(self.state_path, state, self.state.fingerprint, tensors)
        if lost := [step for step in self.config.keep if step <= state.step and step not in state.kept]:
            problem = f"is over: {self.state_path} is at step {state.step}, and wasn't told to keep it"
            raise TavError("keep", lost[0], problem, "leave it out, or delete that file to start over")
        restore(tensors, self.parameters, self.optimizer)
        state.average = {name: weight.to(self.device) for name, weight in state.average.items()}
        self.state = state
        self.keep()

    def loss(self, take: Take, sample: Tensor, noise: Tensor, t: Tensor, weighting: str) -> Tensor:
        t = t.to(self.device)
        return tuning_loss(self.unet, self.scheduler, sample, noise, t, take.condition, weighting)

    @torch.no_grad()
    def probe(self) -> float:
        """The loss on fixed draws, which shows the progress that random timesteps hide."""
        draws, length = self.config.probe_size, self.config.context_length
        generator = generator_for(self.config.seed, "probe", 0)
        levels = (torch.arange(draws) + 0.5) / draws * len(self.scheduler.alphas_cumprod)
        losses = []
        for take in self.takes:
            parts = [take] * draws
            if length is not None:
                parts = [take.at(window) for window in even_windows(take.latents.shape[2], length, draws)]
            for t, part in zip(levels.long(), parts):
                noise = torch.randn(part.latents.shape, generator=generator).to(self.device)
                losses.append(self.loss(part, part.latents, noise, t.expand(len(noise)), "none").item())
        return sum(losses) / len(losses)

    def step(self) -> tuple[float, float, float]:
        """One step of AdamW; its loss, the norm of the gradient, and the learning rate.

        Raises:
            TavError: a loss or gradient that is not finite, or too little memory.
        """
        config, state = self.config, self.state
        lr = config.learning_rate * min(1.0, (state.step + 1) / max(1, config.warmup_steps))
        self.optimizer.param_groups[0]["lr"] = lr
        scale, age = state.loss_scale
        loss = self.differentiated_or_in_less_memory(scale, *self.draw())
        if not torch.isfinite(loss):
            raise self.failed("loss")
        for parameter in self.parameters.values():
            if parameter.grad is not None:
                parameter.grad.div_(scale)
        grad_norm = nn.utils.clip_grad_norm_(self.parameters.values(), config.max_grad_norm).item()
        if math.isfinite(grad_norm):
            self.optimizer.step()
        elif config.dtype != "fp16" or scale <= 1:
            raise self.failed("gradient")
        if config.dtype == "fp16":  # a step that overflows is left out
            state.loss_scale = next_scale(scale, age, math.isfinite(grad_norm))
        state.step += 1
        decay = min(config.weight_average, (1 + state.step) / (10 + state.step))
        for name, average in state.average.items():
            average.lerp_(self.parameters[name].detach(), 1 - decay)
        state.losses.append(loss.item())
        if state.step % config.probe_every == 0 or state.step == config.steps:
            with self.averaged():
                state.probe_losses.append((state.step, self.probe()))
        return state.losses[-1], grad_norm, lr

    def draw(self) -> tuple[Take, Tensor, Tensor, Tensor]:
        """What the step learns from: a take or a window of it, a sample of its posterior, noise and timesteps."""
        config, step = self.config, self.state.step
        take = self.takes[draw_take(config.seed, step, len(self.takes))]
        if config.context_length is not None:
            generator = generator_for(config.seed, "window", step)
            take = take.at(random_window(take.latents.shape[2], config.context_length, generator))
        mean, std = take.latents, take.latents_std
        generator = generator_for(config.seed, "step", step)
        noise = torch.randn(mean.shape, generator=generator).to(self.device)
        posterior = torch.randn(mean.shape, generator=generator).to(self.device)
        total = len(self.scheduler.alphas_cumprod)
        t = draw_timesteps(config.timestep_sampling, config.seed, step, len(mean), total)
        return take, mean if std is None else mean + std * posterior, noise, t

    def differentiated_or_in_less_memory(self, scale: float, *drawn) -> Tensor:
        """`differentiated`, again in the next lower memory mode if the memory runs out.

        Raises:
            OutOfMemory: it runs out there, too, or there is no lower one.
        """
        unet, number = self.unet, self.state.step + 1
        loss = self.differentiated(scale, *drawn)
        if loss is None and unet.memory != MEMORY[-1]:
            release(self.device)
            lower = MEMORY[MEMORY.index(unet.memory) + 1]
            self.tell(Note(f"memory: {lower} from step {number} on, since {unet.memory} ran out of memory", "memory"))
            unet.set_memory(lower)
            loss = self.differentiated(scale, *drawn)
        if loss is None:
            release(self.device)
            self.save()
            lower = "" if unet.memory == MEMORY[-1] else f", {field('memory')} {MEMORY[-1]}"
            remedy = f"use fewer or smaller frames, {field('context_length')}{lower} or {field('dtype')} bf16"
            raise OutOfMemory("memory", unet.memory, f"ran out of memory at step {number}", remedy)
        return loss

    def differentiated(self, scale: float, *drawn) -> Tensor | None:
        """The loss, its gradients (times scale) in the parameters; None, and nothing kept, if the memory runs out."""
        self.optimizer.zero_grad(set_to_none=True)
        try:
            loss = self.loss(*drawn, self.config.loss_weighting)
            if torch.isfinite(loss):
                (loss * scale).backward()
            return loss.detach()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        self.optimizer.zero_grad(set_to_none=True)
        return None  # only here: the error's traceback held the graph

    def failed(self, what: str) -> TavError:
        """The error of a step whose loss or gradient is not finite; the weights are those of the last save."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(self.good[name])
        remedy, dtype = "lower it", self.config.dtype
        remedy += "" if dtype == "fp32" else f", or set {field('dtype')} to fp32 (now {dtype})"
        problem = f"is too much: the {what} at step {self.state.step + 1} is not finite"
        return TavError("learning_rate", self.config.learning_rate, problem, remedy)


def step_memory(unet: VideoUNet, takes: Sequence[Take], config: TuneConfig, memory: str, device: torch.device) -> int:
    """Bytes that a step of the tuning needs on a device in a memory mode, beyond the weights (see `needed_memory`)."""
    parts = takes if config.context_length is None else [take.at(torch.arange(config.context_length)) for take in takes]
    largest = max(parts, key=lambda take: take.latents.numel())
    average = 4 * sum(parameter.numel() for parameter in trainable_parameters(unet).values())
    needed = needed_memory(unet, largest, DTYPES[config.dtype], memory, device)
    return needed + average if config.weight_average else needed


def run_fingerprint(
    unet: VideoUNet, scheduler: SchedulerMixin, takes: Sequence[Take], config: TuneConfig
) -> dict[str, Any]:
    """What must be equal for a run to go on from its state file: name to hash or value."""
    parameters = trainable_parameters(unet)
    options = dataclasses.asdict(config) | {"betas": list(config.betas)}  # as JSON has it
    # without what is off, so that a state from before there was an option goes on
    options = {name: value for name, value in options.items() if name not in _NOT_IN_FINGERPRINT and value is not None
               and (name, value) != ("weight_average", 0)}  # fmt: skip
    labels = [take.condition.class_labels for take in takes if take.condition.class_labels is not None]
    return {
        "latents": hash_tensors(take.latents for take in takes),
        "latents_std": hash_tensors(take.latents_std for take in takes if take.latents_std is not None),
        "encoder_hidden_states": hash_tensors(take.condition.encoder_hidden_states for take in takes),
        **({"class_labels": hash_tensors(labels)} if labels else {}),
        "noise schedule": hash_tensors([scheduler.alphas_cumprod]),
        "prediction_type": scheduler.config.prediction_type,
        "inflation": unet.inflation,
        "trainable parameters": {name: list(parameter.shape) for name, parameter in parameters.items()},
        "initial weights": hash_tensors(parameters.values()),
        **options,
    }
