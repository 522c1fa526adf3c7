"""Lists of clips: the layout of LOVEU-TGVE 2023, YAML of one's own, and all that can be wrong with them, at once."""

from pathlib import Path

import pytest
from PIL import Image

from support.datasets import TGVE_ROWS, make_tgve, write_table
from support.errors import refused
from tav_core.dataset import chosen, read_dataset
from tav_core.evaluation import jobs_of
from tav_core.presets import PRESETS, with_settings
from tav_core.sampling import Edit

PAPER = PRESETS["paper"]


def read(path: Path):
    return read_dataset(path, 8)


def lists(tmp_path: Path, text: str):
    """What a YAML file of that content says, with its jobs and all faults."""
    Image.new("RGB", (16, 16)).save(tmp_path / "car.png")
    (tmp_path / "clips.yaml").write_text(text)
    found = read(tmp_path)
    jobs, faults = jobs_of(found.entries, PAPER, {}, tmp_path / "out")
    return jobs, [*found.faults, *faults]


# ------------------------------------------------------------------------------------------------ LOVEU-TGVE 2023


def test_the_published_layout_is_read_as_it_is(tmp_path):
    found = read(make_tgve(tmp_path))
    assert not found.faults and (found.size, found.count) == (480, None)
    assert [entry.name for entry in found.entries] == ["DAVIS_480p/stunt", "youtube_480p/salsa", "videvo_480p/lotus"]
    stunt = found.entries[0]
    assert stunt.prompt == "a red ball is sliding on the grass"  # without the blank at its end
    assert stunt.video == tmp_path / "DAVIS_480p" / "480p_frames" / "stunt"
    kinds = ["style", "object", "background", "multiple"]
    assert list(stunt.edits) == kinds and stunt.edits["object"] == Edit("a red star is sliding on the grass")
    jobs, faults = jobs_of(found.entries, PAPER, {}, tmp_path / "out")
    assert not faults and [edit.prompt for edit in jobs[0].job.edits] == [edit.prompt for edit in stunt.edits.values()]


def test_some_clips_and_kinds_are_chosen(tmp_path):
    entries = read(make_tgve(tmp_path)).entries
    assert [entry.name for entry in chosen(entries, ["lotus", "DAVIS_480p"], None)] == [entries[0].name,
                                                                                      entries[2].name]  # fmt: skip
    (one,) = chosen(entries, ["youtube_480p/salsa"], ["style", "multiple"])
    assert list(one.edits) == ["style", "multiple"] and one.prompt == entries[1].prompt
    refused("only='stunts' is not in the dataset; choose among DAVIS_480p", entries, ["stunts"], None, call=chosen)
    refused("kinds='shape' is not in .*; choose among background, multiple", entries, None, ["shape"], call=chosen)


def test_a_wrong_table_is_told_row_by_row(tmp_path):
    rows = [list(row) for row in TGVE_ROWS]
    rows[2][3] = " "  # no sentence
    rows[4][0] = "Vimeo Videos:"
    rows[5][0] = "../salsa"
    rows[8][0] = "LOTUS"
    rows.append([*rows[8][:0], "lotus", *rows[8][1:]])
    make_tgve(tmp_path)
    write_table(tmp_path, rows)
    faults = read(tmp_path).faults
    assert [fault.split(": ", 1)[1] for fault in faults] == [
        "lacks its Object Change Caption",
        "Vimeo Videos: is no set of it; there are DAVIS_480p, youtube_480p, videvo_480p",
        "has no name of a folder (../salsa)",
        "is in none of the sets",
        "videvo_480p/lotus is there more than once; give each a name of its own",
    ]
    assert faults[0].startswith("LOVEU-TGVE-2023_Dataset.csv, row 3: ")
    write_table(tmp_path, [row[:-3] for row in TGVE_ROWS])
    refused("lacks the columns Background Change Caption, Multiple Changes Caption; unpack it", tmp_path, call=read)
    (tmp_path / "LOVEU-TGVE-2023_Dataset.csv").write_bytes(b"\xff\xfe\x00")
    refused("can't be read as a table", tmp_path, call=read)
    write_table(tmp_path, TGVE_ROWS[:2])
    assert read(tmp_path).faults == ["LOVEU-TGVE-2023_Dataset.csv: there is no clip in it"]


def test_frames_that_are_missing_are_seen_first(tmp_path):
    make_tgve(tmp_path)
    frames = tmp_path / "DAVIS_480p" / "480p_frames" / "stunt"
    for image in frames.iterdir():
        image.unlink()
    (tmp_path / "videvo_480p" / "480p_frames" / "lotus").rename(tmp_path / "elsewhere")
    _, faults = jobs_of(read(tmp_path).entries, PAPER, {}, tmp_path / "out")
    assert faults == [
        f"DAVIS_480p/stunt: video {frames} is a folder without images; put its frames there",
        f"videvo_480p/lotus: video {tmp_path}/videvo_480p/480p_frames/lotus does not exist; check where it is",
    ]


# -------------------------------------------------------------------------------------------------------- YAML


def test_a_list_of_ones_own(tmp_path):
    jobs, faults = lists(tmp_path, """
- video: car.png
  prompt: a car drives
  edits: {style: "a car drives, cartoon", object: a bus drives, place: a car drives on snow}
  region: {object: subject, place: background}
  subject: car
  softness: 3
  negative_prompt: blurred
  start: 2
  frames: 16
  settings: {steps: 50, learning_rate: 1e-4}
- video: car.png
  name: again
  prompt: a car drives
  edits: {object: a bus drives}
  region: subject
  contrast: a tram drives
""")  # fmt: skip
    assert not faults
    first, second = (clip.job for clip in jobs)
    regions = ["everything", "subject", "background"]
    assert jobs[0].name == "car" and [edit.region for edit in first.edits] == regions
    assert (first.word, first.softness, first.negative_prompt) == ("car", 3, "blurred")
    assert first.preset == with_settings(PAPER, steps=50, learning_rate=1e-4)
    assert (jobs[0].entry.start, jobs[0].entry.count, jobs[0].entry.video) == (2, 16, tmp_path / "car.png")
    assert second.contrasts == ("a tram drives",) and second.preset == PAPER and jobs[1].name == "again"


def test_all_faults_of_a_list_are_told_at_once(tmp_path):
    jobs, faults = lists(tmp_path, """
- {video: car.png, prompt: a car drives, edits: {style: a car}, frame: 3}
- {video: 3, prompt: yes, edits: {../style: [a], all: b}, start: -1, region: sky}
- car.png
- {video: none.png, prompt: " ", edits: {a: " "}}
- {video: car.png, prompt: a car, edits: {a: a bus, b: a tram}, region: subject, softness: 2}
- {video: car.png, name: a/b, prompt: a car, edits: {a: a bus}}
- {video: car.png, name: mine, prompt: a car, edits: {a: a bus}, settings: {stepz: 3}}
- {video: car.png, name: late, prompt: a car, edits: {a: a bus}, settings: {steps: 0}, mask: car.png, subject: car}
- {video: car.png, name: list, prompt: a car, edits: [a bus], contrast: [1], region: {a: subject}}
- {video: out/car.png, name: Car, prompt: a car, edits: {}}
- {video: car.png, name: whole, prompt: a car, edits: {a: a bus}, settings: {context_overlap: 40}}
""")  # fmt: skip
    told = "\n".join(faults)
    for fault in (
        "clip 1 (car.png): frame is no key of a clip; choose among video, prompt",
        "clip 2 (3): video is a number; give it as text, in quotes", "clip 2 (3): prompt is yes or no; give it as text",
        "clip 2 (3): edits '../style' is no name of a kind", "clip 2 (3): edits ../style is a list; give it as text",
        "clip 2 (3): edits 'all' is no name of a kind", "clip 2 (3): start -1 is out of range; give an integer from 0",
        "clip 2 (3): region  'sky' is unknown; choose one of everything, subject, shape, background",
        "clip 3: is text; give it video, prompt and edits", "none: video", "none: prompt is empty; describe the clip",
        "car: region subject needs to know where the subject is; give contrast", "car: softness does nothing without",
        "clip 6 (a/b): name 'a/b' is none of a folder", "mine: stepz is no setting; choose among attention_injection",
        "late: steps 0 is out of range", "late: mask says where the subject is", "clip 9 (list): edits is a list",
        "clip 9 (list): contrast is a number", "clip 10 (Car): edits are none", "whole: context_overlap 40 doesn't fit",
    ):  # fmt: skip
        assert fault in told, fault
    assert not jobs and "\n".join(sorted(faults)).count("region subject") == 1


@pytest.mark.parametrize("text, told", [
    ("- {video: a.png\n  prompt: x", "can't be read as YAML .line 2: "),
    ("- {video: a, edits: {style: x, style: y}}", "YAML .line 1: style is there twice"),
    ("- !!python/object:os.system x", "YAML .line 1: could not determine a constructor"),
    ("video: a.png", "is no list of clips; begin each clip with a dash"), ("", "is no list of clips"),
    ("[" * 5000, "can't be read as YAML"), ("- 2001-99-99", "can't be read as YAML"),
])  # fmt: skip
def test_files_that_are_no_list(tmp_path, text, told):
    (tmp_path / "clips.yaml").write_text(text)
    refused(told, tmp_path, call=read)


def test_merged_keys_are_no_doubles(tmp_path):
    jobs, faults = lists(tmp_path, """
- &car {video: car.png, prompt: a car drives, edits: {style: a cartoon}}
- {<<: *car, name: other, prompt: a bus drives}
""")  # fmt: skip
    assert not faults and [clip.job.prompt for clip in jobs] == ["a car drives", "a bus drives"]


def test_what_is_no_dataset(tmp_path):
    refused("dataset='.*none.yaml' does not exist; give the folder", tmp_path / "none.yaml", call=read)
    refused("holds neither LOVEU-TGVE-2023_Dataset.csv nor clips.yaml", tmp_path, call=read)
    (tmp_path / "text.txt").touch()
    refused("is neither a folder nor a YAML file", tmp_path / "text.txt", call=read)
    _, faults = lists(tmp_path, "- {video: car.png, prompt: a car, edits: {a: a bus}}")
    assert not faults
    _, faults = jobs_of(read(tmp_path).entries, PAPER, {}, tmp_path)
    assert "lies in the folder that is written to" in faults[0]


def test_the_preset_paper_is_the_recipe_of_the_authors():
    """configs/*.yaml of showlab/Tune-A-Video and of showlab/loveu-tgve-2023, and the defaults of their training."""
    tuning = PAPER.tuning
    assert (tuning.steps, tuning.learning_rate, tuning.betas, tuning.weight_decay) == (500, 3e-5, (0.9, 0.999), 1e-2)
    assert (tuning.eps, tuning.max_grad_norm, tuning.warmup_steps) == (1e-8, 1.0, 0)
    assert (tuning.timestep_sampling, tuning.loss_weighting, tuning.context_length) == ("uniform", "none", None)
    assert (PAPER.sampling_steps, PAPER.guidance_scale) == (50, 12.5)
    assert (PAPER.attention_injection, PAPER.caption_as_negative) == (0, 0)  # inverted with the empty sentence
