"""Stock ControlNets and T2I-Adapters with random weights, their hints, and stock sampling under them."""

import torch

from support.native_models import native, prompt


def control_net(seed, model=None):
    """A stock CONTROL_NET of the layout of `model`, random weights."""
    import comfy.cldm.cldm
    import comfy.controlnet

    config = (model or native()).model.model_config.unet_config
    with torch.inference_mode(False):
        torch.manual_seed(seed)
        net = comfy.cldm.cldm.ControlNet(
            hint_channels=3,
            dtype=torch.float32,
            **{
                key: value
                for key, value in config.items()
                if key not in ("dtype", "out_channels", "transformer_depth_output")
            },
        )
        for parameter in net.parameters():
            fan = parameter[0].numel() if parameter.ndim > 1 else 1
            torch.nn.init.normal_(parameter, std=fan**-0.5 if parameter.ndim > 1 else 0.1)
    return comfy.controlnet.ControlNet(net, load_device=torch.device("cpu"))


def t2i_adapter(seed, **changes):
    """A stock T2I-Adapter of the layout of `native()`, random weights."""
    import comfy.controlnet
    import comfy.t2i_adapter.adapter

    with torch.inference_mode(False):
        torch.manual_seed(seed)
        settings = dict(cin=3 * 64, channels=[32, 64, 128, 128], nums_rb=2, ksize=1, sk=True, use_conv=False, xl=False)
        adapter = comfy.t2i_adapter.adapter.Adapter(**settings | changes)
    return comfy.controlnet.T2IAdapter(adapter, adapter.input_channels, 8, "nearest-exact", device=torch.device("cpu"))


def hints(frames=1, seed=5):
    return torch.rand(frames, 128, 128, 3, generator=torch.Generator().manual_seed(seed))


def controlled(positive, *applied, negative=None):
    """What the stock node Apply ControlNet makes of two prompts. `applied`: net, hint, strength, start, end."""
    from nodes import ControlNetApplyAdvanced

    negative = negative or prompt(2)
    for net, hint, *range_ in applied:
        positive, negative = ControlNetApplyAdvanced().apply_controlnet(positive, negative, net, hint, *range_)
    return positive, negative


def steered(model, prompts, noise, cfg=4.0):
    import comfy.sample

    return comfy.sample.sample(
        model, noise, 4, cfg, "euler", "normal", *prompts, torch.zeros_like(noise), disable_pbar=True, seed=3
    )
