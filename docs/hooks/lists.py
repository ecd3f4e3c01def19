"""Lists on the site may be indented as on GitHub: by two spaces, where Markdown wants four."""

from __future__ import annotations

from typing import Any

from markdown import Markdown
from markdown.blockprocessors import ListIndentProcessor, OListProcessor, UListProcessor
from markdown.extensions import Extension


class ShortIndent(Extension):
    """Takes two or three spaces for one level of a list."""

    def extendMarkdown(self, md: Markdown) -> None:
        """Make the parts that read lists anew; they look at the width when they are made."""
        usual, md.tab_length = md.tab_length, 2
        known = md.parser.blockprocessors
        known.register(ListIndentProcessor(md.parser), "indent", 90)
        known.register(OListProcessor(md.parser), "olist", 40)
        known.register(UListProcessor(md.parser), "ulist", 30)
        md.tab_length = usual  # code is still indented by four


def on_config(config: Any) -> Any:
    """Add the extension; mkdocs calls this by its name."""
    config["markdown_extensions"].append(ShortIndent())
    return config
