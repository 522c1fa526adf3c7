"""The clip's own pixels around an edit: in the core and in the node."""

import json

import pytest
import torch

from tav_core import measure, sample
from tav_core.mini import world
from tav_core.presets import PRESETS


def clip(**changes):
    return torch.from_numpy(world.render_clip(world.clip_scenes(world.Scene(**changes), "slide", 3)))


@pytest.fixture
def arguments():
    hints = torch.from_numpy(world.silhouette_clip(world.clip_scenes(world.Scene(), "slide", 3)))
    return dict(images=clip(colour="blue", background="sand") / 255, clip=clip() / 255, subject=hints[..., 0] / 255,
                margin=4)  # fmt: skip


@pytest.mark.parametrize("region", ["subject", "background"])
def test_what_an_edit_may_not_change_is_the_clip(pack, arguments, region):
    (out,) = pack.nodes.PutBack.execute(**arguments, region=region).args
    inside = arguments["subject"] > 0.99
    near = torch.nn.functional.max_pool2d(arguments["subject"][:, None], 9, 1, 4)[:, 0]
    may, may_not = (inside, near == 0) if region == "subject" else (arguments["subject"] == 0, inside)
    assert torch.equal(out[may_not], arguments["clip"][may_not]) and torch.equal(out[may], arguments["images"][may])
    assert may.sum() > 500 < may_not.sum()
    one = {**arguments, "subject": arguments["subject"][:1]}
    assert pack.nodes.PutBack.execute(**one, region=region).args[0].shape == out.shape


def test_mistakes(pack, arguments):
    for changes, told in (
        ({"images": arguments["images"][:2]}, "images are 2 of 128 x 128, clip is 3 of 128 x 128"),
        ({"subject": torch.ones(2, 128, 128)}, "subject is 2 of 128 x 128 for 3 frames of 128 x 128"),
        ({"subject": torch.ones(3, 64, 64)}, "subject is 3 of 64 x 64"),
        ({"region": "everything"}, "region everything is unknown"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=told):
            pack.nodes.PutBack.execute(**{**arguments, "region": "subject", **changes})


def test_the_core_does_as_the_node(checkpoint):
    """The noise of a tiny random model: what counts is where its edit ends."""
    from tav_core import inflate

    frames = torch.randint(256, (2, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    noise, subject = torch.randn(1, 4, 2, 4, 4), torch.zeros(1, 1, 2, 32, 32)
    subject[..., 8:24, :16] = 1
    preset, unet = PRESETS["mini"], inflate(checkpoint.unet)
    preset = type(preset)(**{**vars(preset), "sampling_steps": 2})
    given = dict(source_prompt="a ball", subject=subject, region="background")
    own = sample(checkpoint, unet, noise, "a star", preset, **given, source_frames=frames)
    drawn = sample(checkpoint, unet, noise, "a star", preset, **given)
    held = subject[0, 0] > 0
    assert torch.equal(own[held], frames[held]) and torch.equal(own[~held], drawn[~held])
    assert not torch.equal(drawn[held], frames[held])


def test_measure_tells_what_the_core_measures(pack, arguments):
    frames = [(arguments[name] * 255).round().to(torch.uint8) for name in ("images", "clip")]
    given = dict(images=arguments["images"], source=arguments["clip"], prompt="a blue ball on the sand")
    table, told, _ = pack.nodes.Measure.execute(
        **given, source_prompt="", clip_model="none", mask=arguments["subject"]
    ).args
    wanted = measure.measure("edit", *frames, given["prompt"], mask=arguments["subject"])
    assert json.loads(told)["figures"] == pytest.approx(wanted.figures, rel=1e-3)
    assert table.splitlines()[1].startswith("psnr_rest") and "tgve" not in table
    table, told, plot = pack.nodes.Measure.execute(**given, source_prompt="a red ball", clip_model="mini").args
    assert {"tgve_text", "fram_acc", "directional"} <= set(json.loads(told)["figures"]) and "tem_con" in table
    assert plot.shape == (1, 672, 768, 3) and 0 <= plot.min() < plot.max() <= 1
    for changes, said in (
        ({"images": given["images"][:2]}, "images edit has 2 frames of 128x128, its source 3"),
        ({"mask": torch.ones(2, 128, 128)}, "mask has 2 frames for 3"),
        ({"clip_model": "x"}, "clip_model x is neither"),
        ({"raft_model": "x"}, "raft_model x is not in models/optical_flow; put it there"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            pack.nodes.Measure.execute(**{**given, "source_prompt": "", "clip_model": "none", **changes})


def test_measure_takes_weights_from_folders_of_models(pack, arguments, perceptual, tmp_path, monkeypatch):
    import folder_paths
    from torchvision import models

    frames = [(arguments[name] * 255).round().to(torch.uint8) for name in ("images", "clip")]
    for name, model in (("lpips", models.squeezenet1_1), ("optical_flow", models.optical_flow.raft_large)):
        (tmp_path / name / "own").mkdir(parents=True)
        torch.save(model(weights=None).state_dict(), tmp_path / name / "own" / "a.pth")
        (tmp_path / name / "note.txt").write_text("x")
        monkeypatch.setitem(folder_paths.folder_names_and_paths, name, ([str(tmp_path / name)], set()))
    node, weights = pack.nodes.Measure, {"lpips_model": "own/a.pth", "raft_model": "own/a.pth"}
    assert [each.options for each in node.define_schema().inputs if each.id in weights] == [["none", "own/a.pth"]] * 2
    assert node.validate_inputs("none", **weights) is node.validate_inputs() is True
    assert node.validate_inputs("none", "own/a.pth", "b.pth").startswith("raft_model b.pth is not in models/optical_fl")
    given = dict(images=arguments["images"], source=arguments["clip"], prompt="", source_prompt="", clip_model="none")
    table, told, _ = node.execute(**given, mask=arguments["subject"], **weights).args
    files = [tmp_path / name / "own" / "a.pth" for name in ("lpips", "optical_flow")]
    wanted = measure.measure(
        "edit", *frames, "", mask=arguments["subject"], models=measure.load_models(None, None, None, *files)
    )
    assert json.loads(told)["figures"] == pytest.approx(wanted.figures, rel=1e-3, nan_ok=True)
    assert "lpips_squeeze_rest" in table and "warp_error_raft" in json.loads(told)["source"]
    with pytest.raises(ValueError, match="raft_model .*can't be read as a raft_large"):
        files[1].write_bytes(b"x")
        node.execute(**given, **weights)
