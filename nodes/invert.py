"""DDIM Inversion: the noise from which a sampler finds back to the clip."""

import comfy.sample
import comfy.samplers
import latent_preview
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io
from torch import Tensor

from ..tav_core import TavError
from .common import clean_latents, hidden_states, plain_errors, report, schema
from .inject import without_injection
from .native import scheduler_of

INVERTED_WITH = "tav_inverted_with"  # in a LATENT of inverted noise: the CONDITIONING of its inversion


class InversionSampler(comfy.samplers.Sampler):
    """Walks up the noise levels that a DDIM (Euler) sampler walks down (paper, section 3.3).

    ComfyUI's x is z sqrt(1 + sigma^2), with the z of the literature. As in the reference implementation, the noise of
    a step is predicted at the level that the step goes to, from the z below it.
    """

    def sample(
        self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False
    ):
        x, levels = latent_image, sigmas.flip(0)
        for i, (low, high) in enumerate(zip(levels, levels[1:])):
            given = x * ((1 + high**2) / (1 + low**2)).sqrt()  # the same z, on the level above
            denoised = model_wrap(given, high.expand(len(x)), **extra_args)
            x = x + (high - low) * (given - denoised) / high
            if callback is not None:
                callback(i, denoised, x, len(levels) - 1)
        return x


def sigmas_for(model: ModelPatcher, steps: int, scheduler: str, sigmas: Tensor | None) -> Tensor:
    """The noise levels of a sampler, falling to 0.

    Raises:
        TavError: levels that do not fall, or do not end at 0.
    """
    if sigmas is None:
        return comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), scheduler, steps).cpu()
    if len(sigmas) < 2 or (sigmas.diff() >= 0).any() or sigmas[-1] != 0:
        raise TavError(f"sigmas ({len(sigmas)} values) must fall to 0; take those of Basic Scheduler with denoise 1")
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
        raise TavError(
            "the result is not finite (NaN); run ComfyUI with --force-fp32, or tune at a lower learning_rate"
        )
    return samples


class DDIMInversion(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="TAVDDIMInversion",
            display_name="DDIM Inversion (Tune-A-Video)",
            description="Finds the noise that carries the structure and motion of a clip. Start a sampler from it, with an "
            "edited prompt: Video Sampler, or KSampler Advanced with add_noise disabled, at the same steps and scheduler.",
            search_aliases=["invert", "unsample", "ddim inverse"],
            hidden=[io.Hidden.unique_id],
            advanced=("measure",),
            inputs=[
                io.Model.Input("model", tooltip="The tuned MODEL."),
                io.Latent.Input("latent", tooltip="The clip, from VAE Encode."),
                io.Conditioning.Input("conditioning", tooltip="An empty prompt, as in the paper; or the sentence of the clip, which finds back better."),
                io.Int.Input("steps", default=50, min=1, max=1000, tooltip="As many as the sampler will take. The paper: 50."),
                io.Combo.Input("scheduler", options=comfy.samplers.KSampler.SCHEDULERS, default="ddim_uniform",
                               tooltip="The one that the sampler will use. ddim_uniform is that of the paper."),
                io.Boolean.Input("measure", default=True,
                                 tooltip="Samples back without guidance and reports how far from the clip it ends. Takes as long again."),
                io.Sigmas.Input("sigmas", optional=True, tooltip="Noise levels to invert on, in place of steps and scheduler."),
            ],
            outputs=[
                io.Latent.Output(display_name="noise", tooltip="For Video Sampler, or KSampler Advanced with add_noise disabled."),
                io.Sigmas.Output(display_name="sigmas", tooltip="The noise levels: for Video Sampler or SamplerCustom."),
                io.Float.Output(display_name="error", tooltip="Reconstruction error: root mean square in units of the latents; -1 if not measured."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, model, latent, conditioning, steps, scheduler, measure, sigmas=None) -> io.NodeOutput:
        with plain_errors():
            scheduler_of(model)  # raises for a model that this isn't for
            model = without_injection(model)
            clip = clean_latents(model, latent)
            hidden_states(model, conditioning, "conditioning")
            levels = sigmas_for(model, steps, scheduler, sigmas)
            still, clean = torch.zeros_like(latent["samples"]), {"samples": latent["samples"]}
            noise = sample_with(model, InversionSampler(), levels, clean, conditioning, conditioning, 1.0, still)
            error = -1.0
            if measure:
                euler = comfy.samplers.sampler_object("euler")
                back = sample_with(model, euler, levels, {"samples": noise}, conditioning, conditioning, 1.0, still)
                error = (clean_latents(model, {"samples": back}) - clip).square().mean().sqrt().item()
                report(cls, f"reconstruction error {error:.3f}")
        return io.NodeOutput({**latent, "samples": noise, INVERTED_WITH: conditioning}, levels, error)
