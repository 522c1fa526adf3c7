"""LoRAs and textual inversions without ComfyUI: every form of their files, and what is refused of them."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from support.errors import refused
from tav_core import encode_prompt, inflate, load_checkpoint, load_embedding, load_lora
from tav_core.embeddings import named_in
from tav_core.mini.train_lora import LORA, with_lora
from tav_core.tuned_weights import base_fingerprint

UNET = ["down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", "mid_block.resnets.0.conv1",
        "up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_out.0", "down_blocks.1.resnets.1.time_emb_proj",
        "up_blocks.1.attentions.0.transformer_blocks.0.ff.net.2", "mid_block.attentions.0.proj_in"]  # fmt: skip
TEXT = ["encoder.layers.0.self_attn.q_proj", "encoder.layers.1.self_attn.out_proj", "encoder.layers.1.mlp.fc1"]
FORMS = {
    "kohya": lambda part, name, factor: (
        f"lora_{'unet' if part == 'unet' else 'te_text_model'}_"
        f"{name.replace('.', '_')}.lora_{'down' if factor == 'A' else 'up'}.weight"
    ),
    "peft": lambda part, name, factor: f"{part}.{name}.lora_{factor}.weight",
    "diffusers": lambda part, name, factor: (
        f"{part}.{name}.{'lora' if part == 'unet' else 'lora_linear_layer'}.{'down' if factor == 'A' else 'up'}.weight"
    ),
    "peft's own": lambda part, name, factor: f"base_model.model.{part}.{name}.lora_{factor}.weight",
}


def weights(checkpoint) -> dict:
    text = {name.removeprefix("text_model."): w for name, w in checkpoint.text_encoder.state_dict().items()}
    return {f"unet.{n}": w for n, w in checkpoint.unet.state_dict().items()} | {
        f"text_encoder.{n}": w for n, w in text.items()
    }


@pytest.fixture(scope="module")
def pairs(checkpoint) -> dict:
    """Down and up of rank 2 for some modules of each part of the tiny checkpoint."""
    torch.manual_seed(1)
    own, found = weights(checkpoint), {}
    for name in [*(f"unet.{name}" for name in UNET), *(f"text_encoder.{name}" for name in TEXT)]:
        out, into, *kernel = own[f"{name}.weight"].shape
        found[name] = torch.randn(2, into, *kernel), torch.randn(out, 2, *(1 for _ in kernel))
    return found


def write(path, pairs, form="peft", metadata=None, **more):
    tensors = {FORMS[form](*name.split(".", 1), factor): tensor
               for name, both in pairs.items() for factor, tensor in zip("AB", both)}  # fmt: skip
    save_file(tensors | more, path, metadata)
    return path


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_baked_in(checkpoint, pairs, tmp_path, form):
    alphas, metadata = {}, None
    if form == "kohya":
        alphas = {FORMS[form](*name.split(".", 1), "A").split(".")[0] + ".alpha": torch.tensor(1.0) for name in pairs}
    if form == "peft":
        metadata = {"lora_adapter_metadata": '{"unet.lora_alpha": 1, "text_encoder.lora_alpha": 1, "unet.r": 2}'}
    path, before = write(tmp_path / "x.safetensors", pairs, form, metadata, **alphas), weights(checkpoint)
    kept, scale = {name: w.clone() for name, w in before.items()}, 0.7 * (0.5 if alphas or metadata else 1)
    styled = load_lora(checkpoint, path, 0.7)
    after = weights(styled)
    for name, weight in kept.items():
        assert torch.equal(before[name], weight)  # the given one is as it was
        if (pair := pairs.get(name.removesuffix(".weight"))) is None or name.endswith(".bias"):
            assert torch.equal(after[name], weight)
        else:
            change = scale * (pair[1].flatten(1) @ pair[0].flatten(1)).view_as(weight)
            assert (after[name] - weight - change).abs().max() < 1e-5 < 1e-2 < change.abs().max()
    assert styled.name == "tiny + x:0.7" and len(styled.loras) == 1 and "x:0.7 (" in styled.loras[0]
    assert base_fingerprint(inflate(styled.unet)) == base_fingerprint(styled.unet) != base_fingerprint(checkpoint.unet)
    assert not (encode_prompt(styled, "a star") - encode_prompt(checkpoint, "a star")).abs().max() < 1e-3


def test_the_one_that_ships_with_the_pack():
    mini, tensors = load_checkpoint("mini"), load_file(LORA)
    ours, theirs = (of.unet.state_dict() for of in (load_lora(mini, LORA, 0.5), with_lora(mini, tensors, 0.5)))
    assert all(torch.equal(ours[name], weight) for name, weight in theirs.items())
    twice = load_lora(load_lora(mini, LORA, 0.25), LORA, 0.25)
    assert all((twice.unet.state_dict()[name] - weight).abs().max() < 1e-5 for name, weight in ours.items())
    assert twice.name == "mini + mini-neon:0.25 + mini-neon:0.25" and len(twice.loras) == 2
    # an inflated one is changed alike
    video = load_lora(replace(mini, unet=inflate(mini.unet)), LORA, 0.5).unet.state_dict()
    assert all(torch.equal(video[name], weight) for name, weight in theirs.items())


def test_loras_that_do_not_fit(checkpoint, pairs, tmp_path):
    path, name = tmp_path / "x.safetensors", f"unet.{UNET[0]}"
    down, up = pairs[name]

    def told(problem, tensors, strength=1.0):
        save_file(tensors, path)
        refused(problem, checkpoint, path, strength, call=load_lora)

    plain = {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    told("strength=11.0 is out of range; give a number from -10 to 10", plain, 11.0)
    told("doesn't fit unet.down.*to_q.weight \\(16 x 64; the checkpoint: 16 x 16\\)", plain | {f"{name}.lora_A.weight":
         torch.zeros(2, 64)})  # fmt: skip
    told("changes unet.nowhere.weight, which this checkpoint hasn't; give one that was made for checkpoints of this",
         {"unet.nowhere.lora_A.weight": down, "unet.nowhere.lora_B.weight": up})  # fmt: skip
    told("is for SDXL \\(it changes a second text encoder\\)", {f"lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_{w}"
         ".weight": torch.zeros(2, 2) for w in ("down", "up")})  # fmt: skip
    told("lacks lora_up of unet.down", {f"{name}.lora_A.weight": down})
    told("is damaged \\(.* no finite number\\)", plain | {f"{name}.lora_B.weight": up / 0})
    told("holds what is no LoRA's \\(unet.odd\\)", {"odd": down})
    told("holds nothing", {})
    refused("is not a .safetensors file, and a pickle can run code", checkpoint, tmp_path / "x.pt", call=load_lora)
    refused("does not exist", checkpoint, tmp_path / "no.safetensors", call=load_lora)
    path.write_bytes(b"0" * 99)
    refused("can't be read", checkpoint, path, call=load_lora)


@pytest.mark.parametrize("vectors", [1, 3])
def test_a_textual_inversion_is_a_word_of_its_own(checkpoint, tmp_path, vectors):
    width = checkpoint.text_encoder.config.hidden_size
    learned = torch.randn(vectors, width, generator=torch.Generator().manual_seed(0))
    path = tmp_path / "My-Style.safetensors"
    save_file({"<anything>": learned if vectors > 1 else learned[0]}, path)
    taught, table = load_embedding(checkpoint, path), checkpoint.text_encoder.get_input_embeddings()
    assert named_in(taught, "a star, my-style", "") and not named_in(taught, "a star")
    for plain in ("a red star", "", "style"):
        assert torch.equal(encode_prompt(taught, plain), encode_prompt(checkpoint, plain))
    # as the text encoder sees these vectors in the place of as many words
    words = "star " * vectors
    ids = checkpoint.tokenizer(f"a {words}, red", padding="max_length", return_tensors="pt").input_ids
    vectors_in = torch.nn.functional.embedding(ids, table.weight).clone()
    vectors_in[0, 2 : 2 + vectors] = learned
    found = []
    hook = taught.text_encoder.get_input_embeddings().register_forward_hook(lambda *args: found.append(args[2]))
    said = encode_prompt(taught, "a my-style, red")
    hook.remove()
    assert torch.equal(found[0], vectors_in) and len(said) == 1
    assert not torch.equal(said, encode_prompt(taught, "a style, red"))
    assert len(checkpoint.tokenizer) == 49408 == len(table.weight)  # the given one is as it was
    other = load_embedding(taught, path, "other-style")
    assert torch.equal(encode_prompt(other, "a other-style, red"), said) and len(other.embeddings) == 2


def test_textual_inversions_that_do_not_fit(checkpoint, tmp_path):
    def told(problem, tensors, name="x1-style"):
        path = tmp_path / f"{name}.safetensors"
        save_file(tensors, path)
        refused(problem, checkpoint, path, call=load_embedding)

    told("vectors of width 768, the text encoder takes 32", {"emb_params": torch.zeros(2, 768)})
    told("is for SDXL", {"clip_g": torch.zeros(1, 1280), "clip_l": torch.zeros(1, 768)})
    told("holds 2 tensors, a textual inversion is one", {"a": torch.zeros(1, 32), "b": torch.zeros(1, 32)})
    told("would stand for 'ball', which the tokenizer knows; rename the file", {"a": torch.zeros(32)}, "ball")
    told("is damaged", {"a": torch.full((32,), torch.nan)})
    told("shape \\(1, 2, 32\\)", {"a": torch.zeros(1, 2, 32)})
    refused("a pickle can run code", checkpoint, tmp_path / "x.pt", call=load_embedding)
    refused("does not exist", checkpoint, tmp_path / "x.safetensors", call=load_embedding)
