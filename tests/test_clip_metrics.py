"""Figures by CLIP, against the formulas of their protocols on a tiny random model."""

import json
import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPTokenizer,
    CLIPVisionConfig,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

from support.errors import refused
from tav_core import clip_metrics as metrics
from tav_core import measure
from tav_core.checkpoint import MINI
from tav_core.mini import world

SENTENCES = ["a blue ball is sliding on the grass", "a red ball is sliding on the grass"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path, tokenizer = tmp_path_factory.mktemp("clip"), CLIPTokenizer.from_pretrained(MINI / "tokenizer")
    torch.manual_seed(0)
    text = CLIPTextConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                          num_attention_heads=2, max_position_embeddings=32, projection_dim=16,
                          bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)  # fmt: skip
    vision = CLIPVisionConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                              image_size=32, patch_size=8, projection_dim=16)  # fmt: skip
    model = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=16))
    for parameter in model.parameters():  # CLIP's own initialisation makes all cosines alike
        parameter.data += 0.3 * torch.randn_like(parameter)
    model.logit_scale.data.fill_(math.log(100))
    model.save_pretrained(path)
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(images, tokenizer).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def clip(folder):
    return metrics.load_clip(folder)


@pytest.fixture(scope="module")
def videos():
    generator = torch.Generator().manual_seed(1)
    return [F.interpolate(torch.rand(4, 3, 6, 6, generator=generator), (40, 56)).mul(255).byte().movedim(1, -1)
            for _ in range(2)]  # fmt: skip


@torch.no_grad()
def embedded(clip, video, size=None):
    """Frames and sentences as the published scripts embed them, one at a time."""
    frames, pooled = [], []
    for frame in video.numpy():
        image = Image.fromarray(frame)
        image = image.resize((size, size)) if size else image
        given = clip.processor(text=SENTENCES, images=image, return_tensors="pt", padding=True)
        out = clip.model(**given)
        frames.append(out.image_embeds[0])
        pooled.append(F.normalize(clip.model.vision_model(given.pixel_values).pooler_output[0], dim=-1))
        assert torch.allclose(out.logits_per_image[0], 100 * out.text_embeds @ frames[-1], atol=1e-3)
    return torch.stack(frames), out.text_embeds, torch.stack(pooled)


@pytest.mark.parametrize("size", [None, 480])
def test_each_figure_is_that_of_its_protocol(clip, videos, size):
    (edit, source) = videos
    seen, before = (metrics.look(clip, video, SENTENCES, size) for video in videos)
    frames, texts, pooled = embedded(clip, edit, size)
    old, _, _ = embedded(clip, source, size)
    n, cosines = len(frames), frames @ frames.T

    def close(value, expected):
        return value == pytest.approx(float(expected), abs=2e-4)

    assert close(metrics.text_alignment(seen), 100 * (frames @ texts[0]).mean())
    pairs = [cosines[i, j] for i in range(n) for j in range(n) if i != j]
    assert close(metrics.frame_consistency(seen), np.mean(pairs))
    assert close(metrics.temporal_consistency(seen.frames), np.mean([cosines[i, i + 1] for i in range(n - 1)]))
    neighbours = [pooled[i] @ pooled[i + 1] for i in range(n - 1)]
    assert close(metrics.temporal_consistency(seen.pooled), np.mean(neighbours))
    assert close(metrics.frame_accuracy(seen), (frames @ texts[0] > frames @ texts[1]).float().mean())
    turned = F.cosine_similarity(frames - old, (texts[0] - texts[1])[None])
    assert close(metrics.directional_similarity(seen, before), turned.mean())
    if size is None:
        assert not close(metrics.text_alignment(seen), metrics.text_alignment(metrics.look(clip, edit, SENTENCES, 480)))


def test_one_frame_has_no_consistency(clip, videos):
    seen = metrics.look(clip, videos[0][:1], SENTENCES)
    assert math.isnan(metrics.frame_consistency(seen)) and math.isnan(metrics.temporal_consistency(seen.frames))


def test_they_stand_in_the_table(clip, videos):
    edit, source = videos
    models = measure.Models(clip=clip, pickscore=clip)
    found = measure.measure("a", edit, source, *SENTENCES, models=models)
    seen = metrics.look(clip, edit, SENTENCES, metrics.TGVE_SIZE)
    assert found.figures["tgve_text"] == found.figures["tgve_pickscore"] == metrics.text_alignment(seen)
    assert set(measure.FIGURES) - set(found.figures) == {
        "dino_consistency", "lpips_alex_rest", "lpips_squeeze_rest", "warp_error_raft",
    }  # fmt: skip
    assert set(found.figures) - set(found.of_source) == {
        "psnr_rest", "ssim_rest", "mse_rest", "motion_fidelity", "directional",
    }  # fmt: skip
    assert found.of_source["tgve_text"] != found.figures["tgve_text"]
    assert "fram_acc" not in measure.measure("a", edit, source, SENTENCES[0], models=models).figures


def test_the_one_that_ships_tells_the_world_apart():
    """Which of the sentences that differ in one thing a picture shows; of the shape it is weak on."""
    clip, rng, right = metrics.load_clip("mini"), random.Random(5), {}
    kinds = dict(shape=world.SHAPES, colour=world.COLOURS, background=world.BACKGROUNDS, style=world.STYLES)
    for _ in range(40):
        scene = world.random_scene(rng)
        frame = torch.from_numpy(world.render(scene))[None]
        for kind, choices in kinds.items():
            sentences = [world.caption(replace(scene, **{kind: choice}), "slide") for choice in choices]
            seen = metrics.look(clip, frame, sentences)
            found = [*choices][(seen.texts @ seen.frames[0]).argmax()]
            right.setdefault(kind, []).append(found == getattr(scene, kind))
    shares = {kind: np.mean(found) for kind, found in right.items()}
    assert shares["shape"] > 0.4 and min(shares[kind] for kind in ("colour", "background", "style")) > 0.9, shares


def test_folders_that_hold_no_clip(folder, tmp_path):
    call = metrics.load_clip
    refused("clip=.* is no folder of a CLIP.*download one there", tmp_path / "nowhere", call=call)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"}))
    refused("can't be read as a CLIP", tmp_path, call=call)
    refused("pickscore=", tmp_path, "pickscore", call=call)


def test_dino_consistency_is_that_of_vbench(tmp_path, videos):
    torch.manual_seed(0)
    config = ViTConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32,
                       patch_size=8)  # fmt: skip
    ViTModel(config).save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    dino, video = metrics.load_dino(tmp_path), videos[0]
    with torch.no_grad():
        given = [dino.processor(images=Image.fromarray(frame), return_tensors="pt") for frame in video.numpy()]
        seen = [dino.model(**each) for each in given]
    rows = [out.last_hidden_state[0, 0] for out in seen]
    near = [[max(0, F.cosine_similarity(a, b, dim=0).item()) for b in rows] for a in rows]
    wanted = np.mean([(near[i][0] + near[i][i - 1]) / 2 for i in range(1, len(rows))])
    assert metrics.dino_consistency(dino, video) == pytest.approx(wanted, abs=1e-5)
    refused("dino=.* no folder of a DINO", tmp_path / "nowhere", call=metrics.load_dino)
