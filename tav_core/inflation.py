"""Inflation: a 2D diffusion U-Net becomes a video U-Net (Tune-A-Video, arXiv 2212.11565, section 3.2).

Nothing of the U-Net is rewritten. The modules of the installed diffusers model keep their places and names;
transformer blocks, resnets and group norms change class, attention modules change processor, and every
transformer block receives `norm_temp` and `attn_temp`.
"""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from einops import rearrange
from torch import Tensor, nn

from .attention import MODES, FrameAttnProcessor, FrameContext, anchored, temporal_attention
from .condition import per_frame
from .errors import TavError
from .frames import told_numbers
from .recompute import Recomputed, make_units
from .trainable import trainable_parameters

NORMS = ("video", "frame")
PUBLISHED = "UNet3DConditionModel"  # the class in the configuration of a tuned U-Net that the authors' code saved


class OverFrames:
    """Mixin for a GroupNorm: statistics over group, frames, height and width of each video."""

    frame_context: FrameContext

    def forward(self, x: Tensor) -> Tensor:  # (b f) c h w
        frames = self.frame_context.forward.frames
        x = super().forward(rearrange(x, "(b f) c h w -> b c f h w", f=frames))
        return rearrange(x, "b c f h w -> (b f) c h w")


class TemporalTail:
    """Mixin for a transformer block: `x + attn_temp(norm_temp(x))` over frames after its feed-forward."""

    frame_context: FrameContext

    def forward(self, *args, **kwargs) -> Tensor:
        x, now = super().forward(*args, **kwargs), self.frame_context.forward  # (b f) n c
        y = self.norm_temp(rearrange(x, "(b f) n c -> (b n) f c", f=now.frames))
        leaders, free = now.sources * x.shape[1], now.free(x.shape[1])
        if free is not None:
            free = rearrange(free, "(b f) n 1 -> (b n) f 1", f=now.frames)
        y = temporal_attention(self.attn_temp, y, self.temporal_causal, now.attention_fn, leaders, free)
        return x + rearrange(y, "(b n) f c -> (b f) n c", n=x.shape[1])


class VideoGroupNorm(OverFrames, nn.GroupNorm):
    def forward(self, x: Tensor) -> Tensor:  # (b f) c h w
        if x.is_cuda and not torch.is_grad_enabled():  # on GPUs PyTorch is slow with rows that long
            return norm_by_frames(self, x, self.frame_context.forward.frames)
        return super().forward(x)


def norm_by_frames(norm: nn.GroupNorm, x: Tensor, frames: int) -> Tensor:
    """`norm` with the statistics of whole videos, put together from those of their frames: equal to rounding.

    Args:
        x: `(b f) c h w`.
    """
    groups, each = norm.num_groups, norm.num_channels // norm.num_groups
    x = rearrange(x, "(b f) c h w -> b f c h w", f=frames)
    variances, means = torch.var_mean(rearrange(x, "b f (g e) h w -> b f g (e h w)", g=groups), -1, correction=0)
    variances, means = variances.float(), means.float()
    mean = means.mean(1)  # b g
    variance = (variances + (means - mean[:, None]).square()).mean(1)
    scale = (variance + norm.eps).rsqrt().repeat_interleave(each, 1) * norm.weight  # b c
    shift = norm.bias - mean.repeat_interleave(each, 1) * scale
    scale, shift = (rearrange(of.to(x.dtype), "b c -> b 1 c 1 1") for of in (scale, shift))
    return rearrange(torch.addcmul(shift, x, scale), "b f c h w -> (b f) c h w")


class VideoResnetBlock(ResnetBlock2D):
    frame_context: FrameContext


class AnchoredResnetBlock(VideoResnetBlock):
    """The first resnet on the way up: its output tells best what is where."""

    def forward(self, *args, **kwargs) -> Tensor:
        return anchored(super().forward(*args, **kwargs), self.frame_context.forward)


class VideoTransformerBlock(TemporalTail, BasicTransformerBlock):
    pass


class TunedLinear(nn.Linear):
    """A projection that is tuned: its weights may stay in float32 while the model computes in another dtype."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class VideoUNet(UNet2DConditionModel):
    """A U-Net over videos, made by `inflate` (Tune-A-Video, section 3.2): it takes and predicts `b c f h w`.

    All else is diffusers' `UNet2DConditionModel`, whose layers work frame by frame.

    Attributes:
        frame_context: shared by all modules; `frame_context.set(attention_fn=...)` computes attention another way.
        inflation: the options given to `inflate`.
        memory: one of `MEMORY`, see `set_memory`.
    """

    frame_context: FrameContext
    inflation: dict[str, Any]
    memory: str = "fast"

    def __repr__(self) -> str:
        whole, tuned = list(self.parameters()), trainable_parameters(self).values()
        million, learn = (sum(map(torch.numel, of)) / 1e6 for of in (whole, tuned))
        options = [self.inflation["attention"], *["temporal-causal"] * self.inflation["temporal_causal"]]
        options += ["norm by frame"] * (self.inflation["norm"] == "frame")
        told = f"{million:.1f} M parameters, {learn:.1f} M of them tuned, {', '.join(options)}"
        return f"VideoUNet({told}, {told_numbers(whole)})"

    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor | float | int,
        encoder_hidden_states: Tensor,
        anchor: Tensor | None = None,
        **kwargs,
    ) -> Tensor:
        """Predict noise (or v, or the sample, as the base model does) for whole videos.

        Args:
            latents: `b c f h w`.
            timesteps: a number, a 0-d or 1-element tensor, or one per video (`b`).
            encoder_hidden_states: text per video `b n d`, for all videos `1 n d`, or per frame `(b f) n d`.
            anchor: under attention injection, how firmly the sources lead each place, -1 ... 1, `(b f) 1 h w` (see
                `Forward`).
            kwargs: those of `UNet2DConditionModel.forward`, `class_labels` for example; tensors come per video or per
                frame and residuals (`down_block_additional_residuals` and so on) as `(b f) c h w`.

        Returns:
            `b c f h w`.

        Raises:
            TavError: wrong rank, a batch that fits neither the videos nor their frames, or class labels that are
                missing, unknown or of no use.
        """
        if latents.ndim != 5:
            raise TavError("latents", None, f"must be b c f h w, got shape {tuple(latents.shape)}", "reshape them")
        b, _, f, _, _ = latents.shape
        t = torch.as_tensor(timesteps, device=latents.device).reshape(-1)
        if len(t) not in (1, b):
            raise TavError("timesteps", None, f"has {len(t)} entries for {b} videos", "give one, or one per video")
        if encoder_hidden_states.ndim != 3:
            shape = tuple(encoder_hidden_states.shape)
            raise TavError("encoder_hidden_states", None, f"must be b n d, got shape {shape}", "reshape them")
        kwargs = {
            name: value if name == "cross_attention_kwargs" else per_frame(name, value, b, f)
            for name, value in kwargs.items()
        }
        with self.frame_context.running(f, anchor=anchor):
            (out,) = super().forward(
                rearrange(latents, "b c f h w -> (b f) c h w"),
                t.expand(b).repeat_interleave(f),
                per_frame("encoder_hidden_states", encoder_hidden_states, b, f),
                return_dict=False,
                **kwargs,
            )
        return rearrange(out, "(b f) c h w -> b c f h w", f=f)

    def get_class_embed(self, sample: Tensor, class_labels: Tensor | None) -> Tensor | None:
        """What diffusers adds to the embedding of the timestep, `(b f) c`, once the labels are found to fit."""
        embedding, kind = self.class_embedding, self.config.class_embed_type
        if embedding is None:
            if class_labels is not None:
                raise TavError("class_labels", None, "are given, but this unet knows no classes", "leave them out")
            return None
        if class_labels is None:
            problem = "are missing, and this unet is conditioned on them"
            raise TavError("class_labels", None, problem, "pass them, from Python, one per video or per frame")
        if isinstance(embedding, nn.Embedding):
            known = not class_labels.is_floating_point() and (
                0 <= class_labels.min() <= class_labels.max() < embedding.num_embeddings
            )
            if not known:
                problem = f"must be integers from 0 to {embedding.num_embeddings - 1}"
                remedy = "give those that this unet was trained on"
                raise TavError("class_labels", class_labels.unique().tolist(), problem, remedy)
        elif kind != "timestep":  # a vector
            class_labels = class_labels.to(sample.dtype)
        return super().get_class_embed(sample, class_labels)

    def set_memory(self, memory: str) -> None:
        """What the backward pass recomputes.

        "fast": nothing; "selective": resnets and feed-forwards, which keep much for the time that they take;
        "checkpointing": resnets and transformers, one at a time; "low": around them whole blocks of the U-Net, so that
        nothing is kept but what flows from block to block, and in them attentions and feed-forwards.
        """
        self.memory = memory
        for module in self.modules():
            if isinstance(module, Recomputed):
                module.recomputed = memory in module.modes

    # diffusers would recompute its blocks without their frame count; see Recomputed
    def enable_gradient_checkpointing(self) -> None:
        self.set_memory("checkpointing")

    def disable_gradient_checkpointing(self) -> None:
        self.set_memory("fast")

    @property
    def is_gradient_checkpointing(self) -> bool:
        return self.memory != "fast"

    # saved and read as by the authors' code, whose blocks have 3D names, with the options of `inflate` beside them

    def to_json_string(self) -> str:
        config = json.loads(super().to_json_string().replace("Block2D", "Block3D"))
        return json.dumps(config | {"_class_name": PUBLISHED, "inflation": self.inflation}, indent=2, sort_keys=True)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs):
        """Random weights, inflated. `config` is that of a 2D U-Net, or what was saved beside an inflated one."""
        config = json.loads(json.dumps(dict(config)).replace("3D", "2D"))
        inflation = config.pop("inflation", {})
        unet, unused = UNet2DConditionModel.from_config(config, return_unused_kwargs=True, **kwargs)
        return (inflate(unet, **inflation), unused) if return_unused_kwargs else inflate(unet, **inflation)

    @classmethod
    def from_pretrained(cls, path: str | Path, output_loading_info: bool = False, **kwargs):
        """What `save_pretrained` saved, or the unet folder of a published Tune-A-Video model.

        Raises:
            TavError: a 2D model, or another one that lacks weights.
        """
        options = {"low_cpu_mem_usage": False, **kwargs}
        unet, loaded = super().from_pretrained(path, output_loading_info=True, **options)
        if lost := sorted(loaded["missing_keys"]):
            problem = f"lacks {len(lost)} weights of a video U-Net ({lost[0]}, ...)"
            raise TavError("path", path, problem, "load a 2D one as UNet2DConditionModel, and inflate it")
        return (unet, loaded) if output_loading_info else unet


def inflate(
    unet: UNet2DConditionModel, *, attention: str = "sparse-causal", temporal_causal: bool = False, norm: str = "video"
) -> VideoUNet:
    """Return a video U-Net made from a copy of `unet`; for a still video it computes what `unet` computes.

    Its state dict is that of `unet` plus `attn_temp.*` and `norm_temp.*` in every transformer block. The new
    modules take the dtype and device of their block; queries, keys and values start at fixed random weights,
    the output projection at zero. Only `trainable_parameters` require a gradient.

    Args:
        unet: any `UNet2DConditionModel` with transformer blocks, whatever its layout.
        attention: frames that spatial self-attention looks at: "sparse-causal" (frame 0 and the previous
            one, as in the paper), "first" or "full".
        temporal_causal: temporal attention sees no later frame (the paper: False).
        norm: statistics of the resnets' group norms over the whole "video" (as the reference
            implementation) or each "frame". Those at the entrance of transformers are always per frame.

    Raises:
        TavError: an unknown option, a model that is inflated already, has no transformer block, or a LoRA that isn't
            fused.
    """
    if attention not in MODES:
        raise TavError("attention", attention, "is unknown", f"choose one of {', '.join(MODES)}")
    if norm not in NORMS:
        raise TavError("norm", norm, "is unknown", f"choose one of {', '.join(NORMS)}")
    if isinstance(unet, VideoUNet):
        raise TavError("unet", None, "is inflated already", "pass the 2D model")
    if not isinstance(unet, UNet2DConditionModel):
        raise TavError("unet", None, f"is a {type(unet).__name__}", "pass a diffusers UNet2DConditionModel")
    if not any(isinstance(module, BasicTransformerBlock) for module in unet.modules()):
        raise TavError("unet", None, "has no transformer block to inflate", "pass a text-to-image model such as SD 1.5")
    if lora := next((name for name, module in unet.named_modules() if hasattr(module, "base_layer")), None):
        problem = f"has a LoRA beside its weights ({lora})"
        raise TavError("unet", None, problem, "make it part of them first: fuse_lora(), then unload_lora_weights()")

    unet = copy.deepcopy(unet)
    context, checkpointing = FrameContext(), unet.is_gradient_checkpointing
    unet.disable_gradient_checkpointing()
    unet.__class__ = VideoUNet
    unet.frame_context = context
    unet.inflation = {"attention": attention, "temporal_causal": temporal_causal, "norm": norm}

    group_norms = [unet.conv_norm_out]
    generator = torch.Generator().manual_seed(0)  # so that inflating is a function of its arguments alone
    for module in list(unet.modules()):
        if isinstance(module, ResnetBlock2D):
            module.__class__, module.frame_context = VideoResnetBlock, context
            group_norms += [module.norm1, module.norm2]
        elif isinstance(module, BasicTransformerBlock):
            _inflate_block(module, context, attention, generator)
            module.temporal_causal = temporal_causal
    if norm == "video":
        for module in group_norms:
            if isinstance(module, nn.GroupNorm):  # conv_norm_out may be None
                module.__class__, module.frame_context = VideoGroupNorm, context

    unet.up_blocks[0].resnets[0].__class__ = AnchoredResnetBlock
    for block in (*unet.down_blocks, unet.mid_block, *unet.up_blocks):
        if block is not None:
            make_units(block, context)
    if checkpointing:
        unet.enable_gradient_checkpointing()

    unet.requires_grad_(False)
    for parameter in trainable_parameters(unet).values():
        parameter.requires_grad_(True)
    for module in unet.modules():
        if type(module) is nn.Linear and module.weight.requires_grad:
            module.__class__ = TunedLinear
    return unet


def _inflate_block(
    block: BasicTransformerBlock, context: FrameContext, attention: str, generator: torch.Generator
) -> None:
    spatial = block.attn1
    block.__class__, block.frame_context = VideoTransformerBlock, context
    spatial.set_processor(FrameAttnProcessor(context, attention))
    # a processor that somebody chose for the text (an adapter's) stays
    if block.attn2 is not None and isinstance(block.attn2.processor, (AttnProcessor, AttnProcessor2_0)):
        block.attn2.set_processor(FrameAttnProcessor(context, None))

    with torch.random.fork_rng(devices=[]):  # the default initialisation draws from the global generator
        temporal = Attention(
            spatial.query_dim,
            heads=spatial.heads,
            dim_head=spatial.inner_dim // spatial.heads,
            dropout=spatial.dropout,
            upcast_attention=spatial.upcast_attention,
        )
    with torch.no_grad():
        for proj in (temporal.to_q, temporal.to_k, temporal.to_v):
            bound = proj.in_features**-0.5  # that of nn.Linear
            proj.weight.uniform_(-bound, bound, generator=generator)
        nn.init.zeros_(temporal.to_out[0].weight)
        nn.init.zeros_(temporal.to_out[0].bias)
    like = spatial.to_q.weight
    block.attn_temp = temporal.to(device=like.device, dtype=like.dtype)
    block.norm_temp = nn.LayerNorm(spatial.query_dim, device=like.device, dtype=like.dtype)
    block.attn_temp.train(block.training)
    block.norm_temp.train(block.training)
