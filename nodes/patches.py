"""What native models do between their layers, done by a diffusers U-Net: ControlNets, T2I-Adapters, others' patches.

`UNetModel.forward` and `BasicTransformerBlock.forward` of ComfyUI say when a patch is called and with what; here module
hooks stand at the same places, for the time of one forward and only where there is something to do. ComfyUI counts the
U-Net in blocks: the first convolution is input block 0, then each resnet with its transformer is one and each
downsampler; an output block is a resnet of the upward half, with its transformer and upsampler.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..tav_core import TavError

Control = dict[str, list[Tensor | None]]


@contextmanager
def patched(unet: UNet2DConditionModel, x: Tensor, control: Control | None, options: dict[str, Any]) -> Iterator[None]:
    """Forwards inside honour ControlNets and patches as a native model does.

    Frames are the batch for patches as for anything else in ComfyUI: what they get is `b n c` and `b c h w` of single
    frames, `b` being `(chunks frames)`. Patches of the inputs of self-attention come before its keys and values are
    gathered from several frames, so a clip of equal frames becomes what the native model makes of one. A patch in
    place of self-attention (`patches_replace`) gets queries, keys and values of each frame alone: there, frames meet
    in temporal attention only. With attention injection, entries that are led get the queries and keys that lead them.

    Not called: `forward_timestep_embed_patch`, which speaks of the classes of native layers.

    Args:
        unet: 2D or inflated, with a `frame_context`.
        x: its input, `(chunks frames) c h w`.
        control: what ComfyUI's ControlNets and T2I-Adapters add.
        options: `transformer_options`; the place in the U-Net is noted in it, as native models do.

    Raises:
        TavError: a ControlNet or T2I-Adapter of another family.
    """
    if not (
        control or any(options.get(asks) for asks in ("patches", "patches_replace", "optimized_attention_override"))
    ):
        yield
        return
    options |= {"original_shape": list(x.shape), "transformer_index": 0}
    patches = _Patches(control or {}, options)
    with ExitStack() as stack:
        for handle in patches.attach(unet):
            stack.callback(handle.remove)
        stack.enter_context(unet.frame_context.running(patches=patches))
        yield


class _Patches:
    """The hooks of one forward in their order, and an `AttentionPatches`."""

    def __init__(self, control: Control, options: dict[str, Any]):
        self.control = {
            part: list(entries) for part, entries in control.items()
        }  # taken from the end, as are the skips
        self.options = options
        self.patches, self.replace = options.get("patches", {}), options.get("patches_replace", {})
        self.skips: list[Tensor] = []

    def attach(self, unet: UNet2DConditionModel) -> Iterator[RemovableHandle]:
        yield unet.time_embedding.register_forward_hook(partial(self.embed_time, unet.config.block_out_channels[0]))
        for block in (*unet.down_blocks, unet.mid_block, *unet.up_blocks):
            for transformer in getattr(block, "attentions", []):
                yield from self.attach_to_transformer(transformer)
        spans = [(unet.conv_in, unet.conv_in)]  # first and last module of each input block
        for block in unet.down_blocks:
            spans += [(layers[0], layers[-1]) for layers in layers_of(block)]
            spans += [(sampler, sampler) for sampler in block.downsamplers or []]
        for number, (first, last) in enumerate(spans):
            yield first.register_forward_pre_hook(partial(self.enter_block, ("input", number)))
            yield last.register_forward_hook(self.leave_input_block)
        yield unet.mid_block.register_forward_pre_hook(partial(self.enter_block, ("middle", 0)))
        yield unet.mid_block.register_forward_hook(self.leave_middle_block)
        number = 0
        for block in unet.up_blocks:
            yield block.register_forward_pre_hook(self.hold_back_skips, with_kwargs=True)
            for resnet, *_ in layers_of(block):
                yield resnet.register_forward_pre_hook(partial(self.enter_output_block, ("output", number)))
                number += 1
            for sampler in block.upsamplers or []:
                yield sampler.register_forward_pre_hook(self.fit_next_skip)

    def attach_to_transformer(self, transformer: nn.Module) -> Iterator[RemovableHandle]:
        yield transformer.register_forward_pre_hook(self.enter_transformer)
        yield transformer.register_forward_hook(self.leave_transformer)
        for index, block in enumerate(transformer.transformer_blocks):
            yield block.register_forward_pre_hook(partial(self.enter_transformer_block, index))
            for name in ("attn1", "attn2"):
                attn = getattr(block, name)
                yield attn.register_forward_pre_hook(partial(self.enter_attention, name))
                yield attn.register_forward_hook(partial(self.leave_attention, name))
            yield block.norm2.register_forward_pre_hook(self.between_attentions)

    # ------------------------------------------------------------------------------------------------- blocks

    def embed_time(self, channels: int, module: nn.Module, args: tuple, emb: Tensor) -> Tensor:
        for patch in self.patches.get("emb_patch", []):
            emb = patch(emb, channels, self.options)
        return emb

    def enter_block(self, place: tuple[str, int], module: nn.Module, args: tuple) -> tuple:
        h, *rest = args
        if self.skips:  # an input block ends here, behind what it keeps for the upward half
            h = self.run("input_block_patch_after_skip", h)
        self.options["block"] = place
        return h, *rest

    def leave_input_block(self, module: nn.Module, args: tuple, out: Tensor | tuple[Tensor]) -> Tensor | tuple[Tensor]:
        (h,) = out if isinstance(out, tuple) else (out,)  # a transformer gives a tuple
        h = self.run("input_block_patch", self.controlled("input", h))
        self.skips.append(h)
        return (h,) if isinstance(out, tuple) else h

    def leave_middle_block(self, module: nn.Module, args: tuple, h: Tensor) -> Tensor:
        if any(entry is not None for entry in self.control.get("input", [])):  # of a T2I-Adapter for more levels
            raise _foreign()
        return self.controlled("middle", h)

    def hold_back_skips(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """`torch.cat` passes over what is empty: a skip joins in `enter_output_block`, where patches see both parts."""
        nothing = kwargs["hidden_states"].new_empty(0)
        return args, {**kwargs, "res_hidden_states_tuple": (nothing,) * len(kwargs["res_hidden_states_tuple"])}

    def enter_output_block(self, place: tuple[str, int], module: nn.Module, args: tuple) -> tuple:
        h, *rest = args
        self.options["block"] = place
        skip = self.controlled("output", self.skips.pop())
        for patch in self.patches.get("output_block_patch", []):
            h, skip = patch(h, skip, self.options)
        return torch.cat([h, skip], dim=1), *rest

    def fit_next_skip(self, module: nn.Module, args: tuple) -> tuple:
        return args[0], self.skips[-1].shape[2:]

    def controlled(self, part: str, h: Tensor) -> Tensor:
        entries = self.control.get(part)
        if not entries or (entry := entries.pop()) is None:
            return h
        if entry.shape[1:] != h.shape[1:]:
            raise _foreign()
        return h + entry.to(h.dtype)

    def run(self, name: str, h: Tensor) -> Tensor:
        for patch in self.patches.get(name, []):
            h = patch(h, self.options)
        return h

    # ------------------------------------------------------------------------------------------- transformers

    def enter_transformer(self, module: nn.Module, args: tuple):
        self.options["activations_shape"] = list(args[0].shape)

    def leave_transformer(self, module: nn.Module, args: tuple, out: tuple[Tensor]):
        self.options["transformer_index"] += 1

    def enter_transformer_block(self, index: int, block: nn.Module, args: tuple):
        self.options["block_index"] = index
        attn = block.attn1
        self.extra = {
            key: value for key, value in self.options.items() if key not in ("patches", "patches_replace")
        } | {
            "n_heads": attn.heads,
            "dim_head": attn.inner_dim // attn.heads,
            "attn_precision": torch.float32 if attn.upcast_attention else None,
        }

    def enter_attention(self, name: str, module: nn.Module, args: tuple):
        self.name = name

    def inputs(self, x: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        for patch in self.patches.get(f"{self.name}_patch", []):
            x, keys, values = patch(x, keys, values, self.extra)
        return x, keys, values

    def replacement(self) -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
        patches, block = self.replace.get(self.name, {}), self.options["block"]
        patch = patches.get((*block, self.options["block_index"]), patches.get(block))
        return patch and (lambda q, k, v: patch(q, k, v, self.extra))

    def leave_attention(self, name: str, module: nn.Module, args: tuple, out: Tensor) -> Tensor:
        for patch in self.patches.get(f"{name}_output_patch", []):
            out = patch(out, self.extra)
        return out

    def between_attentions(self, module: nn.Module, args: tuple):
        (x,) = args
        for patch in self.patches.get("middle_patch", []):
            x.copy_(patch(x, self.extra))  # in place, for the residual that goes on is this very tensor


def _foreign() -> TavError:
    return TavError(
        "ControlNet or T2I-Adapter", None, "is for another family of models", "use one for the family of MODEL"
    )


def layers_of(block: nn.Module) -> list[tuple[nn.Module, ...]]:
    """The resnets of a block, each with its transformer where it has one."""
    return (
        list(zip(block.resnets, block.attentions))
        if hasattr(block, "attentions")
        else [(resnet,) for resnet in block.resnets]
    )
