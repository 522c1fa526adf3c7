"""Patches of native MODELs as other packs make them, and whether inflated ones follow them."""

import torch

from support.native_models import TEXT, clip, relative, sample


def strength(options, like):
    """A factor for each entry of the batch, made of all that native models tell a patch."""
    place = {"input": 0.1, "middle": 0.2, "output": 0.3}[options["block"][0]] + 0.01 * options["block"][1]
    place += 0.02 * options["transformer_index"] + 0.1 * options.get("block_index", 0)
    if "n_heads" in options:
        place += 0.01 * options["n_heads"] + 0.001 * options["dim_head"]
        place *= options["activations_shape"][1] / 32 * options["activations_shape"][2] / options["original_shape"][2]
    each = torch.tensor(options["cond_or_uncond"]).repeat_interleave(
        options["original_shape"][0] // len(options["cond_or_uncond"])
    )
    factor = 1 + 0.3 * place * (1 + each) + 0.01 * options["sigmas"][0]
    return factor.view(-1, *[1] * (like.ndim - 1)).to(like.dtype)


def attention(q, k, v, options):
    from comfy.ldm.modules.attention import optimized_attention

    return optimized_attention(q, k, v, options["n_heads"])


def on_attn1_inputs(model):
    model.set_model_attn1_patch(
        lambda n, k, v, o: (n * strength(o, n), k * strength(o, k), torch.roll(v, 1, 1) * strength(o, v))
    )


def on_attn2_inputs(model):
    model.set_model_attn2_patch(lambda n, k, v, o: (n * strength(o, n), k.flip(1) * strength(o, k), v * strength(o, v)))


def on_attn1_output(model):
    model.set_model_attn1_output_patch(lambda out, o: out * strength(o, out))


def on_attn2_output(model):
    model.set_model_attn2_output_patch(lambda out, o: out.flip(1) * strength(o, out))


def between_attentions(model):
    model.set_model_patch(lambda x, o: x * strength(o, x), "middle_patch")


def at_the_time_embedding(model):
    model.set_model_patch(lambda emb, channels, o: emb * (1 + channels / 100), "emb_patch")


def behind_input_blocks(model):
    model.set_model_input_block_patch(lambda h, o: h * strength(o, h))


def behind_the_skips(model):
    model.set_model_input_block_patch_after_skip(lambda h, o: h * strength(o, h))


def before_output_blocks(model):
    def patch(h, skip, options):
        return h * strength(options, h), skip.flip(3) * strength(options, skip)

    model.set_model_output_block_patch(patch)


def instead_of_attn1(model):
    def patch(q, k, v, options):
        return attention(q * strength(options, q), k, v.roll(1, 1), options)

    model.set_model_attn1_replace(patch, "input", 4)
    model.set_model_attn1_replace(patch, "middle", 0, 0)


def instead_of_attn2(model):
    """As IP-Adapters do: tokens of a picture for the positive prompt, in chosen blocks."""
    generator = torch.Generator().manual_seed(0)

    def ip_adapter(width):
        tokens, to_k, to_v = (
            torch.randn(*shape, generator=generator) / 5 for shape in ((1, 4, TEXT), (TEXT, width), (TEXT, width))
        )

        def patch(q, k, v, options):
            chunk = len(q) // len(options["cond_or_uncond"])
            on = (
                torch.tensor([1.0 - kind for kind in options["cond_or_uncond"]]).repeat_interleave(chunk).view(-1, 1, 1)
            )
            pictures = tokens.expand(len(q), -1, -1)
            return attention(q, k, v, options) + on * attention(
                q, pictures @ to_k, pictures @ to_v, options
            ) * strength(options, q)

        return patch

    model.set_model_attn2_replace(ip_adapter(64), "input", 5)
    model.set_model_attn2_replace(ip_adapter(128), "middle", 0, 0)
    model.set_model_attn2_replace(ip_adapter(64), "output", 6, 0)


def instead_of_the_backend(model):
    def override(function, q, k, v, heads, *args, **kwargs):
        options = kwargs["transformer_options"]
        place = 0.1 * ("input", "middle", "output").index(options["block"][0]) + 0.02 * options["block"][1]
        place += 0.1 * options["transformer_index"] + 0.2 * options["block_index"] + 0.01 * heads
        return function(q * (1 + place), k, v, heads, *args, **kwargs) * (1.2 - place)

    model.model_options["transformer_options"]["optimized_attention_override"] = override


def around_the_model(model):
    from comfy.patcher_extension import WrappersMP

    def wrapper(executor, x, *args, **kwargs):
        assert isinstance(executor.class_obj, torch.nn.Module)
        return executor(x * 1.1, *args, **kwargs) * 0.9

    model.add_wrapper(WrappersMP.DIFFUSION_MODEL, wrapper)


KINDS = (on_attn1_inputs, on_attn2_inputs, on_attn1_output, on_attn2_output, between_attentions, at_the_time_embedding,
         behind_input_blocks, behind_the_skips, before_output_blocks, instead_of_attn1, instead_of_attn2,
         instead_of_the_backend, around_the_model)  # fmt: skip


def agrees(models, patch, split=False, noise=None):
    """The patch does on the inflated MODEL what it does on the native one: with one frame, and with equal frames."""
    model, wrapped, without = models
    noise = clip() if noise is None else noise
    outs = []
    for source, x in ((model, noise), (wrapped, noise), (wrapped, noise.expand(2, -1, -1, -1))):
        changed = source.clone()
        changed = patch(changed) or changed
        torch.manual_seed(0)  # some of them draw
        outs.append(sample(changed, noise=x, steps=2))
    expected, one, equal = outs
    assert relative(expected, without) > 1e-3
    assert relative(one, expected) < 1e-4
    assert relative(equal, expected.expand(2, -1, -1, -1)) < 1e-4
