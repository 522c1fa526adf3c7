"""Noise masks on an inflated MODEL: in Video Sampler as in `tav_core`, and in stock samplers."""

import pytest
import torch
from diffusers import DDIMScheduler

from support.led_sampling import led_sample
from tav_core import ddim_invert, encode_prompt, inflate

pytestmark = pytest.mark.usefixtures("inference_mode")

CAPTION, EDIT, MASKED_STEPS = "a red ball is sliding on the grass", "a blue star is sliding on the snow", 5


def masks(count):
    """A MASK of 64 x 64 pixels for each frame: white left of column 24 in the first, of 8 more in each that follows."""
    column = torch.arange(64).expand(64, -1)
    return torch.stack([(column < 24 + 8 * frame).float() for frame in range(count)])


@pytest.fixture(scope="module")
def middle(mini):
    """LATENT of the middle of the clip, 64 x 64 pixels."""
    return {"samples": mini.latent["samples"][:, :, 4:12, 4:12]}


@pytest.fixture(scope="module")
def inverted(pack, mini, middle):
    """Its noise, inverted with the caption."""
    return pack.nodes.DDIMInversion.execute(
        mini.inflated, middle, mini.encode(CAPTION), MASKED_STEPS, "ddim_uniform", False
    ).args[0]


def edited(pack, mini, noise, model=None, words=EDIT, cfg=5.0, eta=0.0, add_noise=False):
    arguments = (mini.encode(words), mini.encode(""), noise, MASKED_STEPS, cfg, "ddim_uniform", eta, add_noise, 0)
    return pack.nodes.VideoSampler.execute(model or mini.inflated, *arguments).args[0]["samples"]


def stock(mini, model, noise, sampler="euler", fresh=None, **changes):
    """KSampler Advanced on a LATENT, add_noise disabled unless there is `fresh` noise."""
    import comfy.sample

    latent = {**noise, **changes}
    still = torch.zeros_like(latent["samples"])
    return comfy.sample.sample(
        model,
        still if fresh is None else fresh,
        MASKED_STEPS,
        5.0,
        sampler,
        "ddim_uniform",
        mini.encode(EDIT),
        mini.encode(""),
        latent["samples"],
        noise_mask=latent.get("noise_mask"),
        disable_pbar=True,
        seed=3,
    )


def with_mask(latent, mask):
    """What stock Set Latent Noise Mask makes of them."""
    return {**latent, "noise_mask": mask.reshape(-1, 1, *mask.shape[-2:])}


def test_outside_of_a_noise_mask_the_clip_stays_as_the_noise_reconstructs_it(pack, mini, inverted):
    again = edited(pack, mini, inverted, words=CAPTION, cfg=1.0)
    free = edited(pack, mini, inverted)
    led = pack.nodes.AttentionInjection.execute(mini.inflated, mini.encode(CAPTION), 0.0).args[0]
    for mask in (masks(4), masks(1)):  # a mask for each frame, one for all
        inside = mask[:, None, ::8, ::8].expand(4, -1, -1, -1)
        noise = with_mask(inverted, mask)
        ours = edited(pack, mini, noise)
        difference = (ours - again).abs()
        assert (difference * (1 - inside)).max() < 1e-3 < 1.0 < (difference * inside).max()
        for eta in (0.0, 1.0):
            assert ((edited(pack, mini, noise, led, eta=eta) - again).abs() * (1 - inside)).max() < 1e-3
        assert (stock(mini, led, noise) - ours).abs().max() < 1e-4
        # other samplers walk elsewhere inside, but the rest is the same
        difference = (stock(mini, led, noise, "dpmpp_2m") - again).abs()
        assert (difference * (1 - inside)).max() < 1e-3 < 1.0 < (difference * inside).max()
    whole = edited(pack, mini, with_mask(inverted, torch.ones(1, 64, 64)))
    assert (whole - free).abs().max() < 1e-3


def test_a_soft_noise_mask_blends_as_in_the_core(pack, mini, middle, inverted):
    mask = torch.linspace(0, 1, 8).expand(4, 8, 8)
    ours = mini.model.model.process_latent_in(edited(pack, mini, with_mask(inverted, mask))).movedim(0, 1)[None]
    unet, scheduler = (
        inflate(mini.checkpoint.unet),
        DDIMScheduler.from_config(mini.checkpoint.scheduler.config, set_alpha_to_one=True),
    )
    said, wish, empty = (encode_prompt(mini.checkpoint, words) for words in (CAPTION, EDIT, ""))
    clip = mini.model.model.process_latent_in(middle["samples"]).movedim(0, 1)[None]
    start = ddim_invert(unet, clip, said, scheduler, MASKED_STEPS)
    settings = dict(guidance_scale=5.0, negative_hidden_states=empty, source_hidden_states=said)
    wanted, hard = (
        led_sample(unet, start, wish, scheduler, MASKED_STEPS, changeable=region, **settings)
        for region in (mask[None, None], mask[None, None].round())
    )
    assert (ours - wanted).abs().max() < 1e-3 < 0.1 < (ours - hard).abs().max()


def test_a_noise_mask_and_a_region_allow_what_both_allow(pack, mini, inverted):
    subject = torch.zeros(1, 64, 64)
    subject[:, 16:40, 16:40] = 1
    model = pack.nodes.AttentionInjection.execute(
        mini.inflated, mini.encode(CAPTION), 0.0, "background", True, subject
    ).args[0]
    again = edited(pack, mini, inverted, words=CAPTION, cfg=1.0)
    background = (edited(pack, mini, inverted, model) - again).abs().amax((0, 1)) > 1e-3
    left = masks(1)[0, ::8, ::8] > 0
    both = (edited(pack, mini, with_mask(inverted, masks(1)), model) - again).abs().amax((0, 1)) > 1e-3
    assert torch.equal(both, background & left)
    assert 0 < both.sum() < background.sum() < 64


def test_noise_masks_on_fresh_noise_are_those_of_stock_samplers(pack, mini, middle):
    model = pack.nodes.AttentionInjection.execute(mini.inflated, mini.encode(CAPTION), 0.5).args[0]
    fresh = torch.randn(middle["samples"].shape, generator=torch.Generator().manual_seed(0))
    for each in (mini.inflated, model):
        repainted = stock(mini, each, with_mask(middle, masks(1)), fresh=fresh)
        outside = 1 - masks(1)[:, None, ::8, ::8]
        assert ((repainted - middle["samples"]).abs() * outside).max() < 1e-4


def test_noise_masks_that_cannot_be_honoured_are_refused(pack, mini, inverted):
    led = pack.nodes.AttentionInjection.execute(mini.inflated, mini.encode(CAPTION), 0.0).args[0]
    with pytest.raises(
        ValueError, match="noise_mask has 3 masks for 4 frames; give one for all, or one for each frame"
    ):
        edited(pack, mini, with_mask(inverted, masks(3)))
    with pytest.raises(ValueError, match="noise_mask has 8 masks for 4 frames"):
        stock(mini, led, with_mask(inverted, masks(8)))
    with pytest.raises(ValueError, match="connect MODEL through Attention Injection"):
        stock(mini, mini.inflated, with_mask(inverted, masks(1)))
    with pytest.raises(ValueError, match="doesn't say what the clip was inverted with"):
        edited(pack, mini, with_mask({"samples": inverted["samples"]}, masks(1)))
    with pytest.raises(ValueError, match="turn add_noise off"):
        edited(pack, mini, with_mask(inverted, masks(1)), add_noise=True)
