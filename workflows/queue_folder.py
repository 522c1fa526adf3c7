"""Queues one graph for every clip of a folder, at a running ComfyUI; Python's own library is all that it needs.

    python workflows/queue_folder.py graph.json clips/ [--sentences sentences.csv] [--server http://127.0.0.1:8188]

The graph is one that was saved with *Workflow > Export (API)*. Its Load Video gets each clip in turn, and what it saves
gets the clip's name. A table of sentences has the columns `clip` and `NODE.INPUT`, such as `6.text`: what stands in a
clip's row takes the place of the graph's own. The queue is the server's: it works on while this only waits for it,
clips that were run already come from its cache, and a clip that fails stops no other.
"""

import argparse
import csv
import json
import mimetypes
import sys
import time
import urllib.error
import urllib.request
import uuid
from pathlib import Path

LOADERS = ("TAVLoadVideo", "LoadVideo")  # this pack's and ComfyUI's own, both with an input `file`
SAVERS = ("TAVSaveTunedWeights", "TAVSaveInvertedNoise")  # whose input `name` is of a file; others have a prefix
SUFFIXES = (".mp4", ".webm", ".mov", ".mkv", ".gif")


def ask(url: str, data: bytes | None = None, kind: str = "application/json"):
    with urllib.request.urlopen(urllib.request.Request(url, data, {"Content-Type": kind}), timeout=60) as answer:
        return json.load(answer)


def upload(server: str, clip: Path) -> str:
    """Puts a clip into the server's input folder, in the place of one of that name; its name there."""
    boundary, kind = uuid.uuid4().hex, mimetypes.guess_type(clip.name)[0] or "application/octet-stream"
    name = clip.name.replace('"', "'")
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="image"; filename="{name}"\r\nContent-Type: {kind}'
    tail = f'\r\n--{boundary}\r\nContent-Disposition: form-data; name="overwrite"\r\n\r\ntrue\r\n--{boundary}--\r\n'
    body = head.encode() + b"\r\n\r\n" + clip.read_bytes() + tail.encode()
    return ask(f"{server}/upload/image", body, f"multipart/form-data; boundary={boundary}")["name"]


def graph_for(graph: dict, clip: str, stem: str, row: dict[str, str]) -> dict:
    """The graph with a clip, the names of what it saves, and a row's sentences."""
    graph = json.loads(json.dumps(graph))
    for node in graph.values():
        if node["class_type"] in LOADERS:
            node["inputs"]["file"] = clip
        named = "name" if node["class_type"] in SAVERS else "filename_prefix"
        if isinstance(name := node["inputs"].get(named), str):
            node["inputs"][named] = f"{name}-{stem}"
    for column, text in row.items():
        if text:
            number, _, name = column.partition(".")
            graph[number]["inputs"][name] = text
    return graph


def sentences_of(path: Path | None, graph: dict) -> dict[str, dict[str, str]]:
    """The rows of a table, by the name of their clip."""
    if path is None:
        return {}
    with open(path, newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    for column in rows[0] if rows else ():
        number, _, name = column.partition(".")
        if column != "clip" and name not in graph.get(number, {}).get("inputs", {}):
            sys.exit(f"{path}: {column} is no input of a node of the graph; give NODE.INPUT, such as 6.text")
    return {row.pop("clip"): row for row in rows}


def result(server: str, number: str) -> str:
    """Waits until a prompt is done: what it saved, or why it failed."""
    while not (history := ask(f"{server}/history/{number}")):
        queued = [entry[1] for entries in ask(f"{server}/queue").values() for entry in entries]
        if number not in queued and not ask(f"{server}/history/{number}"):
            return "failed: it was taken out of the queue"
        time.sleep(1)
    status, outputs = history[number]["status"], history[number]["outputs"]
    for kind, data in status["messages"]:
        if kind == "execution_error":
            return f"failed: {data['exception_message'].strip()}"
        if kind == "execution_interrupted":
            return "failed: it was cancelled"
    files = [entry for of in outputs.values() for entries in of.values() if isinstance(entries, list)
             for entry in entries if isinstance(entry, dict) and entry.get("type") == "output"]  # fmt: skip
    return ", ".join(f"{entry['subfolder']}/{entry['filename']}".lstrip("/") for entry in files) or "nothing was saved"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("graph", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sentences", type=Path)
    parser.add_argument("--server", default="http://127.0.0.1:8188")
    args = parser.parse_args()
    graph = json.loads(args.graph.read_text("utf-8"))
    if not isinstance(graph, dict) or not all(
        isinstance(node, dict) and "class_type" in node for node in graph.values()
    ):
        sys.exit(f"{args.graph} is no graph in API format; save it with Workflow > Export (API)")
    if not any(node["class_type"] in LOADERS for node in graph.values()):
        sys.exit(f"{args.graph} has no Load Video that could get the clips")
    rows, queued, failed = sentences_of(args.sentences, graph), {}, 0
    for clip in sorted(path for path in args.folder.iterdir() if path.suffix.lower() in SUFFIXES):
        prompt = graph_for(graph, upload(args.server, clip), clip.stem, rows.get(clip.name, {}))
        try:
            queued[clip.name] = ask(f"{args.server}/prompt", json.dumps({"prompt": prompt}).encode())["prompt_id"]
        except urllib.error.HTTPError as error:
            told, failed = json.loads(error.read()), failed + 1
            why = [each["details"] for of in told.get("node_errors", {}).values() for each in of["errors"]]
            print(f"{clip.name}: refused: {'; '.join(why) or told['error']['message']}", flush=True)
    print(f"{len(queued)} clips are in the queue", flush=True)
    for name, number in queued.items():
        told = result(args.server, number)
        failed += told.startswith("failed")
        print(f"{name}: {told}", flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
