"""Load ControlNet: diffusers folders as native CONTROL_NETs, and the one of the mini checkpoint, which obeys
silhouettes.
"""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, DDIMScheduler, UNet2DConditionModel
from safetensors.torch import load_file

from support.checkpoints import write
from support.controls import control_net, controlled, hints, steered
from support.errors import refused
from support.native_models import TEXT, clip, inflated, native, prompt, relative, sample
from tav_core import ddim_sample, decode_video, encode_prompt, inflate, load_controlnet
from tav_core.checkpoint import MINI_CONTROLNET
from tav_core.checkpoint_parts import CONFIGS
from tav_core.control_file import empty_controlnet
from tav_core.mini import evaluate, world
from tav_core.mini.evaluate import evaluate_controlnet, overlap, silhouettes
from tav_core.mini.judge import load_judge

ALL = (0.8, 0.0, 1.0)  # strength, start, end


def make_controlnet(folder: Path, second=False, **changes) -> Path:
    """A diffusers folder of a ControlNet of the layout of `native(second)`, random weights."""
    layout = dict(attention_head_dim=[2, 4, 8, 8], use_linear_projection=True) if second else dict(attention_head_dim=8)
    with torch.inference_mode(False):
        torch.manual_seed(3)
        net = ControlNetModel(
            **dict(block_out_channels=(32, 64, 128, 128), cross_attention_dim=TEXT) | layout | changes
        )
        for name, parameter in net.named_parameters():
            fan = parameter[0].numel() if parameter.ndim > 1 else 1
            torch.nn.init.normal_(parameter, std=fan**-0.5 if parameter.ndim > 1 else 0.1)
            if name.endswith("weight") and parameter.ndim == 1:  # of a norm
                parameter.data += 1
        net.save_pretrained(folder)
    return folder


@pytest.fixture
def models(tmp_path, monkeypatch, pack):
    """models/controlnet and models/diffusers, empty."""
    import folder_paths

    for kind in ("controlnet", "diffusers"):
        (tmp_path / kind).mkdir()
        _, suffixes = folder_paths.folder_names_and_paths[kind]
        monkeypatch.setitem(folder_paths.folder_names_and_paths, kind, ([str(tmp_path / kind)], suffixes))
    return tmp_path


def load(pack, name):
    with torch.inference_mode():
        return pack.nodes.LoadControlNet.execute(name).args[0]


# ------------------------------------------------------------------------------------------------- diffusers folders


@pytest.mark.parametrize("second", [False, True], ids=["SD 1", "SD 2"])
def test_a_folder_steers_as_the_net_that_the_core_converts(pack, models, monkeypatch, second):
    import comfy.controlnet
    import comfy.model_detection

    folder = make_controlnet(models / "controlnet" / "lines" / "reduced", second)
    net, model = load(pack, "lines/reduced"), native(second)
    config = {key: value for key, value in native(second).model.model_config.unet_config.items() if key != "dtype"}
    # it knows the full layouts alone
    monkeypatch.setattr(comfy.model_detection, "unet_config_from_diffusers_unet", lambda state: config)
    converted = comfy.controlnet.load_controlnet(str(folder / "diffusion_pytorch_model.safetensors"))
    with torch.inference_mode():
        expected, ours = (
            steered(model, controlled(prompt(1), (which, hints(), *ALL)), clip()) for which in (converted, net)
        )
        assert relative(expected, sample(model, steps=4)) > 1e-2
        assert relative(ours, expected) < 1e-4
        in_video = steered(
            inflated(pack, model), controlled(prompt(1), (net, hints(), *ALL)), clip().expand(3, -1, -1, -1)
        )
        assert relative(in_video, expected.expand(3, -1, -1, -1)) < 1e-4


def test_what_can_be_chosen(pack, models, folder):
    make_controlnet(models / "diffusers" / "pipeline" / "controlnet")
    UNet2DConditionModel.from_pretrained(folder / "unet").save_pretrained(models / "diffusers" / "pipeline" / "unet")
    for content in ("{", "[]", "{}"):
        (models / "controlnet" / "other").mkdir(exist_ok=True)
        (models / "controlnet" / "other" / "config.json").write_text(content)
        assert set(pack.nodes.load_controlnet.choices()) == {"mini", "pipeline/controlnet"}
    assert pack.nodes.LoadControlNet.validate_inputs("pipeline/controlnet") is True
    for name in ("other", "../controlnet/other", "gone", "pipeline/unet"):
        told = f"controlnet {name} is neither mini nor a folder of a ControlNetModel in models/controlnet or models/"
        assert pack.nodes.LoadControlNet.validate_inputs(name).startswith(told)
        with pytest.raises(ValueError, match=re.escape(told)):
            load(pack, name)


def test_half_precision_files(tmp_path):
    net = ControlNetModel.from_pretrained(make_controlnet(tmp_path / "whole"))
    net.half().save_pretrained(tmp_path / "half", variant="fp16")
    loaded = load_controlnet(tmp_path / "half")
    assert (
        loaded.dtype == torch.float32 and not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    )
    assert torch.equal(loaded.conv_in.weight, net.conv_in.weight.float())


def test_folders_that_are_refused(tmp_path):
    folder = make_controlnet(tmp_path / "net")
    config, weights = folder / "config.json", folder / "diffusion_pytorch_model.safetensors"
    fine = json.loads(config.read_text())
    refused("path='.*gone' can't be read .*download or save it again", tmp_path / "gone", call=load_controlnet)
    for change, told in (
        (dict(_class_name="FluxControlNetModel"), "is a FluxControlNetModel; give a folder with a ControlNetModel"),
        (dict(addition_embed_type="text_time"), "conditioned on more than text, as those of SDXL"),
    ):
        config.write_text(json.dumps(fine | change))
        refused(told, folder, call=load_controlnet)
    config.write_text(json.dumps(fine))
    write(
        weights,
        {name: value for name, value in load_file(weights).items() if "mid_block" not in name},
        {"format": "pt"},
    )
    refused(
        r"lacks [0-9]+ of its weights \(net: controlnet_mid_block.bias, ...\); download it again",
        folder,
        call=load_controlnet,
    )
    weights.write_bytes(weights.read_bytes()[:5000])
    refused("can't be read", folder, call=load_controlnet)
    weights.rename(folder / "diffusion_pytorch_model.bin")
    refused("holds no .safetensors weights; save it with safe_serialization=True", folder, call=load_controlnet)


@pytest.mark.usefixtures("inference_mode")
def test_hints_that_fit_nothing_and_other_families(pack, models):
    make_controlnet(models / "controlnet" / "reduced")
    net = load(pack, "reduced")
    for model in (native(), inflated(pack, native())):
        for count in (2, 4):
            told = f"ControlNet reduced has {count} hints, LATENT has 3 frames; give it 1 image for all frames, or 3"
            with pytest.raises(ValueError, match=told):
                steered(model, controlled(prompt(1), (net, hints(count), *ALL)), clip(3))
    for model in (
        native(num_res_blocks=[1] * 4, transformer_depth=[1, 1, 1, 0], transformer_depth_output=[1] * 6 + [0] * 2),
        native(channel_mult=[1, 2, 2, 4]),
    ):
        told = (
            r"ControlNet reduced is for another family of models \(text of width 48, .*MODEL: text of width 48, .*use "
        )
        with pytest.raises(ValueError, match=told):
            steered(model, controlled(prompt(1), (net, hints(), *ALL)), clip())
    other = SimpleNamespace(diffusion_model=torch.nn.Linear(1, 1))  # of a transformer
    with pytest.raises(ValueError, match="MODEL: not a U-Net"):
        net.copy().pre_run(other, None)


# ------------------------------------------------------------------------------------------------- single files


@pytest.fixture
def original(pack):
    """The tensors of a ControlNet of the original code, of the layout of `native()`, and what it says of an input."""
    net = control_net(1).control_model
    with torch.inference_mode(False), torch.no_grad():
        said = net(*SEEN[:1], hint=SEEN[1], timesteps=SEEN[2], context=SEEN[3])
    return net.state_dict(), [*said["output"], *said["middle"]]


SEEN = (torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1)), hints().movedim(-1, 1),
        torch.tensor([500]), prompt(1)[0][0])  # fmt: skip


def said(net):
    with torch.no_grad():
        down, middle = net(SEEN[0], SEEN[2], SEEN[3], SEEN[1], return_dict=False)
    return [*down, middle]


@pytest.fixture
def layout(tmp_path):
    """A folder of configurations for the layout of `native()`."""
    UNet2DConditionModel(
        block_out_channels=(32, 64, 128, 128), cross_attention_dim=TEXT, attention_head_dim=8
    ).save_config(tmp_path / "layout" / "unet")
    return tmp_path / "layout"


@pytest.mark.parametrize("prefix", ["control_model.", ""])
def test_a_file_says_what_the_original_code_says(original, layout, tmp_path, prefix):
    tensors, wanted = original
    others = {"model.diffusion_model.out.0.weight": torch.zeros(1)} if prefix else {}  # of the checkpoint, beside it
    path = write(tmp_path / "net.safetensors", {prefix + name: x.half() for name, x in tensors.items()} | others)
    net = load_controlnet(path, layout)
    assert net.dtype == torch.float32 and not net.training and not any(p.requires_grad for p in net.parameters())
    for ours, theirs in zip(said(net), wanted, strict=True):
        assert relative(ours, theirs) < 0.02 and ours.abs().max() > 0.1  # weights of half precision


def test_a_file_of_diffusers_and_one_whose_name_says_more(layout, tmp_path):
    folder = make_controlnet(tmp_path / "net")
    path = folder / "diffusion_pytorch_model.safetensors"
    whole, ours = load_controlnet(folder), load_controlnet(path, layout)
    assert all(torch.equal(weight, ours.state_dict()[name]) for name, weight in whole.state_dict().items())
    assert all(torch.equal(one, other) for one, other in zip(said(whole), said(ours), strict=True))
    assert not ours.config.global_pool_conditions
    for name in ("control_v11e_sd15_shuffle", "control_v11e_sd15_shuffle_fp16"):
        path = path.rename(tmp_path / f"{name}.safetensors")
        assert load_controlnet(path, layout).config.global_pool_conditions


@pytest.mark.parametrize("family, million", [("sd1", 361.28), ("sd2", 364.23)])
def test_files_have_the_layout_of_their_checkpoints(family, million):
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(json.loads((CONFIGS / family / "unet" / "config.json").read_text()))
        wanted = ControlNetModel.from_unet(unet, load_weights_from_unet=False)
    net = empty_controlnet(CONFIGS / family)
    shapes, others = ({name: weight.shape for name, weight in each.state_dict().items()} for each in (net, wanted))
    assert shapes == others and sum(map(torch.Size.numel, shapes.values())) / 1e6 == pytest.approx(million, abs=0.01)
    heads = [
        [block.attentions[0].transformer_blocks[0].attn1.heads for block in each.down_blocks[:3]]
        for each in (net, unet)
    ]
    assert heads[0] == heads[1]  # which no shape tells


def test_files_that_are_refused(original, layout, tmp_path):
    tensors, path = original[0], tmp_path / "net.safetensors"

    def told(problem, of, config=layout):
        refused(problem, write(path, of), config, call=load_controlnet)

    x, remedy = torch.zeros(2, 2), "; give a ControlNet for SD 1.x or 2.x"
    for mark, kind in (
        ("lora_controlnet", "a Control-LoRA, which"), ("difference", "the difference of a ControlNet to a checkpoint"),
        ("body.0.in_conv.weight", "a T2I-Adapter"), ("adapter.body.0.resnets.0.block1.weight", "a T2I-Adapter"),
        ("add_embedding.linear_1.weight", "a ControlNet of SDXL"),
        ("control_model.label_emb.0.0.weight", "a ControlNet of SDXL"),
        ("control_add_embedding.linear_1.weight", "a union ControlNet of SDXL"), ("image_proj.x", "an IP-Adapter"),
        ("transformer_blocks.0.attn.to_q.weight", "a ControlNet of a transformer model"),
    ):  # fmt: skip
        told(f"is {kind}", {mark: x, "conv_in.weight": x})
    told(r"is no ControlNet \(it lacks input_hint_block\)" + remedy, {"model.diffusion_model.x.attn2.to_k.weight": x})
    told(r"is no ControlNet \(it lacks attn2.to_k\)", {"input_hint_block.0.weight": x})
    told("takes text of width 48, which is neither SD 1.x nor 2.x" + remedy, tensors, None)
    lost = {name: weight for name, weight in tensors.items() if not name.startswith("zero_convs.3")}
    told(r"lacks 2 of its weights \(ControlNet: controlnet_down_blocks.3.bias, ...\)", lost)
    told("has 341 weights, and a ControlNet of Stable Diffusion 340", tensors | {"input_blocks.1.1.odd.weight": x})
    told("is quantised", tensors | {"input_blocks.0.0.weight": tensors["input_blocks.0.0.weight"].to(torch.int8)})
    refused("is not a .safetensors file, and a pickle can run code", path.rename(tmp_path / "net.pth"),
            call=load_controlnet)  # fmt: skip


# ------------------------------------------------------------------------------------------------- the mini one

EDIT = "a blue star on the sand"


def bouncing(frames):
    return world.clip_scenes(world.Scene("star", "blue", "sand"), "bounce", frames)


def masks(scenes):
    return np.stack([world.subject_mask(scene) for scene in scenes])


def sampled(pack, mini, model, noise, steps, hint=None):
    """What a stock sampler makes of noise `1 c f h w`, in its scale; with hints `f 3 h w` through Apply ControlNet."""
    import comfy.sample
    import comfy.samplers

    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "ddim_uniform", steps)
    start = model.model.process_latent_out(noise[0].movedim(0, 1) * (1 + sigmas[0] ** 2).sqrt())
    prompts = mini.encode(EDIT), mini.encode("")
    if hint is not None:
        applied = (load(pack, "mini"), hint.movedim(1, -1), 1.0, 0.0, 1.0)
        prompts = controlled(prompts[0], applied, negative=prompts[1])
    out = comfy.sample.sample_custom(
        model,
        torch.zeros_like(start),
        4.0,
        comfy.samplers.sampler_object("euler"),
        sigmas,
        *prompts,
        start,
        disable_pbar=True,
        seed=0,
    )
    return model.model.process_latent_in(out).movedim(0, 1)[None]


def noise(frames):
    return torch.randn(1, 4, frames, 16, 16, generator=torch.Generator().manual_seed(2))


def test_it_is_small_and_safe():
    files = [path for path in MINI_CONTROLNET.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 4e6
    assert {path.suffix for path in files} == {".safetensors", ".json"}


@pytest.mark.usefixtures("inference_mode")
def test_it_steers_as_in_diffusers(pack, mini):
    hint = silhouettes(masks(bouncing(3)))
    unet, net = mini.checkpoint.unet, load_controlnet("mini")
    scheduler = DDIMScheduler.from_config(mini.checkpoint.scheduler.config, set_alpha_to_one=True)
    words, empty = (encode_prompt(mini.checkpoint, text) for text in (EDIT, ""))
    model, guidance = (
        evaluate.steered(inflate(unet), net, hint),
        {"guidance_scale": 4.0, "negative_hidden_states": empty},
    )
    expected = ddim_sample(model, noise(3), words, scheduler, 5, **guidance)
    assert relative(sampled(pack, mini, mini.inflated, noise(3), 5, hint), expected) < 1e-4
    # the plain loop of diffusers, on the 2D MODEL
    scheduler.set_timesteps(5)
    x, texts, hint = noise(1)[:, :, 0], torch.cat([empty, words]), hint[:1]
    for t in scheduler.timesteps:
        down, middle = net(torch.cat([x, x]), t, texts, torch.cat([hint, hint]), return_dict=False)
        out = unet(
            torch.cat([x, x]), t, texts, down_block_additional_residuals=down, mid_block_additional_residual=middle
        ).sample
        x = scheduler.step(out[:1] + 4.0 * (out[1:] - out[:1]), t, x).prev_sample
    assert relative(sampled(pack, mini, mini.model, noise(1), 5, hint)[:, :, 0], x) < 1e-4


def test_silhouettes_are_obeyed(pack, mini):
    judge, net = load_judge(), load_controlnet("mini")
    figures, rows = evaluate_controlnet(mini.checkpoint, net, judge, count=8, steps=10, seed=1)
    assert rows.shape == (4, 8, 128, 128, 3)
    for kind in ("known", "unknown"):
        assert figures[kind]["with"] >= 0.75 and figures[kind]["with"] > figures[kind]["without"] + 0.3, figures
        assert min(figures[kind][attribute] for attribute in ("colour", "background", "style")) >= 0.75, figures


@pytest.mark.usefixtures("inference_mode")
def test_each_frame_obeys_its_silhouette(pack, mini):
    judge, wanted = load_judge(), masks(bouncing(4))
    frames = {}
    for name, hint in {"with": silhouettes(wanted), "without": None}.items():
        latents = sampled(pack, mini, mini.inflated, noise(4), 10, hint)
        frames[name] = decode_video(mini.checkpoint, latents).numpy()
    with torch.inference_mode(False):
        found = {name: overlap(judge, images, wanted) for name, images in frames.items()}
    assert found["with"].min() >= 0.6 and found["with"].mean() >= 0.75 > found["without"].mean() + 0.3, found
