"""Prompts for parts of the frames, for some steps or with more beside the text, under Attention Injection."""

import pytest
import torch

from support.controls import control_net, controlled, hints
from support.native_models import TEXT, attention_lora, clip, inflated, native, prompt, relative, sample

pytestmark = pytest.mark.usefixtures("inference_mode")

LEFT, RIGHT, ALL = (16, 8, 0, 0), (16, 8, 0, 8), (16, 16, 0, 0)  # height, width, top and left of 16 x 16 latents
WIDE, LOW = (9, 16, 0, 0), (7, 11, 9, 3)
SUBJECT = torch.zeros(1, 128, 128)
SUBJECT[:, 40:88, 24:80] = 1
HELD = torch.ones(1, 1, 16, 16)  # of the latents: all but the subject with a margin
HELD[..., 4:12, 2:11] = 0


@pytest.fixture(scope="module")
def model(pack, inference_mode):
    """An inflated MODEL whose temporal attention has an effect."""
    wrapped = inflated(pack, native(), norm="frame")
    awake = {name: weight + 0.02 for name, weight in pack.nodes.native.trainable_weights(wrapped).items()}
    return pack.nodes.native.with_tuned_weights(wrapped, awake, 3)


def told(seed, **fields):
    """A CONDITIONING with more beside the text, as stock nodes make it."""
    return [[text, {**more, **fields}] for text, more in prompt(seed)]


def for_area(seed, area):
    return told(seed, area=area, strength=1.0, set_area_to_bounds=False)


def for_mask(seed, mask, bounds):
    return told(seed, mask=mask, mask_strength=1.0, set_area_to_bounds=bounds)


def led_by(pack, model, share=1.0, *places):
    return pack.nodes.AttentionInjection.execute(model, prompt(1), share, *places).args[0]


def drawn(model, positive, **settings):
    return sample(model, noise=clip(3), positive=positive, **settings)


def walk_of(led):
    """Where the clip has come to in the last sampling, at its last level."""
    walk = led.model_options["model_function_wrapper"].walk
    return walk.at(torch.tensor(0.0))[0].movedim(0, 1) / 0.18215


@pytest.fixture
def split(model, monkeypatch):
    """Each prompt is asked alone, as when memory is short."""
    return lambda: monkeypatch.setattr(model.model, "memory_required", lambda *args, **kwargs: 1e15)


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("areas", [(LEFT, RIGHT), (WIDE, LOW)])
def test_an_area_is_led_by_the_same_area_of_the_clip(pack, model, split, areas, alone):
    """In the first step the clip is what the edit is: led by its like, an edit is what it would be."""
    if alone:
        split()
    led, first = led_by(pack, model), dict(cfg=1.0, steps=1)
    same = [entry for area in areas for entry in for_area(1, area)]
    other = [entry for area in areas for entry in for_area(7, area)]
    assert relative(drawn(led, same, **first), drawn(model, same, **first)) < 1e-4
    assert relative(drawn(led, other, **first), drawn(model, other, **first)) > 1e-3


def test_areas_in_context_windows_and_of_sdxl(pack, model):
    xl = inflated(pack, native(xl=True), norm="frame")
    for each, frames in ((pack.nodes.ContextWindows.execute(model, 3, 2).args[0], 5), (xl, 2)):
        led, same = led_by(pack, each), for_area(1, LEFT) + for_area(1, RIGHT)
        first = dict(noise=clip(frames), positive=same, cfg=1.0, steps=1)
        assert relative(sample(led, **first), sample(each, **first)) < 1e-4


@pytest.mark.parametrize("places", [(), ("everything", True, SUBJECT), ("background", False, SUBJECT)])
def test_an_area_of_everything_is_none(pack, model, places):
    led = led_by(pack, model, 0.7, *places)
    wanted = drawn(led, prompt(7) + prompt(3), steps=2)
    assert relative(drawn(led, for_area(7, ALL) + prompt(3), steps=2), wanted) < 1e-4
    assert relative(drawn(led, for_area(7, LEFT) + prompt(3), steps=2), wanted) > 1e-3


def test_asked_together_or_alone(pack, model, split):
    led, positive = led_by(pack, model, 0.7, "everything", True, SUBJECT), for_area(7, LEFT) + for_area(3, RIGHT)
    together = drawn(led, positive)
    split()
    assert relative(drawn(led, positive), together) < 1e-4


def gligen(model, gate):
    """What GLIGENTextBoxApply makes, with random weights; nothing where the gate is closed."""
    import comfy.gligen
    import comfy.model_patcher
    from diffusers.models.attention import BasicTransformerBlock

    unet = model.model.diffusion_model
    parts = [*unet.down_blocks, unet.mid_block, *unet.up_blocks]
    widths = [each.norm1.weight.numel() for part in parts for each in part.modules()
              if isinstance(each, BasicTransformerBlock)]  # fmt: skip
    fusers = [comfy.gligen.GatedSelfAttentionDense(width, TEXT, 4, 8) for width in widths]
    net = comfy.gligen.Gligen(fusers, comfy.gligen.PositionNet(TEXT, TEXT), TEXT)
    generator = torch.Generator().manual_seed(0)
    for parameter in net.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    for fuser in fusers:
        fuser.alpha_attn.fill_(gate)
        fuser.alpha_dense.fill_(0)
    cpu = torch.device("cpu")
    patcher = comfy.model_patcher.ModelPatcher(net, load_device=cpu, offload_device=cpu)
    return ("position", patcher, [(torch.ones(1, TEXT), 8, 8, 2, 4)])


def hook():
    """A LoRA for one prompt alone."""
    import comfy.hooks

    lora = attention_lora(native(), lambda name, key: "lora_unet_" + name.replace(".", "_"))
    return comfy.hooks.create_hook_lora(lora, 1.0, 0.0)


KINDS = {
    "areas": lambda model: for_area(7, LEFT) + for_area(3, RIGHT),
    "an area beside all": lambda model: prompt(7) + for_area(3, LOW),
    "a small area": lambda model: for_area(7, (1, 1, 15, 15)) + prompt(3),
    "masks": lambda model: for_mask(7, SUBJECT, False) + for_mask(3, 1 - SUBJECT, False),
    "the bounds of masks": lambda model: for_mask(7, SUBJECT, True) + for_mask(3, SUBJECT.expand(3, -1, -1), True),
    "a mask of nothing": lambda model: for_mask(7, torch.zeros(1, 128, 128), True) + prompt(3),
    "halves": lambda model: told(7, start_percent=0.0, end_percent=0.5) + told(3, start_percent=0.5, end_percent=1.0),
    "a pause": lambda model: told(7, start_percent=0.0, end_percent=0.1),
    "two chunks": lambda model: [[torch.cat([prompt(7)[0][0], prompt(3)[0][0]], 1), prompt(7)[0][1]]],
    "a strength of 0": lambda model: told(7, strength=0.0) + prompt(3),
    "the rest": lambda model: for_mask(7, SUBJECT, False) + told(3, default=True),
    "a ControlNet in an area": lambda model: controlled(for_area(7, LEFT), (control_net(1), hints(), 0.8, 0.0, 1.0))[0]
    + prompt(3),
    "GLIGEN": lambda model: told(7, gligen=gligen(model, 1.0)),
    "GLIGEN in an area": lambda model: [*for_area(7, LEFT), *told(3, gligen=gligen(model, 1.0), area=RIGHT)],
    "a hook": lambda model: told(7, hooks=hook()),
    "a hook in an area": lambda model: [*prompt(3), *told(7, hooks=hook(), area=LEFT)],
}  # fmt: skip


@pytest.fixture(scope="module")
def plain(pack, model):
    """The clip as the noise reconstructs it, and an edit of its subject by one prompt for everything."""
    led = led_by(pack, model, 0.7, "subject", True, SUBJECT)
    return led, drawn(model, prompt(1), cfg=1.0), drawn(led, prompt(7))


@pytest.mark.parametrize("kind", KINDS)
def test_the_clip_walks_as_ever(model, plain, kind):
    """Whatever the edit's prompts are for, the clip walks as a whole under its own, and holds what it ends in."""
    led, clip_again, of_one_prompt = plain
    edit = drawn(led, KINDS[kind](model))
    assert relative(walk_of(led), clip_again) < 1e-4
    assert ((edit - clip_again).abs() * HELD).max() < 1e-3 * clip_again.abs().max()
    assert relative(edit, of_one_prompt) > 1e-3


def test_guidance_that_calls_again_keeps_what_is_held(pack, model, plain):
    from comfy_extras.nodes_pag import PerturbedAttentionGuidance

    guided = PerturbedAttentionGuidance.execute(model, 3.0).args[0]
    led = led_by(pack, guided, 0.7, "subject", True, SUBJECT)
    edit = drawn(led, prompt(7))
    assert ((edit - plain[1]).abs() * HELD).max() < 1e-3 * plain[1].abs().max() and relative(edit, plain[2]) > 1e-3


def test_boxes_are_for_the_prompt_alone(pack, model):
    led = led_by(pack, model)
    without = drawn(led, prompt(7), steps=2)
    closed, opened = (drawn(led, told(7, gligen=gligen(model, gate)), steps=2) for gate in (0.0, 1.0))
    assert relative(closed, without) < 1e-4 < 1e-3 < relative(opened, without)


def test_areas_and_masks_that_fit_no_clip_are_refused(pack, model):
    for each in (model, led_by(pack, model)):
        for area in ((8, 8, 0, 16), (8, 8, 16, 0), ("percentage", 0.5, 0.5, 1.0, 0.0)):
            with pytest.raises(ValueError, match=r"^CONDITIONING has an area at \d+, \d+, outside of the frames"):
                drawn(each, for_area(7, area))
        with pytest.raises(ValueError, match="CONDITIONING has 2 masks for 3 frames; give it one for all, or one for"):
            drawn(each, for_mask(7, SUBJECT.expand(2, -1, -1), False))


@pytest.mark.parametrize("limit, said", [
    (dict(area=LEFT), "an area"), (dict(mask=SUBJECT), "a mask"), (dict(gligen=()), "boxes of GLIGEN"),
    (dict(hooks=object()), "a hook"), (dict(end_percent=0.5), "a range of steps"),
    (dict(start_percent=0.1, end_percent=1.0), "a range of steps"),
])  # fmt: skip
def test_sentences_of_a_clip_are_for_all_of_it(pack, model, limit, said):
    with pytest.raises(
        ValueError, match=f"^conditioning has {said}, but is for all of the clip and every step; give it as"
    ):
        pack.nodes.AttentionInjection.execute(model, told(1, **limit), 0.5)
    with pytest.raises(ValueError, match=f"^positive has {said}, but is for"):
        pack.nodes.tune.take_of(model, {"samples": clip(3)}, told(1, **limit), "positive")
    pack.nodes.AttentionInjection.execute(model, told(1, start_percent=0.0, end_percent=1.0), 0.5)


def test_tiles_of_another_pack_are_refused(pack, model):
    led = led_by(pack, model)
    inner = led.model_options["model_function_wrapper"]

    def tiled(apply_model, args):
        return inner(apply_model, {**args, "input": args["input"][..., :8]})

    led.model_options["model_function_wrapper"] = tiled
    with pytest.raises(ValueError, match="^MODEL is called for parts of the frames by another pack, "):
        drawn(led, prompt(7))


def test_boxes_in_context_windows_are_refused(pack, model):
    windowed = pack.nodes.ContextWindows.execute(model, 3, 2).args[0]
    with pytest.raises(ValueError, match="^CONDITIONING has boxes of GLIGEN, and MODEL sees the clip in Context"):
        sample(windowed, noise=clip(5), positive=told(7, gligen=gligen(model, 1.0)))
