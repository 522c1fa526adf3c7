"""Save and Load Inverted Noise: invert once, sample in every graph and on the command line."""

from pathlib import Path

import folder_paths
import torch
from comfy.sd import CLIP
from comfy_api.latest import io
from einops import rearrange
from torch import Tensor

from ..tav_core import TavError
from ..tav_core.ddim import Schedule, from_latents, to_latents
from ..tav_core.limits import LIMITS
from ..tav_core.noise import CAPTION, EMPTY, OTHER, InvertedNoise, read_inversion, write_noise
from ..tav_core.sound import RATES, Sound
from ..tav_core.tuned_weights import halved, weights_fingerprint
from .common import clean_latents, from_images, schema, to_images
from .errors import plain_errors
from .folders import listed, walked
from .inputs import check_name, checked, new_file, told, usable
from .invert import INVERTED_WITH
from .native import scheduler_of, trainable_weights, video_unet
from .sampling import sigmas_for
from .subject import check_images

FOLDER = "noise"  # in the output folder
HIDDEN = "hidden_states"  # in a file, the tensor of a CONDITIONING; the others have the names that they have in it


def encoded(clip: CLIP, text: str) -> list:
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))


class SaveInvertedNoise(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="TAVSaveInvertedNoise",
            display_name="Save Inverted Noise (Tune-A-Video)",
            description=f"Writes what DDIM Inversion found to output/{FOLDER}, as one .safetensors file, for other "
            "graphs and for the command line. Whatever else is connected is in the file as well.",
            search_aliases=["save latent", "keep noise"],
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="The MODEL that DDIM Inversion had."),
                io.Clip.Input("clip", display_name="CLIP", tooltip="Of the same checkpoint: tells what the clip was "
                              "inverted with, its sentence or none."),
                io.Latent.Input("noise", tooltip="From DDIM Inversion."),
                io.Sigmas.Input("sigmas", tooltip="From DDIM Inversion."),
                io.String.Input("prompt", default="", multiline=True, tooltip="What the clip shows."),
                io.String.Input("name", default="my-clip", tooltip="Name of the file; an existing one is replaced. May "
                                "hold a subfolder: skiing/first."),
                io.Mask.Input("subject", optional=True,
                              tooltip="Where the subject is, for regions: from Subject Mask, Word Mask or any other."),
                io.Image.Input("images", optional=True, tooltip="The frames that were encoded. Outside of a region "
                               "the command line gives an edit their pixels."),
                io.Float.Input("fps", optional=True, force_input=True, default=8.0, min=LIMITS["fps"].least,
                               max=LIMITS["fps"].most, tooltip="Frames a second, from Load Video."),
                io.Audio.Input("audio", optional=True, tooltip="What is heard meanwhile, from Load Video."),
            ],
            outputs=[],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, name=None, fps=None) -> bool | str:
        wrong = usable(new_path, name)
        return told(cls, fps=fps) if wrong is True else wrong

    @classmethod
    @checked
    def execute(
        cls, model, clip, noise, sigmas, prompt, name, subject=None, images=None, fps=None, audio=None
    ) -> io.NodeOutput:
        with plain_errors(output="name"), torch.no_grad():
            path, words = new_path(name), prompt.strip()
            if not words:
                raise TavError("prompt", None, "is empty", "write the sentence of the clip")
            if INVERTED_WITH not in noise:
                problem = "doesn't say what the clip was inverted with"
                raise TavError("noise", None, problem, "connect it to DDIM Inversion")
            sigmas = sigmas_for(model, 0, "", sigmas)
            condition = condition_of(noise[INVERTED_WITH])
            latents = to_latents(clean_latents(model, noise).cpu(), sigmas[0])
            if images is not None:
                check_images(images, noise)
            found = InvertedNoise(
                latents, words, subject_of(subject, noise), None if images is None else from_images(images), fps,
                sound_of(audio), weights_fingerprint(halved(trainable_weights(model))), sigmas.float(), condition
            )  # fmt: skip
            known = {CAPTION: words, EMPTY: ""}
            inverted_with = (kind for kind in known if _alike(condition, condition_of(encoded(clip, known[kind]))))
            write_noise(path, found, len(sigmas) - 1, next(inverted_with, OTHER))
        return io.NodeOutput(ui={"text": [f"saved {FOLDER}/{path.relative_to(_root())}"]})


def condition_of(conditioning: list) -> dict[str, Tensor]:
    """The tensors and numbers of a CONDITIONING of one sentence."""
    (hidden, more), *_ = conditioning
    numbers = {name: torch.tensor(value) for name, value in more.items() if isinstance(value, (int, float))}
    tensors = {name: value for name, value in more.items() if isinstance(value, Tensor)}
    return {HIDDEN: hidden, **tensors, **{name: number.float() for name, number in numbers.items()}}


def _alike(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one[HIDDEN].shape == other[HIDDEN].shape and torch.allclose(one[HIDDEN], other[HIDDEN], atol=1e-3)


def subject_of(mask: Tensor | None, noise: dict) -> Tensor | None:
    """A MASK, one or one for each frame, as the file holds it: `1 1 f h w`.

    Raises:
        TavError: it is of another size or number of frames than the clip.
    """
    if mask is None:
        return None
    frames, _, height, width = noise["samples"].shape
    if mask.shape[1:] != (8 * height, 8 * width) or len(mask) not in (1, frames):
        count, h, w = mask.shape
        problem = f"is {count} of {w} x {h} for {frames} frames of {8 * width} x {8 * height}"
        raise TavError("subject", None, problem, "give one mask of the clip's size, or one for each frame")
    return rearrange(mask.expand(frames, -1, -1).float().clamp(0, 1), "f h w -> 1 1 f h w")


def sound_of(audio: dict | None) -> Sound | None:
    if audio is None:
        return None
    samples, rate = audio["waveform"][0], audio["sample_rate"]
    if len(samples) > 2 or rate not in RATES:
        problem = f"has {len(samples)} channels and {rate} samples a second"
        raise TavError("audio", None, problem, "give one or two at a usual rate, such as that of Load Video")
    return Sound(samples, rate)


def _root() -> Path:
    return Path(folder_paths.get_output_directory()).resolve() / FOLDER


def new_path(name: str) -> Path:
    """Where noise of a name is saved. Raises as `new_file`."""
    return new_file(_root(), name)


def choices() -> dict[str, Path]:
    """The safetensors files in the input folder and those that Save Inverted Noise wrote, by name."""
    given, root = Path(folder_paths.get_input_directory()), _root()
    files = {name: given / name for name in listed(given)[0]}
    for folder, names in walked(root):
        paths = [folder / name for name in names]
        files |= {f"{FOLDER}/{path.relative_to(root).as_posix()} [output]": path for path in sorted(paths)}
    return {name: path for name, path in files.items() if path.suffix.lower() == ".safetensors"}


def path_of(file: str) -> Path:
    """The path of a choice.

    Raises:
        TavError: it is none.
    """
    check_name("file", file)
    if (path := choices().get(file)) is None:
        problem = f"is neither in ComfyUI's input folder nor in output/{FOLDER}"
        raise TavError("file", file, problem, "put it there, or choose another one")
    return path


class LoadInvertedNoise(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="TAVLoadInvertedNoise",
            display_name="Load Inverted Noise (Tune-A-Video)",
            description="Loads what Save Inverted Noise or the command line wrote: the clip needn't be inverted again. "
            "What the file doesn't hold comes out empty.",
            search_aliases=["load latent", "open noise"],
            inputs=[
                io.Combo.Input("file", options=list(choices()), tooltip="A .safetensors file in ComfyUI's input folder "
                               f"or in output/{FOLDER}."),
                io.Model.Input("model", tooltip="The tuned MODEL, of the checkpoint and the weights that inverted it."),
                io.Clip.Input("clip", display_name="CLIP", optional=True, tooltip="Of the same checkpoint, for files "
                              "of the command line: they hold words of their inversion, and no CONDITIONING."),
            ],
            outputs=[
                io.Latent.Output(display_name="noise",
                                 tooltip="For Video Sampler, or KSampler Advanced with add_noise disabled."),
                io.Sigmas.Output(display_name="sigmas",
                                 tooltip="The noise levels: for Video Sampler or SamplerCustom."),
                io.Conditioning.Output(display_name="conditioning",
                                       tooltip="What the clip was inverted with: for Attention Injection."),
                io.String.Output(display_name="prompt", tooltip="What the clip shows."),
                io.Mask.Output(display_name="subject", tooltip="Where the subject is: for Attention Injection."),
                io.Image.Output(display_name="images", tooltip="The clip: for Put Back the Clip and Compare."),
                io.Float.Output(display_name="fps", tooltip="Frames a second: for Create Video."),
                io.Audio.Output(display_name="audio", tooltip="What is heard meanwhile: for Create Video."),
            ],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, file=None) -> bool | str:
        return usable(path_of, file)

    @classmethod
    def fingerprint_inputs(cls, file, **_):
        return path_of(file).stat().st_mtime_ns

    @classmethod
    @checked
    def execute(cls, file, model, clip=None) -> io.NodeOutput:
        with plain_errors(noise="file"):
            found, steps, inverted_with = read_inversion(path_of(file))
            channels = video_unet(model).config.in_channels
            if found.latents.shape[1] != channels:
                problem = (
                    f"is of a checkpoint with other latents: {tuple(found.latents.shape)}, not {channels} channels"
                )
                raise TavError("file", file, problem, "connect the MODEL that it was inverted with")
            sigmas = found.sigmas
            if sigmas is None:  # of the command line, whose last level the samplers of a graph take for none
                sigmas = Schedule.of(scheduler_of(model), steps).sigmas
            latents = from_latents(rearrange(found.latents.float(), "1 c f h w -> f c h w"), sigmas[0])
            noise, conditioning = {"samples": model.model.process_latent_out(latents)}, None
            if found.condition:
                numbers = {name: each if each.ndim else each.item() for name, each in found.condition.items()}
                conditioning = [[numbers.pop(HIDDEN), numbers]]
            elif clip is not None and inverted_with != OTHER:
                conditioning = encoded(clip, found.prompt if inverted_with == CAPTION else "")
            if conditioning is not None:
                noise[INVERTED_WITH] = conditioning
        subject = found.subject if found.subject is None else found.subject[0, 0].float()
        images = found.frames if found.frames is None else to_images(found.frames)
        audio = found.sound and {"waveform": found.sound.samples[None], "sample_rate": found.sound.rate}
        return io.NodeOutput(noise, sigmas, conditioning, found.prompt, subject, images, found.fps, audio)
