"""The training objective of tuning and its random draws."""

import hashlib

import torch
import torch.nn.functional as F
from diffusers import SchedulerMixin
from torch import Tensor

from .condition import Condition, VideoModel, predict
from .errors import TavError

TIMESTEP_SAMPLINGS = ("uniform", "stratified")
LOSS_WEIGHTINGS = ("none", "min_snr")
_STRATA = 16  # as many consecutive timesteps cover the range once
_MIN_SNR_GAMMA = 5.0  # arXiv 2303.09556


def tuning_loss(
    unet: VideoModel,
    scheduler: SchedulerMixin,
    latents: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    condition: Tensor | Condition,
    loss_weighting: str = "none",
) -> Tensor:
    """Mean squared error of what the model predicts for noised latents, a scalar (equation 3 of the paper).

    Args:
        latents, noise: float32 `b c f h w`.
        timesteps: int64 `b`, one per video.
        condition: of the clip; the embedding of its sentence alone will do.
        loss_weighting: "none" or "min_snr".

    Raises:
        TavError: a prediction type other than epsilon, v_prediction and sample.
    """
    alpha = scheduler.alphas_cumprod.to(latents.device)[timesteps].view(-1, 1, 1, 1, 1)  # b 1 1 1 1
    noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
    snr = (alpha / (1 - alpha)).flatten()  # b
    prediction_type = scheduler.config.prediction_type
    if prediction_type == "epsilon":
        target, weight = noise, (_MIN_SNR_GAMMA / snr).clamp(max=1)
    elif prediction_type == "v_prediction":
        target = alpha.sqrt() * noise - (1 - alpha).sqrt() * latents
        weight = snr.clamp(max=_MIN_SNR_GAMMA) / (snr + 1)
    elif prediction_type == "sample":
        target, weight = latents, snr.clamp(max=_MIN_SNR_GAMMA)
    else:
        raise TavError("prediction_type", prediction_type, "is unknown", "use epsilon, v_prediction or sample")
    predicted = predict(unet, noisy, timesteps, Condition.of(condition))
    if loss_weighting == "none":
        return F.mse_loss(predicted, target)
    return (weight * (predicted - target).square().mean(dim=(1, 2, 3, 4))).mean()


def draw_timesteps(sampling: str, seed: int, step: int, count: int, total: int) -> Tensor:
    """`count` training timesteps of a step, int64 in 0 ... total - 1, from the seed and the step alone.

    "uniform", or "stratified": every 16 consecutive draws take one timestep from each 16th of the range.
    """
    uniform = torch.rand(count, generator=generator_for(seed, "timesteps", step), dtype=torch.float64)
    if sampling == "stratified":
        strata = []
        for index in range(step * count, (step + 1) * count):
            block, position = divmod(index, _STRATA)
            order = torch.randperm(_STRATA, generator=generator_for(seed, "strata", block))
            strata.append(order[position])
        uniform = (torch.stack(strata) + uniform) / _STRATA
    return (uniform * total).long()


def draw_take(seed: int, step: int, count: int) -> int:
    """Which of `count` takes a step learns from; every `count` consecutive steps see each of them once."""
    block, position = divmod(step, count)
    return torch.randperm(count, generator=generator_for(seed, "takes", block))[position].item()


def generator_for(seed: int, purpose: str, index: int) -> torch.Generator:
    """The generator of one draw, so that resuming a run needs no generator state."""
    # hashed, because generators of neighbouring seeds are correlated; on the CPU, to be the same everywhere
    digest = hashlib.sha256(f"{seed}/{purpose}/{index}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
