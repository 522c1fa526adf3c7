"""Checkpoints and tuned weights, with the network out of reach."""

import json
import re
import shutil
import socket
import warnings
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from tav_core.checkpoint import CONFIGS, decode_video, encode_prompt, encode_video, load_checkpoint
from tav_core.errors import TavError
from tav_core.inflate import inflate, trainable_parameters
from tav_core.tuned import base_fingerprint, load_tuned, read_tuned, save_tuned

UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer."


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked for")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    for name in ("create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refuse)


def make_folder(folder: Path, cross: int = 32, **scheduler) -> Path:
    """A tiny diffusers folder of the layout of Stable Diffusion, random weights."""
    torch.manual_seed(0)
    UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 16, 32, 32), layers_per_block=2, norm_num_groups=8,
        cross_attention_dim=cross, attention_head_dim=4, use_linear_projection=cross == 1024,
    ).save_pretrained(folder / "unet")  # fmt: skip
    AutoencoderKL(
        block_out_channels=(8, 8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 4, norm_num_groups=4,
        up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2, sample_size=64,
    ).save_pretrained(folder / "vae")  # fmt: skip
    CLIPTextModel(CLIPTextConfig(
        vocab_size=49408 if cross == 32 else 64, hidden_size=cross, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    )).save_pretrained(folder / "text_encoder")  # fmt: skip
    CLIPTokenizer.from_pretrained(CONFIGS / "tokenizer").save_pretrained(folder / "tokenizer")
    DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, set_alpha_to_one=False,
                  steps_offset=1, **scheduler).save_pretrained(folder / "scheduler")  # fmt: skip
    shutil.copy(CONFIGS / "sd1" / "model_index.json", folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("tiny") / "tiny")


@pytest.fixture(scope="module")
def checkpoint(folder):
    return load_checkpoint(folder)


@pytest.fixture
def copied(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def refused(told, *args, call=load_checkpoint, **kwargs):
    with pytest.raises(TavError, match=told) as error:
        call(*args, **kwargs)
    assert len(str(error.value).splitlines()) == 1


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
    refused("prediction_type", folder, prediction_type="sample")


def test_folders_that_are_something_else(copied, tmp_path):
    refused("does not exist", tmp_path / "nowhere")
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


def test_pickles_and_damage_are_refused(copied):
    weights = copied / "unet" / "diffusion_pytorch_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:1000])
    refused("copy", copied)
    weights.unlink()
    refused("no weights", copied)
    torch.save({}, weights.with_suffix(".bin"))
    refused("pickled", copied)


# ------------------------------------------------------------------------------------------------ single files

# The names of the original Stable Diffusion code, written down by hand: diffusers' conversion is what is tested.
RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
          "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}  # fmt: skip
TOP = {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
       "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"}  # fmt: skip


def unet_key(name: str) -> str:
    """Of a U-Net with two layers in a block."""
    for ours, theirs in TOP.items():
        if name.startswith(ours + "."):
            return UNET + theirs + name[len(ours) :]
    if match := re.fullmatch(r"down_blocks\.(\d)\.downsamplers\.0\.conv\.(.*)", name):
        return f"{UNET}input_blocks.{3 * int(match[1]) + 3}.0.op.{match[2]}"
    if match := re.fullmatch(r"up_blocks\.(\d)\.upsamplers\.0\.(.*)", name):
        # the lowest level has no attention before it
        return f"{UNET}output_blocks.{3 * int(match[1]) + 2}.{1 if match[1] == '0' else 2}.{match[2]}"
    if match := re.fullmatch(r"(down|up)_blocks\.(\d)\.(resnets|attentions)\.(\d)\.(.*)", name):
        side, kind, rest = match[1], match[3], match[5]
        index = 3 * int(match[2]) + int(match[4]) + (side == "down")
        place = f"{'input' if side == 'down' else 'output'}_blocks.{index}.{int(kind == 'attentions')}."
    else:
        match = re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d)\.(.*)", name)
        kind, rest = match[1], match[3]
        place = f"middle_block.{1 if kind == 'attentions' else 2 * int(match[2])}."
    if kind == "resnets":
        part, last = rest.split(".")
        rest = f"{RESNET[part]}.{last}"
    return UNET + place + rest


def vae_key(name: str) -> str:
    """Of a VAE with four levels."""
    for pattern, place in (
        (r"conv_shortcut", "nin_shortcut"), (r"conv_norm_out", "norm_out"),
        (r"down_blocks\.(\d)\.resnets", r"down.\1.block"), (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"),
        (r"up_blocks\.(\d)\.resnets", lambda m: f"up.{3 - int(m[1])}.block"),
        (r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{3 - int(m[1])}.upsample"),
        (r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}"), (r"mid_block\.attentions\.0", "mid.attn_1"),
        (r"attn_1\.group_norm", "attn_1.norm"), (r"attn_1\.to_([qkv])", r"attn_1.\1"), (r"attn_1\.to_out\.0", "attn_1.proj_out"),
    ):  # fmt: skip
        name = re.sub(pattern, place, name)
    return VAE + name


def unet_and_vae(unet, vae) -> dict:
    tensors = {unet_key(name): value for name, value in unet.state_dict().items()}
    for name, value in vae.state_dict().items():
        linear = re.search(r"attentions.*to_\w+(\.0)?\.weight", name)  # 1x1 convolutions in the original
        tensors[vae_key(name)] = value[:, :, None, None] if linear else value
    return tensors


def clip_text(encoder) -> dict:
    # newer transformers have no text_model in their names
    return {f"{TEXT}text_model.{name.removeprefix('text_model.')}": value for name, value in encoder.state_dict().items()}


def open_clip_text(encoder) -> dict:
    """As SD 2 stores it: q, k and v in one, and a last layer that isn't used."""
    plain = {name.removeprefix("text_model."): value for name, value in encoder.state_dict().items()}
    prefix, width = "cond_stage_model.model.", encoder.config.hidden_size
    tensors = {
        "positional_embedding": plain["embeddings.position_embedding.weight"],
        "token_embedding.weight": plain["embeddings.token_embedding.weight"],
        "text_projection": torch.zeros(width, width), "logit_scale": torch.zeros(()),
    }  # fmt: skip
    for kind in ("weight", "bias"):
        tensors[f"ln_final.{kind}"] = plain[f"final_layer_norm.{kind}"]
        for layer in range(encoder.config.num_hidden_layers + 1):
            source = f"encoder.layers.{min(layer, encoder.config.num_hidden_layers - 1)}"
            block = f"transformer.resblocks.{layer}"
            qkv = [plain[f"{source}.self_attn.{p}_proj.{kind}"] for p in "qkv"]
            tensors[f"{block}.attn.in_proj_{kind}"] = torch.cat(qkv)
            for ours, theirs in (("self_attn.out_proj", "attn.out_proj"), ("layer_norm1", "ln_1"), ("layer_norm2", "ln_2"),
                                 ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj")):  # fmt: skip
                tensors[f"{block}.{theirs}.{kind}"] = plain[f"{source}.{ours}.{kind}"]
    return {prefix + name: value for name, value in tensors.items()}


def write(path: Path, tensors: dict, metadata=None) -> Path:
    save_file({name: value.clone().contiguous() for name, value in tensors.items()}, path, metadata)
    return path


def same_weights(a, b):
    for part in ("unet", "vae", "text_encoder"):
        ours, theirs = getattr(a, part).state_dict(), getattr(b, part).state_dict()
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours), part


def test_single_file_of_sd1(checkpoint, folder, tmp_path):
    path = write(tmp_path / "model-768-v.safetensors",  # a name of no meaning for SD 1
                 unet_and_vae(checkpoint.unet, checkpoint.vae) | clip_text(checkpoint.text_encoder))  # fmt: skip
    loaded = load_checkpoint(path, config=folder)
    same_weights(checkpoint, loaded)
    assert (loaded.name, loaded.size, loaded.scheduler.config.prediction_type) == ("model-768-v", 64, "epsilon")
    assert torch.equal(encode_prompt(loaded, "a red star"), encode_prompt(checkpoint, "a red star"))


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


@pytest.mark.parametrize("family, sizes", [  # parameters of the published models
    ("sd1", (859_520_964, 83_653_863, 123_060_480)), ("sd2", (865_910_724, 83_653_863, 340_387_840)),
])  # fmt: skip
def test_every_key_of_the_full_models_is_resolved(family, sizes):
    unet, vae, text = (json.loads((CONFIGS / family / part / "config.json").read_text())
                       for part in ("unet", "vae", "text_encoder"))  # fmt: skip
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
    (tmp_path / "a.safetensors").write_bytes(b"plain text")
    refused("can't be read", tmp_path / "a.safetensors")


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


# ------------------------------------------------------------------------------------------------ tuned weights


@pytest.fixture
def tuned(checkpoint, tmp_path):
    """A video U-Net with changed weights, and the file that it was saved to."""
    unet = inflate(checkpoint.unet, temporal_causal=True)
    with torch.no_grad():
        for parameter in trainable_parameters(unet).values():
            parameter += 0.01
    path = tmp_path / "tuned.safetensors"
    save_tuned(path, unet, prompt='a "red" star\n', num_frames=4, width=64, height=48, config={"steps": 3, "lr": 1e-5},
               base_name="tiny")  # fmt: skip
    return unet, path


def test_tuned_weights_come_back(checkpoint, tuned):
    unet, path = tuned
    other = inflate(checkpoint.unet, temporal_causal=True)
    info = load_tuned(path, other)
    assert info == read_tuned(path)
    assert (info.prompt, info.num_frames, info.width, info.height) == ('a "red" star\n', 4, 64, 48)
    assert info.config == {"steps": 3, "lr": 1e-5} and info.inflation == unet.inflation and info.base_name == "tiny"
    assert info.versions["torch"] == torch.__version__
    assert all(torch.equal(a, b) for a, b in zip(unet.state_dict().values(), other.state_dict().values()))
    assert load_file(path).keys() == trainable_parameters(unet).keys()


def test_the_fingerprint_is_of_the_base_model(checkpoint, tuned, copied):
    base = base_fingerprint(checkpoint.unet)
    assert base_fingerprint(tuned[0]) == base_fingerprint(inflate(checkpoint.unet)) == base
    weights = copied / "unet" / "diffusion_pytorch_model.safetensors"
    write(weights, {name: value.half() for name, value in load_file(weights).items()}, {"format": "pt"})
    single, half = (load_checkpoint(copied, dtype=dtype).unet for dtype in (torch.float32, torch.float16))
    assert base_fingerprint(single) == base_fingerprint(half) != base  # of an fp16 file
    with torch.no_grad():
        single.conv_out.bias[1] += 1e-3
    assert base_fingerprint(single) != base_fingerprint(half)


def test_tuned_weights_of_another_model(checkpoint, tuned):
    _, path = tuned
    refused("inflate", path, checkpoint.unet, call=load_tuned)
    refused("inflate", path, inflate(checkpoint.unet), call=load_tuned)
    other = inflate(checkpoint.unet, temporal_causal=True)
    with torch.no_grad():
        other.conv_in.bias += 1
    refused("tiny", path, other, call=load_tuned)


def test_damaged_tuned_weights(checkpoint, tuned, tmp_path):
    _, path = tuned
    unet = inflate(checkpoint.unet, temporal_causal=True)
    tensors, content = load_file(path), path.read_bytes()
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    first = next(iter(tensors))
    bad = tmp_path / "bad.safetensors"
    for changed, tags in (
        ({n: t for n, t in tensors.items() if n != first}, metadata), (tensors | {"more": torch.zeros(1)}, metadata),
        (tensors, None), (tensors, metadata | {"format": "another"}),
    ):  # fmt: skip
        refused("bad.safetensors", write(bad, changed, tags), unet, call=load_tuned)
    for damaged in (content[:-10], b"", b"plain text"):
        bad.write_bytes(damaged)
        refused("bad.safetensors", bad, unet, call=load_tuned)
    torch.save(tensors, bad)  # a pickle
    refused("bad.safetensors", bad, unet, call=load_tuned)
    refused("do not exist", tmp_path / "none.safetensors", unet, call=load_tuned)
    assert not any(torch.equal(p, tensors[n]) for n, p in trainable_parameters(unet).items())  # nothing was loaded


# -------------------------------------------------------------------------------------- nothing is left to chance


@pytest.mark.parametrize("part, name", [("unet", "conv_in.weight"), ("vae", "decoder.conv_in.weight")])
def test_folders_that_lack_weights(copied, part, name):
    path = copied / part / "diffusion_pytorch_model.safetensors"
    write(path, {n: t for n, t in load_file(path).items() if n != name}, {"format": "pt"})
    refused(f"{part}.*lacks 1 .*{name}", copied)


@pytest.mark.parametrize("part", ["tokenizer", "scheduler"])
def test_folders_that_lack_a_part(copied, part):
    shutil.rmtree(copied / part)
    refused(part, copied)


def test_folders_of_half_precision_files(copied, checkpoint):
    for path in copied.rglob("*.safetensors"):
        path.rename(path.with_name(f"{path.stem}.fp16.safetensors"))
    same_weights(checkpoint, load_checkpoint(copied))


def test_single_files_that_lack_weights(checkpoint, folder, tmp_path):
    tensors = unet_and_vae(checkpoint.unet, checkpoint.vae) | clip_text(checkpoint.text_encoder)
    for lost, told in (
        (f"{UNET}time_embed.0.weight", "unet"), (f"{VAE}decoder.conv_in.weight", "vae"),
        (f"{TEXT}text_model.final_layer_norm.weight", "text_encoder"), (VAE, "vae"), ("cond_stage_model.", "text_encoder"),
    ):  # fmt: skip
        rest = {name: value for name, value in tensors.items() if not name.startswith(lost)}
        refused(told, write(tmp_path / "a.safetensors", rest), config=folder)


def test_single_file_with_a_tokenizer_of_its_own(checkpoint, copied, tmp_path):
    path = write(tmp_path / "a.safetensors",
                 unet_and_vae(checkpoint.unet, checkpoint.vae) | clip_text(checkpoint.text_encoder))  # fmt: skip
    CLIPTokenizer.from_pretrained(CONFIGS / "tokenizer", model_max_length=20).save_pretrained(copied / "tokenizer")
    assert encode_prompt(load_checkpoint(path, config=copied), "a red star").shape == (1, 20, 32)


def test_parts_of_sdxl_and_editing_models(tmp_path):
    for channels, width, told in ((4, 2048, "SDXL"), (8, 768, "image-editing")):
        shapes = {f"{UNET}input_blocks.0.0.weight": (320, channels, 3, 3), CROSS: (320, width)}
        tensors = {name: torch.zeros(shape, dtype=torch.float16) for name, shape in shapes.items()}
        refused(told, write(tmp_path / "a.safetensors", tensors))


@pytest.mark.parametrize("place", [0, -1])
def test_the_fingerprint_sees_both_ends(checkpoint, place):
    unet = inflate(checkpoint.unet)
    before = base_fingerprint(unet)
    with torch.no_grad():
        unet.mid_block.resnets[0].conv1.weight.view(-1)[place] += 1
    assert base_fingerprint(unet) != before


def test_damaged_metadata_and_shapes(checkpoint, tuned, tmp_path):
    _, path = tuned
    unet = inflate(checkpoint.unet, temporal_causal=True)
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    last = list(tensors)[-1]
    bad = tmp_path / "bad.safetensors"
    for changed, tags in (
        (tensors | {last: torch.zeros(2)}, metadata), (tensors, {n: v for n, v in metadata.items() if n != "prompt"}),
        (tensors, metadata | {"config": "{"}),
    ):  # fmt: skip
        refused("bad.safetensors", write(bad, changed, tags), unet, call=load_tuned)


def test_only_a_video_unet_is_saved(checkpoint, tmp_path):
    with pytest.raises(TavError, match="inflate"):
        save_tuned(tmp_path / "a.safetensors", checkpoint.unet, prompt="", num_frames=1, width=8, height=8, config={})
