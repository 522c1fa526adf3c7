"""Errors that a user can fix: each has its parts, and every front end tells them in its own words."""

import argparse
import ast
import copy
import pickle
import re
from pathlib import Path

import pytest
import torch

from tav_core import terminal
from tav_core.errors import OutOfMemory, TavError, field

ROOT = Path(__file__).parents[1]
FILES = sorted(
    str(path.relative_to(ROOT)) for folder in ("tav_core", "nodes") for path in (ROOT / folder).rglob("*.py")
)
# what makes an error, and how many of its arguments come before problem and remedy
MAKERS = {"TavError": 2, "OutOfMemory": 2, "CoreOutOfMemory": 2, "_Unfit": 0}
OTHERS_OPTIONS = ("--force-fp32",)  # of ComfyUI itself


# ------------------------------------------------------------------------------------------ what the source says


def texts(node: ast.expr) -> list[str]:
    """What a string expression may be, with "x" for what is computed; nothing for other expressions."""
    if isinstance(node, ast.Constant):
        return [node.value]
    if isinstance(node, ast.IfExp):
        return [*texts(node.body), *texts(node.orelse)]
    if isinstance(node, ast.JoinedStr):
        return ["".join(part.value if isinstance(part, ast.Constant) else "x" for part in node.values)]
    return []


def faults(tree: ast.Module) -> list[str]:
    """What is wrong with the errors that a file makes, each with its line."""
    found = []

    def check(what: str, node: ast.expr):
        for text in texts(node):
            own = re.sub("|".join(OTHERS_OPTIONS), "", str(text))
            if not isinstance(text, str) or not text or text[0].isupper() or text[-1] in ".;" or "--" in own:
                found.append(f"line {node.lineno}: {what} {text!r}")

    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            if node.targets[0].id in ("problem", "remedy"):
                check(node.targets[0].id, node.value)
        if not isinstance(node, ast.Call) or getattr(node.func, "id", "") not in MAKERS:
            continue
        before = MAKERS[node.func.id]
        if isinstance(node.args[-1], ast.Starred):  # the parts of another error
            continue
        if len(node.args) != before + 2:
            found.append(f"line {node.lineno}: {len(node.args)} arguments")
            continue
        if before and any(not re.fullmatch(r"\w+|[A-Z].*", name) for name in texts(node.args[0])):
            found.append(f"line {node.lineno}: field {texts(node.args[0])}")
        check("problem", node.args[-2])
        check("remedy", node.args[-1])
    return found


@pytest.mark.parametrize("file", FILES)
def test_every_error_has_its_parts(file):
    assert not faults(ast.parse((ROOT / file).read_text()))


@pytest.mark.parametrize("source", [
    'raise TavError("--count 0 is out of range; give 1 or more")', 'raise TavError("--count", 0, "is low", "give 1")',
    'raise TavError("count", 0, "Is low", "give 1")', 'raise TavError("count", 0, "is low.", "give 1")',
    'raise TavError("count", 0, "is low", "")', 'raise TavError("count", 0, f"is {n} --stride", "give 1")',
    'raise OutOfMemory("memory", None, "ran out", f"take {n}, --memory low")', 'raise _Unfit("lacks a part")',
    'remedy = "give --count"', 'return TavError("count", 0, "is low" if n else "", "give 1")',
])  # fmt: skip
def test_faults_are_found(source):
    assert len(faults(ast.parse(source))) == 1


# --------------------------------------------------------------------------------------------- three front ends

TOLD = [
    (("video", Path("my--clip.mp4"), "does not exist", "check where it is"),
     "path='my--clip.mp4' does not exist; check where it is", "--video my--clip.mp4 does not exist; check where it is",
     "file my--clip.mp4 does not exist; check where it is"),
    (("video", "a{b}.mp4", "holds images of several sizes", f"give {field('size')}"),
     "path='a{b}.mp4' holds images of several sizes; give width and height",
     "--video a{b}.mp4 holds images of several sizes; give --size",
     "file a{b}.mp4 holds images of several sizes; give width and height"),
    (("video", "", "does not exist", "give one"),
     "path='' does not exist; give one", "--video '' does not exist; give one", "file '' does not exist; give one"),
    (("prompt", "two\nlines", "is long", "shorten it"),
     r"prompt='two\nlines' is long; shorten it", r"prompt 'two\nlines' is long; shorten it",
     r"prompt 'two\nlines' is long; shorten it"),
    (("count", 9, f"is more than the 4 frames from {field('start')} 2", f"give a smaller {field('stride')}"),
     "count=9 is more than the 4 frames from start 2; give a smaller stride",
     "--frames 9 is more than the 4 frames from start 2; give a smaller --stride",
     "count 9 is more than the 4 frames from start 2; give a smaller stride"),
    (("width", 100, "is no multiple of 8", "give 96"), "width=100 is no multiple of 8; give 96",
     "--size 100 is no multiple of 8; give 96", "width 100 is no multiple of 8; give 96"),
    (("attention_injection", 1.5, "is high", "give 1"), "attention_injection=1.5 is high; give 1",
     "--attention-injection 1.5 is high; give 1", "attention_injection 1.5 is high; give 1"),
    (("steady", True, "is of no use", f"turn {field('steady')} off"), "steady=True is of no use; turn steady off",
     "steady True is of no use; turn steady off", "steady True is of no use; turn steady off"),
    (("class_labels", [1, 2], "are two", "give one"), "class_labels=[1, 2] are two; give one",
     "class_labels [1, 2] are two; give one", "class_labels [1, 2] are two; give one"),
    (("tuned", None, "is missing", f"give one, or a {field('checkpoint')} that is tuned"),
     "path is missing; give one, or a name_or_path that is tuned",
     "tuned is missing; give one, or a --checkpoint that is tuned",
     "tuned_weights is missing; give one, or a checkpoint that is tuned"),
    (("state", "a.safetensors", "is of another run", "delete it"),
     "state_path='a.safetensors' is of another run; delete it",
     "state file a.safetensors is of another run; delete it", "state file a.safetensors is of another run; delete it"),
]  # fmt: skip


@pytest.fixture
def at_the_terminal(monkeypatch, capsys):
    """What a command with some options says of an error."""

    def told(error: TavError) -> str:
        def command(args):
            args.tuned = args.prompt = None  # commands add to their arguments; these are no options
            raise error

        parser = argparse.ArgumentParser()
        for option in ("--video", "--size", "--frames", "--stride", "--attention-injection", "--checkpoint"):
            parser.add_argument(option)
        parser.set_defaults(run=command)
        monkeypatch.setattr("sys.argv", ["tav_core"])
        with pytest.raises(SystemExit) as end:
            terminal.run(parser)
        assert end.value.code == 2
        return capsys.readouterr().err

    return told


@pytest.mark.parametrize("parts, python, command_line, node", TOLD)
def test_in_python_and_at_the_terminal(at_the_terminal, parts, python, command_line, node):
    assert str(TavError(*parts)) == python
    for kind in (TavError, OutOfMemory):
        assert at_the_terminal(kind(*parts)) == f"error: {command_line}\n"


@pytest.mark.parametrize("parts, python, command_line, node", TOLD)
def test_in_nodes(pack, parts, python, command_line, node):
    from comfy.model_management import OOM_EXCEPTION

    errors, plain_errors = pack.tav_core.errors, pack.nodes.errors.plain_errors
    assert str(errors.TavError(*parts)) == node  # as stock nodes tell it
    with pytest.raises(errors.TavError) as caught, plain_errors():
        raise errors.TavError(*parts)
    assert str(caught.value) == node and not isinstance(caught.value, OOM_EXCEPTION)
    with pytest.raises(OOM_EXCEPTION) as caught, plain_errors():
        raise errors.OutOfMemory(*parts)
    assert str(caught.value) == node and isinstance(caught.value, errors.OutOfMemory)


def test_a_node_has_names_of_its_own(pack):
    errors, plain_errors = pack.tav_core.errors, pack.nodes.errors.plain_errors
    with pytest.raises(errors.TavError) as caught, plain_errors(output="name"):
        raise errors.TavError("output", "x.mp4", "can't be written", f"choose another {errors.field('output')}")
    assert str(caught.value) == "name x.mp4 can't be written; choose another name"


def test_a_node_has_names_of_its_own_when_memory_runs_out(pack):
    errors, plain_errors = pack.tav_core.errors, pack.nodes.errors.plain_errors
    with pytest.raises(errors.OutOfMemory) as caught, plain_errors(context_length="Context Windows"):
        raise errors.OutOfMemory("memory", "low", "ran out of memory", f"use {errors.field('context_length')}")
    assert str(caught.value) == "memory low ran out of memory; use Context Windows"


def test_load_video_keeps_the_name_of_a_file(pack, monkeypatch, tmp_path):
    monkeypatch.setattr("folder_paths.get_input_directory", lambda: str(tmp_path))
    node, name = pack.nodes.LoadVideo, "my--clip.mp4"
    told = "file my--clip.mp4 is not in ComfyUI's input folder; upload it, or choose another one"
    assert node.validate_inputs(name) == told
    with pytest.raises(pack.tav_core.TavError) as caught:
        node.execute(name, 0, 1, 8, 64, 64, "crop")
    assert str(caught.value) == told
    (tmp_path / name).write_text("no video")
    assert node.validate_inputs(name) is True
    with pytest.raises(pack.tav_core.TavError) as caught:
        node.execute(name, 0, 1, 8, 64, 64, "crop")
    assert str(caught.value).startswith(f"file {tmp_path / name} can't be decoded (")
    assert (
        node.validate_inputs("../a--b.mp4")
        == f"file ../a--b.mp4 leads out of {tmp_path.name}; give a name inside of it"
    )


def test_an_option_of_comfyui_keeps_its_dashes(pack, monkeypatch):
    monkeypatch.setattr("comfy.sample.sample_custom", lambda *args, **settings: torch.tensor(torch.nan))
    monkeypatch.setattr("latent_preview.prepare_callback", lambda *args: None)
    with pytest.raises(pack.tav_core.TavError) as caught, pack.nodes.errors.plain_errors():
        pack.nodes.sampling.sample_with(None, None, torch.ones(2), {"samples": None}, [], [], 1.0, None)
    assert str(caught.value) == (
        "MODEL gives a result that is not finite (NaN); run ComfyUI with --force-fp32, or tune at a lower learning_rate"
    )


# --------------------------------------------------------------------------------------------------- as objects


@pytest.mark.parametrize("through", [copy.copy, copy.deepcopy, lambda error: pickle.loads(pickle.dumps(error))])
@pytest.mark.parametrize("kind", [TavError, OutOfMemory])
@pytest.mark.parametrize("value", [Path("my--clip.mp4"), 8, None])
def test_copies_and_pickles_are_the_same(through, kind, value):
    error = kind("video", value, f"needs {field('count')}", "give it")
    other = through(error)
    assert type(other) is kind and isinstance(other, ValueError) and str(other) == str(error)
    assert (other.field, other.value, other.problem, other.remedy) == ("video", value, error.problem, "give it")


def test_copies_and_pickles_of_what_the_core_sees(pack):
    error = pack.nodes.errors.CoreOutOfMemory("memory", "low", "ran out", "use fewer frames")
    for other in (copy.copy(error), pickle.loads(pickle.dumps(error))):
        assert type(other) is type(error) and str(other) == "memory low ran out; use fewer frames"
