"""Context windows: how they divide a clip, that they compute what one look computes, long clips, and the nodes."""

import inspect
from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from safetensors.torch import load_file

from support.controls import control_net, controlled, hints, steered
from support.errors import refused
from support.led_sampling import led_sample
from support.native_models import clip, inflated, native, prompt, relative, sample
from support.tuning_runs import CONFIG, SCHEDULER, equal, make_unet, run, steps, stop_at, take, weights
from tav_core import (
    ContextWindows,
    TuneConfig,
    WindowedUNet,
    ddim_invert,
    ddim_sample,
    encode_prompt,
    encode_video,
    inflate,
    load_checkpoint,
    load_video,
    read_tuned,
    save_video,
    to_pixels,
    trainable_parameters,
    tune,
)
from tav_core.errors import Cancelled
from tav_core.mini import world
from tav_core.mini.demo import CLIP
from tav_core.windows import random_window


def video(frames, b=1, seed=0):
    return torch.randn(b, 4, frames, 4, 4, generator=torch.Generator().manual_seed(seed))


def text(entries=1, seed=1):
    return torch.randn(entries, 5, 24, generator=torch.Generator().manual_seed(seed))


def plain_unet():
    return UNet2DConditionModel.from_config({**make_unet().config})


def awake(unet):
    """Its temporal attention has an effect, as after a tuning."""
    with torch.no_grad():
        for name, parameter in trainable_parameters(unet).items():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
    return unet


# ------------------------------------------------------------------------------------------------- the windows


@pytest.mark.parametrize(
    "frames, length, overlap", [(120, 8, 4), (9, 8, 4), (8, 8, 2), (11, 3, 2), (50, 16, 15), (33, 7, 2)]
)
def test_every_frame_is_covered_once_and_follows_its_previous_one(frames, length, overlap):
    for t in range(1, 1000, 40):
        shares = torch.zeros(frames)
        reach = 0
        for seen, shares_of_it in ContextWindows(length, overlap).windows(frames, t):
            assert len(seen) == len(shares_of_it) == length
            assert seen[0] == 0 and (seen[1:].diff() == 1).all()
            assert reach + 1 >= seen[1] and (reach == 0 or reach - seen[1] + 1 >= overlap - 1)  # beside frame 0
            previous = torch.where(seen == 0, 0, seen - 1)
            right = torch.cat([seen[:1], seen[:-1]]) == previous
            assert (shares_of_it[~right] == 0).all()
            shares[seen] += shares_of_it
            reach = seen[-1]
        assert reach == frames - 1
        torch.testing.assert_close(shares, torch.ones(frames))


def test_windows_move_with_the_timestep_alone():
    def starts(t):
        return tuple(seen[1].item() for seen, _ in ContextWindows(8, 4).windows(120, t))

    assert starts(481) == starts(481)
    used = [set(starts(t)) for t in range(1, 1000, 40)]
    border = [sum(frame in found for found in used) for frame in range(2, 113)]
    assert min(border) > 0 and max(border) <= len(used) / 2


@pytest.mark.parametrize("length, overlap, told", [
    (2, 2, "context_length=2 is out of range; give an integer from 3"), (8.0, 4, "context_length=8.0 is out of "
                                                                                        "range"),
    (8, 8, "context_overlap=8 doesn't fit a context_length of 8; give 2 to 7"), (8, 1, "context_overlap=1 doesn't fit"),
])  # fmt: skip
def test_windows_that_cannot_be(length, overlap, told):
    refused(told, length, overlap, call=ContextWindows)


def test_a_clip_shorter_than_a_window():
    unet = WindowedUNet(make_unet(), ContextWindows(8))
    refused(
        "context_length=8 is more than the 5 frames of the clip; give it at most 5, or a longer clip",
        video(5),
        1,
        text(),
        call=unet,
    )


# ------------------------------------------------------------------------------------------- what they compute


@torch.no_grad()
def test_a_clip_as_long_as_the_window_is_seen_as_without_windows():
    unet = awake(make_unet())
    windowed = WindowedUNet(unet, ContextWindows(6))
    settings = dict(
        guidance_scale=3.0,
        negative_hidden_states=text(seed=3),
        attention_injection=0.5,
        source_hidden_states=text(seed=2),
    )
    noise = [ddim_invert(model, video(6), text(), SCHEDULER, 4) for model in (unet, windowed)]
    videos = [led_sample(model, noise[0], text(), SCHEDULER, 4, **settings) for model in (unet, windowed)]
    # to rounding: a window is a copy of the frames, and its share of them may round; shorter windows differ by 0.05 and
    # more
    assert all((a - b).abs().max() < 1e-4 for a, b in (noise, videos))


@torch.no_grad()
def test_a_still_clip_is_sampled_as_one_picture():
    unet, one = make_unet(), video(1)
    windowed = WindowedUNet(unet, ContextWindows(5, 3))
    settings = dict(
        guidance_scale=3.0,
        negative_hidden_states=text(seed=3),
        attention_injection=0.5,
        source_hidden_states=text(seed=2),
    )
    wanted = led_sample(unet, one, text(), SCHEDULER, 3, **settings)
    out = led_sample(windowed, one.expand(-1, -1, 23, -1, -1), text(), SCHEDULER, 3, **settings)
    assert (out - wanted).abs().max() < 1e-4


@torch.no_grad()
def test_frames_that_see_nothing_but_the_first_are_predicted_as_at_once():
    unet = inflate(plain_unet(), attention="first", norm="frame")
    windowed = WindowedUNet(unet, ContextWindows(6, 3))
    x, said, t = video(25, b=2), text(50), torch.tensor([300, 700])
    assert (windowed(x, t, said) - unet(x, t, said)).abs().max() < 1e-5


@pytest.mark.parametrize("texts", [1, 2, 2 * 20])
def test_text_and_residuals_are_those_of_the_frames(texts):
    x, said, shapes = video(20, b=2), text(texts), []
    residual = video(1, b=40, seed=5)[:, :, 0]

    def each_frame_by_itself(latents, t, text, down):
        b, _, f, _, _ = latents.shape
        shapes.append((b, f, len(down[0])))
        text = text.mean((1, 2)).repeat_interleave(b * f // len(text)).reshape(b, 1, f, 1, 1)
        return latents * text + down[0].reshape(b, f, 4, 4, 4).transpose(1, 2)

    out = ContextWindows(8, 3)(each_frame_by_itself, x, torch.tensor([7, 7]), said, down=[residual])
    assert set(shapes) == {(2, 8, 16)}
    rows = said.mean((1, 2)).repeat_interleave(40 // texts).reshape(2, 1, 20, 1, 1)
    torch.testing.assert_close(out, x * rows + residual.reshape(2, 20, 4, 4, 4).transpose(1, 2))


class Counting:
    """Counts the frames that a U-Net sees at once."""

    def __init__(self, unet):
        self.unet, self.frames = unet, []
        self.dtype, self.device, self.frame_context = unet.dtype, unet.device, unet.frame_context

    def __call__(self, latents, *args):
        self.frames.append(len(latents) * latents.shape[2])
        return self.unet(latents, *args)


@pytest.mark.slow
def test_80_frames_are_one_video():
    scenes = 2 * world.clip_scenes(world.Scene(radius=0.2), "circle", 40)  # the same speed all along
    checkpoint = load_checkpoint("mini")
    unet = Counting(inflate(checkpoint.unet))
    latents, _ = encode_video(checkpoint, to_pixels(torch.from_numpy(world.render_clip(scenes))))
    said, wish = (encode_prompt(checkpoint, f"a {colour} ball is circling on the grass") for colour in ("red", "blue"))
    windowed = WindowedUNet(unet, ContextWindows(8, 4))
    noise = ddim_invert(windowed, latents, said, checkpoint.scheduler, 2)
    out = ddim_sample(windowed, noise, wish, checkpoint.scheduler, 2, guidance_scale=3.0, negative_hidden_states=said)
    assert out.shape == latents.shape and torch.isfinite(out).all()
    assert set(unet.frames) == {8, 16}  # as much at once as a clip of 8 frames, and its negative prompt

    change = out.diff(dim=2).abs().mean((0, 1, 3, 4))  # between frame i and i + 1
    borders = torch.zeros(79, dtype=torch.bool)
    for seen, _ in ContextWindows(8, 4).windows(80, 1):  # of the last step, which the others can't smooth
        borders[seen[1] - 1] = borders[seen[-1] - 1] = True
    assert 30 < borders.sum() < 50
    assert change[borders].mean().item() == pytest.approx(change[~borders].mean().item(), rel=0.1)

    masks = [world.subject_mask(scene, 16) > 0 for scene in scenes[:40]]
    stage = ~torch.from_numpy(sum(masks) > 0)
    assert stage.sum() > 60
    drift = (out[0, :, -1] - out[0, :, 0])[:, stage].abs().mean()
    assert drift < 0.1 * out[0, :, 0][:, stage].std()


# --------------------------------------------------------------------------------------------------- tuning


LONG = dict(latents=video(11), latents_std=torch.full((1, 4, 11, 4, 4), 0.1), encoder_hidden_states=text())
WINDOWED = replace(CONFIG, context_length=4)


@pytest.mark.slow
def test_tuning_over_windows_is_resumed_to_the_same_weights(tmp_path):
    whole, path, seen = make_unet(), tmp_path / "run.safetensors", []
    result = run(whole, WINDOWED, **LONG)
    with pytest.raises(Cancelled):
        run(make_unet(), WINDOWED, state_path=path, callback=stop_at(3), **LONG)
    resumed = run(parts := make_unet(), WINDOWED, state_path=path, callback=seen.append, **LONG)
    assert steps(seen) == [4, 5, 6]
    assert equal(weights(whole), weights(parts)) and resumed.probe_losses == result.probe_losses
    for other in (replace(CONFIG, context_length=5), CONFIG):
        refused("context_length changed", make_unet(), other, state_path=path, call=run, **LONG)


def test_a_step_sees_a_window_with_the_text_of_its_frames(monkeypatch):
    import tav_core.tuning

    calls, inner = [], tav_core.tuning.tuning_loss
    monkeypatch.setattr(tav_core.tuning, "tuning_loss", lambda *args: (calls.append(args), inner(*args))[1])
    frames = torch.arange(11.0)
    numbered = {"latents": frames.view(1, 1, 11, 1, 1).expand(1, 4, 11, 4, 4), "latents_std": None,
                "encoder_hidden_states": frames.view(11, 1, 1).expand(11, 5, 24)}  # fmt: skip
    run(make_unet(), replace(WINDOWED, steps=40, probe_every=40), **numbered)
    windows = [args[2][0, 0, :, 0, 0].tolist() for args in calls]
    assert all(window == args[5].encoder_hidden_states[:, 0, 0].tolist() for window, args in zip(windows, calls))
    assert all(window[0] == 0 and window[1:] == list(range(int(window[1]), int(window[1]) + 3)) for window in windows)
    assert windows[:2] == windows[-2:] == [[0, 1, 2, 3], [0, 8, 9, 10]]  # the probe looks at both ends
    counts = torch.bincount(torch.tensor(windows[2:-2])[:, 1:].flatten().long(), minlength=11)[1:]
    assert (counts > 0).all()


def test_all_frames_are_learned_about_equally():
    counts, generator = torch.zeros(60), torch.Generator().manual_seed(0)
    for _ in range(4000):
        counts[random_window(60, 8, generator)] += 1
    assert (
        counts[0] == 4000 and counts[1:].min() > 0.7 * counts[1:].mean() and counts[1:].max() < 2.2 * counts[1:].mean()
    )


def test_a_context_length_for_tuning_that_cannot_be():
    refused("context_length=2 is out of range", context_length=2, call=TuneConfig)
    refused(
        "context_length=12 is more than the 11 frames",
        make_unet(),
        replace(CONFIG, context_length=12),
        call=run,
        **LONG,
    )


# --------------------------------------------------------------------------------------------- the command line


@pytest.mark.slow
def test_commands_on_long_clips(tav, tmp_path):
    fast = ["--steps", 2, "--sampling-steps", 2, "--size", 64]
    mini = ["--checkpoint", "mini"]
    edit = ["edit", *mini, "--video", CLIP, "--prompt", "a red ball", "--edit", "a blue ball", "--frames", 8, *fast]
    windows = ["--context-length", 4, "--context-overlap", 2]
    out = tmp_path / "out"
    assert "--context-length 9 is more than the 8 frames" in tav(
        *edit, "--output", out, "--context-length", 9, fails=True
    )
    assert "--context-overlap 4 doesn't fit a --context-length of 4; give 2 to 3" in tav(
        *edit, "--output", out, "--context-length", 4, fails=True
    )
    assert not out.exists()
    tav(*edit, "--output", out, *windows)
    assert len(load_video(out / "edit-1-a-blue-ball.mp4").frames) == 8
    info = read_tuned(out / "tuned.safetensors")
    assert info.num_frames == info.config["context_length"] == 4

    save_video(load_video(CLIP).frames.repeat(2, 1, 1, 1), tmp_path / "long.mp4", 8)
    noise = tmp_path / "noise.safetensors"
    tuned = [*mini, "--tuned", out / "tuned.safetensors", "--context-overlap", 2, "--sampling-steps", 2]
    tav("invert", "--video", tmp_path / "long.mp4", "--frames", 13, "--output", noise, *tuned)
    assert load_file(noise)["latents"].shape == (1, 4, 13, 8, 8)
    sample = ["sample", "--edit", "a star", "--output", tmp_path / "sampled", *tuned]
    for number, more, frames in ((1, ["--noise", noise], 13), (2, ["--frames", 9], 9)):
        tav(*sample, *more)
        assert len(load_video(tmp_path / "sampled" / f"edit-{number}-a-star.mp4").frames) == frames
    assert "--frames 0 is out of range" in tav(*sample, "--frames", 0, fails=True)


# ------------------------------------------------------------------------------------------------------ nodes


@pytest.fixture
def long(mini, inference_mode):
    """9 frames as LATENT and as the core sees them."""
    frames = load_video(CLIP, width=128, height=128).frames
    latent = {"samples": mini.vae.encode(torch.cat([frames, frames[-2:-1]]).float() / 255)}
    return latent, mini.model.model.process_latent_in(latent["samples"]).movedim(0, 1)[None]


def test_nodes_are_the_core_over_windows(pack, mini, long):
    nodes, caption, edit = pack.nodes, "a red ball is sliding on the grass", "a blue star is sliding on the snow"
    (latent, latents), windows = long, ContextWindows(4, 2)
    model = nodes.ContextWindows.execute(mini.inflated, 4, 2).args[0]
    led = nodes.AttentionInjection.execute(model, mini.encode(caption), 0.5).args[0]
    noise = nodes.DDIMInversion.execute(led, latent, mini.encode(caption), 4, "ddim_uniform", False).args[0]
    edited = nodes.VideoSampler.execute(
        led, mini.encode(edit), mini.encode(""), noise, 4, 5.0, "ddim_uniform", 0.0, False, 0
    )

    unet = WindowedUNet(inflate(mini.checkpoint.unet), windows)
    scheduler = DDIMScheduler.from_config(mini.checkpoint.scheduler.config, set_alpha_to_one=True)
    said, wish, empty = (encode_prompt(mini.checkpoint, words) for words in (caption, edit, ""))
    start = ddim_invert(unet, latents, said, scheduler, 4)
    settings = dict(
        guidance_scale=5.0, negative_hidden_states=empty, source_hidden_states=said, attention_injection=0.5
    )
    wanted, at_once = (led_sample(u, start, wish, scheduler, 4, **settings) for u in (unet, unet.unet))
    out = mini.model.model.process_latent_in(edited.args[0]["samples"]).movedim(0, 1)[None]
    assert (out - wanted).abs().max() < 1e-3 < 0.02 < (wanted - at_once).abs().max()


def test_one_shot_tune_learns_the_whole_clip_and_its_model_takes_any_length(pack, mini, long, tmp_path, monkeypatch):
    import folder_paths

    monkeypatch.setattr(folder_paths, "get_user_directory", lambda: str(tmp_path))
    nodes, caption, (latent, latents) = pack.nodes, "a red ball is sliding on the grass", long
    model = nodes.ContextWindows.execute(mini.inflated, 4, 2).args[0]
    tuned, learned, *_ = nodes.OneShotTune.execute(
        model,
        latent,
        mini.encode(caption),
        3,
        1e-3,
        0,
        "fp32",
        "fast",
        "uniform",
        3,
        mini.encode("a blue ball"),
        mini.vae,
    ).args
    with torch.inference_mode(False):
        wanted = tune(
            inflate(mini.checkpoint.unet),
            mini.checkpoint.scheduler,
            [take(latents.clone(), encode_prompt(mini.checkpoint, caption).clone())],
            TuneConfig(steps=3, learning_rate=1e-3, context_length=4),
        )
    assert max((learned.tensors[name] - weight).abs().max() for name, weight in wanted.weights.items()) < 1e-4
    assert learned.info.num_frames == learned.info.config["context_length"] == 4

    def inverted(model):
        return nodes.DDIMInversion.execute(model, latent, mini.encode(""), 2, "ddim_uniform", False).args[0]["samples"]

    over_windows = inverted(tuned)
    applied = nodes.ApplyTunedWeights.execute(mini.inflated, learned).args[0]
    with pytest.raises(
        ValueError, match="9 frames, this MODEL was tuned on 4.* or a long clip through Context Windows"
    ):
        inverted(applied)
    assert torch.equal(inverted(nodes.ContextWindows.execute(applied, 0, 2).args[0]), over_windows)
    assert not torch.equal(
        inverted(nodes.ContextWindows.execute(tuned, 6, 2).args[0]), over_windows
    )  # the last node counts


@pytest.fixture
def tuned_on_4(pack, inference_mode):
    """A MODEL tuned on 4 frames, and one of the same weights that takes any number of them at once."""
    bridge, model = pack.nodes.native, inflated(pack, native())
    generator = torch.Generator().manual_seed(0)
    weights = {
        n: p + 0.05 * torch.randn(p.shape, generator=generator) for n, p in bridge.trainable_weights(model).items()
    }
    tuned = bridge.with_tuned_weights(model, weights, 4)
    free = tuned.clone()
    del free.model_options["transformer_options"][bridge.FRAMES]
    return tuned, free


def core_windows(model, length):
    from comfy_extras.nodes_context_windows import ContextWindowsManualNode

    newer = (
        {"freenoise": False} if "freenoise" in inspect.signature(ContextWindowsManualNode.execute).parameters else {}
    )
    return ContextWindowsManualNode.execute(model, length, 2, "standard_static", 1, False, "pyramid", 0, **newer).args[
        0
    ]


def test_windows_of_the_core(tuned_on_4):
    import comfy.sample
    import comfy.samplers
    from comfy.context_windows import IndexListContextHandler

    class Once(comfy.samplers.Sampler):
        def sample(self, model_wrap, sigmas, extra_args, callback, noise, *args, **kwargs):
            return model_wrap(noise, sigmas[:1].expand(len(noise)), **extra_args)

    def predicted(model, x):  # the older core wants as many levels as frames
        return comfy.sample.sample_custom(
            model, x, 4.0, Once(), torch.linspace(7, 0, 8), prompt(1), prompt(2), torch.zeros_like(x), disable_pbar=True
        )

    (tuned, free), x = tuned_on_4, 7 * clip(8)
    anchored = "causal_window_fix" in inspect.signature(IndexListContextHandler).parameters
    blended, total, weights = (
        torch.zeros_like(x),
        torch.zeros(8, 1, 1, 1),
        torch.tensor([1.0, 2, 2, 1]).view(-1, 1, 1, 1),
    )
    for first in (0, 2, 4):
        before = int(anchored and first > 0)
        window = predicted(free, x[first - before : first + 4])[before:]
        blended[first : first + 4] += weights * window
        total[first : first + 4] += weights
    assert relative(predicted(core_windows(tuned, 4), x), blended / total) < 1e-4
    assert relative(predicted(free, x), blended / total) > 1e-3
    with pytest.raises(
        ValueError,
        match="context_length gives a window of 3 frames, this MODEL was tuned on 4; set it to 4, or use "
        r"Context Windows \(Tune-A-Video\)",
    ):
        predicted(core_windows(tuned, 3), x)


def test_windows_of_the_core_and_hints(tuned_on_4):
    windowed, net = core_windows(tuned_on_4[0], 4), control_net(1)
    for hint, frames in ((hints(), 5), (hints(4), 4)):  # one for all; no more frames than a window has
        told = controlled(prompt(1), (net, hint, 1.0, 0.0, 1.0))
        assert torch.isfinite(
            steered(windowed, told, clip(frames))
        ).all()  # the older core wants as many levels as frames
    with pytest.raises(ValueError, match=r"ControlNet has a hint for each frame, .*; use Context Windows \(Tune"):
        steered(windowed, controlled(prompt(1), (net, hints(5), 1.0, 0.0, 1.0)), clip(5))


def test_windows_of_the_core_and_attention_injection(pack, tuned_on_4):
    led = pack.nodes.AttentionInjection.execute(tuned_on_4[0], prompt(1), 0.5).args[0]
    assert torch.isfinite(sample(core_windows(led, 8), 4, steps=1)).all()  # all in one
    with pytest.raises(ValueError, match=r"don't go together; use Context Windows \(Tune-A-Video\)"):
        sample(core_windows(led, 4), 8, steps=7)


def test_room_is_made_for_a_window(pack, inference_mode, monkeypatch):
    import comfy.sampler_helpers

    shapes, inner = [], comfy.sampler_helpers.estimate_memory
    monkeypatch.setattr(
        comfy.sampler_helpers, "estimate_memory", lambda *args: (shapes.append(list(args[1])), inner(*args))[1]
    )
    model = pack.nodes.ContextWindows.execute(inflated(pack, native()), 4, 2).args[0]
    assert torch.isfinite(sample(model, 7, steps=1)).all()
    assert shapes == [[4, 4, 16, 16]]


def test_each_frame_has_its_hint_in_every_window(pack, inference_mode):
    # frames that look at frame 0 alone are predicted in windows as at once
    model, noise = inflated(pack, native(), norm="frame", attention="first"), clip(6)
    windowed = pack.nodes.ContextWindows.execute(model, 4, 2).args[0]
    prompts = controlled(prompt(1), (control_net(1), hints(6), 1.0, 0.0, 1.0))
    wanted, out = (steered(model, prompts, noise, cfg=1.0) for model in (model, windowed))
    assert relative(out, wanted) < 1e-4 < 1e-2 < relative(out, sample(windowed, 6, cfg=1.0, steps=4))


def test_windows_that_a_model_cannot_have(pack, inference_mode):
    windows, model = pack.nodes.ContextWindows.execute, inflated(pack, native())
    with pytest.raises(ValueError, match="MODEL is not inflated"):
        windows(native(), 8, 4)
    with pytest.raises(ValueError, match="context_overlap 8 doesn't fit a context_length of 8; give 2 to 7"):
        windows(model, 8, 8)
    with pytest.raises(
        ValueError, match="context_length 0 is the tuned length, and MODEL isn't tuned; give it a number"
    ):
        sample(windows(model, 0, 4).args[0], 5, steps=1)
    with pytest.raises(ValueError, match="context_length 8 is more than the 5 frames of the clip"):
        sample(windows(model, 8, 4).args[0], 5, steps=1)
