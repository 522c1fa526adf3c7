"""SDXL through the nodes, on a reduced layout: against the native model, and what is refused."""

import json
import shutil

import numpy as np
import pytest
import torch

from support.controls import control_net, controlled, hints, steered, t2i_adapter
from support.native_models import POOLED, attention_lora, clip, inflated, native, prompt, relative, sample
from support.native_patches import agrees, at_the_time_embedding, on_attn1_inputs, on_attn2_output

pytestmark = pytest.mark.usefixtures("inference_mode")


@pytest.fixture(scope="module")
def models(pack, inference_mode):
    """A native SDXL MODEL and the inflated one."""
    model = native(xl=True)
    return model, inflated(pack, model)


def with_sizes(conditioning, **sizes):
    return [[text, {**fields, **sizes}] for text, fields in conditioning]


@pytest.mark.parametrize("v_prediction", [False, True])
def test_sampled_as_by_the_native_model(pack, v_prediction):
    model = native(v_prediction=v_prediction, xl=True)
    wrapped = inflated(pack, model)
    expected = sample(model)
    assert relative(sample(wrapped), expected) < 1e-4
    assert relative(sample(wrapped, noise=clip().expand(3, -1, -1, -1)), expected.expand(3, -1, -1, -1)) < 1e-4


@pytest.mark.parametrize("family", ["SD15", "SD20", "SDXL"])
def test_the_layouts_of_the_real_models(pack, family):
    """Names and shapes of every weight, without the weights."""
    import comfy.model_base
    import comfy.supported_models
    import comfy.utils
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
    from diffusers import UNet2DConditionModel

    xl, second = family == "SDXL", family == "SD20"
    kind = getattr(comfy.supported_models, family)
    config = dict(
        image_size=32,
        in_channels=4,
        out_channels=4,
        use_spatial_transformer=True,
        legacy=False,
        use_temporal_attention=False,
        model_channels=320,
        use_linear_in_transformer=xl or second,
        num_classes="sequential" if xl else None,
        **(
            dict(
                num_res_blocks=[2] * 3,
                channel_mult=[1, 2, 4],
                transformer_depth=[0, 0, 2, 2, 10, 10],
                context_dim=2048,
                transformer_depth_output=[0, 0, 0, 2, 2, 2, 10, 10, 10],
                transformer_depth_middle=10,
                adm_in_channels=2816,
                num_head_channels=64,
            )
            if xl
            else dict(
                num_res_blocks=[2] * 4,
                channel_mult=[1, 2, 4, 4],
                transformer_depth=[1] * 6 + [0] * 2,
                adm_in_channels=None,
                transformer_depth_output=[1] * 9 + [0] * 3,
                transformer_depth_middle=1,
                context_dim=1024 if second else 768,
            )
        ),
    )
    model_config = kind(config)
    unet = UNetModel(**model_config.unet_config, device="meta")

    class Model(comfy.model_base.SDXL if xl else comfy.model_base.BaseModel):
        def __init__(self):
            torch.nn.Module.__init__(self)
            self.model_config = model_config

    with torch.device("meta"):
        ours = UNet2DConditionModel.from_config(pack.nodes.layout.unet_layout(Model(), unet)).state_dict()
    theirs, names = unet.state_dict(), comfy.utils.unet_to_diffusers(model_config.unet_config)
    assert set(names[name] for name in ours) == set(theirs)
    assert all(weight.shape == theirs[names[name]].shape for name, weight in ours.items())


def test_pooled_text_and_sizes_count(models):
    model, wrapped = models
    expected = sample(model)
    for positive in (
        with_sizes(prompt(1), width=1024, height=768, crop_w=64, target_width=512, target_height=512),
        with_sizes(prompt(1), pooled_output=torch.ones(1, POOLED)),
    ):
        changed = sample(model, positive=positive)
        assert relative(changed, expected) > 1e-3
        assert relative(sample(wrapped, positive=positive), changed) < 1e-4


def test_split_guidance_and_prompts_per_frame(models, monkeypatch):
    wrapped = models[1]
    one, together = prompt(1), sample(wrapped, 2)
    each = [[one[0][0].expand(2, -1, -1), {"pooled_output": one[0][1]["pooled_output"].expand(2, -1)}]]
    assert relative(sample(wrapped, 2, positive=each), together) < 1e-5
    monkeypatch.setattr(wrapped.model, "memory_required", lambda *args, **kwargs: 1e15)
    assert relative(sample(wrapped, 2), together) < 1e-5


def test_loras(pack, models):
    import comfy.sd

    model, wrapped = models
    original = attention_lora(model, lambda name, key: "lora_unet_" + key.replace(".", "_"))  # as most SDXL files
    diffusers = attention_lora(model, lambda name, key: "lora_unet_" + name.replace(".", "_"))
    with_lora, _ = comfy.sd.load_lora_for_models(model, None, original, 0.7, 0)
    expected = sample(with_lora)
    assert relative(expected, sample(model)) > 1e-2
    assert relative(sample(inflated(pack, with_lora)), expected) < 1e-4
    downstream, _ = comfy.sd.load_lora_for_models(wrapped, None, diffusers, 0.7, 0)
    assert relative(sample(downstream), expected) < 1e-4
    with pytest.raises(ValueError, match="the names of the original code; connect it before Inflate"):
        comfy.sd.load_lora_for_models(wrapped, None, original, 0.7, 0)


def test_tuning_and_inversion(pack, tmp_path, monkeypatch):
    import folder_paths

    monkeypatch.setattr(folder_paths, "get_user_directory", lambda: str(tmp_path))
    model = native(xl=True)
    model.model.diffusion_model.out[
        2
    ].weight.data *= 0.5  # random weights lead over rough ground, where no step is small enough
    wrapped, nodes, latent = inflated(pack, model), pack.nodes, {"samples": clip(2) * 5}

    def tune(positive, steps):
        return nodes.OneShotTune.execute(
            wrapped, latent, positive, steps, 1e-2, 0, "fp32", "checkpointing", "stratified", 0
        ).args

    tuned, weights, _, losses = tune(prompt(1), 12)
    (_, first), *_, (_, last) = json.loads(losses)["probe_losses"]
    assert last < 0.97 * first
    assert relative(sample(tuned, 2), sample(wrapped, 2)) > 1e-2
    applied = nodes.ApplyTunedWeights.execute(wrapped, weights).args[0]
    assert torch.equal(sample(applied, 2), sample(tuned, 2))
    # what is tuned is what is sampled: the vector has its part in the loss
    larger = with_sizes(prompt(1), width=1024, height=1024)
    assert json.loads(tune(larger, 1)[3])["losses"] != json.loads(losses)["losses"][:1]

    noise, sigmas, error = nodes.DDIMInversion.execute(tuned, latent, prompt(1), 20, "ddim_uniform", True).args
    assert error < 0.3 < 0.6 < (latent["samples"] * 0.13025).square().mean().sqrt()
    edited = nodes.VideoSampler.execute(tuned, prompt(3), prompt(2), noise, 4, 3.0, "ddim_uniform", 0.0, False, 0).args[
        0
    ]["samples"]
    led = nodes.AttentionInjection.execute(tuned, prompt(1), 0.5).args[0]
    kept = nodes.VideoSampler.execute(led, prompt(3), prompt(2), noise, 4, 3.0, "ddim_uniform", 0.0, False, 0).args[0][
        "samples"
    ]
    assert relative(kept, edited) > 1e-2
    assert torch.isfinite(kept).all() and torch.isfinite(edited).all()


def test_a_clip_that_leads_its_like_changes_nothing(pack, models):
    """The leading clip has its own vector."""
    wrapped, noise = inflated(pack, models[0], norm="frame"), clip(2)
    wide = with_sizes(prompt(1), width=1024)
    led = pack.nodes.AttentionInjection.execute(wrapped, wide, 1.0).args[0]
    assert (
        relative(sample(led, noise=noise, cfg=1.0, positive=wide), sample(wrapped, noise=noise, cfg=1.0, positive=wide))
        < 1e-4
    )
    other = pack.nodes.AttentionInjection.execute(wrapped, prompt(1), 1.0).args[0]
    assert (
        relative(
            sample(other, noise=noise, cfg=1.0, positive=wide), sample(wrapped, noise=noise, cfg=1.0, positive=wide)
        )
        > 1e-4
    )


def test_the_copy_that_is_tuned_predicts_what_the_model_does(pack, models):
    wrapped, bridge, xl = inflated(pack, models[0]), pack.nodes.native, pack.nodes.sdxl
    text, noise = prompt(1), clip(3)
    vector = xl.vector_of(wrapped, text, noise)
    assert vector.shape == (1, POOLED + 6 * 256)
    expected = wrapped.model.diffusion_model(
        noise,
        torch.full((3,), 500.0),
        text[0][0].expand(3, -1, -1),
        vector.expand(3, -1),
        transformer_options={"cond_or_uncond": [0]},
    )
    out = bridge.trainable_copy(wrapped)(noise.movedim(0, 1)[None], 500, text[0][0], class_labels=vector)
    assert relative(out[0].movedim(1, 0), expected) < 1e-4


def test_a_preview_of_a_sentence_of_more_chunks(pack, models, monkeypatch, tmp_path):
    """Its text is repeated, its vector isn't."""
    import folder_paths

    shown, (one, fields) = [], prompt(3)[0]
    monkeypatch.setattr(folder_paths, "get_user_directory", lambda: str(tmp_path))
    monkeypatch.setattr(pack.nodes.tune, "show", lambda node, picture: shown.append(np.int16(picture)))
    monkeypatch.setattr(pack.nodes.tune, "PREVIEW_STEPS", 2)
    for times in (1, 3):
        tune = (models[1], {"samples": clip(2)}, prompt(1), 1, 1e-7, 0, "fp32", "fast", "uniform", 1)
        pack.nodes.OneShotTune.execute(*tune, preview_prompt=[[one.repeat(1, times, 1), fields]])
        shutil.rmtree(tmp_path / "tune_a_video")
    assert np.abs(shown[0] - shown[1]).max() <= 1 < shown[0].std()


def test_patches_of_deeper_transformers(pack, models):
    model, wrapped = models
    for patch in (on_attn1_inputs, on_attn2_output, at_the_time_embedding):
        agrees((model, wrapped, sample(model, steps=2)), patch)


def test_foreign_conditioning_is_refused(pack, models):
    wrapped, nodes = models[1], pack.nodes
    narrow, bare = [[torch.randn(1, 77, 32), {"pooled_output": torch.randn(1, POOLED)}]], [[prompt(1)[0][0], {}]]
    for conditioning, told in ((narrow, "width 32, this MODEL takes 48"), (bare, "no pooled text, which SDXL needs")):
        with pytest.raises(ValueError, match=told):
            sample(wrapped, positive=conditioning)
        with pytest.raises(ValueError, match=told):
            nodes.OneShotTune.execute(
                wrapped, {"samples": clip(2)}, conditioning, 1, 1e-3, 0, "fp32", "fast", "uniform", 0
            )


def test_loras_of_another_family_are_refused(pack, models):
    import comfy.sd

    first = native(context_dim=32)
    for source in (models[0], first):
        foreign = first if source is models[0] else models[0]
        tensors = attention_lora(source, lambda name, key: "lora_unet_" + name.replace(".", "_"))
        patched, _ = comfy.sd.load_lora_for_models(foreign, None, tensors, 1.0, 0)
        with pytest.raises(ValueError, match="LoRA is for another family of models"):
            inflated(pack, patched)
        with pytest.raises(ValueError, match="LoRA is for another family of models"):
            comfy.sd.load_lora_for_models(inflated(pack, foreign), None, tensors, 1.0, 0)


def test_controlnets(pack, models):
    model, wrapped = models
    for applied in (
        [(control_net(1, model), hints(), 0.8, 0.0, 1.0)],
        [(t2i_adapter(1, cin=3 * 256, channels=[32, 64, 128, 128], xl=True), hints(), 0.8, 0.0, 1.0)],
    ):
        prompts = controlled(prompt(1), *applied)
        expected = steered(model, prompts, clip())
        assert relative(expected, steered(model, (prompt(1), prompt(2)), clip())) > 1e-2
        assert relative(steered(wrapped, prompts, clip()), expected) < 1e-4


def test_controlnets_of_another_family_are_refused(pack, models):
    import comfy.controlnet

    first = native(context_dim=32)
    text = [[torch.randn(1, 77, 32), {}]]
    for net, foreign, prompts in (
        (control_net(1, models[0]), first, (text, text)),
        (control_net(1, first), models[0], (prompt(1), prompt(2))),
    ):
        positive, negative = controlled(prompts[0], (net, hints(), 0.8, 0.0, 1.0), negative=prompts[1])
        with pytest.raises(ValueError, match="ControlNet is for another family of models"):
            steered(inflated(pack, foreign), (positive, negative), clip())
    with pytest.raises(ValueError, match="T2I-Adapter is for another family of models"):
        steered(models[1], controlled(prompt(1), (t2i_adapter(1), hints(), 0.8, 0.0, 1.0)), clip())
    light = comfy.controlnet.ControlLora({})
    with pytest.raises(ValueError, match="use a whole ControlNet"):
        steered(models[1], controlled(prompt(1), (light, hints(), 0.8, 0.0, 1.0)), clip())


@pytest.mark.parametrize(("changes", "told"), [
    (dict(in_channels=9), "an inpainting model"),
    (dict(transformer_depth_output=[0, 0, 0, 1, 1, 1, 1, 2, 2]), "a distilled SDXL"),
    (dict(transformer_depth_middle=1), "a distilled SDXL"),
])  # fmt: skip
def test_other_kinds_of_sdxl_are_refused(pack, changes, told):
    with pytest.raises(ValueError, match=told):
        inflated(pack, native(xl=True, **changes))


def test_the_refiner_is_refused(pack):
    import comfy.model_base

    model = native(xl=True)
    model.model.__class__ = comfy.model_base.SDXLRefiner
    with pytest.raises(ValueError, match="an SDXL refiner"):
        inflated(pack, model)
