"""Where the subject is found, and that edits of a region leave the rest to the noise."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import refused

from tav_core import PRESETS, TavError, ddim_invert, ddim_sample, encode_prompt, find_subject, inflate, prepare, sample
from tav_core.mini import world
from tav_core.mini.benchmark import BenchmarkClip
from tav_core.subject import editable, grown, mask_of

CLIP = BenchmarkClip(world.Scene("heart", "purple", "sand", layout=3), "circle", {}, num_frames=4)
EDIT = "an orange heart is circling on the sand"


@pytest.fixture(scope="module")
def mini():
    from tav_core import load_checkpoint

    return load_checkpoint("mini")


@pytest.fixture(scope="module")
def found(mini):
    source = prepare(mini, torch.from_numpy(world.render_clip(CLIP.scenes())), CLIP.caption())
    unet = inflate(mini.unet)
    return source, unet, find_subject(mini, unet, source, CLIP.contrasts(), PRESETS["mini"])


def test_the_subject_is_found_in_every_frame(found):
    truth = torch.from_numpy(np.stack([world.subject_mask(scene) for scene in CLIP.scenes()])).float()
    truth = F.adaptive_avg_pool2d(truth[:, None], 16)[:, 0] > 0.3
    mask = found[2][0, 0] > 0.5
    overlap = (mask & truth).sum((1, 2)) / (mask | truth).sum((1, 2))
    assert mask.shape == (4, 16, 16) and overlap.min() > 0.6, overlap


def test_an_edit_of_a_region_leaves_the_rest_as_the_noise_reconstructs_it(mini, found):
    source, unet, subject = found
    steps = 5
    text, edit, empty = (encode_prompt(mini, words) for words in (source.prompt, EDIT, ""))
    noise = ddim_invert(unet, source.latents, text, mini.scheduler, steps)
    again = ddim_sample(unet, noise, text, mini.scheduler, steps, guidance_scale=1)
    settings = dict(negative_hidden_states=empty, guidance_scale=5.0, source_hidden_states=text)
    for region in ("subject", "background"):
        changeable = editable(region, subject)
        for injection in (0.0, 0.6):
            edited = ddim_sample(unet, noise, edit, mini.scheduler, steps, region=changeable, anchor=subject,
                                 attention_injection=injection, **settings)  # fmt: skip
            difference = (edited - again).abs()
            assert (difference * (1 - changeable)).max() < 1e-4
            assert (difference * changeable).max() > 0.1
    free = ddim_sample(unet, noise, edit, mini.scheduler, steps, **settings)
    whole = ddim_sample(unet, noise, edit, mini.scheduler, steps, region=torch.ones_like(subject), **settings)
    assert (whole - free).abs().max() < 1e-4


def test_the_anchor_is_felt_where_it_is(mini, found):
    source, unet, subject = found
    text, edit, empty = (encode_prompt(mini, words) for words in (source.prompt, EDIT, ""))
    noise = torch.randn(source.latents.shape, generator=torch.Generator().manual_seed(1))
    settings = dict(negative_hidden_states=empty, source_hidden_states=text, attention_injection=1.0)
    none, off, on = (ddim_sample(unet, noise, edit, mini.scheduler, 3, anchor=anchor, **settings)
                     for anchor in (None, torch.zeros_like(subject), subject))  # fmt: skip
    assert (off - none).abs().max() < 1e-5 < 1e-2 < (on - none).abs().max()


def test_mask_of_known_differences():
    predictions = torch.zeros(3, 4, 2, 8, 8)
    predictions[1:, :, :, 2:4, 2:4] = 1.0
    mask = mask_of([predictions], 0.15)
    assert mask.sum() == 2 * 4 and mask[0, 0, :, 2:4, 2:4].all()
    assert editable("subject", mask).sum() == 2 * 16
    assert (editable("background", mask) + editable("subject", mask) == 1).all()
    assert editable("everything", mask) is None
    assert (grown(grown(mask, 1), -1) == mask).all()


def test_refusals(mini, found):
    source, unet, subject = found
    refused("contrast sentences change nothing", [torch.zeros(2, 4, 1, 4, 4)], 0.15, call=mask_of)
    refused("threshold=1.5 is out of range", [torch.zeros(2, 4, 1, 4, 4)], 1.5, call=mask_of)
    refused("region is 'sky'; choose one of everything, subject, background", "sky", subject, call=editable)
    for contrast in ("", source.prompt):
        with pytest.raises(TavError, match="says nothing of another subject"):
            find_subject(mini, unet, source, [contrast], PRESETS["mini"])
    with pytest.raises(TavError, match="--region subject needs to know where the subject is"):
        sample(mini, unet, torch.zeros_like(source.latents), EDIT, PRESETS["mini"], source_prompt=source.prompt, region="subject")
    with pytest.raises(TavError, match="region needs source_hidden_states"):
        text = encode_prompt(mini, EDIT)
        ddim_sample(unet, torch.zeros_like(source.latents), text, mini.scheduler, 2, guidance_scale=1, region=subject)
