"""The state file of a tuning run: one safetensors file, weights and moments as tensors, the rest as JSON.

Tensors: `param.NAME`, `exp_avg.NAME`, `exp_avg_sq.NAME` (float32), `optimizer_step`, `losses` (float64), with a weight
average `average.NAME` (float32), and `kept.STEP.NAME` of every step whose weights are kept (see `halved`).
Metadata: format, step, config, fingerprint, probe_losses, loss_scale.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import inf, isfinite
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from .atomic import atomic_path
from .errors import TavError
from .stored import Damaged, check_finite, parsed, reading

FORMAT = "tune-a-video-state-1"


@dataclass
class TuneState:
    """A tuning run after `step` steps.

    Attributes:
        fingerprint: what must be equal for the run to go on: name to hash or value.
        losses: one per step.
        probe_losses: pairs of step and loss.
        loss_scale: factor of the fp16 loss, and the number of steps since it changed.
        average: the weights' running average by name, where the run has one.
        kept: weights of earlier steps, by step and name.
    """

    fingerprint: dict[str, Any]
    step: int = 0
    losses: list[float] = field(default_factory=list)
    probe_losses: list[tuple[int, float]] = field(default_factory=list)
    loss_scale: tuple[float, int] = (1.0, 0)
    average: dict[str, Tensor] = field(default_factory=dict)
    kept: dict[int, dict[str, Tensor]] = field(default_factory=dict)


def save_state(
    path: Path,
    state: TuneState,
    config: dict[str, Any],
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
) -> None:
    """Write the state atomically: after a crash there is the old file or the new one.

    Raises:
        TavError: the file cannot be written.
    """
    tensors = {"losses": torch.tensor(state.losses, dtype=torch.float64)}
    tensors |= {f"average.{name}": weight for name, weight in state.average.items()}
    for step, weights in state.kept.items():
        tensors |= {f"kept.{step}.{name}": weight for name, weight in weights.items()}
    for name, parameter in parameters.items():
        moments = optimizer.state.get(parameter)
        tensors[f"param.{name}"] = parameter.detach()
        if moments:  # none before the first step
            tensors[f"exp_avg.{name}"] = moments["exp_avg"]
            tensors[f"exp_avg_sq.{name}"] = moments["exp_avg_sq"]
            tensors["optimizer_step"] = moments["step"].reshape(1).clone()
    metadata = {
        "format": FORMAT,
        "step": state.step,
        "config": config,
        "fingerprint": state.fingerprint,
        "probe_losses": state.probe_losses,
        "loss_scale": state.loss_scale,
    }
    metadata = {key: value if key == "format" else json.dumps(value) for key, value in metadata.items()}
    with atomic_path(path) as temporary:
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, temporary, metadata)


def read_state(path: Path) -> tuple[TuneState, dict[str, Tensor]]:
    """The state and its tensors (on the CPU).

    Raises:
        TavError: not a state file, an unreadable or a damaged one.
    """
    with reading(path, "state", FORMAT, "unfinished tuning", "delete it to start over, or choose another one") as file:
        kinds = {"step": int, "fingerprint": dict, "probe_losses": list, "loss_scale": list}
        step, fingerprint, probe_losses, (scale, age) = parsed(file.metadata(), kinds).values()
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        check_finite(tensors)
        losses = tensors.pop("losses").tolist()
        probe_losses = [(int(at), float(value)) for at, value in probe_losses]
        if step < 0 or len(losses) != step:
            raise Damaged(f"step is {step}, with {len(losses)} losses")
        if not probe_losses or not all(0 <= at <= step and isfinite(value) for at, value in probe_losses):
            raise Damaged("probe_losses are not those of its steps")
        if not (0 < scale < inf and 0 <= age <= step):
            raise Damaged(f"loss_scale is {scale} for {age} steps")
        if any((moment < 0).any() for name, moment in tensors.items() if name.startswith("exp_avg_sq.")):
            raise Damaged("a square is negative")
        state = TuneState(fingerprint, step, losses, probe_losses, (float(scale), int(age)))
        for name in [name for name in tensors if name.startswith(("average.", "kept."))]:
            if name.startswith("average."):
                state.average[name.removeprefix("average.")] = tensors.pop(name)
            else:
                _, at, weight = name.split(".", 2)
                state.kept.setdefault(int(at), {})[weight] = tensors.pop(name)
        if not all(0 < at <= step for at in state.kept):
            raise Damaged(f"step is {step}, and it keeps {max(state.kept)}")
    return state, tensors


def restore(tensors: dict[str, Tensor], parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """Put stored weights and moments back in place."""
    for name, parameter in parameters.items():
        with torch.no_grad():
            parameter.copy_(tensors[f"param.{name}"])
        if "optimizer_step" in tensors:
            optimizer.state[parameter] = {
                "step": tensors["optimizer_step"][0].clone(),
                "exp_avg": tensors[f"exp_avg.{name}"].to(parameter.device),
                "exp_avg_sq": tensors[f"exp_avg_sq.{name}"].to(parameter.device),
            }


def check_same_run(path: Path, stored: TuneState, current: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Compare fingerprints of the run in the file and of the one about to start.

    Raises:
        TavError: they differ, and in what; or the tensors aren't those that the fingerprint tells of.
    """
    told, names = stored.fingerprint, current["trainable parameters"]
    different = [name for name in {**current, **told} if told.get(name) != current.get(name)]
    if "trainable parameters" not in different:
        kinds = ("param", "exp_avg", "exp_avg_sq") if "optimizer_step" in tensors else ("param",)
        wanted = {f"{kind}.{name}": s for kind in kinds for name, s in names.items()}
        found = {name: list(tensor.shape) for name, tensor in tensors.items()}
        others = [*stored.kept.values(), *([stored.average] if stored.average or "weight_average" in told else [])]
        others = [{name: list(weight.shape) for name, weight in each.items()} for each in others]
        if found.pop("optimizer_step", [1]) != [1] or found != wanted or any(each != names for each in others):
            raise TavError(
                "state", path, "is damaged (its tensors are not those of the U-Net)", "delete it to start over"
            )
    if different == ["initial weights"]:  # a model that holds the weights of this very state goes on, too
        weights = [stored.average.get(name, tensors[f"param.{name}"]) for name in names]
        if current["initial weights"] in (hash_tensors(weights), hash_tensors(tensors[f"param.{n}"] for n in names)):
            return
    if different:
        problem = f"belongs to another run ({', '.join(different)} changed)"
        raise TavError("state", path, problem, "choose another one, or delete it to start over")


def hash_tensors(tensors: Iterable[Tensor]) -> str:
    """SHA-256 (hex) of shapes, dtypes and values."""
    digest = hashlib.sha256()
    for tensor in tensors:
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{tuple(tensor.shape)} {tensor.dtype};".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
