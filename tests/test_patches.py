"""Other packs' model patches on inflated MODELs: what they do there is what they do on the native one."""

import pytest
import torch

from support.controls import control_net, controlled, hints, steered, t2i_adapter
from support.native_models import TEXT, clip, inflated, native, prompt, relative, sample
from support.native_patches import (
    KINDS,
    agrees,
    around_the_model,
    before_output_blocks,
    behind_input_blocks,
    behind_the_skips,
    between_attentions,
    instead_of_attn2,
    instead_of_the_backend,
    on_attn1_inputs,
    on_attn2_output,
)

pytestmark = pytest.mark.usefixtures("inference_mode")


@pytest.fixture(scope="module")
def models(pack, inference_mode):
    """A native MODEL, the inflated one, and the native one's samples without patches."""
    model = native()
    return model, inflated(pack, model), sample(model, steps=2)


@pytest.mark.parametrize("patch", KINDS)
def test_each_kind_of_patch_does_what_it_does_on_the_native_model(models, patch):
    agrees(models, patch)
    assert relative(sample(models[1], steps=2), models[2]) < 1e-4  # and nothing of it stays


def test_what_inflation_would_lose_is_refused(pack):
    from comfy.patcher_extension import PatcherInjection
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    compiled, bypassed = native().clone(), native().clone()
    set_torch_compile_wrapper(compiled, backend="eager")
    with pytest.raises(ValueError, match="MODEL is compiled, as an image model; connect what compiles it behind"):
        inflated(pack, compiled)
    bypassed.set_injections("bypass_lora", [PatcherInjection(lambda patcher: None, lambda patcher: None)])
    told = r"MODEL has layers of another node put in \(bypass_lora\), .*; use nodes that"
    with pytest.raises(ValueError, match=told):
        inflated(pack, bypassed)
    behind = inflated(pack, native())
    behind.set_injections("bypass_lora", bypassed.injections["bypass_lora"])
    with pytest.raises(ValueError, match=told):  # a tuning wouldn't see it
        pack.nodes.native.trainable_copy(behind)
    assert pack.nodes.native.trainable_weights(behind)  # which tell what noise was inverted with


def hypernetwork(model, folder, monkeypatch):
    import folder_paths
    from comfy_extras.nodes_hypernetwork import HypernetworkLoader

    generator = torch.Generator().manual_seed(0)
    weights = {
        width: [
            {
                f"linear.{i}.{name}": torch.randn(*shape, generator=generator) * width**-0.5
                for i, into, out in ((0, width, 2 * width), (1, 2 * width, width))
                for name, shape in (("weight", (out, into)), ("bias", (out,)))
            }
            for _ in range(2)
        ]
        for width in (32, TEXT, 64, 128)
    }
    torch.save({**weights, "activation_func": "relu"}, folder / "hypernetwork.pt")
    monkeypatch.setattr(folder_paths, "get_full_path_or_raise", lambda kind, name: str(folder / name))
    return HypernetworkLoader.execute(model, "hypernetwork.pt", 0.7).args[0]


def stock(name, *args):
    """A stock node by name, as a function from MODEL to MODEL."""

    def apply(model):
        import importlib

        module = {
            "FreeU": "freelunch",
            "FreeU_V2": "freelunch",
            "PerturbedAttentionGuidance": "pag",
            "SelfAttentionGuidance": "sag",
            "HyperTile": "hypertile",
            "TomePatchModel": "tomesd",
            "PatchModelAddDownscale": "model_downscale",
        }[name]
        node = getattr(importlib.import_module(f"comfy_extras.nodes_{module}"), name)
        out = node().patch(model, *args) if hasattr(node, "patch") else node.execute(model, *args)
        return getattr(out, "args", out)[0]

    return apply


STOCK = {
    "FreeU": stock("FreeU", 1.1, 1.2, 0.9, 0.2), "FreeU V2": stock("FreeU_V2", 1.3, 1.4, 0.9, 0.2),
    "perturbed attention": stock("PerturbedAttentionGuidance", 3.0),
    "self-attention guidance": stock("SelfAttentionGuidance", 0.8, 2.0),
    "HyperTile": stock("HyperTile", 32, 2, 1, True), "token merging": stock("TomePatchModel", 0.5),
    "Deep Shrink": stock("PatchModelAddDownscale", 3, 2.0, 0.0, 0.9, True, "bicubic", "bicubic"),
    "Deep Shrink, skips too": stock("PatchModelAddDownscale", 4, 1.6, 0.0, 0.9, False, "bicubic", "bislerp"),
}  # fmt: skip


@pytest.mark.parametrize("name", STOCK)
def test_stock_nodes(models, name):
    agrees(models, STOCK[name])


def test_a_hypernetwork(models, tmp_path, monkeypatch):
    agrees(models, lambda model: hypernetwork(model, tmp_path, monkeypatch))


def several(model):
    for name in ("FreeU V2", "HyperTile", "perturbed attention", "self-attention guidance"):
        model = STOCK[name](model)
    for patch in (instead_of_attn2, on_attn2_output, between_attentions, behind_input_blocks):
        patch(model)
    return model


@pytest.mark.parametrize("split", [False, True])
def test_several_patches_with_batched_and_split_guidance(models, monkeypatch, split):
    if split:
        for model in models[:2]:
            monkeypatch.setattr(model.model, "memory_required", lambda *args, **kwargs: 1e15)
    agrees(models, several)


@pytest.mark.parametrize("mode", ["first", "full"])
def test_tiled_and_merged_queries_in_the_other_attention_modes(pack, models, mode):
    model, _, without = models
    wrapped = inflated(pack, model, attention=mode)
    for name in ("HyperTile", "token merging"):
        agrees((model, wrapped, without), STOCK[name])


def test_stable_diffusion_2_and_odd_sizes(pack):
    model, noise = native(second=True), torch.randn(1, 4, 13, 19, generator=torch.Generator().manual_seed(0))
    models = model, inflated(pack, model), sample(model, noise=noise, steps=2)
    for patch in (STOCK["FreeU"], STOCK["self-attention guidance"], on_attn1_inputs):
        agrees(models, patch, noise=noise)


@pytest.mark.parametrize("second", [False, True])
def test_the_2d_diffusers_model_as_well(pack, second):
    model, bridge = native(second), pack.nodes.native
    without = sample(model, steps=2)
    config, told = type(model.model.model_config)({}), model.model.model_config.unet_config
    with torch.inference_mode(False):
        unet = bridge.to_diffusers(model)
        config.unet_config |= pack.nodes.layout.core_layout(unet)
        config.set_inference_dtype(torch.float32, None)
        wrapped = bridge.to_native(unet, config, model.model.model_type)
    assert type(wrapped.model.diffusion_model) is bridge.NativeUNet
    said = wrapped.model.model_config.unet_config
    assert said == {key: told.get(key) for key in said} and told.keys() - said.keys() == {
        "num_res_blocks",
        "image_size",
    }
    for patch in (several, STOCK["FreeU"], STOCK["Deep Shrink"], instead_of_the_backend):
        agrees((model, wrapped, without), patch)


@pytest.mark.parametrize("name", ["FreeU", "FreeU V2"])
def test_freeu_on_a_diffusers_folder_and_inflated(mini, name):
    def drawn(model, noise):
        return sample(
            model,
            noise=noise,
            steps=3,
            positive=mini.encode("a red ball is sliding on the grass"),
            negative=mini.encode(""),
        )

    changed = drawn(STOCK[name](mini.model), clip())
    assert relative(changed, drawn(mini.model, clip())) > 1e-2
    assert relative(drawn(STOCK[name](mini.inflated), clip()), changed) < 1e-4
    frames = clip(3)
    assert relative(drawn(STOCK[name](mini.inflated), frames), drawn(mini.inflated, frames)) > 1e-2


def test_patches_made_before_inflation(pack, models):
    model, _, without = models
    changed = STOCK["FreeU"](model)
    around_the_model(changed)
    expected = sample(changed, steps=2)
    assert relative(expected, without) > 1e-3
    assert relative(sample(inflated(pack, changed), steps=2), expected) < 1e-4


def test_with_controlnets_and_adapters(models):
    model, wrapped, without = models
    applied = [(make(seed), hints(seed=seed), 0.8, 0.0, 1.0) for seed, make in enumerate((control_net, t2i_adapter))]
    prompts = controlled(prompt(1), *applied)
    outs = []
    for source in (model, wrapped):
        changed = STOCK["FreeU"](source)
        for patch in (behind_input_blocks, behind_the_skips, before_output_blocks):
            patch(changed)
        outs.append(steered(changed, prompts, clip()))
    assert relative(outs[1], outs[0]) < 1e-4
    assert relative(outs[0], steered(model, prompts, clip())) > 1e-3


def test_frames_still_see_each_other(pack):
    wrapped = inflated(pack, native(), norm="frame")
    noise = clip(3)
    changed = noise.clone()
    changed[0] += 1
    for patch in (on_attn1_inputs, STOCK["HyperTile"]):
        model = wrapped.clone()
        model = patch(model) or model
        outs = []
        for x in (noise, changed):
            torch.manual_seed(0)
            outs.append(sample(model, noise=x, steps=2))
        assert relative(outs[0][2], outs[1][2]) > 1e-3  # temporal attention is still silent


@pytest.mark.parametrize("name", ["HyperTile", "token merging", "FreeU", "IP-Adapter"])
def test_attention_injection_leads_patched_attention(pack, models, name):
    wrapped, noise = inflated(pack, models[0], norm="frame"), clip(3)
    wrapped = pack.nodes.native.with_tuned_weights(
        wrapped, {n: p + 0.02 for n, p in pack.nodes.native.trainable_weights(wrapped).items()}, 3
    )
    patched = wrapped.clone()
    patched = instead_of_attn2(patched) or patched if name == "IP-Adapter" else STOCK[name](patched)

    def run(model, text):
        torch.manual_seed(0)
        return sample(model, noise=noise, steps=2, cfg=1.0, positive=text)

    led = pack.nodes.AttentionInjection.execute(patched, prompt(1), 1.0).args[0]
    assert relative(run(led, prompt(7)), run(patched, prompt(7))) > 1e-3
    if name != "IP-Adapter":  # there, the prompt is a positive one and its source isn't
        assert relative(run(led, prompt(1)), run(patched, prompt(1))) < 1e-4  # led by its like


def test_patches_behind_attention_injection(pack, models):
    def led(model):
        return pack.nodes.AttentionInjection.execute(model, prompt(1), 1.0).args[0]

    before, behind = led(STOCK["FreeU"](models[1])), STOCK["FreeU"](led(models[1]))
    drawn = [sample(model, steps=2, positive=prompt(7)) for model in (before, behind, STOCK["FreeU"](models[1]))]
    assert relative(drawn[1], drawn[0]) < 1e-5 < 1e-3 < relative(drawn[2], drawn[0])


@pytest.mark.parametrize("name", ["perturbed attention", "self-attention guidance"])
def test_guidance_that_calls_again_leaves_the_leading_clip_alone(pack, models, name):
    walks = []
    for model in (models[1], STOCK[name](models[1])):
        led = pack.nodes.AttentionInjection.execute(model, prompt(1), 1.0).args[0]
        for noise in (clip(1, 1), clip(1, 2)):  # another run starts another walk
            sample(led, noise=noise, steps=3)
            walks.append(led.model_options["model_function_wrapper"].walk.x)
    assert relative(walks[2], walks[0]) < 1e-4 and relative(walks[3], walks[1]) < 1e-4
    assert relative(walks[1], walks[0]) > 1e-2


def test_nothing_is_hooked_without_patches_or_after_an_error(pack, models, monkeypatch):
    wrapped, module = models[1], pack.nodes.patches
    broken = wrapped.clone()
    broken.set_model_attn2_output_patch(lambda out, options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sample(broken, steps=2)
    assert wrapped.model.diffusion_model.frame_context.forward.patches is None
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in wrapped.model.diffusion_model.modules())
    monkeypatch.setattr(module, "_Patches", None)
    assert relative(sample(wrapped, steps=2), models[2]) < 1e-4
