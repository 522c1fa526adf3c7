"""Class labels beside the text: the core on U-Nets that know classes, and what the nodes say of them."""

from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel

from support.checkpoints import make_folder
from support.errors import refused
from support.led_sampling import led_sample
from support.tiny_unets import difference, inputs, make_unet, stir
from support.tuning_runs import CONFIG, equal, stop_at, take, weights
from tav_core import (
    PRESETS,
    Condition,
    ContextWindows,
    WindowedUNet,
    ddim_invert,
    ddim_sample,
    inflate,
    invert,
    load_checkpoint,
    prepare,
    sample,
    subject_mask,
    tune,
    tune_on,
)
from tav_core.errors import Cancelled

SCHEDULER = DDIMScheduler(clip_sample=False)
CLASSES = dict(num_class_embeds=5)


def label(*numbers):
    return torch.tensor(numbers)


@pytest.fixture
def unet():
    return stir(inflate(make_unet(**CLASSES)))


@pytest.mark.parametrize("changes, first, other", [
    (CLASSES, label(1), label(4)),
    (dict(class_embed_type="timestep"), label(20), label(900)),
    (dict(class_embed_type="identity"), torch.full((1, 64), 0.1), torch.full((1, 64), -0.4)),
    (dict(class_embed_type="projection", projection_class_embeddings_input_dim=6), torch.ones(1, 6),
     -torch.ones(1, 6)),
    (dict(class_embed_type="simple_projection", projection_class_embeddings_input_dim=6), torch.ones(1, 6),
     -torch.ones(1, 6)),
])  # fmt: skip
@torch.no_grad()
def test_every_kind_of_label_is_that_of_the_2d_model(changes, first, other):
    base = make_unet(**changes)
    unet, (x, t, text) = inflate(base), inputs(b=2, f=1)
    both = torch.cat([first, other])
    expected = base(x[:, :, 0], t, text, class_labels=both).sample
    still = x.expand(-1, -1, 3, -1, -1)
    for labels in (both, both.repeat_interleave(3, dim=0)):  # per video, per frame
        assert difference(unet(still, t, text, class_labels=labels), expected[:, :, None].expand_as(still)) <= 5e-6
    swapped = unet(still, t, text, class_labels=both.flip(0))
    assert difference(swapped, expected[:, :, None].expand_as(still)) > 1e-3
    for half in (torch.bfloat16, torch.float16):
        half_unet = inflate(make_unet(**changes).to(half))
        assert half_unet(x.to(half), t, text.to(half), class_labels=both).dtype == half


@torch.no_grad()
def test_each_frame_may_have_its_label():
    unet, (x, t, text) = inflate(make_unet(**CLASSES), norm="frame"), inputs()
    x = x[:, :, :1].expand(-1, -1, 3, -1, -1)
    out = unet(x, t, text, class_labels=label(1, 1, 3))
    same = unet(x, t, text, class_labels=label(1))
    assert difference(out[:, :, :2], same[:, :, :2]) <= 5e-6
    assert difference(out[:, :, 2], same[:, :, 2]) > 1e-3


def tuned(unet, labels, **kwargs):
    latents, _, text = inputs()
    config = kwargs.pop("config", CONFIG)
    return tune(
        unet, SCHEDULER, [take(latents, text, class_labels=labels), *kwargs.pop("more_takes", ())], config, **kwargs
    )


@pytest.mark.slow
def test_tuning_learns_under_the_label_and_goes_on_with_no_other(tmp_path):
    def fresh():
        return inflate(make_unet(**CLASSES))

    path = tmp_path / "run.safetensors"
    whole = fresh()
    result = tuned(whole, label(2))
    assert result.losses != tuned(fresh(), label(3)).losses
    assert tuned(fresh(), label(2, 2, 2)).losses == result.losses
    with pytest.raises(Cancelled):
        tuned(fresh(), label(2), state_path=path, callback=stop_at(3))
    refused(r"another run \(class_labels changed", fresh(), label(3), state_path=path, call=tuned)
    assert tuned(parts := fresh(), label(2), state_path=path).losses == result.losses and equal(
        weights(whole), weights(parts)
    )
    latents, _, text = inputs()
    windows = replace(CONFIG, context_length=3)
    several = tuned(
        fresh(),
        label(2),
        config=windows,
        more_takes=[take(latents.repeat(1, 1, 2, 1, 1), text, class_labels=label(0, 1, 2, 3, 4, 0))],
    )
    assert len(several.losses) == 6


def test_inversion_and_sampling_take_labels(unet):
    latents, _, text = inputs()
    told = {n: Condition(text, label(n)) for n in (0, 1, 3)}
    noise = {n: ddim_invert(unet, latents, told[n], SCHEDULER, 8) for n in (1, 3)}
    assert difference(noise[1], noise[3]) > 1e-3
    back = {n: ddim_sample(unet, noise[1], told[n], SCHEDULER, 8, guidance_scale=1) for n in (1, 3)}
    assert difference(back[1], latents) < 0.5 * difference(back[3], latents)

    free, same = (
        ddim_sample(unet, noise[1], told[3], SCHEDULER, 4, guidance_scale=4.0, negative_hidden_states=negative)
        for negative in (told[0], text)
    )
    alone = ddim_sample(unet, noise[1], told[3], SCHEDULER, 4, guidance_scale=1)
    assert (
        difference(same, alone) < 1e-3 < 1e-2 < difference(free, same)
    )  # without labels of its own, nothing to be led away from


def test_the_leading_clip_keeps_its_label(unet):
    noise, _, text = inputs()
    told = Condition(text, label(3))
    plain = ddim_sample(unet, noise, told, SCHEDULER, 4, guidance_scale=1)
    own, other = (
        led_sample(
            unet, noise, told, SCHEDULER, 4, guidance_scale=1, attention_injection=1.0, source_hidden_states=source
        )
        for source in (text, Condition(text, label(1)))
    )
    assert difference(own, plain) < 1e-4 < 1e-3 < difference(other, plain)


@torch.no_grad()
def test_windows_and_the_search_for_the_subject_take_labels(unet):
    still, _, text = inputs(f=1)
    windowed = WindowedUNet(unet, ContextWindows(3, 2))
    wanted = ddim_invert(unet, still, Condition(text, label(2)), SCHEDULER, 3)
    out = ddim_invert(windowed, still.expand(-1, -1, 7, -1, -1), Condition(text, label(*[2] * 7)), SCHEDULER, 3)
    assert difference(out, wanted.expand_as(out)) < 1e-4
    masks = [subject_mask(unet, inputs()[0], Condition(text, label(n)), text.flip(1), SCHEDULER) for n in (1, 3)]
    assert masks[0].shape == (1, 1, 3, 8, 8) and not torch.equal(*masks)


@pytest.mark.parametrize("labels, told", [
    (None, "class_labels are missing, and this unet is conditioned on them; pass them"),
    (label(5), r"class_labels=\[5\] must be integers from 0 to 4"),
    (label(-1), r"class_labels=\[-1\] must be integers from 0 to 4"),
    (torch.tensor([1.0]), r"class_labels=\[1.0\] must be integers from 0 to 4"),
    (label(1, 2), "class_labels has a batch of 2 for 1 videos of 3 frames; give 1, 1 .one per video. or 3"),
])  # fmt: skip
def test_labels_that_do_not_fit(unet, labels, told):
    latents, t, text = inputs()
    given = {} if labels is None else {"class_labels": labels}
    refused(told, latents, t, text, **given, call=unet)
    refused(told, unet, labels, call=tuned)
    refused(told, unet, latents, Condition(text, labels), SCHEDULER, 2, call=ddim_invert)
    refused(told, unet, latents, Condition(text, labels), SCHEDULER, 2, guidance_scale=1, call=ddim_sample)


def test_labels_beside_a_condition_without(unet):
    latents, _, text = inputs()
    negative = {"guidance_scale": 2, "negative_hidden_states": Condition(text, label(1))}
    refused(
        "class_labels are missing beside condition", unet, latents, text, SCHEDULER, 2, **negative, call=ddim_sample
    )


def test_labels_for_a_model_without_classes():
    latents, t, text = inputs()
    refused(
        "class_labels are given, but this unet knows no classes",
        latents,
        t,
        text,
        class_labels=label(1),
        call=inflate(make_unet()),
    )


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    """A diffusers folder whose U-Net knows classes."""
    folder = make_folder(tmp_path_factory.mktemp("classes") / "classes")
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    torch.manual_seed(0)
    UNet2DConditionModel.from_config({**unet.config, **CLASSES}).save_pretrained(folder / "unet")
    return folder


@pytest.mark.slow
def test_an_edit_from_end_to_end(classes):
    checkpoint, preset = load_checkpoint(classes), replace(PRESETS["mini"], sampling_steps=2)
    preset = replace(preset, tuning=replace(preset.tuning, steps=2))
    frames = torch.randint(0, 255, (3, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    source = prepare(checkpoint, frames, "a dog runs", class_labels=label(1))
    unet, _ = tune_on(checkpoint, [source], preset)
    noise = invert(checkpoint, unet, source, preset)
    dog, cat = (
        sample(
            checkpoint,
            unet,
            noise,
            "a dog runs",
            preset,
            source_prompt="a dog runs",
            class_labels=label(n),
            negative_class_labels=label(0),
            source_class_labels=label(1),
        )
        for n in (1, 2)
    )
    assert dog.shape == frames.shape and not torch.equal(dog, cat)
    unlabelled = prepare(checkpoint, frames, "a dog runs")
    refused("class_labels are missing", checkpoint, [unlabelled], preset, call=tune_on)


def test_nodes_refuse_what_conditioning_cannot_say(pack, classes):
    checkpoint = load_checkpoint(classes)
    with pytest.raises(
        ValueError, match="checkpoint classes is conditioned on class labels, which CONDITIONING doesn't hold"
    ):
        pack.nodes.load_checkpoint.native_unet(checkpoint, classes)
