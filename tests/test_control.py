"""ControlNets and T2I-Adapters through the stock nodes: on native MODELs and on inflated ones."""

import pytest
import torch

from support.controls import control_net, controlled, hints, steered, t2i_adapter
from support.native_models import clip, inflated, native, prompt, relative, sample

pytestmark = pytest.mark.usefixtures("inference_mode")


@pytest.mark.parametrize("nets", [
    [(control_net, 0.8, 0.0, 1.0)], [(control_net, 1.0, 0.3, 0.7)],
    [(control_net, 0.5, 0.0, 1.0), (control_net, 1.0, 0.0, 0.6)],
    [(t2i_adapter, 1.0, 0.0, 1.0)], [(t2i_adapter, 0.7, 0.0, 0.6), (control_net, 0.7, 0.2, 1.0)],
], ids=["strength", "start and end", "two", "T2I-Adapter", "one of each"])  # fmt: skip
@pytest.mark.parametrize("on", ["both", "positive"])
def test_controlnets_and_adapters_steer_as_on_the_native_model(pack, nets, on):
    model = native()
    applied = [(make(seed), hints(seed=seed), *settings) for seed, (make, *settings) in enumerate(nets)]
    prompts = controlled(prompt(1), *applied)
    if on == "positive":
        prompts = prompts[0], prompt(2)
    without = sample(model, steps=4)
    expected = steered(model, prompts, clip())
    assert relative(expected, without) > 1e-2
    wrapped = inflated(pack, model)
    assert relative(steered(wrapped, prompts, clip()), expected) < 1e-4
    # one hint is for all frames
    together = steered(wrapped, prompts, clip().expand(3, -1, -1, -1))
    assert relative(together, expected.expand(3, -1, -1, -1)) < 1e-4


def test_one_hint_of_a_t2i_adapter_and_attention_injection_together(pack):
    model, adapter, noise = inflated(pack, native()), t2i_adapter(1), clip(3)
    led = pack.nodes.AttentionInjection.execute(model, prompt(2), 0.5).args[0]
    one, each = (steered(led, controlled(prompt(1), (adapter, hint, 1.0, 0.0, 1.0)), noise)
                 for hint in (hints(1), hints(1).expand(3, -1, -1, -1)))  # fmt: skip
    assert relative(one, each) < 1e-5 < 1e-3 < relative(one, steered(led, (prompt(1), prompt(2)), noise))


def test_each_frame_has_its_hint(pack):
    wrapped, net, noise = inflated(pack, native(), norm="frame"), control_net(1), clip(3)
    both = [hints(3), hints(3)]
    both[1][2] = 0
    first, second = (steered(wrapped, controlled(prompt(1), (net, hint, 1.0, 0.0, 1.0)), noise) for hint in both)
    # the last frame is looked at by no other, and temporal attention is still silent
    assert relative(second[:2], first[:2]) < 1e-6 < 1e-3 < relative(second[2], first[2])
    alone = steered(wrapped, controlled(prompt(1), (net, both[0][:1], 1.0, 0.0, 1.0)), noise[:1])
    assert relative(first[:1], alone) < 1e-4


def test_a_controlnet_and_attention_injection_together(pack):
    model, net, noise = inflated(pack, native()), control_net(1), clip(3)
    led = pack.nodes.AttentionInjection.execute(model, prompt(2), 0.5).args[0]
    prompts = controlled(prompt(1), (net, hints(3), 1.0, 0.0, 1.0))
    runs = {
        name: steered(*run, noise)
        for name, run in {
            "plain": (model, prompts),
            "led": (led, prompts),
            "led freely": (led, (prompt(1), prompt(2))),
            "off": (led, controlled(prompt(1), (net, hints(3), 0.0, 0.0, 1.0))),
        }.items()
    }
    assert all(torch.isfinite(run).all() for run in runs.values())
    assert relative(runs["off"], runs["led freely"]) < 1e-5
    assert min(relative(runs["led"], runs[name]) for name in ("plain", "led freely")) > 1e-2


@pytest.mark.parametrize("make", [control_net, t2i_adapter])
def test_hints_that_fit_nothing_are_refused(pack, make):
    model, net = native(), make(1)
    wrapped = inflated(pack, model)
    for count in (2, 4):
        prompts = controlled(prompt(1), (net, hints(count), 1.0, 0.0, 1.0))
        with pytest.raises(
            ValueError, match=f"has {count} hints, LATENT has 3 frames; give it 1 image for all frames, or 3"
        ):
            steered(wrapped, prompts, clip(3))
    assert torch.isfinite(steered(model, prompts, clip(3))).all()  # a batch of single pictures takes them in turn


def test_an_adapter_of_another_family_is_refused(pack):
    adapter = t2i_adapter(1, cin=3 * 256, xl=True)
    with pytest.raises(
        ValueError, match="T2I-Adapter is for another family of models; use one for the family of MODEL"
    ):
        steered(inflated(pack, native()), controlled(prompt(1), (adapter, hints(), 1.0, 0.0, 1.0)), clip())
