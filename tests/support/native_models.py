"""MODELs of reduced layouts with random weights, as ComfyUI's loaders would make them, and stock sampling on them."""

import torch

TEXT = 48  # width of the text embedding
POOLED = 16  # of SDXL's pooled text


def native(second=False, v_prediction=False, xl=False, **changes):
    """A MODEL of a reduced SD 1.5 (or 2.x, or XL) layout, random weights, as the stock loader would make it."""
    import comfy.model_base
    import comfy.model_patcher
    import comfy.supported_models

    config = dict(
        image_size=32,
        in_channels=4,
        out_channels=4,
        model_channels=32,
        num_res_blocks=[2, 2, 2, 2],
        channel_mult=[1, 2, 4, 4],
        transformer_depth=[1, 1, 1, 1, 1, 1, 0, 0],
        transformer_depth_output=[1] * 9 + [0] * 3,
        transformer_depth_middle=1,
        use_linear_in_transformer=second,
        context_dim=TEXT,
        use_spatial_transformer=True,
        legacy=False,
        adm_in_channels=None,
        use_temporal_attention=False,
    )
    kind, base = comfy.supported_models.SD20 if second else comfy.supported_models.SD15, comfy.model_base.BaseModel
    if xl:
        kind, base = comfy.supported_models.SDXL, comfy.model_base.SDXL
        config |= dict(
            num_res_blocks=[2, 2, 2],
            channel_mult=[1, 2, 4],
            transformer_depth=[0, 0, 1, 1, 2, 2],
            transformer_depth_middle=2,
            transformer_depth_output=[0, 0, 0, 1, 1, 1, 2, 2, 2],
            use_linear_in_transformer=True,
            num_head_channels=16,
            num_classes="sequential",
            adm_in_channels=POOLED + 6 * 256,
        )
    model_config = kind(config | changes)
    if second:  # 64 channels a head leave none of these
        model_config.unet_config["num_head_channels"] = 16
    model_config.set_inference_dtype(torch.float32, None)
    types = comfy.model_base.ModelType
    with torch.inference_mode(False):
        torch.manual_seed(0)
        model = base(model_config, types.V_PREDICTION if v_prediction else types.EPS)
        for name, parameter in model.diffusion_model.named_parameters():
            fan = parameter[0].numel() if parameter.ndim > 1 else 1
            torch.nn.init.normal_(parameter, std=fan**-0.5 if parameter.ndim > 1 else 0.1)
            if name.endswith("weight") and parameter.ndim == 1:  # of a norm
                parameter.data += 1
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)


def prompt(seed, batch=1):
    generator = torch.Generator().manual_seed(seed)
    text = torch.randn(batch, 77, TEXT, generator=generator)
    return [[text, {"pooled_output": torch.randn(batch, POOLED, generator=generator)}]]


def clip(frames=1, seed=9):
    return torch.randn(frames, 4, 16, 16, generator=torch.Generator().manual_seed(seed))


def sample(
    model, frames=1, cfg=4.0, sampler="euler", scheduler="normal", steps=3, positive=None, noise=None, negative=None
):
    import comfy.sample

    noise = clip(frames) if noise is None else noise
    return comfy.sample.sample(
        model,
        noise,
        steps,
        cfg,
        sampler,
        scheduler,
        positive or prompt(1),
        negative or prompt(2),
        torch.zeros_like(noise),
        disable_pbar=True,
        seed=3,
    )


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def inflated(pack, model, **options):
    return pack.nodes.native.inflate_model(model, **options)


def plain(model, noise, mini):
    """What stock sampling makes of a MODEL of the mini checkpoint."""
    return sample(model, noise=noise, positive=mini.encode("a red ball"), negative=mini.encode(""))


def attention_lora(model, name_of, seed=0):
    """A LoRA on every attention projection; `name_of` makes a name from those of diffusers and the native model."""
    return attention_adapter(model, name_of, lora, seed)


def lora(out, into, draw):
    return {"lora_down.weight": draw(2, into) * into**-0.5, "lora_up.weight": draw(out, 2) * 0.5}


ADAPTERS = {  # other kinds, as files of LyCORIS name their tensors
    "lora": lora,
    "dora": lambda out, into, draw: lora(out, into, draw) | {"dora_scale": draw(out, 1).abs() + 0.5},
    "dora of the inputs": lambda out, into, draw: lora(out, into, draw) | {"dora_scale": draw(1, into).abs() + 0.5},
    "loha": lambda out, into, draw: {"hada_w1_a": draw(out, 2), "hada_w1_b": draw(2, into) * 0.2,
                                     "hada_w2_a": draw(out, 2), "hada_w2_b": draw(2, into) * 0.2},
    "lokr": lambda out, into, draw: {"lokr_w1": draw(4, 4) * 0.3, "lokr_w2": draw(out // 4, into // 4) * 0.1},
    "glora": lambda out, into, draw: {"a1.weight": draw(into, 2) * into**-0.5, "a2.weight": draw(2, into) * into**-0.5,
                                      "b1.weight": draw(out, 2) * 0.5, "b2.weight": draw(2, into) * into**-0.5},
    "oft": lambda out, into, draw: {"oft_blocks": draw(out // 4, 4, 4) * 0.3},
    "boft": lambda out, into, draw: {"oft_blocks": draw(2, out // 4, 4, 4) * 0.3, "alpha": torch.tensor(0.0)},
}  # fmt: skip


def attention_adapter(model, name_of, make, seed=0):
    """The same of any kind: `make(out, into, draw)` gives the tensors of a projection by the end of their name."""
    from comfy.utils import unet_to_diffusers

    generator, tensors = torch.Generator().manual_seed(seed), {}
    shapes = {name: weight.shape for name, weight in model.model.diffusion_model.state_dict().items()}
    for name, key in unet_to_diffusers(model.model.model_config.unet_config).items():
        if ".attn" not in name or not name.endswith(".weight"):
            continue
        out, into = shapes[key]
        base = name_of(name.removesuffix(".weight"), key.removesuffix(".weight"))
        made = make(out, into, lambda *shape: torch.randn(shape, generator=generator))
        tensors |= {f"{base}.{end}": tensor for end, tensor in made.items()}
    return tensors
