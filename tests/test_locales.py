"""The nodes in other languages: `locales/` against the schemas, and the Chinese help pages against the English ones.

English has no file there: where one is missing, the page shows what the schema says.
"""

import json
import re
from collections import Counter

import pytest

from support import ROOT

LANGUAGES = ("zh", "ja", "ko", "de", "fr", "es")
DOCS = ROOT / "nodes" / "web" / "docs"
PAGES = sorted(path.stem for path in DOCS.glob("*.md"))
SENTENCES = ("description", "tooltip")
SYNTAX = set("{}@|\\<>")  # what vue-i18n, which reads names and descriptions, takes for more than text


def translated(language: str) -> dict:
    return json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))


def flat(tree: dict, prefix: str = "") -> dict[str, str]:
    """Texts by their path, such as "TAVTake.inputs.latent.tooltip"."""
    texts = {}
    for key, value in tree.items():
        texts |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return texts


def spoken_of(node) -> dict:
    """What a page shows of a node, in the form of nodeDefs.json. An output without a name shows its type instead."""

    def texts(slot) -> dict:
        return {key: text for key, text in (("name", slot.display_name), ("tooltip", slot.tooltip)) if text}

    schema = node.GET_SCHEMA()
    return {"display_name": schema.display_name, "description": schema.description,
            "inputs": {each.id: texts(each) for each in schema.inputs},
            "outputs": {str(i): texts(each) for i, each in enumerate(schema.outputs)}}  # fmt: skip


@pytest.fixture(scope="module")
def english(pack) -> dict[str, str]:
    return flat({node.GET_SCHEMA().node_id: spoken_of(node) for node in pack.nodes.NODES})


@pytest.fixture(params=LANGUAGES)
def language(request) -> str:
    return request.param


def test_each_language_has_every_text(english, language):
    told = flat(translated(language))
    missing = [f"{path}: {english[path]}" for path in english if path not in told]
    left = [path for path in told if path not in english]
    assert not missing + left, "\n".join([f"{language} lacks", *missing, f"{language} has without need", *left])


def test_there_is_no_other_language():
    assert {path.name for path in (ROOT / "locales").iterdir()} == set(LANGUAGES)


def test_texts_are_plain_text(language):
    for path, text in flat(translated(language)).items():
        assert text and text == text.strip(), path
        assert not SYNTAX & set(text), f"{language} {path}: the page would take {SYNTAX & set(text)} for its own syntax"


def test_texts_are_translated(english, language):
    """Names may be the same in two languages, sentences can't."""
    for path, text in flat(translated(language)).items():
        assert text != english.get(path) or not path.endswith(SENTENCES), f"{language} {path}"


def test_what_is_typed_and_chosen_keeps_its_name(pack, english, language):
    """Numbers, file names, choices and inputs of other nodes, which no page translates."""
    told = english | flat(translated(language))
    fixed = {f"{node.GET_SCHEMA().node_id}.inputs.{each.id}.tooltip": each.options
             for node in pack.nodes.NODES for each in node.GET_SCHEMA().inputs
             if each.get_io_type() == "COMBO" and each.id not in ("file", "folder", "scheduler")}  # fmt: skip
    for path, text in english.items():
        if not path.endswith(SENTENCES):
            continue
        node = path.partition(".")[0]
        names = [*re.findall(r"\d+(?:\.\d+)?", text), *re.findall(r"[\w./]*[a-z][_/][a-z]\w*", text)]
        names += [choice for choice in fixed.get(path, ()) if re.search(rf"\b{choice}\b", text)]
        for name in names:
            own = told.get(f"{node}.inputs.{name}.name", name)
            assert name in told[path] or own in told[path], f"{language} {path}: where is {name}?"


def test_nodes_have_one_name(english, language):
    """Each its own, with the English addition, and the others call it so."""
    told = english | flat(translated(language))
    titles = {path: re.sub(r" \(.*", "", text) for path, text in english.items() if path.endswith("display_name")}
    assert len({told[path] for path in titles}) == len(titles)
    for path, title in titles.items():
        name, addition = re.fullmatch(r"(.*) (\(.*\))", told[path]).groups()
        assert english[path] == f"{title} {addition}"
        for other, text in english.items():
            if other.endswith(SENTENCES) and re.search(rf"(?<!stock ){title}\b(?! Model)", text):
                assert name in told[other], f"{language} {other}: where is {name}, which is {title}?"


# ------------------------------------------------------------------------------------------------- help pages


def cells(text: str) -> list[list[list[str]]]:
    """The tables of a page: rows of cells, without the line below the head."""
    tables = re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE)
    return [[[cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines()
             if not re.fullmatch(r"[|\- ]+", row)] for table in tables]  # fmt: skip


def shape(text: str) -> dict:
    """What a translation leaves as it is."""
    return {"headings": re.findall(r"^#+", text, re.MULTILINE), "pictures": re.findall(r"!\[.*?\]\((.*?)\)", text),
            "points": len(re.findall(r"^- ", text, re.MULTILINE)), "code": Counter(re.findall(r"`.*?`", text)),
            "tables": [[len(row) for row in table] for table in cells(text)]}  # fmt: skip


def test_each_help_page_is_there_in_chinese():
    assert sorted(path.parent.name for path in DOCS.glob("*/zh.md")) == PAGES


@pytest.mark.parametrize("node", PAGES)
def test_chinese_help_page_is_the_english_one(node):
    here, there = (DOCS / file for file in (f"{node}.md", f"{node}/zh.md"))
    text, chinese = (path.read_text(encoding="utf-8") for path in (here, there))
    assert shape(chinese) == shape(text)
    assert not re.search(r"[）)]\*\w", chinese), "Markdown sees no end of an emphasis there: it needs a space behind it"
    words = translated("zh")[node]
    assert chinese.startswith(f"# {words['display_name'].removesuffix(' (Tune-A-Video)')}\n")
    outputs = [output.get("name") for output in words["outputs"].values()] if "outputs" in words else []
    for table, same in zip(cells(text), cells(chinese)):
        head, *rows = table
        if head[0] == "message":  # errors are English
            assert [row[0] for row in same[1:]] == [row[0] for row in rows]
        for (name, *_), (label, *_) in zip(rows, same[1:]):
            if head[0] == "input" and name in words["inputs"]:
                called = words["inputs"][name]["name"]
                assert label == (called if f"({name})" in called else f"{called} ({name})")
        if head[0] == "output":
            for (name, *_), (label, *_), called in zip(rows, same[1:], outputs, strict=True):
                assert label == (f"{called} ({name})" if called else name)
