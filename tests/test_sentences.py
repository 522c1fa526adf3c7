"""Sentences beyond plain ones: weights of words, and one sentence after the other along a clip."""

from dataclasses import replace

import torch

from support.errors import refused
from tav_core import PRESETS, ContextWindows, WindowedUNet, ddim_sample, decode_video, encode_prompt, inflate, sample
from tav_core.pipeline import check_prompt, places_of
from tav_core.sentences import along, check_sentence, keyframes, seems_weighted, tokens_of

PRESET = replace(PRESETS["paper"], sampling_steps=1)


def parts(tokenizer, text: str) -> list[tuple[str, float]]:
    ids, weights = tokens_of(tokenizer, text, True)
    return [(tokenizer.decode([id]).strip(), round(weight, 4)) for id, weight in zip(ids[1:-1], weights[1:-1])]


def test_parentheses_weigh_as_in_comfyui(checkpoint):
    for text, wanted in {
        "a (red:1.3) ball": [("a", 1), ("red", 1.3), ("ball", 1)], "((red)) (ball)": [("red", 1.21), ("ball", 1.1)],
        "(a (red:2) ball:0.5)": [("a", 0.5), ("red", 2), ("ball", 0.5)], "((red) a:2)": [("red", 2.2), ("a", 2)],
        "a \\(red\\)": [("a", 1), ("(", 1), ("red", 1), (")", 1)], "(red": [("(", 1), ("red", 1)],
        "red) a": [("red", 1), (")", 1), ("a", 1)], "(red:ball)": [("red", 1.1), (":", 1.1), ("ball", 1.1)], "()": [],
    }.items():  # fmt: skip
        assert parts(checkpoint.tokenizer, text) == wanted, text
    refused("gives words the weight 99; give it a number from 0 to 10", checkpoint.tokenizer, "(a:99)", True,
            call=tokens_of)  # fmt: skip
    assert seems_weighted("a (red:1.2) ball") and not seems_weighted("a ball (red), at 10:30")


def test_a_weight_leads_from_the_empty_sentence_through_the_word(checkpoint):
    weighted, empty = replace(checkpoint, prompt_weights=True), encode_prompt(checkpoint, "")
    plain = encode_prompt(checkpoint, "a red ball")
    for text in ("a red ball", "", "star " * 90):
        assert torch.equal(encode_prompt(weighted, text), encode_prompt(checkpoint, text))
    found = encode_prompt(weighted, ["a (red:1.5) ball", "a red ball"])
    assert torch.equal(found[1:], plain) and torch.equal(found[0, [0, 1, 3, 4]], plain[0, [0, 1, 3, 4]])
    assert torch.allclose(found[0, 2], empty[0, 2] + 1.5 * (plain - empty)[0, 2])
    assert not torch.allclose(encode_prompt(checkpoint, "a (red:1.5) ball"), found[:1], atol=1e-2)  # without: words
    assert places_of(weighted, "a (red:1.5) ball", "ball", PRESET) == [3]


def test_weights_are_those_of_comfyui(mini):
    weighted = replace(mini.checkpoint, prompt_weights=True)
    for text in ("a (red:1.4) ball is ((sliding)) on the (grass:0.3)", "(a red ball)", "a \\(red\\) (ball:0)"):
        found, plain = encode_prompt(weighted, text), encode_prompt(mini.checkpoint, text)
        assert (mini.encode(text)[0][0] - found).abs().max() < 1e-4 < 1e-2 < (found - plain).abs().max()


def test_sentences_along_a_clip():
    assert keyframes("0: a red ball | 4: a blue ball") == {0: "a red ball", 4: "a blue ball"}
    for plain in ("a red ball", "0: a red ball", "one | two", "12:30 at night", "0: a | b", ""):
        assert keyframes(plain) is None
    red, blue = torch.zeros(1, 2, 3), torch.ones(1, 2, 3)
    told = along({0: red, 4: blue, 5: red}, 8)
    assert told.shape == (8, 2, 3) and told[:, 0, 0].tolist() == [0, 0.25, 0.5, 0.75, 1, 0, 0, 0]
    for text, problem in (("1: a | 2: b", "begins with frame 1; say what frame 0 shows"),
                          ("0: a | 3: b | 2: c", "in the order 0, 3, 2; let them rise"), ("0: a | 0: b", "rise"),
                          ("0: a | 5:", "says nothing of frame 5"), ("0: | 5: b", "nothing of frame 0")):  # fmt: skip
        refused(problem, text, call=keyframes)
    refused("speaks of frame 8, and the last of the clip is 7; give smaller", "0: a | 8: b", 8, call=check_sentence)
    check_sentence("0: a | 7: b", 8)
    refused("which edits alone may have; describe the clip in one sentence", "0: a | 4: b", call=check_prompt)


def test_a_sample_follows_its_sentences(checkpoint):
    """In every window those of its frames."""
    preset = replace(PRESET, tuning=replace(PRESET.tuning, context_length=4), context_overlap=3)
    unet, noise = inflate(checkpoint.unet), torch.randn(1, 4, 5, 8, 8, generator=torch.Generator().manual_seed(0))
    video = sample(checkpoint, unet, noise, "0: a red ball | 4: a blue ball", preset, negative_prompt="0: x | 1: y")
    red, blue, x, y = (encode_prompt(checkpoint, text) for text in ("a red ball", "a blue ball", "x", "y"))
    texts, negative = torch.cat([torch.lerp(red, blue, i / 4) for i in range(5)]), torch.cat([x, *[y] * 4])
    options = dict(guidance_scale=preset.guidance_scale, negative_hidden_states=negative)
    model = WindowedUNet(unet, ContextWindows(4, 3))
    wanted = decode_video(checkpoint, ddim_sample(model, noise, texts, checkpoint.scheduler, 1, **options))
    assert (video.float() - wanted.float()).abs().mean() < 0.1
    refused("speaks of frame 5", checkpoint, unet, noise, "0: a | 5: b", preset, call=sample)
