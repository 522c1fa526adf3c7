"""Tuning runs of a few steps on a tiny video U-Net and random latents."""

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel

from tav_core.errors import Cancelled
from tav_core.inflation import inflate, trainable_parameters
from tav_core.tuning import TuneConfig, tune

SD = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, set_alpha_to_one=False)
SCHEDULER = DDIMScheduler(**SD)
CONFIG = TuneConfig(steps=6, learning_rate=1e-3, probe_every=2, probe_size=2, save_every=2, seed=5)


def make_unet():
    torch.manual_seed(0)
    return inflate(
        UNet2DConditionModel(
            sample_size=4,
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=24,
            attention_head_dim=4,
            norm_num_groups=4,
        )
    )


def clip():
    generator = torch.Generator().manual_seed(0)
    latents, text = (torch.randn(*shape, generator=generator) for shape in ((1, 4, 3, 4, 4), (1, 5, 24)))
    return {"latents": latents, "encoder_hidden_states": text, "latents_std": torch.full_like(latents, 0.1)}


def run(unet, config=CONFIG, scheduler=SCHEDULER, **kwargs):
    kwargs = clip() | kwargs
    return tune(unet, scheduler, kwargs.pop("latents"), kwargs.pop("encoder_hidden_states"), config, **kwargs)


def weights(unet):
    return {name: parameter.detach().clone() for name, parameter in trainable_parameters(unet).items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def stop_at(step, error=Cancelled):
    def callback(progress):
        if progress["step"] == step:
            raise error

    return callback
