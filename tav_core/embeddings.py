"""Textual inversion (Gal et al., arXiv 2208.01618): a word of its own for what words don't say, learned as vectors."""

import copy
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from .checkpoint import Checkpoint, reading
from .checkpoint_parts import Unfit
from .stored import Damaged, check_finite
from .tuning_state import hash_tensors

_REMEDY = "give a .safetensors file of a textual inversion for checkpoints of this family"


def load_embedding(checkpoint: Checkpoint, path: str | Path, word: str | None = None) -> Checkpoint:
    """The checkpoint with another word in its tokenizer and text encoder; the given one stays as it is.

    Args:
        path: a .safetensors file with one tensor, `d` or `n d`, as diffusers and A1111 save them.
        word: that stands for it in sentences; by default the name of the file without its suffix.

    Raises:
        TavError: missing or damaged files, a pickle, vectors of another width than the text encoder's, a word that the
            tokenizer has already.
    """
    path = Path(path)
    with reading("embedding", path):
        word, vectors = path.stem if word is None else word, _vectors_of(path)
        words = [word, *(f"{word}_{number}" for number in range(1, len(vectors)))]
        table = checkpoint.text_encoder.get_input_embeddings()
        if vectors.shape[1] != table.embedding_dim:
            problem = f"has vectors of width {vectors.shape[1]}, the text encoder takes {table.embedding_dim}"
            raise Unfit(problem, _REMEDY)
        tokenizer = copy.deepcopy(checkpoint.tokenizer)
        known = tokenizer.get_vocab()
        for each in words:
            if not each.strip() or each in known or f"{each.lower()}</w>" in known:
                raise Unfit(f"would stand for {each!r}, which the tokenizer knows", "rename the file")
        tokenizer.add_tokens(words)
        ids = tokenizer.convert_tokens_to_ids(words)
    weight = table.weight.new_zeros(max(len(table.weight), *(id + 1 for id in ids)), table.embedding_dim)
    weight[: len(table.weight)], weight[ids] = table.weight, vectors.to(weight)
    shared = {id(each): each for each in checkpoint.text_encoder.parameters() if each is not table.weight}
    encoder = copy.deepcopy(checkpoint.text_encoder, shared)
    encoder.set_input_embeddings(nn.Embedding.from_pretrained(weight))
    encoder.config.vocab_size = len(weight)
    named = dict(checkpoint.embeddings) | {word: hash_tensors([vectors])[:8]}
    return replace(checkpoint, tokenizer=tokenizer, text_encoder=encoder, embeddings=named)


def _vectors_of(path: Path) -> Tensor:
    """Float32 `n d`.

    Raises:
        Unfit: what `load_embedding` refuses of a file.
    """
    if path.suffix.lower() != ".safetensors":
        raise Unfit("is not a .safetensors file, and a pickle can run code", "convert it first")
    if not path.is_file():
        raise Unfit("is no file" if path.exists() else "does not exist", _REMEDY)
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    if {"clip_g", "clip_l"} & tensors.keys():
        raise Unfit("is for SDXL (it has clip_g or clip_l)", _REMEDY)
    if len(tensors) != 1:
        raise Unfit(f"holds {len(tensors)} tensors, a textual inversion is one", _REMEDY)
    try:
        check_finite(tensors)
    except Damaged as error:
        raise Unfit(f"is damaged ({error})", "download it again") from error
    (vectors,) = tensors.values()
    if vectors.ndim not in (1, 2) or 0 in vectors.shape:
        raise Unfit(f"has a tensor of shape {tuple(vectors.shape)}", _REMEDY)
    return torch.atleast_2d(vectors).float()


def named_in(checkpoint: Checkpoint, *texts: str) -> list[str]:
    """The textual inversions of a checkpoint that sentences name, each "WORD (fingerprint)"."""
    said = " ".join(texts).lower()
    return [f"{word} ({digest})" for word, digest in checkpoint.embeddings.items() if word.lower() in said]
