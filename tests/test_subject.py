"""Where the subject is found, and that edits of a region leave the rest to the noise."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from transformers import CLIPTokenizer

from support.errors import refused
from support.led_sampling import led_sample
from tav_core import (
    PRESETS,
    EditPlaces,
    TavError,
    ddim_invert,
    ddim_sample,
    encode_prompt,
    find_subject,
    inflate,
    prepare,
    sample,
)
from tav_core.attention import FrameContext
from tav_core.checkpoint_parts import CONFIGS
from tav_core.flow import neighbours, told_by_neighbours
from tav_core.metrics import mask_iou, missed
from tav_core.mini import world
from tav_core.mini.clips import BenchmarkClip
from tav_core.subject import (
    mask_of,
    mask_of_attention,
    outlined,
    pooled,
    put_back,
    softened,
    word_attention,
    word_mask,
    word_places,
)

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
    truth = torch.from_numpy(np.stack([world.subject_mask(scene) for scene in CLIP.scenes()])) > 0.5
    mask = found[2][0, 0] > 0.5
    overlap = (mask & truth).sum((1, 2)) / (mask | truth).sum((1, 2))
    assert mask.shape == (4, 128, 128) and overlap.min() > 0.9, overlap


@pytest.mark.slow
def test_an_edit_of_a_region_leaves_the_rest_as_the_noise_reconstructs_it(mini, found):
    (source, unet, _), subject = found, pooled(found[2], 8)
    steps = 5
    text, edit, empty = (encode_prompt(mini, words) for words in (source.prompt, EDIT, ""))
    noise = ddim_invert(unet, source.take.latents, text, mini.scheduler, steps)
    again = ddim_sample(unet, noise, text, mini.scheduler, steps, guidance_scale=1)
    settings = dict(negative_hidden_states=empty, guidance_scale=5.0, source_hidden_states=text)
    for region in ("subject", "background"):
        changeable = EditPlaces.of(region, subject, margin=1).changeable
        for injection in (0.0, 0.6):
            edited = led_sample(
                unet,
                noise,
                edit,
                mini.scheduler,
                steps,
                changeable=changeable,
                anchor=subject,
                attention_injection=injection,
                **settings,
            )
            difference = (edited - again).abs()
            assert (difference * (changeable == 0)).max() < 1e-4
            assert (difference * changeable).max() > 0.1
    everywhere = torch.ones_like(subject)
    free = led_sample(unet, noise, edit, mini.scheduler, steps, **settings)
    whole = led_sample(unet, noise, edit, mini.scheduler, steps, changeable=everywhere, **settings)
    assert (whole - free).abs().max() < 1e-4


def test_the_anchor_is_felt_where_it_is(mini, found):
    (source, unet, _), subject = found, pooled(found[2], 8)
    text, edit, empty = (encode_prompt(mini, words) for words in (source.prompt, EDIT, ""))
    noise = torch.randn(source.take.latents.shape, generator=torch.Generator().manual_seed(1))
    settings = dict(negative_hidden_states=empty, source_hidden_states=text, attention_injection=1.0)
    none, off, on = (
        led_sample(unet, noise, edit, mini.scheduler, 3, anchor=anchor, **settings)
        for anchor in (None, torch.zeros_like(subject), subject)
    )
    assert (off - none).abs().max() < 1e-5 < 1e-2 < (on - none).abs().max()


def test_mask_of_known_differences():
    predictions = torch.zeros(3, 4, 2, 8, 8)
    predictions[1:, :, :, 2:4, 2:4] = 1.0
    mask = mask_of([predictions], 0.15)
    assert mask.sum() == 2 * 4 and mask[0, 0, :, 2:4, 2:4].all()


def test_the_outline_is_found_in_the_clip():
    """From squares of 8 pixels, some of the subject missing and much around it covered."""
    scenes = BenchmarkClip(world.Scene("star", "yellow", "night", layout=1), "bounce", {}, num_frames=3).scenes()
    frames, truth = (
        torch.from_numpy(world.render_clip(scenes)),
        torch.from_numpy(np.stack([world.subject_mask(s) for s in scenes])) > 0.5,
    )
    squares = F.max_pool2d(truth[:, None].float(), 8)
    squares[0, 0, truth[0].any(1).nonzero().min() // 8] = 0  # the tip
    coarse = squares.repeat_interleave(8, 2).repeat_interleave(8, 3)[:, 0] > 0
    mask = outlined(squares.transpose(0, 1)[None], frames)
    assert mask.shape == (1, 1, 3, 128, 128) and set(mask.unique().tolist()) == {0, 1}
    before, after = (((m & truth).sum((1, 2)) / (m | truth).sum((1, 2))).min() for m in (coarse, mask[0, 0] > 0))
    assert before < 0.7 and after > 0.95
    # the same of larger frames, on which colours are learned from every second pixel
    twice = outlined(squares.transpose(0, 1)[None], frames.repeat_interleave(2, 1).repeat_interleave(2, 2))
    assert twice.shape == (1, 1, 3, 256, 256) and (pooled(twice, 2) - mask).abs().mean() < 0.01


def sliding(frames=5, **changes):
    """A clip, and its truth of 0 and 1, `f h w`."""
    scenes = world.clip_scenes(world.Scene(**{"background": "sand", "layout": 3, **changes}), "slide", frames)
    truth = np.stack([world.subject_mask(scene) for scene in scenes]) > 0.5
    return torch.from_numpy(world.render_clip(scenes)), torch.from_numpy(truth).float()


def test_what_a_frame_misses_the_frames_around_it_tell():
    """Half of a ball of two colours in one frame, a hole in another; in a single frame nobody tells it."""
    frames, truth = sliding(colour="blue", pattern="two-tone", second_colour="yellow")
    squares = F.max_pool2d(truth, 8)
    middle = int(truth[2].any(1).nonzero().float().mean()) // 8
    squares[2, middle:] = 0
    x, y = (int(truth[3].any(i).nonzero().float().mean()) // 8 for i in (0, 1))
    squares[3, y - 1 : y + 2, x - 1 : x + 2] = 0
    found, alone = outlined(squares[None, None], frames)[0, 0], outlined(squares[None, None, 2:3], frames[2:3])[0, 0]
    assert missed(alone, truth[2:3]) > 0.3 > 0.03 > missed(found, truth)
    assert min(mask_iou(*frame) for frame in zip(found.split(1), truth.split(1))) > 0.95


def test_what_is_hidden_or_gone_is_not_told():
    frames, truth = sliding(colour="red")
    without, _ = sliding(colour="red", radius=0.001)
    gone, hidden = frames.clone(), frames.clone()
    gone[2], hidden[2, :, 64:] = without[2], 90
    for video, there in ((gone, truth[2] * 0), (hidden, truth[2] * (torch.arange(128) < 64)), (frames, truth[2])):
        masks = truth.clone()
        masks[2] = 0  # nothing was found in this frame
        told = torch.from_numpy(told_by_neighbours(masks, neighbours(video)))[2].float()
        more, less = ((a > b).sum() / truth[2].sum() for a, b in ((told, there), (there, told)))
        assert more < 0.02 and less < 0.2, (more, less)
    assert not told_by_neighbours(truth[:2], neighbours(frames[:2])).any()  # one neighbour alone says nothing


def test_holes_of_the_subject_stay_and_those_of_the_mask_go():
    frames, truth = (x[:1] for x in sliding(shape="ring", colour="red", radius=0.3))
    mask = outlined(F.max_pool2d(truth, 8)[None, None], frames)[0, 0]
    assert mask_iou(mask, truth) > 0.95
    speckled = frames.clone()
    y, x = (truth[0] > 0).nonzero()[400].tolist()
    speckled[0, y - 1 : y + 2, x - 1 : x + 2] = frames[0, 0, 0]  # a highlight, of the colour of the stage
    assert mask_iou(outlined(F.max_pool2d(truth, 8)[None, None], speckled)[0, 0], mask) > 0.99


def test_soft_edges_are_ramps_of_the_given_width():
    mask = torch.zeros(1, 1, 2, 32, 32)
    mask[..., 16:] = 1
    assert softened(mask, 0) is mask
    for width in (1, 3, 4, 5, 8):
        soft = softened(mask, width)[0, 0, 1, 7]
        ramp = (torch.arange(32) + 0.5 - 16) / width + 0.5  # of the pixels' middles, from the edge on
        away = (torch.arange(32) + 0.5 - 16).abs() > (width + 1) / 2
        assert torch.allclose(soft[away], mask[0, 0, 0, 0][away]) and (soft.diff() >= 0).all()
        assert torch.allclose(soft, ramp.clamp(0, 1), atol=0.5 / width)
        assert soft.sum() == pytest.approx(16, abs=1e-4)  # half of the ramp is inside


def test_pixels_outside_of_a_region_are_those_of_the_source():
    region = torch.zeros(1, 1, 2, 8, 8)
    region[:, :, 0, :, 4:], region[:, :, 1] = 0.25, 1.0
    edit, source = torch.full((2, 8, 8, 3), 200, dtype=torch.uint8), torch.full((2, 8, 8, 3), 100, dtype=torch.uint8)
    mixed = put_back(edit, source, region)
    assert (
        mixed.dtype == torch.uint8
        and (mixed[0, :, :4] == 100).all()
        and (mixed[0, :, 4:] == 125).all()
        and (mixed[1] == 200).all()
    )


def test_refusals(mini, found):
    source, unet, subject = found
    refused("contrasts can't be told from the clip's sentence", [torch.zeros(2, 4, 1, 4, 4)], 0.15, call=mask_of)
    refused("threshold=1.5 is out of range", [torch.zeros(2, 4, 1, 4, 4)], 1.5, call=mask_of)
    refused(
        "region='sky' is unknown; choose one of everything, subject, shape, background",
        "sky",
        subject,
        1,
        call=EditPlaces.of,
    )
    for contrast in ("", source.prompt):
        with pytest.raises(TavError, match="says nothing of another subject"):
            find_subject(mini, unet, source, [contrast], PRESETS["mini"])
    with pytest.raises(TavError, match="region='subject' needs to know where the subject is"):
        sample(
            mini,
            unet,
            torch.zeros_like(source.take.latents),
            EDIT,
            PRESETS["mini"],
            source_prompt=source.prompt,
            region="subject",
        )
    with pytest.raises(TavError, match="source_walk needs source_hidden_states"):
        text, noise = encode_prompt(mini, EDIT), torch.zeros_like(source.take.latents)
        led_sample(unet, noise, text, mini.scheduler, 2, guidance_scale=1, changeable=subject)


class Pointwise:
    """A U-Net of one multiplication, so that batches change no rounding; text is its factor."""

    dtype = torch.float32

    def __init__(self):
        self.frame_context = FrameContext()

    def __call__(self, x, t, text):
        return x * text.mean((1, 2)).reshape(len(x), -1).mean(1)[:, None, None, None, None] * (1 + t / 1000)


@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_regions_blend_what_the_walks_predict(mini, eta):
    """Where the region is 0 the latents are those of the clip's walk; elsewhere a step goes towards the blend."""
    generator = torch.Generator().manual_seed(0)
    unet, scheduler, steps = Pointwise(), mini.scheduler, 6
    noise = torch.randn(1, 4, 3, 8, 8, generator=generator)
    text, edit, empty = (torch.full((1, 2, 2), value) for value in (0.3, 0.9, 0.1))
    region = torch.rand(1, 1, 3, 8, 8, generator=generator)  # another for each frame
    region[:, :, 0, :4], region[:, :, 1, :, 3:] = 0, 1

    def trail(*args, **settings):
        seen = []
        led_sample(unet, noise, *args, scheduler, steps, callback=seen.append, **settings)
        return torch.stack([step.latents for step in seen]), torch.stack([step.pred_x0 for step in seen])

    walk, walk_x0 = trail(text, guidance_scale=1, source_hidden_states=text)
    settings = dict(guidance_scale=4.0, negative_hidden_states=empty, source_hidden_states=text, eta=eta)
    latents, x0 = trail(edit, changeable=region, generator=torch.Generator().manual_seed(1), **settings)
    outside = (region == 0).expand_as(noise)
    assert (latents - walk)[:, outside].abs().max() < 1e-6
    assert (latents - walk)[:, ~outside].abs().mean() > 0.1

    # a step with guidance, written out
    ddim = DDIMScheduler.from_config(scheduler.config, clip_sample=False, thresholding=False)
    ddim.set_timesteps(steps)
    x = torch.cat([noise[None], latents[:-1]])
    for i, t in enumerate(ddim.timesteps):
        alpha, factor = ddim.alphas_cumprod[t], (1 + t / 1000)
        own = (x[i] - (1 - alpha).sqrt() * (0.1 + 4.0 * 0.8) * factor * x[i]) / alpha.sqrt()
        assert torch.allclose(x0[i], (1 - region) * walk_x0[i] + region * own, rtol=1e-4, atol=1e-4)
        if not eta:
            eps = (x[i] - alpha.sqrt() * x0[i]) / (1 - alpha).sqrt()
            wanted = ddim.step(eps, t, x[i]).prev_sample
            assert torch.allclose(latents[i], wanted, rtol=1e-4, atol=1e-4)


def test_places_of_a_word():
    def places(sentence, word):
        return word_places(tokenizer(sentence).input_ids, tokenizer(word, add_special_tokens=False).input_ids, word)

    tokenizer = CLIPTokenizer.from_pretrained(CONFIGS / "tokenizer")
    assert places("a red ball is sliding", "ball") == [3]
    assert places("a red ball is sliding", "Red ball") == [2, 3]
    assert places("a man and a man", "man") == [2, 5]
    long = tokenizer("tyrannosaurus", add_special_tokens=False).input_ids
    assert len(long) > 1 and places("a tyrannosaurus is skiing", "tyrannosaurus") == list(range(2, 2 + len(long)))
    for word in ("star", "bal", ""):
        refused(f"word=.*{word}.* is not in the sentence; name one of its words", "a red ball", word, call=places)


def test_attention_to_a_word_is_that_of_the_softmax(checkpoint):
    unet, places = inflate(checkpoint.unet), [2, 5]
    generator = torch.Generator().manual_seed(0)
    latents, text = torch.randn(1, 4, 3, 16, 8, generator=generator), torch.randn(1, 7, 32, generator=generator)
    wanted = {}

    def explicit(attn, args, kwargs):
        x, text = args[0], kwargs["encoder_hidden_states"]
        q, k = (y.unflatten(2, (attn.heads, -1)) for y in (attn.to_q(x), attn.to_k(text)))
        weights = (torch.einsum("bnhd,bmhd->bhnm", q, k) / q.shape[-1] ** 0.5).softmax(-1)
        wanted[x.shape[1]] = wanted.get(x.shape[1], 0) + (weights[..., 2] + weights[..., 5]).mean(1)

    hooks = [
        module.register_forward_pre_hook(explicit, with_kwargs=True)
        for name, module in unet.named_modules()
        if name.endswith("attn2")
    ]
    with torch.no_grad(), word_attention(unet, places) as maps:
        for t in (500, 900):
            unet(latents, t, text)
    assert set(maps) == set(wanted) == {128, 32, 8, 2} and maps[128].shape == (3, 128)
    assert all(torch.allclose(maps[n], wanted[n], atol=1e-5) for n in maps)
    for hook in hooks:
        hook.remove()
    with torch.no_grad():
        unet(latents, 500, text)
    assert all(torch.allclose(maps[n], wanted[n], atol=1e-5) for n in maps)  # nothing is left on the U-Net


def test_mask_of_known_attention():
    looked_at = torch.zeros(2, 8, 16)
    looked_at[:, 2:4, 4:8] = 1.0
    maps = {128: looked_at.flatten(1), 8: torch.rand(2, 8), 2048: torch.rand(2, 2048)}
    mask = mask_of_attention(maps, 32, 64, 0.5)[0, 0]
    assert torch.equal(mask[0], mask[1]) and mask[:, 9:15, 17:31].all() and mask.sum() == mask[:, 8:16, 16:32].sum()
    refused("looked at alike everywhere", {256: torch.ones(1, 256)}, 16, 16, 0.5, call=mask_of_attention)
    refused("threshold=0 is out of range", maps, 32, 64, 0, call=mask_of_attention)


def test_a_word_is_found_during_inversion(mini, found):
    source, unet, _ = found
    ids = mini.tokenizer(source.prompt).input_ids
    mask = word_mask(
        unet, source.take.latents, source.take.condition, word_places(ids, ids[3:4], "heart"), mini.scheduler, steps=2
    )
    assert mask.shape == (1, 1, 4, 16, 16) and 0 < mask.mean() < 1 and set(mask.unique().tolist()) == {0, 1}
