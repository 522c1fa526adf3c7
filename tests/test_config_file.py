"""--config: a file whose options are those of the command, unless they are given beside it."""

import json
import shlex

import pytest
import torch

from tav_core import Clip, cli
from tav_core.arguments import edit_arguments
from tav_core.record import record_of, verdict
from tav_core.terminal import Parser, preset_of

BASE = ["--video", "x y.mp4", "--prompt", "a ball", "--edit", "one", "--edit=-two", "--output", "o",
        "--checkpoint", "mini"]  # fmt: skip
OF_THE_PRESET = ("steps", "learning_rate", "seed", "sampling_steps", "preset", "guidance_scale", "guidance_rescale",
                 "guidance_start", "guidance_end", "attention_injection", "caption_as_negative", "dtype",
                 "eta")  # fmt: skip


@pytest.fixture
def parsed():
    def parse(*argv):
        parser = Parser(prog="tune-a-video edit")
        edit_arguments(parser)
        args = parser.parse_args(list(map(str, argv)))
        args.parser = parser
        return args

    return parse


def others(args) -> dict:
    left = (*OF_THE_PRESET, "parser", "config", "output", "device")
    return {name: value for name, value in vars(args).items() if name not in left}


def test_a_summary_makes_its_run_again(parsed, checkpoint, tmp_path):
    given = [*BASE, "--steps", "7", "--no-audio", "--contrast", "c", "--no-steady", "--size", "64x32", "--region",
             "subject", "--temporal-causal", "--dtype", "fp32"]  # fmt: skip
    first, path = parsed(*given), tmp_path / "summary.json"
    clip = Clip(torch.zeros(2, 8, 8, 3, dtype=torch.uint8), 8.0, "x.mp4")
    run = record_of(first, ["tav", "edit", *given], preset_of(first), checkpoint, clip)
    assert run["command"].startswith("tune-a-video edit --video 'x y.mp4' --prompt 'a ball'")
    assert run["options"]["edit"] == ["one", "-two"] and run["options"]["size"] == "64x32"
    assert run["options"]["sampling-steps"] == 25 and run["options"]["preset"] == "mini"
    assert len(run["fingerprints"]["clip"]) == 64 and run["versions"]["torch"] == torch.__version__
    path.write_text(json.dumps({"frames": 2, "run": run}))
    again = parsed("--config", path, "--output", "other")
    assert others(again) == others(first) and str(again.output) == "other" and preset_of(again) == preset_of(first)
    changed = parsed("--config", path, "--output", "other", "--edit", "three", "--step=9", "--steady")
    assert changed.edit == ["three"] and changed.steps == 9 and changed.steady is True


def test_a_file_of_yaml(parsed, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "video: clip.mp4\nprompt: a ball\nedit: [one, two]\nsampling_steps: 3\nno-audio: true\nresume: false\n"
        "seed: 5\noutput: out\ncheckpoint: mini\nsize: 64\nsteady:\n"
    )
    args = parsed("--config", path, "--seed", 6)
    assert (args.edit, args.sampling_steps, args.audio, args.resume, args.seed) == (
        ["one", "two"],
        3,
        False,
        False,
        [6],
    )


@pytest.mark.parametrize("text, told", [
    ("colour: red", "--config {} has 'colour', which is no option of edit; leave it out"),
    ("config: other.yaml", "has 'config', which is no option of edit"), ("[1, 2]", "holds no options"),
    ("a: [", "can't be read (ParserError)"), ("", "holds no options"), ("prompt: {a: 1}", "has prompt with a value"),
    ("resume: maybe", "has resume with 'maybe'; give true or false"), ("steps: many", "--steps 'many' is no integer"),
    ("frames: -1", "--frames -1 is out of range"), ("edit: one", "are required: --video, --prompt, --output"),
])  # fmt: skip
def test_what_is_wrong_in_a_file(parsed, capsys, tmp_path, text, told):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(SystemExit) as end:
        parsed("--config", path)
    line = capsys.readouterr().err
    assert end.value.code == 2 and line.startswith("error: ") and line.count("\n") == 1
    assert told.format(path) in line


def test_files_that_are_none(tav, tmp_path):
    for path in (tmp_path, tmp_path / "none.json"):
        assert f"--config {path} is no file" in tav("edit", "--config", path, fails=True)
    assert "--config" in tav("edit", "--config", fails=True)


@pytest.mark.parametrize("psnr, ceiling, word", [
    (16, 22, "poor"), (20, 26, "fair"), (26, 30, "good"), (26, 36, "fair"), (26, 45, "poor"), (40, 39, "good"),
])  # fmt: skip
def test_a_word_for_a_reconstruction(psnr, ceiling, word):
    assert verdict(psnr, ceiling) == word


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_has_an_example_that_is_understood(command, tav, monkeypatch):
    seen = tav(command, "--help")
    _, _, example = " ".join(seen.split()).partition("example: tune-a-video ")
    assert example.startswith(command)
    parsed = []
    monkeypatch.setattr(cli, "run", lambda parser: parsed.append(parser.parse_args(shlex.split(example))))
    cli.main()
    assert parsed[0].command == command
    assert seen.index("example:") > seen.index("options:")
