"""A background that an edit draws anew stands as still as the clip's.

An edit is drawn from noise that differs a little from frame to frame, and what it makes up (waves, blades of grass)
differs with it. Where the clip shows the same thing in several frames, here the edit does so too: at every step its
clean latents are averaged over these frames (a cross-bilateral filter along time, Petschnig et al., SIGGRAPH 2004).
The steps that follow draw crisply what the average only hints at. Nothing is averaged where a camera or a thing moves.
"""

import torch
from torch import Tensor

STILL = 0.1  # root mean square over the channels, of latents with a standard deviation of about 1


def steadied(x0: Tensor, clip: Tensor, places: Tensor) -> Tensor:
    """Averages latents over the frames in which the clip is alike: frame g counts in frame f, at each place, as
    exp(-|clip_f - clip_g|^2 / 2 STILL^2), with the mean square over the channels.

    Args:
        x0: clean latents of the edit, `b c f h w`.
        clip: those of the clip, `b c f h w`.
        places: where, 0 ... 1, `b 1 f h w`; elsewhere `x0` neither changes nor counts.
    """
    frames = []
    for f in range(x0.shape[2]):
        here = slice(f, f + 1)
        distance = (clip - clip[:, :, here]).square().mean(1, keepdim=True)  # b 1 f h w
        weights = torch.exp(distance / (-2 * STILL**2)) * places
        mean = (weights * x0).sum(2) / weights.sum(2).clamp(min=1e-6)
        frames.append(torch.lerp(x0[:, :, f], mean, places[:, :, f]))
    return torch.stack(frames, 2)
