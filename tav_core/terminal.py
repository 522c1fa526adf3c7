"""What the command lines share: presets, progress bars, one-line errors, stopping, output that fails no run."""

import argparse
import math
import os
import re
import signal
import sys
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any, TextIO

import torch
from diffusers.utils import logging as diffusers_logging
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from .config_file import with_config
from .errors import Cancelled, TavError, escaped, shortened
from .errors import field as mentioned
from .events import Event, Note, Plan, Reading, Step, TuningStep
from .limits import LIMITS
from .memory import is_out_of_memory
from .precision import DTYPES
from .presets import PRESETS, Preset, default_preset, with_settings
from .recompute import MEMORY_OR_AUTO
from .remaining import Remaining
from .tuning import TuneConfig

STAGES = {"encode": "encoding", "tune": "tuning", "invert": "inversion", "subject": "finding the subject",
          "sample": "sampling"}  # fmt: skip
# fields of errors that are called otherwise here
_NAMES = {"count": "frames", "width": "size", "height": "size", "num_steps": "sampling_steps", "state": "state file",
          "save_minutes": "save_every", "word": "subject", "lora_strength": "lora"}  # fmt: skip
_SIGNALS = (signal.SIGINT, signal.SIGTERM)  # a Ctrl-C, and what ends a job of a cluster or a container


# ------------------------------------------------------------------------------------------------ progress


class Progress:
    """A callback that draws one bar a stage on stderr: how far it is, how long it will still take, and of a tuning the
    loss. One object serves all stages, one after the other.

    Where there is no terminal, as in a file or a notebook, a plain line now and then tells the same: the first and the
    last step of a stage, and between them one a tenth, if it took ten seconds, or a minute.

    Args:
        quiet: nothing is drawn; for `stop_at_interrupt` alone.
    """

    def __init__(self, quiet: bool = False):
        self.quiet, self.plain = quiet, not sys.stderr.isatty()
        self.bar = self.remaining = None
        self.told = -math.inf, 0.0  # when the last line was, and how much of its stage was done
        self.stopped = False

    def __call__(self, event: Event):
        if isinstance(event, Note):
            if not self.quiet:
                tqdm.write(escaped(event.text))
            return
        if isinstance(event, Plan):
            self.remaining = Remaining(event)
            return
        if isinstance(event, Reading):
            if self.stopped:
                raise Cancelled("stopped while the clip was read")
            return
        stage, told = STAGES[event.stage], [self.remaining.after(event)] if self.remaining else []
        if isinstance(event, TuningStep):
            told.append(f"loss {event.loss:.4f}, probe loss {event.probe_loss:.4f}")
        if not self.quiet:
            (self._line if self.plain else self._bar)(event, stage, ", ".join(filter(None, told)))
        if self.stopped:
            self.close()
            raise Cancelled(f"stopped in {stage} after step {event.step} of {event.total}")

    def _bar(self, event: Step, stage: str, told: str):
        if self.bar is None or self.bar.desc != stage:
            self.close()
            shape = {"bar_format": "{desc} |{bar:20}| {n_fmt}/{total_fmt}{postfix}"} if self.remaining else {}
            self.bar = tqdm(
                total=event.total, desc=stage, unit="step", initial=event.step - 1, mininterval=0.5, **shape
            )
        self.bar.set_postfix_str(told, refresh=False)
        self.bar.update(event.step - self.bar.n)
        if event.step == event.total:
            self.close()

    def _line(self, event: Step, stage: str, told: str):
        """The first step of a stage, the last, and between them one a tenth, if it took ten seconds, or a minute."""
        now, share = time.monotonic(), event.step / event.total
        at, before = self.told
        first = share <= before or before == 0
        later = now - at >= 60 or (now - at >= 10 and share >= before + 0.1)
        if first or later or share == 1:
            told = f", {told}" if told else ""
            print(f"{stage}: step {event.step} of {event.total}{told}", file=sys.stderr, flush=True)
            self.told = now, share % 1

    def close(self):
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def stop_at_interrupt(self) -> "Progress":
        """The first Ctrl-C or SIGTERM waits for the running step, then raises `Cancelled`: what was computed so far is
        kept; a second one ends at once. It stays so until the handlers of these signals are set anew.
        """

        def handler(number, frame):
            self.stopped = True
            if not self.quiet:  # a step may take minutes; sys.stderr might be in the middle of a write
                with suppress(OSError):
                    os.write(2, b"\nstopping after this step; once more stops at once, without keeping it\n")
            for each in _SIGNALS:
                signal.signal(each, _interrupt)

        for each in _SIGNALS:
            signal.signal(each, handler)
        return self


# ------------------------------------------------------------------------------------------------- presets


def _presets() -> str:
    return "; ".join(
        f"{name}: {p.tuning.steps} steps at {p.tuning.learning_rate:g}, {p.sampling_steps} sampling steps, "
        f"guidance {p.guidance_scale:g}, attention injection {p.attention_injection:g}, "
        f"caption as negative {p.caption_as_negative:g}"
        for name, p in PRESETS.items()
    )


def _number(name: str, metavar: str, help: str) -> dict[str, Any]:
    return {"type": LIMITS[name], "metavar": metavar, "help": help}


# options by the name of their setting
SETTINGS = {
    "preset": {"choices": PRESETS, "help": "mini for the mini checkpoint, else paper; edit keeps more of the clip than "
                                           f"paper. {_presets()}"},
    "steps": _number("steps", "N", "tuning steps"),
    "learning_rate": _number("learning_rate", "X", "tuning's learning rate (AdamW)"),
    "seed": _number("seed", "N", "seed of every random draw (0)"),
    "dtype": {"choices": DTYPES, "help": "precision of the U-Net, in all stages; tuned weights stay fp32 (bf16 on a "
                                         "GPU that is made for it, else fp32)"},
    "memory": {"choices": MEMORY_OR_AUTO, "help": "of the tuning: from fast to low each takes less memory, and more "
                                                  "time (auto: the first that fits)"},
    "save_minutes": _number("save_minutes", "MINUTES", "time after which the state of the tuning is written again, if "
                                                       "a hundred steps take longer (2)"),
    "weight_average": _number("weight_average", "X", "decay of a running average of the tuned weights, such as 0.96, "
                              "which is taken in their place: less hangs on the chance of the last steps (0 for none)"),
    "keep": {"type": LIMITS["steps"], "nargs": "+", "metavar": "N",
             "help": "steps whose weights are kept as well, as tuned-N.safetensors: too many steps make edits "
                     "stiff, so look and choose"},
    "sampling_steps": _number("sampling_steps", "N", "DDIM steps of inversion and of sampling"),
    "guidance_scale": _number("guidance_scale", "X", "classifier-free guidance of the edits"),
    "guidance_rescale": _number("guidance_rescale", "X", "how far strong guidance is kept from gaudy or pale colours, "
                                "0 to 1 (0)"),
    "guidance_start": _number("guidance_start", "X", "share of the sampling steps before guidance begins (0)"),
    "guidance_end": _number("guidance_end", "X", "share of the sampling steps after which guidance ends (1)"),
    "attention_injection": _number("attention_injection", "X", "share of the sampling steps in which edits attend as "
                                   "the clip does (0 to 1): more keeps more of its layout and motion"),
    "caption_as_negative": _number("caption_as_negative", "X", "how far guidance starts from the clip's own sentence "
                                   "instead of the negative prompt (0 to 1)"),
    "steady": {"action": argparse.BooleanOptionalAction,
               "help": "with a subject that is known: a background that an edit draws anew stands still where the "
                       "clip's does, a subject is the same in all frames (on). --no-steady for what should move "
                       "otherwise, such as a fire or a crowd"},
    "eta": _number("eta", "X", "share of fresh noise in the steps of edits (0): 0 leaves nothing to chance, 1 draws as "
                   "freely as DDPM, by a seed"),
    "context_length": _number("context_length", "N", "for long clips: frames that are looked at together, 3 or more "
                                                     "(all; with --tuned, as many as tuned)"),
    "context_overlap": _number("context_overlap", "N", "frames that neighbouring windows share (4)"),
    "edits_at_once": _number("edits_at_once", "N", "edits that are drawn together, which is faster and takes more "
                             "memory (as many as there is memory for, 4 at most)"),
}  # fmt: skip


def add_preset_arguments(parser: argparse.ArgumentParser, *settings: str, several: Mapping[str, str] | None = None):
    """--preset and what overrides it: all settings, or those alone that the command has a use for.

    Args:
        several: settings that take several values, and what these are for.
    """
    group = parser.add_argument_group("method", "a preset, and single settings that replace the preset's")
    for name in dict.fromkeys(("preset", *settings)) if settings else SETTINGS:
        of, more = SETTINGS[name], {}
        if several and name in several:
            more = {"nargs": "+", "help": f"{of['help']}; {several[name]}"}
        group.add_argument(_option(name), dest=name, **of | more)


def _option(name: str) -> str:
    return f"--{_NAMES.get(name, name).replace('_', '-')}"


def preset_of(args: argparse.Namespace) -> Preset:
    """The preset that the arguments of `add_preset_arguments` describe.

    Of several values of a setting it has none: each is that of some edits.
    """
    settings = {each.name for of in (Preset, TuneConfig) for each in fields(of)}
    given = {name: value for name, value in vars(args).items() if name in settings}
    given |= {name: value[0] if len(value) == 1 else None for name, value in given.items() if isinstance(value, list)}
    return with_settings(PRESETS[args.preset or default_preset(args.checkpoint)], **given)


def check_needs(args: argparse.Namespace, **needs: str | tuple[str, ...]):
    """Refuses options that do nothing without another one: by the name of an option, that of the other, or of some."""
    for name, others in needs.items():
        others = (others,) if isinstance(others, str) else others
        value = getattr(args, name)
        if value is not None and all(getattr(args, other) is None for other in others):
            told = " or ".join(map(mentioned, others))
            value = " ".join(map(str, value)) if isinstance(value, list) else value
            raise TavError(name, value, f"does nothing without {told}", "leave it out")


def check_faults(of: str, path: Path, faults: Sequence[str]):
    """Tells what is wrong with a list of clips or jobs, a line each.

    Raises:
        TavError: about the field `of`, if anything is.
    """
    for fault in faults:
        print(escaped(fault), file=sys.stderr)
    if faults:
        raise TavError(of, path, f"can't be used as it is ({len(faults)} faults)", "put them right")


# ---------------------------------------------------------------------------------------------- the command


class _Help(argparse.HelpFormatter):
    """Breaks the lines of an example at its blanks alone: names of files have hyphens."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        wrapping = dict(initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False)
        return textwrap.fill(" ".join(text.split()), width, **wrapping)


class Parser(argparse.ArgumentParser):
    """Tells in one line what is wrong with the arguments, and takes some from the file that --config names."""

    def __init__(self, *args, formatter_class: type = _Help, **kwargs):
        super().__init__(*args, formatter_class=formatter_class, **kwargs)

    def parse_known_args(self, args=None, namespace=None):
        try:
            args = with_config(self, sys.argv[1:] if args is None else list(args))
        except TavError as error:
            error.name_of, error.assign = _option, " "
            sys.exit(_fail(f"error: {error}", 2))
        return super().parse_known_args(args, namespace)

    def error(self, message: str):
        told = re.sub(r"^argument (.+?): ", r"\1 ", message)
        told = escaped(re.sub(r"\S{121,}", lambda word: shortened(word[0], 120), told))
        sys.exit(_fail(f"error: {told}" if "; " in told else f"error: {told}; see {self.prog} --help", 2))


class _Output:
    """A stream that fails no run: it escapes what its encoding lacks, and drops what nobody takes any more."""

    def __init__(self, stream: TextIO | None):
        self._stream = stream or open(os.devnull, "w")  # Python has none for what was closed
        if hasattr(self._stream, "reconfigure"):
            self._stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        self._try(self._stream.write, text)
        return len(text)

    def flush(self):
        self._try(self._stream.flush)

    def _try(self, function, *args):
        try:
            function(*args)
        except OSError:  # the reader of a pipe has gone, the disk behind a file is full
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str):
        return getattr(self._stream, name)


@contextmanager
def _unfailing_output() -> Iterator[None]:
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(_Output, streams)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = streams


def tell(*parts: Any):
    """Prints a line in which no name of a file can give the terminal orders."""
    print(escaped(" ".join(map(str, parts))))


_interrupts: list[int] = []


def _interrupt(number: int, frame: Any):
    _interrupts.append(number)
    raise KeyboardInterrupt


def run(parser: argparse.ArgumentParser):
    """Parses the arguments and calls `args.run(args)`. What a user can mend ends in one line and exit code 2."""
    for library in (diffusers_logging, transformers_logging):  # their bars and advice say nothing to our users
        library.set_verbosity_error()
        library.disable_progress_bar()
    before = {each: signal.getsignal(each) for each in _SIGNALS}
    with _unfailing_output():
        try:
            _interrupts.clear()
            for each in _SIGNALS:
                signal.signal(each, _interrupt)
            _run(parser)
        except Cancelled as stop:
            sys.exit(_fail(str(stop), 130))
        except KeyboardInterrupt:
            sys.exit(_fail("stopped", 130))
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)


def _run(parser: argparse.ArgumentParser):
    args, unknown = parser.parse_known_args()
    if getattr(args, "threads", None) is not None:
        torch.set_num_threads(args.threads)
    options = frozenset(vars(args))  # by their name as a variable; a command may add to `args`
    try:
        if unknown:
            told = escaped(shortened(" ".join(unknown), 120))
            raise TavError(told, None, f"means nothing to {args.command}", "leave it out")
        try:
            args.run(args)
        except Exception:
            if _interrupts:  # libraries make errors of their own of it
                raise KeyboardInterrupt from None
            raise
    except TavError as error:
        error.name_of = lambda name: _option(name) if {name, _NAMES.get(name)} & options else _NAMES.get(name, name)
        error.assign = " "
        sys.exit(_fail(f"error: {error}", 2))
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and not is_out_of_memory(error):
            raise
        told = "error: the device ran out of memory; try fewer --frames, --context-length, a smaller --size, "
        sys.exit(_fail(f"{told}--memory low or --dtype bf16", 2))


def _fail(line: str, code: int) -> int:
    for bar in list(getattr(tqdm, "_instances", ())):  # the line would stand behind one
        bar.close()
    print(line, file=sys.stderr)
    return code
