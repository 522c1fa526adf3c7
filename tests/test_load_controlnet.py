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
from support.controls import controlled, hints, steered
from support.errors import refused
from support.native_models import TEXT, clip, inflated, native, prompt, relative, sample
from tav_core import ddim_sample, decode_video, encode_prompt, inflate, load_controlnet
from tav_core.checkpoint import MINI_CONTROLNET
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
