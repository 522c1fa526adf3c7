"""DDIM sampling and its inversion (Song et al., arXiv 2010.02502) on videos.

Both walk along noise levels sigma in the scale of Karras et al. (arXiv 2206.00364), where a noisy video is
`x = x0 + sigma eps` and DDIM is Euler's method. The literature's latents are `z = x / sqrt(1 + sigma^2)`, and its
signal level alphas_cumprod is `1 / (1 + sigma^2)`. Arithmetic runs in float32, the model in its own dtype.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from diffusers import DDIMScheduler, SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from .condition import Condition, VideoModel, joined, predict
from .control import Control, hints_at
from .errors import TavError
from .events import Callback, DDIMStep, ignored
from .limits import check

if TYPE_CHECKING:
    from .injection import Led, SourceWalk

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


def ddim_timesteps(scheduler: SchedulerMixin, num_steps: int) -> Tensor:
    """The `num_steps` timesteps of DDIM, descending int64, spaced as the configuration of `scheduler` says.

    Raises:
        TavError: a count outside 1 ... num_train_timesteps, a scheduler that is none of a discrete diffusion process
            (DDIM, DDPM, PNDM, Euler, DPM-Solver and so on are), or one that starts in pure noise with epsilon.
    """
    return _ddim(scheduler, num_steps).timesteps


def _ddim(scheduler: SchedulerMixin, num_steps: int) -> DDIMScheduler:
    """A DDIM scheduler with the betas, spacing and prediction type of `scheduler`, set to `num_steps`."""
    if not hasattr(scheduler, "alphas_cumprod"):
        raise TavError("scheduler", type(scheduler).__name__, "has no alphas_cumprod", "use one such as DDIM")
    if (kind := scheduler.config.prediction_type) not in PREDICTION_TYPES:
        raise TavError("prediction_type", kind, "is unknown", f"use one of {', '.join(PREDICTION_TYPES)}")
    total = scheduler.config.num_train_timesteps
    if isinstance(num_steps, bool) or not isinstance(num_steps, int) or not 1 <= num_steps <= total:
        raise TavError("num_steps", num_steps, "is out of range", f"give an integer from 1 to {total}")
    ddim = DDIMScheduler.from_config(scheduler.config, clip_sample=False, thresholding=False)
    ddim.set_timesteps(num_steps)
    if ddim.timesteps.max() >= total:
        raise TavError("num_steps", num_steps, f"runs past timestep {total - 1}", "give a smaller number")
    if kind == "epsilon" and ddim.alphas_cumprod[ddim.timesteps[0]] == 0:
        problem = "tells nothing of a picture in pure noise, where this noise schedule ends"
        raise TavError("prediction_type", kind, problem, "use v_prediction, if that is what the model was trained for")
    return ddim


@dataclass(frozen=True)
class Schedule:
    """The noise levels of a sampling in N steps.

    Attributes:
        timesteps: N, descending.
        sigmas: N + 1, falling; the last is the clean end, that of `final_alpha_cumprod`, which needn't be 0.
        prediction_type: one of `PREDICTION_TYPES`.
    """

    timesteps: list[int]
    sigmas: Tensor
    prediction_type: str

    @classmethod
    def of(cls, scheduler: SchedulerMixin, num_steps: int) -> "Schedule":
        ddim = _ddim(scheduler, num_steps)
        alphas = torch.stack([*ddim.alphas_cumprod[ddim.timesteps], ddim.final_alpha_cumprod]).double()
        alphas = alphas.clamp(min=1e-12)  # where the schedule ends in pure noise, sigma would be infinite
        return cls(ddim.timesteps.tolist(), ((1 - alphas) / alphas).sqrt().float(), ddim.config.prediction_type)

    def denoised(self, unet: VideoModel, x: Tensor, step: int, condition: Condition, **settings: Tensor) -> Tensor:
        """The clean latents that a U-Net sees in `x` at the level of a step, both `b c f h w`."""
        sigma, z = self.sigmas[step], to_latents(x, self.sigmas[step])
        output = predict(unet, z, self.timesteps[step], condition, **settings)
        return to_x0(output, z, sigma, self.prediction_type)


def from_latents(z: Tensor, sigma: Tensor) -> Tensor:
    """Latents at a noise level, in the scale in which the steps are taken."""
    return z * (1 + sigma**2).sqrt()


def to_latents(x: Tensor, sigma: Tensor) -> Tensor:
    return x / (1 + sigma**2).sqrt()


def to_x0(output: Tensor, z: Tensor, sigma: Tensor, prediction_type: str) -> Tensor:
    """The clean latents that a model output for latents `z` stands for, at a noise level.

    z = signal x0 + noise eps and v = signal eps - noise x0 (Salimans & Ho, arXiv 2202.00512).
    """
    signal = 1 / (1 + sigma**2).sqrt()
    noise = sigma * signal
    if prediction_type == "epsilon":
        return (z - noise * output) / signal
    if prediction_type == "v_prediction":
        return signal * z - noise * output
    return output


def ddim_step(
    x: Tensor, x0: Tensor, sigma: Tensor, sigma_next: Tensor, eta: float = 0.0, noise: Tensor | None = None
) -> Tensor:
    """`x` at the level `sigma_next`, less or more noisy than `sigma` (equations 12 and 16 of DDIM).

    `eta` > 0 replaces part of the predicted noise by `noise`, standard normal; only towards less noise.
    """
    eps = (x - x0) / sigma
    if eta == 0:
        return x0 + sigma_next * eps
    fresh = eta * sigma_next * (1 - sigma_next**2 / sigma**2).sqrt()
    return x0 + (sigma_next**2 - fresh**2).sqrt() * eps + fresh * noise


def inversion_steps(
    denoise: Callable[[Tensor, Tensor], Tensor], x: Tensor, sigmas: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """The steps of DDIM inversion (Tune-A-Video, section 3.3), up the levels that a sampler walks down.

    As in the reference implementation the noise of a step is predicted at the level that the step goes to, for the
    latents z of the level below it.

    Args:
        denoise: `(x, sigma) -> x0`.
        x: at the first of the levels.
        sigmas: rising.

    Yields:
        after each step, `x` at its level and the clean latents that it was taken from.
    """
    for low, high in pairwise(sigmas):
        given = from_latents(to_latents(x, low), high)
        eps = (given - denoise(given, high)) / high
        x0 = x - low * eps
        x = x0 + high * eps
        yield x, x0


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance (Ho & Salimans, arXiv 2207.12598).

    Attributes:
        scale: the paper uses 12.5; at most 1 runs the condition alone, at half the cost. Or one for each video.
        rescale: how far the spread of what is predicted is brought back to what it is without guidance, 0 ... 1
            (Lin et al., arXiv 2305.08891, section 3.4): a strong guidance has pale or gaudy pictures otherwise.
        start, end: the shares of the sampling steps between which there is guidance, 0 ... 1 (Kynkäänniemi et al.,
            arXiv 2404.07724): the first decide on the layout, the last draw what is fine.

    Raises:
        TavError: a rescale, start or end outside 0 ... 1, or an end before the start.
    """

    scale: float | Sequence[float] = 7.5
    rescale: float = 0.0
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self):
        check(guidance_rescale=self.rescale, guidance_start=self.start, guidance_end=self.end)
        if self.start > self.end:
            problem = f"is behind guidance_end, which is {self.end:g}"
            raise TavError("guidance_start", self.start, problem, "give a smaller number")

    @property
    def guides(self) -> bool:
        """Whether there is any."""
        return bool((torch.as_tensor(self.scale) > 1).any())

    def acts(self, step: int, num_steps: int) -> bool:
        """Whether a step, 0 ... `num_steps` - 1, is guided."""
        return self.guides and round(self.start * num_steps) <= step < round(self.end * num_steps)

    def __call__(self, x0: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        """The clean latents that `x` is guided to at a level.

        Args:
            x0: as they are seen with the negative prompt, and behind it with the condition, `(2 b) c f h w`.
            x: `b c f h w`.
        """
        negative, positive = x0.chunk(2)
        scale = torch.as_tensor(self.scale, dtype=x0.dtype, device=x0.device).reshape(-1, 1, 1, 1, 1)  # 1 or b
        guided = negative + scale.clamp(min=1) * (positive - negative)
        if self.rescale == 0:
            return guided
        # the spread is that of v, which is (z signal - x0) / noise: the same whatever the model predicts
        centre = x / (1 + sigma**2)
        of_v, wanted = guided - centre, positive - centre
        spread, wanted = (v.std(dim=(1, 2, 3, 4), keepdim=True) for v in (of_v, wanted))
        return centre + of_v * torch.lerp(torch.ones_like(spread), wanted / spread, self.rescale)


@torch.no_grad()
def ddim_invert(
    unet: VideoModel,
    latents: Tensor,
    condition: Tensor | Condition,
    scheduler: SchedulerMixin,
    num_steps: int,
    *,
    return_trajectory: bool = False,
    callback: Callback = ignored,
) -> Tensor:
    """Noise from which `ddim_sample` with as many steps, without guidance, finds back to `latents`.

    Args:
        unet: see `VideoModel`.
        latents: clean latents `b c f h w`.
        condition: what to invert with, in the paper the empty prompt; its embedding alone will do.
        scheduler: any discrete diffusers scheduler; read, never changed.
        num_steps: 1 ... num_train_timesteps.
        callback: gets a `DDIMStep` of stage "invert" after every step; raises to stop.

    Returns:
        float32 `b c f h w`, or with `return_trajectory` every stage from `latents` on, `(N+1) b c f h w`.

    Raises:
        TavError: see `ddim_timesteps` and `VideoUNet.forward`.
    """
    schedule, condition = Schedule.of(scheduler, num_steps), Condition.of(condition)
    latents = latents.float().contiguous()  # kernels round by layout: noise from a file must give the same video
    sigmas, timesteps = schedule.sigmas.flip(0), schedule.timesteps[::-1]
    trajectory, step = [latents], 0

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        return schedule.denoised(unet, x, num_steps - step - 1, condition)

    for x, x0 in inversion_steps(denoise, from_latents(latents, sigmas[0]), sigmas):
        step += 1
        z = to_latents(x, sigmas[step])
        if return_trajectory:
            trajectory.append(z)
        callback(DDIMStep("invert", step, num_steps, timesteps[step - 1], z, x0))
    return torch.stack(trajectory) if return_trajectory else z


@torch.no_grad()
def ddim_sample(
    unet: VideoModel,
    latents: Tensor,
    condition: Tensor | Condition,
    scheduler: SchedulerMixin,
    num_steps: int,
    *,
    guidance_scale: float | Sequence[float] = 7.5,
    guidance_rescale: float = 0.0,
    guidance_start: float = 0.0,
    guidance_end: float = 1.0,
    negative_hidden_states: Tensor | Condition | None = None,
    source_walk: "SourceWalk | None" = None,
    source_hidden_states: Tensor | Condition | None = None,
    controls: Sequence[Control] = (),
    eta: float = 0.0,
    generator: torch.Generator | list[torch.Generator] | None = None,
    callback: Callback = ignored,
) -> Tensor:
    """Denoise `latents` to a clean video with classifier-free guidance (Ho & Salimans, arXiv 2207.12598).

    Args:
        unet, condition, scheduler, num_steps: as in `ddim_invert`.
        latents: noise, `b c f h w`; random or from `ddim_invert`.
        guidance_scale, guidance_rescale, guidance_start, guidance_end: see `Guidance`.
        negative_hidden_states: the negative (or empty) prompt, of any length; labels by default as there.
        source_walk: takes the source clip back beside the edit, from the same noise without guidance, and lets it lead
            the edit's attention or hold a part of it (see `injection`); needs a model with a `frame_context`. Of a walk
            beside several edits, `latents` are the clips' noise that many times over.
        source_hidden_states: what the source clip was inverted with, for `source_walk`.
        controls: hints for the edit, those of the ControlNets of a `ControlledUNet`.
        eta: 0 (DDIM) to 1 (DDPM) share of fresh noise, drawn from `generator`, which may be one for each video.
        callback: as in `ddim_invert`, with stage "sample".

    Returns:
        float32 `b c f h w`.

    Raises:
        TavError: guidance out of range or without `negative_hidden_states`, a walk without `source_hidden_states`, an
            eta outside 0 ... 1, texts of several widths; see also `ddim_invert`.
    """
    guidance = Guidance(guidance_scale, guidance_rescale, guidance_start, guidance_end)
    if guidance.guides and negative_hidden_states is None:
        raise TavError("guidance_scale", guidance_scale, "needs negative_hidden_states", "pass it or set 1")
    if not 0 <= eta <= 1:
        raise TavError("eta", eta, "is out of range", "give a number from 0 to 1")
    if source_walk is not None and source_hidden_states is None:
        raise TavError("source_walk", None, "needs source_hidden_states", "pass it or leave it out")
    schedule, condition = Schedule.of(scheduler, num_steps), Condition.of(condition)
    prompts, source = {"condition": condition}, None
    if guidance.guides:
        prompts = {"negative_hidden_states": Condition.of(negative_hidden_states).or_labels_of(condition), **prompts}
    if source_walk is not None:
        source_walk.begin()
        source = Condition.of(source_hidden_states).or_labels_of(condition)
    denoise = _edit_denoiser(unet, schedule, latents.shape, prompts, guidance, source_walk, source, controls)
    x = from_latents(latents.float().contiguous(), schedule.sigmas[0])
    for step, (sigma, lower) in enumerate(pairwise(schedule.sigmas)):
        x0 = denoise(x, step)
        noise = randn_tensor(x.shape, generator, x.device, x.dtype) if eta > 0 else None
        x = ddim_step(x, x0, sigma, lower, eta, noise)
        if source_walk is not None:
            x = source_walk.held(x, lower)
        z = to_latents(x, lower)
        callback(DDIMStep("sample", step + 1, num_steps, schedule.timesteps[step], z, x0))
    return to_latents(x, schedule.sigmas[-1])


def _edit_denoiser(
    unet: VideoModel,
    schedule: Schedule,
    shape: torch.Size,
    prompts: Mapping[str, Condition],
    guidance: Guidance,
    source_walk: "SourceWalk | None",
    source: Condition | None,
    controls: Sequence[Control],
) -> Callable[[Tensor, int], Tensor]:
    """What a U-Net sees in an edit at a step, `(x, step) -> x0`: under guidance, and beside the source where it walks.

    Args:
        shape: `b c f h w` of the edit.
        prompts: the condition, behind the negative one where there is guidance; names are for errors.
    """
    b, _, f, _, _ = shape
    walks = source_walk is not None and (source_walk.share > 0 or source_walk.holds)
    clips = b // source_walk.edits if walks else 0

    @cache
    def texts(guided: bool, with_source: bool) -> Condition:
        used = {name: (told, b) for name, told in prompts.items() if guided or name == "condition"}
        return joined({"source_hidden_states": (source, clips), **used} if with_source else used, f)

    texts(len(prompts) > 1, walks)  # what doesn't go together is told at once

    def denoise(x: Tensor, step: int) -> Tensor:
        guided = len(prompts) > 1 and guidance.acts(step, len(schedule.timesteps))

        def ask(x: Tensor, led: "Led | None") -> Tensor:
            sources, hints = 0 if led is None else clips, {}
            if controls:
                hints = hints_at(controls, step, len(schedule.timesteps), len(x), sources, f)
            if led is None:
                return schedule.denoised(unet, x, step, texts(guided, False), **hints)
            with unet.frame_context.running(sources=led.sources):
                return schedule.denoised(unet, x, step, texts(guided, True), **led.keywords, **hints)

        videos, sigma = torch.cat([x] * (1 + guided)), schedule.sigmas[step]
        x0 = source_walk(ask, videos, sigma, schedule.sigmas, 1 + guided) if walks else ask(videos, None)
        return guidance(x0, x, sigma) if guided else x0

    return denoise
