"""Builds the API reference of `tav_core` from its docstrings, as HTML.

    pip install . pdoc==16.0.0
    python .ci/reference.py api-reference

A name in backticks behind "see" or "as in" is a reference: it becomes a link to the function, class or module of that
name, and the build fails if the package has none.
"""

import pkgutil
import re
import sys
import warnings
from pathlib import Path

import pdoc
from jinja2 import pass_context

sys.path.insert(0, str(Path(__file__).parents[1]))
import tav_core  # noqa: E402

assert tav_core.load_video  # with the first public name all come, which pdoc looks for

REFERENCE = re.compile(r"\b(?:[Ss]ee(?: also)?|as in)\s+<code>[\w.]+</code>(?:(?:,| and| or)\s+<code>[\w.]+</code>)*")
broken = set()


def address(name: str, module: pdoc.doc.Module, namespace: str, modules: dict[str, pdoc.doc.Module]) -> str | None:
    """Where a name in the docstring of `namespace` in `module` leads, or None. What is nearest comes first."""
    for qualname in pdoc.render_helpers.qualname_candidates(name, namespace):
        if module.get(qualname):
            return f"#{qualname}"
    if f"tav_core.{name}" in modules:
        return pdoc.render_helpers.relative_link(module.modulename, f"tav_core.{name}")
    for other in modules.values():
        if other.modulename != "tav_core" and other.get(name):
            return f"{pdoc.render_helpers.relative_link(module.modulename, other.modulename)}#{name}"
    return None


@pass_context
def linkify(context, html: str, namespace: str = "", shorten: bool = True) -> str:
    """pdoc's own, which knows names of the same module and full ones, with our references before it."""
    module, modules = context["module"], context["all_modules"]

    def link(match: re.Match) -> str:
        target, described = address(match[1], module, namespace, modules), module.get(namespace)
        if isinstance(described, pdoc.doc.Function) and match[1] in described.signature.parameters:
            return match[0]
        if target is None:
            broken.add(f"{module.modulename}.{namespace}".rstrip(".") + f": {match[1]}")
            return match[0]
        return f'<code><a href="{target}">{match[1]}</a></code>'

    linked = REFERENCE.sub(lambda match: re.sub(r"<code>([\w.]+)</code>", link, match[0]), html)
    return pdoc.render_helpers.linkify(context, linked, namespace, shorten)


def main(folder: Path):
    # pdoc shows the modules of a package that its __all__ names
    tav_core.__all__ += [module.name for module in pkgutil.iter_modules(tav_core.__path__) if module.name != "__main__"]
    warnings.filterwarnings("error", module="pdoc")  # a module that can't be imported, an annotation that can't be read
    pdoc.render.configure(docformat="google", search=True, show_source=True)
    pdoc.render.env.filters["linkify"] = linkify
    pdoc.pdoc("tav_core", output_directory=folder)
    if broken:
        sys.exit("\n".join(["references to nothing:", *sorted(broken)]))
    print(folder / "index.html")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
