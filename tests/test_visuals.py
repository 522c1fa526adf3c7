"""Labels of strips and side-by-side videos, whatever their text is."""

import time

import pytest
import torch
from PIL import ImageFont

from tav_core import visuals
from tav_core.visuals import BACKGROUND, grid, side_by_side, strip

CLIP = torch.zeros(2, 32, 32, 3, dtype=torch.uint8)
LONG = {
    "a word": "x" * 100_000,
    "words": "x " * 50_000,
    "a wide word": "W" * 10_000_000,
    "accents": "\u0301" * 100_000,
    "lines": "\n" * 1_000_000,
}
ODD = ("two\nlines", "\0", "\x1b[31mred\x1b[0m", "a\tb\x07", "\ud800", "\u202eright to left\u2066", "\U0001f600\u200d",
       "\u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627", "\u4e00" * 300, "")  # fmt: skip


@pytest.mark.parametrize("kind", LONG)
def test_labels_of_any_length_take_no_time(kind):
    labels, started = [LONG[kind], "edit"], time.process_time()
    picture, video = strip([CLIP, CLIP], labels), side_by_side([CLIP, CLIP], labels)
    assert time.process_time() - started < 1
    assert picture.size == strip([CLIP, CLIP], ["", ""]).size
    assert video.shape == side_by_side([CLIP, CLIP], ["", ""]).shape


@pytest.mark.parametrize("label", ODD)
def test_labels_of_any_characters(label):
    assert strip([CLIP], [label]).size == strip([CLIP], ["source"]).size


def test_a_grid_has_its_cells_in_rows_and_columns():
    def still(value, frames):
        return torch.full((frames, 128, 128, 3), value, dtype=torch.uint8)

    table = grid([[still(50, 1), still(100, 3)], [still(150, 2), still(200, 3)]], ["a row", "another"], ["x 1", "x 2"])
    f, h, w, _ = table.shape
    assert (f, w) == (3, 2 * 136) and table.dtype == torch.uint8
    columns = table[-1, :, [64, 200], 0]  # h, of the middle of each column
    found = [[value for value in (50, 100, 150, 200) if (columns[:, k] == value).sum() == 128] for k in range(2)]
    assert found == [[50, 150], [100, 200]]  # shorter ones hold their last frame
    heads = (table[0, :, :, 0] != BACKGROUND[0]).any(1)
    assert heads[: h - 2 * 136].any()  # the names of the columns


def test_a_label_ends_in_an_ellipsis_where_it_does_not_fit():
    font = ImageFont.load_default(13)

    def lines(text, width=100):
        return visuals._wrapped(text, font, width)

    assert lines("a red ball") == ["a red ball"] and lines("") == lines(" \n") == []
    assert lines("a red ball is sliding") == lines("a red\nball is\tsliding\x1b") == ["a red ball is", "sliding"]
    first, second = lines("a red ball is sliding on the grass and a blue one follows it")
    assert first == "a red ball is" and second.startswith("sliding on") and second.endswith(" ...")
    (cut,) = lines("x" * 200)
    assert set(cut[:-4]) == {"x"} and cut.endswith(" ...")
    assert font.getlength(cut) <= 100 < font.getlength("x" + cut)
    assert lines("x" * 1001, 10**6) == ["x" * 1000 + " ..."] and lines("x" * 1000, 10**6) == ["x" * 1000]


def test_compare_takes_them_and_refuses_more_lines_than_clips(pack):
    clip, started = CLIP.float() / 255, time.process_time()
    for label in {*LONG.values(), *ODD} - {"\ud800"}:  # which is no text to a node
        node = pack.nodes.Compare.execute(clip, label.replace("\n", " "), 8)
        assert node.args[0].shape[0] == 2
    with pytest.raises(ValueError, match="^labels has 100000 lines for 1 clips; give one line for each$"):
        pack.nodes.Compare.execute(clip, "a\n" * 100_000, 8)
    assert time.process_time() - started < 5
