"""The bridge in a real ComfyUI, in this process: native MODELs against wrapped ones, on reduced layouts.

The pack has its own `tav_core` here, so its errors are told by their base class, ValueError.
"""

import pytest
import torch

from support.checkpoints import make_folder
from support.native_models import clip, inflated, native, prompt, relative, sample

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
        wrapped, {n: p + 0.05 for n, p in pack.nodes.native.trainable_weights(wrapped).items()}, 3
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
    weights = {n: p + 0.1 for n, p in pack.nodes.native.trainable_weights(wrapped).items()}
    tuned = pack.nodes.native.with_tuned_weights(wrapped, weights, 3)
    assert relative(sample(tuned, 3), before) > 1e-2
    assert relative(sample(wrapped, 3), before) < 1e-6
    assert torch.isfinite(sample(tuned, 6)).all()  # two clips
    with pytest.raises(ValueError, match="LATENT has 4 frames, this MODEL was tuned on 3"):
        sample(tuned, 4)


def test_two_clips_in_one_latent_do_not_see_each_other(pack):
    wrapped = inflated(pack, native())
    weights = {n: p + 0.02 for n, p in pack.nodes.native.trainable_weights(wrapped).items()}
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


@pytest.mark.parametrize("patches", [False, True])
def test_scaled_fp8_is_inflated_in_full_numbers(pack, patches):
    """A scale beside every weight of the linear layers, which the core multiplies in as it runs."""
    import comfy.ops

    if not hasattr(comfy.ops, "scaled_fp8_ops"):
        pytest.skip("this core keeps such weights in another way")
    layers, model = comfy.ops.scaled_fp8_ops(override_dtype=torch.float8_e4m3fn), native()
    for module in model.model.diffusion_model.modules():
        if isinstance(module, torch.nn.Linear):
            scale = module.weight.detach().abs().max() / 448
            module.__class__ = layers.Linear
            module.weight = torch.nn.Parameter((module.weight.detach() / scale).to(torch.float8_e4m3fn), False)
            module.scale_weight, module.scale_input = torch.nn.Parameter(scale, False), None
    if patches:
        key = "diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.weight"
        model.add_patches({key: ("diff", (torch.full((128, 128), 0.1),))})
    exact, wrapped = native(), inflated(pack, model)
    assert {weight.dtype for weight in pack.nodes.native.weights(wrapped).values()} == {torch.float32}
    assert relative(sample(wrapped), sample(model)) < (0.02 if patches else 1e-4)  # the core rounds what it patches
    assert 1e-3 < relative(sample(model), sample(exact)) < 0.5


def test_a_schedule_that_ends_in_pure_noise(pack, tmp_path):
    """Zero terminal SNR: the last sigma is infinite, and the core has no number for it."""
    folder = make_folder(tmp_path / "zero", prediction_type="v_prediction", rescale_betas_zero_snr=True,
                         timestep_spacing="trailing")  # fmt: skip
    model = pack.nodes.Inflate.execute(pack.nodes.load_checkpoint.native(folder)[0], "sparse-causal", False, "video")
    model, text = model.args[0], [[torch.randn(1, 77, 32, generator=torch.Generator().manual_seed(0)), {}]]
    sigmas = model.model.model_sampling.sigmas
    assert torch.isfinite(sigmas).all() and (sigmas.diff() > 0).all() and sigmas[-1] > 1000
    drawn = sample(model, 3, positive=text, negative=text)
    assert torch.isfinite(drawn).all() and drawn.std() > 0.1
    (few, *_, error), (many, *_, less) = (
        pack.nodes.DDIMInversion.execute(model, {"samples": clip(3)}, text, steps, "normal", True).args
        for steps in (5, 20)
    )
    assert torch.isfinite(few["samples"]).all() and torch.isfinite(many["samples"]).all()
    assert less < 0.5 * error < 0.2  # it comes back
    scheduler = pack.nodes.native.scheduler_of(model)
    assert torch.isfinite(scheduler.alphas_cumprod).all() and 0 < scheduler.alphas_cumprod[-1] < 1e-6


def test_checkpoints_that_predict_the_sample_are_refused(pack, tmp_path):
    folder = make_folder(tmp_path / "sample", prediction_type="sample")
    with pytest.raises(ValueError, match="predicts the sample itself"):
        pack.nodes.load_checkpoint.native(folder)


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
