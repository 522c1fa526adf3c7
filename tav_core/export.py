"""A tuned model as a whole: the folder that the authors' code saves after a tuning (TuneAVideoPipeline)."""

import json
from pathlib import Path
from typing import Any

import diffusers

from .atomic import atomic_folder
from .checkpoint import Checkpoint
from .inflation import PUBLISHED, VideoUNet
from .tuned_weights import require_inflated

# by the names of the authors' modules, whose code reads it
INDEX = {
    "_class_name": "TuneAVideoPipeline",
    "_diffusers_version": diffusers.__version__,
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["tuneavideo.models.unet", PUBLISHED],
    "vae": ["diffusers", "AutoencoderKL"],
}


def save_pipeline(checkpoint: Checkpoint, unet: VideoUNet, path: str | Path):
    """Writes a tuned model in the layout of the published Tune-A-Video models, which needs no other file.

    `load_checkpoint` gives it back, and samples to the bit what `unet` samples. VAE, text encoder, tokenizer and
    scheduler are those of diffusers and transformers, whose `from_pretrained` reads each folder; that of the U-Net is
    read by `VideoUNet.from_pretrained`. Its configuration is that of the authors' code, and beside it stands what
    `inflate` was told.

    Args:
        checkpoint: what was tuned; its own U-Net is left out.
        unet: tuned, from `tune_on` or `load_tuned`.
        path: a folder that isn't there, or is empty: model_index.json, unet, vae, text_encoder, tokenizer and scheduler
            are written to it, all or nothing, as safetensors and JSON. In the precision that the parts have: of Stable
            Diffusion 1.5 in float32 4.5 GB.

    Raises:
        TavError: a U-Net that isn't inflated, a folder that holds something, or one that can't be written.
    """
    require_inflated(unet)
    with atomic_folder(path) as folder:
        for part in ("vae", "text_encoder", "tokenizer", "scheduler"):
            getattr(checkpoint, part).save_pretrained(folder / part)
        if not (folder / "tokenizer" / "vocab.json").exists():  # which transformers from 5 on leaves out
            checkpoint.tokenizer.backend_tokenizer.model.save(str(folder / "tokenizer"))
        unet.save_pretrained(folder / "unet")
        for file in folder.glob("*/config.json"):  # they tell where the parts came from, on this machine
            told = json.loads(file.read_text(encoding="utf-8"))
            _write(file, {name: value for name, value in told.items() if name != "_name_or_path"})
        _write(folder / "model_index.json", INDEX)


def _write(file: Path, content: dict[str, Any]):
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
