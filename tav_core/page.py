"""HTML pages of results, which need no network and no server: pictures inside of them, or beside them in the folder.

Their templates are in `pages/`. What users wrote, sentences and names of files, is text there, never markup.
"""

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "pages"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def page(template: str, **content: Any) -> str:
    """A page from one of the templates."""
    return _TEMPLATES.get_template(template).render(content) + "\n"
