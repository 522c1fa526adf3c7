"""The pictures of the workflows in the template browser: frames that a workflow's own run makes, and a few words."""

import io
import json
import time
import urllib.parse
import urllib.request

from PIL import Image, ImageDraw, ImageFont

from workflows.graph import Workflow

# what a thumbnail says, and its rows of tiles: a frame, as (clip of Compare, frame of the strip), or a word
PICTURES = {
    "01-one-shot-edit-mini": ("One clip, one sentence, one edit", [[(0, 0), (0, 2)], [(1, 0), (1, 2)]]),
    "02-four-edits-mini": ("Four edits from one tuning", [[(1, 1), (2, 1)], [(3, 1), (4, 1)]]),
    "03-one-shot-edit-sd15": ("Your clip, your checkpoint", [["SD 1.5"], [(0, 0), (0, 1), (0, 2)]]),
    "04-reuse-tuned-weights-mini": ("Tuned before: no tuning", [[".safetensors"], [(1, 0), (1, 2)]]),
    "05-reuse-tuned-weights-sd15": ("Your clip, tuned before", [["SD 1.5", (0, 1)], [(1, 1), (4, 1)]]),
    "11-regions-mini": ("The subject, or all but it", [[(0, 1), (1, 1)], [(2, 1), (3, 1)]]),
    "12-regions-sd15": ("A part of your clip", [["SD 1.5", (2, 1)], [(1, 1), "“word”"]]),
    "13-controlnet-mini": ("Another shape and motion", [[(1, 0), (1, 1), (1, 2)], [(2, 0), (2, 1), (2, 2)]]),
    "14-lora-mini": ("A style from a LoRA", [[(0, 1), (1, 1), (2, 1)], ["neon 0, 0.5, 1"]]),
    "15-travel-mini": ("One sentence fades to another", [[(1, 0), (1, 1), (1, 2)], ["blue  ...  green"]]),
    "21-long-clip-mini": ("A long clip in windows", [[(0, 0), (0, 1), (0, 2)], ["[ 1   2 [ 3   4 ] 5   6 ]"],
                                                [(1, 0), (1, 1), (1, 2)]]),
    "22-two-takes-mini": ("One tuning, two takes", [[(0, 0), "+", (0, 2)], ["=", (1, 1), ""]]),
    "23-batch-mini": ("Many clips at once", [[(0, 0), (0, 2), (1, 2)], [(2, 0), (2, 2), (3, 2)]]),
    "31-stock-sampler-mini": ("A stock sampler", [["KSampler", (1, 1)], [(0, 1), "dpmpp_2m"]]),
    "32-sweep-mini": ("Which settings?", [[(0, 1), (1, 1), (2, 1)], [(3, 1), (4, 1), (5, 1)]]),
    "33-metrics-mini": ("How good is the edit?", [[(0, 1), (1, 1)], ["PSNR  SSIM  CLIP"]]),
    "41-upscale-mini": ("Upscale", [[(0, 1)]]),
    "42-back-to-source-mini": ("Over the clip, at its own size", [["128", "+", (0, 2)], ["=", (1, 2), "256"]]),
}  # fmt: skip
LIKE = {  # those that need a large checkpoint: their pictures are of the same graph on the mini one
    "03-one-shot-edit-sd15": "01-one-shot-edit-mini",
    "05-reuse-tuned-weights-sd15": "02-four-edits-mini",
    "12-regions-sd15": "11-regions-mini",
}
MARGIN = 8  # of a strip, and around the tiles
SIDE = 480  # cards of the template browser are square
INK, PAPER = (232, 232, 235), (24, 25, 28)


def fetch(url: str, body: dict | None = None) -> bytes:
    request = urllib.request.Request(
        url, json.dumps(body).encode() if body else None, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as answer:
        return answer.read()


def execute(server: str, prompt: dict) -> dict:
    """Runs a graph. Returns what its nodes show, by their id."""
    number = json.loads(fetch(f"{server}/prompt", {"prompt": prompt}))["prompt_id"]
    while not (history := json.loads(fetch(f"{server}/history/{number}"))):
        time.sleep(1)
    if history[number]["status"]["status_str"] != "success":
        raise SystemExit(history[number]["status"])
    return history[number]["outputs"]


def frames_of_run(server: str, workflow: Workflow, columns: int = 3) -> list[list[Image.Image]]:
    """Runs a workflow. Returns `columns` frames of each clip that Compare put together, in each of its runs."""
    prompt = workflow.prompt()
    compare = next(id_ for id_, node in prompt.items() if node["class_type"] == "TAVCompare")
    prompt[compare]["inputs"]["columns"] = columns
    shown = next(
        id_
        for id_, node in prompt.items()
        if node["class_type"] == "PreviewImage" and node["inputs"]["images"][0] == compare
    )
    clips = sum(name.startswith("images_") for name in prompt[compare]["inputs"])
    frames = []
    for file in execute(server, prompt)[shown]["images"]:  # several of a graph that runs once for each clip of a list
        picture = Image.open(io.BytesIO(fetch(f"{server}/view?{urllib.parse.urlencode(file)}"))).convert("RGB")
        frames += frames_of(picture, clips, columns)
    return frames


def frames_of(strip: Image.Image, clips: int, columns: int) -> list[list[Image.Image]]:
    """The frames in a strip that `tav_core.strip` drew, by clip."""
    side, row = (strip.width - 2 * MARGIN) / columns, (strip.height - MARGIN) / clips
    bottoms = [(i + 1) * row for i in range(clips)]
    return [
        [
            strip.crop([round(x) for x in (MARGIN + i * side, y - side, MARGIN + (i + 1) * side, y)])
            for i in range(columns)
        ]
        for y in bottoms
    ]


def thumbnail(frames: list[list[Image.Image]], caption: str, rows: list[list]) -> Image.Image:
    """A square picture: a caption, and below it rows of frames and words."""
    picture = Image.new("RGB", (SIDE, SIDE), PAPER)
    draw, top = ImageDraw.Draw(picture), 64
    draw.text((SIDE / 2, top / 2), caption, INK, ImageFont.load_default(32), anchor="mm")
    words = [all(isinstance(tile, str) for tile in row) for row in rows]
    side = min(
        (SIDE - top - MARGIN - 80 * sum(words)) / (len(rows) - sum(words)),
        (SIDE - 2 * MARGIN) / max(len(row) for row in rows),
    )
    heights = [80 if word else side for word in words]
    y = top + (SIDE - top - sum(heights)) / 2
    for row, height in zip(rows, heights):
        x = SIDE / 2 - side * len(row) / 2
        for tile in row:
            if isinstance(tile, str):
                draw.text((x + side / 2, y + height / 2), tile, INK, ImageFont.load_default(36), anchor="mm")
            else:
                clip, frame = tile
                picture.paste(
                    frames[clip][frame].resize((round(side) - 6,) * 2, Image.Resampling.LANCZOS),
                    (round(x) + 3, round(y) + 3),
                )
            x += side
        y += height
    return picture
