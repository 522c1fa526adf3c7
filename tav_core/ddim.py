"""DDIM sampling and its inversion (Song et al., arXiv 2010.02502) on videos.

A schedule is a list of timesteps t_1 < ... < t_N with signal levels alpha(t_i) = alphas_cumprod[t_i]; below
t_1 lies the clean end, with `final_alpha_cumprod`. Arithmetic runs in float32, the model in its own dtype.
"""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import DDIMScheduler, SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from einops import rearrange
from torch import Tensor

from .attention import ANCHORED
from .condition import labelled, per_frame, predict
from .errors import TavError
from .steady import steadied

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
Callback = Callable[[dict[str, Any]], None]


def ddim_timesteps(scheduler: SchedulerMixin, num_steps: int) -> Tensor:
    """The `num_steps` timesteps of DDIM, descending int64, spaced as the configuration of `scheduler` says.

    Raises:
        TavError: a count outside 1 ... num_train_timesteps, or a scheduler that is none of a discrete
            diffusion process (DDIM, DDPM, PNDM, Euler, DPM-Solver and so on are).
    """
    return _ddim(scheduler, num_steps).timesteps


def _ddim(scheduler: SchedulerMixin, num_steps: int) -> DDIMScheduler:
    """A DDIM scheduler with the betas, spacing and prediction type of `scheduler`, set to `num_steps`."""
    if not hasattr(scheduler, "alphas_cumprod"):
        raise TavError(f"scheduler={type(scheduler).__name__} has no alphas_cumprod; use one such as DDIM")
    if scheduler.config.prediction_type not in PREDICTION_TYPES:
        known = ", ".join(PREDICTION_TYPES)
        raise TavError(f"prediction_type={scheduler.config.prediction_type!r} is unknown; use one of {known}")
    total = scheduler.config.num_train_timesteps
    if isinstance(num_steps, bool) or not isinstance(num_steps, int) or not 1 <= num_steps <= total:
        raise TavError(f"num_steps={num_steps!r} is out of range; give an integer from 1 to {total}")
    ddim = DDIMScheduler.from_config(scheduler.config, clip_sample=False, thresholding=False)
    ddim.set_timesteps(num_steps)
    if ddim.timesteps.max() >= total:
        raise TavError(f"num_steps={num_steps} runs past timestep {total - 1}; give a smaller number")
    return ddim


def to_eps_x0(output: Tensor, x: Tensor, alpha: Tensor, prediction_type: str) -> tuple[Tensor, Tensor]:
    """Noise and clean sample that a model output stands for, at signal level `alpha` (alphas_cumprod).

    x = sqrt(alpha) x0 + sqrt(1 - alpha) eps and v = sqrt(alpha) eps - sqrt(1 - alpha) x0
    (Salimans & Ho, arXiv 2202.00512).
    """
    signal, noise = alpha.sqrt(), (1 - alpha).sqrt()
    if prediction_type == "epsilon":
        return output, (x - noise * output) / signal
    if prediction_type == "v_prediction":
        return signal * output + noise * x, signal * x - noise * output
    return (x - signal * output) / noise, output


def ddim_step(
    x0: Tensor, eps: Tensor, alpha: Tensor, alpha_next: Tensor, eta: float = 0.0, noise: Tensor | None = None
) -> Tensor:
    """The sample at level `alpha_next`, less or more noisy than `alpha` (equations 12 and 16 of DDIM).

    `eta` > 0 replaces part of the predicted noise by `noise`, standard normal; only towards less noise.
    """
    if eta == 0:
        return alpha_next.sqrt() * x0 + (1 - alpha_next).sqrt() * eps
    sigma = eta * ((1 - alpha_next) / (1 - alpha) * (1 - alpha / alpha_next)).sqrt()
    return alpha_next.sqrt() * x0 + (1 - alpha_next - sigma**2).sqrt() * eps + sigma * noise


def _schedule(scheduler: SchedulerMixin, num_steps: int) -> tuple[list[int], list[Tensor], str]:
    """Ascending timesteps, the levels below and at each of them (N + 1), and the prediction type."""
    ddim = _ddim(scheduler, num_steps)
    timesteps = ddim.timesteps.tolist()[::-1]
    levels = [ddim.final_alpha_cumprod.float(), *ddim.alphas_cumprod.float()[timesteps]]
    return timesteps, levels, ddim.config.prediction_type


@torch.no_grad()
def ddim_invert(
    unet: Callable,
    latents: Tensor,
    encoder_hidden_states: Tensor,
    scheduler: SchedulerMixin,
    num_steps: int,
    return_trajectory: bool = False,
    callback: Callback | None = None,
    class_labels: Tensor | None = None,
) -> Tensor:
    """Noise from which `ddim_sample` with as many steps, without guidance, finds back to `latents`.

    Tune-A-Video, section 3.3. As in the reference implementation the noise of a step is predicted at the
    timestep that the step goes to, and the first step starts from `final_alpha_cumprod`.

    Args:
        unet: `(b c f h w, t, text) -> b c f h w`, with a `dtype`; see `inflate`.
        latents: clean latents `b c f h w`.
        encoder_hidden_states: embedding of the empty prompt, `1 n d`, `b n d` or `(b f) n d`.
        scheduler: any discrete diffusers scheduler; read, never changed.
        num_steps: 1 ... num_train_timesteps.
        callback: called after every step with a dict of stage "invert", step (from 1), total, timestep,
            latents and pred_x0; raises to stop.
        class_labels: of the clip, `1`, `b` or `(b f)`, where the U-Net has classes.

    Returns:
        float32 `b c f h w`, or with `return_trajectory` every stage from `latents` on, `(N+1) b c f h w`.

    Raises:
        TavError: see `ddim_timesteps` and `VideoUNet.forward`.
    """
    timesteps, levels, prediction_type = _schedule(scheduler, num_steps)
    x = latents.float().contiguous()  # kernels round by layout: noise from a file must give the same video
    trajectory = [x]
    for i, t in enumerate(timesteps):
        output = predict(unet, x, t, encoder_hidden_states, **labelled(class_labels))
        # the output belongs to the level it is predicted for, although x is still one level below
        eps, _ = to_eps_x0(output, x, levels[i + 1], prediction_type)
        x0 = (x - (1 - levels[i]).sqrt() * eps) / levels[i].sqrt()
        x = ddim_step(x0, eps, levels[i], levels[i + 1])
        if return_trajectory:
            trajectory.append(x)
        if callback is not None:
            callback(_progress("invert", i + 1, num_steps, t, x, x0))
    return torch.stack(trajectory) if return_trajectory else x


@torch.no_grad()
def ddim_sample(
    unet: Callable,
    latents: Tensor,
    encoder_hidden_states: Tensor,
    scheduler: SchedulerMixin,
    num_steps: int,
    guidance_scale: float = 7.5,
    negative_hidden_states: Tensor | None = None,
    eta: float = 0.0,
    generator: torch.Generator | None = None,
    callback: Callback | None = None,
    attention_injection: float = 0.0,
    source_hidden_states: Tensor | None = None,
    region: Tensor | None = None,
    anchor: Tensor | None = None,
    still: Tensor | None = None,
    class_labels: Tensor | None = None,
    negative_class_labels: Tensor | None = None,
    source_class_labels: Tensor | None = None,
    return_source: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Denoise `latents` to a clean video with classifier-free guidance (Ho & Salimans, arXiv 2207.12598).

    Args:
        unet: `(b c f h w, t, text) -> b c f h w`, with a `dtype`; see `inflate`.
        latents: noise, `b c f h w`; random or from `ddim_invert`.
        encoder_hidden_states: embedding of the prompt, `1 n d`, `b n d` or `(b f) n d`.
        scheduler: any discrete diffusers scheduler; read, never changed.
        num_steps: 1 ... num_train_timesteps.
        guidance_scale: the paper uses 12.5; at most 1 runs the prompt alone, at half the cost.
        negative_hidden_states: embedding of the negative (or empty) prompt, as long as the prompt's.
        eta: 0 (DDIM) to 1 (DDPM) share of fresh noise, drawn from `generator`.
        callback: as in `ddim_invert`, with stage "sample".
        attention_injection: share of the steps, from the first on, in which a second walk from the same noise,
            without guidance back to the source clip, leads the attention (see `attention`); needs a `VideoUNet`.
        source_hidden_states: embedding that the source clip was inverted with, for the attention injection, `region` and `still`.
        region: what the edit may change, 0 ... 1, `b 1 f h w`. A step goes towards the blend of the clean latents that
            the two walks predict, `lerp(x0_source, x0, region)`; where it is 0, the source's walk is taken as it is.
        anchor: where the clip's features lead as well in the first two thirds of these steps, 0 ... 1, `b 1 f h w`:
            keeps the subject in its place.
        still: where the edit stands still if the clip does, 0 ... 1, `b 1 f h w` (see `steady`).
        class_labels: of the video, `1`, `b` or `(b f)`, where the U-Net has classes.
        negative_class_labels: those beside the negative prompt, the label for no class if the U-Net has one; by default
            `class_labels`.
        source_class_labels: those that the source clip was inverted with; by default `class_labels`.

    Returns:
        float32 `b c f h w`, or with `return_source` and a region also what the source's walk ends in.

    Raises:
        TavError: guidance without `negative_hidden_states`, injection without `source_hidden_states`, an eta or
            attention_injection outside 0 ... 1; see also `ddim_invert`.
    """
    timesteps, levels, prediction_type = _schedule(scheduler, num_steps)
    guided = guidance_scale > 1
    if guided and negative_hidden_states is None:
        raise TavError(f"guidance_scale={guidance_scale} needs negative_hidden_states; pass it or set 1")
    for name, value in (("eta", eta), ("attention_injection", attention_injection)):
        if not 0 <= value <= 1:
            raise TavError(f"{name}={value} is out of range; give a number from 0 to 1")
    injected_steps = round(attention_injection * num_steps)
    walks = region is not None or still is not None
    walking_steps = num_steps if walks else injected_steps
    if walking_steps and source_hidden_states is None:
        asks = (
            f"attention_injection={attention_injection}" if not walks else "region" if region is not None else "still"
        )
        raise TavError(f"{asks} needs source_hidden_states; pass it or leave it out")

    b, _, f, _, _ = latents.shape
    texts = {"source_hidden_states": source_hidden_states, "negative_hidden_states": negative_hidden_states,
             "encoder_hidden_states": encoder_hidden_states}  # fmt: skip
    used = [bool(walking_steps), guided, True]
    rows = [per_frame(name, text, b, f) for (name, text), use in zip(texts.items(), used) if use]
    if len({row.shape for row in rows}) > 1:
        shapes = ", ".join(f"{name} {text.shape[1]}" for (name, text), use in zip(texts.items(), used) if use)
        raise TavError(f"the texts differ in their number of tokens ({shapes}); pad them to one length")
    if anchor is not None:  # for every row, one mask a frame
        anchor = rearrange(
            anchor.expand(b, 1, *latents.shape[2:]).repeat(len(rows), 1, 1, 1, 1), "b c f h w -> (b f) c h w"
        )
    beside_text, text = torch.cat(rows), torch.cat(rows[bool(walking_steps) :])
    beside_labels = labels = {}
    if class_labels is not None:
        given = {
            "source_class_labels": source_class_labels,
            "negative_class_labels": negative_class_labels,
            "class_labels": class_labels,
        }
        rows = [
            per_frame(name, class_labels if own is None else own, b, f)
            for (name, own), use in zip(given.items(), used)
            if use
        ]
        beside_labels, labels = labelled(torch.cat(rows)), labelled(torch.cat(rows[bool(walking_steps) :]))

    x = latents.float().contiguous()
    source = x
    for i, t in reversed(list(enumerate(timesteps))):
        videos = [x, x] if guided else [x]
        if num_steps - i <= walking_steps:
            leads = num_steps - i <= injected_steps
            holds = anchor is not None and num_steps - i <= round(ANCHORED * injected_steps)
            settings = {"anchor": anchor} if holds else {}
            with unet.frame_context.led_by(b if leads else 0):
                output = predict(unet, torch.cat([source, *videos]), t, beside_text, **settings, **beside_labels)
            source_output, *outputs = output.split(b)
            source_eps, source_x0 = to_eps_x0(source_output, source, levels[i + 1], prediction_type)
            source = ddim_step(source_x0, source_eps, levels[i + 1], levels[i])
        else:
            outputs = predict(unet, torch.cat(videos), t, text, **labels).split(b)
        output = outputs[-1]
        if guided:
            negative, positive = outputs
            output = negative + guidance_scale * (positive - negative)
        eps, x0 = to_eps_x0(output, x, levels[i + 1], prediction_type)
        if still is not None:
            x0 = steadied(x0, source_x0, still)
        if region is not None:
            x0 = torch.lerp(source_x0, x0, region)
        if walks:
            eps = (x - levels[i + 1].sqrt() * x0) / (1 - levels[i + 1]).sqrt()
        noise = randn_tensor(x.shape, generator, x.device, x.dtype) if eta > 0 else None
        x = ddim_step(x0, eps, levels[i + 1], levels[i], eta, noise)
        if region is not None:
            x = torch.where(region > 0, x, source)  # no rounding, no fresh noise
        if callback is not None:
            callback(_progress("sample", num_steps - i, num_steps, t, x, x0))
    return (x, source) if return_source else x


def _progress(stage: str, step: int, total: int, t: int, x: Tensor, x0: Tensor) -> dict[str, Any]:
    return {"stage": stage, "step": step, "total": total, "timestep": t, "latents": x, "pred_x0": x0}
