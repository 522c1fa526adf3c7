"""Edited backgrounds stand still where the clip's do, and nowhere else."""

import argparse
from dataclasses import replace

import pytest
import torch

from support.errors import refused
from tav_core import PRESETS, TuneConfig, ddim_sample, find_subject, inflate, invert, load_checkpoint, prepare, sample
from tav_core.mini import world
from tav_core.mini.benchmark import BenchmarkClip
from tav_core.steady import STILL, steadied
from tav_core.subject import still_of
from tav_core.terminal import add_preset_arguments, preset_of

CLIP = BenchmarkClip(world.Scene("cross", "green", "snow", layout=5), "bounce", {}, num_frames=4)
PRESET = replace(PRESETS["mini"], tuning=TuneConfig(steps=1), sampling_steps=8)


def some(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_frames_of_a_still_clip_become_one():
    edit, clip = some(2, 4, 5, 6, 8), some(2, 4, 1, 6, 8, seed=1).expand(-1, -1, 5, -1, -1)
    steady = steadied(edit, clip, torch.ones(2, 1, 5, 6, 8))
    assert (steady - edit.mean(2, keepdim=True)).abs().max() < 1e-6


def test_frames_of_a_moving_clip_stay_as_they_are():
    edit, clip = some(1, 4, 5, 6, 8), 10 * STILL * torch.arange(5.0).reshape(1, 1, 5, 1, 1).expand(1, 4, 5, 6, 8)
    assert (steadied(edit, clip, torch.ones(1, 1, 5, 6, 8)) - edit).abs().max() < 1e-6


def test_frames_count_by_how_much_they_differ():
    edit, clip = torch.zeros(1, 4, 2, 1, 1), torch.zeros(1, 4, 2, 1, 1)
    edit[:, :, 1], clip[:, :, 1] = 1.0, STILL  # a standard deviation apart
    weight = torch.tensor(-0.5).exp()
    steady = steadied(edit, clip, torch.ones(1, 1, 2, 1, 1))[0, 0, :, 0, 0]
    assert torch.allclose(steady, torch.stack([weight / (1 + weight), 1 / (1 + weight)]), atol=1e-6)


def test_only_places_that_may_stand_still_do_and_count():
    edit, clip, places = some(1, 4, 3, 4, 4), torch.zeros(1, 4, 3, 4, 4), torch.ones(1, 1, 3, 4, 4)
    places[:, :, 2], places[..., 0, 0] = 0, 0
    steady = steadied(edit, clip, places)
    assert torch.equal(steady[:, :, 2], edit[:, :, 2]) and torch.equal(steady[..., 0, 0], edit[..., 0, 0])
    mean = edit[:, :, :2].mean(2, keepdim=True).expand(-1, -1, 2, -1, -1)
    assert (steady[:, :, :2] - mean)[..., 1:, :].abs().max() < 1e-6


def test_what_may_stand_still():
    mask = torch.zeros(1, 1, 2, 8, 8)
    mask[:, :, :, 3:5, 3:5] = 1
    assert torch.equal(still_of("background", mask, room=1), 1 - mask)
    assert still_of("subject", mask, room=1) is None
    assert still_of("everything", mask, room=1).sum() == 2 * (64 - 16)


@pytest.mark.slow
@pytest.mark.parametrize("region", ["background", "everything"])
def test_an_edited_background_flickers_less(region):
    mini = load_checkpoint("mini")
    source = prepare(mini, torch.from_numpy(world.render_clip(CLIP.scenes())), CLIP.caption())
    unet = inflate(mini.unet)
    noise, subject = invert(mini, unet, source, PRESET), find_subject(mini, unet, source, CLIP.contrasts(), PRESET)
    edit = CLIP.caption(background="grass", style="sketch")
    moving, steady = (
        sample(
            mini,
            unet,
            noise,
            edit,
            replace(PRESET, steady=on),
            source_prompt=source.prompt,
            subject=subject,
            region=region,
        ).float()
        for on in (False, True)
    )
    stage = subject[0, 0].amax(0) == 0  # where the subject never is

    def flicker(video: torch.Tensor) -> float:
        return video.diff(dim=0).abs().mean(-1)[:, stage].mean().item()

    assert flicker(steady) < 0.6 * flicker(moving)
    assert (steady - moving).abs()[:, stage].mean() < 25  # of 255: the same picture


def test_a_walk_back_to_the_clip_is_needed():
    mini = load_checkpoint("mini")
    text = torch.zeros(1, 16, mini.unet.config.cross_attention_dim)
    refused(
        "still needs source_hidden_states",
        inflate(mini.unet),
        some(1, 4, 2, 16, 16),
        text,
        mini.scheduler,
        2,
        guidance_scale=1,
        still=torch.ones(1, 1, 2, 16, 16),
        call=ddim_sample,
    )


def test_it_is_on_and_can_be_turned_off():
    parser = argparse.ArgumentParser()
    parser.add_argument("--checkpoint", default="mini")
    add_preset_arguments(parser)
    assert [preset_of(parser.parse_args(args)).steady for args in ([], ["--steady"], ["--no-steady"])] == [
        True,
        True,
        False,
    ]
