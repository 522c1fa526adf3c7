"""What it takes to make a result again: the options of a command in its summary, and what its figures mean."""

import argparse
import shlex
from pathlib import Path
from typing import Any

import torch

from .checkpoint import Checkpoint
from .doctor import versions
from .presets import Preset, default_preset
from .tuned_weights import base_fingerprint
from .tuning_state import hash_tensors
from .video import Clip

# of the machine or of one run alone
_NOT_KEPT = ("help", "output", "config", "resume", "overwrite", "quiet", "dry_run", "threads", "device", "comfyui")
# of a preset, which another version may have changed
_RESOLVED = ("steps", "learning_rate", "seed", "dtype", "sampling_steps", "guidance_scale", "guidance_rescale",
             "guidance_start", "guidance_end", "attention_injection", "caption_as_negative", "eta")  # fmt: skip
GOOD, FAIR = (24, 8), (19, 14)  # dB that a reconstruction must have, and may be below what the VAE alone leaves
MEANINGS = {
    "probe_loss": "mean squared error of the predicted noise (without unit, about 1 where nothing is known) on the "
    "same draws before and after the tuning: that it falls says that the clip was learned, not that edits are good",
    "reconstruction_psnr": "dB, the clip drawn again from its noise with its own sentence, against the clip; "
    f"good from {GOOD[0]} dB on and at most {GOOD[1]} dB below vae_psnr, fair from {FAIR[0]} dB on and at most "
    f"{FAIR[1]} dB below it, else poor: edits keep no more of the clip than it does",
    "walk_psnr": "dB, the same without guidance, against the clip: what the inversion kept of it; guidance takes what "
    "the reconstruction has less",
    "vae_psnr": "dB, the clip coded and decoded by the VAE alone: no video of this checkpoint comes nearer",
    "frame_difference": "mean absolute difference of neighbouring frames, 0 ... 1: motion and flicker together, about "
    "the source's in a good edit",
    "fps": "frames a second",
    "size": "pixels, width and height",
    "seconds": "seconds, of each stage",
}


def verdict(psnr: float, ceiling: float) -> str:
    """A word for a reconstruction, by its PSNR and that of the VAE alone, in dB."""
    for word, (least, below) in (("good", GOOD), ("fair", FAIR)):
        if psnr >= least and ceiling - psnr <= below:
            return word
    return "poor"


def explained(summary: dict[str, Any]) -> dict[str, Any]:
    """What a summary says beside its figures: how good the reconstruction is, and what each figure means."""
    return {
        "reconstruction_quality": verdict(summary["reconstruction_psnr"], summary["vae_psnr"]),
        "meanings": MEANINGS,
    }


def command_of(args: argparse.Namespace, argv: list[str]) -> str:
    """As one types it."""
    return f"{args.parser.prog.rsplit(' ', 1)[0]} {shlex.join(argv[1:])}"


def record_of(args: argparse.Namespace, argv: list[str], preset: Preset, checkpoint: Checkpoint, clip: Clip) -> dict:
    """What a summary says of the run: the command, its options, versions and fingerprints.

    Args:
        args: with the `parser` that they come from.
        argv: as they were given.
    """
    embeddings = [f"{word} ({digest})" for word, digest in checkpoint.embeddings.items()]
    added = {name: of for name, of in (("lora", list(checkpoint.loras)), ("embedding", embeddings)) if of}
    return {
        "command": command_of(args, argv),
        "options": _options(args, preset),
        "versions": versions(),
        "fingerprints": {"checkpoint": base_fingerprint(checkpoint.unet), "clip": hash_tensors([clip.frames]), **added},
    }


def _options(args: argparse.Namespace, preset: Preset) -> dict[str, Any]:
    """By their names without dashes, as `with_config` reads them."""
    options = {}
    for action in args.parser._actions:
        name, value = action.option_strings[0][2:], getattr(args, action.dest, None)
        if action.dest in _NOT_KEPT:
            continue
        if action.dest == "preset":
            value = value or default_preset(args.checkpoint)
        elif value is None and action.dest in _RESOLVED:
            value = getattr(preset, action.dest, None) or getattr(preset.tuning, action.dest, 0)
        if action.nargs == 0 and not isinstance(action, argparse.BooleanOptionalAction):
            value = True if value == action.const and value != action.default else None
        elif isinstance(value, tuple):  # a size
            value = "x".join(map(str, value))
        elif isinstance(value, list):
            value = [each if isinstance(each, (int, float)) else str(each) for each in value]
        elif isinstance(value, Path | torch.device):
            value = str(value)
        if value is not None:
            options[name] = value
    return options
