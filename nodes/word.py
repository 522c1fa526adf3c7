"""Word Mask: where the subject of a clip is, found by the attention that its word gets."""

import torch
from comfy.sd import CLIP
from comfy_api.latest import io
from einops import rearrange

from ..tav_core import TavError
from ..tav_core.subject import SOFTNESS, mask_of_attention, outlined, softened, word_attention, word_places
from .common import clean_latents, from_images, hidden_states, schema
from .errors import plain_errors
from .inject import without_injection
from .inputs import checked, told
from .native import scheduler_of, video_unet, windows_of
from .sampling import InversionSampler, sample_with, sigmas_for
from .subject import check_images


def tokens(clip: CLIP, text: str) -> list[int]:
    """The tokens of a text, from the one that starts it to those that fill it up; -1 for embeddings."""
    chunks = next(iter(clip.tokenize(text).values()))
    return [token if isinstance(token, int) else -1 for chunk in chunks for token, *_ in chunk]


def tokens_of_word(clip: CLIP, word: str) -> list[int]:
    """Those of the word alone."""
    found, end = tokens(clip, word), tokens(clip, "")[1]
    return found[1 : found.index(end)]


class WordMask(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="TAVWordMask",
            display_name="Word Mask (Tune-A-Video)",
            description="Finds the subject of the clip: where its word is looked at, in the cross-attention of an "
            "inversion. Needs no other sentences, but a large checkpoint; for the mini one use Subject Mask.",
            search_aliases=["segment", "cross attention map", "attention mask", "prompt to prompt"],
            advanced=("steps", "softness"),
            inputs=[
                io.Model.Input("model", tooltip="The tuned MODEL."),
                io.Clip.Input("clip", display_name="CLIP", tooltip="The CLIP of the same checkpoint."),
                io.Latent.Input("latent", tooltip="The clip, from VAE Encode."),
                io.Image.Input("images", tooltip="The frames that were encoded: the mask follows the subject's outline "
                               "in them."),
                io.String.Input("sentence", multiline=True, default="", tooltip="What the clip shows."),
                io.String.Input("word", default="", tooltip="The word of the sentence that names the subject; several "
                                "if they follow each other."),
                io.Int.Input("steps", default=10, min=1, max=1000, tooltip="Of the inversion in which it looks."),
                io.Float.Input("threshold", default=0.3, min=0.01, max=0.99, step=0.01, tooltip="Less finds more."),
                io.Int.Input("softness", default=SOFTNESS, min=0, max=512,
                             tooltip="Width of the edge in pixels. 0: a hard one."),
            ],
            outputs=[io.Mask.Output(tooltip="White where the subject is, a mask for each frame.")],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, threshold=None) -> bool | str:
        return told(cls, threshold=threshold)

    @classmethod
    @checked
    def execute(cls, model, clip, latent, images, sentence, word, steps, threshold, softness) -> io.NodeOutput:
        with plain_errors():
            scheduler_of(model)  # raises for a model that this isn't for
            model = without_injection(model)
            if windows_of(model.model_options["transformer_options"]):
                problem = (
                    "sees the clip in Context Windows (Tune-A-Video), but a word is looked for in all of it at once"
                )
                raise TavError("MODEL", None, problem, "use Subject Mask")
            clean_latents(model, latent)
            check_images(images, latent)
            places = word_places(tokens(clip, sentence), tokens_of_word(clip, word), word)
            conditioning = clip.encode_from_tokens_scheduled(clip.tokenize(sentence))
            hidden_states(model, conditioning, "clip")
            no_noise, levels = torch.zeros_like(latent["samples"]), sigmas_for(model, steps, "ddim_uniform", None)
            with word_attention(video_unet(model), places) as maps:
                sample_with(
                    model,
                    InversionSampler(),
                    levels,
                    {"samples": latent["samples"]},
                    conditioning,
                    conditioning,
                    1.0,
                    no_noise,
                )
            mask = mask_of_attention(maps, *latent["samples"].shape[-2:], threshold)
            mask = softened(outlined(mask, from_images(images)), softness)
        return io.NodeOutput(rearrange(mask, "1 1 f h w -> f h w"))
