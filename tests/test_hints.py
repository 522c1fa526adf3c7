"""ControlNets and fresh noise in the sampling of the core."""

from dataclasses import replace

import pytest
import torch
from diffusers import ControlNetModel

from support.errors import refused
from support.native_models import relative
from support.tiny_unets import stir
from tav_core import (
    PRESETS,
    Condition,
    ContextWindows,
    Control,
    Edit,
    SourceWalk,
    WindowedUNet,
    ddim_sample,
    inflate,
    sample,
    sample_edits,
    with_settings,
)
from tav_core import encode_prompt as encoded
from tav_core.control import ControlledUNet, each_of, facts_of, hints_at
from tav_core.mini.evaluate import steered

STEPS, FRAMES = 2, 4


@pytest.fixture(scope="module")
def net(checkpoint):
    """A ControlNet for the tiny checkpoint that isn't silent."""
    torch.manual_seed(3)
    net = ControlNetModel.from_unet(checkpoint.unet, conditioning_embedding_out_channels=(8, 8, 8, 8))
    for parameter in net.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return net.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def hints():
    generator = torch.Generator().manual_seed(4)
    return torch.randint(256, (FRAMES, 64, 64, 3), generator=generator, dtype=torch.uint8)


@pytest.fixture(scope="module")
def drawn(checkpoint):
    """Latents of an edit, from fixed noise."""
    unet = inflate(checkpoint.unet)
    noise = torch.randn(1, 4, FRAMES, 8, 8, generator=torch.Generator().manual_seed(1))
    words, empty = encoded(checkpoint, "a star"), encoded(checkpoint, "")

    def draw(control=None, model=None, windows=None, steps=STEPS, **settings):
        controls = each_of(control)
        model = model or (unet if control is None else ControlledUNet(unet, [each.model for each in controls]))
        model = model if windows is None else WindowedUNet(model, windows)
        options = dict(guidance_scale=5.0, negative_hidden_states=empty) | settings
        return ddim_sample(model, noise, words, checkpoint.scheduler, steps, controls=controls, **options)

    draw.unet, draw.noise = unet, noise
    return draw


def test_hints_lead_as_the_residuals_of_diffusers(drawn, net, hints):
    pictures = hints.permute(0, 3, 1, 2) / 255
    expected, without = drawn(model=steered(drawn.unet, net, pictures)), drawn()
    assert relative(drawn(Control(net, hints)), expected) < 1e-4 < 1e-2 < relative(expected, without)
    assert torch.equal(drawn(Control(net, hints, strength=0.0)), without)
    half, one = drawn(Control(net, hints, strength=0.5)), drawn(Control(net, hints[:1]))
    assert relative(half, without) > 1e-3 < relative(half, expected)
    assert relative(one, drawn(Control(net, hints[:1].expand(FRAMES, -1, -1, -1)))) < 1e-6
    without_guidance = drawn(model=steered(drawn.unet, net, pictures), guidance_scale=1.0)
    assert relative(drawn(Control(net, hints), guidance_scale=1.0), without_guidance) < 1e-4


def test_several_add_up(checkpoint, drawn, net, hints):
    other = ControlNetModel.from_config(net.config).eval().requires_grad_(False)
    other.load_state_dict({name: weight.flip(0) for name, weight in net.state_dict().items()})
    first, second = Control(net, hints, 0.6), Control(other, 255 - hints, 0.8)
    unet, words = drawn.unet, encoded(checkpoint, "a star")
    seen, told = drawn.noise, {}

    def spied(*args, down_block_additional_residuals, mid_block_additional_residual, **kwargs):
        told[len(told)] = [*down_block_additional_residuals, mid_block_additional_residual]

    for controls in ([first], [second], [first, second], [second, first]):
        model = ControlledUNet(spied, [control.model for control in controls])
        model(seen, torch.tensor(500), words, **hints_at(controls, 0, STEPS, 1, 0, FRAMES))
    assert len(told[2]) == len(told[0]) > 4
    for one, two, both, turned in zip(*(told[at] for at in range(4)), strict=True):
        assert relative(both, one + two) < 1e-5 and relative(turned, both) < 1e-6 and relative(both, one) > 1e-2
    # of which each acts in its own steps
    halves = [replace(first, end=0.5), replace(first, start=0.5)]
    alone, together, half = drawn(first), drawn(halves), drawn(halves[0])
    assert relative(together, alone) < 1e-5 and relative(half, alone) > 1e-4
    run = (checkpoint, unet, drawn.noise, "a star", replace(PRESETS["paper"], sampling_steps=1))
    assert torch.equal(sample(*run, control=[first]), sample(*run, control=first))
    assert torch.equal(sample(*run, control=[]), sample(*run))


def test_what_decides_is_a_value_for_one_and_a_list_for_several(net, hints):
    one, other = Control(net, hints, 0.5), Control(net, hints[:1], end=0.7)
    alone, both = facts_of(one), facts_of([one, other])
    assert alone == facts_of([one]) and alone["control_strength"] == 0.5
    assert both["control_strength"] == [0.5, 1.0] and both["control_end"] == [1.0, 0.7]
    assert both["hints"][0] == alone["hints"] != both["hints"][1] and both != facts_of([other, one])
    assert facts_of(None) == facts_of([]) == dict.fromkeys(alone)


def test_hints_act_in_a_share_of_the_steps(net, hints):
    def acts(start, end):
        control = Control(net, hints, 1.0, start, end)
        return [bool(hints_at([control], step, 4, 3, 1, FRAMES)) for step in range(4)]

    assert acts(0.0, 1.0) == [True] * 4 and acts(0.0, 0.5) == [True, True, False, False]
    assert acts(0.5, 1.0) == [False, False, True, True] and acts(0.3, 0.9) == [False, False, True, False]
    both = [Control(net, hints, 0.7), Control(net, 255 - hints[:1], 0.4, end=0.5), Control(net, hints, 1.0, start=0.5)]
    given = hints_at(both, 0, STEPS, 3, 1, FRAMES)
    strengths = given["strengths"].unflatten(0, (3, FRAMES)).mean(1)
    assert torch.allclose(strengths, torch.tensor([[0, 0, 0], [0.7, 0.4, 0], [0.7, 0.4, 0]]))
    of_last = given["hints"].unflatten(0, (3, FRAMES))[2]
    assert torch.equal(of_last[:, 0], hints) and torch.equal(of_last[3, 1], 255 - hints[0])


def test_the_clip_beside_an_edit_sees_no_hint(drawn, net, hints, checkpoint):
    """Its own way back is the one that it takes without a ControlNet."""
    ends, empty = [], Condition(encoded(checkpoint, ""))
    for control in (None, Control(net, hints)):
        walk = SourceWalk(1.0)
        edit = drawn(control, source_walk=walk, source_hidden_states=empty)
        ends.append((walk.x, edit))
    assert relative(ends[1][0], ends[0][0]) < 1e-5 and relative(ends[1][1], ends[0][1]) > 1e-2


def test_hints_lead_edits_that_are_drawn_together_and_not_their_clip(checkpoint, drawn, net, hints):
    preset, edits = replace(PRESETS["mini"], sampling_steps=STEPS), [Edit("a star"), Edit("a ring", guidance_scale=2.0)]
    unet, windows = stir(inflate(checkpoint.unet)), with_settings(preset, context_length=3, context_overlap=2)

    def latents(edits, preset, **settings):
        seen = []
        options = dict(source_prompt="a ball", callback=seen.append) | settings
        sample_edits(checkpoint, unet, drawn.noise, edits, preset, **options)
        return seen[-1].latents

    for settings in (preset, windows):
        together = latents(edits, settings, control=Control(net, hints))
        for edit, found in zip(edits, together.split(1)):
            alone = latents([edit], settings, control=Control(net, hints))
            assert relative(found, alone) < 1e-4 < 1e-2 < relative(found, latents([edit], settings))


def test_windows_see_the_hints_of_their_frames(drawn, net, hints):
    windows, told = ContextWindows(3, 2), []

    class Spied(ControlledUNet):
        def __call__(self, latents, timesteps, text, hints=None, **kwargs):
            told.append(hints[: latents.shape[2], 0])
            return super().__call__(latents, timesteps, text, hints, **kwargs)

    drawn(Control(net, hints), Spied(drawn.unet, [net]), windows, steps=1)
    assert len(told) > 1 and all(torch.equal(of[0], hints[0]) and len(of) == 3 for of in told)
    assert any(torch.equal(of[-1], hints[-1]) for of in told)


def test_hints_that_do_not_fit(checkpoint, drawn, net, hints):
    preset = replace(PRESETS["paper"], sampling_steps=1)

    def told(problem, *args, **kwargs):
        refused(problem, *args, call=Control, **kwargs)

    told("strength=11 is out of range", net, hints, 11)
    told("end=0.2 is not behind start, 0.5; give it a larger number", net, hints, 1.0, 0.5, 0.2)
    told("hints are torch.float32 of shape", net, hints.float())
    run = (checkpoint, drawn.unet, drawn.noise, "a star", preset)
    for of, problem in ((hints[:3], "are 3, and the clip has 4 frames; give one picture for all frames"),
                        (hints[:, :32], "are 64 x 32, the clip is 64 x 64")):  # fmt: skip
        refused(problem, *run, control=Control(net, of), call=sample)
    config = {**net.config, "cross_attention_dim": 64}
    refused("is for another family of checkpoints \\(text of width 64", *run, call=sample,
            control=Control(ControlNetModel.from_config(config), hints))  # fmt: skip


def test_fresh_noise_follows_its_generator(checkpoint, drawn):
    def video(eta, seed):
        preset = replace(PRESETS["paper"], sampling_steps=2, eta=eta)
        generator = torch.Generator().manual_seed(seed)
        return sample(checkpoint, drawn.unet, drawn.noise, "a star", preset, generator=generator).float()

    one, again, other, none = video(0.8, 1), video(0.8, 1), video(0.8, 2), video(0.0, 1)
    assert torch.equal(one, again) and torch.equal(none, video(0.0, 2))
    assert min((one - other).abs().mean(), (one - none).abs().mean()) > 0.2  # of 255, by a model that knows nothing
