"""Every kind of adapter that `load_lora` takes: computed as ComfyUI does, or by the formula of the paper."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from support.errors import refused
from support.ldm_keys import UNET as PREFIX
from support.ldm_keys import unet_key
from support.native_models import native, relative
from tav_core import load_lora
from tav_core.lora_names import flat_names

MODULES = ["down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", "mid_block.resnets.0.conv1",
           "up_blocks.1.attentions.2.transformer_blocks.0.attn2.to_out.0", "down_blocks.3.resnets.1.time_emb_proj",
           "up_blocks.3.attentions.2.transformer_blocks.0.ff.net.2", "mid_block.attentions.0.proj_in",
           "down_blocks.1.downsamplers.0.conv", "up_blocks.0.upsamplers.0.conv", "up_blocks.2.upsamplers.0.conv",
           "down_blocks.1.resnets.0.conv_shortcut", "time_embedding.linear_2", "conv_in", "conv_out"]  # fmt: skip
NORMS = ["down_blocks.3.resnets.0.norm1", "up_blocks.3.attentions.0.norm", "conv_norm_out",
         "mid_block.attentions.0.transformer_blocks.0.norm3"]  # fmt: skip


def lora(draw, out, into, kernel):
    return {"lora_up.weight": draw(out, 3, *[1] * len(kernel)), "lora_down.weight": draw(3, into, *kernel)}


def locon(draw, out, into, kernel):
    """With the third factor where there is a kernel for it."""
    if kernel != (3, 3):
        return lora(draw, out, into, kernel)
    return {"lora_up.weight": draw(out, 3, 1, 1), "lora_mid.weight": draw(3, 3, 3, 3),
            "lora_down.weight": draw(3, into, 1, 1)}  # fmt: skip


def loha(draw, out, into, kernel):
    size = kernel.numel() if kernel else 1
    return {
        f"hada_w{n}_{side}": draw(*((out, 3) if side == "a" else (3, into * size))) for n in (1, 2) for side in "ab"
    }


def loha_tucker(draw, out, into, kernel):
    if kernel != (3, 3):
        return loha(draw, out, into, kernel)
    return {"hada_t1": draw(3, 3, 3, 3), "hada_t2": draw(3, 3, 3, 3), "hada_w1_a": draw(3, out),
            "hada_w1_b": draw(3, into), "hada_w2_a": draw(3, out), "hada_w2_b": draw(3, into)}  # fmt: skip


def lokr(first, second):
    """With whole factors, or with products."""

    def make(draw, out, into, kernel):
        of, size = (2, 4 if into % 4 == 0 else 1), kernel.numel() if kernel else 1
        rest, within = out // of[0], into // of[1]
        made = {"lokr_w1_a": draw(of[0], 2), "lokr_w1_b": draw(2, of[1])} if first else {"lokr_w1": draw(*of)}
        if not second:
            return made | {"lokr_w2": draw(rest, within, *kernel)}
        return made | {"lokr_w2_a": draw(rest, 5), "lokr_w2_b": draw(5, within * size)}

    return make


def decomposed(kind, of_inputs=False):
    def make(draw, out, into, kernel):
        shape = (1, into) if of_inputs else (out, 1)
        return kind(draw, out, into, kernel) | {"dora_scale": draw(*shape, *[1] * len(kernel)).abs() + 1}

    return make


KINDS = {"LoRA": lora, "LoCon": locon, "LoHa": loha, "LoHa, Tucker": loha_tucker, "LoKr": lokr(False, False),
         "LoKr of products": lokr(True, True), "LoKr, second": lokr(False, True), "LoKr, first": lokr(True, False),
         "DoRA": decomposed(lora), "DoRA of inputs": decomposed(lora, True),
         "DoRA, LoHa": decomposed(loha), "DoRA, LoKr of inputs": decomposed(lokr(False, True), True),
         "difference": lambda draw, out, *rest: {"diff": draw(out, rest[0], *rest[1]), "diff_b": draw(out)},
}  # fmt: skip
LAYOUTS = {  # `unet_key` takes names of weights
    "diffusers": lambda name: "lora_unet_" + name.replace(".", "_"),
    "original": lambda name: "lora_unet_" + unet_key(name + ".x").removeprefix(PREFIX)[:-2].replace(".", "_"),
    "SimpleTuner": lambda name: "lycoris_" + name.replace(".", "_"),
    "ComfyUI": lambda name: "diffusion_model." + unet_key(name + ".x").removeprefix(PREFIX)[:-2],
}


def draw(*shape):
    return torch.randn(shape) * 0.3


def adapters(weights, kind, name_of, alpha=None, norms=False):
    """The tensors of a file for `MODULES`, of random numbers."""
    torch.manual_seed(0)
    tensors = {}
    for name in MODULES:
        weight, bias = weights[f"{name}.weight"], weights.get(f"{name}.bias")
        made = KINDS[kind](draw, *weight.shape[:2], weight.shape[2:])
        made = {end: tensor for end, tensor in made.items() if end != "diff_b" or bias is not None}
        made |= {} if alpha is None else {"alpha": torch.tensor(alpha)}
        tensors |= {f"{name_of(name)}.{end}": tensor for end, tensor in made.items()}
    for name in NORMS if norms else ():
        tensors |= {f"{name_of(name)}.{end}": draw(len(weights[f"{name}.weight"])) for end in ("w_norm", "b_norm")}
    return tensors


@pytest.fixture(scope="module")
def model(pack):
    with torch.inference_mode():
        return native()


@pytest.fixture(scope="module")
def ours(pack, model, checkpoint):
    """The tiny checkpoint with the U-Net of the MODEL, whose LoRAs are for both."""
    return replace(checkpoint, unet=pack.nodes.native.to_diffusers(model))


def theirs(pack, model, tensors, strength):
    import comfy.sd

    adapted = comfy.sd.load_lora_for_models(model, None, tensors, strength, 0)[0]
    return adapted, pack.nodes.native.to_diffusers(adapted).state_dict()


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_becomes_what_it_becomes_in_comfyui(pack, model, ours, tmp_path, kind, caplog):
    before = ours.unet.state_dict()
    for layout, alpha, strength in (("diffusers", 1.0, 0.7), ("original", None, 1.0), ("ComfyUI", 2.0, -1.5)):
        tensors = adapters(before, kind, LAYOUTS[layout], alpha)
        save_file(tensors, tmp_path / "x.safetensors")
        after = load_lora(ours, tmp_path / "x.safetensors", strength).unet.state_dict()
        adapted, wanted = theirs(pack, model, tensors, strength)
        assert len({key for key in adapted.patches if key.endswith("weight")}) == len(MODULES)
        for name, weight in wanted.items():
            assert relative(after[name], weight) < 1e-5
            changed = name.removesuffix(".weight") in MODULES or (kind == "difference" and name[:-5] in MODULES)
            assert (relative(weight, before[name]) > 1e-2) == changed, name
    assert "not loaded" not in caplog.text


def test_a_lokr_with_a_third_factor(checkpoint, tmp_path):
    """Which ComfyUI fails to make a product of."""
    name = "mid_block.resnets.0.conv1"  # 32 x 32 x 3 x 3
    torch.manual_seed(0)
    first, core, left, right = draw(2, 4), draw(5, 5, 3, 3), draw(5, 16), draw(5, 8)
    save_file({f"{LAYOUTS['diffusers'](name)}.{end}": tensor for end, tensor in (
        ("lokr_w1", first), ("lokr_t2", core), ("lokr_w2_a", left), ("lokr_w2_b", right),
        ("alpha", torch.tensor(2.0)))}, tmp_path / "x.safetensors")  # fmt: skip
    before = checkpoint.unet.state_dict()[f"{name}.weight"]
    after = load_lora(checkpoint, tmp_path / "x.safetensors", 0.5).unet.state_dict()[f"{name}.weight"]
    for y in range(3):
        for x in range(3):
            wanted = 0.5 * 2 / 5 * torch.kron(first, left.T @ core[:, :, y, x] @ right)
            assert relative((after - before)[:, :, y, x], wanted) < 1e-5


def test_norms_and_biases_too(pack, model, ours, tmp_path):
    tensors = adapters(ours.unet.state_dict(), "LoRA", LAYOUTS["original"], norms=True)
    save_file(tensors, tmp_path / "x.safetensors")
    after = load_lora(ours, tmp_path / "x.safetensors", 0.5).unet.state_dict()
    before, (_, wanted) = ours.unet.state_dict(), theirs(pack, model, tensors, 0.5)
    assert all(relative(after[name], weight) < 1e-5 for name, weight in wanted.items())
    for name in [f"{norm}.{end}" for norm in NORMS for end in ("weight", "bias")]:
        assert relative(after[name], before[name]) > 1e-2


def test_every_weight_has_a_name_in_every_layout(checkpoint):
    names, weights = flat_names(checkpoint.unet, checkpoint.text_encoder), checkpoint.unet.state_dict()
    for name in {key.rpartition(".")[0] for key in weights}:
        assert all(names[name_of(name)] == f"unet.{name}" for name_of in LAYOUTS.values())
    for name in {key.removeprefix("text_model.").rpartition(".")[0] for key in checkpoint.text_encoder.state_dict()}:
        flat = name.replace(".", "_")
        for each in (f"lora_te_text_model_{flat}", f"lora_te1_text_model_{flat}",
                     f"text_encoders.clip_l.transformer.text_model.{name}"):  # fmt: skip
            assert names[each] == f"text_encoder.{name}"


@pytest.mark.parametrize("end", ["", ".weight"])
@pytest.mark.parametrize("name", ["unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0",
                                  "unet.mid_block.resnets.0.conv1",
                                  "text_encoder.text_model.encoder.layers.1.mlp.fc1"])  # fmt: skip
def test_a_dora_of_peft_is_that_of_the_paper(checkpoint, tmp_path, name, end):
    part, _, module = name.partition(".")
    weights = {key.removeprefix("text_model."): w for key, w in getattr(checkpoint, part).state_dict().items()}
    weight = weights[f"{module.removeprefix('text_model.')}.weight"]
    torch.manual_seed(1)
    out, into, *kernel = weight.shape
    down, up, lengths = draw(2, into, *kernel), draw(out, 2, *[1] * len(kernel)), torch.rand(out) + 0.5
    shape = (1, out, 1, 1) if kernel else (out,)  # as peft has it
    save_file({f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up,
               f"{name}.lora_magnitude_vector{end}": lengths.reshape(shape)}, tmp_path / "x.safetensors",
              {"lora_adapter_metadata": f'{{"{part}.lora_alpha": 4, "{part}.r": 2}}'})  # fmt: skip
    whole = weight.flatten(1) + 2 * up.flatten(1) @ down.flatten(1)
    wanted = lengths[:, None] * whole / whole.norm(dim=1, keepdim=True)
    for strength in (1.0, 0.3):
        styled = getattr(load_lora(checkpoint, tmp_path / "x.safetensors", strength), part).state_dict()
        after = next(w for key, w in styled.items() if key.endswith(f"{module.removeprefix('text_model.')}.weight"))
        expected = torch.lerp(weight.flatten(1), wanted, strength)
        assert relative(after.flatten(1), expected) < 1e-5 < 1e-2 < relative(after, weight)


def test_what_is_no_adapter_that_can_be_taken(checkpoint, tmp_path):
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"  # 32 x 32

    def told(problem, **factors):
        save_file({f"{name}.{end.replace('__', '.')}": tensor.clone() for end, tensor in factors.items()},
                  tmp_path / "x.safetensors")  # fmt: skip
        refused(problem, checkpoint, tmp_path / "x.safetensors", call=load_lora)

    x = torch.ones(32, 2)
    others = {"OFT": "oft_blocks", "BOFT": "boft_R", "GLoRA": "a1__weight", "(IA)3": "on_input"}
    for kind, mark in others.items():
        problem = rf"is a {kind} \(it has {name}.{mark.replace('__', '.')}\); give a LoRA, LoHa, LoKr or DoRA, or"
        told(problem.replace("(IA)3", r"\(IA\)3"), **{mark: x})
    pair = {"lora_up__weight": x, "lora_down__weight": x.T.contiguous()}
    told(
        r"lacks hada_w2_b of unet.mid_block.*to_q.weight", hada_w1_a=x, hada_w1_b=pair["lora_down__weight"], hada_w2_a=x
    )
    told(r"lacks lokr_w2_a of", lokr_w1=x)
    told(r"has LoRA and difference for unet.mid_block", diff=torch.ones(32, 32), **pair)
    told(r"has no factors for unet.mid_block", dora_scale=x[:, :1].clone())
    told(r"doesn't fit .*to_q.weight \(64 x 32; the checkpoint: 32 x 32\)", lokr_w1=x, lokr_w2=torch.ones(2, 16))
    told(r"doesn't fit .*to_q.weight \(", dora_scale=torch.ones(31, 1), **pair)
    told(r"changes unet.*to_q.bias, which this checkpoint hasn't", diff_b=torch.ones(32))
