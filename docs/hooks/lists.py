"""Lists on the site may be indented as on GitHub: by two spaces, where Markdown wants four."""

from __future__ import annotations

from typing import Any

from markdown import Markdown
from markdown.extensions import Extension


class ShortIndent(Extension):
    """Takes two spaces for one level of a list."""

    def extendMarkdown(self, md: Markdown) -> None:
        """Set the width of a level."""
        md.tab_length = 2


def on_config(config: Any) -> Any:
    """Add the extension; mkdocs calls this by its name."""
    config["markdown_extensions"].append(ShortIndent())
    return config
