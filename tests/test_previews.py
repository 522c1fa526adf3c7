"""Quick previews of the mini checkpoint: their colours are those of the world, in the previews of ComfyUI as well."""

import colorsys

import numpy as np
import pytest
import torch

from tav_core import strip
from tav_core.checkpoint import MINI
from tav_core.mini import world
from tav_core.mini.preview import (
    LATENT_COLOURS,
    LatentColours,
    downscaled,
    encoded,
    fit_latent_colours,
    load_latent_colours,
)
from tav_core.visuals import MARGIN

SMALL = (16, 16)


@pytest.fixture(scope="module")
def renders():
    """Scenes of each colour on each background, and their pictures."""
    scenes = [
        world.Scene(colour=colour, background=place, shape=shape, radius=0.28, layout=3)
        for colour in world.COLOURS
        for place, shape in zip(world.BACKGROUNDS, world.SHAPES)
    ]
    return scenes, np.stack([world.render(scene) for scene in scenes])


@pytest.fixture(scope="module")
def latents(renders):
    from tav_core.checkpoint import load_checkpoint

    return encoded(load_checkpoint("mini").vae, renders[1])


def subjects(scenes: list[world.Scene], colour: str) -> tuple[list[int], torch.Tensor]:
    """The numbers of the scenes of a colour, and where their subjects are, `n h w`."""
    numbers = [i for i, scene in enumerate(scenes) if scene.colour == colour]
    masks = [
        downscaled((255 * world.subject_mask(scenes[i]))[None, ..., None].repeat(3, -1).astype(np.uint8), SMALL)
        for i in numbers
    ]
    return numbers, torch.cat(masks)[:, 0] > 0.95


@pytest.mark.parametrize("colour", world.COLOURS)
def test_subjects_have_their_colour(renders, latents, colour):
    """The best linear map is up to 50 grey levels away (green, purple), and 91 degrees of hue (green)."""
    scenes, images = renders
    numbers, inside = subjects(scenes, colour)
    drawn = load_latent_colours(MINI / LATENT_COLOURS)(latents[numbers]).clamp(-1, 1)
    wanted = downscaled(images[numbers], SMALL)
    assert (drawn - wanted).movedim(1, -1)[inside].abs().mean() * 127.5 < 25  # in the plain style; found: 4 to 17
    red, green, blue = (drawn.movedim(1, -1)[inside].mean(0) + 1).tolist()
    hue, true = (360 * colorsys.rgb_to_hsv(*rgb)[0] for rgb in ((red, green, blue), world.COLOURS[colour]))
    assert abs((hue - true + 180) % 360 - 180) < 15


def test_whole_pictures(renders, latents):
    drawn = load_latent_colours(MINI / LATENT_COLOURS)(latents).clamp(-1, 1)
    assert (drawn - downscaled(renders[1], SMALL)).abs().mean() * 127.5 < 9  # found: 5; a linear map: 18


def test_fitting_finds_colours(renders, latents):
    wanted = downscaled(renders[1], SMALL)
    drawn = LatentColours(fit_latent_colours(latents, wanted, steps=150))(latents).clamp(-1, 1)
    assert (drawn - wanted).abs().mean() * 127.5 < 19  # a linear map's


def test_previews_in_comfyui(mini):
    """The demo clip's ball is red, not brown."""
    from latent_preview import Latent2RGBPreviewer

    format = mini.inflated.model.latent_format
    previewer = Latent2RGBPreviewer(
        format.latent_rgb_factors, format.latent_rgb_factors_bias, format.latent_rgb_factors_reshape
    )
    latents = mini.inflated.model.process_latent_in(mini.latent["samples"])
    picture = np.asarray(previewer.decode_latent_to_preview(latents)).astype(float)
    assert picture.shape == (*SMALL, 3)
    red = picture[np.abs(picture - world.COLOURS["red"]).max(-1) < 60]
    assert len(red) > 8
    clip = downscaled((mini.images[:1].numpy() * 255).round().astype(np.uint8), SMALL)[0].movedim(0, -1).numpy()
    assert np.abs(picture - 127.5 * (clip + 1)).mean() < 16


def test_a_tuning_without_vae_shows_rough_previews(pack, mini, inference_mode, tmp_path, monkeypatch):
    import folder_paths

    monkeypatch.setattr(folder_paths, "get_user_directory", lambda: str(tmp_path))
    shown = []
    monkeypatch.setattr(pack.nodes.tune, "show", lambda node, picture: shown.append(picture))
    caption = mini.encode("a red ball is sliding on the grass")
    settings = dict(learning_rate=1e-4, seed=0, dtype="fp32", memory="fast", timestep_sampling="uniform")
    pack.nodes.OneShotTune.execute(mini.inflated, mini.latent, caption, steps=2, preview_every=1, **settings)
    clip = (mini.images.numpy() * 255).round().astype(np.uint8)
    assert [picture.size for picture in shown] == 2 * [strip([torch.from_numpy(clip)], [""]).size]
    for picture in shown:  # of the clip itself, as there is no other prompt
        frames = np.stack(np.split(np.asarray(picture)[-MARGIN - 128 : -MARGIN, MARGIN:-MARGIN], 4, axis=1))
        assert (downscaled(frames, SMALL) - downscaled(clip, SMALL)).abs().mean() * 127.5 < 16  # found: 7
