"""What callers hand over as frames and masks, and how the public things show themselves."""

import re

import pytest
import torch
from PIL import Image

import tav_core as tav
from support.errors import refused
from tav_core import metrics, pipeline
from tav_core.events import Plan, Reading, Stage
from tav_core.frames import as_frames, as_mask
from tav_core.measure import measure

CLIP = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def source(checkpoint):
    return tav.prepare(checkpoint, CLIP, "a red ball")


@pytest.mark.parametrize("given", [
    CLIP.numpy(), CLIP.numpy()[::-1][::-1], [Image.fromarray(frame) for frame in CLIP.numpy()],
    tuple(Image.fromarray(frame).convert("RGBA") for frame in CLIP.numpy()),
], ids=["array", "turned array", "images", "images with alpha"])  # fmt: skip
def test_a_clip_comes_in_several_forms(checkpoint, source, given):
    again = tav.prepare(checkpoint, given, "a red ball")
    assert torch.equal(again.frames, CLIP) and torch.equal(again.take.latents, source.take.latents)
    assert torch.equal(tav.Clip(given, 8, "x").frames, CLIP)


def test_images_come_as_a_player_shows_them():
    clear = Image.new("RGBA", (2, 2), (200, 100, 0, 0))
    grey, black = (as_frames([image])[0, 0, 0].tolist() for image in (Image.new("L", (2, 2), 7), clear))
    assert grey == [7, 7, 7] and black == [0, 0, 0]
    array = CLIP.numpy()
    array.flags.writeable = False
    assert torch.equal(as_frames(array), CLIP)
    assert as_frames(CLIP).data_ptr() == CLIP.data_ptr()  # no copy


WRONG = [
    (CLIP / 255, r"^frames has dtype float32 and shape \(2, 64, 64, 3\); give uint8 .* times 255"),
    ((CLIP / 255).double().numpy(), "has dtype float64"), (CLIP.long(), "has dtype int64"),
    (CLIP > 9, "has dtype bool"),
    (CLIP.movedim(3, 1), r"has shape \(2, 3, 64, 64\), which is no video; put the channels last"),
    (CLIP[..., 0], "grey ones with their channel three times"), (CLIP[..., :1], "repeat the grey channel"),
    (torch.cat([CLIP, CLIP[..., :1]], 3), "leave out alpha"), (CLIP[0], r"give a picture alone as frames\[None\]"),
    (CLIP[None], "give f h w 3"), (CLIP[:0], "one frame or more"), ([], "is empty; give one frame or more"),
    (list(CLIP), "is a list of Tensor; stack them"), ("clip.mp4", "is of type str, which is no clip"),
    ([Image.new("RGB", (2, 2)), Image.new("RGB", (2, 3))], r"is of several sizes \(2x2, 2x3\)"),
]  # fmt: skip


@pytest.mark.parametrize("given, told", WRONG, ids=range(len(WRONG)))
def test_what_is_no_clip_is_refused_by_its_name(checkpoint, given, told):
    refused(told, checkpoint, given, "a ball", call=tav.prepare)


@pytest.mark.parametrize("call, name", [
    (lambda bad: tav.Clip(bad, 8, "x"), "frames"),
    (lambda bad: tav.save_noise("x", tav.InvertedNoise(CLIP, "a", None, bad), tav.PRESETS["mini"]), "frames"),
    (lambda bad: tav.strip([CLIP, bad], ["a", "b"]), "videos"),
    (lambda bad: tav.side_by_side([CLIP, bad], ["a", "b"]), "videos"),
    (lambda bad: measure("x", CLIP, bad, "a"), "source"), (lambda bad: measure("x", bad, CLIP, "a"), "edited"),
    (lambda bad: metrics.psnr(CLIP, bad), "reference"), (lambda bad: metrics.ssim(bad, CLIP), "frames"),
    (lambda bad: metrics.flicker(bad), "frames"), (lambda bad: metrics.frame_difference(bad), "frames"),
    (lambda bad: metrics.warp_errors([CLIP], bad), "source"),
    (lambda bad: metrics.motion_fidelity(bad, CLIP), "frames"),
    (lambda bad: pipeline.drawn_subject(torch.ones(2, 64, 64), bad, 0), "frames"),
], ids=range(13))  # fmt: skip
def test_all_that_takes_a_clip_refuses_floats(call, name):
    refused(f"^{name} has dtype float32", CLIP / 255, call=call)


def test_floats_are_for_videos_to_write(tmp_path):
    for name, frames in (("a", CLIP), ("b", CLIP / 255), ("c", [Image.fromarray(frame) for frame in CLIP.numpy()])):
        tav.save_video(frames, tmp_path / f"{name}.mp4", 8)
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1
    assert as_frames(torch.full((1, 1, 1, 3), 1.2), floats=True).unique().tolist() == [255]  # a resize's overshoot
    for bad, told in ((CLIP.float(), "0 to 255; bring them to 0 ... 1"), (CLIP * torch.nan, "nan to nan")):
        refused(f"^frames has numbers from {told}", bad, tmp_path / "d.mp4", 8, call=tav.save_video)


def test_a_mask_has_the_size_and_the_scale_of_one():
    half = torch.zeros(2, 64, 64)
    half[:, :32] = 1
    for given in (half, half.numpy(), half > 0):
        assert torch.equal(as_mask(given, CLIP), half)
    refused("mask has numbers from 0 to 255; bring them to 0 ... 1", half * 255, CLIP, call=as_mask)
    refused("mask is 1 of 64x64 for 2 frames of 64x64", half[:1], CLIP, call=as_mask)
    refused(r"mask has shape \(1, 2, 64, 64\); give f h w", half[None], CLIP, call=as_mask)
    refused("mask has numbers from 0 to 255", CLIP, CLIP, half * 255, call=metrics.psnr)


def test_everything_shows_itself_in_one_line(checkpoint, source, capsys):
    preset = tav.with_settings(tav.PRESETS["mini"], steps=2, keep=[1], sampling_steps=1, memory="fast")
    unet, result = tav.tune_on(checkpoint, [source], preset, callback=print)
    first, second = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"tune 1/2, loss \d\.\d{4}, probe loss \d\.\d{4}, \d+ s left", first)
    assert second.startswith("tune 2/2, ") and second.endswith(", 0 s left")
    noise = tav.invert(checkpoint, unet, source, preset, callback=print)
    print(tav.Note("a line"), Reading(3), Plan((Stage("tune", 2), Stage("sample", 5))), sep="\n")
    lines = ["invert 1/1, timestep 1", "a line", "read 3", "plan: tune 2, sample 5"]
    assert capsys.readouterr().out.splitlines() == lines
    sound, mask = tav.Sound(torch.zeros(2, 8000), 16000), torch.ones(1, 1, 2, 64, 64)
    inverted = tav.InvertedNoise(noise, "a red ball", mask, CLIP, 12.5, sound)
    seconds = f"{result.seconds:.1f}"
    of_clip, heard = "2 frames of 64x64", "Sound(0.50 s, stereo, 16000 Hz)"
    latents = "2 frames of 8x8 latents in 4 channels, float32 on cpu"
    for thing, line in (
        (checkpoint, "Checkpoint('tiny', made for 64x64, 2.3 M parameters, epsilon, float32 on cpu)"),
        (unet, "VideoUNet(0.7 M parameters, 0.1 M of them tuned, sparse-causal, float32 on cpu)"),
        (tav.Clip(CLIP, 8, "a.mp4", sound), f"Clip({of_clip}, 8 fps, {heard}, 'a.mp4')"),
        (source, f"Source({of_clip}, 'a red ball')"),
        (source.take, f"Take({latents}, Condition(text 1x77x32, float32 on cpu))"),
        (inverted, f"InvertedNoise({latents}, 'a red ball', its subject, the clip ({of_clip}), 12.5 fps, {heard})"),
        (tav.EditPlaces.of("subject", mask, 1), "EditPlaces(changeable, anchor, moving)"),
    ):
        assert repr(thing) == line
    probe = " -> ".join(f"{loss:.4f}" for _, loss in result.probe_losses)
    assert repr(result) == f"TuneResult(2 steps, {seconds} s, probe loss {probe}, 112 tuned weights, kept at 1)"


def test_a_preview_is_drawn_while_tuning_and_changes_nothing(checkpoint, source):
    """With the weights of its step."""
    preset = tav.with_settings(tav.PRESETS["mini"], steps=3, sampling_steps=1, memory="fast", dtype="bf16")
    plain, _ = tav.tune_on(checkpoint, [source], preset)
    seen = []

    def preview(event):
        if isinstance(event, tav.TuningStep):
            noise = tav.invert(checkpoint, event.unet, source, preset)
            seen.append(tav.sample(checkpoint, event.unet, noise, "a blue ball", preset, source_prompt=source.prompt))

    drawn, _ = tav.tune_on(checkpoint, [source], preset, callback=preview)
    weights = [tav.trainable_parameters(unet) for unet in (plain, drawn)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert [video.shape for video in seen] == [CLIP.shape] * 3 and not torch.equal(seen[0], seen[2])
