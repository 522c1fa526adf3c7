"""What the command lines share: options, presets, progress bars, one-line errors, stopping with Ctrl-C."""

import argparse
import signal
import sys
from dataclasses import fields

from diffusers.utils import logging as diffusers_logging
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from .errors import Cancelled, TavError
from .events import Event, Note, Reading, TuningStep
from .memory import is_out_of_memory
from .precision import DTYPES
from .presets import PRESETS, Preset, default_preset, with_settings
from .recompute import MEMORY_OR_AUTO
from .tuning import TuneConfig

STAGES = {"tune": "tuning", "invert": "inversion", "sample": "sampling"}
# fields of errors that are called otherwise here
_NAMES = {"count": "frames", "width": "size", "height": "size", "num_steps": "sampling_steps", "state": "state file"}


class Progress:
    """Draws one bar a stage from its events, and stops the stage after the step at which Ctrl-C came."""

    def __init__(self):
        self.bar = None
        self.stopped = False

    def __call__(self, event: Event):
        if isinstance(event, Note):
            tqdm.write(event.text)
            return
        if isinstance(event, Reading):
            if self.stopped:
                raise Cancelled("stopped while the clip was read")
            return
        stage = STAGES[event.stage]
        if self.bar is None or self.bar.desc != stage:
            self.close()
            self.bar = tqdm(total=event.total, desc=stage, unit="step", initial=event.step - 1, mininterval=0.5)
        self.bar.update(event.step - self.bar.n)
        if isinstance(event, TuningStep):
            self.bar.set_postfix(loss=f"{event.loss:.4f}", probe=f"{event.probe_loss:.4f}", refresh=False)
        if event.step == event.total:
            self.close()
        if self.stopped:
            self.close()
            raise Cancelled(f"stopped in {stage} after step {event.step} of {event.total}")

    def close(self):
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def stop_at_interrupt(self) -> "Progress":
        """The first Ctrl-C waits for the running step and keeps the state; a second one ends at once."""

        def handler(number, frame):
            self.stopped = True
            signal.signal(signal.SIGINT, signal.default_int_handler)

        signal.signal(signal.SIGINT, handler)
        return self


def add_preset_arguments(parser: argparse.ArgumentParser):
    """--preset and what overrides it."""
    group = parser.add_argument_group("method", "a preset, and single settings that replace the preset's")
    summary = "; ".join(
        f"{name}: {p.tuning.steps} steps at {p.tuning.learning_rate:g}, {p.sampling_steps} sampling steps, "
        f"guidance {p.guidance_scale:g}, attention injection {p.attention_injection:g}, "
        f"caption as negative {p.caption_as_negative:g}"
        for name, p in PRESETS.items()
    )
    group.add_argument("--preset", choices=PRESETS, help=f"mini for the mini checkpoint, else paper. {summary}")
    group.add_argument("--steps", type=int, metavar="N", help="tuning steps")
    group.add_argument("--learning-rate", type=float, metavar="X", help="tuning's learning rate (AdamW)")
    group.add_argument("--seed", type=int, metavar="N", help="seed of every random draw (0)")
    group.add_argument(
        "--dtype",
        choices=DTYPES,
        help="precision of the U-Net, in all stages; tuned weights stay fp32 "
        "(bf16 on a GPU that is made for it, else fp32)",
    )
    group.add_argument(
        "--memory",
        choices=MEMORY_OR_AUTO,
        help="of the tuning: from fast to low each takes less memory, and more time (auto: the first that fits)",
    )
    group.add_argument("--sampling-steps", type=int, metavar="N", help="DDIM steps of inversion and of sampling")
    group.add_argument("--guidance-scale", type=float, metavar="X", help="classifier-free guidance of the edits")
    group.add_argument(
        "--attention-injection",
        type=float,
        metavar="X",
        help="share of the sampling steps in which edits attend as the clip does (0 to 1): more keeps more of its "
        "layout and motion",
    )
    group.add_argument(
        "--caption-as-negative",
        type=float,
        metavar="X",
        help="how far guidance starts from the clip's own sentence instead of the negative prompt (0 to 1)",
    )
    group.add_argument(
        "--steady",
        action=argparse.BooleanOptionalAction,
        help="with --contrast: a background that an edit draws anew stands still where the clip's does (on). "
        "--no-steady for one that should move, such as a fire or a crowd",
    )
    group.add_argument(
        "--context-length",
        type=int,
        metavar="N",
        help="for long clips: frames that are looked at together, 3 or more (all; with --tuned, as many as tuned)",
    )
    group.add_argument("--context-overlap", type=int, metavar="N", help="frames that neighbouring windows share (4)")


def preset_of(args: argparse.Namespace) -> Preset:
    """The preset that the arguments of `add_preset_arguments` describe."""
    settings = {each.name for of in (Preset, TuneConfig) for each in fields(of)}
    given = {name: value for name, value in vars(args).items() if name in settings}
    return with_settings(PRESETS[args.preset or default_preset(args.checkpoint)], **given)


def run(parser: argparse.ArgumentParser):
    """Parses the arguments and calls `args.run(args)`. What a user can mend ends in one line and exit code 2."""
    for library in (diffusers_logging, transformers_logging):  # their bars and advice say nothing to our users
        library.set_verbosity_error()
        library.disable_progress_bar()
    args = parser.parse_args()
    options = frozenset(vars(args))  # by their name as a variable; a command may add to `args`

    def name_of(field: str) -> str:
        name = _NAMES.get(field, field)
        return f"--{name.replace('_', '-')}" if name in options else name

    try:
        args.run(args)
    except TavError as error:
        error.name_of, error.assign = name_of, " "
        sys.exit(_fail(f"error: {error}", 2))
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        told = "error: the device ran out of memory; try fewer --frames, --context-length, a smaller --size, "
        sys.exit(_fail(f"{told}--memory low or --dtype bf16", 2))
    except Cancelled as stop:
        sys.exit(_fail(str(stop), 130))
    except KeyboardInterrupt:
        sys.exit(_fail("stopped", 130))


def _fail(line: str, code: int) -> int:
    print(line, file=sys.stderr)
    return code
