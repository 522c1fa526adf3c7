"""The video U-Net against the 2D model it was made from, over block layouts and options."""

import copy
import json
import pickle

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from einops import rearrange

from support.led_sampling import led_sample
from support.tiny_unets import CROSS_DOWN, CROSS_UP, DOWN, UP, difference, inputs, make_unet, stir
from tav_core.attention import FrameAttnProcessor, FrameContext, sdpa, temporal_attention
from tav_core.condition import Condition, joined
from tav_core.errors import TavError
from tav_core.inflation import VideoUNet, inflate, norm_by_frames
from tav_core.recompute import MEMORY
from tav_core.subject import subject_mask
from tav_core.trainable import trainable_parameters

LAYOUTS = {
    "sd1": {},
    "sd2": dict(use_linear_projection=True, attention_head_dim=(2, 8), upcast_attention=True),
    "attention at the bottom": dict(down_block_types=(DOWN, CROSS_DOWN), up_block_types=(CROSS_UP, UP)),
    "attention only in down blocks": dict(up_block_types=(UP, UP), mid_block_type=None),
    "two layers": dict(layers_per_block=2, transformer_layers_per_block=(1, 2)),
    "scale_shift": dict(resnet_time_scale_shift="scale_shift"),
    "three levels": dict(
        block_out_channels=(16, 16, 32),
        down_block_types=(DOWN, CROSS_DOWN, CROSS_DOWN),
        up_block_types=(CROSS_UP, CROSS_UP, UP),
    ),
    "only cross-attention": dict(only_cross_attention=(True, False)),
    "resnet resampling": dict(
        down_block_types=(CROSS_DOWN, "ResnetDownsampleBlock2D"), up_block_types=("ResnetUpsampleBlock2D", CROSS_UP)
    ),
    "class labels": dict(num_class_embeds=5),
}


@pytest.mark.parametrize("norm", ["video", "frame"])
@pytest.mark.parametrize("attention", ["sparse-causal", "first", "full"])
@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_still_video_is_the_2d_model(layout, attention, norm):
    base = make_unet(**LAYOUTS[layout])
    unet = inflate(base, attention=attention, norm=norm)
    labels = {"class_labels": torch.tensor([1, 3])} if layout == "class labels" else {}
    x, t, text = inputs(b=2, f=1)
    expected = base(x[:, :, 0], t, text, **labels).sample
    assert difference(unet(x, t, text, **labels)[:, :, 0], expected) <= 5e-6
    still = unet(x.expand(-1, -1, 3, -1, -1), t, text, **labels)
    assert difference(still, expected[:, :, None].expand_as(still)) <= 5e-6


@pytest.mark.parametrize("layout", LAYOUTS)
def test_names_and_trainables(layout):
    base = make_unet(**LAYOUTS[layout])
    before = copy.deepcopy(base.state_dict())
    unet = inflate(base)
    blocks = [name for name, module in base.named_modules() if isinstance(module, BasicTransformerBlock)]
    new = [f"attn_temp.{p}" for p in ("to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight", "to_out.0.bias")]
    new += ["norm_temp.weight", "norm_temp.bias"]
    assert set(unet.state_dict()) == set(before) | {f"{block}.{name}" for block in blocks for name in new}
    assert set(dict(unet.named_parameters())) == set(unet.state_dict())
    trainable = {name for name, parameter in unet.named_parameters() if parameter.requires_grad}
    assert trainable == set(trainable_parameters(unet))
    assert len(trainable) == 7 * len(blocks)
    # the given model is as it was
    assert type(base) is UNet2DConditionModel and set(base.state_dict()) == set(before)
    assert all(parameter.requires_grad for parameter in base.parameters())
    assert not any(isinstance(p, FrameAttnProcessor) for p in base.attn_processors.values())


def test_inflation_is_deterministic_and_leaves_the_generator_alone():
    base = make_unet()
    torch.manual_seed(7)
    first, drawn = inflate(base), torch.rand(1)
    torch.manual_seed(7)
    assert torch.equal(drawn, torch.rand(1))
    second = inflate(base)
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values()))


@torch.no_grad()
def test_blocks_without_cross_attention():
    base = make_unet()
    for module in base.modules():
        if isinstance(module, BasicTransformerBlock):
            module.attn2 = module.norm2 = None
    unet = inflate(base)
    assert not any("attn2" in name for name in trainable_parameters(unet))
    x, t, text = inputs(f=1)
    assert difference(unet(x, t, text)[:, :, 0], base(x[:, :, 0], t, text).sample) <= 5e-6


@torch.no_grad()
def test_only_cross_attention_looks_at_the_text():
    block = make_unet(only_cross_attention=True).down_blocks[0].attentions[0].transformer_blocks[0]
    processor = FrameAttnProcessor(FrameContext(frames=3), "sparse-causal")
    x, text = torch.randn(3, 9, 16), torch.randn(3, 5, 24)
    assert difference(processor(block.attn1, x, text), block.attn1(x, text)) <= 1e-6


@torch.no_grad()
def test_frame_attention_modes():
    torch.manual_seed(0)
    attn = make_unet().down_blocks[0].attentions[0].transformer_blocks[0].attn1
    x = torch.randn(2 * 4, 9, 16)
    q, k, v = (rearrange(p(x), "(b f) n (h d) -> b f h n d", b=2, h=4) for p in (attn.to_q, attn.to_k, attn.to_v))
    looked_at = {"sparse-causal": lambda i: [0, max(i - 1, 0)], "first": lambda i: [0], "full": lambda i: range(4)}
    for mode, frames in looked_at.items():
        out = [sdpa(q[:, i], *(torch.cat([y[:, j] for j in frames(i)], dim=2) for y in (k, v))) for i in range(4)]
        expected = attn.to_out[0](rearrange(torch.stack(out, 1), "b f h n d -> (b f) n (h d)"))
        assert difference(FrameAttnProcessor(FrameContext(frames=4), mode)(attn, x), expected) <= 1e-6


@torch.no_grad()
def test_causal_temporal_attention_sees_no_later_frame():
    unet = stir(inflate(make_unet(), temporal_causal=True, norm="frame"))
    x, t, text = inputs(f=4)
    changed = x.clone()
    changed[:, :, 3] += 1
    assert difference(unet(x, t, text)[:, :, :3], unet(changed, t, text)[:, :, :3]) <= 1e-6
    attn = unet.mid_block.attentions[0].transformer_blocks[0].attn_temp
    y = torch.randn(2, 4, 32)
    assert difference(temporal_attention(attn, y, causal=True)[:, -1], temporal_attention(attn, y)[:, -1]) <= 1e-6


@torch.no_grad()
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", ["sparse-causal", "first", "full"])
def test_the_source_leads_the_attention(layout, mode):
    unet = stir(inflate(make_unet(**LAYOUTS[layout]), attention=mode))
    (source, _, text), labels = (
        inputs(),
        {"class_labels": torch.zeros(1, dtype=torch.long)} if layout == "class labels" else {},
    )
    other, wish = source.flip(2), text.flip(1)
    alone = [unet(x, 10, y, **labels) for x, y in ((source, text), (other, wish))]
    with unet.frame_context.running(sources=1):
        led = unet(torch.cat([source, other, source]), 10, torch.cat([text, wish, text]), **labels).split(1)
    assert difference(led[0], alone[0]) < 1e-5  # the source is as ever
    assert difference(led[2], alone[0]) < 1e-5  # who is like it, too
    assert difference(led[1], alone[1]) > 1e-4  # the other one isn't
    anchor = torch.zeros(3 * source.shape[2], 1, *source.shape[-2:])
    both, texts = torch.cat([source, other, source]), torch.cat([text, wish, text])
    with unet.frame_context.running(sources=1):
        nowhere, half = (
            unet(both, 10, texts, anchor=anchor - 1, **labels),
            unet(both, 10, texts, anchor=anchor - 0.5, **labels),
        )
    assert difference(nowhere[1:2], alone[1]) < 1e-5 and difference(nowhere[:1], alone[0]) < 1e-5
    assert min(difference(half[1:2], alone[1]), difference(half[1:2], led[1])) > 1e-5
    assert difference(unet(other, 10, wish, **labels), alone[1]) == 0  # and nothing of it stays


def test_led_attention_is_the_formula():
    torch.manual_seed(0)
    attn, x, frames = Attention(16, heads=2, dim_head=8), torch.randn(6, 5, 16), 3  # 2 videos
    own = FrameAttnProcessor(FrameContext(frames), "first")(attn, x)
    attn.to_q.register_forward_hook(lambda module, args, out: q.append(out))
    q: list = []
    led = FrameAttnProcessor(FrameContext(frames, sources=1), "first")(attn, x)
    assert q[0].shape == (3, 5, 16) and difference(led[:3], own[:3]) < 1e-6
    k, v = attn.to_k(x[:1]), attn.to_v(x[3:4])
    heads = [rearrange(y, "b n (heads d) -> b heads n d", heads=2) for y in (q[0], k, v)]
    weights = (heads[0] @ heads[1].mT / 8**0.5).softmax(-1)
    wanted = attn.to_out[0](rearrange(weights @ heads[2], "b heads n d -> b n (heads d)"))
    assert difference(led[3:], wanted) < 1e-6


@torch.no_grad()
def test_places_that_attend_by_themselves_are_those_of_the_anchor():
    unet, (source, _, text) = stir(inflate(make_unet())), inputs()
    block, seen = unet.down_blocks[0].attentions[0].transformer_blocks[0], []
    block.attn1.to_q.register_forward_hook(lambda module, args, out: seen.append(out))
    anchor = torch.zeros(2 * source.shape[2], 1, *source.shape[-2:])
    anchor[..., : source.shape[-1] // 2] = -1
    with unet.frame_context.running(sources=1):
        unet(torch.cat([source, source.flip(2)]), 10, torch.cat([text, text]), anchor=anchor)
    led, own = seen  # projections of the source alone, and of all
    assert (len(led), len(own)) == (source.shape[2], 2 * source.shape[2])
    (frames, places), (height, width) = led.shape[:2], source.shape[-2:]
    assert frames == source.shape[2] and places == height * width
    free = unet.frame_context
    with free.running(2, sources=1, anchor=anchor):
        assert torch.equal(free.forward.free(places)[..., 0], -anchor.flatten(1))
        small = free.forward.free(places // 4)[..., 0]
    assert small.shape == (len(anchor), places // 4) and set(small.flatten().tolist()) == {0, 1}


def test_attention_injection_in_sampling():
    unet, (noise, _, text) = stir(inflate(make_unet())), inputs()
    scheduler, wish = DDIMScheduler(clip_sample=False), text.flip(1)
    settings = dict(guidance_scale=3.0, negative_hidden_states=torch.zeros_like(text))
    calls = []
    unet.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))

    def sampled(words, **changes):
        return led_sample(unet, noise, words, scheduler, 4, **{**settings, **changes})

    led = [sampled(wish, attention_injection=share, source_hidden_states=text) for share in (0.0, 0.5, 1.0)]
    assert calls == [2] * 4 + [3, 3, 2, 2] + [3] * 4
    assert difference(led[0], sampled(wish)) == 0
    assert min(difference(led[0], led[1]), difference(led[1], led[2])) > 1e-3
    # a clip that is sampled as itself follows itself
    alone = dict(guidance_scale=1.0, attention_injection=1.0, source_hidden_states=text)
    assert difference(sampled(text, **alone), sampled(text, guidance_scale=1.0)) < 1e-4
    with pytest.raises(TavError, match="source_walk needs source_hidden_states"):
        sampled(wish, attention_injection=0.5)
    with pytest.raises(TavError, match="attention_injection=1.5 is out of range; give a number from 0 to 1"):
        sampled(wish, attention_injection=1.5, source_hidden_states=text)


@torch.no_grad()
def test_texts_of_several_lengths_meet_as_if_each_were_alone():
    """Negative, source and edit of 5, 10 and 15 tokens."""
    unet, (noise, _, text), scheduler = stir(inflate(make_unet())), inputs(), DDIMScheduler(clip_sample=False)
    long, longer = (torch.cat([part[None] for part in inputs(b=n)[2]], 1) for n in (2, 3))
    assert (text.shape[1], long.shape[1], longer.shape[1]) == (5, 10, 15)
    settings = dict(guidance_scale=3.0, attention_injection=0.5)

    def sampled(words, negative, source):
        told = dict(negative_hidden_states=negative, source_hidden_states=source)
        return led_sample(unet, noise, words, scheduler, 4, **told, **settings)

    mixed = sampled(longer, text, long)
    assert difference(mixed, sampled(longer.repeat(1, 2, 1), text.repeat(1, 6, 1), long.repeat(1, 3, 1))) < 1e-3
    assert difference(mixed, sampled(longer, longer, long)) > 0.1
    both = joined({"condition": (Condition(text), 1), "other": (Condition(longer), 1)}, 3).encoder_hidden_states
    alone = torch.cat([unet(noise, 500, words) for words in (text, longer)])
    assert difference(unet(torch.cat([noise] * 2), 500, both), alone) < 1e-5 < 1e-2 < difference(*alone)
    found = [subject_mask(unet, noise, text, other, scheduler) for other in (longer, longer.repeat(1, 2, 1))]
    assert torch.equal(*found)


def test_timesteps_and_text_come_in_many_forms():
    unet = stir(inflate(make_unet()))
    x, t, text = inputs(b=2)
    text[1] = text[0]
    expected = unet(x, torch.tensor([100, 100]), text)
    for same in (100, 100.0, torch.tensor(100), torch.tensor([100]), torch.tensor(100.0)):
        assert difference(unet(x, same, text), expected) <= 5e-6
    assert difference(unet(x, 100, text[:1]), expected) <= 5e-6
    assert difference(unet(x, 100, text.repeat_interleave(3, 0)), expected) <= 5e-6
    alone = torch.cat([unet(x[i : i + 1], t[i], text[:1]) for i in range(2)])
    assert difference(unet(x, t, text), alone) <= 5e-6
    odd = torch.randn(1, 4, 2, 9, 7)
    assert unet(odd, 5, text[:1]).shape == odd.shape


@torch.no_grad()
def test_conditioning_and_residuals_go_through():
    conditioned = dict(
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=12 + 6 * 8
    )
    base = make_unet(**conditioned)
    unet = inflate(base)
    x, t, text = inputs(b=2, f=1)
    added = {"text_embeds": torch.randn(2, 12), "time_ids": torch.randn(2, 6)}
    down = [torch.randn(2, c, s, s) for c, s in ((16, 8), (16, 8), (16, 4), (32, 4))]
    mid, adapter = torch.randn(2, 32, 4, 4), [torch.randn(2, 16, 8, 8), torch.randn(2, 32, 4, 4)]
    for residuals in (
        {"down_block_additional_residuals": tuple(down), "mid_block_additional_residual": mid},
        {"down_intrablock_additional_residuals": adapter},
    ):
        lists = {k: list(v) if isinstance(v, list) else v for k, v in residuals.items()}
        expected = base(x[:, :, 0], t, text, added_cond_kwargs=added, **lists).sample
        assert difference(unet(x, t, text, added_cond_kwargs=added, **residuals)[:, :, 0], expected) <= 5e-6
        repeated = {
            k: [r.repeat_interleave(3, 0) for r in v] if isinstance(v, (list, tuple)) else v.repeat_interleave(3, 0)
            for k, v in residuals.items()
        }
        still = unet(x.expand(-1, -1, 3, -1, -1), t, text, added_cond_kwargs=added, **repeated)
        assert difference(still, expected[:, :, None].expand_as(still)) <= 1e-5
    assert len(adapter) == 2  # diffusers pops from the list it gets


@torch.no_grad()
def test_text_mask_goes_through():
    base = make_unet()
    x, t, text = inputs(f=1)
    mask = torch.tensor([[1, 1, 1, 0, 0]])
    expected = base(x[:, :, 0], t, text, encoder_attention_mask=mask).sample
    assert difference(inflate(base)(x, t, text, encoder_attention_mask=mask)[:, :, 0], expected) <= 5e-6


@torch.no_grad()
def test_attention_can_be_replaced_and_copies_are_independent():
    unet = stir(inflate(make_unet()))
    x, t, text = inputs()
    expected, calls = unet(x, t, text), []

    def counted(q, k, v, mask=None):
        calls.append(q.shape)
        return sdpa(q, k, v, mask)

    twin = copy.deepcopy(unet)
    twin.frame_context.set(attention_fn=counted)
    assert torch.equal(unet(x, t, text), expected) and not calls
    assert torch.equal(twin(x, t, text), expected)
    assert (
        len(calls) == 4 * 4
    )  # spatial attention (of frames 0 and 1, and of the others), text and temporal, of four blocks


def gradients(unet, out):
    for parameter in unet.parameters():
        parameter.grad = None
    out.square().mean().backward()
    return {name: parameter.grad for name, parameter in unet.named_parameters() if parameter.grad is not None}


def distance(found, exact):
    """Relative to all of the exact gradient."""
    return (
        sum((found[name] - exact[name]).square().sum() for name in exact).sqrt()
        / sum(g.square().sum() for g in exact.values()).sqrt()
    )


@pytest.mark.parametrize("memory", MEMORY[1:])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_checkpointing(layout, memory):
    """A product of fewer rows may end in other last bits, but no mode may be further from the exact gradient than
    rounding is.
    """
    unet = stir(inflate(make_unet(**LAYOUTS[layout])))
    labels = {"class_labels": torch.tensor([1])} if layout == "class labels" else {}
    x, t, text = inputs()
    precise = copy.deepcopy(unet).double()
    exact = gradients(precise, precise(x.double(), t, text.double(), **labels))
    plain = gradients(unet, unet(x, t, text, **labels))
    assert set(plain) == set(trainable_parameters(unet)) == set(exact)
    unet.set_memory(memory)
    assert unet.is_gradient_checkpointing
    out = unet(x, t, text, **labels)
    unet(x[:, :, :2], t, text, **labels)  # the recomputation must not take this frame count
    checkpointed = gradients(unet, out)
    assert set(checkpointed) == set(plain)
    assert distance(plain, exact) < 1e-5 and distance(checkpointed, exact) < 2 * distance(plain, exact)
    unet.disable_gradient_checkpointing()
    assert not unet.is_gradient_checkpointing


def test_gradient_checkpointing_of_the_2d_model_is_kept():
    base = make_unet()
    base.enable_gradient_checkpointing()
    assert inflate(base).is_gradient_checkpointing and base.is_gradient_checkpointing


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_norms_put_together_from_frames_are_those_of_the_clip(dtype, tolerance):
    """What a GPU computes: frames of unlike brightness, far from 0, two videos."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 16, 5, 7, generator=generator) * 3 + torch.arange(6.0)[:, None, None, None] * 4
    norm = torch.nn.GroupNorm(4, 16).requires_grad_(False)
    norm.weight.normal_(generator=generator), norm.bias.normal_(generator=generator)
    x, norm = x.to(dtype), norm.to(dtype)
    whole = norm.float()(rearrange(x.float(), "(b f) c h w -> b c f h w", f=3))
    found = norm_by_frames(norm.to(dtype), x, frames=3)
    assert found.dtype == dtype and found.shape == x.shape
    assert (found.float() - rearrange(whole, "b c f h w -> (b f) c h w")).abs().max() < tolerance * whole.abs().max()


def test_half_precision_and_dtype():
    unet = inflate(make_unet().to(torch.bfloat16))
    assert {parameter.dtype for parameter in unet.parameters()} == {torch.bfloat16}
    x, t, text = inputs()
    assert unet(x.bfloat16(), t, text.bfloat16()).dtype == torch.bfloat16


def test_mistakes_are_named():
    base = make_unet()
    unet = inflate(base)
    x, t, text = inputs(b=2)
    for call, message in (
        (lambda: inflate(base, attention="causal"), "attention='causal'"),
        (lambda: inflate(base, norm="layer"), "norm='layer'"),
        (lambda: inflate(unet), "inflated already"),
        (lambda: inflate(torch.nn.Linear(1, 1)), "Linear"),
        (
            lambda: inflate(make_unet(down_block_types=(DOWN, DOWN), up_block_types=(UP, UP), mid_block_type=None)),
            "no transformer block",
        ),
        (lambda: unet(x[:, :, 0], t, text), "latents must be b c f h w"),
        (lambda: unet(x, torch.arange(3), text), "timesteps"),
        (lambda: unet(x, t, text[0]), "encoder_hidden_states must be b n d"),
        (lambda: unet(x, t, text.repeat(2, 1, 1)), "encoder_hidden_states has a batch of 4"),
        (lambda: unet(x, t, text, attention_mask=torch.ones(2, 64)), "attention_mask"),
    ):
        with pytest.raises(TavError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


@torch.no_grad()
def test_pickles_and_copies_compute_the_same_and_classes_are_shared():
    unet, twin = stir(inflate(make_unet())), inflate(make_unet())
    x, t, text = inputs()
    for other in (pickle.loads(pickle.dumps(unet)), copy.deepcopy(unet)):
        assert torch.equal(other(x, t, text), unet(x, t, text))
        assert other.frame_context is not unet.frame_context
        assert all(module.frame_context is other.frame_context for module in other.modules()
                   if hasattr(module, "frame_context"))  # fmt: skip
        other.set_memory("low")
        assert (
            unet.memory == "fast"
            and [m.recomputed for m in unet.modules() if hasattr(m, "recomputed")].count(True) == 0
        )
    kinds = {type(module) for module in [*unet.modules(), *twin.modules()]}
    assert len(kinds) == len({type(module) for module in unet.modules()})


@pytest.mark.parametrize("layout", ["sd2", "two layers", "scale_shift", "class labels"])
@torch.no_grad()
def test_saved_and_read_it_is_the_same(layout, tmp_path):
    options = dict(attention="first", temporal_causal=True, norm="frame")
    unet = stir(inflate(make_unet(**LAYOUTS[layout]), **options)).eval()
    unet.save_pretrained(tmp_path / "whole")
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert config["_class_name"] == "UNet3DConditionModel" and "CrossAttnDownBlock3D" in config["down_block_types"]
    read = VideoUNet.from_pretrained(tmp_path / "whole")
    assert type(read) is VideoUNet and read.inflation == options and not read.training
    assert unet.state_dict().keys() == read.state_dict().keys()
    assert all(torch.equal(read.state_dict()[name], value) for name, value in unet.state_dict().items())
    assert trainable_parameters(read).keys() == {n for n, p in read.named_parameters() if p.requires_grad}
    x, t, text = inputs(b=2)
    labels = {"class_labels": torch.tensor([1, 3])} if layout == "class labels" else {}
    assert torch.equal(read(x, t, text, **labels), unet(x, t, text, **labels))
    halves = VideoUNet.from_pretrained(tmp_path / "whole", torch_dtype=torch.float16, output_loading_info=True)
    assert halves[0].dtype == torch.float16 and not halves[1]["missing_keys"]
    assert VideoUNet.from_config(unet.config).config.block_out_channels == list(unet.config.block_out_channels)


def test_reading_never_invents_weights(tmp_path):
    make_unet().save_pretrained(tmp_path / "flat")
    with pytest.raises(TavError, match="lacks .* weights of a video U-Net .*inflate it"):
        VideoUNet.from_pretrained(tmp_path / "flat")


def test_loras_must_be_fused_first():
    class Lora(torch.nn.Module):  # as PEFT wraps a layer, also once it is merged
        def __init__(self, layer):
            super().__init__()
            self.base_layer, self.lora_A, self.lora_B = layer, torch.nn.Linear(32, 2), torch.nn.Linear(2, 32)

    base = make_unet()
    block = next(module for module in base.modules() if isinstance(module, BasicTransformerBlock))
    block.attn1.to_q = Lora(block.attn1.to_q)
    with pytest.raises(TavError, match=r"has a LoRA beside its weights \(.*attn1.to_q\); .*fuse_lora"):
        inflate(base)


def test_class_swap_keeps_the_type():
    unet = inflate(make_unet())
    assert isinstance(unet, VideoUNet) and isinstance(unet, UNet2DConditionModel)
    assert unet.config.cross_attention_dim == 24
