"""Subject Mask: where the subject of a clip is, found by sentences about other subjects."""

import comfy.samplers
import torch
from comfy_api.latest import io
from einops import rearrange
from torch import Tensor

from ..tav_core import TavError
from ..tav_core.subject import SOFTNESS, mask_of, outlined, probes, softened
from .common import clean_latents, from_images, hidden_states, schema
from .errors import plain_errors
from .inject import without_injection
from .inputs import checked, told
from .native import scheduler_of
from .sampling import sample_with


class Probe(comfy.samplers.Sampler):
    """Keeps what a model predicts of the clip under the noise of each level, `1 c f h w`."""

    def __init__(self, levels: list[tuple[int, Tensor, Tensor]]):
        self.sigmas = torch.stack([((1 - alpha) / alpha).sqrt() for _, alpha, _ in levels])
        self.noises = [rearrange(noise, "1 c f h w -> f c h w") for _, _, noise in levels]

    def sample(
        self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False
    ):
        self.predictions = []
        for i, (sigma, noise) in enumerate(zip(self.sigmas.to(latent_image), self.noises)):
            denoised = model_wrap(
                latent_image + sigma * noise.to(latent_image), sigma.expand(len(latent_image)), **extra_args
            )
            self.predictions.append(rearrange(denoised.float().cpu(), "f c h w -> 1 c f h w"))
            if callback is not None:
                callback(i, denoised, latent_image, len(self.noises))
        return latent_image


def check_images(images: Tensor, latent: dict):
    """Raises a TavError if these aren't the frames of the LATENT."""
    frames, _, height, width = latent["samples"].shape
    if images.shape[:3] != (frames, 8 * height, 8 * width):
        count, h, w, _ = images.shape
        problem = f"are {count} of {w} x {h}, latent is of {frames} of {8 * width} x {8 * height}"
        raise TavError("images", None, problem, "give the frames that were encoded")


class SubjectMask(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="TAVSubjectMask",
            display_name="Subject Mask (Tune-A-Video)",
            description="Finds the subject of the clip: where the model would draw something else for a sentence about "
            "another subject. Connect it to Attention Injection, so that an edit changes the subject alone, or all but "
            "it.",
            search_aliases=["segment", "word mask", "diffedit", "attention mask"],
            advanced=("softness", "seed"),
            inputs=[
                io.Model.Input("model", tooltip="The tuned MODEL."),
                io.Latent.Input("latent", tooltip="The clip, from VAE Encode."),
                io.Image.Input("images", tooltip="The frames that were encoded: the mask follows the subject's outline "
                               "in them."),
                io.Conditioning.Input("conditioning", tooltip="What the clip shows."),
                io.Conditioning.Input("contrast", tooltip="The same sentence with another subject; better several of "
                                      "them, each with another colour and shape, put together by Conditioning "
                                      "(Combine)."),
                io.Float.Input("threshold", default=0.15, min=0.01, max=0.99, step=0.01, tooltip="Less finds more."),
                io.Int.Input("softness", default=SOFTNESS, min=0, max=512,
                             tooltip="Width of the edge in pixels. 0: a hard one."),
                io.Int.Input("seed", default=0, min=0, max=2**63 - 1, control_after_generate=False,
                             tooltip="Of the noise in which it looks."),
            ],
            outputs=[io.Mask.Output(tooltip="White where the subject is, a mask for each frame.")],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, threshold=None) -> bool | str:
        return told(cls, threshold=threshold)

    @classmethod
    @checked
    def execute(cls, model, latent, images, conditioning, contrast, threshold, softness, seed) -> io.NodeOutput:
        with plain_errors():
            scheduler = scheduler_of(model)  # raises for a model that this isn't for
            model = without_injection(model)
            levels = probes(clean_latents(model, latent), scheduler, seed)
            check_images(images, latent)
            hidden_states(model, conditioning, "conditioning")
            predictions = []
            for sentence in [conditioning, *([other] for other in contrast)]:
                hidden_states(model, sentence, "contrast")
                probe, no_noise = Probe(levels), torch.zeros_like(latent["samples"])
                sigmas = torch.cat([probe.sigmas, torch.zeros(1)])
                sample_with(model, probe, sigmas, {"samples": latent["samples"]}, sentence, sentence, 1.0, no_noise)
                predictions.append(probe.predictions)
            mask = mask_of([torch.cat(level) for level in zip(*predictions)], threshold)
            mask = softened(outlined(mask, from_images(images)), softness)
        return io.NodeOutput(rearrange(mask, "1 1 f h w -> f h w"))
