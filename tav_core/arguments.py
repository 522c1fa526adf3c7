"""The options of the commands, and what kind of value each takes."""

import argparse
import os
import re
import warnings
from pathlib import Path
from typing import NamedTuple

import torch

from .attention import MODES
from .checkpoint import SD_PREDICTION_TYPES
from .errors import escaped, shortened
from .inflation import NORMS
from .injection import REGIONS
from .limits import LIMITS
from .subject import SOFTNESS
from .terminal import add_preset_arguments
from .video import FITS

FRAMES = 8  # where nothing else says how many
SWEEPS = dict.fromkeys(("guidance_scale", "attention_injection"), "several for a grid of edits")


# ------------------------------------------------------------------------------------------------ kinds of values


def _refused(text: str, problem: str, remedy: str) -> argparse.ArgumentTypeError:
    shown = escaped(shortened(text, 120)) or "''"
    return argparse.ArgumentTypeError(f"{shown} {problem}; {remedy}")


def sentence(text: str) -> str:
    """Any text that can be written to a file; Python keeps bytes that are no UTF-8 as halves of characters."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _refused(text, "is not UTF-8", "give it in the encoding of your terminal, UTF-8") from None
    if len(text) > 10_000:
        raise _refused(text, f"has {len(text)} characters", "give one sentence")
    return text


def path(text: str) -> Path:
    """A path that may be one, whether anything is there or not."""
    try:
        text.encode()
        os.stat(text)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except UnicodeEncodeError:  # libraries don't take it
        raise _refused(text, "has a name that is not UTF-8", "rename it, or choose another one") from None
    except OSError as error:
        raise _refused(text, f"can't be used ({error.strerror})", "choose another one") from error
    if not text.strip():
        raise _refused(text, "is no path", "give one")
    return Path(text)


def checkpoint(text: str) -> str:
    return str(path(text))


def size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([0-9]{1,9})(?:x([0-9]{1,9}))?", text)
    if not match:
        raise _refused(text, "is no size", "give 512 or 512x320 (width x height)")
    width, height = int(match[1]), int(match[2] or match[1])
    if width not in LIMITS["width"] or height not in LIMITS["height"]:
        raise _refused(text, "is out of range", f"give sides from {LIMITS['width'].least} to {LIMITS['width'].most}")
    return width, height


class LoraFile(NamedTuple):
    """Of --lora; as text what it was given as."""

    name: str
    strength: float

    def __str__(self) -> str:
        return f"{self.name}:{self.strength:g}"


def lora(text: str) -> LoraFile:
    name, colon, number = text.rpartition(":")
    if not colon or not name or not re.fullmatch(r"\s*[-+.\d][-+.\de]*\s*", number):
        return LoraFile(str(path(text)), 1.0)
    return LoraFile(str(path(name)), LIMITS["lora_strength"](number))


def device(text: str) -> torch.device:
    """One that computes here: that of tensors without content doesn't."""
    try:
        with warnings.catch_warnings():  # of kinds that there used to be
            warnings.simplefilter("ignore")
            made = torch.device(text)
        (torch.ones(1, device=made) + 1).item()
        if made.type == "cpu" and made.index:
            raise RuntimeError("there is one alone")
    except (RuntimeError, AssertionError, ImportError) as error:  # torch built without CUDA asserts
        raise _refused(text, f"can't be used here ({str(error).splitlines()[0]})", "choose cpu or cuda") from error
    return made


# ------------------------------------------------------------------------------------------------------- groups


def _number(of: argparse._ActionsContainer, option: str, limits: str, metavar: str = "N", **kwargs):
    of.add_argument(option, type=LIMITS[limits], metavar=metavar, **kwargs)


def model_arguments(parser, computes: bool = True):
    parser.add_argument(
        "--checkpoint",
        type=checkpoint,
        metavar="NAME",
        help="a .safetensors file of SD 1.x or 2.x, a diffusers folder (also of a published Tune-A-Video model), a "
        'name in the lists of --comfyui or in the Hugging Face cache, or "mini", which knows its small world alone',
    )
    group = parser.add_argument_group("model")
    told = "a ComfyUI, whose checkpoints can be given by name (that of the environment variable COMFYUI_PATH)"
    group.add_argument("--comfyui", type=path, metavar="DIR", help=told)
    told = "what the checkpoint predicts, where neither its folder nor its file tells right"
    group.add_argument("--prediction-type", choices=SD_PREDICTION_TYPES, help=told)
    if computes:
        device_argument(group)
    told = (
        "a LoRA (or LoHa, LoKr, DoRA) for the checkpoint, also for its tuning, a .safetensors file or a name in the "
        "lists of --comfyui, and how strong it is (1); several times for several; mini-neon is one for the mini "
        "checkpoint"
    )
    group.add_argument("--lora", action="append", type=lora, metavar="FILE[:STRENGTH]", help=told)
    told = "a textual inversion, likewise; its file's name is the word for it in sentences; several times for several"
    group.add_argument("--embedding", action="append", type=path, metavar="FILE", help=told)
    if computes:
        told = "(word:1.2) in a sentence weighs a word, as in ComfyUI; without it parentheses are read as they stand"
        group.add_argument("--prompt-weights", action="store_true", help=told)


def device_argument(group):
    default = "cuda" if torch.cuda.is_available() else "cpu"
    group.add_argument("--device", type=device, default=default, help="cpu, cuda, cuda:1, mps ... (cuda where there is "
                                                                      "one)")  # fmt: skip


def run_arguments(parser, config: bool = False):
    group = parser.add_argument_group("run")
    if config:
        told = "options from a file, YAML or JSON: that of a summary.json makes its run again; options given here win"
        group.add_argument("--config", type=path, metavar="FILE", help=told)
    group.add_argument("--quiet", action="store_true", help="no progress, no notes: results and errors alone")
    _number(group, "--threads", "threads", help="threads of the CPU (all)")


def video_arguments(parser, frames: int | None = FRAMES, several: bool = False):
    takes = "; several times, each with its --prompt, to learn from several takes" if several else ""
    parser.add_argument(
        "--video",
        required=True,
        type=path,
        metavar="FILE",
        action="append" if several else "store",
        help=f"mp4, webm or gif, or a folder of images{takes}",
    )
    group = parser.add_argument_group("video")
    _number(group, "--start", "start", default=0, help="first frame to take (0)")
    _number(group, "--stride", "stride", default=1, help="take every N-th frame (1)")
    told = f"how many frames ({frames or 'as tuned'}; 8 to 32 are usual)"
    _number(group, "--frames", "count", default=frames, help=told)
    told = f"size to work at ({'the size of the checkpoint' if frames else 'as tuned'})"
    group.add_argument("--size", type=size, metavar="WxH", help=told)
    told = "how a clip of another shape is brought to --size (crop)"
    group.add_argument("--fit", choices=FITS, default="crop", help=told)
    if not several:
        audio_argument(group)


def audio_argument(group):
    told = "leave out the clip's sound, which videos have otherwise"
    group.add_argument("--no-audio", dest="audio", action="store_false", help=told)


def tuning_arguments(parser, resume: bool = True):
    group = parser.add_argument_group("tuning")
    group.add_argument(
        "--attention",
        choices=MODES,
        default="sparse-causal",
        help="frames that each frame looks at (sparse-causal: the first and the previous)",
    )
    group.add_argument("--temporal-causal", action="store_true", help="temporal attention sees no later frames")
    group.add_argument("--norm", choices=NORMS, default="video", help="statistics of the group norms")
    told = (
        "make the files of tuned weights smaller, by this rank of what the tuning changes (64: a fifteenth of SD 1.5's "
        "300 MB; whole in half precision without it)"
    )
    if resume:
        _number(group, "--rank", "rank", help=told)
        group.add_argument("--resume", action="store_true", help="go on with what is unfinished in --output")


def edits_arguments(parser):
    parser.add_argument(
        "--edit",
        action="append",
        required=True,
        type=sentence,
        metavar="TEXT",
        help='an edited sentence, or one after the other along the clip, "0: a red ball | 4: a blue ball"; give the '
        "option several times for several edits",
    )
    group = parser.add_argument_group("edits")
    group.add_argument(
        "--region",
        action="append",
        choices=REGIONS,
        help="what an edit may change, once for all or once for each --edit (everything): the subject's colour or "
        "material (subject), the thing itself (shape), or the background; needs --contrast, --subject or --mask",
    )
    told = (
        "a LoRA for these edits alone, given as --lora: for a style, which a tuning with --lora unlearns, as the "
        "clip doesn't show it"
    )
    group.add_argument("--edit-lora", action="append", type=lora, metavar="FILE[:STRENGTH]", help=told)
    told = "what guidance steers away from"
    group.add_argument("--negative-prompt", type=sentence, default="", metavar="TEXT", help=told)
    control_arguments(parser)


def control_arguments(parser):
    group = parser.add_argument_group("ControlNet", "hints for every frame of the edits")
    told = (
        "a .safetensors file or a diffusers folder of a ControlNet, a name in the lists of --comfyui, or mini, which "
        "takes silhouettes; several add up"
    )
    group.add_argument("--controlnet", nargs="+", type=path, metavar="NAME", help=told)
    told = "what each of them sees: an image for all frames, or a video or folder, cut as the clip is"
    group.add_argument("--hints", nargs="+", type=path, metavar="PATH", help=told)
    told = "of what it adds (1); one for all ControlNets or one for each, as of the next two"
    _number(group, "--control-strength", "control_strength", nargs="+", metavar="X", help=told)
    told = "share of the sampling steps after which it begins (0)"
    _number(group, "--control-start", "control_start", nargs="+", metavar="X", help=told)
    _number(group, "--control-end", "control_end", nargs="+", metavar="X", help="share after which it ends (1)")


def contrast_arguments(parser):
    parser = parser.add_argument_group("subject", "what tells where it is")
    parser.add_argument(
        "--contrast",
        action="append",
        type=sentence,
        metavar="TEXT",
        help="the clip's sentence with another subject; finds the subject, keeps it in its place, and lets "
        "--region work; best three times, each with another colour and shape",
    )
    told = "the word of --prompt that names the subject: finds it as well, in large checkpoints"
    parser.add_argument("--subject", dest="word", type=sentence, metavar="WORD", help=told)
    told = "the subject's mask, white where it is, instead: an image, or a video or folder, cut as the clip is"
    parser.add_argument("--mask", type=path, metavar="PATH", help=told)
    told = f"width of the edge of the subject's mask; 0 for a hard one ({SOFTNESS})"
    _number(parser, "--softness", "softness", metavar="PIXELS", help=told)


def overwrite_argument(parser):
    told = "begin the project in --output anew, instead of adding to it"
    parser.add_argument("--overwrite", action="store_true", help=told)


def tuned_argument(parser):
    told = "tuned.safetensors, or that of a step, of `tune` or `edit`; not needed with a Tune-A-Video model"
    parser.add_argument("--tuned", type=path, metavar="FILE", help=told)


def demo_arguments(parser):
    parser.add_argument("--output", type=path, default=Path("tav-demo"), metavar="DIR", help="(tav-demo)")
    overwrite_argument(parser)
    device_argument(parser)
    add_preset_arguments(parser)
    run_arguments(parser)
    parser.set_defaults(
        checkpoint="mini", comfyui=None, prediction_type=None, lora=None, embedding=None, prompt_weights=False
    )


def edit_arguments(parser):
    model_arguments(parser)
    video_arguments(parser)
    told = "one sentence that describes the clip"
    parser.add_argument("--prompt", required=True, type=sentence, metavar="TEXT", help=told)
    edits_arguments(parser)
    told = "of the project: edits of its clip are added, nothing is tuned or drawn twice"
    parser.add_argument("--output", required=True, type=path, metavar="DIR", help=told)
    overwrite_argument(parser)
    told = "check everything, tell what fits and how long it takes, and write nothing"
    parser.add_argument("--dry-run", action="store_true", help=told)
    contrast_arguments(parser)
    tuning_arguments(parser)
    add_preset_arguments(parser, several=SWEEPS | {"seed": "a project has one, that of its tuning"})
    told = "seed of the fresh noise of --eta (that of the tuning); several for a grid of edits"
    _number(parser, "--edit-seed", "seed", nargs="+", help=told)
    run_arguments(parser, config=True)


def tune_arguments(parser):
    model_arguments(parser)
    video_arguments(parser, several=True)
    told = "one sentence that describes the clip; one for each --video, in the same order"
    parser.add_argument("--prompt", required=True, action="append", type=sentence, metavar="TEXT", help=told)
    parser.add_argument("--output", required=True, type=path, metavar="DIR")
    tuning_arguments(parser)
    # the count of sampling steps is only held against the checkpoint's noise schedule, for what comes after
    names = ("steps", "learning_rate", "weight_average", "keep", "seed", "dtype", "memory", "save_minutes",
             "sampling_steps", "context_length")  # fmt: skip
    add_preset_arguments(parser, *names)
    run_arguments(parser, config=True)


def invert_arguments(parser):
    model_arguments(parser)
    tuned_argument(parser)
    video_arguments(parser, frames=None)
    parser.add_argument("--output", required=True, type=path, metavar="FILE", help="a .safetensors file for the noise")
    told = "one sentence that describes the clip (that of the tuning)"
    parser.add_argument("--prompt", type=sentence, metavar="TEXT", help=told)
    contrast_arguments(parser)
    names = ("seed", "dtype", "sampling_steps", "caption_as_negative", "context_length", "context_overlap")
    add_preset_arguments(parser, *names)
    run_arguments(parser, config=True)


def sample_arguments(parser):
    model_arguments(parser)
    tuned_argument(parser)
    told = "noise of `invert` or `edit`; random without it"
    parser.add_argument("--noise", type=path, metavar="FILE", help=told)
    edits_arguments(parser)
    told = "edits are added to what is there, also to a project of `edit`"
    parser.add_argument("--output", required=True, type=path, metavar="DIR", help=told)
    _number(parser, "--frames", "count", help="length of clips from random noise (as tuned)")
    told = "frame rate of the written videos (that of the clip in --noise; else 8)"
    _number(parser, "--fps", "fps", metavar="X", help=told)
    audio_argument(parser)
    names = ("seed", "dtype", "sampling_steps", "guidance_scale", "guidance_rescale", "guidance_start", "guidance_end",
             "attention_injection", "caption_as_negative", "steady", "eta", "context_length",
             "context_overlap", "edits_at_once")  # fmt: skip
    of_seed = "of random noise, and of the fresh noise of --eta; several for a grid of edits"
    add_preset_arguments(parser, *names, several=SWEEPS | {"seed": of_seed})
    run_arguments(parser, config=True)


def doctor_arguments(parser):
    _number(parser, "--frames", "count", default=FRAMES, help=f"of the clip ({FRAMES})")
    parser.add_argument("--size", type=size, metavar="WxH", help="to work at (the size of the checkpoint)")
    model_arguments(parser)
    names = ("steps", "dtype", "memory", "sampling_steps", "guidance_scale", "attention_injection", "context_length")
    add_preset_arguments(parser, *names)
    run_arguments(parser)


def metrics_arguments(parser):
    told = "a video or a folder of its frames, several times for several; or the output folder of `edit`, alone"
    parser.add_argument("--edited", required=True, action="append", type=path, metavar="PATH", help=told)
    told = "what was edited: the same frames, as a video or a folder"
    parser.add_argument("--source", type=path, metavar="PATH", help=told)
    told = "what the video should show, once for each --edited"
    parser.add_argument("--prompt", action="append", type=sentence, metavar="TEXT", help=told)
    parser.add_argument("--source-prompt", type=sentence, metavar="TEXT", help="what the source shows; with --clip")
    told = "white where the edit may change something: an image for all frames, a video or a folder"
    parser.add_argument("--mask", type=path, metavar="PATH", help=told)
    measuring_arguments(parser)
    device_argument(parser)
    told = "where metrics.csv, .json and .html go (the folder of the edit, or the present one)"
    parser.add_argument("--output", type=path, metavar="DIR", help=told)


def measuring_arguments(parser):
    told = "folders as transformers saves them, and files of weights; without one its figures are left out"
    group = parser.add_argument_group("models", told)
    told = 'a CLIP, such as openai/clip-vit-large-patch14 (LOVEU-TGVE); or "mini", of the mini world'
    group.add_argument("--clip", type=path, metavar="DIR", help=told)
    group.add_argument("--pickscore", type=path, metavar="DIR", help="yuvalkirstain/PickScore_v1")
    group.add_argument("--dino", type=path, metavar="DIR", help="facebook/dino-vitb16")
    told = "torchvision's weights of AlexNet, or of SqueezeNet 1.1 (PIE-Bench); needs the extra perceptual"
    group.add_argument("--lpips", type=path, metavar="FILE", help=told)
    told = "torchvision's weights of raft_large, for warp_error_raft; needs the extra perceptual"
    group.add_argument("--raft", type=path, metavar="FILE", help=told)


def evaluate_arguments(parser):
    model_arguments(parser)
    told = ("the folder of LOVEU-TGVE 2023, as it was unpacked; or a list of your clips: a YAML file, or a folder with "
            "one that is named clips.yaml")  # fmt: skip
    parser.add_argument("--dataset", required=True, type=path, metavar="PATH", help=told)
    told = "where frames/, runs/, and the figures go; a run that was stopped, or that failed in part, goes on there"
    parser.add_argument("--output", required=True, type=path, metavar="DIR", help=told)
    told = "these clips, by their names, or by those of their sets (all)"
    parser.add_argument("--only", nargs="+", type=sentence, metavar="NAME", help=told)
    told = "these kinds of edits, such as style or object (all)"
    parser.add_argument("--kinds", nargs="+", type=sentence, metavar="KIND", help=told)
    own = "the size of the checkpoint"
    list_arguments(parser, f"LOVEU-TGVE: all; of yours: {FRAMES}",
                   f"LOVEU-TGVE: 480, or that of a smaller checkpoint; of yours: {own}")  # fmt: skip
    told = "edit the clips at once, by several workers on Ray (an extra of the pack)"
    parser.add_argument("--batch", action="store_const", const=True, help=told)
    ray_arguments(parser)


def export_arguments(parser):
    model_arguments(parser, computes=False)
    tuned_argument(parser)
    told = "a new folder, or an empty one"
    parser.add_argument("--output", required=True, type=path, metavar="DIR", help=told)
    parser.set_defaults(device=torch.device("cpu"), dtype="fp32", preset=None, prompt_weights=False, quiet=True)


def batch_arguments(parser):
    told = ("the list of jobs: a YAML file, a table in CSV, or a folder with one that is named jobs.yaml or jobs.csv; "
            "videos beside it")  # fmt: skip
    parser.add_argument("jobs", type=path, metavar="JOBS", help=told)
    told = "where jobs/ and the results go; a batch that was stopped, or that failed in part, goes on there"
    parser.add_argument("--output", required=True, type=path, metavar="DIR", help=told)
    told = "settings of which every combination is tried, such as learning_rate=1e-5,3e-5 steps=200,500"
    parser.add_argument("--sweep", nargs="+", type=sentence, metavar="NAME=X,Y", help=told)
    ray_arguments(parser)
    model_arguments(parser)
    list_arguments(parser, str(FRAMES), "the size of the checkpoint")


def list_arguments(parser, frames: str, sides: str):
    """What is done with the clips of a list, whose frames and sizes are those unless it or an option says otherwise."""
    group = parser.add_argument_group("clips", "of those that don't say it themselves")
    _number(group, "--frames", "count", help=f"how many frames ({frames})")
    _number(group, "--stride", "stride", help="take every N-th frame (1)")
    group.add_argument("--size", type=size, metavar="WxH", help=f"size to work at ({sides})")
    told = "how clips of another shape are brought to --size (crop)"
    group.add_argument("--fit", choices=FITS, default="crop", help=told)
    tuning_arguments(parser, resume=False)
    measuring_arguments(parser)
    add_preset_arguments(parser)
    run_arguments(parser)


def ray_arguments(parser):
    group = parser.add_argument_group("workers", "processes that have a checkpoint each, on Ray")
    told = "a Ray cluster that is there, host:port, or auto for that of this machine (one is started here, and stopped)"
    group.add_argument("--address", type=sentence, metavar="ADDRESS", help=told)
    told = "of each worker (1; 0 without --address where there is none)"
    _number(group, "--gpus-per-job", "gpus_per_job", metavar="X", help=told)
    _number(group, "--cpus-per-job", "threads", help="threads of each worker (1)")
    _number(group, "--workers", "workers", help="how many (as many as fit)")
    told = "how often a job is tried again whose worker died (3)"
    _number(group, "--retries", "retries", help=told)


_SD15 = "--checkpoint v1-5-pruned-emaonly-fp16.safetensors"
_CLIP = f'{_SD15} --video skiing.mp4 --prompt "a man is skiing"'
EXAMPLES = {
    "demo": "--output tav-demo",
    "edit": f'{_CLIP} --edit "spider man is skiing" --frames 24 --stride 2 --output skiing',
    "tune": f"{_CLIP} --frames 24 --stride 2 --output tuned",
    "invert": f"{_SD15} --tuned tuned/tuned.safetensors --video skiing.mp4 --stride 2 --output noise.safetensors",
    "sample": f"{_SD15} --tuned tuned/tuned.safetensors --noise noise.safetensors "
    '--edit "a cat is skiing" --output sampled',
    "doctor": f"{_SD15} --frames 24",
    "evaluate": f"{_SD15} --dataset loveu-tgve-2023 --output evaluated",
    "metrics": "--edited skiing",
    "batch": f"jobs.yaml {_SD15} --output batch",
    "bench": "--layout small --stages tune --no-memory",
    "export": f"{_SD15} --tuned tuned/tuned.safetensors --output skiing-model",
}
