"""Tuning runs of a few steps on a tiny video U-Net and random latents."""

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel

from tav_core.condition import Condition
from tav_core.errors import Cancelled
from tav_core.events import Note, Step
from tav_core.inflation import inflate
from tav_core.take import Take
from tav_core.trainable import trainable_parameters
from tav_core.tuning import TuneConfig, tune

SD = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, set_alpha_to_one=False)
SCHEDULER = DDIMScheduler(**SD)
CONFIG = TuneConfig(steps=6, learning_rate=1e-3, probe_every=2, probe_size=2, save_every=2, seed=5, memory="fast")


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


def take(latents, encoder_hidden_states, latents_std=None, class_labels=None):
    return Take(latents, Condition(encoder_hidden_states, class_labels), latents_std)


def run(unet, config=CONFIG, scheduler=SCHEDULER, more_takes=(), **kwargs):
    """Tunes on `clip()`, of which some tensors may be given as keywords, and on more takes."""
    own = {name: kwargs.pop(name, tensor) for name, tensor in clip().items()}
    return tune(unet, scheduler, [take(**own), *more_takes], config, **kwargs)


def steps(seen):
    """Of what a callback has seen."""
    return [event.step for event in seen if isinstance(event, Step)]


def notes(seen):
    return [event.text for event in seen if isinstance(event, Note)]


def weights(unet):
    return {name: parameter.detach().clone() for name, parameter in trainable_parameters(unet).items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def stop_at(step, error=Cancelled):
    def callback(event):
        if isinstance(event, Step) and event.step == step:
            raise error

    return callback
