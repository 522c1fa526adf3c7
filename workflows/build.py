"""Builds the workflows of this folder and the blueprint in subgraphs/, in the format that ComfyUI's frontend saves.

    python workflows/build.py http://127.0.0.1:8188                 # writes the JSON files
    python workflows/build.py http://127.0.0.1:8188 --thumbnails    # also runs the mini ones and renders the pictures

The running ComfyUI tells the inputs, widgets and outputs of each node, so their order is right.
"""

import argparse
import json
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from workflows import begin, change, choose, clips, finish  # noqa: E402
from workflows.blueprint import NAME, blueprint  # noqa: E402
from workflows.graph import Workflow  # noqa: E402
from workflows.thumbnails import LIKE, PICTURES, fetch, frames_of_run, thumbnail  # noqa: E402

# by what one wants to do, as the tens of their numbers
WORKFLOWS = {
    "01-one-shot-edit-mini": begin.mini_edit,
    "02-four-edits-mini": begin.four_edits,
    "03-one-shot-edit-sd15": begin.sd15_edit,
    "04-reuse-tuned-weights-mini": begin.reuse,
    "05-reuse-tuned-weights-sd15": begin.reuse_sd15,
    "11-regions-mini": change.regions,
    "12-regions-sd15": change.regions_sd15,
    "13-controlnet-mini": change.controlnet,
    "14-lora-mini": change.lora_style,
    "15-travel-mini": change.travel,
    "21-long-clip-mini": clips.long_clip,
    "22-two-takes-mini": clips.two_takes,
    "23-batch-mini": clips.batch,
    "31-stock-sampler-mini": choose.stock_sampler,
    "32-sweep-mini": choose.sweep,
    "33-metrics-mini": choose.metrics,
    "41-upscale-mini": finish.upscale,
    "42-back-to-source-mini": finish.back_to_source,
}


def write(path: Path, content: dict):
    path.write_text(json.dumps(content, indent=1) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("server", help="address of a running ComfyUI with this pack")
    parser.add_argument("--thumbnails", action="store_true", help="run the mini workflows and render their pictures")
    parser.add_argument("--output", type=Path, default=HERE, help="folder for the files (this one)")
    parser.add_argument("--subgraphs", type=Path, default=HERE.parent / "subgraphs", help="folder for the blueprint")
    arguments = parser.parse_args()
    definitions = json.loads(fetch(f"{arguments.server}/object_info"))
    write(arguments.subgraphs / f"{NAME}.json", blueprint(definitions))
    frames = {}
    for name, describe in WORKFLOWS.items():
        workflow = Workflow(definitions)
        describe(workflow, name)
        write(arguments.output / f"{name}.json", workflow.json(name))
        print(name, len(workflow.nodes), "nodes")
        if arguments.thumbnails and name.endswith("mini"):
            frames[name] = frames_of_run(arguments.server, workflow)
    if arguments.thumbnails:
        for name, (caption, rows) in PICTURES.items():
            thumbnail(frames[LIKE.get(name, name)], caption, rows).save(arguments.output / f"{name}.jpg", quality=85)


if __name__ == "__main__":
    main()
