"""The LoRA that ships with the pack, through the stock LoRA loaders, before Inflate and after it."""

import logging
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from support.native_models import ADAPTERS, attention_adapter, attention_lora, native, plain, relative
from support.native_models import sample as native_sample
from tav_core import PRESETS, inflate, invert, load_checkpoint, prepare, sample
from tav_core.mini import world
from tav_core.mini.demo import DEMO, PROMPT
from tav_core.mini.evaluate import evaluate_neon
from tav_core.mini.judge import load_judge
from tav_core.mini.train_lora import LORA, layers, load_lora, make_lora, with_lora


@pytest.fixture(scope="module")
def load(pack):
    """The stock node, with the LoRA of the pack or another file."""
    import nodes

    return lambda model, strength, name=LORA.name: nodes.LoraLoaderModelOnly().load_lora_model_only(
        model, name, strength
    )[0]


def drawn(model, mini, frames=1):
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    return plain(model, noise.expand(frames, -1, -1, -1), mini)


def test_the_file_is_small_and_names_every_layer():
    assert LORA.stat().st_size < 1e6
    tensors = load_lora()
    names = {key.rsplit(".lora_")[0].removesuffix(".alpha") for key in tensors}
    checkpoint = load_checkpoint("mini")
    assert names == {name for name, _ in layers(checkpoint)} and len(tensors) == 3 * len(names) > 200
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())
    assert make_lora(checkpoint).state_dict().keys() == {key for key in tensors if not key.endswith(".alpha")}


def test_the_stock_loader_lists_it_behind_the_files_of_the_user(pack, tmp_path, monkeypatch):
    import folder_paths

    import nodes

    paths = folder_paths.get_folder_paths("loras")
    assert LORA.parent.samefile(paths[-1]) and len(paths) > 1
    assert LORA.name in nodes.LoraLoader.INPUT_TYPES()["required"]["lora_name"][0]
    assert LORA.samefile(folder_paths.get_full_path("loras", LORA.name))
    (tmp_path / LORA.name).touch()
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path), *paths], {".safetensors"}))
    assert folder_paths.get_full_path("loras", LORA.name) == str(tmp_path / LORA.name)


def test_every_key_is_loaded(load, mini, caplog):
    for model in (mini.model, mini.inflated):
        with caplog.at_level(logging.WARNING):
            patched = load(model, 1.0)
        assert len(patched.patches) == len(load_lora()) // 3 > 80
        assert not model.patches
    assert "not loaded" not in caplog.text.lower()


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_before_and_after_inflation_it_does_the_same(pack, load, mini, inference_mode, strength):
    model, downstream = load(mini.model, strength), load(mini.inflated, strength)
    wanted = drawn(model, mini)
    assert relative(wanted, drawn(mini.model, mini)) > 1e-2
    upstream = pack.nodes.Inflate.execute(model, "sparse-causal", False, "video").args[0]
    for inflated in (upstream, downstream):
        assert relative(drawn(inflated, mini, 3), wanted.expand(3, -1, -1, -1)) < 1e-4
    # and what the core does without ComfyUI
    checkpoint = with_lora(mini.checkpoint, load_lora(), strength)
    ours, theirs = inflate(checkpoint.unet).state_dict(), pack.nodes.native.weights(downstream)
    assert ours.keys() == theirs.keys()
    assert all((weight - theirs[name]).abs().max() < 1e-5 for name, weight in ours.items())


def test_no_strength_is_no_lora(load, mini, inference_mode):
    assert torch.equal(drawn(load(mini.inflated, 0.0), mini), drawn(mini.inflated, mini))
    none = with_lora(mini.checkpoint, load_lora(), 0.0).unet.state_dict()
    assert all(torch.equal(none[name], weight) for name, weight in mini.checkpoint.unet.state_dict().items())


def test_its_style_shows_as_its_strength_has_it(mini):
    checkpoints = {str(strength): with_lora(mini.checkpoint, load_lora(), strength) for strength in (0, 0.5, 1)}
    figures, images = evaluate_neon(checkpoints, load_judge(), count=6, steps=8)
    assert images.shape == (3, 6, 128, 128, 3)
    none, half, whole, renders = (figures[name] for name in (*checkpoints, "renders"))
    assert none["night"] < 0.01 and whole["night"] > 0.4 and whole["colour"] > 0.3, figures  # by chance: 0.17
    assert none["brightness"] > half["brightness"] + 0.05 > whole["brightness"] + 0.1, figures
    assert abs(whole["brightness"] - renders["brightness"]) < 0.1 < none["brightness"] - renders["brightness"], figures


def test_a_clip_is_drawn_in_its_style_with_its_motion(mini):
    """Of the demo clip the right picture is known."""
    preset, scenes = replace(PRESETS["mini"], sampling_steps=10), DEMO.scenes()[::2]
    source = prepare(mini.checkpoint, torch.from_numpy(world.render_clip(scenes)), PROMPT)
    unet = inflate(mini.checkpoint.unet)
    noise = invert(mini.checkpoint, unet, source, preset)
    wanted = torch.from_numpy(world.render_clip([replace(scene, style="neon") for scene in scenes])) / 255
    none, half, whole = (
        (sample(styled, styled.unet, noise, PROMPT, preset, source_prompt=PROMPT) / 255 - wanted).abs().mean()
        for styled in (with_lora(replace(mini.checkpoint, unet=unet), load_lora(), s) for s in (0, 0.5, 1))
    )
    assert whole < 0.12 < 0.25 < half < none


def test_tuned_weights_belong_to_their_lora_and_strength(pack, load, mini, inference_mode):
    nodes = pack.nodes

    def upstream(strength):
        return nodes.Inflate.execute(load(mini.model, strength), "sparse-causal", False, "video").args[0]

    styled = upstream(1.0)
    base = nodes.tuned_weights.base_fingerprint(nodes.native.weights(styled))
    info = nodes.tune.tuned_info(
        base,
        styled.model.diffusion_model.inflation,
        prompt="",
        num_frames=3,
        width=128,
        height=128,
        config={},
        base_name="",
    )
    tensors = {name: weight + 0.02 for name, weight in nodes.native.trainable_weights(styled).items()}
    weights = nodes.common.TunedWeights(tensors, info)
    tuned = nodes.ApplyTunedWeights.execute(upstream(1.0), weights).args[0]
    assert relative(drawn(tuned, mini, 3), drawn(styled, mini, 3)) > 1e-3
    for other in (upstream(0.5), mini.inflated):
        with pytest.raises(ValueError, match="tuned_weights belongs to the base model"):
            nodes.ApplyTunedWeights.execute(other, weights)


def test_a_lora_on_a_tuned_model_adds_to_what_was_tuned(pack, load, mini, inference_mode):
    bridge = pack.nodes.native
    learned = {name: weight + 0.02 for name, weight in bridge.trainable_weights(mini.inflated).items()}
    tuned = bridge.with_tuned_weights(mini.inflated, learned, 3)
    styled, tensors = bridge.weights(load(tuned, 0.5)), load_lora()
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    key = "lora_unet_" + name.replace(".", "_")
    change = tensors[f"{key}.lora_up.weight"].float() @ tensors[f"{key}.lora_down.weight"].float()
    assert relative(styled[f"{name}.weight"], learned[f"{name}.weight"] + 0.5 * change) < 1e-4
    assert torch.equal(
        styled["mid_block.attentions.0.transformer_blocks.0.attn_temp.to_q.weight"],
        learned["mid_block.attentions.0.transformer_blocks.0.attn_temp.to_q.weight"],
    )
    assert relative(drawn(load(tuned, 0.5), mini, 3), drawn(tuned, mini, 3)) > 1e-2


@pytest.mark.parametrize("xl", [False, True])
def test_loras_of_another_family_are_refused_in_one_sentence(pack, load, mini, tmp_path, monkeypatch, xl):
    import folder_paths

    foreign = attention_lora(native(xl=xl), lambda name, key: "lora_unet_" + (key if xl else name).replace(".", "_"))
    save_file(foreign, tmp_path / "foreign.safetensors")
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path)], {".safetensors"}))
    for model in (mini.model, mini.inflated):
        with pytest.raises(ValueError, match="is for another family") as error:
            load(model, 1.0, "foreign.safetensors")
        assert len(str(error.value).splitlines()) == 1


def lycoris(name, key):
    return "lora_unet_" + name.replace(".", "_")


@pytest.fixture(scope="module")
def without(pack, inference_mode):
    """A model without any, inflated, and what it samples before that."""
    model = native()
    inflated = pack.nodes.Inflate.execute(model, "sparse-causal", False, "video").args[0]
    return inflated, native_sample(model, steps=2)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_every_kind_before_inflate_is_baked_in(pack, kind, without, inference_mode, caplog):
    import comfy.sd

    model = native()
    tensors = attention_adapter(
        model, lycoris, ADAPTERS[kind]
    )  # tensors of an inference mode, as the loaders make them
    adapted = comfy.sd.load_lora_for_models(model, None, tensors, 0.7, 0)[0]
    # before anything is sampled: the core then keeps copies of the weights, which autograd doesn't mind
    upstream = pack.nodes.Inflate.execute(adapted, "sparse-causal", False, "video").args[0]
    wanted, (inflated, unchanged) = native_sample(adapted, steps=2), without
    downstream = comfy.sd.load_lora_for_models(inflated, None, tensors, 0.7, 0)[0]
    assert relative(wanted, unchanged) > 1e-2
    for inflated in (upstream, downstream):
        assert relative(native_sample(inflated, steps=2), wanted) < 1e-4
        baked = pack.nodes.native.weights(inflated)  # what a tuning starts from
        assert all(torch.isfinite(weight).all() and not weight.requires_grad for weight in baked.values())
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_what_the_core_swallows_is_refused(pack, inference_mode, caplog):
    """It logs a patch that it can't apply and goes on without it."""
    import comfy.sd

    model = native()
    tensors = attention_adapter(model, lycoris, ADAPTERS["loha"])
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    broken = tensors | {f"{name}.hada_w1_a": torch.zeros(7, 2)}
    adapted = comfy.sd.load_lora_for_models(model, None, broken, 1.0, 0)[0]
    logging.getLogger().setLevel(logging.CRITICAL)  # whatever --verbose says
    try:
        with pytest.raises(
            ValueError, match="can't be applied to middle_block.1.transformer_blocks.0.attn1.to_q"
        ) as told:
            pack.nodes.Inflate.execute(adapted, "sparse-causal", False, "video")
        assert logging.getLogger().level == logging.CRITICAL
    finally:
        logging.getLogger().setLevel(logging.WARNING)
    assert len(str(told.value).splitlines()) == 1
    # of another family, on an inflated one: at once
    inflated = pack.nodes.Inflate.execute(model, "sparse-causal", False, "video").args[0]
    foreign = attention_adapter(native(context_dim=96), lycoris, ADAPTERS["loha"])
    with pytest.raises(ValueError, match="can't be applied to .*attn2.to_k"):
        comfy.sd.load_lora_for_models(inflated, None, foreign, 1.0, 0)


def test_the_stock_node_trains_one_on_an_inflated_model(pack, mini, inference_mode):
    """On newer cores on a copy, which they ask the MODEL for."""
    import comfy.sd
    from comfy_extras.nodes_train import TrainLoraNode

    inflated = pack.nodes.Inflate.execute(mini.model, "sparse-causal", False, "video").args[0]
    given = {each.id: [getattr(each, "default", None)] for each in TrainLoraNode.define_schema().inputs}
    frames = [{"samples": frame[None]} for frame in mini.latent["samples"]]
    given |= dict(
        model=[inflated],
        latents=frames,
        positive=[mini.encode(PROMPT)],
        steps=[2],
        learning_rate=[1e-3],
        rank=[2],
        lora_dtype=["fp32"],
        training_dtype=["fp32"],
        existing_lora=["[None]"],
    )
    *_, lora, losses, steps = TrainLoraNode.execute(**given).args
    assert steps == len(losses["loss"]) == 2 and all(0 < loss < 10 for loss in losses["loss"])
    layers = {key for key in inflated.model.state_dict() if key.endswith(".attn_temp.to_q.weight")}
    assert layers and layers <= {key.replace(".lora_up.", ".") for key in lora}
    styled = comfy.sd.load_lora_for_models(mini.inflated, None, lora, 1.0, 0)[0]
    assert relative(drawn(styled, mini, 3), drawn(mini.inflated, mini, 3)) > 1e-2
