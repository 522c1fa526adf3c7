"""How long a job still takes: told by timed steps alone, and from stages that are done for those that come."""

import pytest
import torch

from tav_core import PRESETS, Control, Edit, EditJob, terminal, with_settings
from tav_core.events import DDIMStep, Plan, Stage, Step
from tav_core.remaining import CONTROL, Remaining, clock_time, plan_of
from tav_core.subject import subject_mask, subject_steps

PLAN = Plan((Stage("encode", 1, 0.0), Stage("tune", 100, 2.0), Stage("sample", 20, 3.0)))


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now

    def after(self, seconds: float) -> float:
        self.now += seconds
        return self.now


def test_nothing_is_told_before_a_step_is_timed():
    clock = Clock()
    remaining = Remaining(PLAN, clock)
    clock.after(30)  # encoding
    assert remaining.after(Step("encode", 1, 1)) == "stage 1 of 3"
    clock.after(50)  # of which nobody knows how much was the step
    assert remaining.after(Step("tune", 1, 100)) == "stage 2 of 3"
    clock.after(2)
    # 98 steps of 2 s, then 20 of 3 s, as a forward pass takes 1 s
    assert remaining.after(Step("tune", 2, 100)) == "stage 2 of 3, 4:16 left of about 5:38"


def test_later_stages_are_timed_anew():
    clock = Clock()
    remaining = Remaining(PLAN, clock)
    for step in (1, 2, 3):
        clock.after(2)
        remaining.after(Step("tune", step, 100))
    clock.after(6)
    assert remaining.after(Step("sample", 1, 10)) == "stage 3 of 3, 0:57 left of about 1:09"  # 19 of 3 s, as it seems
    clock.after(1)
    assert remaining.after(Step("sample", 2, 10)) == "stage 3 of 3, 0:18 left of about 0:31"  # 18 of 1 s, as it is
    for step in range(3, 11):
        clock.after(1)
        told = remaining.after(Step("sample", step, 10))
    assert told == "stage 3 of 3, 0:10 left of about 0:31"
    clock.after(1)
    assert remaining.after(Step("sample", 1, 10)) == "stage 3 of 3, 0:09 left of about 0:31"  # the second sampling


def test_a_step_of_edits_that_are_drawn_together_counts_for_each():
    clock, latents = Clock(), torch.zeros(3, 4, 1, 2, 2)
    remaining = Remaining(Plan((Stage("sample", 80),)), clock)

    def step(number, videos):
        clock.after(videos)
        return remaining.after(DDIMStep("sample", number, 20, 0, latents[:videos], latents[:videos]))

    told = [step(number, 1) for number in range(1, 21)] + [step(number, 3) for number in range(1, 21)]
    assert told[19] == "1:00 left of about 1:20" and told[20] == "0:57 left of about 1:20"
    assert told[-1] == "0:00 left of about 1:20"


def test_a_plan_has_the_steps_that_an_edit_takes():
    preset = with_settings(PRESETS["mini"], steps=30, sampling_steps=10, guidance_scale=5.0, attention_injection=0.5)
    plan = plan_of(EditJob("a red ball", [Edit("one"), Edit("two")], with_settings(preset, edits_at_once=1)))
    assert [(stage.name, stage.steps) for stage in plan.stages] == [
        ("encode", 1), ("tune", 30), ("invert", 10), ("sample", 40)]  # fmt: skip
    assert plan.stages[-1].cost == (1 + 3 * 2.5) / 4  # the walk, and three guided, for half of the steps beside it
    hints = torch.zeros(1, 8, 8, 3, dtype=torch.uint8)  # for half of the steps, for all, and for none
    led = [Control(None, hints, end=0.5), Control(None, hints, strength=0.1), Control(None, hints, strength=0.0)]
    for control, share in ((led, 1.5), (led[0], 0.5)):
        plan = plan_of(EditJob("a red ball", [Edit("one"), Edit("two")], preset, control=control))
        assert plan.stages[-1].cost == pytest.approx((1 + 2.5 + 4.5 + 2 * 2 * share * CONTROL) / 4)
    together = plan_of(EditJob("a red ball", [Edit("one"), Edit("two")], preset))
    assert together.stages[-1] == Stage("sample", 40, (1 + 2.5 + 4.5) / 4)  # beside both it walks once
    five = [*[Edit("one", guidance_scale=scale) for scale in (1.0, 2.0, 3.0, 4.0, 5.0)], Edit("one", "subject")]
    found = plan_of(EditJob("a red ball", five, with_settings(preset, steady=False), ["a blue star"]))
    assert found.stages[-1] == Stage(
        "sample", 80, (1 + 2.5 + 8.5 + 5 + 0.8) / 8
    )  # four, two of which one is held, and found in 8
    found = plan_of(EditJob("a red ball", [Edit("one", "subject")], preset, ["a blue star", "a ring"], word="ball"))
    assert [(stage.name, stage.steps) for stage in found.stages][3] == ("subject", 4 * 3 + 10)


def test_finding_the_subject_tells_its_steps(checkpoint):
    latents, events = torch.randn(1, 4, 2, 8, 8), []
    texts = torch.randn(3, 77, checkpoint.unet.config.cross_attention_dim)

    class Unet:
        dtype = torch.float32

        def __call__(self, latents, timestep, text):
            return latents * text.mean()

    subject_mask(Unet(), latents, texts[:1], texts[1:], checkpoint.scheduler, callback=events.append)
    assert events == [Step("subject", step, 12) for step in range(1, 13)] and subject_steps(2) == 12


@pytest.mark.parametrize("seconds, told", [(0.4, "0:00"), (100, "1:40"), (3599.7, "1:00:00"), (7501, "2:05:01")])
def test_times(seconds, told):
    assert clock_time(seconds) == told


def test_a_file_gets_a_plain_line_now_and_then(monkeypatch, capsys):
    clock = Clock()
    monkeypatch.setattr(terminal.time, "monotonic", clock)
    progress = terminal.Progress()
    progress(PLAN)
    progress.remaining = Remaining(PLAN, clock)
    for step in range(1, 101):
        clock.after(2)
        progress(Step("tune", step, 100))
    for step in range(1, 21):
        clock.after(1)
        progress(Step("sample", step, 20))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "tuning: step 1 of 100, stage 2 of 3"
    assert lines[1] == "tuning: step 11 of 100, stage 2 of 3, 3:58 left of about 4:20"
    assert len(lines) == 1 + 9 + 1 + 3 and not any("\r" in line for line in lines)
    assert lines[-1] == "sampling: step 20 of 20, stage 3 of 3, 0:00 left of about 3:40"
    quiet = terminal.Progress(quiet=True)
    for event in (PLAN, Step("tune", 1, 9), terminal.Note("memory: fast")):
        quiet(event)
    assert capsys.readouterr() == ("", "")
