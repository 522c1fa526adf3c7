"""Where an edit may change its clip and in which steps the clip leads; backgrounds that stand still; edits that are
drawn together.
"""

import argparse
from dataclasses import replace

import pytest
import torch

from support.errors import refused
from support.led_sampling import led_sample
from support.tiny_unets import stir
from tav_core import (
    PRESETS,
    Edit,
    TuneConfig,
    find_subject,
    inflate,
    invert,
    load_checkpoint,
    prepare,
    sample,
    sample_edits,
    with_settings,
)
from tav_core.injection import ALIKE, ANCHORED, REGIONS, ROOM, STILL, EditPlaces, LedSteps, SourceWalk, agreed, steadied
from tav_core.mini import world
from tav_core.mini.clips import BenchmarkClip
from tav_core.mini.judge import load_judge
from tav_core.mini.scores import look, masks, subject_flicker
from tav_core.subject import filled_out, grown, subject_steps
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


def test_places_of_each_region():
    mask = torch.zeros(1, 1, 2, 8, 8)
    mask[:, :, :, 3:5, 3:5] = 1
    everything, subject, shape, background = (EditPlaces.of(region, mask, margin=1) for region in REGIONS)
    assert everything.changeable is None and torch.equal(everything.anchor, mask)
    assert everything.still.sum() == 2 * (64 - 16)
    assert subject.changeable.sum() == 2 * 16 and torch.equal(subject.anchor, subject.changeable)
    assert subject.still is None
    assert torch.equal(EditPlaces.of("subject", mask, margin=2).changeable, grown(mask, 2))
    assert torch.equal(background.changeable, 1 - mask) and torch.equal(background.still, 1 - mask)
    assert background.anchor is None
    mask[:, :, 0, 3, 3] = mask[:, :, 1, 4, 4] = 0  # with a corner cut off
    shape = EditPlaces.of("shape", mask, margin=1)
    assert torch.equal(shape.changeable, grown(filled_out(mask), 1)) and torch.equal(shape.anchor, -shape.changeable)
    assert torch.equal(shape.moving, mask) and shape.still is None
    assert EditPlaces.of("shape", mask, margin=1, steady=False).moving is None
    assert torch.equal(EditPlaces.of("shape", mask, 1, room=0.5).changeable, grown(filled_out(mask, 0.5), 1))
    assert torch.equal(EditPlaces.of("subject", mask, 1, room=0.5).changeable, grown(mask, 1))
    assert (
        torch.equal(EditPlaces.of("subject", mask, 1).moving, mask) and everything.moving is background.moving is None
    )
    assert all(EditPlaces.of(region, mask, margin=1, steady=False).still is None for region in REGIONS)


def test_a_mask_is_filled_out_to_its_convex_hull():
    mask = torch.zeros(1, 1, 2, 9, 9)
    mask[0, 0, 0, 1:8, 4] = mask[0, 0, 0, 4, 1:8] = 1  # a cross
    full = filled_out(mask)
    assert full[0, 0, 0].sum() == 25 and full[0, 0, 0, 2, 3] == 1 and full[0, 0, 0, 1, 1] == 0
    assert torch.equal(full[0, 0, 1], mask[0, 0, 1])
    assert torch.equal(filled_out(0.3 * mask), 0.3 * mask)  # by less than half nothing is covered
    square = torch.zeros(1, 1, 2, 20, 20)
    square[..., 8:12, 8:12] = 1
    assert filled_out(square, 0.5)[0, 0, 0, 6:14, 9].all() and filled_out(square, 0.5).sum() < 2 * 8 * 8  # rounded


def moving_subject() -> tuple[torch.Tensor, torch.Tensor]:
    """A thing of latents that moves by a pixel a frame, and its mask: `1 4 4 8 12` and `1 1 4 8 12`."""
    thing, video, mask = 3 * some(1, 4, 3, 3), torch.zeros(1, 4, 4, 8, 12), torch.zeros(1, 1, 4, 8, 12)
    for frame in range(4):
        video[:, :, frame, 2:5, 3 + frame : 6 + frame], mask[:, :, frame, 2:5, 3 + frame : 6 + frame] = thing, 1
    return video, mask


def test_a_new_shape_is_the_mean_of_all_frames_along_the_motion():
    clip, mask = moving_subject()
    edit = some(1, 4, 4, 8, 12, seed=1)
    together = agreed(edit, clip, mask, mask)
    parts = torch.stack([edit[:, :, f, 2:5, 3 + f : 6 + f] for f in range(4)])
    for frame in range(4):
        found = together[:, :, frame, 2:5, 3 + frame : 6 + frame]
        assert (found - parts.mean(0)).abs().max() < 1e-5
    outside = (mask == 0).expand_as(edit)
    assert torch.equal(together[outside], edit[outside])


def test_frames_agree_less_where_the_subject_is_another():
    clip, mask = moving_subject()
    edit = some(1, 4, 4, 8, 12, seed=1)
    clip[:, :, 3] += ALIKE * mask[:, :, 3]  # a standard deviation apart from all others
    weight = torch.tensor(-0.5).exp()
    parts = torch.stack([edit[:, :, f, 2:5, 3 + f : 6 + f] for f in range(4)])
    found = agreed(edit, clip, mask, mask)[:, :, 3, 2:5, 6:9]
    assert (found - (weight * parts[:3].sum(0) + parts[3]) / (3 * weight + 1)).abs().max() < 1e-5


def test_a_frame_without_the_subject_keeps_its_own():
    clip, mask = moving_subject()
    edit = some(1, 4, 4, 8, 12, seed=1)
    mask[:, :, 1] = 0
    places = grown(mask, 1)
    places[:, :, 1] = 1  # free to change though nothing is there
    together = agreed(edit, clip, mask, places)
    assert torch.equal(together[:, :, 1], edit[:, :, 1]) and together.isfinite().all()
    parts = torch.stack([edit[:, :, f, 2:5, 3 + f : 6 + f] for f in (0, 2, 3)])
    assert (together[:, :, 0, 2:5, 3:6] - parts.mean(0)).abs().max() < 1e-5


def test_a_subject_that_grows_keeps_one_content():
    y, x = torch.meshgrid(*[torch.arange(24.0) - 11.5] * 2, indexing="ij")
    radii = (4, 6, 8)
    mask = torch.stack([((x**2 + y**2).sqrt() < radius).float() for radius in radii])[None, None]
    edit = torch.stack([(x / radius + k).expand(4, -1, -1) for k, radius in enumerate(radii)], 1)[None]  # a slope
    together = agreed(edit, torch.zeros_like(edit), mask, mask)
    for frame, radius in enumerate(radii):
        inside = (x**2 + y**2).sqrt() < radius / 2
        assert (together[0, :, frame] - (x / radius + 1))[:, inside].abs().max() < 0.06


@pytest.fixture(scope="module")
def bouncing():
    """A clip of the world with its inversion by the untuned checkpoint: edits of it are `draw(**settings)`."""
    mini = load_checkpoint("mini")
    source = prepare(mini, torch.from_numpy(world.render_clip(CLIP.scenes())), CLIP.caption())
    unet = inflate(mini.unet)
    noise, subject = invert(mini, unet, source, PRESET), find_subject(mini, unet, source, CLIP.contrasts(), PRESET)

    def draw(region="shape", steady=True, **settings):
        return sample(mini, unet, noise, CLIP.caption(shape="heart"), replace(PRESET, steady=steady), region=region,
                      source_prompt=source.prompt, subject=subject, source_frames=source.frames,
                      **settings)  # fmt: skip

    return draw, source.frames, subject, mini.downscale


@pytest.mark.slow
def test_a_new_shape_is_one_in_all_frames(bouncing):
    (draw, frames, subject, scale), judge, changes = bouncing, load_judge(), {}
    outside = EditPlaces.of("shape", subject, margin=scale).changeable[0, 0] == 0
    for steady in (False, True):
        video = draw(steady=steady)
        assert torch.equal(video[outside], frames[outside])
        seen = look(judge, video.numpy())
        changes[steady], _ = subject_flicker(video.numpy(), seen.mask.numpy(), CLIP.scenes(shape="heart"))
    assert seen.shape.count("heart") >= 3, seen.shape
    assert changes[True] < 0.8 * changes[False], changes


@pytest.mark.slow
def test_the_clip_is_put_back_around_a_new_shape_that_is_found(bouncing):
    draw, frames, subject, scale = bouncing
    hearts = torch.from_numpy(masks(CLIP.scenes(shape="heart"))) > 0
    room = EditPlaces.of("shape", subject, margin=scale, room=ROOM).changeable[0, 0] > 0
    without = room & (grown(subject, scale // 2)[0, 0] == 0) & ~hearts
    steps, shares = [], {}
    for contrasts in ([], CLIP.contrasts()):
        video = draw(contrasts=contrasts, callback=lambda event: steps.append(event.stage))
        assert torch.equal(video[~room], frames[~room])
        shares[len(contrasts)] = (video == frames).all(-1)[without].float().mean().item()
    assert shares[5] > 0.85 > 0.75 > shares[0], shares
    assert steps.count("subject") == subject_steps(5) and steps.count("sample") == 2 * PRESET.sampling_steps


@pytest.mark.parametrize("share", [0.0, 0.05, 0.6, 1.0])
def test_the_first_share_of_the_steps_is_led_and_two_thirds_of_it_anchored(share):
    sigmas = torch.linspace(14, 0, 26)
    led = LedSteps(sigmas, share)
    assert sum(led.leads(sigma) for sigma in sigmas[:-1]) == round(25 * share)
    assert sum(led.anchors(sigma) for sigma in sigmas[:-1]) == round(ANCHORED * round(25 * share))
    between = (sigmas[14] + sigmas[15]) / 2  # a second look of a sampler, in the step after the 15th level
    assert not led.leads(between) or share == 1.0


def test_a_walk_goes_back_by_ddim_whatever_the_edit_does():
    """Of a model whose noise is known: the walk ends at the clean latents, though it is asked twice at a level."""
    x0, eps, sigmas = some(1, 4, 3, 4, 4), some(1, 4, 3, 4, 4, seed=1), torch.tensor([10.0, 5.0, 1.0, 0.0])
    walk, asked = SourceWalk(1.0), []

    def ask(x, led):
        asked.append((len(x), led.sources))
        return torch.cat([x0, x[1:] * 0.5])

    for sigma in sigmas[:-1]:
        x = x0 + sigmas[0] * eps if sigma == sigmas[0] else some(1, 4, 3, 4, 4, seed=2)
        for _ in range(2):
            out = walk(ask, torch.cat([x, x]), sigma, sigmas, 2)
            assert torch.equal(out, torch.cat([x, x]) * 0.5)
        assert (walk.at(sigma) - (x0 + sigma * eps)).abs().max() < 1e-5
    assert asked == [(3, 1)] * 6
    assert (walk.latents(sigmas[-1]) - x0).abs().max() < 1e-5
    walk.begin()
    assert walk.sigma is None


def test_a_walk_that_neither_leads_nor_holds_costs_nothing():
    walk, asked = SourceWalk(0.5), []
    for sigma in (sigmas := torch.tensor([3.0, 2.0, 1.0, 0.5, 0.0]))[:-1]:
        walk(lambda x, led: asked.append((len(x), led is None)) or x, some(1, 4, 1, 2, 2), sigma, sigmas, 1)
    assert asked == [(2, False), (2, False), (1, True), (1, True)]


# ---------------------------------------------------------------------------------------------- several together

FREE = [Edit("a star"), Edit("0: a ball | 2: a ring", guidance_scale=3.0), Edit("a ring", guidance_scale=1.0)]
HELD = [Edit(f"a star of {region}", region) for region in REGIONS]
TRAVELLING = "0: a | 3: b"  # of as many frames as there are edits in HELD


@pytest.fixture(scope="module")
def tiny(checkpoint):
    """A U-Net that attends over frames, for the tiny checkpoint; the noise of a clip of four frames; its subject."""
    subject = torch.zeros(1, 1, 4, 64, 64)
    for frame in range(4):
        subject[:, :, frame, 16:40, 8 + 8 * frame : 32 + 8 * frame] = 1
    return checkpoint, stir(inflate(checkpoint.unet)), some(1, 4, 4, 8, 8, seed=3), subject


def latents_of(tiny, edits, subject=False, eta=0.0, negative_prompt="", **settings):
    """The latents that edits end in, `b c f h w`, drawn together, and how many videos each step was given."""
    (checkpoint, unet, noise, mask), seen, batches = tiny, [], []
    preset = with_settings(PRESETS["mini"], sampling_steps=4, attention_injection=0.5, eta=eta, **settings)
    hook = unet.register_forward_pre_hook(lambda module, args: batches.append(len(args[0])))
    generators = [torch.Generator().manual_seed(len(edit.prompt)) for edit in edits] if eta else None
    sample_edits(checkpoint, unet, noise, edits, preset, source_prompt="a ball", subject=mask if subject else None,
                 negative_prompt=negative_prompt, generators=generators, callback=seen.append)  # fmt: skip
    hook.remove()
    return seen[-1].latents, batches


@pytest.mark.parametrize("edits, settings, batches", [
    (FREE, {}, [7, 7, 6, 6]),
    (FREE, {"eta": 0.7, "guidance_rescale": 0.5, "guidance_end": 0.75}, [7, 7, 6, 3]),
    (FREE, {"subject": True}, [7] * 4),
    (HELD, {"subject": True, "negative_prompt": TRAVELLING, "eta": 0.5}, [9] * 4),
    (HELD, {"subject": True, "steady": False}, [9] * 4),
    ([replace(edit, attention_injection=0.0) for edit in HELD], {"subject": True}, [9] * 4),
    (HELD, {"subject": True, "context_length": 3, "context_overlap": 2}, None),
], ids=["sentences", "fresh noise", "steady", "regions", "not steady", "not led", "windows"])  # fmt: skip
def test_edits_drawn_together_are_those_drawn_alone(tiny, edits, settings, batches):
    """To rounding, which four steps of a random model let grow to some millionths; the edits differ by tenths."""
    together, counted = latents_of(tiny, edits, **settings)
    alone = [latents_of(tiny, [edit], **settings)[0] for edit in edits]
    assert batches is None or counted == batches
    size = together.std()
    assert all((one - of).abs().max() < 1e-4 * size for one, of in zip(together.split(1), alone))
    apart = [(a - b).abs().max() / size for i, a in enumerate(alone) for b in alone[:i]]
    assert min(apart) > 1e-2


def test_sample_is_the_case_of_one_edit(tiny):
    checkpoint, unet, noise, subject = tiny
    preset = with_settings(PRESETS["mini"], sampling_steps=2)
    clip = torch.randint(256, (4, 64, 64, 3), dtype=torch.uint8)
    of_clip = dict(source_prompt="a ball", subject=subject)
    for frames in (None, clip):
        videos = sample_edits(checkpoint, unet, noise, HELD, preset, source_frames=frames, **of_clip)
        for edit, video in zip(HELD, videos):
            alone = sample(
                checkpoint, unet, noise, edit.prompt, preset, region=edit.region, source_frames=frames, **of_clip
            )
            assert alone.dtype == torch.uint8 and (video.int() - alone.int()).abs().max() <= 1  # of 255, by rounding
            if edit.region != "everything" and frames is not None:
                outside = EditPlaces.of(edit.region, subject, margin=checkpoint.downscale).changeable[0, 0] == 0
                assert torch.equal(video[outside], clip[outside])
    several = [*HELD, Edit("a star", attention_injection=0.1)]
    told = r"attention_injection differs among edits that are drawn together \(0.1, 0.6\); draw them apart"
    refused(told, checkpoint, unet, noise, several, preset, **of_clip, call=sample_edits)
    refused("prompt is missing", checkpoint, unet, noise, [], preset, call=sample_edits)
    refused("prompt is empty", checkpoint, unet, noise, [Edit("a star"), Edit(" ")], preset, call=sample_edits)


def test_places_of_several_edits():
    mask = torch.zeros(1, 1, 2, 8, 8)
    mask[..., 3:5, 3:5] = 1
    of_each = [EditPlaces.of(region, mask, margin=1) for region in REGIONS]
    together = EditPlaces.together(of_each)
    for name, same in (("changeable", 1), ("anchor", 0), ("still", 0), ("moving", 0)):
        wanted = [getattr(places, name) for places in of_each]
        wanted = [torch.full_like(mask, same) if value is None else value for value in wanted]
        assert torch.equal(getattr(together, name), torch.cat(wanted))
    assert EditPlaces.together([EditPlaces(), EditPlaces()]) == EditPlaces()


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


def test_refusals():
    mini = load_checkpoint("mini")
    text, noise = torch.zeros(1, 16, mini.unet.config.cross_attention_dim), some(1, 4, 2, 16, 16)
    still = torch.ones(1, 1, 2, 16, 16)
    arguments = (inflate(mini.unet), noise, text, mini.scheduler, 2)
    refused("source_walk needs source_hidden_states", *arguments, guidance_scale=1, still=still, call=led_sample)
    refused(
        "region='sky' is unknown; choose one of everything, subject, shape, background",
        "sky",
        still,
        1,
        call=EditPlaces.of,
    )
    refused("attention_injection=1.5 is out of range", 1.5, call=SourceWalk)


def test_it_is_on_and_can_be_turned_off():
    parser = argparse.ArgumentParser()
    parser.add_argument("--checkpoint", default="mini")
    add_preset_arguments(parser)
    assert [preset_of(parser.parse_args(args)).steady for args in ([], ["--steady"], ["--no-steady"])] == [
        True,
        True,
        False,
    ]
