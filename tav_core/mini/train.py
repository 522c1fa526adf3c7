"""Trains the mini checkpoint from scratch: VAE, then text encoder and U-Net together, then the judge.

    python -m tav_core.mini train all --work DIR            # hours on two CPU cores, minutes on a GPU
    python -m tav_core.mini train unet --work DIR --steps 4000

Each stage keeps its state in `DIR/<stage>.safetensors` (weights, moving average, AdamW moments, step), written
atomically, and goes on from there when it is started again.
"""

import json
import math
import random
import shutil
import string
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from einops import rearrange
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import nn
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ..atomic import atomic_path
from ..errors import TavError, field
from ..precision import half_precision_cost
from . import world
from .judge import Judge, judge_loss
from .preview import LATENT_COLOURS, write_latent_colours

TOKENS = 32
WIDTH = 96  # of the text encoder
CHANNELS = (64, 128)  # of the U-Net's levels, multiples of its 16 groups


# ------------------------------------------------------------------------------------------------ the data


def training_scenes(count: int, seed: int = 0) -> list[world.Scene]:
    """Random scenes without the held-out combinations."""
    rng = random.Random(seed)
    allowed = sorted(set(world.combinations()) - world.held_out())
    return [world.random_scene(rng, rng.choice(allowed)) for _ in range(count)]


def render_all(scenes: list[world.Scene], path: Path) -> np.ndarray:
    """The rendered scenes, uint8 `n h w 3`, cached in `path`."""
    if not path.exists():
        images = np.stack([world.render(s) for s in tqdm(scenes, desc="render")])
        with atomic_path(path) as temporary:
            np.save(temporary, images)
    return np.load(path, mmap_mode="r")


def training_caption(scene: world.Scene, rng: random.Random) -> str:
    """A caption as people write them: with a verb or without, now and then empty or with an unknown word."""
    if rng.random() < 0.1:
        return ""  # for classifier-free guidance
    text = world.caption(scene, rng.choice([None, *world.MOTIONS]))
    if scene.style == "plain" and rng.random() < 0.3:
        text += ", plain style"
    if rng.random() < 0.1:  # a word that it doesn't know must not disturb the others
        known = rng.choice([scene.shape, scene.colour, scene.background])
        text = text.replace(known, "".join(rng.choices(string.ascii_lowercase, k=rng.randint(3, 8))), 1)
    return text


def make_tokenizer(folder: Path) -> CLIPTokenizer:
    """A CLIP tokenizer whose merges make every word of the world one token; other words fall into letters.

    Written to `folder` once: merges that are equally frequent come out in another order each time.
    """
    if (folder / "tokenizer_config.json").exists():
        return CLIPTokenizer.from_pretrained(folder)
    rng = random.Random(0)
    scenes = [world.Scene(s, c, b, t) for s, c, b, t in world.combinations()]
    corpus = [world.caption(s, rng.choice(list(world.MOTIONS))) + ", plain style" for s in scenes]
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(",", "isolated"), pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(False)]
    )
    trainer = trainers.BpeTrainer(vocab_size=10_000, end_of_word_suffix="</w>", show_progress=False, min_frequency=1)
    bpe.train_from_iterator(corpus, trainer)
    merges = [tuple(m) for m in json.loads(bpe.to_str())["model"]["merges"]]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*letters, *(x + "</w>" for x in letters), *("".join(m) for m in merges)]
    pieces = list(dict.fromkeys(pieces)) + ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}, ensure_ascii=False))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *(" ".join(m) for m in merges)]) + "\n")
    special = dict(
        bos_token="<|startoftext|>",
        eos_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        model_max_length=TOKENS,
    )
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer", **special}, indent=2))
    return CLIPTokenizer.from_pretrained(folder)


# ---------------------------------------------------------------------------------------------- the models


def make_vae() -> AutoencoderKL:
    """Downscale 8, 4 latent channels. One norm group: with more, the small channels lose whole colours."""
    vae = AutoencoderKL(
        block_out_channels=(16, 32, 64, 96),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=1,
        latent_channels=4,
        mid_block_add_attention=False,
        sample_size=world.SIZE,
    )
    with torch.no_grad():  # a narrow posterior at the start, or the decoder learns to ignore it
        vae.quant_conv.bias[4:] = -6.0
    return vae


def make_unet(channels: Sequence[int] = CHANNELS) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=world.SIZE // 8,
        block_out_channels=tuple(channels),
        layers_per_block=1,
        norm_num_groups=16,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
    )


def kind_of(channels: Sequence[int], prediction_type: str) -> str:
    """What tells a U-Net from the one that ships, which has none."""
    shipped = tuple(channels) == CHANNELS and prediction_type == "epsilon"
    return "" if shipped else f"{'-'.join(map(str, channels))} {prediction_type}"


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            projection_dim=WIDTH,
        )
    )


def make_unet_and_text_encoder(tokenizer: CLIPTokenizer, channels: Sequence[int] = CHANNELS) -> nn.ModuleDict:
    return nn.ModuleDict({"unet": make_unet(channels), "text_encoder": make_text_encoder(tokenizer)})


def make_scheduler(prediction_type: str = "epsilon") -> DDIMScheduler:
    return DDIMScheduler(
        prediction_type=prediction_type,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


# ---------------------------------------------------------------------------------------------- the loop


def fit(
    model: nn.Module,
    loss_of_step,
    path: Path,
    *,
    steps: int,
    lr: float,
    ema: float,
    kind: str = "",
    save_seconds: float = 120,
):
    """AdamW with warm-up and cosine decay, a moving average of the weights, and a state file to resume from.

    `loss_of_step(step)` draws its batch from a generator seeded by the step. `load_average` reads the result.

    Args:
        kind: of the model, which the state is of.

    Raises:
        TavError: a state of another kind.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=1e-2)
    names = [name for name, _ in model.named_parameters()]
    average = {name: p.detach().clone() for name, p in model.named_parameters()}
    start = 0
    if path.exists():
        check_kind(path, kind)
        with safe_open(path, "pt") as file:
            start = int(file.metadata()["step"])
            model.load_state_dict({n: file.get_tensor(f"model.{n}") for n in model.state_dict()})
            average = {n: file.get_tensor(f"average.{n}").to(average[n].device) for n in names}
            for name, p in model.named_parameters():
                optimizer.state[p] = {k: file.get_tensor(f"adam.{k}.{name}") for k in ("exp_avg", "exp_avg_sq", "step")}
            optimizer.load_state_dict(optimizer.state_dict())  # moves the moments to the parameters' device

    def save(step: int):
        tensors = {f"model.{n}": t for n, t in model.state_dict().items()}
        tensors |= {f"average.{n}": t for n, t in average.items()}
        for name, p in model.named_parameters():
            tensors |= {f"adam.{k}.{name}": v for k, v in optimizer.state[p].items()}
        with atomic_path(path) as temporary:
            save_file(
                {k: v.detach().contiguous().cpu().clone() for k, v in tensors.items()},
                temporary,
                metadata={"step": str(step), "kind": kind},
            )

    last_save, smooth = time.time(), None
    bar = tqdm(range(start, steps), initial=start, total=steps, desc=path.stem, mininterval=10)
    for step in bar:
        rate = lr * min(1.0, (step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = loss_of_step(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        decay = min(ema, (step + 1) / (step + 10))
        torch._foreach_lerp_(list(average.values()), [p.detach() for p in model.parameters()], 1 - decay)
        smooth = loss.item() if smooth is None else 0.98 * smooth + 0.02 * loss.item()
        bar.set_postfix(loss=f"{smooth:.4f}", refresh=False)
        if time.time() - last_save > save_seconds or step + 1 == steps:
            save(step + 1)
            last_save = time.time()


def check_kind(path: Path, kind: str):
    """Raises a TavError if a state file is of another kind of model."""
    with safe_open(path, "pt") as file:
        found = file.metadata().get("kind", "")
    if found != kind:
        problem = f"holds {path.name} of another model ({found or 'that by default'})"
        raise TavError("work", path.parent, problem, f"choose another {field('work')}, or go on with that one")


def load_average(model: nn.Module, path: Path) -> nn.Module:
    """Fills a model with the averaged weights of a state file."""
    with safe_open(path, "pt") as file:
        weights = {name: file.get_tensor(f"average.{name}") for name, _ in model.named_parameters()}
    model.load_state_dict(weights, strict=False)  # buffers are constants
    return model.eval()


def autocast(device: torch.device):
    """bfloat16, but where the CPU is no quicker in it."""
    quicker = device.type != "cpu" or half_precision_cost(torch.bfloat16) < 1
    return torch.autocast(device.type, torch.bfloat16, enabled=quicker)


def to_pixels(images: np.ndarray, device: torch.device) -> torch.Tensor:
    x = torch.from_numpy(np.ascontiguousarray(images)).to(device)
    return rearrange(x, "b h w c -> b c h w").float() / 127.5 - 1


def train_vae(work: Path, device: torch.device, renders: int, steps: int, batch: int, lr: float):
    """L1 on pixels and on their differences (edges), and a slight KL term that keeps the latents smooth."""
    torch.manual_seed(1)
    images = render_all(training_scenes(renders), work / "renders.npy")
    vae = make_vae().to(device, memory_format=torch.channels_last)

    def loss_of_step(step: int) -> torch.Tensor:
        rng = np.random.default_rng((1, step))
        x = to_pixels(images[np.sort(rng.choice(len(images), batch, replace=False))], device)
        torch.manual_seed(step)
        with autocast(device):
            posterior = vae.encode(x.to(memory_format=torch.channels_last)).latent_dist
            y = vae.decode(posterior.sample()).sample.float()
        error = y - x
        edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        kl = 0.5 * (posterior.mean.float().square() + posterior.var.float() - 1 - posterior.logvar.float()).mean()
        return error.abs().mean() + error.square().mean() + 0.5 * edges + 2e-5 * kl

    fit(vae, loss_of_step, work / "vae.safetensors", steps=steps, lr=lr, ema=0.998)


@torch.no_grad()
def encode_all(
    vae: AutoencoderKL, images: np.ndarray, path: Path, device: torch.device
) -> tuple[np.ndarray, np.ndarray]:
    """Posterior mean and std of every render, fp16 `n c h w` each, cached in `path`."""
    if not path.exists():
        moments = []
        for at in tqdm(range(0, len(images), 32), desc="encode"):
            with autocast(device):
                posterior = vae.encode(to_pixels(images[at : at + 32], device)).latent_dist
            moments.append(torch.stack([posterior.mean, posterior.std], 1).half().cpu().numpy())
        with atomic_path(path) as temporary:
            np.save(temporary, np.concatenate(moments))
    moments = np.load(path)  # n 2 c h w
    return moments[:, 0], moments[:, 1]


def scaling_factor(mean: np.ndarray) -> float:
    """Brings latents to unit standard deviation."""
    return round(1 / float(mean[:2000].astype(np.float32).std()), 5)


def noisy_batch(
    mean: np.ndarray, std: np.ndarray, scale: float, batch: int, rng: np.random.Generator, device: torch.device
) -> tuple[np.ndarray, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Latents of random renders with noise at random timesteps.

    Returns: the numbers of the renders `b`, noisy latents `b c h w`, timesteps `b`, the noise `b c h w`, and the weight
    of its prediction's error `b 1 1 1`.
    """
    chosen = rng.integers(len(mean), size=batch)
    draw = rng.standard_normal((2, *mean[chosen].shape), dtype=np.float32)
    latents = torch.from_numpy((mean[chosen] + std[chosen] * draw[0]) * scale).float().to(device)
    noise = torch.from_numpy(draw[1]).to(device)
    # stratified timesteps: each batch covers the whole range
    t = torch.from_numpy(((np.arange(batch) + rng.random(batch)) * 1000 / batch).astype(np.int64)).to(device)
    a = make_scheduler().alphas_cumprod.to(device)[t].view(-1, 1, 1, 1)
    # less weight where little noise is left (Hang et al. 2023, arXiv 2303.09556): shapes are settled earlier
    weight = (5 * (1 - a) / a).clamp(0.2, 1.0)
    return chosen, a.sqrt() * latents + (1 - a).sqrt() * noise, t, noise, weight


def train_unet(
    work: Path,
    device: torch.device,
    renders: int,
    steps: int,
    batch: int,
    lr: float,
    channels: Sequence[int] = CHANNELS,
    prediction_type: str = "epsilon",
):
    """Noise prediction on cached latents, or v-prediction; the text encoder learns with the U-Net."""
    torch.manual_seed(2)
    scenes = training_scenes(renders)
    vae = load_average(make_vae(), work / "vae.safetensors").to(device)
    mean, std = encode_all(vae, render_all(scenes, work / "renders.npy"), work / "moments.npy", device)
    scale = scaling_factor(mean)
    tokenizer = make_tokenizer(work / "tokenizer")
    both = make_unet_and_text_encoder(tokenizer, channels).to(device)
    alphas = make_scheduler().alphas_cumprod.to(device)

    def loss_of_step(step: int) -> torch.Tensor:
        words = random.Random(step)
        chosen, noisy, t, noise, weight = noisy_batch(mean, std, scale, batch, np.random.default_rng((2, step)), device)
        captions = [training_caption(scenes[i], words) for i in chosen]
        ids = tokenizer(
            captions, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt"
        ).input_ids
        with autocast(device):
            text = both["text_encoder"](ids.to(device)).last_hidden_state
            predicted = both["unet"](noisy, t, text).sample.float()
        if prediction_type == "v_prediction":  # the noise that v stands for
            a = alphas[t].view(-1, 1, 1, 1)
            predicted = a.sqrt() * predicted + (1 - a).sqrt() * noisy
        return (weight * (predicted - noise).square()).mean()

    kind = kind_of(channels, prediction_type)
    fit(both, loss_of_step, work / "unet.safetensors", steps=steps, lr=lr, ema=0.998, kind=kind)


@torch.no_grad()
def decode_half(vae: AutoencoderKL, images: np.ndarray, path: Path) -> np.ndarray:
    """Every other picture (uint8 `n h w 3`) replaced by what the VAE makes of it, cached in `path`."""
    if not path.exists():
        images = np.array(images)
        for at in tqdm(range(0, len(images), 64), desc="decode"):
            with autocast(vae.device):
                pixels = vae(to_pixels(images[at : at + 64 : 2], vae.device)).sample
            pixels = ((pixels.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
            images[at : at + 64 : 2] = rearrange(pixels, "b c h w -> b h w c").cpu().numpy()
        with atomic_path(path) as temporary:
            np.save(temporary, images)
    return np.load(path, mmap_mode="r")


def judged_scenes(count: int) -> list[world.Scene]:
    """Random scenes of every combination, and a fifth with what the checkpoint never sees, so that clips of it can be
    judged.
    """
    rng = random.Random(3)
    scenes = [world.random_scene(rng) for _ in range(count)]
    for i in range(0, len(scenes), 5):
        scenes[i] = replace(
            scenes[i], pattern=rng.choice(world.PATTERNS), second_colour=rng.choice(list(world.COLOURS))
        )
        if rng.random() < 0.4:
            scenes[i] = replace(scenes[i], shape=rng.choice(list(world.UNKNOWN_SHAPES)))
        if rng.random() < 0.4:
            scenes[i] = replace(scenes[i], background=rng.choice(list(world.UNKNOWN_BACKGROUNDS)))
    return scenes


def train_judge(work: Path, device: torch.device, renders: int, steps: int, batch: int, lr: float):
    """The judge sees every combination and the unknown content, every other picture as the VAE decodes it."""
    torch.manual_seed(3)
    scenes = judged_scenes(renders)
    vae = load_average(make_vae(), work / "vae.safetensors").to(device)
    images = decode_half(vae, render_all(scenes, work / "judge_renders.npy"), work / "judge_images.npy")
    judge = Judge().to(device, memory_format=torch.channels_last)

    def loss_of_step(step: int) -> torch.Tensor:
        rng = np.random.default_rng((3, step))
        chosen = np.sort(rng.choice(len(images), batch, replace=False))
        with autocast(device):
            return judge_loss(judge, to_pixels(images[chosen], device), [scenes[i] for i in chosen], step)

    fit(judge, loss_of_step, work / "judge.safetensors", steps=steps, lr=lr, ema=0.995)


def export(work: Path, output: Path, channels: Sequence[int] = CHANNELS, prediction_type: str = "epsilon"):
    """Writes `checkpoint/`, a diffusers folder, and `judge.safetensors`, both in fp16."""
    vae = load_average(make_vae(), work / "vae.safetensors")
    vae.register_to_config(scaling_factor=scaling_factor(np.load(work / "moments.npy", mmap_mode="r")[:, 0]))
    tokenizer = make_tokenizer(work / "tokenizer")
    check_kind(work / "unet.safetensors", kind_of(channels, prediction_type))
    both = load_average(make_unet_and_text_encoder(tokenizer, channels), work / "unet.safetensors")
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=both["text_encoder"],
        tokenizer=tokenizer,
        unet=both["unet"],
        scheduler=make_scheduler(prediction_type),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).to(torch.float16).save_pretrained(output / "checkpoint", safe_serialization=True)
    # the two plain files that every version of transformers reads, instead of what the installed one writes
    shutil.rmtree(output / "checkpoint" / "tokenizer")
    shutil.copytree(work / "tokenizer", output / "checkpoint" / "tokenizer")
    write_latent_colours(vae.float(), output / "checkpoint" / LATENT_COLOURS)
    judge = load_average(Judge(), work / "judge.safetensors")
    with atomic_path(output / "judge.safetensors") as temporary:
        save_file({name: tensor.half().contiguous() for name, tensor in judge.state_dict().items()}, temporary)
