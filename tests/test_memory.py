"""Memory modes of the tuning: what each keeps and needs, which one is chosen, and what happens when the memory runs
out.
"""

import copy
from dataclasses import replace

import pytest
import torch

from support.tuning_runs import CONFIG, make_unet, notes, run, stop_at, take, weights
from tav_core import bench
from tav_core.errors import Cancelled, OutOfMemory
from tav_core.memory import Device, _Peak, choose, is_out_of_memory, needed_memory, sampling_memory
from tav_core.objective import tuning_loss
from tav_core.recompute import MEMORY
from tav_core.tuning_state import read_state

GB = 10**9
NEEDED = {"fast": 10 * GB, "selective": 7 * GB, "checkpointing": 5 * GB, "low": 2 * GB}
OUT_OF_MEMORY = (
    "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate"
)


@pytest.fixture(scope="module")
def of_each():
    """By mode, a run's result, its weights and the memory modes that the U-Net had in its steps."""
    return {memory: trained(memory) for memory in MEMORY}


def trained(memory, **kwargs):
    unet, lines = make_unet(), []
    stop = kwargs.pop("callback", lambda event: None)
    result = run(
        unet, replace(CONFIG, memory=memory), callback=lambda event: (lines.append(event), stop(event)), **kwargs
    )
    assert unet.memory == "fast"  # as it was
    return result, weights(unet), notes(lines)


def check_same(of_each, result, tuned):
    """To rounding, as in all of these tests: some modes take products of fewer rows, which end in other last bits on
    some CPUs.

    Rounding moves what is learned in six steps by some millionths; a gradient without one of its parts moves it by
    tenths.
    """
    expected, learned = of_each["fast"], weights(make_unet())
    assert result.losses == pytest.approx(expected[0].losses, rel=1e-5)
    error, size = (
        sum((a[name] - b[name]).square().sum().item() for name in learned)
        for a, b in ((tuned, expected[1]), (expected[1], learned))
    )
    assert tuned.keys() == learned.keys() and error < 1e-6 * size


def test_all_modes_give_the_same_weights(of_each):
    for result, tuned, lines in of_each.values():
        check_same(of_each, result, tuned)
        assert not lines  # a mode that was named needs no words


@pytest.mark.parametrize("part", ["attn1.to_q", "attn_temp.to_v"])
def test_a_gradient_that_is_missing_would_be_seen(of_each, monkeypatch, part):
    def loss(unet, *args):
        for name, parameter in unet.named_parameters():
            if part in name:
                parameter.requires_grad_(False)
        return tuning_loss(unet, *args)

    monkeypatch.setattr("tav_core.tuning.tuning_loss", loss)
    with pytest.raises(AssertionError):
        check_same(of_each, *trained("low")[:2])


@pytest.fixture(scope="module")
def subject():
    return bench.Workload(bench.LAYOUTS["small"], "cpu")


def test_each_mode_keeps_less_than_the_one_before(subject):
    kept = []
    for memory in MEMORY:
        unet, storages = subject.unet, {}
        unet.set_memory(memory)
        given = {parameter.untyped_storage().data_ptr() for parameter in unet.parameters()}

        def keep(tensor, storages=storages):
            storages[tensor.untyped_storage().data_ptr()] = tensor  # which lives, so that no other gets its address
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            tuning_loss(
                unet,
                subject.checkpoint.scheduler,
                subject.latents,
                subject.latents,
                torch.tensor([500]),
                subject.texts[0],
            )
        kept.append(
            sum(tensor.untyped_storage().nbytes() for pointer, tensor in storages.items() if pointer not in given)
        )
    subject.unet.set_memory("fast")
    assert kept[0] > 1.4 * kept[1] and kept[1] > 2 * kept[2] and kept[2] > 1.5 * kept[3]


def estimate(subject, memory, **changes):
    inputs = {"latents": subject.latents, "dtype": torch.float32} | changes
    seen = take(inputs["latents"], subject.texts[0])
    return needed_memory(subject.unet, seen, inputs["dtype"], memory, torch.device("cpu"))


@pytest.mark.slow
def test_the_estimate_is_near_the_measured_peak(subject, monkeypatch, without_comfyui):
    """Measured in a process of its own, where the code and the buffers of kernels that run for the first time count as
    well.
    """
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", str(1 << 17))  # or the C library keeps what was freed
    layout, kernels = replace(bench.LAYOUTS["small"], frames=12), 15e6
    used = bench.memory(layout, bench.Mode(), "tune", "cpu", 1)
    measured = (used["peak"] - used["before"]) * GB - kernels
    assert 0.7 < estimate(subject, "fast", latents=subject.latents.repeat(1, 1, 3, 1, 1)) / measured < 1.3


@pytest.mark.slow
def test_the_estimate_grows_with_the_clip_and_falls_with_the_dtype(subject):
    one, two = (estimate(subject, "fast", latents=subject.latents[:, :, :frames]) for frames in (2, 4))
    assert 1.7 < two / one < 2.05
    assert 0.45 < estimate(subject, "fast", dtype=torch.bfloat16) / two < 0.8
    assert all(parameter.grad is None and parameter.device.type == "cpu" for parameter in subject.unet.parameters())


@pytest.mark.slow
def test_the_estimate_of_sampling_is_near_the_measured_peak(subject, monkeypatch, without_comfyui):
    """Of a guided step without a clip beside it, two videos; an estimate is of three, and two for each further edit."""
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", str(1 << 17))  # or the C library keeps what was freed
    layout, kernels = replace(bench.LAYOUTS["small"], frames=24), 15e6
    used = bench.memory(layout, bench.Mode(), "sample", "cpu", 1)
    measured = (used["peak"] - used["before"]) * GB - kernels
    latents = subject.latents.repeat(1, 1, 6, 1, 1)
    one, four = (sampling_memory(subject.unet, latents, subject.texts[0], edits) for edits in (1, 4))
    assert 0.7 < one * 2 / 3 / measured < 1.3 and 2.9 < four / one < 3.1
    half = sampling_memory(copy.deepcopy(subject.unet).to(torch.bfloat16), latents, subject.texts[0], 1)
    assert 0.45 < half / one < 0.7


def test_the_estimate_takes_class_labels():
    unet = make_unet()
    labelled = copy.deepcopy(unet)
    labelled.class_embedding = torch.nn.Embedding(3, unet.time_embedding.linear_2.out_features)
    arguments = (torch.zeros(1, 4, 3, 4, 4), torch.zeros(1, 5, 24))
    rest, label = (torch.float32, "fast", torch.device("cpu")), torch.tensor([1])
    more = needed_memory(labelled, take(*arguments, class_labels=label), *rest)
    assert more > needed_memory(unet, take(*arguments), *rest)
    assert sampling_memory(labelled, *arguments, 2) >= sampling_memory(unet, *arguments, 2)


def test_the_estimate_with_an_older_torch(monkeypatch):
    """Which looks for a module torch.meta where it computes a part again."""
    given = take(torch.zeros(1, 4, 3, 4, 4), torch.zeros(1, 5, 24)), torch.float32, "low", torch.device("cpu")
    expected = needed_memory(make_unet(), *given)
    monkeypatch.setattr("torch.utils.checkpoint._get_device_module", lambda device: getattr(torch, device))
    with pytest.raises(AttributeError, match="meta"):
        needed_memory(make_unet(), *given)
    monkeypatch.setattr("tav_core.memory.is_torch_version", lambda *version: True)
    monkeypatch.setattr(torch, "_register_device_module", lambda *of: monkeypatch.setattr(torch, *of, raising=False))
    assert needed_memory(make_unet(), *given) == expected


@pytest.mark.parametrize("free, memory, line", [
    (13, "fast", "memory: fast, which needs about 12.0 GB of the 13.0 GB that are free"),
    (11, "selective", "memory: selective, since fast needs about 12.0 GB and 11.0 GB are free"),
    (7, "checkpointing", "memory: checkpointing, since selective needs about 8.4 GB and 7.0 GB are free"),
    (4, "low", "memory: low, since checkpointing needs about 6.0 GB and 4.0 GB are free"),
    (2, "low", "memory: low, though it needs about 2.4 GB and 2.0 GB are free"),
])  # fmt: skip
def test_the_first_mode_that_fits_is_chosen(free, memory, line):
    assert choose(NEEDED.get, free * GB) == (memory, line)


@pytest.mark.slow
def test_what_is_free_is_asked_when_the_weights_are_as_they_compute(monkeypatch):
    """Of a half-precision U-Net that is tuned in float32, the weights take twice as much then."""
    unet, seen = make_unet().to(torch.float16), []

    class Asked(Device):
        def make_room(self, needed):
            seen.append(needed() > 0)

        def free(self):
            seen.append({parameter.dtype for parameter in unet.parameters()})
            return 16 * GB

    run(unet, replace(CONFIG, steps=1, memory="auto"), device=Asked(torch.device("cpu")))
    assert seen == [True, {torch.float32}]


@pytest.mark.parametrize("told", ["memory", "step"])
def test_a_callback_that_stops_at_a_note_loses_nothing(monkeypatch, tmp_path, told):
    def stop(event):
        if getattr(event, "about", "step") == told and getattr(event, "step", 3) == 3:
            raise Cancelled

    run_out(monkeypatch, 4, ["fast"])
    path = tmp_path / "run.safetensors"
    with pytest.raises(Cancelled):
        run(make_unet(), replace(CONFIG, memory="fast", save_every=100), state_path=path, callback=stop)
    assert read_state(path)[0].step == 3


@pytest.mark.slow
def test_auto_goes_by_what_is_free(of_each, monkeypatch):
    seen = []

    def loss(unet, *args):
        if torch.is_grad_enabled():
            seen.append(unet.memory)
        return tuning_loss(unet, *args)

    monkeypatch.setattr("tav_core.tuning.tuning_loss", loss)
    monkeypatch.setattr("tav_core.memory.free_memory", lambda device: 0)
    result, tuned, lines = trained("auto")
    assert set(seen) == {"low"}
    check_same(of_each, result, tuned)
    assert len(lines) == 1 and lines[0].startswith("memory: low, though it needs about 0.0 GB")
    monkeypatch.setattr("tav_core.memory.free_memory", lambda device: 16 * GB)
    assert trained("auto")[2] == ["memory: fast, which needs about 0.0 GB of the 16.0 GB that are free"]


def run_out(monkeypatch, step, modes, error=OUT_OF_MEMORY):
    """From a step on, the backward pass runs out of memory in some modes. Returns modes and losses of all attempts."""
    attempts = []

    class Hungry(torch.autograd.Function):
        @staticmethod
        def forward(ctx, loss, memory):
            ctx.memory, ctx.attempt = memory, len(attempts)
            return loss.clone()

        @staticmethod
        def backward(ctx, grad):
            if ctx.attempt >= step - 1 and ctx.memory in modes:
                raise RuntimeError(error)
            return grad, None

    def loss(unet, *args):
        value = tuning_loss(unet, *args)
        if not torch.is_grad_enabled():
            return value
        value = Hungry.apply(value, unet.memory)
        attempts.append((unet.memory, value.item()))
        return value

    monkeypatch.setattr("tav_core.tuning.tuning_loss", loss)
    return attempts


@pytest.mark.parametrize("memory, lower", [("fast", "selective"), ("checkpointing", "low")])
def test_a_step_that_runs_out_of_memory_is_run_again_in_the_next_lower_mode(of_each, monkeypatch, memory, lower):
    attempts = run_out(monkeypatch, 4, [memory])
    result, tuned, lines = trained(memory)
    assert [mode for mode, _ in attempts] == [memory] * 4 + [lower] * 3
    assert attempts[3][1] == pytest.approx(attempts[4][1], rel=1e-5)  # the same draws
    check_same(of_each, result, tuned)
    assert lines == [f"memory: {lower} from step 4 on, since {memory} ran out of memory"]


@pytest.mark.parametrize("memory, failing, remedy", [
    ("fast", ("fast", "selective"), ", context_length, memory low or dtype bf16"),
    ("low", ("low",), ", context_length or dtype bf16"),
])  # fmt: skip
def test_a_step_that_runs_out_of_memory_again_ends_the_run(of_each, monkeypatch, tmp_path, memory, failing, remedy):
    path = tmp_path / "run.safetensors"
    with monkeypatch.context() as patch, pytest.raises(OutOfMemory, match="ran out of memory at step 4") as caught:
        run_out(patch, 4, failing)
        trained(memory, state_path=path)
    assert str(caught.value).endswith(remedy) and "\n" not in str(caught.value)
    result, tuned, _ = trained("low", state_path=path)  # what was learned is kept
    assert result.steps == 6
    check_same(of_each, result, tuned)


def test_nothing_of_a_failed_step_stays_alive(monkeypatch):
    """When the step runs again, the graph and the gradients of the first attempt are gone."""
    unet, living = make_unet(), []
    parameters = [parameter for parameter in unet.parameters() if parameter.requires_grad]

    def fail(grad):
        living.append(count.now)
        raise RuntimeError(OUT_OF_MEMORY)

    def loss(unet, *args):
        if torch.is_grad_enabled():
            living.append(count.now)
        return tuning_loss(unet, *args)

    hook = parameters[len(parameters) // 2].register_hook(fail)  # half-way
    monkeypatch.setattr("tav_core.tuning.tuning_loss", loss)
    with _Peak([*unet.parameters()]) as count:
        run(unet, replace(CONFIG, steps=1, memory="fast"), callback=lambda event: hook.remove())
    before, failing, again = living
    assert failing > before + 100_000 and again <= before + 100


def test_other_errors_are_not_taken_for_it(monkeypatch):
    run_out(monkeypatch, 2, MEMORY, error="a mistake")
    with pytest.raises(RuntimeError, match="a mistake"):
        trained("fast")
    assert is_out_of_memory(torch.cuda.OutOfMemoryError("CUDA out of memory.")) and not is_out_of_memory(
        RuntimeError("a mistake")
    )


def test_a_run_goes_on_in_another_mode(of_each, tmp_path):
    path = tmp_path / "run.safetensors"
    with pytest.raises(Cancelled):
        trained("low", state_path=path, callback=stop_at(3))
    result, tuned, lines = trained("fast", state_path=path)
    check_same(of_each, result, tuned)
