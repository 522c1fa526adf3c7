"""How files of LoRAs name the modules of a checkpoint: by names of diffusers, peft, kohya's scripts and ComfyUI."""

from collections.abc import Iterator

from diffusers import UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_peft, convert_unet_state_dict_to_peft
from diffusers.utils.state_dict_utils import StateDictType
from torch import Tensor
from transformers import CLIPTextModel

# of the original code of Stable Diffusion, by those of diffusers
_TOP = {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
        "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
        "mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2"}  # fmt: skip
_RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
           "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}  # fmt: skip


def flat_names(unet: UNet2DConditionModel, text_encoder: CLIPTextModel) -> dict[str, str]:
    """Modules, as "unet.NAME" and "text_encoder.NAME", by names that aren't theirs with dots: those of kohya's scripts
    and LyCORIS, with underscores, in the layout of diffusers or of the original code; and those of ComfyUI.
    """
    found, originals = {}, dict(_original_blocks(unet))
    for name, _ in unet.named_modules():
        found |= {f"{prefix}_{name.replace('.', '_')}": f"unet.{name}" for prefix in ("lora_unet", "lycoris")}
        block = next((each for each in originals if f"{name}.".startswith(f"{each}.")), None)
        if block is not None:
            rest = name.removeprefix(block).removeprefix(".")
            original = f"{originals[block]}.{_RESNET.get(rest, rest)}".removesuffix(".")
            found[f"lora_unet_{original.replace('.', '_')}"] = f"unet.{name}"
            found[f"diffusion_model.{original}"] = f"unet.{name}"
    for name, _ in text_encoder.named_modules():
        plain = name.removeprefix("text_model.")
        names = [f"lora_{te}_text_model_{plain.replace('.', '_')}" for te in ("te", "te1")]
        names += [f"text_encoders.{clip}.transformer.text_model.{plain}" for clip in ("clip_l", "clip_h")]
        found |= dict.fromkeys(names, f"text_encoder.{plain}")
    return found


def _original_blocks(unet: UNet2DConditionModel) -> Iterator[tuple[str, str]]:
    """Names of diffusers and of the original code, which numbers blocks through, for all that a U-Net consists of."""
    yield from _TOP.items()
    number = 0
    for at, block in enumerate(unet.down_blocks):
        name = f"down_blocks.{at}"
        for layer in range(len(block.resnets)):
            number += 1
            yield f"{name}.resnets.{layer}", f"input_blocks.{number}.0"
            yield f"{name}.attentions.{layer}", f"input_blocks.{number}.1"
        if block.downsamplers:
            number += 1
            yield f"{name}.downsamplers.0.conv", f"input_blocks.{number}.0.op"
    number = -1
    for at, block in enumerate(unet.up_blocks):
        name = f"up_blocks.{at}"
        for layer in range(len(block.resnets)):
            number += 1
            yield f"{name}.resnets.{layer}", f"output_blocks.{number}.0"
            yield f"{name}.attentions.{layer}", f"output_blocks.{number}.1"
        if block.upsamplers:  # behind the attention, where there is one
            yield f"{name}.upsamplers.0", f"output_blocks.{number}.{1 + hasattr(block, 'attentions')}"


def as_of_peft(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by names with dots, as `unet.NAME.lora_A.weight` and so on: also those of diffusers' older files."""
    tensors = {key.removeprefix("base_model.model."): tensor for key, tensor in tensors.items()}
    tensors = {key if key.startswith(("unet.", "text_encoder")) else f"unet.{key}": x for key, x in tensors.items()}
    unet = {key: tensor for key, tensor in tensors.items() if key.startswith("unet.")}
    text = {key: tensor for key, tensor in tensors.items() if key not in unet}
    text = convert_state_dict_to_peft(text, original_type=StateDictType.DIFFUSERS_OLD)
    return convert_unet_state_dict_to_peft(unet) | text
