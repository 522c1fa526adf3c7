"""Passes over a LATENT with ComfyUI's samplers and with those of the method."""

import comfy.sample
import comfy.samplers
import latent_preview
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ..tav_core import TavError
from ..tav_core.ddim import inversion_steps


class InversionSampler(comfy.samplers.Sampler):
    """DDIM inversion (`tav_core.ddim.inversion_steps`) up the noise levels that a DDIM (Euler) sampler walks down."""

    def sample(
        self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False
    ):
        def denoise(x: Tensor, sigma: Tensor) -> Tensor:
            return model_wrap(x, sigma.expand(len(x)), **extra_args)

        for step, (x, x0) in enumerate(inversion_steps(denoise, latent_image, sigmas.flip(0))):
            if callback is not None:
                callback(step, x0, x, len(sigmas) - 1)
        return x


def sigmas_for(model: ModelPatcher, steps: int, scheduler: str, sigmas: Tensor | None) -> Tensor:
    """The noise levels of a sampler, falling to 0.

    Raises:
        TavError: levels that do not fall, or do not end at 0.
    """
    if sigmas is None:
        return comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), scheduler, steps).cpu()
    if len(sigmas) < 2 or not (sigmas.diff() < 0).all() or not sigmas.isfinite().all() or sigmas[-1] != 0:
        raise TavError(
            "sigmas", None, f"({len(sigmas)} values) must fall to 0", "take those of Basic Scheduler with denoise 1"
        )
    return sigmas.cpu()


def sample_with(
    model: ModelPatcher,
    sampler,
    sigmas: Tensor,
    latent: dict,
    positive: list,
    negative: list,
    cfg: float,
    noise: Tensor,
    seed: int | None = None,
) -> Tensor:
    """One pass of a sampler over a LATENT, with progress and preview.

    Raises:
        TavError: a result that isn't finite.
    """
    callback = latent_preview.prepare_callback(model, len(sigmas) - 1)
    samples = comfy.sample.sample_custom(
        model,
        noise,
        cfg,
        sampler,
        sigmas,
        positive,
        negative,
        latent["samples"],
        noise_mask=latent.get("noise_mask"),
        callback=callback,
        seed=seed,
    )
    if not torch.isfinite(samples).all():
        problem = "gives a result that is not finite (NaN)"
        raise TavError("MODEL", None, problem, "run ComfyUI with --force-fp32, or tune at a lower learning_rate")
    return samples
