"""Video Sampler: DDIM from inverted noise with an edited prompt, as in the paper."""

import comfy.sample
import comfy.samplers
import torch
from comfy_api.latest import io

from ..tav_core import TavError
from .common import clean_latents, schema
from .errors import plain_errors
from .inject import has_injection, with_injection
from .inputs import checked, told
from .invert import INVERTED_WITH
from .sampling import sample_with, sigmas_for


class VideoSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="TAVVideoSampler",
            display_name="Video Sampler (Tune-A-Video)",
            description="Draws the edited clip: DDIM with classifier-free guidance, from the noise of DDIM Inversion. "
            "Equal to KSampler Advanced with euler, the same settings and add_noise disabled.",
            search_aliases=["sample video", "edit video", "ddim"],
            advanced=("eta",),
            inputs=[
                io.Model.Input("model", tooltip="The tuned MODEL."),
                io.Conditioning.Input("positive", tooltip="The edited sentence."),
                io.Conditioning.Input("negative", tooltip="What should not be there; an empty prompt in the paper."),
                io.Latent.Input("noise", tooltip="From DDIM Inversion; any LATENT of the right size with add_noise on. "
                                "With a noise mask (Set Latent Noise Mask) the rest of the clip stays as the noise "
                                "reconstructs it."),
                io.Int.Input("steps", default=50, min=1, max=1000, tooltip="As many as were inverted."),
                io.Float.Input("cfg", display_name="CFG", default=12.5, min=1.0, max=100.0, step=0.5,
                               tooltip="Guidance: more follows the prompt more and the clip less. The paper: 12.5."),
                io.Combo.Input("scheduler", options=comfy.samplers.KSampler.SCHEDULERS, default="ddim_uniform",
                               tooltip="The one that was inverted on."),
                io.Float.Input("eta", default=0.0, min=0.0, max=1.0, step=0.05,
                               tooltip="Share of fresh noise in each step: 0 is DDIM and keeps the motion best, 1 is "
                               "DDPM."),
                io.Boolean.Input("add_noise", default=False,
                                 tooltip="Starts from random noise instead: the tuned subject in free motion."),
                io.Int.Input("seed", default=0, min=0, max=2**64 - 1, control_after_generate=True,
                             tooltip="Of the random noise, for eta above 0 and add_noise."),
                io.Sigmas.Input("sigmas", optional=True,
                                tooltip="From DDIM Inversion, in place of steps and scheduler."),
            ],
            outputs=[io.Latent.Output(tooltip="The edited clip, for VAE Decode or an upscaler.")],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, cfg=None, eta=None, scheduler=None) -> bool | str:
        return told(cls, cfg=cfg, eta=eta, scheduler=scheduler)

    @classmethod
    @checked
    def execute(
        cls, model, positive, negative, noise, steps, cfg, scheduler, eta, add_noise, seed, sigmas=None
    ) -> io.NodeOutput:
        with plain_errors():
            clean_latents(model, noise)  # raises for one that isn't a clip
            if noise.get("noise_mask") is not None:
                if add_noise:
                    raise TavError(
                        "noise",
                        None,
                        "has a noise_mask, outside of which the inverted clip stays, but add_noise starts from other "
                        "noise",
                        "turn add_noise off, or leave the mask out",
                    )
                if not has_injection(model):
                    if INVERTED_WITH not in noise:
                        problem = "has a noise_mask, but doesn't say what the clip was inverted with"
                        remedy = "connect noise to DDIM Inversion, or MODEL through Attention Injection"
                        raise TavError("noise", None, problem, remedy)
                    model = with_injection(model, noise[INVERTED_WITH], share=0.0)
            start = dict(noise)
            random = torch.zeros_like(noise["samples"])
            if add_noise:
                start["samples"] = torch.zeros_like(noise["samples"])
                random = comfy.sample.prepare_noise(noise["samples"], seed)
            levels = sigmas_for(model, steps, scheduler, sigmas)
            # in ComfyUI's scale of x, DDIM is Euler's method, and DDIM with eta its ancestral form
            sampler = (
                comfy.samplers.ksampler("euler_ancestral", {"eta": eta})
                if eta
                else comfy.samplers.sampler_object("euler")
            )
            samples = sample_with(model, sampler, levels, start, positive, negative, cfg, random, seed)
        return io.NodeOutput({**noise, "samples": samples})
