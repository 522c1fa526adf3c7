"""Checkpoints as the authors' code publishes them, with parameters and answers of the reference implementation."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.utils import is_torch_version
from einops import rearrange
from safetensors.torch import load_file
from transformers import CLIPTextModel, CLIPTokenizer

from support import ROOT
from support.checkpoints import write
from support.errors import refused
from support.native_models import relative
from support.tiny_unets import difference
from tav_core import (
    TuneConfig,
    VideoUNet,
    base_fingerprint,
    ddim_invert,
    inflate,
    load_tuned,
    pipeline,
    sampling,
    save_pipeline,
    save_tuned,
)
from tav_core.checkpoint import load_checkpoint
from tav_core.given import tuned_unet
from tav_core.presets import Preset

GOLDEN = Path(__file__).parent / "golden"
CONFIG = json.loads((GOLDEN / "unet" / "config.json").read_text()) | {
    "_class_name": "UNet3DConditionModel",
    "mid_block_type": "UNetMidBlock3DCrossAttn",
    "down_block_types": ["CrossAttnDownBlock3D"] * 3 + ["DownBlock3D"],
    "up_block_types": ["UpBlock3D"] + ["CrossAttnUpBlock3D"] * 3,
}
OLD_VAE = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def load(name):
    return load_file(GOLDEN / f"{name}.safetensors")


def parameters():
    return load_file(GOLDEN / "unet" / "diffusion_pytorch_model.safetensors") | load("temporal_state")


def pickled(path):
    """Weights as diffusers 0.11 saved them."""
    tensors = load_file(path)
    if path.parent.name == "vae":
        for name in [name for name in tensors if ".attentions." in name]:
            new = name
            for ours, theirs in OLD_VAE.items():
                new = new.replace(f".{ours}.", f".{theirs}.")
            tensors[new] = tensors.pop(name)
    if path.parent.name == "text_encoder":
        tensors = {f"text_model.{name.removeprefix('text_model.')}": value for name, value in tensors.items()}
        tensors["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    torch.save(
        tensors, path.with_name("pytorch_model.bin" if path.parent.name == "text_encoder" else f"{path.stem}.bin")
    )
    path.unlink()


@pytest.fixture(scope="session")
def published(folder, tmp_path_factory):
    """The folder of a TuneAVideoPipeline, as safetensors."""
    path = shutil.copytree(folder, tmp_path_factory.mktemp("published") / "a-man-is-surfing")
    (path / "model_index.json").write_text(
        json.dumps(
            {
                "_class_name": "TuneAVideoPipeline",
                "_diffusers_version": "0.11.1",
                "scheduler": ["diffusers", "DDIMScheduler"],
                "text_encoder": ["transformers", "CLIPTextModel"],
                "tokenizer": ["transformers", "CLIPTokenizer"],
                "unet": ["tuneavideo.models.unet", "UNet3DConditionModel"],
                "vae": ["diffusers", "AutoencoderKL"],
            }
        )
    )
    shutil.copytree(GOLDEN / "scheduler", path / "scheduler", dirs_exist_ok=True)
    (path / "unet" / "config.json").write_text(json.dumps(CONFIG, indent=2))
    write(path / "unet" / "diffusion_pytorch_model.safetensors", parameters(), {"format": "pt"})
    return path


@pytest.fixture
def copied(published, tmp_path):
    return shutil.copytree(published, tmp_path / "copy")


def inputs(case):
    vectors = load("unet_forward")
    return [vectors[f"{case}.{name}"] for name in ("sample", "timestep", "encoder_hidden_states", "out")]


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@torch.no_grad()
def test_outputs_are_those_of_the_reference(published, copied, kind):
    if kind == "bin":
        for path in copied.rglob("*.safetensors"):
            pickled(path)
        if is_torch_version("<", "2.6"):  # which would let them run code
            return refused("holds pickled weights .*update torch to 2.6", copied)
    checkpoint, plain = load_checkpoint(copied), load_checkpoint(published)
    assert isinstance(checkpoint.unet, VideoUNet) and checkpoint.size == 64
    assert not any(p.requires_grad for p in checkpoint.unet.parameters())
    for case in "ABCDE":
        *given, expected = inputs(case)
        assert difference(checkpoint.unet(*given), expected) <= 1e-5
    for part in ("vae", "text_encoder"):
        ours, theirs = (getattr(c, part).state_dict() for c in (checkpoint, plain))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours), part


@torch.no_grad()
def test_what_python_saves_is_such_a_folder(published, copied):
    """`save_pretrained` of an inflated U-Net writes what the authors' code would, and more: how it was inflated."""
    unet = load_checkpoint(published).unet
    unet.save_pretrained(copied / "unet")
    config = json.loads((copied / "unet" / "config.json").read_text())
    assert {name: config[name] for name in CONFIG if name.endswith(("_types", "_type", "_name"))} == {
        name: value for name, value in CONFIG.items() if name.endswith(("_types", "_type", "_name"))
    }
    again = load_checkpoint(copied).unet
    *given, expected = inputs("A")
    assert torch.equal(again(*given), unet(*given)) and difference(again(*given), expected) <= 1e-5
    flat = UNet2DConditionModel.from_config(json.loads(json.dumps(CONFIG).replace("3D", "2D")))
    inflate(flat, attention="first", norm="frame").save_pretrained(copied / "unet")
    assert load_checkpoint(copied).unet.inflation == dict(attention="first", temporal_causal=False, norm="frame")


@pytest.mark.slow
def test_a_tuned_model_is_exported_as_such_a_folder(checkpoint, published, tmp_path):
    """And gives the same video, to the bit."""
    frames = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    preset = Preset(TuneConfig(steps=1, learning_rate=1e-2), sampling_steps=2)
    unet, _ = pipeline.tune_on(checkpoint, [pipeline.prepare(checkpoint, frames, "a ball")], preset)
    path = tmp_path / "new" / "model"
    save_pipeline(checkpoint, unet, path)
    again = load_checkpoint(path)

    def edited(checkpoint, unet):
        noise = pipeline.invert(checkpoint, unet, pipeline.prepare(checkpoint, frames, "a ball"), preset)
        return sampling.sample(checkpoint, unet, noise, "a star", preset, source_prompt="a ball")

    assert torch.equal(edited(again, again.unet), edited(checkpoint, unet))
    assert base_fingerprint(again.unet) == base_fingerprint(checkpoint.unet)
    # the parts of a published one, with all that is in its configuration, for the libraries' own loaders
    index, theirs = (json.loads((folder / "model_index.json").read_text()) for folder in (path, published))
    assert index.keys() == theirs.keys() and all(index[name] == theirs[name] for name in theirs if name[0] != "_")
    config = json.loads((path / "unet" / "config.json").read_text())
    assert all(config[name] == CONFIG[name] for name in CONFIG if name.endswith(("_types", "_type", "_name")))
    for kind, part in ((AutoencoderKL, "vae"), (CLIPTextModel, "text_encoder"), (VideoUNet, "unet")):
        read, own = kind.from_pretrained(path / part).state_dict(), getattr(again, part).state_dict()
        assert all(torch.equal(read[name], own[name]) for name in own), part
    assert DDIMScheduler.from_pretrained(path / "scheduler").config.steps_offset == 1
    assert CLIPTokenizer.from_pretrained(path / "tokenizer")("a ball") == checkpoint.tokenizer("a ball")
    assert {"vocab.json", "merges.txt"} <= {file.name for file in (path / "tokenizer").iterdir()}
    told = [file.read_text() for file in path.rglob("*.json")]
    assert not any(str(Path(checkpoint.vae.config._name_or_path).parent) in text for text in told)


def test_an_export_is_whole_or_not_there(checkpoint, tmp_path, monkeypatch):
    unet = inflate(checkpoint.unet)
    (tmp_path / "file").touch()
    refused("path=.* is a folder that holds something", checkpoint, unet, tmp_path, call=save_pipeline)
    refused("path=.* can't be a new folder", checkpoint, unet, tmp_path / "file", call=save_pipeline)
    refused("inflate it first", checkpoint, checkpoint.unet, tmp_path / "new", call=save_pipeline)
    (tmp_path / "empty").mkdir()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(VideoUNet, "save_pretrained", full)
        refused("can't be written .*free space", checkpoint, unet, tmp_path / "empty", call=save_pipeline)
    assert {path.name for path in tmp_path.iterdir()} == {"file", "empty"} and not any((tmp_path / "empty").iterdir())
    save_pipeline(checkpoint, unet, tmp_path / "empty")
    assert (tmp_path / "empty" / "model_index.json").is_file()


def test_the_command_exports(folder, checkpoint, tav, tmp_path):
    unet, tuned = inflate(checkpoint.unet), tmp_path / "tuned.safetensors"
    with torch.no_grad():
        unet.mid_block.attentions[0].transformer_blocks[0].attn_temp.to_out[0].weight.fill_(0.5)
    save_tuned(tuned, unet, prompt="a ball", num_frames=2, width=64, height=64, config={})
    of = ["--checkpoint", folder, "--tuned", tuned, "--output", tmp_path / "model"]
    assert tav("export", *of).endswith("model: model_index.json, scheduler, text_encoder, tokenizer, unet, vae\n")
    load_tuned(tuned, unet)  # in half precision
    made = load_checkpoint(tmp_path / "model").unet.state_dict()
    assert all(torch.equal(value, made[name]) for name, value in unet.state_dict().items())
    assert re.match("error: --output .* holds something; choose another --output", tav("export", *of, fails=True))


def test_what_is_no_such_model_is_refused(copied):
    weights, config = copied / "unet" / "diffusion_pytorch_model.safetensors", copied / "unet" / "config.json"
    good = parameters()
    # ModelScope's has the same class and names its blocks alike
    alien = {name: value for name, value in good.items() if "_temp." not in name}
    alien |= {"transformer_in.norm.weight": torch.ones(4), "down_blocks.0.temp_convs.0.conv1.0.weight": torch.ones(4)}
    theirs = {name: value for name, value in CONFIG.items() if name != "mid_block_type"} | {"attention_head_dim": 64}
    config.write_text(json.dumps(theirs))
    write(weights, alien)
    refused("another kind of video model, such as ModelScope's", copied)
    config.write_text(json.dumps(CONFIG))
    write(weights, good | {"down_blocks.0.motion_modules.0.weight": torch.ones(4)})
    refused("has down_blocks.0.motion_modules.0.weight", copied)
    lost = "mid_block.attentions.0.transformer_blocks.0.attn_temp.to_q.weight"
    write(weights, {name: value for name, value in good.items() if name != lost})
    refused(f"lacks 1 of its weights .unet: {lost}", copied)
    config.write_text(json.dumps(CONFIG | {"in_channels": 9}))
    refused("inpainting", copied)


def test_a_unet_alone_is_refused(copied):
    for part in ("vae", "text_encoder", "tokenizer", "scheduler"):
        shutil.rmtree(copied / part)
    refused(
        "lacks vae, text_encoder, tokenizer, scheduler; .* or copy them from the model that its unet was tuned from",
        copied,
    )


def test_tuned_weights_can_be_taken_out_of_it(published, copied, tmp_path):
    unet = load_checkpoint(published).unet
    base = inflate(UNet2DConditionModel.from_pretrained(GOLDEN / "unet"))
    path, facts = (
        tmp_path / "tuned.safetensors",
        dict(prompt="a man is surfing", num_frames=6, width=64, height=64, config={}),
    )
    save_tuned(path, unet, **facts)
    refused(
        "belongs to the base model", path, base, call=load_tuned
    )  # these vectors have a norm_temp that tuning never makes
    weights = copied / "unet" / "diffusion_pytorch_model.safetensors"
    write(weights, parameters() | {name: value for name, value in base.state_dict().items() if "norm_temp" in name})
    unet = load_checkpoint(copied).unet
    assert base_fingerprint(unet) == base_fingerprint(base)
    save_tuned(path, unet, **facts)
    *given, _ = inputs("A")
    untuned = difference(base(*given), unet(*given))
    load_tuned(path, base)
    assert difference(base(*given), unet(*given)) < 2e-3 < untuned / 10  # the file has half precision


@pytest.mark.slow
def test_tuning_goes_on_from_its_weights(published):
    checkpoint = load_checkpoint(published)
    frames = torch.randint(0, 256, (3, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    source = pipeline.prepare(checkpoint, frames, "a man is surfing")
    preset = Preset(TuneConfig(steps=1, learning_rate=1e-4), sampling_steps=2)
    before = {name: value.clone() for name, value in checkpoint.unet.state_dict().items()}
    unet, _ = pipeline.tune_on(checkpoint, [source], preset)
    after, name = unet.state_dict(), "mid_block.attentions.0.transformer_blocks.0.attn_temp.to_v.weight"
    assert 0 < (after[name] - before[name]).abs().max() < 2e-4
    assert all(torch.equal(value, checkpoint.unet.state_dict()[key]) for key, value in before.items())
    refused(
        "is a Tune-A-Video model, inflated with .*leave attention",
        checkpoint,
        [source],
        preset,
        inflation={"attention": "full"},
        call=pipeline.tune_on,
    )


def test_commands_need_no_tuned_weights(published, tav, tmp_path):
    clip, noise = ROOT / "tav_core" / "mini" / "demo.mp4", tmp_path / "noise.safetensors"
    common = ["--checkpoint", published, "--sampling-steps", "2"]
    tav("invert", "--video", clip, "--prompt", "a ball", "--frames", "3", "--output", noise, *common)
    assert load_file(noise)["latents"].shape == (1, 4, 3, 8, 8)
    tav("sample", "--noise", noise, "--edit", "a star", "--output", tmp_path, *common)
    assert (tmp_path / "edit-1-a-star.mp4").exists()
    refused(
        "path is missing; give a file of `tune` or `edit`, or a name_or_path that is a Tune-A-Video model",
        SimpleNamespace(tuned=None),
        load_checkpoint("mini"),
        call=tuned_unet,
    )


@pytest.mark.usefixtures("inference_mode")
def test_it_is_an_inflated_model_in_comfyui(pack, published, tmp_path, monkeypatch):
    import folder_paths

    nodes = pack.nodes
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "diffusers", ([str(published.parent)], {"folder"}))
    monkeypatch.setattr(folder_paths, "get_user_directory", lambda: str(tmp_path))
    model, text, _ = nodes.LoadCheckpoint.execute("a-man-is-surfing").args
    for case in "ABCDE":
        sample, timestep, context, expected = inputs(case)
        b, _, f, *_ = sample.shape
        out = model.model.diffusion_model(
            rearrange(sample, "b c f h w -> (b f) c h w"),
            timestep.reshape(-1).expand(b).repeat_interleave(f),
            context.expand(b, -1, -1).repeat_interleave(f, 0),
            transformer_options={"cond_or_uncond": list(range(b))},
        )
        assert relative(rearrange(out, "(b f) c h w -> b c f h w", f=f), expected) < 1e-4

    vectors, steps = load("ddim_inversion"), 10
    latent = {"samples": model.model.process_latent_out(vectors["latent"][0].movedim(1, 0))}
    empty = [[vectors["text_emb"], {}]]
    noise, sigmas, _ = nodes.DDIMInversion.execute(model, latent, empty, steps, "ddim_uniform", False).args
    z = model.model.process_latent_in(noise["samples"]) / (1 + sigmas[0] ** 2).sqrt()
    scheduler = DDIMScheduler.from_pretrained(
        GOLDEN / "scheduler", set_alpha_to_one=True
    )  # which ComfyUI's levels end at
    expected = ddim_invert(load_checkpoint(published).unet, vectors["latent"], vectors["text_emb"], scheduler, steps)
    assert relative(z.movedim(0, 1)[None], expected) < 1e-4
    edited = nodes.VideoSampler.execute(model, empty, empty, noise, steps, 1.0, "ddim_uniform", 0.0, False, 0).args[0][
        "samples"
    ]
    assert torch.isfinite(edited).all()

    caption = text.encode_from_tokens_scheduled(text.tokenize("a man is surfing"))
    tuned, weights, *_ = nodes.OneShotTune.execute(
        model, latent, caption, 1, 1e-4, 0, "fp32", "fast", "uniform", 0
    ).args
    name = "mid_block.attentions.0.transformer_blocks.0.attn_temp.to_v.weight"
    assert 0 < (weights.tensors[name] - parameters()[name]).abs().max() < 2e-4
    applied = nodes.ApplyTunedWeights.execute(model, weights).args[0]
    assert applied.patches.keys() == tuned.patches.keys()
    with pytest.raises(
        ValueError, match="MODEL is inflated already; connect it to One-Shot Tune or a sampler as it is"
    ):
        nodes.Inflate.execute(model, "sparse-causal", False, "video")
