"""The bridge in a real ComfyUI, in this process: native MODELs against wrapped ones, on reduced layouts.

The pack has its own `tav_core` here, so its errors are told by their base class, ValueError.
"""

import json
import re

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler

from support.led_sampling import led_sample
from support.native_models import clip, inflated, native, plain, prompt, relative, sample
from tav_core import (
    Condition,
    EditPlaces,
    Take,
    TuneConfig,
    ddim_invert,
    ddim_sample,
    encode_prompt,
    encode_video,
    inflate,
    subject_mask,
    tune,
)
from tav_core.subject import outlined, softened, word_mask

pytestmark = pytest.mark.usefixtures("inference_mode")


@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("v_prediction", [False, True])
def test_one_frame_is_sampled_as_by_the_native_model(pack, second, v_prediction):
    model = native(second, v_prediction)
    wrapped = inflated(pack, model)
    assert wrapped.model.diffusion_model.config.upcast_attention == second
    assert relative(sample(wrapped), sample(model)) < 1e-4


def test_equal_frames_are_sampled_as_one(pack):
    model = native()
    noise = clip().expand(3, -1, -1, -1)
    assert relative(sample(inflated(pack, model), noise=noise), sample(model).expand(3, -1, -1, -1)) < 1e-4


def test_frames_see_each_other(pack):
    wrapped = inflated(pack, native())
    noise = clip(3)
    changed = noise.clone()
    changed[0] += 1
    assert relative(sample(wrapped, noise=changed)[2], sample(wrapped, noise=noise)[2]) > 1e-3


def test_batched_and_split_guidance_agree(pack, monkeypatch):
    wrapped = inflated(pack, native())
    calls = []
    forward = type(wrapped.model.diffusion_model).forward
    monkeypatch.setattr(
        type(wrapped.model.diffusion_model),
        "forward",
        lambda self, x, *args, **kwargs: calls.append(len(x)) or forward(self, x, *args, **kwargs),
    )
    together = sample(wrapped, 3)
    assert set(calls) == {6}
    calls.clear()
    monkeypatch.setattr(wrapped.model, "memory_required", lambda *args, **kwargs: 1e15)
    assert relative(sample(wrapped, 3), together) < 1e-5
    assert set(calls) == {3}


def test_each_frame_may_have_its_prompt_and_several_prompts_combine(pack):
    wrapped = inflated(pack, native())
    one = prompt(1)
    assert (
        relative(
            sample(wrapped, 3, positive=prompt(1, 1)), sample(wrapped, 3, positive=[[one[0][0].expand(3, -1, -1), {}]])
        )
        < 1e-5
    )
    assert torch.isfinite(sample(wrapped, 3, positive=prompt(4, 3))).all()
    assert torch.isfinite(sample(wrapped, 3, positive=[*prompt(1), *prompt(5)])).all()


def kohya_lora(model, seed=0):
    """A LoRA on every attention projection and convolution, keys as in published SD 1.5 files."""
    from comfy.utils import unet_to_diffusers

    generator, lora = torch.Generator().manual_seed(seed), {}
    shapes = {name: weight.shape for name, weight in model.model.diffusion_model.state_dict().items()}
    for name, key in unet_to_diffusers(model.model.model_config.unet_config).items():
        if not name.endswith(".weight") or key not in shapes or len(shapes[key]) < 2 or "transformer" not in name:
            continue
        out, into = shapes[key][:2]
        base = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
        lora[f"{base}.lora_down.weight"] = torch.randn(2, into, generator=generator) * into**-0.5
        lora[f"{base}.lora_up.weight"] = torch.randn(out, 2, generator=generator) * 0.5
        lora[f"{base}.alpha"] = torch.tensor(2.0)
    return lora


def test_loras_work_before_and_after_inflation(pack):
    import comfy.sd

    model = native()
    lora = kohya_lora(model)
    before = sample(model)
    with_lora, _ = comfy.sd.load_lora_for_models(model, None, lora, 0.7, 0)
    wanted = sample(with_lora)
    upstream = inflated(pack, with_lora)
    assert relative(sample(upstream), wanted) < 1e-4
    assert relative(wanted, before) > 1e-2
    assert relative(sample(model), before) < 1e-6  # the source MODEL is as it was

    plain = inflated(pack, model)
    downstream, _ = comfy.sd.load_lora_for_models(plain, None, lora, 0.7, 0)
    assert len(downstream.patches) == len(lora) // 3
    assert relative(sample(downstream), wanted) < 1e-4
    assert relative(sample(plain), before) < 1e-4


def test_inflating_while_a_lora_is_loaded_in_place(pack):
    import comfy.sd

    model = native()
    with_lora, _ = comfy.sd.load_lora_for_models(model, None, kohya_lora(model), 1.0, 0)
    wanted = sample(with_lora)  # its weights are patched in place now
    assert relative(sample(inflated(pack, with_lora)), wanted) < 1e-4
    assert relative(sample(inflated(pack, model)), sample(model)) < 1e-4


def test_partly_loaded_models_compute_the_same(pack):
    wrapped = inflated(pack, native())
    tuned = pack.nodes.native.with_tuned_weights(
        wrapped, {n: p + 0.05 for n, p in pack.nodes.native.trainable_names(wrapped).items()}, 3
    )
    whole = sample(tuned, 3)
    tuned.detach()
    tuned.load(torch.device("cpu"), lowvram_model_memory=100_000)
    casting = [m for m in tuned.model.modules() if getattr(m, "comfy_cast_weights", False)]
    leaves = [m for m in tuned.model.diffusion_model.modules() if not list(m.children()) and list(m.parameters())]
    assert len(casting) > 50
    assert all(hasattr(m, "comfy_cast_weights") for m in leaves)
    noise, context = clip(3), prompt(1)[0][0]
    partly = tuned.model.diffusion_model(
        noise, torch.full((3,), 500.0), context, transformer_options={"cond_or_uncond": [0]}
    )
    tuned.detach()
    tuned.load(torch.device("cpu"), full_load=True)
    fully = tuned.model.diffusion_model(
        noise, torch.full((3,), 500.0), context, transformer_options={"cond_or_uncond": [0]}
    )
    assert relative(partly, fully) < 1e-5
    assert relative(sample(tuned, 3), whole) < 1e-6


def test_attention_is_the_one_that_the_user_chose(pack, monkeypatch):
    import comfy.ldm.modules.attention as attention

    wrapped, calls = inflated(pack, native(), temporal_causal=True), []

    def spy(which, q, *args, mask=None, **kwargs):
        calls.append((which, mask is not None))
        return attention.attention_basic(q, *args, mask=mask, **kwargs)

    plain = sample(wrapped, 3)
    monkeypatch.setattr(attention, "optimized_attention", lambda *a, **k: spy("plain", *a, **k))
    monkeypatch.setattr(attention, "optimized_attention_masked", lambda *a, **k: spy("masked", *a, **k))
    assert relative(sample(wrapped, 3), plain) < 1e-5
    assert set(calls) == {("plain", False), ("masked", True)}


@pytest.mark.parametrize(("changes", "told"), [
    (dict(adm_in_channels=2816, num_classes="sequential"), "SDXL"),
    (dict(in_channels=9), "inpainting"),
    (dict(use_temporal_attention=True, merge_strategy="fixed", merge_factor=0.5), "a video model already"),
])  # fmt: skip
def test_other_families_are_refused(pack, changes, told):
    with pytest.raises(ValueError, match=told):
        inflated(pack, native(**changes))


@pytest.mark.parametrize("family", ["Flux", "SD3", "WAN21"])
def test_transformers_are_refused(pack, family):
    import comfy.model_base

    model = native()
    model.model.__class__, model.model.diffusion_model = getattr(comfy.model_base, family), torch.nn.Linear(1, 1)
    with pytest.raises(
        ValueError,
        match=rf"MODEL is of another family \({family}\); give a Stable Diffusion 1.x, 2.x or SDXL checkpoint",
    ):
        pack.nodes.Inflate.execute(model, "sparse-causal", False, "video")


def test_inflating_twice_and_foreign_text_are_refused(pack):
    wrapped = inflated(pack, native())
    with pytest.raises(ValueError, match="inflated already"):
        inflated(pack, wrapped)
    with pytest.raises(ValueError, match="width 32, this MODEL takes 48"):
        sample(wrapped, positive=[[torch.randn(1, 77, 32), {}]])


@pytest.fixture(scope="module")
def each_node(pack):
    """Every node that looks at a clip, as a function of MODEL, samples and CONDITIONING."""
    nodes = pack.nodes
    return {
        "tune": lambda m, x, c: nodes.OneShotTune.execute(
            m, {"samples": x}, c, 1, 1e-3, 0, "fp32", "fast", "uniform", 0
        ),
        "take": lambda m, x, c: nodes.OneShotTune.execute(
            m,
            {"samples": clip(2)},
            prompt(1),
            1,
            1e-3,
            0,
            "fp32",
            "fast",
            "uniform",
            0,
            takes=nodes.Take.execute({"samples": x}, c).args[0],
        ),
        "invert": lambda m, x, c: nodes.DDIMInversion.execute(m, {"samples": x}, c, 2, "ddim_uniform", False),
        "sample": lambda m, x, c: nodes.VideoSampler.execute(
            m, c, c, {"samples": x}, 2, 4.0, "ddim_uniform", 0.0, False, 0
        ),
        "mask": lambda m, x, c: nodes.SubjectMask.execute(
            m, {"samples": x}, torch.zeros(len(x), 128, 128, 3), c, c, 0.15, 0, 0
        ),
        "stock": lambda m, x, c: sample(m, noise=x, positive=c),
    }


@pytest.mark.parametrize("node", ["tune", "take", "invert", "sample", "mask", "stock"])
def test_text_and_latents_of_another_family_are_refused(pack, each_node, node):
    wrapped = inflated(pack, native())
    with pytest.raises(
        ValueError, match="CONDITIONING has width 2048, this MODEL takes 48; use the CLIP of the same checkpoint"
    ):
        each_node[node](wrapped, clip(2), [[torch.randn(1, 77, 2048), {"pooled_output": torch.randn(1, 1280)}]])
    told = (
        "LATENT has 16 channels, this MODEL takes 4"
        if node == "stock"
        else r"LATENT has shape \(2, 16, 16, 16\); give frames as a batch"
    )
    with pytest.raises(ValueError, match=told):
        each_node[node](wrapped, clip(2).repeat(1, 4, 1, 1), prompt(1))


def test_tuned_weights_stay_off_the_model_they_came_from(pack):
    wrapped = inflated(pack, native())
    before = sample(wrapped, 3)
    weights = {n: p + 0.1 for n, p in pack.nodes.native.trainable_names(wrapped).items()}
    tuned = pack.nodes.native.with_tuned_weights(wrapped, weights, 3)
    assert relative(sample(tuned, 3), before) > 1e-2
    assert relative(sample(wrapped, 3), before) < 1e-6
    assert torch.isfinite(sample(tuned, 6)).all()  # two clips
    with pytest.raises(ValueError, match="LATENT has 4 frames, this MODEL was tuned on 3"):
        sample(tuned, 4)


def test_two_clips_in_one_latent_do_not_see_each_other(pack):
    wrapped = inflated(pack, native())
    weights = {n: p + 0.02 for n, p in pack.nodes.native.trainable_names(wrapped).items()}
    tuned = pack.nodes.native.with_tuned_weights(wrapped, weights, 3)
    first, second = clip(3, 1), clip(3, 2)
    both = sample(tuned, noise=torch.cat([first, second]))
    assert relative(both, torch.cat([sample(tuned, noise=first), sample(tuned, noise=second)])) < 1e-4


def test_the_noise_schedule_survives_the_bridge(pack):
    model = native(v_prediction=True)
    scheduler = pack.nodes.native.scheduler_of(model)
    sigmas = model.model.model_sampling.sigmas
    assert scheduler.config.prediction_type == "v_prediction"
    torch.testing.assert_close(scheduler.alphas_cumprod, 1 / (1 + sigmas**2), rtol=1e-4, atol=1e-6)


def test_inflated_models_compute_in_the_dtype_of_their_source(pack):
    """With dynamic VRAM the weights of a native model stay in that of their file."""
    model = native()
    model.model.diffusion_model.dtype = torch.bfloat16
    wrapped = inflated(pack, model)
    assert wrapped.model.get_dtype() == torch.bfloat16
    assert {weight.dtype for weight in pack.nodes.native.weights(wrapped).values()} == {torch.bfloat16}
    assert torch.isfinite(sample(wrapped)).all()


def test_the_core_can_make_one_more_of_each_model(pack, mini):
    """Newer cores do, for Train LoRA, hook LoRAs, TorchCompileModel and further GPUs."""
    model, text, vae = pack.nodes.LoadCheckpoint.execute("mini").args
    styled = pack.nodes.Inflate.execute(model, "full", True, "frame").args[0]
    for patcher in (model, text.patcher, vae.patcher, styled):
        make, arguments, *index = patcher.cached_patcher_init
        again = make(*arguments)
        again = again[index[0]] if index else again
        ours, theirs = patcher.model.state_dict(), again.model.state_dict()
        assert ours.keys() == theirs.keys() and again.model is not patcher.model
        for name, weight in ours.items():
            assert torch.equal(weight, theirs[name]), name
            assert name.startswith("model_sampling.") or weight.data_ptr() != theirs[name].data_ptr(), name
    assert again.model.diffusion_model.inflation == styled.model.diffusion_model.inflation
    assert torch.equal(again.model.model_sampling.sigmas, model.model.model_sampling.sigmas)


# --------------------------------------------------------------------------------- nodes against tav_core


def test_text_and_latents_are_those_of_the_core(mini):
    for words in ("a red ball is sliding on the grass", "", "a zebra, sketch style"):
        assert (mini.encode(words)[0][0] - encode_prompt(mini.checkpoint, words)).abs().max() < 1e-5
    mean, _ = encode_video(mini.checkpoint, (mini.images.movedim(-1, 0)[None] * 2 - 1))
    assert (mini.latents - mean).abs().max() < 1e-5
    tiled = mini.vae.decode_tiled(mini.latent["samples"], tile_x=12, tile_y=12, overlap=4)
    assert (tiled - mini.vae.decode(mini.latent["samples"])).abs().mean() < 0.05


def test_the_2d_checkpoint_is_a_native_model(mini):
    one = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    assert relative(plain(mini.inflated, one, mini), plain(mini.model, one, mini)) < 1e-4


def test_inversion_and_sampling_are_those_of_the_core(pack, mini):
    latent, sigmas, error = pack.nodes.DDIMInversion.execute(
        mini.inflated, mini.latent, mini.encode(""), 5, "ddim_uniform", True
    ).args
    unet, empty = inflate(mini.checkpoint.unet), encode_prompt(mini.checkpoint, "")
    scheduler = DDIMScheduler.from_config(mini.checkpoint.scheduler.config, set_alpha_to_one=True)
    wanted = ddim_invert(unet, mini.latents, empty, scheduler, 5)
    z = mini.model.model.process_latent_in(latent["samples"]) / (1 + sigmas[0] ** 2).sqrt()
    assert (z.movedim(0, 1)[None] - wanted).abs().max() < 1e-4
    back = ddim_sample(unet, wanted, empty, scheduler, 5, guidance_scale=1)
    assert error == pytest.approx((back - mini.latents).square().mean().sqrt().item(), rel=1e-3)

    edit = "a blue star is sliding on the snow"
    arguments = (mini.inflated, mini.encode(edit), mini.encode(""), latent, 5, 5.0, "ddim_uniform", 0.0, False, 0)
    edited = pack.nodes.VideoSampler.execute(*arguments).args[0]
    wanted = ddim_sample(
        unet,
        wanted,
        encode_prompt(mini.checkpoint, edit),
        scheduler,
        5,
        guidance_scale=5.0,
        negative_hidden_states=empty,
    )
    assert (mini.model.model.process_latent_in(edited["samples"]).movedim(0, 1)[None] - wanted).abs().max() < 1e-3


@pytest.mark.parametrize("split", [False, True])
def test_attention_injection_is_that_of_the_core(pack, mini, monkeypatch, split):
    if split:  # positive and negative prompt in calls of their own, as when memory is short
        monkeypatch.setattr(mini.inflated.model, "memory_required", lambda *args, **kwargs: 1e15)
    nodes, caption, edit = pack.nodes, "a red ball is sliding on the grass", "a blue star is sliding on the snow"
    model = nodes.AttentionInjection.execute(mini.inflated, mini.encode(caption), 0.5).args[0]
    noise = nodes.DDIMInversion.execute(model, mini.latent, mini.encode(caption), 5, "ddim_uniform", False).args[0]
    plain = nodes.DDIMInversion.execute(
        mini.inflated, mini.latent, mini.encode(caption), 5, "ddim_uniform", False
    ).args[0]
    assert torch.equal(noise["samples"], plain["samples"])  # inversion is never led

    unet, scheduler = (
        inflate(mini.checkpoint.unet),
        DDIMScheduler.from_config(mini.checkpoint.scheduler.config, set_alpha_to_one=True),
    )
    said, wish, empty = (encode_prompt(mini.checkpoint, words) for words in (caption, edit, ""))
    start = ddim_invert(unet, mini.latents, said, scheduler, 5)
    outs = []
    for _ in range(2):  # nothing of a walk is left for the next one
        edited = nodes.VideoSampler.execute(
            model, mini.encode(edit), mini.encode(""), noise, 5, 5.0, "ddim_uniform", 0.0, False, 0
        )
        outs.append(mini.model.model.process_latent_in(edited.args[0]["samples"]).movedim(0, 1)[None])
    assert torch.equal(*outs)
    settings = dict(guidance_scale=5.0, negative_hidden_states=empty, source_hidden_states=said)
    wanted, without = (
        led_sample(unet, start, wish, scheduler, 5, attention_injection=share, **settings) for share in (0.5, 0.0)
    )
    assert (outs[0] - wanted).abs().max() < 1e-3 < 0.1 < (wanted - without).abs().max()


@pytest.mark.parametrize("region", ["subject", "background", "everything"])
def test_subject_and_region_are_those_of_the_core(pack, mini, region):
    nodes, caption, edit = pack.nodes, "a red ball is sliding on the grass", "a blue star is sliding on the snow"
    others = ["a green heart is sliding on the grass", "a purple ring is sliding on the grass"]
    contrast = [entry for other in others for entry in mini.encode(other)]
    mask = nodes.SubjectMask.execute(
        mini.inflated, mini.latent, mini.images, mini.encode(caption), contrast, 0.15, 3, 0
    ).args[0]
    unet, scheduler = (
        inflate(mini.checkpoint.unet),
        DDIMScheduler.from_config(mini.checkpoint.scheduler.config, set_alpha_to_one=True),
    )
    said, wish, empty, *told = (encode_prompt(mini.checkpoint, words) for words in (caption, edit, "", *others))
    found = subject_mask(unet, mini.latents, said, torch.cat(told), scheduler)
    subject = softened(outlined(found, (mini.images * 255).round().to(torch.uint8)), 3)
    assert mask.shape == (4, 128, 128) and 0.02 < subject.mean() < 0.5
    assert (mask - subject[0, 0]).abs().mean() < 0.01

    model = nodes.AttentionInjection.execute(mini.inflated, mini.encode(caption), 0.5, region, True, mask).args[0]
    noise = nodes.DDIMInversion.execute(model, mini.latent, mini.encode(caption), 5, "ddim_uniform", False).args[0]
    edited = nodes.VideoSampler.execute(
        model, mini.encode(edit), mini.encode(""), noise, 5, 5.0, "ddim_uniform", 0.0, False, 0
    ).args[0]
    edited = mini.model.model.process_latent_in(edited["samples"]).movedim(0, 1)[None]
    start, subject = ddim_invert(unet, mini.latents, said, scheduler, 5), F.avg_pool2d(mask, 8)[None, None]
    settings = dict(
        guidance_scale=5.0, negative_hidden_states=empty, source_hidden_states=said, attention_injection=0.5
    )
    places = vars(EditPlaces.of(region, subject, margin=1))
    wanted = led_sample(unet, start, wish, scheduler, 5, **places, **settings)
    free = led_sample(unet, start, wish, scheduler, 5, anchor=places["anchor"], **settings)
    assert (edited - wanted).abs().max() < 1e-3 < 0.1 < (wanted - free).abs().max()
    with pytest.raises(ValueError, match="subject has 3 masks for 4 frames"):
        model = nodes.AttentionInjection.execute(mini.inflated, mini.encode(caption), 0.5, region, True, mask[:3]).args[
            0
        ]
        nodes.VideoSampler.execute(
            model, mini.encode(edit), mini.encode(""), noise, 5, 5.0, "ddim_uniform", 0.0, False, 0
        )
    with pytest.raises(
        ValueError, match="region .* needs to know where the subject is; connect subject to Subject Mask"
    ):
        nodes.AttentionInjection.execute(mini.inflated, mini.encode(caption), 0.5, "subject")


def test_the_mask_of_a_word_is_that_of_the_core(pack, mini):
    caption = "a red ball is sliding on the grass"
    clip = pack.nodes.LoadCheckpoint.execute("mini").args[1]
    mask = pack.nodes.WordMask.execute(mini.inflated, clip, mini.latent, mini.images, caption, "ball", 5, 0.3, 0).args[
        0
    ]
    unet, ids = inflate(mini.checkpoint.unet), mini.checkpoint.tokenizer(caption).input_ids
    scheduler = DDIMScheduler.from_config(mini.checkpoint.scheduler.config, set_alpha_to_one=True)
    wanted = word_mask(
        unet, mini.latents, encode_prompt(mini.checkpoint, caption), [3], scheduler, steps=5, threshold=0.3
    )
    assert ids[3] == mini.checkpoint.tokenizer("ball", add_special_tokens=False).input_ids[0]
    outline = outlined(wanted, (mini.images * 255).round().to(torch.uint8))[0, 0]
    assert mask.shape == (4, 128, 128) and (mask - outline).abs().mean() < 0.01 < outline.mean() < 0.99
    with pytest.raises(
        ValueError, match="images are 3 of 128 x 128, latent is of 4 of 128 x 128; give the frames that were encoded"
    ):
        pack.nodes.WordMask.execute(mini.inflated, clip, mini.latent, mini.images[1:], caption, "ball", 5, 0.3, 0)
    with pytest.raises(ValueError, match="word star is not in the sentence"):
        pack.nodes.WordMask.execute(mini.inflated, clip, mini.latent, mini.images, caption, "star", 5, 0.3, 0)
    with pytest.raises(ValueError, match="word ' ' is not in the sentence"):
        pack.nodes.WordMask.execute(mini.inflated, clip, mini.latent, mini.images, caption, " ", 5, 0.3, 0)
    with pytest.raises(ValueError, match="MODEL sees the clip in Context Windows"):
        windowed = pack.nodes.ContextWindows.execute(mini.inflated, 3, 2).args[0]
        pack.nodes.WordMask.execute(windowed, clip, mini.latent, mini.images, caption, "ball", 5, 0.3, 0)


def test_inversion_is_exact_on_any_sigmas_where_the_noise_is_constant(pack, mini, monkeypatch):
    import comfy.samplers

    noise = torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(type(mini.inflated.model.diffusion_model), "forward", lambda self, x, *args, **kwargs: noise)
    for scheduler in ("karras", "normal", "sgm_uniform"):
        sigmas = comfy.samplers.calculate_sigmas(mini.inflated.get_model_object("model_sampling"), scheduler, 7)
        latent, same, error = pack.nodes.DDIMInversion.execute(
            mini.inflated, mini.latent, mini.encode(""), 1, "normal", True, sigmas
        ).args
        assert torch.equal(same, sigmas)
        assert error < 1e-5
        x = mini.model.model.process_latent_in(latent["samples"])
        assert (x - (mini.latents[0].movedim(0, 1) + sigmas[0] * noise)).abs().max() < 1e-4
    with pytest.raises(ValueError, match="must fall to 0"):
        pack.nodes.DDIMInversion.execute(mini.inflated, mini.latent, mini.encode(""), 1, "normal", True, sigmas[:-1])


def test_eta_and_random_noise(pack, mini):
    def run(eta, add_noise, seed):
        return pack.nodes.VideoSampler.execute(
            mini.inflated,
            mini.encode("a ball"),
            mini.encode(""),
            mini.latent,
            4,
            2.0,
            "ddim_uniform",
            eta,
            add_noise,
            seed,
        ).args[0]["samples"]

    assert torch.equal(run(0.0, False, 1), run(0.0, False, 2))  # nothing random in DDIM
    assert not torch.equal(run(0.5, False, 1), run(0.5, False, 2))
    assert torch.equal(run(0.5, False, 1), run(0.5, False, 1))
    assert not torch.equal(run(0.0, True, 1), run(0.0, True, 2))


def test_tuning_is_that_of_the_core(pack, mini, tmp_path, monkeypatch):
    import folder_paths

    monkeypatch.setattr(folder_paths, "get_user_directory", lambda: str(tmp_path))
    caption = "a red ball is sliding on the grass"

    def run(steps):
        return pack.nodes.OneShotTune.execute(
            mini.inflated, mini.latent, mini.encode(caption), steps, 1e-3, 0, "fp32", "auto", "stratified", 0
        ).args

    before = plain(mini.inflated, mini.latent["samples"], mini)
    tuned, weights, curve, losses = run(3)
    with torch.inference_mode(False):
        unet = inflate(mini.checkpoint.unet)
        wanted = tune(
            unet,
            mini.checkpoint.scheduler,
            [Take(mini.latents.clone(), Condition(encode_prompt(mini.checkpoint, caption).clone()))],
            TuneConfig(steps=3, learning_rate=1e-3, timestep_sampling="stratified"),
        )
    assert json.loads(losses)["losses"] == pytest.approx(wanted.losses, abs=1e-6)
    for name, weight in wanted.weights.items():
        assert (weights.tensors[name] - weight).abs().max() < 1e-4, name
    assert curve.shape[-1] == 3
    assert torch.equal(plain(mini.inflated, mini.latent["samples"], mini), before)

    longer, again = run(4), run(3)  # a longer run goes on; a shorter one does not get its weights
    assert json.loads(longer[3])["losses"][:3] == json.loads(losses)["losses"]
    assert all(torch.equal(again[1].tensors[name], weight) for name, weight in weights.tensors.items())

    applied = pack.nodes.ApplyTunedWeights.execute(mini.inflated, weights).args[0]
    assert torch.equal(plain(applied, mini.latent["samples"], mini), plain(tuned, mini.latent["samples"], mini))
    with pytest.raises(ValueError, match="inflate it the same way"):
        other = pack.nodes.Inflate.execute(mini.model, "first", False, "video").args[0]
        pack.nodes.ApplyTunedWeights.execute(other, weights)
    with pytest.raises(ValueError, match="tuned_weights belongs to the base model"):
        pack.nodes.ApplyTunedWeights.execute(inflated(pack, native()), weights)


OUT_OF_MEMORY = (
    torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError(
        "MPS backend out of memory (MPS allocated: 9.00 GB, other allocations: 1.00 GB, max allowed: 10.00 GB)."
    ),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."
    ),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
)


def test_out_of_memory_is_told_plainly_and_the_core_sees_it(pack):
    from comfy.model_management import OOM_EXCEPTION

    common, tuning = pack.nodes.common, pack.tav_core.tuning
    for cause in OUT_OF_MEMORY:
        with (
            pytest.raises(
                OOM_EXCEPTION, match="^the device ran out of memory; use fewer .*, memory low, or dtype bf16$"
            ) as error,
            common.plain_errors(),
        ):
            raise cause
        assert isinstance(error.value, ValueError) and error.value.__cause__ is cause
    with (
        pytest.raises(OOM_EXCEPTION, match="^memory low ran out of memory at step 3; use fewer frames$") as error,
        common.plain_errors(),
    ):
        raise tuning.OutOfMemory("memory", "low", "ran out of memory at step 3", "use fewer frames")
    for other in (
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        common.TavError("steps", 0, "is out of range", "give 1 or more"),
    ):
        with pytest.raises(type(other), match=re.escape(str(other))) as error, common.plain_errors():
            raise other
        assert not isinstance(error.value, OOM_EXCEPTION)
