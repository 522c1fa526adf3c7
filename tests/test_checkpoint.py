"""Checkpoints, with the network out of reach."""

import json
import logging
import re
import shutil
import socket
import warnings

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, EulerDiscreteScheduler, PNDMScheduler, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
from diffusers.utils import is_torch_version
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from support.checkpoints import make_folder, write
from support.errors import refused
from support.ldm_keys import TEXT, UNET, VAE, clip_text, open_clip_text, unet_and_vae
from tav_core.checkpoint import decode_video, encode_prompt, encode_video, load_checkpoint
from tav_core.checkpoint_parts import CONFIGS


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        pytest.fail("the network was asked for")  # nothing catches this one

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    for name in ("create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refuse)


# -------------------------------------------------------------------------------------------- diffusers folders


def test_folder(checkpoint):
    assert (checkpoint.name, checkpoint.size, checkpoint.downscale) == ("tiny", 64, 8)
    assert checkpoint.scheduler.config.prediction_type == "epsilon"
    assert checkpoint.scheduler.config.beta_end == 0.012 and not checkpoint.scheduler.config.set_alpha_to_one
    for part in (checkpoint.unet, checkpoint.vae, checkpoint.text_encoder):
        assert not part.training and not any(p.requires_grad for p in part.parameters())
        assert {p.dtype for p in part.parameters()} == {torch.float32}


def test_half_precision(folder):
    half = load_checkpoint(folder, dtype=torch.float16)
    assert {p.dtype for p in half.unet.parameters()} == {torch.float16}


def test_prediction_type(tmp_path, folder):
    assert load_checkpoint(folder, prediction_type="v_prediction").scheduler.config.prediction_type == "v_prediction"
    config = tmp_path / "scheduler_config.json"
    DDIMScheduler(prediction_type="v_prediction").save_pretrained(tmp_path)
    copy = shutil.copytree(folder, tmp_path / "v")
    shutil.copy(config, copy / "scheduler")
    assert load_checkpoint(copy).scheduler.config.prediction_type == "v_prediction"
    refused("prediction_type='sample' is unknown", folder, prediction_type="sample")


@pytest.mark.parametrize("kind", [PNDMScheduler, EulerDiscreteScheduler])
def test_other_schedulers_become_ddim_of_the_same_noise(checkpoint, copied, kind):
    kind(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        steps_offset=1,
        prediction_type="v_prediction",
    ).save_pretrained(copied / "scheduler")
    scheduler = load_checkpoint(copied).scheduler
    assert type(scheduler) is DDIMScheduler and scheduler.config.prediction_type == "v_prediction"
    assert torch.equal(scheduler.betas, checkpoint.scheduler.betas)


def test_folders_that_are_something_else(copied, tmp_path):
    refused("name_or_path='.*nowhere' is no path that exists", tmp_path / "nowhere")
    refused("no unet", tmp_path)
    (tmp_path / "transformer").mkdir()
    refused("SD3 or Flux", tmp_path)
    (copied / "text_encoder_2").mkdir()
    refused("SDXL", copied)
    (copied / "text_encoder_2").rmdir()
    config = json.loads((copied / "unet" / "config.json").read_text())
    (copied / "unet" / "config.json").write_text(json.dumps(config | {"in_channels": 9}))
    refused("inpainting", copied)
    (copied / "unet" / "config.json").write_text("{")
    refused("copy", copied)


def test_damage_is_refused(copied):
    weights = copied / "unet" / "diffusion_pytorch_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:1000])
    refused("copy", copied)
    weights.unlink()
    refused("no weights in unet", copied)


def test_pickled_weights_are_read_as_nothing_but_weights(checkpoint, copied, monkeypatch):
    for path in list(copied.rglob("*.safetensors")):
        stem = "pytorch_model" if path.parent.name == "text_encoder" else path.stem
        torch.save(load_file(path), path.with_name(f"{stem}.bin"))
        path.unlink()
    with monkeypatch.context() as patch:
        patch.setattr("tav_core.checkpoint_folder.is_torch_version", lambda operation, version: False)
        refused("holds pickled weights .*update torch to 2.6, or save the model with safe_serialization=True", copied)
    if is_torch_version("<", "2.6"):  # refused as they are
        return refused("update torch to 2.6", copied)
    same_weights(checkpoint, load_checkpoint(copied))

    class Code:
        def __reduce__(self):
            return pytest.fail, ("a pickle ran code",)  # nothing catches this one

    for part, name in (("unet", "diffusion_pytorch_model.bin"), ("text_encoder", "pytorch_model.bin")):
        good = (copied / part / name).read_bytes()
        torch.save({"conv_in.weight": Code()}, copied / part / name)
        refused("can't be read", copied)
        (copied / part / name).write_bytes(good)


# ------------------------------------------------------------------------------------------------ single files


def same_weights(a, b):
    for part in ("unet", "vae", "text_encoder"):
        ours, theirs = getattr(a, part).state_dict(), getattr(b, part).state_dict()
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours), part


def test_single_file_of_sd1(checkpoint, folder, tmp_path):
    path = write(
        tmp_path / "model-768.safetensors",  # a name of no meaning for SD 1
        unet_and_vae(checkpoint.unet, checkpoint.vae) | clip_text(checkpoint.text_encoder),
    )
    loaded = load_checkpoint(path, config=folder)
    same_weights(checkpoint, loaded)
    assert (loaded.name, loaded.size, loaded.scheduler.config.prediction_type) == ("model-768", 64, "epsilon")
    # to rounding: where in memory the weights lie, at odd places of the file, is enough for another kernel
    assert torch.allclose(encode_prompt(loaded, "a red star"), encode_prompt(checkpoint, "a red star"), atol=1e-5)
    inputs = torch.randn(1, 4, 8, 8), 7, torch.randn(1, 77, 32)
    assert torch.allclose(loaded.unet(*inputs).sample, checkpoint.unet(*inputs).sample, atol=1e-5)
    refused("config=.*not a folder", path, config=tmp_path / "nowhere")


@pytest.mark.parametrize("name, marks, metadata, expected", [
    ("a", {}, {}, "epsilon"), ("a", {}, {"modelspec.prediction_type": "v"}, "v_prediction"),
    ("a-v", {}, {}, "v_prediction"), ("a-v", {}, {"modelspec.prediction_type": "epsilon"}, "epsilon"),
    ("furry_vPred_v2", {}, {}, "v_prediction"), ("anything-v3", {}, {}, "epsilon"), ("inv", {}, {}, "epsilon"),
    ("a", {"v_pred": torch.tensor([])}, {}, "v_prediction"),
    ("a", {f"{UNET}v_pred": torch.tensor([]), "ztsnr": torch.tensor([])}, {}, "v_prediction"),
])  # fmt: skip
def test_what_a_single_file_predicts(checkpoint, folder, tmp_path, name, marks, metadata, expected):
    tensors = unet_and_vae(checkpoint.unet, checkpoint.vae) | clip_text(checkpoint.text_encoder) | marks
    path = write(tmp_path / f"{name}.safetensors", tensors, metadata)
    loaded = load_checkpoint(path, config=folder)
    assert (loaded.scheduler.config.prediction_type, loaded.size) == (expected, 64)
    assert (loaded.scheduler.alphas_cumprod[-1] == 0) == ("ztsnr" in marks)
    same_weights(checkpoint, loaded)
    told = load_checkpoint(path, config=folder, prediction_type="epsilon")
    assert told.scheduler.config.prediction_type == "epsilon"


@pytest.mark.parametrize("more, told", [
    ({f"{UNET}label_emb.0.0.weight": torch.zeros(4, 4)}, "is an unCLIP model .it has label_emb"),
    ({f"{UNET}input_blocks.1.1.transformer_blocks.0.attn1.to_q.scale_weight": torch.ones(())}, "is quantised"),
    ({f"{UNET}scaled_fp8": torch.zeros(2)}, "is quantised .it has scaled_fp8"),
    ({f"{TEXT}text_model.encoder.layers.0.mlp.fc1.scale_weight": torch.ones(())}, "is quantised"),
    ({f"{UNET}middle_block.1.transformer_blocks.0.attn1.to_q.weight": torch.zeros(32, 32, dtype=torch.int8)},
     "is quantised"),
    ({f"{UNET}motion_modules.0.weight": torch.zeros(1)}, "hasn't .unet: motion_modules.0.weight"),
    ({f"{UNET}input_blocks.1.1.transformer_blocks.0.attn3.to_q.weight": torch.zeros(32, 32)}, "more weights"),
])  # fmt: skip
def test_single_files_with_weights_that_would_be_lost(checkpoint, folder, tmp_path, more, told):
    tensors = unet_and_vae(checkpoint.unet, checkpoint.vae) | clip_text(checkpoint.text_encoder)
    refused(told, write(tmp_path / "a.safetensors", tensors | more), config=folder)


def test_unscaled_fp8_is_read_as_it_is(checkpoint, folder, tmp_path):
    tensors = unet_and_vae(checkpoint.unet, checkpoint.vae) | clip_text(checkpoint.text_encoder)
    coarse = {name: value.to(torch.float8_e4m3fn) for name, value in tensors.items()}
    loaded = load_checkpoint(write(tmp_path / "a.safetensors", coarse), config=folder)
    weight = checkpoint.unet.conv_in.weight
    assert torch.equal(loaded.unet.conv_in.weight, weight.to(torch.float8_e4m3fn).float())


def test_single_file_of_sd1_whose_text_encoder_has_short_names(checkpoint, folder, tmp_path):
    text = {name.replace("text_model.", ""): value for name, value in clip_text(checkpoint.text_encoder).items()}
    path = write(tmp_path / "a.safetensors", unet_and_vae(checkpoint.unet, checkpoint.vae) | text)
    same_weights(checkpoint, load_checkpoint(path, config=folder))


@pytest.mark.slow
def test_single_file_of_sd2(tmp_path):
    folder = make_folder(tmp_path / "sd2", cross=1024)
    checkpoint = load_checkpoint(folder)
    shutil.rmtree(folder / "tokenizer")  # so that the shipped one serves
    tensors = unet_and_vae(checkpoint.unet, checkpoint.vae) | open_clip_text(checkpoint.text_encoder)
    tensors = {name: value.half() for name, value in tensors.items()}
    base = write(tmp_path / "v2-1_512-ema-pruned.safetensors", tensors)
    loaded = load_checkpoint(base, config=folder)
    for part in ("unet", "vae", "text_encoder"):
        getattr(checkpoint, part).half().float()
    same_weights(checkpoint, loaded)
    assert loaded.scheduler.config.prediction_type == "epsilon"
    assert loaded.tokenizer("a star", padding="max_length").input_ids[4:] == [0] * 73  # as OpenCLIP pads
    (tmp_path / "v2-1_768-ema-pruned.safetensors").symlink_to(base)
    v = load_checkpoint(tmp_path / "v2-1_768-ema-pruned.safetensors", config=folder)
    assert (v.scheduler.config.prediction_type, v.size) == ("v_prediction", 768)
    told = load_checkpoint(tmp_path / "v2-1_768-ema-pruned.safetensors", config=folder, prediction_type="epsilon")
    assert told.scheduler.config.prediction_type == "epsilon"
    told = load_checkpoint(base, config=folder, prediction_type="v_prediction")
    assert (told.scheduler.config.prediction_type, told.size) == ("v_prediction", 768)
    for metadata in ({"modelspec.prediction_type": "v"}, {"modelspec.architecture": "stable-diffusion-v2-768-v"}):
        v = load_checkpoint(write(tmp_path / "a.safetensors", tensors, metadata), config=folder)
        assert (v.scheduler.config.prediction_type, v.size) == ("v_prediction", 768)
    # as the weights have it, whatever the name
    sign = f"{UNET}output_blocks.11.1.transformer_blocks.0.norm1.bias"
    for spread, name, expected in ((0.2, "a", "v_prediction"), (0.05, "v2-1_768", "epsilon")):
        trained = tensors | {sign: spread * torch.randn_like(tensors[sign])}
        v = load_checkpoint(write(tmp_path / f"{name}.safetensors", trained), config=folder)
        assert (v.scheduler.config.prediction_type, v.size) == (expected, 768 if spread > 0.1 else 64)
    for lost in ("ln_final.weight", "positional_embedding", "transformer.resblocks.1.attn.in_proj_weight"):
        rest = {name: value for name, value in tensors.items() if not name.endswith(lost)}
        refused("lacks . of its weights .text_encoder: ", write(tmp_path / "a.safetensors", rest), config=folder)


@pytest.mark.parametrize("family, sizes", [  # parameters of the published models
    ("sd1", (859_520_964, 83_653_863, 123_060_480)), ("sd2", (865_910_724, 83_653_863, 340_387_840)),
])  # fmt: skip
def test_every_key_of_the_full_models_is_resolved(family, sizes):
    unet, vae, text = (
        json.loads((CONFIGS / family / part / "config.json").read_text()) for part in ("unet", "vae", "text_encoder")
    )
    with torch.device("meta"):
        unet, vae = UNet2DConditionModel.from_config(unet), AutoencoderKL.from_config(vae)
        text = CLIPTextModel(CLIPTextConfig.from_dict(text))
    assert tuple(sum(p.numel() for p in part.parameters()) for part in (unet, vae, text)) == sizes
    tensors = unet_and_vae(unet, vae)
    assert len(tensors) == 686 + 248
    for model, convert in ((unet, convert_ldm_unet_checkpoint), (vae, convert_ldm_vae_checkpoint)):
        converted = {name: value.shape for name, value in convert(dict(tensors), dict(model.config)).items()}
        assert converted == {name: value.shape for name, value in model.state_dict().items()}


ENTRY = {f"{UNET}input_blocks.0.0.weight": (320, 4, 3, 3)}
CROSS = f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"


@pytest.mark.parametrize("shapes, told", [
    ({f"{UNET}input_blocks.0.0.weight": (320, 9, 3, 3), CROSS: (320, 768)}, "inpainting"),
    (ENTRY | {CROSS: (640, 2048), "conditioner.embedders.0.weight": (1,)}, "SDXL"),
    ({f"{UNET}joint_blocks.0.weight": (1,)}, "SD3 or Flux"), ({"double_blocks.0.weight": (1,)}, "SD3 or Flux"),
    ({"lora_unet_mid.lora_up.weight": (1,)}, "no Stable Diffusion checkpoint"),
])  # fmt: skip
def test_files_of_other_families(tmp_path, shapes, told):
    tensors = {name: torch.zeros(shape, dtype=torch.float16) for name, shape in shapes.items()}
    refused(told, write(tmp_path / "a.safetensors", tensors))


def test_files_that_are_no_safetensors(tmp_path):
    torch.save({}, tmp_path / "a.ckpt")
    refused("pickle", tmp_path / "a.ckpt")
    whole = write(tmp_path / "whole.safetensors", {"a": torch.zeros(99)}).read_bytes()
    for content in (b"plain text", b"", whole[:-8]):
        (tmp_path / "a.safetensors").write_bytes(content)
        refused("can't be read", tmp_path / "a.safetensors")


def test_loading_says_nothing(checkpoint, folder, tmp_path):
    path = write(
        tmp_path / "a.safetensors", unet_and_vae(checkpoint.unet, checkpoint.vae) | clip_text(checkpoint.text_encoder)
    )
    said, handler = [], logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())
    for library in ("diffusers", "transformers"):
        logging.getLogger(library).addHandler(handler)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_checkpoint(folder, dtype=torch.float16)
        load_checkpoint(path, config=folder, dtype=torch.float16)
    for library in ("diffusers", "transformers"):
        logging.getLogger(library).removeHandler(handler)
    assert said == []


# ----------------------------------------------------------------------------------------------- text and video


def test_prompts(checkpoint):
    both = encode_prompt(checkpoint, ["a red star", ""])
    assert both.shape == (2, 77, 32) and both.dtype == torch.float32
    assert torch.allclose(both[:1], encode_prompt(checkpoint, "a red star"), atol=1e-5)


def test_long_prompts_are_cut_and_said_to_be(checkpoint):
    with pytest.warns(UserWarning, match="zebra"):
        encode_prompt(checkpoint, "a red star " * 30 + "zebra")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        encode_prompt(checkpoint, "star " * 75)  # just fits


def test_video_goes_through_in_chunks(checkpoint):
    pixels = torch.rand(2, 3, 5, 32, 48) * 2 - 1
    mean, std = encode_video(checkpoint, pixels, chunk=3)
    assert mean.shape == std.shape == (2, 4, 5, 4, 6) and (std > 0).all()
    alone = checkpoint.vae.encode(pixels[1, :, 4][None]).latent_dist
    for whole, one in ((mean, alone.mean), (std, alone.std)):
        assert torch.allclose(whole[1, :, 4], one[0] * checkpoint.vae.config.scaling_factor, atol=1e-5)
    frames = decode_video(checkpoint, mean[:1], chunk=2)
    assert frames.shape == (5, 32, 48, 3) and frames.dtype == torch.uint8
    assert (frames.int() - decode_video(checkpoint, mean[:1]).int()).abs().max() <= 1


@pytest.mark.parametrize("pixels, expected", [(7 * 32 * 48, [5]), (2 * 32 * 48 + 1, [2, 2, 1]), (1, [1] * 5)])
def test_large_frames_go_through_a_few_at_a_time(checkpoint, monkeypatch, pixels, expected):
    """So that a long clip, or a large one, takes no more memory than a small one."""
    together = {"encode": [], "decode": []}
    for name, batches in together.items():
        real = getattr(checkpoint.vae, name)
        monkeypatch.setattr(
            checkpoint.vae, name, lambda x, real=real, batches=batches: batches.append(len(x)) or real(x)
        )
    monkeypatch.setattr("tav_core.checkpoint._VAE_PIXELS", pixels)
    mean, _ = encode_video(checkpoint, torch.zeros(1, 3, 5, 32, 48))
    decode_video(checkpoint, mean)
    assert together == {"encode": expected, "decode": expected}


# -------------------------------------------------------------------------------------- nothing is left to chance


@pytest.mark.parametrize("part, name", [("unet", "conv_in.weight"), ("vae", "decoder.conv_in.weight")])
def test_folders_that_lack_weights(copied, part, name):
    path = copied / part / "diffusion_pytorch_model.safetensors"
    write(path, {n: t for n, t in load_file(path).items() if n != name}, {"format": "pt"})
    refused(f"lacks 1 of its weights .{part}: {name}", copied)


@pytest.mark.parametrize("part", ["vae", "text_encoder", "tokenizer", "scheduler"])
def test_folders_that_lack_a_part(copied, part):
    shutil.rmtree(copied / part)
    refused(part, copied)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "scheduler"])
@pytest.mark.parametrize(
    "content", [b"{", b"[]", b"", b"\xff\xfe", b'{"block_out_channels": 3, "hidden_size": "x", "beta_schedule": "x"}']
)
def test_folders_of_damaged_configurations(copied, part, content):
    (copied / part / ("scheduler_config.json" if part == "scheduler" else "config.json")).write_bytes(content)
    refused(re.escape(str(copied)), copied)


def test_folders_whose_tokenizer_has_no_vocabulary(copied):
    for file in (copied / "tokenizer").iterdir():
        if file.name != "tokenizer_config.json":
            file.unlink()
    refused("vocab.json", copied)
    shutil.copy(CONFIGS / "tokenizer" / "vocab.json", copied / "tokenizer")
    refused("merges.txt", copied)


def changed(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("file, changes, told", [
    ("unet/config.json", {"sample_size": "64"}, "has sample_size '64' in its unet"),
    ("unet/config.json", {"sample_size": -8}, "has sample_size -8"),
    ("unet/config.json", {"sample_size": [8, 16]}, "has sample_size"),
    ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**9}, "has num_train_timesteps 1000000000 in"),
    ("scheduler/scheduler_config.json", {"num_train_timesteps": 0}, "has num_train_timesteps 0 in"),
    ("scheduler/scheduler_config.json", {"num_train_timesteps": None}, "has num_train_timesteps None in"),
    ("scheduler/scheduler_config.json", {"beta_start": float("nan")}, "noise schedule"),
    ("scheduler/scheduler_config.json", {"beta_start": -0.1, "beta_end": -0.1, "beta_schedule": "linear"}, "noise sch"),
    ("scheduler/scheduler_config.json", {"prediction_type": "flow"}, "has prediction_type 'flow'"),
    ("vae/config.json", {"scaling_factor": None}, "has scaling_factor None in its vae"),
    ("vae/config.json", {"scaling_factor": 0}, "has scaling_factor 0 in its vae"),
])  # fmt: skip
def test_configurations_that_make_no_sense(copied, file, changes, told):
    changed(copied / file, **changes)
    refused(told, copied)


def test_configurations_that_leave_things_open(copied, folder):
    changed(copied / "unet/config.json", sample_size=None)
    (copied / "tokenizer/tokenizer_config.json").unlink()  # without it the length is 10^30
    loaded, whole = load_checkpoint(copied), load_checkpoint(folder)
    assert loaded.size == 512
    with pytest.warns(UserWarning, match="zebra"):
        long = encode_prompt(loaded, "a red star " * 30 + "zebra")
    assert long.shape == (1, 77, 32)
    assert torch.equal(encode_prompt(loaded, "a red star"), encode_prompt(whole, "a red star"))


def test_parts_of_different_models(copied, checkpoint):
    changed(copied / "text_encoder/config.json", vocab_size=64)
    path = copied / "text_encoder/model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("token_embedding.weight"))
    write(path, tensors | {name: tensors[name][:64]}, {"format": "pt"})
    loaded = load_checkpoint(copied)
    refused("token 49407, and a text encoder that knows 64", loaded, "a star", call=encode_prompt)
    wide = CLIPTextConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    CLIPTextModel(wide).save_pretrained(copied / "text_encoder")
    refused("text_encoder of width 16 and a unet that takes 32", copied)


def test_folders_with_weights_that_would_be_lost(copied):
    path = copied / "unet" / "diffusion_pytorch_model.safetensors"
    write(path, load_file(path) | {"motion_modules.0.weight": torch.zeros(1)}, {"format": "pt"})
    refused("doesn't know .unet: motion_modules.0.weight", copied)


@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_text_encoders_of_older_and_newer_transformers(copied, checkpoint, prefix):
    path = copied / "text_encoder" / "model.safetensors"
    tensors = {prefix + name.removeprefix("text_model."): value for name, value in load_file(path).items()}
    ids = {f"{prefix}embeddings.position_ids": torch.arange(77)[None]}  # once saved along
    write(path, tensors | ids, {"format": "pt"})
    same_weights(checkpoint, load_checkpoint(copied))
    lost = f"{prefix}encoder.layers.0.mlp.fc1.bias"
    write(path, {name: value for name, value in tensors.items() if name != lost} | ids, {"format": "pt"})
    refused("lacks 1 .*layers.0.mlp.fc1.bias", copied)


def test_folders_of_half_precision_files(copied, checkpoint):
    for path in copied.rglob("*.safetensors"):
        path.rename(path.with_name(f"{path.stem}.fp16.safetensors"))
    same_weights(checkpoint, load_checkpoint(copied))


def test_single_files_that_lack_weights(checkpoint, folder, tmp_path):
    tensors = unet_and_vae(checkpoint.unet, checkpoint.vae) | clip_text(checkpoint.text_encoder)
    more = {f"{TEXT}text_model.embeddings.position_ids": torch.arange(77)[None], "model_ema.decay": torch.zeros(99)}
    for lost, told in (
        (f"{UNET}time_embed.0.weight", "unet"),
        (f"{VAE}decoder.conv_in.weight", "vae"),
        (f"{TEXT}text_model.final_layer_norm.weight", "text_encoder"),
        (VAE, "vae"),
        ("cond_stage_model.", "text_encoder"),
    ):
        rest = {name: value for name, value in tensors.items() if not name.startswith(lost)}
        refused(
            told, write(tmp_path / "a.safetensors", rest | more if lost != "cond_stage_model." else rest), config=folder
        )


def test_single_file_with_a_tokenizer_of_its_own(checkpoint, copied, tmp_path):
    path = write(
        tmp_path / "a.safetensors", unet_and_vae(checkpoint.unet, checkpoint.vae) | clip_text(checkpoint.text_encoder)
    )
    CLIPTokenizer.from_pretrained(CONFIGS / "tokenizer", model_max_length=20).save_pretrained(copied / "tokenizer")
    assert encode_prompt(load_checkpoint(path, config=copied), "a red star").shape == (1, 20, 32)


def test_parts_of_sdxl_and_editing_models(tmp_path):
    for channels, width, told in ((4, 2048, "SDXL"), (8, 768, "image-editing")):
        shapes = {f"{UNET}input_blocks.0.0.weight": (320, channels, 3, 3), CROSS: (320, width)}
        tensors = {name: torch.zeros(shape, dtype=torch.float16) for name, shape in shapes.items()}
        refused(told, write(tmp_path / "a.safetensors", tensors))
