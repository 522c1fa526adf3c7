"""The rendered world: what the figures of the mini checkpoint rest on."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from tav_core.mini import world
from tav_core.mini.clips import benchmark_clips
from tav_core.mini.judge import locate
from tav_core.mini.scores import trajectory_agreement
from tav_core.mini.train import make_tokenizer, training_scenes


def test_a_tenth_of_the_combinations_is_never_rendered_for_training():
    every, held_out = world.combinations(), world.held_out()
    assert len(every) == len(set(every)) == 6 * 6 * 6 * 4
    assert len(held_out) == len(every) // 10
    used = {(s.shape, s.colour, s.background, s.style) for s in training_scenes(5000)}
    assert not used & held_out
    assert all(s.pattern == "solid" for s in training_scenes(100))


def test_rendering_is_a_function_of_the_scene_and_every_attribute_shows():
    scene = world.Scene()
    image = world.render(scene)
    assert image.shape == (128, 128, 3) and image.dtype == np.uint8
    assert np.array_equal(image, world.render(replace(scene)))
    for change in (
        dict(shape="star"),
        dict(colour="blue"),
        dict(background="sea"),
        dict(style="sketch"),
        dict(style="neon"),
        dict(pattern="dots"),
        dict(x=0.6),
        dict(radius=0.3),
        dict(layout=1),
    ):
        assert np.abs(world.render(replace(scene, **change)).astype(int) - image).mean() > 0.2, change
    turned = world.render(replace(scene, shape="triangle", angle=90))
    assert np.abs(turned.astype(int) - world.render(replace(scene, shape="triangle"))).mean() > 1


def test_subjects_have_their_colour_in_the_plain_style():
    for colour, rgb in world.COLOURS.items():
        scene = world.Scene(colour=colour)
        inside = world.subject_mask(scene) > 0.99
        assert np.abs(world.render(scene)[inside].astype(float) - rgb).max() <= 1


def test_random_subjects_stay_inside_the_picture():
    rng = random.Random(0)
    for _ in range(200):
        mask = world.subject_mask(world.random_scene(rng))
        border = np.concatenate([mask[0], mask[-1], mask[:, 0], mask[:, -1]])
        assert border.max() == 0 and mask.sum() > 200


@pytest.mark.parametrize("motion", world.MOTIONS)
def test_clips_move_as_they_say(motion):
    scenes = world.clip_scenes(world.Scene("ball"), motion, 8)
    masks = torch.from_numpy(np.stack([world.subject_mask(s) for s in scenes]))
    centre, radius = locate(masks)
    truth = torch.tensor([(s.x, s.y) for s in scenes])
    assert (centre - truth).abs().max() * world.SIZE < 1.5  # pixels
    ratio = radius / torch.tensor([s.radius for s in scenes])  # the outermost 2 % of a disc don't count
    assert 0.85 < ratio.min() and ratio.max() < 1.02
    moves = {"slide": centre, "bounce": centre, "circle": centre, "grow": radius, "turn": None}[motion]
    if moves is None:
        assert np.abs(
            np.diff(world.render_clip(world.clip_scenes(world.Scene("star"), motion, 8)).astype(int), axis=0)
        ).sum()
    else:
        assert moves.std(0).max() * world.SIZE > 4


def test_captions():
    scene = world.Scene("star", "orange", "sand", "sketch")
    assert world.caption(scene, "slide") == "an orange star is sliding on the sand, sketch style"
    assert world.caption(replace(scene, colour="red", style="plain")) == "a red star on the sand"


def test_every_word_of_the_world_is_one_token_and_other_words_are_letters(tmp_path):
    tokenizer = make_tokenizer(tmp_path)
    for style in world.STYLES:
        for background in world.BACKGROUNDS:
            text = world.caption(world.Scene("triangle", "purple", background, style), "bounce")
            words = text.replace(",", " ,").split()
            assert len(tokenizer(text).input_ids) == len(words) + 2, text
    assert len(tokenizer("zyx").input_ids) == 3 + 2


def test_half_of_the_benchmark_shows_unknown_content():
    clips = benchmark_clips()
    assert len(clips) >= 8 and sum(c.seen for c in clips) * 2 == len(clips)
    for clip in clips:
        assert set(clip.edits) == {"subject", "colour", "background", "style"}
        assert clip.edits["background"] != clip.scene.background and clip.edits["subject"] != clip.scene.shape


def test_trajectory_agreement_of_equal_shifted_and_reversed_motion():
    truth = np.stack([np.linspace(30, 90, 8), np.full(8, 60.0), np.full(8, 20.0)], 1)
    assert trajectory_agreement(truth, truth) == (pytest.approx(1), pytest.approx(0))
    assert trajectory_agreement(truth + (3, 4, 0), truth) == (pytest.approx(1), pytest.approx(5))
    assert trajectory_agreement(truth[::-1], truth)[0] == pytest.approx(-1)
