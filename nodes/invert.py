"""DDIM Inversion: the noise from which a sampler finds back to the clip."""

import comfy.sample
import comfy.samplers
import torch
from comfy_api.latest import io

from .common import clean_latents, hidden_states, report, schema
from .errors import plain_errors
from .inject import without_injection
from .inputs import checked, told
from .native import scheduler_of
from .sampling import InversionSampler, sample_with, sigmas_for

INVERTED_WITH = "tav_inverted_with"  # in a LATENT of inverted noise: the CONDITIONING of its inversion


class DDIMInversion(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="TAVDDIMInversion",
            display_name="DDIM Inversion (Tune-A-Video)",
            description="Finds the noise that carries the structure and motion of a clip. Start a sampler from it, "
                        "with an edited prompt: Video Sampler, or KSampler Advanced with add_noise disabled, at the "
                        "same steps and scheduler.",
            search_aliases=["invert", "unsample", "ddim inverse"],
            hidden=[io.Hidden.unique_id],
            advanced=("measure",),
            inputs=[
                io.Model.Input("model", tooltip="The tuned MODEL."),
                io.Latent.Input("latent", tooltip="The clip, from VAE Encode."),
                io.Conditioning.Input("conditioning",
                                      tooltip="An empty prompt, as in the paper; or the sentence of the clip, which "
                                              "finds back better."),
                io.Int.Input("steps", default=50, min=1, max=1000,
                             tooltip="As many as the sampler will take. The paper: 50."),
                io.Combo.Input("scheduler", options=comfy.samplers.KSampler.SCHEDULERS, default="ddim_uniform",
                               tooltip="The one that the sampler will use. ddim_uniform is that of the paper."),
                io.Boolean.Input("measure", default=True,
                                 tooltip="Samples back without guidance and reports how far from the clip it ends. "
                                         "Takes as long again."),
                io.Sigmas.Input("sigmas", optional=True,
                                tooltip="Noise levels to invert on, in place of steps and scheduler."),
            ],
            outputs=[
                io.Latent.Output(display_name="noise",
                                 tooltip="For Video Sampler, or KSampler Advanced with add_noise disabled."),
                io.Sigmas.Output(display_name="sigmas",
                                 tooltip="The noise levels: for Video Sampler or SamplerCustom."),
                io.Float.Output(display_name="error",
                                tooltip="Reconstruction error: root mean square in units of the latents; -1 if not "
                                        "measured."),
            ],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, scheduler=None) -> bool | str:
        return told(cls, scheduler=scheduler)

    @classmethod
    @checked
    def execute(cls, model, latent, conditioning, steps, scheduler, measure, sigmas=None) -> io.NodeOutput:
        with plain_errors():
            scheduler_of(model)  # raises for a model that this isn't for
            model = without_injection(model)
            clip = clean_latents(model, latent)
            hidden_states(model, conditioning, "conditioning")
            levels = sigmas_for(model, steps, scheduler, sigmas)
            no_noise, clean = torch.zeros_like(latent["samples"]), {"samples": latent["samples"]}
            noise = sample_with(model, InversionSampler(), levels, clean, conditioning, conditioning, 1.0, no_noise)
            error = -1.0
            if measure:
                euler = comfy.samplers.sampler_object("euler")
                back = sample_with(model, euler, levels, {"samples": noise}, conditioning, conditioning, 1.0, no_noise)
                error = (clean_latents(model, {"samples": back}) - clip).square().mean().sqrt().item()
                report(cls, f"reconstruction error {error:.3f}")
        return io.NodeOutput({**latent, "samples": noise, INVERTED_WITH: conditioning}, levels, error)
