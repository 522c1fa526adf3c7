"""Figures of videos, on videos whose figures are known."""

import math

import numpy as np
import pytest
import torch

from support.errors import refused
from tav_core import metrics
from tav_core.mini import world


def clip(style="plain", background="grass", motion="slide", frames=6, **changes):
    scenes = world.clip_scenes(world.Scene(style=style, background=background, **changes), motion, frames)
    return torch.from_numpy(world.render_clip(scenes)), torch.from_numpy(
        np.stack([world.subject_mask(s) for s in scenes])
    )


def noisy(video, sigma, seed=0):
    noise = sigma * torch.randn(video.shape, generator=torch.Generator().manual_seed(seed))
    return (video + noise).round().clamp(0, 255).to(torch.uint8)


def test_fidelity():
    video, _ = clip()
    grey = torch.full_like(video, 100)
    assert metrics.psnr(video, video) == math.inf and metrics.ssim(video, video) == pytest.approx(1)
    assert metrics.mse(grey, grey + 51) == pytest.approx(0.04) and metrics.psnr(grey, grey + 51) == pytest.approx(
        13.979, abs=1e-3
    )
    # of flat pictures only the luminance counts: (2 a b + c) / (a a + b b + c)
    a, b = 100 / 255, 151 / 255
    assert metrics.ssim(grey, grey + 51) == pytest.approx((2 * a * b + 1e-4) / (a * a + b * b + 1e-4), abs=1e-6)
    little, much = (metrics.ssim(noisy(video, sigma), video) for sigma in (5, 40))
    assert 1 > little > 0.7 > 0.3 > much > 0
    for metric in (metrics.psnr, metrics.mse, metrics.ssim):
        refused("has shape .*, the reference", video, video[:2], call=metric)
    refused("11 pixels or more", video[:, :8], video[:, :8], call=metrics.ssim)


def test_outside_of_the_mask_alone():
    """As PIE-Bench has it: black there in both, and compared whole."""
    video, mask = clip()
    other, _ = clip(colour="blue")
    assert metrics.psnr(other, video) < 30 < 45 < metrics.psnr(other, video, (mask > 0).float())
    half = torch.zeros(video.shape[:3])
    half[..., :64] = 1
    changed = video.clone()
    changed[..., 64:, :] = 255 - changed[..., 64:, :]
    whole = metrics.mse(changed[:, :, 64:], video[:, :, 64:])
    assert metrics.mse(changed, video, half) == pytest.approx(whole / 2)
    assert metrics.ssim(changed, video, 1 - half) == pytest.approx(1)


def test_flicker_is_not_motion():
    frames = torch.arange(8)[:, None, None, None].expand(8, 16, 16, 3)
    even, still = (frames * 20).to(torch.uint8), torch.full((8, 16, 16, 3), 90, dtype=torch.uint8)
    assert metrics.frame_difference(even) == pytest.approx(20 / 255) and metrics.flicker(even) == 0
    blinking = still + (frames % 2 * 10).to(torch.uint8)
    assert metrics.flicker(blinking) == pytest.approx(10 / 255) and metrics.flicker(still) == 0
    assert math.isnan(metrics.flicker(still[:2]))


def test_a_video_that_moves_as_its_source_warps_onto_itself():
    source, _ = clip(motion="slide")
    recoloured, _ = clip(motion="slide", colour="blue")
    elsewhere, _ = clip(motion="bounce")
    own, kept, other, noise = metrics.warp_errors([source, recoloured, elsewhere, noisy(source, 25)], source)
    assert max(own, kept) < 0.5 * other
    assert noise > 5 * own and metrics.warp_errors([recoloured], source) == [kept]
    assert math.isnan(*metrics.warp_errors([source[:1]], source[:1]))


def test_motion_fidelity():
    source, _ = clip(motion="slide")
    recoloured, _ = clip(motion="slide", colour="blue", background="sand")
    backwards = source.flip(0)
    still = source[:1].expand_as(source)
    same, kept, against = (metrics.motion_fidelity(video, source) for video in (source, recoloured, backwards))
    assert same == pytest.approx(1, abs=1e-3) and kept > 0.9 and against < 0
    assert math.isnan(metrics.motion_fidelity(still, source))


def test_masks_beside_the_truth():
    truth = torch.zeros(3, 8, 8)
    truth[:2, :, :4] = 1  # nothing is there in the third frame
    half = truth.clone()
    half[0, :4], half[1, :, 4] = 0, 1
    assert metrics.mask_iou(truth, truth) == 1 and metrics.missed(truth, truth) == 0
    assert metrics.mask_iou(half, truth) == pytest.approx((0.5 + 0.8) / 2)
    assert metrics.missed(half, truth) == 0.25 and metrics.missed(truth, half) == pytest.approx(0.1)
    assert math.isnan(metrics.mask_iou(truth[2:], truth[2:])) and math.isnan(metrics.missed(truth, 0 * truth))
