"""The nodes on the mini checkpoint against the core: each stage gives what it gives there."""

import json
import math
import re

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler

from support.led_sampling import led_sample
from support.native_models import inflated, native, plain, relative
from tav_core import (
    Condition,
    EditPlaces,
    Take,
    TuneConfig,
    ddim_invert,
    ddim_sample,
    encode_prompt,
    encode_video,
    inflate,
    pipeline,
    subject_mask,
    tune,
)
from tav_core.subject import outlined, softened, word_mask
from tav_core.tuned_weights import _fingerprint

pytestmark = pytest.mark.usefixtures("inference_mode")


def test_text_and_latents_are_those_of_the_core(mini):
    for words in ("a red ball is sliding on the grass", "", "a zebra, sketch style"):
        assert (mini.encode(words)[0][0] - encode_prompt(mini.checkpoint, words)).abs().max() < 1e-5
    mean, _ = encode_video(mini.checkpoint, (mini.images.movedim(-1, 0)[None] * 2 - 1))
    assert (mini.latents - mean).abs().max() < 1e-5
    tiled = mini.vae.decode_tiled(mini.latent["samples"], tile_x=12, tile_y=12, overlap=4)
    assert (tiled - mini.vae.decode(mini.latent["samples"])).abs().mean() < 0.05


def test_the_2d_checkpoint_is_a_native_model(mini):
    one = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    assert relative(plain(mini.inflated, one, mini), plain(mini.model, one, mini)) < 1e-4


def test_inversion_and_sampling_are_those_of_the_core(pack, mini):
    latent, sigmas, error = pack.nodes.DDIMInversion.execute(
        mini.inflated, mini.latent, mini.encode(""), 5, "ddim_uniform", True
    ).args
    unet, empty = inflate(mini.checkpoint.unet), encode_prompt(mini.checkpoint, "")
    scheduler = DDIMScheduler.from_config(mini.checkpoint.scheduler.config, set_alpha_to_one=True)
    wanted = ddim_invert(unet, mini.latents, empty, scheduler, 5)
    z = mini.model.model.process_latent_in(latent["samples"]) / (1 + sigmas[0] ** 2).sqrt()
    assert (z.movedim(0, 1)[None] - wanted).abs().max() < 1e-4
    back = ddim_sample(unet, wanted, empty, scheduler, 5, guidance_scale=1)
    assert error == pytest.approx((back - mini.latents).square().mean().sqrt().item(), rel=1e-3)

    edit = "a blue star is sliding on the snow"
    arguments = (mini.inflated, mini.encode(edit), mini.encode(""), latent, 5, 5.0, "ddim_uniform", 0.0, False, 0)
    edited = pack.nodes.VideoSampler.execute(*arguments).args[0]
    wanted = ddim_sample(
        unet,
        wanted,
        encode_prompt(mini.checkpoint, edit),
        scheduler,
        5,
        guidance_scale=5.0,
        negative_hidden_states=empty,
    )
    assert (mini.model.model.process_latent_in(edited["samples"]).movedim(0, 1)[None] - wanted).abs().max() < 1e-3


@pytest.mark.parametrize("split", [False, True])
def test_attention_injection_is_that_of_the_core(pack, mini, monkeypatch, split):
    if split:  # positive and negative prompt in calls of their own, as when memory is short
        monkeypatch.setattr(mini.inflated.model, "memory_required", lambda *args, **kwargs: 1e15)
    nodes, caption, edit = pack.nodes, "a red ball is sliding on the grass", "a blue star is sliding on the snow"
    model = nodes.AttentionInjection.execute(mini.inflated, mini.encode(caption), 0.5).args[0]
    noise = nodes.DDIMInversion.execute(model, mini.latent, mini.encode(caption), 5, "ddim_uniform", False).args[0]
    plain = nodes.DDIMInversion.execute(
        mini.inflated, mini.latent, mini.encode(caption), 5, "ddim_uniform", False
    ).args[0]
    assert torch.equal(noise["samples"], plain["samples"])  # inversion is never led

    unet, scheduler = (
        inflate(mini.checkpoint.unet),
        DDIMScheduler.from_config(mini.checkpoint.scheduler.config, set_alpha_to_one=True),
    )
    said, wish, empty = (encode_prompt(mini.checkpoint, words) for words in (caption, edit, ""))
    start = ddim_invert(unet, mini.latents, said, scheduler, 5)
    outs = []
    for _ in range(2):  # nothing of a walk is left for the next one
        edited = nodes.VideoSampler.execute(
            model, mini.encode(edit), mini.encode(""), noise, 5, 5.0, "ddim_uniform", 0.0, False, 0
        )
        outs.append(mini.model.model.process_latent_in(edited.args[0]["samples"]).movedim(0, 1)[None])
    assert torch.equal(*outs)
    settings = dict(guidance_scale=5.0, negative_hidden_states=empty, source_hidden_states=said)
    wanted, without = (
        led_sample(unet, start, wish, scheduler, 5, attention_injection=share, **settings) for share in (0.5, 0.0)
    )
    assert (outs[0] - wanted).abs().max() < 1e-3 < 0.1 < (wanted - without).abs().max()


@pytest.mark.parametrize("region", ["subject", "shape", "background", "everything"])
def test_subject_and_region_are_those_of_the_core(pack, mini, region):
    nodes, caption, edit = pack.nodes, "a red ball is sliding on the grass", "a blue star is sliding on the snow"
    others = ["a green heart is sliding on the grass", "a purple ring is sliding on the grass"]
    contrast = [entry for other in others for entry in mini.encode(other)]
    mask = nodes.SubjectMask.execute(
        mini.inflated, mini.latent, mini.images, mini.encode(caption), contrast, 0.15, 3, 0
    ).args[0]
    unet, scheduler = (
        inflate(mini.checkpoint.unet),
        DDIMScheduler.from_config(mini.checkpoint.scheduler.config, set_alpha_to_one=True),
    )
    said, wish, empty, *told = (encode_prompt(mini.checkpoint, words) for words in (caption, edit, "", *others))
    found = subject_mask(unet, mini.latents, said, torch.cat(told), scheduler)
    subject = softened(outlined(found, (mini.images * 255).round().to(torch.uint8)), 3)
    assert mask.shape == (4, 128, 128) and 0.02 < subject.mean() < 0.5
    assert (mask - subject[0, 0]).abs().mean() < 0.01

    model = nodes.AttentionInjection.execute(mini.inflated, mini.encode(caption), 0.5, region, True, mask).args[0]
    noise = nodes.DDIMInversion.execute(model, mini.latent, mini.encode(caption), 5, "ddim_uniform", False).args[0]
    edited = nodes.VideoSampler.execute(
        model, mini.encode(edit), mini.encode(""), noise, 5, 5.0, "ddim_uniform", 0.0, False, 0
    ).args[0]
    edited = mini.model.model.process_latent_in(edited["samples"]).movedim(0, 1)[None]
    start, subject = ddim_invert(unet, mini.latents, said, scheduler, 5), F.avg_pool2d(mask, 8)[None, None]
    settings = dict(
        guidance_scale=5.0, negative_hidden_states=empty, source_hidden_states=said, attention_injection=0.5
    )
    places = vars(EditPlaces.of(region, subject, margin=1))
    wanted = led_sample(unet, start, wish, scheduler, 5, **places, **settings)
    free = led_sample(unet, start, wish, scheduler, 5, anchor=places["anchor"], **settings)
    assert (edited - wanted).abs().max() < 1e-3 < 0.1 < (wanted - free).abs().max()
    with pytest.raises(ValueError, match="subject has 3 masks for 4 frames"):
        model = nodes.AttentionInjection.execute(mini.inflated, mini.encode(caption), 0.5, region, True, mask[:3]).args[
            0
        ]
        nodes.VideoSampler.execute(
            model, mini.encode(edit), mini.encode(""), noise, 5, 5.0, "ddim_uniform", 0.0, False, 0
        )
    with pytest.raises(
        ValueError, match="region .* needs to know where the subject is; connect subject to Subject Mask"
    ):
        nodes.AttentionInjection.execute(mini.inflated, mini.encode(caption), 0.5, "subject")


@pytest.mark.parametrize("region", ["subject", "everything"])
def test_clips_of_one_latent_are_led_apart(pack, mini, region):
    nodes, native = pack.nodes, pack.nodes.native
    caption, edits = mini.encode("a red ball"), [mini.encode(f"a {kind} star") for kind in ("blue", "yellow")]
    tuned = mini.inflated.clone()
    tuned.model_options["transformer_options"] = {**tuned.model_options["transformer_options"], native.FRAMES: 4}
    first = nodes.DDIMInversion.execute(mini.inflated, mini.latent, caption, 3, "ddim_uniform", False).args[0][
        "samples"
    ]
    mask = torch.zeros(4, 128, 128)
    mask[:, 32:96, 32:96] = 1

    def edited(samples, masks, edit):
        model = nodes.AttentionInjection.execute(tuned, caption, 0.7, region, True, masks).args[0]
        arguments = (edit, mini.encode(""), {"samples": samples}, 3, 5.0, "ddim_uniform", 0.0, False, 0)
        return nodes.VideoSampler.execute(model, *arguments).args[0]["samples"]

    clips, masks = (first, first.flip(-1)), (mask, mask.roll(16, -1))
    alone = torch.cat([edited(*of_clip, edits[0]) for of_clip in zip(clips, masks)])
    together = edited(torch.cat(clips), torch.cat(masks), edits[0])
    assert (together - alone).abs().max() < 1e-3 < 0.1 < (alone[:4] - alone[4:]).abs().max()


def test_the_mask_of_a_word_is_that_of_the_core(pack, mini):
    caption = "a red ball is sliding on the grass"
    clip = pack.nodes.LoadCheckpoint.execute("mini").args[1]
    mask = pack.nodes.WordMask.execute(mini.inflated, clip, mini.latent, mini.images, caption, "ball", 5, 0.3, 0).args[
        0
    ]
    unet, ids = inflate(mini.checkpoint.unet), mini.checkpoint.tokenizer(caption).input_ids
    scheduler = DDIMScheduler.from_config(mini.checkpoint.scheduler.config, set_alpha_to_one=True)
    wanted = word_mask(
        unet, mini.latents, encode_prompt(mini.checkpoint, caption), [3], scheduler, steps=5, threshold=0.3
    )
    assert ids[3] == mini.checkpoint.tokenizer("ball", add_special_tokens=False).input_ids[0]
    outline = outlined(wanted, (mini.images * 255).round().to(torch.uint8))[0, 0]
    assert mask.shape == (4, 128, 128) and (mask - outline).abs().mean() < 0.01 < outline.mean() < 0.99
    with pytest.raises(
        ValueError, match="images are 3 of 128 x 128, latent is of 4 of 128 x 128; give the frames that were encoded"
    ):
        pack.nodes.WordMask.execute(mini.inflated, clip, mini.latent, mini.images[1:], caption, "ball", 5, 0.3, 0)
    with pytest.raises(ValueError, match="word star is not in the sentence"):
        pack.nodes.WordMask.execute(mini.inflated, clip, mini.latent, mini.images, caption, "star", 5, 0.3, 0)
    with pytest.raises(ValueError, match="word ' ' is not in the sentence"):
        pack.nodes.WordMask.execute(mini.inflated, clip, mini.latent, mini.images, caption, " ", 5, 0.3, 0)
    with pytest.raises(ValueError, match="MODEL sees the clip in Context Windows"):
        windowed = pack.nodes.ContextWindows.execute(mini.inflated, 3, 2).args[0]
        pack.nodes.WordMask.execute(windowed, clip, mini.latent, mini.images, caption, "ball", 5, 0.3, 0)


def test_inversion_is_exact_on_any_sigmas_where_the_noise_is_constant(pack, mini, monkeypatch):
    import comfy.samplers

    noise = torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(type(mini.inflated.model.diffusion_model), "forward", lambda self, x, *args, **kwargs: noise)
    for scheduler in ("karras", "normal", "sgm_uniform"):
        sigmas = comfy.samplers.calculate_sigmas(mini.inflated.get_model_object("model_sampling"), scheduler, 7)
        latent, same, error = pack.nodes.DDIMInversion.execute(
            mini.inflated, mini.latent, mini.encode(""), 1, "normal", True, sigmas
        ).args
        assert torch.equal(same, sigmas)
        assert error < 1e-5
        x = mini.model.model.process_latent_in(latent["samples"])
        assert (x - (mini.latents[0].movedim(0, 1) + sigmas[0] * noise)).abs().max() < 1e-4
    with pytest.raises(ValueError, match="must fall to 0"):
        pack.nodes.DDIMInversion.execute(mini.inflated, mini.latent, mini.encode(""), 1, "normal", True, sigmas[:-1])


def test_eta_and_random_noise(pack, mini):
    def run(eta, add_noise, seed):
        return pack.nodes.VideoSampler.execute(
            mini.inflated,
            mini.encode("a ball"),
            mini.encode(""),
            mini.latent,
            4,
            2.0,
            "ddim_uniform",
            eta,
            add_noise,
            seed,
        ).args[0]["samples"]

    assert torch.equal(run(0.0, False, 1), run(0.0, False, 2))  # nothing random in DDIM
    assert not torch.equal(run(0.5, False, 1), run(0.5, False, 2))
    assert torch.equal(run(0.5, False, 1), run(0.5, False, 1))
    assert not torch.equal(run(0.0, True, 1), run(0.0, True, 2))


def test_tuning_is_that_of_the_core(pack, mini, tmp_path, monkeypatch):
    import folder_paths

    monkeypatch.setattr(folder_paths, "get_user_directory", lambda: str(tmp_path))
    caption = "a red ball is sliding on the grass"

    def run(steps):
        return pack.nodes.OneShotTune.execute(
            mini.inflated, mini.latent, mini.encode(caption), steps, 1e-3, 0, "fp32", "auto", "stratified", 0
        ).args

    before = plain(mini.inflated, mini.latent["samples"], mini)
    tuned, weights, curve, losses = run(3)
    with torch.inference_mode(False):
        unet = inflate(mini.checkpoint.unet)
        wanted = tune(
            unet,
            mini.checkpoint.scheduler,
            [Take(mini.latents.clone(), Condition(encode_prompt(mini.checkpoint, caption).clone()))],
            TuneConfig(steps=3, learning_rate=1e-3, timestep_sampling="stratified"),
        )
    assert json.loads(losses)["losses"] == pytest.approx(wanted.losses, abs=1e-6)
    for name, weight in wanted.weights.items():
        assert (weights.tensors[name] - weight).abs().max() < 1e-4, name
    assert curve.shape[-1] == 3
    assert torch.equal(plain(mini.inflated, mini.latent["samples"], mini), before)

    longer, again = run(4), run(3)  # a longer run goes on; a shorter one does not get its weights
    assert json.loads(longer[3])["losses"][:3] == json.loads(losses)["losses"]
    assert all(torch.equal(again[1].tensors[name], weight) for name, weight in weights.tensors.items())

    applied = pack.nodes.ApplyTunedWeights.execute(mini.inflated, weights).args[0]
    assert torch.equal(plain(applied, mini.latent["samples"], mini), plain(tuned, mini.latent["samples"], mini))
    with pytest.raises(ValueError, match="inflate it the same way"):
        other = pack.nodes.Inflate.execute(mini.model, "first", False, "video").args[0]
        pack.nodes.ApplyTunedWeights.execute(other, weights)
    with pytest.raises(ValueError, match="tuned_weights belongs to the base model"):
        pack.nodes.ApplyTunedWeights.execute(inflated(pack, native()), weights)


def test_kept_steps_and_files_of_low_rank(pack, mini, tmp_path, monkeypatch):
    import folder_paths

    nodes, caption, models = pack.nodes, "a red ball is sliding on the grass", tmp_path / "models"
    monkeypatch.setattr(folder_paths, "get_user_directory", lambda: str(tmp_path))
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "tune_a_video", ([str(models)], {".safetensors"}))

    def tuned(keep):
        settings = (2, 1e-2, 0, "fp32", "fast", "uniform", 0)
        return nodes.OneShotTune.execute(mini.inflated, mini.latent, mini.encode(caption), *settings, keep=keep)

    def outputs(weights, **more):
        return plain(
            nodes.ApplyTunedWeights.execute(mini.inflated, weights, **more).args[0], mini.latent["samples"], mini
        )

    learned, without = tuned("1").args[1], tuned("").args[1]
    assert list(learned.kept) == [1] and not without.kept
    assert all(torch.equal(learned.tensors[name], weight) for name, weight in without.tensors.items())
    states = set((tmp_path / "tune_a_video").iterdir())
    assert len(states) == 1 and list(tuned("2").args[1].kept) == [
        2
    ]  # which that run passed: it is tuned anew, beside it
    assert len(set((tmp_path / "tune_a_video").iterdir()) - states) == 1

    # so that what the command line wrote can be used in a graph
    before = pipeline.untuned_weights(mini.checkpoint)
    assert _fingerprint(nodes.native.trainable_weights(mini.inflated)) == _fingerprint(before)
    last, first = outputs(learned), outputs(learned, step=1)
    assert torch.equal(outputs(learned, step=2), last)
    for rank, near in ((0, 2e-3), (8, 0.2)):
        nodes.SaveTunedWeights.execute(learned, "a", caption, rank)
        assert {path.name for path in models.iterdir()} == {"a.safetensors", "a-1.safetensors"}
        sizes = [path.stat().st_size for path in models.iterdir()]
        loaded, said = nodes.LoadTunedWeights.execute("a-1.safetensors").args
        assert (loaded.info.config["steps"], loaded.info.rank, said) == (1, rank, caption)
        assert (outputs(loaded) - first).norm() < near * (last - first).norm()
    assert max(sizes) < 1e6
    nodes.SaveTunedWeights.execute(loaded, "b", "as it is")  # factors stay what they are
    assert torch.equal(outputs(nodes.LoadTunedWeights.execute("b.safetensors").args[0]), outputs(loaded))
    error = pack.tav_core.TavError
    with pytest.raises(error, match=r"^step 4 wasn't kept \(there are 1, 2\); choose one of these, or add it to keep"):
        outputs(learned, step=4)
    with pytest.raises(error, match="^rank 8 is of what the tuning changed, and nothing tells the weights before it"):
        nodes.SaveTunedWeights.execute(nodes.LoadTunedWeights.execute("a.safetensors").args[0], "c", "", 8)
    with pytest.raises(error, match="^tuned_weights holds changes of other weights than those of this model"):
        nodes.ApplyTunedWeights.execute(nodes.ApplyTunedWeights.execute(mini.inflated, learned).args[0], loaded)
    for keep, said in (("1; x", "is no list of steps"), ("9" * 9, "is no list of steps"), ("4", "is no step of 2")):
        with pytest.raises(error, match=f"^keep .*{said}"):
            tuned(keep)
    assert nodes.OneShotTune.validate_inputs(keep="none").startswith("keep none is no list of steps")


def test_a_tuning_is_kept_as_often_as_asked(pack, mini, inference_mode, monkeypatch):
    configs, nodes = [], pack.nodes

    def run(cls, model, takes, config, *rest):
        configs.append(config)
        raise KeyboardInterrupt

    monkeypatch.setattr(nodes.tune, "run", run)
    settings = ("fp32", "auto", "stratified", 0)
    for more in ({}, {"save_every": 0.5, "weight_average": 0.9, "keep": " 2,1 "}):
        with pytest.raises(KeyboardInterrupt):
            nodes.OneShotTune.execute(mini.inflated, mini.latent, mini.encode("a"), 3, 1e-3, 0, *settings, **more)
    assert [config.save_minutes for config in configs] == [2.0, 0.5]
    assert [(config.weight_average, config.keep) for config in configs] == [(0.0, []), (0.9, [2, 1])]
    for field, more in (("save_every", {"save_every": math.nan}), ("learning_rate", {"learning_rate": math.inf}),
                        ("steps", {"steps": 10**9}), ("seed", {"seed": 2**63})):  # fmt: skip
        given = dict(steps=3, learning_rate=1e-3, seed=0, dtype="fp32", memory="auto", timestep_sampling="uniform")
        with pytest.raises(pack.tav_core.TavError, match=f"^{field} .* is out of range; give a"):
            nodes.OneShotTune.execute(mini.inflated, mini.latent, mini.encode("a"), preview_every=0, **given | more)


OUT_OF_MEMORY = (
    torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError(
        "MPS backend out of memory (MPS allocated: 9.00 GB, other allocations: 1.00 GB, max allowed: 10.00 GB)."
    ),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."
    ),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
)


def test_out_of_memory_is_told_plainly_and_the_core_sees_it(pack):
    from comfy.model_management import OOM_EXCEPTION

    common, tuning = pack.nodes.common, pack.tav_core.tuning
    for cause in OUT_OF_MEMORY:
        with (
            pytest.raises(
                OOM_EXCEPTION, match="^the device ran out of memory; use fewer .*, memory low, or dtype bf16$"
            ) as error,
            pack.nodes.errors.plain_errors(),
        ):
            raise cause
        assert isinstance(error.value, ValueError) and error.value.__cause__ is cause
    with (
        pytest.raises(OOM_EXCEPTION, match="^memory low ran out of memory at step 3; use fewer frames$") as error,
        pack.nodes.errors.plain_errors(),
    ):
        raise tuning.OutOfMemory("memory", "low", "ran out of memory at step 3", "use fewer frames")
    for other in (
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        common.TavError("steps", 0, "is out of range", "give 1 or more"),
    ):
        with pytest.raises(type(other), match=re.escape(str(other))) as error, pack.nodes.errors.plain_errors():
            raise other
        assert not isinstance(error.value, OOM_EXCEPTION)
