"""How long a job will still take, by the steps of it that were timed."""

import time
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

from .control import each_of
from .drawing import AT_ONCE, groups, is_held
from .events import Plan, Stage, Step
from .injection import FOUND
from .sampling import Edit
from .subject import subject_steps

if TYPE_CHECKING:
    from .job import EditJob

_TUNING = 2.4  # forward passes that a tuning step takes as long as, measured (SPEED.md)
CONTROL = 0.33  # of a forward pass of the U-Net, what one of a ControlNet takes: measured for SD 1.5


def plan_of(job: "EditJob", done: Collection[str] = ()) -> Plan:
    """The stages of `run_edit`, but for those that are done; "reconstruction" is a part of the last one."""
    preset, to_draw = job.preset, [] if "reconstruction" in done else [[Edit(job.prompt)]]  # which is an edit as well
    guided = (preset.guidance_scale > 1) * (preset.guidance_end - preset.guidance_start)
    led = sum(each.end - each.start for each in each_of(job.control) if each.strength)
    sampling = float(len(to_draw))  # the walk back, without guidance
    together = groups(job.edits, preset, job.knows_subject, preset.edits_at_once or AT_ONCE)
    for group in [*to_draw, *together]:
        held = any(is_held(edit, preset, job.knows_subject) for edit in group)
        beside = 1 if held else group[0].preset_of(preset).attention_injection
        sampling += beside + (1 + guided) * len(group)
        found = sum(subject_steps(len(job.contrasts)) for edit in group if edit.region in FOUND)
        sampling += found / preset.sampling_steps
    sampling += CONTROL * led * (1 + guided) * len(job.edits)
    samplings = 2 * len(to_draw) + len(job.edits)
    stages = [
        Stage("encode", 1, 0.0),
        Stage("tune", preset.tuning.steps, _TUNING),
        Stage("invert", preset.sampling_steps, 1.0),
        Stage("sample", samplings * preset.sampling_steps, sampling / samplings),
    ]
    if job.knows_subject and job.mask is None:
        stages.insert(3, Stage("subject", subject_steps(len(job.contrasts), bool(job.word)), 1.0))
    return Plan(tuple(stage for stage in stages if stage.name not in done))


class Remaining:
    """Follows the steps of a plan.

    A step of a stage that has begun takes as long as those before it did; one of a later stage, until it has begun, as
    long as their costs tell. Nothing is told before a step has been timed.
    """

    def __init__(self, plan: Plan, clock: Callable[[], float] = time.monotonic):
        self.stages, self.clock, self.began = plan.stages, clock, clock()
        self.at, self.done, self.parts, self.last = 0, 0, 0, 0
        self.first: tuple[float, int] | None = None  # when the first step of this stage was done, and how many were
        self.second = 0.0  # seconds of one forward pass, by the last stage that was timed

    def after(self, step: Step) -> str:
        """What there is to tell after a step: the stage, and how long it will still take."""
        names, now = [stage.name for stage in self.stages], self.clock()
        if step.stage not in names[self.at :]:  # a look in between, which the samplings' cost tells of
            return ""
        if names[self.at] != step.stage:
            self.at, self.parts, self.last, self.first = names.index(step.stage, self.at), 0, 0, None
        if step.step <= self.last:  # the next of several samplings
            self.parts = self.done
        self.last, self.done = step.step, self.parts + step.step * step.videos
        stage, rate = self.stages[self.at], None
        if self.first is None:
            self.first = now, self.done
        elif self.done > self.first[1]:
            rate = (now - self.first[0]) / (self.done - self.first[1])
            self.second = rate / stage.cost if stage.cost else self.second
        told = [f"stage {self.at + 1} of {len(names)}"] if len(names) > 1 else []
        if rate is not None or self.second:
            rate = self.second * stage.cost if rate is None else rate
            left = (stage.steps - self.done) * rate
            left += sum(each.steps * each.cost * self.second for each in self.stages[self.at + 1 :])
            told.append(f"{clock_time(left)} left of about {clock_time(now - self.began + left)}")
        return ", ".join(told)


def clock_time(seconds: float) -> str:
    """As 1:40 or 2:05:00, to the second."""
    minutes, second = divmod(max(0, round(seconds)), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{second:02}" if minutes >= 60 else f"{minutes}:{second:02}"
