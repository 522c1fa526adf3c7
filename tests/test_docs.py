"""The documents: their links lead somewhere, their commands and examples are ones that the program understands."""

import ast
import re
import shlex
from pathlib import Path
from urllib.parse import unquote

import pytest

from tav_core import cli
from tav_core.mini import cli as mini_cli
from tav_core.terminal import preset_of

ROOT = Path(__file__).parents[1]
FOLDERS = (".github", "nodes", "tav_core", "tests", "workflows")  # and not what was installed beside them
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.md"))])
DOCUMENTS = [path for path in DOCUMENTS if ".pytest_cache" not in path.parts]
HELP = ROOT / "nodes" / "web" / "docs"


def names(paths) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


def without_code(text: str) -> str:
    return re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)


def anchors(path: Path) -> set[str]:
    """What GitHub makes of a document's headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", names(DOCUMENTS))
def test_links_lead_to_files_and_headings(document):
    path = ROOT / document
    folder = HELP if HELP in path.parents else path.parent  # in ComfyUI those of translated pages lead from there
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(path.read_text())):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = unquote(target).partition("#")
        found = (folder / file).resolve() if file else path
        assert found.exists(), target
        assert found.is_relative_to(ROOT), f"{target} leads out of the repository"
        assert not anchor or anchor in anchors(found), target


def commands() -> list[tuple[str, str]]:
    """Every command line of ours in the documents: (document, command)."""
    found = []
    for path in DOCUMENTS:
        text = path.read_text()
        blocks = "\n".join(re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)).replace("\\\n", " ")
        lines = re.split(r"\n| && ", blocks) + re.findall(r"`((?:tune-a-video|python -m tav_core)[^`\n]*)`", text)
        for line in lines:
            if match := re.search(r"(tune-a-video|python -m tav_core\S*) (?!COMMAND).+", line):
                found.append((str(path.relative_to(ROOT)), match[0]))
    return found


@pytest.mark.parametrize("document, command", commands())
def test_commands_are_understood(document, command, monkeypatch):
    program, _, arguments = re.sub(r"^python -m ", "", command).partition(" ")
    module, parsed = (mini_cli if program == "tav_core.mini" else cli), []
    options = {"checkpoint": "mini", "video": "x.mp4", "prompt": "a", "edit": "b"}  # of the file of an example
    monkeypatch.setattr("tav_core.config_file._read", lambda path: options)
    monkeypatch.setattr(module, "run", lambda parser: parsed.append(parser.parse_args(shlex.split(arguments))))
    if arguments in ("--version", "--help"):
        with pytest.raises(SystemExit, match="0"):
            module.main()
    else:
        module.main()
        assert callable(parsed[0].run)
        if hasattr(parsed[0], "preset"):
            preset_of(parsed[0])


def test_every_command_has_an_example():
    for module, document in ((cli, "tav_core/README.md"), (mini_cli, "tav_core/mini/README.md")):
        program = "python -m tav_core.mini " if module is mini_cli else "tune-a-video "
        shown = {c.removeprefix(program).split()[0] for d, c in commands() if d == document and c.startswith(program)}
        assert module.COMMANDS.keys() <= shown


def test_examples_in_python_use_what_there_is():
    import tav_core

    example = "".join(re.findall(r"```python\n(.*?)```", (ROOT / "tav_core" / "README.md").read_text(), re.DOTALL))
    used = {node.attr for node in ast.walk(ast.parse(example)) if isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name) and node.value.id == "tav"}  # fmt: skip
    assert used and used <= set(dir(tav_core))
    compile(example, "README.md", "exec")


@pytest.mark.parametrize("folder", ["tav_core", "nodes"])
def test_maps_show_every_file(folder):
    (tree,) = re.findall(r"```text\n(.*?)```", (ROOT / folder / "README.md").read_text(), re.DOTALL)
    shown = set(re.findall(r"── (\S+)", tree))
    assert {path.name for path in (ROOT / folder).glob("*.py")} <= shown
    assert not {name for name in shown if not (ROOT / folder / name).exists()}
