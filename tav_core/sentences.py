"""Sentences beyond plain ones: words with weights, and one sentence after the other along a clip.

(a red ball:1.3) is sliding on the grass                    # with the checkpoint's `prompt_weights`
0: a red ball is sliding | 4: a blue ball is sliding        # from frame 0 to frame 4, one becomes the other
"""

import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .errors import TavError, field

_PART = r"\s*(\d{1,6})\s*:\s*(.*?)\s*"
_LIKE_A_WEIGHT = re.compile(r"\([^()]+:\s*\d*\.?\d+\s*\)")


# ---------------------------------------------------------------------------------------------------------- words


def tokens_of(tokenizer: PreTrainedTokenizerBase, text: str, weighted: bool) -> tuple[list[int], list[float]]:
    """The tokens of a sentence between those of its start and its end, however many, and the weight of each.

    A word that stands for a textual inversion of several vectors is as many tokens.

    Args:
        weighted: whether parentheses weigh words; without it all weights are 1.
    """
    ids, weights = [], []
    for part, weight in _weighted(text) if weighted else [(text, 1.0)]:
        own = [id for word in tokenizer(part).input_ids[1:-1] for id in _vectors(tokenizer, word)]
        ids, weights = ids + own, weights + [weight] * len(own)
    first, last = tokenizer("").input_ids[:2]
    return [first, *ids, last], [1.0, *weights, 1.0]


def _vectors(tokenizer: PreTrainedTokenizerBase, token: int) -> list[int]:
    """The token, with those behind it of the same textual inversion ("word", "word_1", "word_2" ...)."""
    added = tokenizer.added_tokens_encoder
    if (word := tokenizer.added_tokens_decoder.get(token)) is None:
        return [token]
    more = 0
    while f"{word.content}_{more + 1}" in added:
        more += 1
    return [token, *(added[f"{word.content}_{number}"] for number in range(1, more + 1))]


def _weighted(text: str, weight: float = 1.0) -> Iterator[tuple[str, float]]:
    """The parts of a sentence with their weights, by the rules of ComfyUI.

    "(words:1.2)" has weight 1.2, "(words)" that of what is around it times 1.1; "\\(" and "\\)" are parentheses.
    """
    depth = begin = at = 0
    while at < len(text):
        if text[at] == "\\" and text[at + 1 : at + 2] in ("(", ")"):
            at += 1
        elif text[at] == "(":
            if depth == 0:
                yield from _plain(text[begin:at], weight)
                begin = at + 1
            depth += 1
        elif text[at] == ")" and depth:
            depth -= 1
            if depth == 0:
                yield from _in_parentheses(text[begin:at], weight)
                begin = at + 1
        at += 1
    yield from _plain(text[begin - (depth > 0) :], weight)  # what is never closed is read as it stands


def _in_parentheses(text: str, weight: float) -> Iterator[tuple[str, float]]:
    words, colon, number = text.rpartition(":")
    try:
        own = float(number)
    except ValueError:
        own = None
    if colon and words and own is not None:
        if not 0 <= own <= MOST_WEIGHT:
            problem = f"gives words the weight {number.strip()}"
            raise TavError("prompt", text, problem, f"give it a number from 0 to {MOST_WEIGHT}")
        yield from _weighted(words, own)
    else:
        yield from _weighted(text, 1.1 * weight)


def _plain(text: str, weight: float) -> Iterator[tuple[str, float]]:
    if text.strip():
        yield text.replace("\\(", "(").replace("\\)", ")"), weight


MOST_WEIGHT = 10  # of a word; beyond it there is noise alone


def weigh(embedding: Tensor, empty: Tensor, weights: Tensor) -> Tensor:
    """Embeddings `b n d` as words weigh, `b n`: each goes from that of the empty sentence, `1 n d`, through its own.

    As in ComfyUI. What weighs 1 is returned to the bit.
    """
    weights = weights[..., None].to(embedding)
    return torch.where(weights == 1, embedding, (embedding - empty) * weights + empty)


def seems_weighted(text: str) -> bool:
    """Whether somebody who knows ComfyUI will have meant a weight."""
    return bool(_LIKE_A_WEIGHT.search(text))


# ------------------------------------------------------------------------------------------------------- frames


def keyframes(text: str, name: str = "edit") -> dict[int, str] | None:
    """The sentences of a text by the frames that they begin at; None for a plain sentence, which has no "0: ... |".

    Args:
        name: of the field, for errors.

    Raises:
        TavError: a frame without words, frames out of order, or a first one that isn't 0.
    """
    parts = [re.fullmatch(_PART, part, re.DOTALL) for part in text.split("|")]
    if len(parts) < 2 or not all(parts):
        return None
    frames, sentences = [int(part[1]) for part in parts], [part[2] for part in parts]
    if frames[0] != 0:
        raise TavError(name, text, f"begins with frame {frames[0]}", "say what frame 0 shows")
    if sorted(set(frames)) != frames:
        problem = f"has its frames in the order {', '.join(map(str, frames))}"
        raise TavError(name, text, problem, "let them rise from one to the next")
    if not all(sentences):
        problem = f"says nothing of frame {frames[sentences.index('')]}"
        raise TavError(name, text, problem, "describe every one of these frames in one sentence")
    return dict(zip(frames, sentences))


def check_sentence(text: str, frames: int, name: str = "edit", weighted: bool = False):
    """Raises a TavError for a text that speaks of frames which a clip of so many hasn't, or gives words odd weights.

    Args:
        name: of the field, for errors.
        weighted: whether parentheses weigh words.
    """
    last = max(keyframes(text, name) or [0])
    if last >= frames:
        problem = f"speaks of frame {last}, and the last of the clip is {frames - 1}"
        raise TavError(name, text, problem, f"give smaller numbers, or a longer clip by {field('count')}")
    try:
        list(_weighted(text) if weighted else [])
    except TavError as error:
        raise TavError(name, error.value, error.problem, error.remedy) from None


def along(told: Mapping[int, Tensor], frames: int) -> Tensor:
    """Embeddings of a clip of so many frames, `f n d`: from one to the next they change evenly, the last one stays.

    Args:
        told: `1 n d` by the frame, rising from 0.
    """
    at, texts = torch.tensor(list(told)), torch.cat(list(told.values()))
    each = torch.arange(frames)
    low = torch.searchsorted(at, each, right=True) - 1
    high = (low + 1).clamp(max=len(at) - 1)
    share = (each - at[low]) / (at[high] - at[low]).clamp(min=1)
    return torch.lerp(texts[low], texts[high], share[:, None, None].to(texts))
