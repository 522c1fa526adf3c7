"""Load Checkpoint: the shipped mini model or a diffusers folder as native MODEL, CLIP and VAE."""

from pathlib import Path

import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models
import comfy.supported_models_base
import folder_paths
import torch
from comfy.ldm.models.autoencoder import AutoencoderKL as NativeAutoencoderKL
from comfy_api.latest import io
from diffusers import AutoencoderKL
from torch import Tensor, nn

from ..tav_core import Checkpoint, TavError, load_checkpoint
from ..tav_core.checkpoint import MINI
from ..tav_core.mini.preview import LATENT_COLOURS, load_latent_colours
from .common import schema
from .errors import plain_errors
from .folders import found
from .inputs import check_name, checked, usable
from .layout import core_layout
from .native import to_native, use_operations


def choices() -> dict[str, Path]:
    """What can be loaded, by name: mini, and the folders under models/diffusers."""
    return {"mini": MINI, **dict(found(folder_paths.get_folder_paths("diffusers"), "model_index.json"))}


def path_of(checkpoint: str) -> Path:
    """The folder of a choice.

    Raises:
        TavError: it is none.
    """
    check_name("checkpoint", checkpoint)
    if (folder := choices().get(checkpoint)) is None:
        problem = "is neither mini nor a folder in models/diffusers"
        raise TavError("checkpoint", checkpoint, problem, "put it there, or choose another one")
    return folder


def native(
    folder: Path, disable_dynamic: bool = False
) -> tuple[comfy.model_patcher.ModelPatcher, comfy.sd.CLIP, "NativeVAE"]:
    """MODEL, CLIP and VAE of a folder.

    Args:
        disable_dynamic: no dynamic VRAM, where the core has it.
    """
    checkpoint, options = load_checkpoint(folder), {"disable_dynamic": True} if disable_dynamic else {}
    model, clip = native_unet(checkpoint, folder, **options), native_clip(checkpoint, folder / "tokenizer", **options)
    vae = NativeVAE(checkpoint)
    for index, patcher in enumerate((model, clip.patcher, vae.patcher)):
        patcher.cached_patcher_init = (patchers, (folder,), index)
    return model, clip, vae


def patchers(folder: Path, disable_dynamic: bool = False) -> tuple[comfy.model_patcher.ModelPatcher, ...]:
    """Those of MODEL, CLIP and VAE, loaded again: newer cores ask a patcher for another one of its kind."""
    with torch.inference_mode(False):
        model, clip, vae = native(folder, disable_dynamic)
    return model, clip.patcher, vae.patcher


def native_unet(checkpoint: Checkpoint, folder: Path, **options) -> comfy.model_patcher.ModelPatcher:
    unet, management = checkpoint.unet, comfy.model_management
    if unet.class_embedding is not None:
        problem = "is conditioned on class labels, which CONDITIONING doesn't hold"
        raise TavError("checkpoint", checkpoint.name, problem, "use it from Python")
    width = unet.config.cross_attention_dim
    kind = comfy.supported_models.SD20 if width == 1024 else comfy.supported_models.SD15
    model_config = kind({})
    model_config.unet_config |= core_layout(unet)  # a kind would insist on the heads that it has
    device, dtypes = management.get_torch_device(), model_config.supported_inference_dtypes
    dtype = management.unet_dtype(device, sum(p.numel() for p in unet.parameters()), dtypes)
    model_config.set_inference_dtype(dtype, management.unet_manual_cast(dtype, device, dtypes))
    model_config.latent_format = comfy.latent_formats.SD15(checkpoint.vae.config.scaling_factor)
    if (colours := folder / LATENT_COLOURS).exists():  # mini's own, for previews; others have those of Stable Diffusion
        vars(model_config.latent_format).update(
            latent_rgb_factors_reshape=load_latent_colours(colours),
            latent_rgb_factors=torch.eye(3).tolist(),
            latent_rgb_factors_bias=None,
        )
    types, noise = comfy.model_base.ModelType, checkpoint.scheduler
    known = {"epsilon": types.EPS, "v_prediction": types.V_PREDICTION}
    if (predicts := noise.config.prediction_type) not in known:
        problem = f"predicts the {predicts} itself, which ComfyUI has no sampling for"
        raise TavError("checkpoint", checkpoint.name, problem, "use it from Python or on the command line")
    model = to_native(unet, model_config, known[predicts], **options)
    # pure noise would be an infinite sigma: there the core puts the last level of its own schedules of this kind
    alphas = noise.alphas_cumprod.clamp(min=4.8973451890853435e-08)
    model.model.model_sampling.set_sigmas(((1 - alphas) / alphas) ** 0.5)
    return model


def native_clip(checkpoint: Checkpoint, tokenizer_folder: Path, **options) -> comfy.sd.CLIP:
    """ComfyUI's own text encoder with the weights of the checkpoint: prompt weights and so on work as usual."""
    source, tokenizer = checkpoint.text_encoder, checkpoint.tokenizer
    config, length = source.config, tokenizer.model_max_length

    class Tokenizer(comfy.sd1_clip.SD1Tokenizer):
        def __init__(self, embedding_directory=None, tokenizer_data=None):
            def inner(embedding_directory=None, tokenizer_data=None):
                return comfy.sd1_clip.SDTokenizer(
                    str(tokenizer_folder),
                    max_length=length,
                    embedding_directory=embedding_directory,
                    embedding_size=config.hidden_size,
                    pad_token=tokenizer.pad_token_id,
                    tokenizer_data=tokenizer_data or {},
                )

            super().__init__(embedding_directory, tokenizer_data or {}, tokenizer=inner)

    class Encoder(comfy.sd1_clip.SDClipModel):
        def __init__(self, device="cpu", dtype=None, model_options=None):
            special = {"start": tokenizer.bos_token_id, "end": tokenizer.eos_token_id, "pad": tokenizer.pad_token_id}
            super().__init__(
                device,
                length,
                textmodel_json_config=config.to_dict(),
                dtype=dtype,
                special_tokens=special,
                return_projected_pooled=False,
                model_options=model_options or {},
            )
            # the core takes it for granted that the vocabulary is CLIP's
            self.transformer.set_input_embeddings(
                self.operations.Embedding(config.vocab_size, config.hidden_size, dtype=dtype, device=device)
            )

    class Model(comfy.sd1_clip.SD1ClipModel):
        def __init__(self, device="cpu", dtype=None, model_options=None):
            super().__init__(device, dtype, model_options or {}, clip_model=Encoder)

    target = comfy.supported_models_base.ClipTarget(Tokenizer, Model)
    clip = comfy.sd.CLIP(
        target,
        embedding_directory=folder_paths.get_folder_paths("embeddings"),
        model_options={"dtype": torch.float32},
        **options,
    )
    state = {f"text_model.{name.removeprefix('text_model.')}": weight for name, weight in source.state_dict().items()}
    state["text_projection.weight"] = torch.eye(config.hidden_size)
    # not by the names in its state dict: with dynamic VRAM layers have no weights before
    lost = clip.cond_stage_model.clip_l.transformer.load_state_dict(state, strict=False).missing_keys
    assert not lost, lost
    return clip


class LatentMoments(nn.Module):
    """A diffusers VAE with the two calls that `comfy.sd.VAE` makes."""

    def __init__(self, vae: AutoencoderKL):
        super().__init__()
        self.vae = vae

    def encode(self, pixels: Tensor) -> Tensor:
        return self.vae.encode(pixels).latent_dist.mean

    def decode(self, latents: Tensor, **_) -> Tensor:
        return self.vae.decode(latents).sample


class NativeVAE(comfy.sd.VAE):
    def __init__(self, checkpoint: Checkpoint):
        # the core builds its own autoencoder, whose norms have 32 groups; a tiny one, that gives way at once
        tiny = dict(
            ddconfig=dict(
                double_z=True,
                z_channels=4,
                resolution=8,
                in_channels=3,
                out_ch=3,
                ch=32,
                ch_mult=[1],
                num_res_blocks=1,
                attn_resolutions=[],
            ),
            embed_dim=4,
        )
        super().__init__(sd=NativeAutoencoderKL(**tiny).state_dict(), config={"params": tiny})
        use_operations(checkpoint.vae, comfy.ops.disable_weight_init)
        self.first_stage_model = LatentMoments(checkpoint.vae).eval().to(self.vae_dtype)
        self.downscale_ratio = self.upscale_ratio = checkpoint.downscale
        self.latent_channels = checkpoint.vae.config.latent_channels
        # the core's figures, measured on 128 channels
        share = (checkpoint.vae.config.block_out_channels[0] / 128, self.memory_used_encode, self.memory_used_decode)
        self.memory_used_encode = lambda shape, dtype: share[0] * share[1](shape, dtype)
        self.memory_used_decode = lambda shape, dtype: share[0] * share[2](shape, dtype)
        self.size = None
        self.patcher = comfy.model_patcher.ModelPatcher(
            self.first_stage_model, load_device=self.device, offload_device=comfy.model_management.vae_offload_device()
        )


class LoadCheckpoint(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="TAVLoadCheckpoint",
            display_name="Load Checkpoint (Tune-A-Video)",
            description="Loads the mini model that ships with the pack, or a diffusers folder of Stable Diffusion 1.x "
            "or 2.x, or of a published Tune-A-Video model, from models/diffusers. For a single .safetensors file use "
            "the stock Load Checkpoint.",
            search_aliases=["load diffusers", "mini checkpoint"],
            inputs=[
                io.Combo.Input("checkpoint", options=list(choices()), default="mini",
                               tooltip="mini draws one shape on a background, at 128 x 128, and runs on a CPU."),
            ],
            outputs=[
                io.Model.Output(tooltip="Connect it to Inflate; a published Tune-A-Video model to DDIM Inversion or a "
                                "sampler."),
                io.Clip.Output(tooltip="For CLIP Text Encode."),
                io.Vae.Output(tooltip="For VAE Encode and VAE Decode."),
            ],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, checkpoint=None) -> bool | str:
        return usable(path_of, checkpoint)

    @classmethod
    @checked
    def execute(cls, checkpoint) -> io.NodeOutput:
        with plain_errors(), torch.inference_mode(False):
            folder = path_of(checkpoint)
            return io.NodeOutput(*native(folder))
