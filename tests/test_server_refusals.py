"""What a running ComfyUI refuses, and in which words: before a graph is queued, and while it runs."""

import math

import pytest

from support.comfyui_server import SOURCE, Failed, Graph, fails, refused


@pytest.mark.parametrize("node", ["TAVOneShotTune", "TAVDDIMInversion", "TAVVideoSampler"])
def test_model_that_is_not_inflated(server, graph, node):
    made = {
        "TAVOneShotTune": graph.tune,
        "TAVDDIMInversion": graph.invert,
        "TAVVideoSampler": lambda model: graph.sample(model, graph.latent),
    }[node](model=graph.model)
    graph("PreviewAny", source=made[0])
    fails(server, graph, node, "MODEL is not inflated; connect it through the node Inflate first")


def test_inflated_twice(server, graph):
    graph("PreviewAny", source=graph("TAVInflate", model=graph.inflated)[0])
    fails(server, graph, "TAVInflate", "MODEL is inflated already")


@pytest.mark.parametrize("node", ["TAVDDIMInversion", "TAVVideoSampler", "KSampler"])
def test_latent_of_another_length(server, graph, node):
    model = graph.tune()[0]
    fewer = graph("LatentFromBatch", samples=graph.latent, batch_index=0, length=3)[0]
    if node == "TAVDDIMInversion":
        made = graph.invert(model, latent=fewer)
    elif node == "TAVVideoSampler":
        made = graph.sample(model, fewer)
    else:
        made = graph(node, model=model, positive=graph.edit, negative=graph.empty, latent_image=fewer, steps=2)
    graph("SaveLatent", samples=made[0])
    fails(server, graph, node, "LATENT has 3 frames, this MODEL was tuned on 4; give it 4 frames")


def test_windows_of_an_untuned_model(server, graph):
    windowed = graph("TAVContextWindows", model=graph.inflated)[0]
    graph("SaveLatent", samples=graph.sample(windowed, graph.latent)[0])
    fails(
        server,
        graph,
        "TAVVideoSampler",
        "context_length 0 is the tuned length, and MODEL isn't tuned; give it a number",
    )


def test_clip_of_another_family(server, graph):
    other = graph("TAVLoadCheckpoint", checkpoint="tiny")
    text = graph("CLIPTextEncode", clip=other[1], text=SOURCE)[0]
    tuned = graph.tune(positive=text)
    graph("PreviewImage", images=tuned[2])
    fails(
        server,
        graph,
        "TAVOneShotTune",
        "CONDITIONING has width 32, this MODEL takes 96; use the CLIP of the same checkpoint",
    )


@pytest.mark.parametrize("kind", ["TAVVideoSampler", "KSampler"])
def test_samplers_name_the_clip_of_another_family(server, graph, kind):
    other = graph("TAVLoadCheckpoint", checkpoint="tiny")
    text = graph("CLIPTextEncode", clip=other[1], text=SOURCE)[0]
    if kind == "KSampler":
        out = graph(kind, model=graph.inflated, positive=text, negative=graph.empty, latent_image=graph.latent, steps=2)
    else:
        out = graph.sample(graph.inflated, graph.latent, positive=text)
    graph("SaveLatent", samples=out[0])
    fails(server, graph, kind, "CONDITIONING has width 32, this MODEL takes 96")


@pytest.mark.parametrize("file", ["nothing.mp4", "../clip.mp4", "../../x", "/etc/hostname", "a/../../output/x.mp4"])
def test_videos_outside_of_the_input_folder(server, info, file):
    graph = Graph(info).source(file=file)
    graph("PreviewImage", images=graph.video[0])
    refused(server, graph, [f"file {file} {'is not in ComfyUI' if file == 'nothing.mp4' else 'leads out of input'}"])


@pytest.mark.parametrize("name, told", [
    ("../../x", "leads out of tune_a_video"), ("/x", "leads out of tune_a_video"), ("a/../../x", "leads out of "
                                                                                                     "tune_a_video"),
    (" ", "name is empty"), ("x" * 300, "name is a name of 300 bytes; give a shorter one"), ("..", "names no file"),
    ("a\0b", "holds characters that are no letters"), ("sub/NUL", "names a device or drive of Windows"),
])  # fmt: skip
def test_weights_are_saved_in_their_folder_alone(server, graph, name, told):
    tuned = graph.tune()
    graph("TAVSaveTunedWeights", tuned_weights=tuned[1], name=name)
    refused(server, graph, [told])


@pytest.mark.parametrize(
    "file", ["../../x.safetensors", "../whole.safetensors", "/etc/hostname", "missing.safetensors"]
)
def test_weights_are_loaded_from_their_folder_alone(server, graph, file):
    loaded = graph("TAVLoadTunedWeights", file=file)
    graph("PreviewAny", source=loaded[1])
    refused(server, graph, [f"file {file} is not in models/tune_a_video"])


@pytest.mark.parametrize("name", ["missing", "../diffusers/tiny", "/etc"])
def test_checkpoints_are_loaded_from_their_folder_alone(server, info, name):
    graph = Graph(info).source(checkpoint=name)
    graph("PreviewAny", source=graph.model)
    refused(server, graph, [f"checkpoint {name} is neither mini nor a folder in models/diffusers"])


def test_more_frames_than_the_video_has(server, info):
    graph = Graph(info).source(frames=100)
    graph("PreviewImage", images=graph.video[0])
    fails(server, graph, "TAVLoadVideo", "count 100 is more than the 8 frames of")


@pytest.mark.parametrize("inputs, told", [
    (dict(steps=0), "smaller than min"), (dict(steps=1_000_000), "bigger than max"),
    (dict(learning_rate=0), "is out of range; give a number from 1e-07 to 1.0"),
    (dict(learning_rate=2), "is out of range"), (dict(learning_rate=math.nan), "learning_rate nan is out of range"),
    (dict(seed=-1), "smaller than min"), (dict(steps="many"), "Failed to convert"),
])  # fmt: skip
def test_values_out_of_range(server, graph, inputs, told):
    tuned = graph.tune(**inputs)
    graph("PreviewImage", images=tuned[2])
    refused(server, graph, [told, *inputs])


def test_numbers_that_are_none(server, graph):
    for value in (math.nan, math.inf, -math.inf):
        for inputs in (dict(eta=value), dict(cfg=value)):
            sampled = graph.sample(graph.inflated, graph.latent, **inputs)
            graph("SaveLatent", samples=sampled[0])
            (name,) = inputs
            refused(server, graph, [f"{name} {value} is out of range; give a number from"])
    led = graph("TAVAttentionInjection", model=graph.inflated, conditioning=graph.empty, share=math.nan)[0]
    graph("SaveLatent", samples=graph.sample(led, graph.latent)[0])
    refused(server, graph, ["share nan is out of range; give a number from 0.0 to 1.0"])


@pytest.mark.parametrize("kind, inputs, told", [
    ("TAVLoadVideo", dict(file="a\0b.mp4"), r"file 'a\\x00b.mp4' holds characters that are no letters"),
    ("TAVLoadVideo", dict(file="x" * 300 + ".mp4"), "file is a name of 304 bytes; give a shorter one"),
    ("TAVLoadVideo", dict(file={"a": 1}), "file {'a': 1} is no text; write one"),
    ("TAVLoadCheckpoint", dict(checkpoint={"a": 1}), "checkpoint {'a': 1} is no text"),
    ("TAVLoadTunedWeights", dict(file="a\0b"), "holds characters that are no letters"),
    ("TAVDDIMInversion", dict(scheduler="x"), "scheduler x is unknown; choose one of simple, "),
])  # fmt: skip
def test_hostile_values_are_told_in_one_sentence(server, graph, kind, inputs, told):
    given = dict(model=graph.inflated, latent=graph.latent, conditioning=graph.empty) if "scheduler" in inputs else {}
    graph("PreviewAny", source=graph(kind, **given, **inputs)[0])
    refused(server, graph, [told])


def test_values_in_place_of_connections(server, graph):
    graph("SaveLatent", samples=graph.sample("a model", graph.latent)[0])
    fails(server, graph, "TAVVideoSampler", "model is no MODEL that this node can take; connect it to a node that")


def test_divergence_is_named_and_the_server_lives_on(server, info, graph):
    tuned = graph.tune(learning_rate=1.0, steps=60, dtype="fp16")
    graph("PreviewImage", images=tuned[2])
    fails(server, graph, "TAVOneShotTune", "is not finite; lower it, or set dtype to fp32 (now fp16)")
    fine = Graph(info).source()
    fine("PreviewImage", images=fine.tune()[2])
    assert server.run(fine)


def test_the_core_unloads_its_models_when_memory_runs_out(server, graph):
    short, said = graph("ShortOfMemory", model=graph.inflated)[0], "Got an OOM, unloading all loaded models."
    graph("PreviewAny", source=graph.invert(short)[2])
    before = server.log.read_text(errors="replace").count(said)
    with pytest.raises(Failed) as error:
        server.run(graph)
    assert error.value.node == "TAVDDIMInversion"
    assert error.value.message.startswith("the device ran out of memory; use fewer or smaller frames")
    assert server.log.read_text(errors="replace").count(said) == before + 1
