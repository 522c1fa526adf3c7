"""The tensor names of the original Stable Diffusion code, written down by hand: reading them is what is tested."""

import re

import torch

UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer."
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
        (r"conv_shortcut", "nin_shortcut"),
        (r"conv_norm_out", "norm_out"),
        (r"down_blocks\.(\d)\.resnets", r"down.\1.block"),
        (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"),
        (r"up_blocks\.(\d)\.resnets", lambda m: f"up.{3 - int(m[1])}.block"),
        (r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{3 - int(m[1])}.upsample"),
        (r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}"),
        (r"mid_block\.attentions\.0", "mid.attn_1"),
        (r"attn_1\.group_norm", "attn_1.norm"),
        (r"attn_1\.to_([qkv])", r"attn_1.\1"),
        (r"attn_1\.to_out\.0", "attn_1.proj_out"),
    ):
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
    return {
        f"{TEXT}text_model.{name.removeprefix('text_model.')}": value for name, value in encoder.state_dict().items()
    }


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
            for ours, theirs in (
                ("self_attn.out_proj", "attn.out_proj"),
                ("layer_norm1", "ln_1"),
                ("layer_norm2", "ln_2"),
                ("mlp.fc1", "mlp.c_fc"),
                ("mlp.fc2", "mlp.c_proj"),
            ):
                tensors[f"{block}.{theirs}.{kind}"] = plain[f"{source}.{ours}.{kind}"]
    return {prefix + name: value for name, value in tensors.items()}
