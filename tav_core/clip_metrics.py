"""Figures of videos by models of the CLIP kind, each as the protocol that it is named after computes it.

No model ships with the pack but a tiny one of the mini world, and none is ever downloaded: a folder is given, as
transformers saves it. Videos are uint8 `f h w c`.

Frame consistency alone rewards videos that hardly move: it is printed beside the figures of text and motion only.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoModel, AutoProcessor, CLIPModel, PreTrainedModel, ProcessorMixin

from .errors import TavError

MINI = Path(__file__).parent / "mini" / "clip"
TGVE_SIZE = 480  # LOVEU-TGVE 2023 brings all frames to 480 x 480 before it looks at them


@dataclass(frozen=True)
class ClipModel:
    """A CLIP in evaluation mode, and what prepares its inputs."""

    model: CLIPModel
    processor: ProcessorMixin


@dataclass(frozen=True)
class DinoModel:
    """A DINO (a ViT) in evaluation mode, and what prepares its pictures."""

    model: PreTrainedModel
    processor: AutoImageProcessor


@dataclass(frozen=True)
class Look:
    """What a CLIP sees in a video and in sentences.

    Attributes:
        frames: image embeddings of length 1, `f d`.
        texts: embeddings of the sentences of length 1, `n d`.
        pooled: what the image tower gives before the projection (`pooler_output`), of length 1, `f e`.
        scale: exp(logit_scale), 100 in the published models.
    """

    frames: Tensor
    texts: Tensor
    pooled: Tensor
    scale: float


def load_clip(folder: str | Path, field: str = "clip") -> ClipModel:
    """A CLIP (or PickScore, which is one) from a folder, or "mini", float32 on the CPU. Never uses the network.

    Raises:
        TavError: no folder, or one without such a model and its processor.
    """
    folder = MINI if str(folder) == "mini" else folder
    with _reading(folder, field, "CLIP", "openai/clip-vit-large-patch14 (PickScore: yuvalkirstain/PickScore_v1)"):
        model = CLIPModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
        return ClipModel(model.float().eval(), AutoProcessor.from_pretrained(folder, local_files_only=True))


def load_dino(folder: str | Path) -> DinoModel:
    """A DINO from a folder, float32 on the CPU. Never uses the network.

    Raises:
        TavError: no folder, or one without such a model and its processor.
    """
    with _reading(folder, "dino", "DINO", "facebook/dino-vitb16"):
        model = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
        return DinoModel(model.float().eval(), AutoImageProcessor.from_pretrained(folder, local_files_only=True))


@contextmanager
def _reading(folder: str | Path, field: str, kind: str, example: str) -> Iterator[None]:
    if not (Path(folder) / "config.json").is_file():
        remedy = f"download one there, such as {example}"
        raise TavError(field, folder, f"is no folder of a {kind} (it has no config.json)", remedy)
    try:
        yield
    except Exception as error:  # the libraries fail in every way over a damaged folder
        told = " ".join(str(error).split())[:200]
        remedy = "download all of its files: configurations, model.safetensors and a tokenizer if it has one"
        raise TavError(field, folder, f"can't be read as a {kind} ({told})", remedy) from error


@torch.no_grad()
def look(clip: ClipModel, video: Tensor, sentences: list[str], size: int | None = None) -> Look:
    """What the model sees.

    Args:
        size: side to which frames are brought first, by Pillow with its default filter.
    """
    frames = [Image.fromarray(frame) for frame in video.numpy()]
    if size is not None:
        frames = [frame.resize((size, size)) for frame in frames]
    model = clip.model
    given = clip.processor(text=sentences, images=frames, return_tensors="pt", padding=True, truncation=True)
    given = given.to(model.device)
    # by its towers: what `model(...)` and `get_image_features` return beside the embeddings differs between versions
    pooled = model.vision_model(pixel_values=given.pop("pixel_values")).pooler_output
    texts = model.text_projection(model.text_model(**given).pooler_output)
    frames, texts, pooled = (F.normalize(x, dim=-1).cpu() for x in (model.visual_projection(pooled), texts, pooled))
    return Look(frames, texts, pooled, model.logit_scale.exp().item())


def text_alignment(seen: Look) -> float:
    """LOVEU-TGVE's CLIPScore (text), and with its model PickScore: mean of exp(logit_scale) times the cosine to the
    first sentence.
    """
    return (seen.scale * seen.frames @ seen.texts[0]).mean().item()


def frame_consistency(seen: Look) -> float:
    """LOVEU-TGVE's CLIPScore (frame): the mean cosine of all pairs of different frames; nan for one frame."""
    f, cosines = len(seen.frames), seen.frames @ seen.frames.T
    return ((cosines.sum() - cosines.trace()) / (f * (f - 1))).item() if f > 1 else float("nan")


def temporal_consistency(embeddings: Tensor) -> float:
    """The mean cosine of neighbouring frames (FateZero's Tem-Con; V2VBench with `Look.pooled`); nan for one frame."""
    return (embeddings[1:] * embeddings[:-1]).sum(-1).mean().item()


def frame_accuracy(seen: Look) -> float:
    """FateZero's Fram-Acc: the share of frames that are nearer to the first sentence, of the edit, than to the second,
    of the source.
    """
    return (seen.frames @ seen.texts[0] > seen.frames @ seen.texts[1]).float().mean().item()


def directional_similarity(edited: Look, source: Look) -> float:
    """The cosine of what changed in the frames to what changed in the sentences (Gal et al., arXiv 2108.00946), mean
    over frames.

    Args:
        edited: with the edited sentence and the source's.
        source: of the source's frames, as many.
    """
    said = F.normalize(edited.texts[0] - edited.texts[1], dim=-1)
    changed = F.normalize(edited.frames - source.frames, dim=-1)
    return (changed @ said).mean().item()


@torch.no_grad()
def dino_consistency(dino: DinoModel, video: Tensor) -> float:
    """VBench's subject consistency (arXiv 2311.17982): the cosine of a frame to the first one and to the one before it,
    their mean (not below 0) over all frames but the first; nan for one frame.
    """
    frames = [Image.fromarray(frame) for frame in video.numpy()]
    out = dino.model(**dino.processor(images=frames, return_tensors="pt").to(dino.model.device))
    seen = F.normalize(out.last_hidden_state[:, 0], dim=-1).cpu()
    first, before = seen[1:] @ seen[0], (seen[1:] * seen[:-1]).sum(-1)
    return ((first.clamp(min=0) + before.clamp(min=0)) / 2).mean().item()
