"""What the command lines share: output that fails no run, stopping, options that do nothing, one line for a mistake."""

import argparse
import io
import os
import signal
import subprocess
import sys

import pytest

from support.commands import environment
from tav_core import cli, given, terminal
from tav_core.errors import TavError
from tav_core.events import Step
from tav_core.limits import Range
from tav_core.mini import cli as mini_cli

TEXT = "шар é 赤い"


def run(monkeypatch, command, parser=None, arguments=()) -> int:
    """The exit code of a command that is a function."""
    parser = parser or terminal.Parser(prog="tav")
    parser.set_defaults(run=command)
    monkeypatch.setattr(sys, "argv", ["tav", *arguments])
    try:
        terminal.run(parser)
    except SystemExit as end:
        return end.code
    return 0


# ------------------------------------------------------------------------------------------------------ output


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_text_that_the_terminal_lacks_is_escaped(monkeypatch, encoding):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding, errors="strict"))

    def command(args):
        print(TEXT)
        terminal.Progress()(terminal.Note(TEXT))

    assert run(monkeypatch, command) == 0
    assert written.getvalue().decode(encoding).count(r"\u0448\u0430\u0440") == 2


def test_a_reader_that_has_gone_stops_nothing(monkeypatch):
    reading, writing = os.pipe()
    os.close(reading)
    done = []

    def command(args):
        print("x" * 100_000)
        progress = terminal.Progress()
        for step in (1, 2):
            progress(Step("tune", step, 2))
        done.append(print("y" * 100_000, file=sys.stderr))

    with open(writing, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(sys, "stderr", stream)
        assert run(monkeypatch, command) == 0 and done
        stream.flush()  # as Python does at its end


def test_streams_that_are_closed_are_nowhere(monkeypatch):
    def command(args):
        print(TEXT)
        terminal.Progress()(Step("tune", 1, 1))
        raise TavError("video", TEXT, "is bad", "leave it")

    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert run(monkeypatch, command) == 2


def test_no_file_takes_the_place_of_a_closed_stream(tmp_path):
    """Whatever a library writes to descriptor 2 would be in it."""
    script = f"""
import sys, types
import tav_core
from tav_core.start import start

fake = sys.modules["tav_core.fake"] = types.ModuleType("fake")

def main():
    with open({str(tmp_path / "file")!r}, "w") as file:
        file.write(str(file.fileno()))

fake.main = main
start(".fake")
"""
    command = '"$0" -c "$1" <&- >&- 2>&-'
    subprocess.run(["sh", "-c", command, sys.executable, script], env=environment(), check=True)
    assert int((tmp_path / "file").read_text()) > 2


def test_names_give_the_terminal_no_orders(monkeypatch, capsys):
    def command(args):
        terminal.tell("a\x1b[31m\nb", "c\udce9")
        terminal.Progress()(terminal.Note("\x1b[2J"))
        raise TavError("video", "a\x1b[31m.mp4", "is not \x1b[0m", "leave\nit")

    assert run(monkeypatch, command) == 2
    out, err = capsys.readouterr()
    assert out == "a\\x1b[31m\\nb c\\udce9\n\\x1b[2J\n"
    assert err == "error: video 'a\\x1b[31m.mp4' is not \\x1b[0m; leave\\nit\n"


# ---------------------------------------------------------------------------------------------------- stopping


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_waits_for_the_step_and_the_second_does_not(monkeypatch, capfd, number):
    seen = []

    def command(args):
        progress = terminal.Progress().stop_at_interrupt()
        progress(Step("tune", 1, 9))
        os.kill(os.getpid(), number)
        seen.append("goes on")
        if len(sys.argv) > 1:
            os.kill(os.getpid(), number)
            seen.append("never")
        progress(Step("tune", 2, 9))

    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    assert run(monkeypatch, command) == 130
    err = capfd.readouterr().err
    assert err.index("stopping after this step") < err.index("stopped in tuning after step 2 of 9")
    parser = terminal.Parser()
    parser.add_argument("twice")
    assert run(monkeypatch, command, parser, ["twice"]) == 130
    assert capfd.readouterr().err.endswith("stopped\n") and seen == ["goes on"] * 2
    assert handlers == [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]


def test_a_stop_that_a_library_takes_for_an_error(monkeypatch, capsys):
    def command(args):
        try:
            os.kill(os.getpid(), signal.SIGINT)
            signal.pause()
        except BaseException as error:
            raise TavError("checkpoint", "mini", f"can't be read ({error})", "save it again") from error

    assert run(monkeypatch, command) == 130 and capsys.readouterr().err == "stopped\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("module", ["tav_core", "tav_core.mini"])
def test_stopping_while_libraries_are_imported(tmp_path, module, number):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(
        "import time\nprint('importing', flush=True)\n"
        "try:\n    time.sleep(60)\nexcept BaseException:\n    raise ImportError\n"
    )
    path = os.pathsep.join([str(tmp_path), environment()["PYTHONPATH"]])
    process = subprocess.Popen(
        [sys.executable, "-m", module, "--help"],
        env=environment(PYTHONPATH=path),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "importing\n"
    process.send_signal(number)
    assert process.communicate(timeout=30)[1] == "stopped\n" and process.returncode == 130


def test_the_package_is_imported_in_no_time():
    program = "import sys, tav_core; assert not {'torch', 'diffusers', 'numpy'} & {*sys.modules}; print(dir(tav_core))"
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment(), check=True, capture_output=True, text=True
    )
    assert "'load_video'" in done.stdout


# -------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize("text, told", [
    ("nan", "nan is out of range; give a number from 0 to 1"), ("inf", "inf is out of range"),
    ("1e30", "1e+30 is out of range"), ("x", "'x' is no number; give a number from 0 to 1"), ("", "'' is no number"),
    ("9" * 5000, "inf is out of range"), ("x" * 5000, "is no number"), ("\x1b[31m", r"'\x1b[31m' is no number"),
])  # fmt: skip
def test_numbers_of_options(monkeypatch, capsys, text, told):
    parser = terminal.Parser(prog="tav")
    parser.add_argument("--share", type=Range(0.0, 1.0))
    assert run(monkeypatch, pytest.fail, parser, [f"--share={text}"]) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: --share ") and told in line and line.count("\n") == 1 and len(line) < 200


@pytest.mark.parametrize("text", ["1.5", "9" * 5000, "1e3", "-1", "101"])
def test_whole_numbers_of_options(monkeypatch, capsys, text):
    parser = terminal.Parser(prog="tav")
    parser.add_argument("--count", type=Range(1, 100))
    assert run(monkeypatch, pytest.fail, parser, [f"--count={text}"]) == 2
    assert "give an integer from 1 to 100" in (line := capsys.readouterr().err) and len(line) < 200


MINI = ["--checkpoint", "mini"]
EDIT = ["edit", "--video", "x.mp4", "--prompt", "a", "--edit", "b", "--output", "o", *MINI]
INVERT = ["invert", "--video", "x.mp4", "--output", "o.safetensors", *MINI]
SAMPLE = ["sample", "--edit", "b", "--output", "o", *MINI]
TUNE = ["tune", "--video", "x.mp4", "--prompt", "a", "--output", "o", *MINI]


@pytest.mark.parametrize("arguments, told", [
    ([*SAMPLE, "--steps", "7"], "--steps 7 means nothing to sample; leave it out"),
    ([*SAMPLE, "--learning-rate", "1e-3"], "--learning-rate 1e-3 means nothing to sample"),
    ([*INVERT, "--guidance-scale", "7"], "--guidance-scale 7 means nothing to invert"),
    ([*TUNE, "--guidance-scale", "7"], "--guidance-scale 7 means nothing to tune"),
    ([*EDIT, "--nonsense", "y" * 9999], "means nothing to edit"),
    ([*EDIT, "--context-overlap", "3"], "--context-overlap 3 does nothing without --context-length"),
    ([*EDIT, "--softness", "3"], "--softness 3 does nothing without --contrast"),
    ([*EDIT, "--no-steady"], "--steady False does nothing without --contrast"),
    ([*INVERT, "--seed", "3"], "--seed 3 does nothing without --contrast"),
    ([*SAMPLE, "--caption-as-negative", "0.5"], "--caption-as-negative 0.5 does nothing without --noise"),
    ([*SAMPLE, "--noise", "n", "--seed", "3"], "--seed 3 does nothing with --noise"),
    ([*SAMPLE, "--noise", "n", "--frames", "3"], "--frames 3 does nothing with --noise"),
    ([*SAMPLE, "--edit", " "], "--edit is empty"), ([*EDIT, "--edit", "caf\udce9"], r"--edit caf\udce9 is not UTF-8"),
    ([*EDIT, "--device", "meta"], "--device meta can't be used here"),
    ([*EDIT, "--device", "mkldnn"], "--device mkldnn can't be used here"),
    ([*EDIT, "--device", "cpu:3"], "--device cpu:3 can't be used here"),
    ([*EDIT, "--size", "20000"], "--size 20000 is out of range; give sides from 1 to 4096"),
    ([*EDIT, "--video", "n" * 256], "can't be used (File name too long)"),
    ([*EDIT, "--video", "caf\udce9"], r"--video caf\udce9 has a name that is not UTF-8"),
    ([*INVERT, "--output", "noise.mp4"], "--output noise.mp4 doesn't end in .safetensors"),
    (["bench", "--growth", "--stages", "tune"], "--stages does nothing with --growth"),
    (EDIT[:-2], "--checkpoint is missing; give one of Stable Diffusion 1.5, such as v1-5-pruned-emaonly-fp16.safet"),
    (SAMPLE[:-2], "--checkpoint is missing"), (TUNE[:-2], "--checkpoint is missing"),
    (INVERT[:-2], 'or "mini", which knows a rendered world of 6 shapes'),
    ([*EDIT[:-1], "v1-5.safetensors"], "--checkpoint v1-5.safetensors is no path that exists"),
    (["edit"], "are required: --video, --prompt, --edit, --output; see tune-a-video edit --help"),
])  # fmt: skip
def test_what_can_be_seen_before_anything_is_loaded(tav, monkeypatch, tmp_path, arguments, told):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(given, "load_checkpoint", lambda *args: pytest.fail("it has begun"))
    (tmp_path / "x.mp4").touch()
    line = tav(*arguments, fails=True)
    assert line.startswith("error: ") and told in line and len(line.splitlines()) == 1 and len(line) < 500
    assert [path.name for path in tmp_path.iterdir()] == ["x.mp4"]


@pytest.mark.parametrize("arguments, told", [
    (["render", "--frames", "1", "--output", "x.mp4"], "--frames 1 is out of range; give an integer from 2 to 1000"),
    (["render", "--output", "x.txt"], "--output x.txt doesn't end in .mp4 or .webm or .gif"),
    (["evaluate", "--count", "1000000"], "--count 1000000 is out of range"),
    (["evaluate", "--sheet", "x.mp4"], "--sheet x.mp4 doesn't end in .png"),
    (["lora", "--strengths", "nan"], "--strengths nan is out of range"),
    (["benchmark", "--clips", "-1"], "--clips -1 is out of range"),
    (["benchmark", "--save-every", "1"], "--save-every 1 means nothing to benchmark"),
    (["benchmark", "--context-overlap", "3"], "--context-overlap 3 does nothing without --context-length"),
    (["train", "vae", "--work", "w", "--lora-steps", "3"], "--lora-steps 3 does nothing for stage vae"),
    (["train", "judge", "--work", "w"], "--work w holds no vae.safetensors; train vae there first"),
])  # fmt: skip
def test_what_can_be_seen_of_the_mini_commands(tav, monkeypatch, tmp_path, arguments, told):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mini_cli, "load_checkpoint", lambda *args: pytest.fail("it has begun"))
    line = tav(*arguments, fails=True, main=mini_cli.main)
    assert line.startswith("error: ") and told in line and len(line.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_every_number_of_an_option_has_limits():
    for commands in (cli.COMMANDS, mini_cli.COMMANDS):
        for _, add_arguments, _ in commands.values():
            parser = argparse.ArgumentParser()
            add_arguments(parser)
            assert not [action.dest for action in parser._actions if action.type in (int, float)]
