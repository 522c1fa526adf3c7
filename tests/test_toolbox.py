"""LoRAs, textual inversions, ControlNets, weights, sentences along a clip and fresh noise on the command line."""

import json
from argparse import Namespace
from dataclasses import replace

import pytest
import torch
from diffusers import ControlNetModel
from PIL import Image
from safetensors.torch import save_file

from support.errors import refused
from tav_core import PRESETS, Control, Edit, InvertedNoise, given, load_video, save_video
from tav_core.arguments import LoraFile, lora
from tav_core.drawing import settings_of
from tav_core.where import find_model

TO_Q = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_k"  # what no tuning changes


@pytest.fixture(scope="module")
def files(checkpoint, tmp_path_factory):
    """A clip with its hints, a LoRA, a textual inversion and a ControlNet for the tiny checkpoint."""
    folder = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    for name in ("clip", "hints"):
        save_video(torch.randint(256, (4, 32, 32, 3), dtype=torch.uint8), folder / f"{name}.mp4", 8)
    Image.new("RGB", (32, 32), "white").save(folder / "one.png")
    for name in ("soft", "hard"):
        pair = {f"{TO_Q}.lora_A.weight": torch.randn(2, 32), f"{TO_Q}.lora_B.weight": torch.randn(32, 2)}
        save_file(pair, folder / f"{name}.safetensors")
    save_file({"emb_params": torch.randn(2, 32)}, folder / "x1-style.safetensors")
    net = ControlNetModel.from_unet(checkpoint.unet, conditioning_embedding_out_channels=(8, 8, 8, 8))
    for parameter in net.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    net.save_pretrained(folder / "net")
    return folder


@pytest.fixture
def run(folder, files):
    """The options of `edit` on the tiny checkpoint, and of `sample` on its noise."""
    base = ["--checkpoint", folder, "--sampling-steps", 2, "--guidance-scale", 3]
    video = ["--video", files / "clip.mp4", "--prompt", "a red ball", "--frames", 3, "--size", 32, "--steps", 1]
    return ["edit", *base, *video], ["sample", *base]


def summary_of(folder):
    return json.loads((folder / "summary.json").read_text())


def test_a_lora_is_a_file_and_its_strength(tmp_path):
    for text, wanted in (("x.safetensors", ("x.safetensors", 1.0)), ("a/b:0.5", ("a/b", 0.5)), ("b:-1", ("b", -1.0)),
                         ("c:d", ("c:d", 1.0)), ("c:1e-1", ("c", 0.1))):  # fmt: skip
        assert lora(text) == LoraFile(*wanted) == lora(str(lora(text)))


@pytest.mark.slow
def test_all_of_them_in_one_project_that_is_made_again(run, files, tav, tmp_path):
    edit, sample = run
    added = ["--lora", f"{files / 'soft.safetensors'}:0.8", "--embedding", files / "x1-style.safetensors"]
    hints = ["--controlnet", files / "net", "--hints", files / "hints.mp4", "--control-end", 0.5]
    told = ["--edit", "a (x1-style:1.3) ball", "--edit", "0: a red ball | 2: x1-style", "--prompt-weights"]
    command = [*edit, *added, *hints, *told, "--eta", 0.5, "--edit-seed", 4]
    tav(*command, "--output", tmp_path / "o")
    summary = summary_of(tmp_path / "o")
    edits, model, options = summary["edits"], summary["model"], summary["run"]["options"]
    assert [(each["seed"], each["eta"], each["control_end"]) for each in edits] == [(4, 0.5, 0.5)] * 2
    assert all(each["lora"] == model["lora"] and "soft:0.8 (" in each["lora"] for each in edits)
    assert all(each["embedding"].startswith("x1-style (") for each in edits) and model["embedding"] is None
    assert [each["prompt_weights"] for each in edits] == [True, None]
    assert summary["reconstruction"]["controlnet"] is summary["reconstruction"]["eta"] is None
    assert options["lora"] == [f"{files / 'soft.safetensors'}:0.8"] and options["edit-seed"] == [4]
    assert summary["run"]["fingerprints"].keys() == {"checkpoint", "clip", "lora", "embedding"}
    tav("edit", "--config", tmp_path / "o" / "summary.json", "--output", tmp_path / "again")
    for one, other in zip(edits, summary_of(tmp_path / "again")["edits"], strict=True):
        assert {**one, "figures": None} == {**other, "figures": None}
        assert (tmp_path / "o" / one["file"]).read_bytes() == (tmp_path / "again" / other["file"]).read_bytes()
    # nothing is drawn twice; what decides makes another edit
    tav(*command, "--hints", files / "one.png", "--output", tmp_path / "o")
    *same, new, _ = summary_of(tmp_path / "o")["edits"]
    assert same == edits and new["hints"] != edits[0]["hints"]
    videos = [load_video(tmp_path / "o" / each["file"]).frames for each in (edits[0], new)]
    assert not torch.equal(*videos)
    # several ControlNets: a list where one has a value
    two = ["--controlnet", files / "net", files / "net", "--hints", files / "hints.mp4", files / "one.png"]
    two += ["--control-strength", 0.5, "--control-end", 0.5, 1]
    tav(*edit, *added, *two, "--edit", "a x1-style", "--output", tmp_path / "o")
    summary = summary_of(tmp_path / "o")
    led, options = summary["edits"][-1], summary["run"]["options"]
    assert led["hints"] == [edits[0]["hints"], new["hints"]] and led["controlnet"] == [edits[0]["controlnet"]] * 2
    assert (led["control_strength"], led["control_end"]) == ([0.5, 0.5], [0.5, 1.0])
    assert options["controlnet"] == [str(files / "net")] * 2 and options["control-end"] == [0.5, 1.0]
    tav("edit", "--config", tmp_path / "o" / "summary.json", "--output", tmp_path / "o")
    assert summary_of(tmp_path / "o")["edits"] == summary["edits"]
    # one for edits alone is of the same project
    styled = ["--edit-lora", f"{files / 'hard.safetensors'}:2", "--edit", "a star"]
    tav(*edit, *added[:2], *styled, "--output", tmp_path / "o")
    last = summary_of(tmp_path / "o")["edits"][-1]
    assert last["lora"].startswith(edits[0]["lora"] + ", hard:2 (") and last["eta"] is None
    # another LoRA is another project, and other weights for the tuned file
    for other in ([], ["--lora", files / "hard.safetensors"]):
        refusal = tav(*edit, *other, "--edit", "a star", "--output", tmp_path / "o", fails=True)
        assert "is not the soft:0.8 (" in refusal and refusal.startswith("error: --lora")
    tuned = ["--tuned", tmp_path / "o" / "tuned.safetensors", "--noise", tmp_path / "o" / "noise.safetensors"]
    refusal = tav(*sample, *tuned, "--edit", "a star", "--output", tmp_path / "s", fails=True)
    assert "belongs to the base model 'tiny + soft:0.8'" in refusal
    seeds = ["--eta", 1, "--seed", 5, 6]
    tav(*sample, *tuned, *added[:2], *hints[:2], "--hints", files / "one.png", "--edit", "a star", *seeds,
        "--edit-lora", files / "hard.safetensors", "--output", tmp_path / "s")  # fmt: skip
    drawn = summary_of(tmp_path / "s")["edits"]
    assert [each["seed"] for each in drawn] == [5, 6] and drawn[0]["lora"].startswith(edits[0]["lora"] + ", hard:1 (")
    assert [each["edits"] for each in summary_of(tmp_path / "s")["grids"]] == [[1, 2]]
    refusal = tav(*sample, *tuned, *added[:2], *hints, "--edit", "a star", "--output", tmp_path / "s", fails=True)
    assert "hints.mp4 are 4, and the clip has 3 frames" in refusal


def test_what_does_nothing_or_does_not_fit_is_refused(run, files, tav, tmp_path):
    edit, sample = [*run[0], "--output", tmp_path / "o"], [*run[1], "--edit", "a star", "--output", tmp_path / "o"]
    net, hints, star = ["--controlnet", files / "net"], ["--hints", files / "hints.mp4"], ["--edit", "a star"]
    for wrong, told in (
        ([*star, *hints], "--hints"), ([*star, *net], "--hints is missing; give --controlnet a picture for each frame"),
        ([*star, "--control-end", 0.5], "--control-end 0.5 does nothing without --controlnet"),
        ([*star, *net, *hints, "--control-end", 0.2, "--control-start", 0.4], "is not behind --control-start, 0.4"),
        ([*star, *net, "--hints", files / "none.mp4"], "--hints"),
        ([*star, "--controlnet", "mini", *hints], "is for another family of checkpoints"),
        ([*star, "--controlnet", "nowhere", *hints], "--controlnet nowhere is no path that exists"),
        ([*star, "--controlnet", files / "net" / "diffusion_pytorch_model.safetensors", *hints],
         "takes text of width 32, which is neither SD 1.x nor 2.x"),
        ([*star, "--controlnet", files / "soft.safetensors", *hints], "is no ControlNet (it lacks input_hint_block)"),
        ([*star, *net, files / "net", *hints], "--hints has 1 values for 2 --controlnet; give one for each in"),
        ([*star, *net, *hints, files / "one.png"], "--hints has 2 values for 1 --controlnet"),
        ([*star, *net, *hints, "--control-start", 0, 0.1], "--control-start has 2 values for 1 --controlnet; give one "
         "for all, or one for each"),
        ([*star, *net, files / "net", *hints, files / "hints.mp4", "--control-end", 1, 0.2, "--control-start", 0.4],
         "--control-end 0.2 is not behind --control-start, 0.4"),
        ([*star, "--lora", f"{files / 'soft.safetensors'}:11"], "11.0 is out of range; give a number from -10 to 10"),
        ([*star, "--lora", "mini-neon"], "this checkpoint hasn't"), ([*star, "--lora", files / "clip.mp4"], "a pickle"),
        ([*star, "--lora", files / "x1-style.safetensors"], "holds what is no LoRA's"),
        ([*star, "--edit-lora", "mini-neon"], "error: --edit-lora"),
        ([*star, "--embedding", files / "x1-style.safetensors"], "no sentence has the word 'x1-style'"),
        (["--edit", "soft", "--embedding", files / "soft.safetensors"], "holds 2 tensors"),
        ([*star, "--edit-seed", 1], "--edit-seed does nothing without --eta"),
        ([*star, "--seed", 1, 2], "or --edit-seed with --eta"), ([*star, "--eta", 2], "0 to 1"),
        (["--edit", "0: a | 3: b"], "speaks of frame 3, and the last of the clip is 2"),
        (["--edit", "0: a | 2: b | 1: c"], "let them rise"), ([*star, "--negative-prompt", "0: a | 9: b"], "frame 9"),
        (["--edit", "a (red:99) ball", "--prompt-weights"], "--edit red:99 gives words the weight 99"),
        ([*star, "--prompt", "0: a | 2: b"], "which edits alone may have"),
    ):  # fmt: skip
        assert told in tav(*edit, *wrong, fails=True), wrong
    assert not (tmp_path / "o").exists()
    assert "does nothing without --controlnet" in tav(*sample, *hints, fails=True)
    assert "speaks of frame 3" in tav(*edit, "--edit", "0: a | 3: b", "--dry-run", fails=True)


def test_weights_that_are_none_are_told(capsys):
    args = Namespace(added={"embedding": []}, prompt_weights=False, quiet=False)
    given.check_sentences(args, "a ball", "a (red:1.2) ball")
    assert "note: parentheses and numbers are read as words in 'a (red:1.2) ball'" in capsys.readouterr().out
    for options in ({"prompt_weights": True}, {"quiet": True}):
        given.check_sentences(Namespace(**vars(args) | options), "a (red:1.2) ball")
    assert not capsys.readouterr().out


def test_what_decides_on_an_edit_is_in_its_settings(checkpoint):
    noise, hints = InvertedNoise(torch.zeros(1, 4, 2, 4, 4), "a ball"), torch.zeros(2, 32, 32, 3, dtype=torch.uint8)
    net, preset = ControlNetModel.from_unet(checkpoint.unet), replace(PRESETS["mini"], eta=0.5)
    base, edit = Control(net, hints), Edit("a (star)")

    def settings(edit=edit, checkpoint=checkpoint, preset=preset, control=base):
        return json.dumps(settings_of(edit, checkpoint, preset, noise, "", control=control), sort_keys=True)

    others = [
        settings(control=None), settings(control=replace(base, strength=0.5)), settings(control=replace(base, end=0.5)),
        settings(control=replace(base, start=0.5)), settings(control=replace(base, hints=hints + 1)),
        settings(preset=replace(preset, eta=0.6)), settings(edit=replace(edit, seed=1)), settings(edit=Edit("a star")),
        settings(checkpoint=replace(checkpoint, prompt_weights=True)),
        settings(checkpoint=replace(checkpoint, embeddings={"star": "1"})),
        settings(checkpoint=replace(checkpoint, loras=("x:1 (1)",))),
    ]  # fmt: skip
    assert len({settings(), *others}) == 1 + len(others) and settings() == settings()
    # what does nothing makes no other edit, and is None, as in summaries that don't know it
    plain = settings_of(edit, checkpoint, PRESETS["mini"], noise, "")
    taught = replace(checkpoint, embeddings={"moon": "1"})
    assert plain == settings_of(replace(edit, seed=1), taught, PRESETS["mini"], noise, "")
    assert {plain[name] for name in ("eta", "seed", "lora", "embedding", "prompt_weights", "controlnet", "hints")} == {
        None
    }


def test_models_by_the_names_of_a_comfyui(tmp_path):
    models = tmp_path / "models"
    for path in ("loras/mine/soft.safetensors", "embeddings/x1-style.safetensors", "controlnet/net/config.json",
                 "controlnet/1.5/canny_fp16.safetensors"):  # fmt: skip
        (models / path).parent.mkdir(parents=True)
        (models / path).touch()
    soft = models / "loras" / "mine" / "soft.safetensors"
    for name in ("soft", "soft.safetensors", "mine/soft", "mine/soft.safetensors", soft):
        assert find_model("lora", name, "loras", tmp_path) == soft
    assert find_model("controlnet", "net", "controlnet", tmp_path) == models / "controlnet" / "net"
    canny = models / "controlnet" / "1.5" / "canny_fp16.safetensors"
    assert find_model("controlnet", "canny_fp16", "controlnet", tmp_path) == canny
    assert find_model("lora", "mini-neon", "loras").is_file() and find_model("x", "mini", "controlnet").is_dir()
    (models / "loras" / "other").mkdir()
    (models / "loras" / "other" / "soft.safetensors").touch()
    refused("'soft' is several in models/loras of the ComfyUI in", "lora", "soft", "loras", tmp_path,
            call=find_model)  # fmt: skip
    refused("is no path that exists, and no name in models/embeddings", "embedding", "odd", "embeddings", tmp_path,
            call=find_model)  # fmt: skip
