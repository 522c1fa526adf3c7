"""Hostile values in every input of every node: refused in one sentence, in the prompt or before anything is done."""

import asyncio
import math

import pytest
import torch

JSON = ("x", 5, -0.5, True, {}, [], [1, 2, 3], {"samples": 5}, {"samples": None}, [["text", {}]], None)
HOSTILE = {
    "INT": (10**30, -(10**30), 1.5, math.nan, math.inf, "x", "5", None, [], {}, True, torch.ones(2)),
    "FLOAT": (math.nan, math.inf, -math.inf, 1e300, -1e300, 10**400, "x", "0.5", None, [], {}, True, torch.ones(2)),
    "STRING": (5, None, [], {}, "\ud800", b"x"),
    "COMBO": ("no such one", "", "\0", "x" * 300, "x" * 100_000, "../x", "\ud800", 5, None, [], {},
              ["mini"], {"mini": 1}),
    "IMAGE": (*JSON, torch.ones(8, 8, 3), torch.ones(0, 8, 8, 3), torch.ones(1, 8, 8, 1)),
    "MASK": (*JSON, torch.ones(8, 8), torch.ones(0, 8, 8)),
    "CONDITIONING": (*(each for each in JSON if each != []), [[torch.ones(3), {}]], [[torch.ones(1, 2, 3)]]),
    "AUDIO": (*JSON, {"waveform": torch.ones(2, 8), "sample_rate": 8000}, {"waveform": torch.ones(1, 1, 8)}),
    "SIGMAS": (*JSON, torch.ones(2, 2)),
}  # fmt: skip
NAMES = ("..", ".", "a/..", "../x", "/x", "a/../../x", "", " ", "/", "a/", "\\\\server\\x", "..\\..\\x", "C:\\x",
         "c:x", "CON", "nul", "sub/aux.txt", "COM1", "a\0b", "a\nb", "\x1b[31m", "\ud800", "x" * 250, "\u4e00" * 80,
         "a/" * 600 + "a", 5, None, [], {})  # fmt: skip


@pytest.fixture(scope="module")
def inputs(pack):
    """Every input of every node: (node, input)."""
    return [(node, each) for node in pack.nodes.NODES for each in node.define_schema().inputs]


def kind_of(each):
    kind = str(each.get_io_type())
    return "COMBO" if hasattr(each, "options") else kind


def one_line(error):
    told = str(error)
    assert len(told.splitlines()) == 1 and len(told) < 400 and told.isprintable(), told
    return told


def test_every_kind_of_input_has_its_hostile_values(inputs):
    plain = {"BOOLEAN", "MODEL", "CLIP", "VAE", "TAV_TAKES", "TAV_TUNED_WEIGHTS", "LATENT"}
    assert {kind_of(each) for _, each in inputs} == HOSTILE.keys() | plain
    assert all(each.min < each.max for _, each in inputs if kind_of(each) in ("INT", "FLOAT"))


def test_hostile_values_are_refused_before_a_node_does_anything(pack, inputs):
    """All other inputs are as good as their nodes could wish; only what is refused first is reached."""
    refused = 0
    for node, each in inputs:
        kind = kind_of(each)
        for value in HOSTILE.get(kind, () if kind == "BOOLEAN" else JSON):
            if value is None and each.optional:
                continue
            with pytest.raises(pack.tav_core.TavError) as error:
                pack.nodes.inputs.check(each, value)
                if kind == "COMBO":  # of files, which the node looks up
                    find = getattr(pack.nodes, module_of(node)).path_of
                    find(value, each.id) if node is pack.nodes.Measure else find(value)
            assert one_line(error.value).startswith(each.id), (node, each.id, value)
            refused += 1
    assert refused > 600


def module_of(node):
    return node.__module__.rpartition(".")[2]


def test_every_node_checks_what_it_is_given(pack):
    for node in pack.nodes.NODES:
        with pytest.raises(pack.tav_core.TavError):
            node.execute(**{each.id: 5 for each in node.define_schema().inputs})


def test_optional_inputs_may_be_nothing(pack):
    """As a prompt may say of a connection that isn't there."""
    latent, said = {"samples": torch.ones(1, 4, 2, 2)}, [[torch.ones(1, 2, 3), {}]]
    assert pack.nodes.Take.execute(latent, said, takes=None).args[0] == ((latent, said),)


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_names_of_new_files(pack, name):
    nodes = pack.nodes
    for module in (nodes.tuned_weights, nodes.inverted_noise):
        with pytest.raises(pack.tav_core.TavError) as error:
            module.new_path(name)
        assert one_line(error.value).startswith("name ")
    for module in (nodes.load_video, nodes.load_folder, nodes.load_checkpoint, nodes.load_controlnet,
                   nodes.tuned_weights, nodes.inverted_noise):  # fmt: skip
        with pytest.raises(pack.tav_core.TavError) as error:
            module.path_of(name)
        one_line(error.value)


def test_names_that_can_be_had(pack):
    folder = pack.nodes.tuned_weights.FOLDER
    names = {"my-clip": "my-clip", " skiing/first ": "skiing/first", "a.b.safetensors": "a.b", "12.30 (2)": "12.30 (2)",
             "sub\\first": "sub/first", "console": "console", "\u4e00" * 60: "\u4e00" * 60}  # fmt: skip
    for name, file in names.items():
        assert pack.nodes.tuned_weights.new_path(name).as_posix().endswith(f"{folder}/{file}.safetensors")


def test_noise_levels_that_do_not_fall(pack, mini):
    for levels in (
        [3.0, math.nan, 0.0],
        [math.nan, 1.0, 0.0],
        [math.inf, 1.0, 0.0],
        [1.0, 2.0, 0.0],
        [2.0, 1.0],
        [0.0],
    ):
        with pytest.raises(pack.tav_core.TavError, match="^sigmas .* must fall to 0"):
            pack.nodes.sampling.sigmas_for(mini.model, 2, "normal", torch.tensor(levels))


@pytest.fixture(scope="module")
def core(pack):
    """The core's own check of a node in a prompt: what it says of it."""
    import execution

    import nodes

    known = {node.define_schema().node_id: node for node in pack.nodes.NODES}
    nodes.NODE_CLASS_MAPPINGS.update(known)

    def validated(node, **given):
        prompt = {"1": {"class_type": node.define_schema().node_id, "inputs": given}}
        _, errors, _ = asyncio.run(execution.validate_inputs("prompt", prompt, "1", {}))
        return [error for error in errors if error["type"] != "required_input_missing"]

    yield validated
    for name in known:
        del nodes.NODE_CLASS_MAPPINGS[name]


@pytest.mark.parametrize("kind", ["INT", "FLOAT", "COMBO"])
def test_the_core_is_told_in_one_sentence(core, inputs, kind):
    for node, each in inputs:
        for value in HOSTILE[kind] if kind_of(each) == kind else ():
            if isinstance(value, (torch.Tensor, list)) or value in ("5", "0.5", True, 1.5, None):
                continue  # what JSON doesn't hold, what are connections to the core, what it converts or leaves out
            errors = core(node, **{each.id: value})
            assert errors, (node, each.id, value)
            for error in errors:
                assert "traceback" not in error["extra_info"], (node, each.id, value, error)
                assert len(f"{error['message']}: {error['details']}".splitlines()) == 1


def test_the_core_is_told_of_names(pack, core):
    for node, field in ((pack.nodes.SaveTunedWeights, "name"), (pack.nodes.LoadTunedWeights, "file"),
                        (pack.nodes.SaveInvertedNoise, "name"), (pack.nodes.LoadInvertedNoise, "file"),
                        (pack.nodes.LoadVideo, "file"), (pack.nodes.LoadVideoFolder, "folder")):  # fmt: skip
        for name in NAMES:
            if isinstance(name, list) or name is None:
                continue
            errors = core(node, **{field: name})
            told = [error["details"] for error in errors]
            if field == "name" and not isinstance(name, str):  # which the core makes a text of
                continue
            assert told and all(len(each.splitlines()) == 1 and len(each) < 400 for each in told), (node, name, told)
            assert not any("traceback" in error["extra_info"] for error in errors), (node, name)
