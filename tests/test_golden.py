"""Against vectors recorded from the reference implementation (fp32, a tiny random model)."""

from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from einops import rearrange
from safetensors.torch import load_file
from torch import nn

from tav_core.attention import FrameAttnProcessor, FrameContext, temporal_attention
from tav_core.ddim import ddim_invert, ddim_sample, ddim_timesteps
from tav_core.inflation import inflate, trainable_parameters
from tav_core.tuning import TuneConfig, make_optimizer, tuning_loss

GOLDEN = Path(__file__).parent / "golden"


def load(name):
    return load_file(GOLDEN / f"{name}.safetensors")


def close(actual, expected, tolerance):
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max().item() <= tolerance


@pytest.fixture(scope="module")
def base():
    return UNet2DConditionModel.from_pretrained(GOLDEN / "unet")


@pytest.fixture
def unet(base):
    unet = inflate(base)
    unet.load_state_dict({**base.state_dict(), **load("temporal_state")}, strict=True)
    return unet


@pytest.fixture(scope="module")
def scheduler():
    return DDIMScheduler.from_pretrained(GOLDEN / "scheduler")


@pytest.mark.parametrize("case", "ABCDE")
@pytest.mark.parametrize("variant", ["out", "out_temp_zero"])
@torch.no_grad()
def test_unet_forward(unet, case, variant):
    if variant == "out_temp_zero":
        for name, parameter in unet.named_parameters():
            if "attn_temp.to_out" in name:
                parameter.zero_()
    vectors = load("unet_forward")
    inputs = (vectors[f"{case}.{name}"] for name in ("sample", "timestep", "encoder_hidden_states"))
    # of values up to 3; kernels come to 5e-6, a resnet whose weights are off by a thousandth to 2e-4
    close(unet(*inputs), vectors[f"{case}.{variant}"], 3e-5)


@torch.no_grad()
def test_submodules(unet):
    vectors = load("submodules")
    close(unet.time_embedding(vectors["time_embedding.in0"]), vectors["time_embedding.out"], 1e-5)

    resnet, name = unet.down_blocks[0].resnets[0], "down_blocks.0.resnets.0"
    x, temb = (vectors[f"{name}.in{i}"] for i in (0, 1))
    with unet.frame_context.running(6):
        out = resnet(rearrange(x, "b c f h w -> (b f) c h w"), temb.expand(6, -1))
        close(rearrange(out, "(b f) c h w -> b c f h w", f=6), vectors[f"{name}.out"], 1e-5)

        x, temb, text = (vectors[f"mid_block.in{i}"] for i in ("0", "1", ".encoder_hidden_states"))
        x, text = rearrange(x, "b c f h w -> (b f) c h w"), text.expand(6, -1, -1)
        out = unet.mid_block(x, temb.expand(6, -1), encoder_hidden_states=text)
        close(rearrange(out, "(b f) c h w -> b c f h w", f=6), vectors["mid_block.out"], 1e-5)

    block, name = unet.down_blocks[0].attentions[0].transformer_blocks[0], "transformer_blocks.0.attn_temp"
    name = f"down_blocks.0.attentions.0.{name}"
    close(temporal_attention(block.attn_temp, vectors[f"{name}.in0"]), vectors[f"{name}.out"], 1e-5)


@torch.no_grad()
def test_sparse_causal_attention():
    vectors = load("sparse_causal_attn")
    attn = Attention(32, heads=8, dim_head=4)
    attn.load_state_dict({key[8:]: value for key, value in vectors.items() if key.startswith("down0.w.")})
    processor = FrameAttnProcessor(FrameContext(frames=5), "sparse-causal")
    close(processor(attn, vectors["down0.in"]), vectors["down0.out"], 1e-6)


@pytest.mark.parametrize("steps", [10, 50])
def test_inversion(unet, scheduler, steps):
    vectors = load("ddim_inversion")
    assert ddim_timesteps(scheduler, steps).tolist() == sorted(vectors[f"steps{steps}.timesteps"].tolist())[::-1]
    trajectory = ddim_invert(unet, vectors["latent"], vectors["text_emb"], scheduler, steps, return_trajectory=True)
    assert trajectory.shape == (steps + 1, 1, 4, 6, 8, 8)
    if steps == 10:
        close(trajectory[:, 0], vectors["steps10.trajectory"], 1e-5)
    else:
        close(trajectory[-1], vectors["steps50.final"], 1e-5)


@pytest.mark.parametrize("guidance", [1.0, 7.5, 12.5])
@pytest.mark.parametrize("run", ["inv.steps10", "rand.steps10", "inv.steps50"])
def test_sampling(unet, scheduler, run, guidance):
    vectors = load("sampling")
    video = ddim_sample(
        unet,
        vectors[f"{run}.init"],
        vectors["prompt_emb"],
        scheduler,
        int(run.split("steps")[1]),
        guidance_scale=guidance,
        negative_hidden_states=vectors["uncond_emb"],
    )
    close(video, vectors[f"{run}.cfg{guidance}.latents"], 1e-3)


def test_training(unet, scheduler):
    vectors, config = load("train"), TuneConfig(steps=20)
    start = {name: parameter.detach().clone() for name, parameter in trainable_parameters(unet).items()}
    optimizer = make_optimizer(unet, config)
    for step in range(20):
        loss = tuning_loss(
            unet,
            scheduler,
            vectors["latents"][step : step + 1],
            vectors["noise"][step : step + 1],
            vectors["timesteps"][step : step + 1],
            vectors["text_emb"],
        )
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            for name, parameter in unet.named_parameters():
                assert (parameter.grad is not None) == (name in start)
                if f"grad0.{name}" in vectors:
                    close(parameter.grad, vectors[f"grad0.{name}"], 1e-6)
        norm = nn.utils.clip_grad_norm_(trainable_parameters(unet).values(), config.max_grad_norm)
        optimizer.step()
        close(loss.detach(), vectors["loss"][step], 1e-6)
        close(norm, vectors["grad_norm"][step], 5e-6)
    for name, parameter in trainable_parameters(unet).items():
        # the vectors hold the change of each parameter in half precision (to 3e-7)
        close(parameter.detach() - start[name], vectors[f"delta.{name}"].float(), 2e-6)
