"""What a LoRA and its kin change of a weight: each kind is a function of its factors, as ComfyUI computes them.

LoHa, LoKr and the third factor of a LoCon are those of LyCORIS (Yeh et al., arXiv 2309.14859), DoRA is that of Liu et
al., arXiv 2402.09353. Factors have the names that files of LyCORIS give them.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Factors = Mapping[str, Tensor]
Scale = Callable[[int], float]  # alpha / rank, of a rank


def _lora(of: Factors, scale: Scale) -> Tensor:
    down, up = of["lora_down"], of["lora_up"].flatten(1)
    if "lora_mid" in of:
        return scale(len(down)) * _tucker(of["lora_mid"], up.T, down.flatten(1))
    return scale(len(down)) * (up @ down.flatten(1))


def _loha(of: Factors, scale: Scale) -> Tensor:
    first, second = (_product(of, f"hada_w{n}", f"hada_t{n}") for n in (1, 2))
    return scale(len(of["hada_w1_b"])) * (first * second)


def _lokr(of: Factors, scale: Scale) -> Tensor:
    whole = {n: of.get(f"lokr_w{n}") for n in (1, 2)}
    first, second = (_product(of, f"lokr_w{n}", f"lokr_t{n}") if w is None else w for n, w in whole.items())
    first = first.reshape(*first.shape, *[1] * (second.ndim - first.ndim))
    ranks = [len(of[f"lokr_w{n}_b"]) for n, w in whole.items() if w is None]
    return torch.kron(first, second) * (scale(ranks[-1]) if ranks else 1.0)  # two whole factors have no rank


def _difference(of: Factors, scale: Scale) -> Tensor:
    return of["diff"]


# by name, the function of a kind and the factors that it may have
KINDS = {
    "LoRA": (_lora, ("lora_down", "lora_up", "lora_mid")),
    "LoHa": (_loha, ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")),
    "LoKr": (_lokr, ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")),
    "difference": (_difference, ("diff",)),
}
MAGNITUDES = ("dora_scale", "lora_magnitude_vector")  # of DoRA, beside the factors of a kind


def change(weight: Tensor, of: Factors, scale: Scale) -> Tensor:
    """What an adapter at strength 1 adds to a weight, in its shape. Also computes on the device "meta".

    Args:
        weight: float32.
        of: factors of one of the `KINDS`, perhaps with one of the `MAGNITUDES`.

    Raises:
        KeyError: a factor is missing.
        RuntimeError, ValueError, IndexError, TypeError: shapes that don't go together.
    """
    function = next(function for function, names in KINDS.values() if of.keys() & set(names))
    added = function(of, scale)
    theirs, ours = ("{} x {}".format(*x.reshape(len(x), -1).shape) for x in (added, weight))
    if theirs != ours:
        raise ValueError(f"{theirs}; the checkpoint: {ours}")
    added = added.reshape(weight.shape)
    if "dora_scale" in of:
        return _of_length(weight, added, of["dora_scale"]) - weight
    if "lora_magnitude_vector" in of:  # peft has one number for each output, in several shapes
        whole = weight + added
        return whole * _along(0, of["lora_magnitude_vector"], whole) / _norms(whole, 0) - weight
    return added


def _of_length(weight: Tensor, added: Tensor, lengths: Tensor) -> Tensor:
    """The sum with these lengths along its outputs or inputs, by what ComfyUI takes for its own: for outputs (LyCORIS'
    `wd_on_output`) those of the weight itself, for inputs those of the sum.
    """
    whole = weight + added
    if len(lengths) == len(weight):
        return whole * _along(0, lengths, whole) / _norms(weight, 0)
    return whole * _along(1, lengths, whole) / _norms(whole, 1)


def _norms(x: Tensor, dim: int) -> Tensor:
    others = [each for each in range(x.ndim) if each != dim]
    return torch.linalg.vector_norm(x, dim=others, keepdim=True) + torch.finfo(x.dtype).eps


def _along(dim: int, vector: Tensor, x: Tensor) -> Tensor:
    return vector.reshape([x.shape[dim] if each == dim else 1 for each in range(x.ndim)])


def _product(of: Factors, name: str, core: str) -> Tensor:
    left, right = of[f"{name}_a"], of[f"{name}_b"]
    return _tucker(of[core], left, right) if core in of else left @ right


def _tucker(core: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """A convolution `o i h w` out of a small one, `r s h w`, with what joins its channels, `r o` and `s i`."""
    return torch.einsum("rs...,ro,si->oi...", core, left, right).contiguous()  # as `torch.kron` wants it
