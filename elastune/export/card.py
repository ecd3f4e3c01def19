"""The README.md of an exported model: how to load it, the sizes of its blocks, its origin."""

from __future__ import annotations

from pathlib import Path

from elastune.export.base import Exported, Format, factorised_embedding
from elastune.export.verify import auto_class
from elastune.subnetwork import Subnetwork
from elastune.version import __version__

_LOADING = {
    "hf-hetero": """{auto}.from_pretrained("{folder}", trust_remote_code=True)
# or, without running the code in this folder:
import elastune
{auto}.from_pretrained("{folder}")""",
}
_PLAIN = """{auto}.from_pretrained("{folder}")"""

_ADAPTER = """
model = peft.PeftModel.from_pretrained(model, "{folder}/adapter")"""


def model_card(
    sub: Subnetwork, exported: Exported, format: Format, *, origin: str | None, folder: str
) -> str:
    """Return the text of README.md.

    Args:
        sub: what was saved.
        exported: in this form.
        format: its format.
        origin: name of the model it was cut from; None takes what the model says, if it is no path
            of this machine.
        folder: the folder's own name.
    """
    model = exported.model
    auto = auto_class(model).__name__
    lines = _LOADING.get(format.name, _PLAIN).format(
        auto=f"model = transformers.{auto}", folder=folder
    )
    if exported.adapter is not None:
        lines += _ADAPTER.format(folder=folder)
    n_params = sum(p.numel() for p in model.parameters())
    parts = [
        f"# {folder}",
        f"Cut from {_origin(sub, origin)} with elastune {__version__}: {n_params:,} weights, "
        f"{len(sub.shapes)} blocks.{_embedding(exported)}",
        f"Format `{format.name}`: loads with {format.loads_with}.",
        f"```python\nimport transformers\n{lines}\n```",
        *exported.notes,
        "| block | cut from block | heads | key/value heads | channels |\n"
        "|---|---|---|---|---|\n"
        + "\n".join(
            f"| {number} | {old} | {shape.heads} | {shape.kv_heads} | {shape.ffn} |"
            for number, (old, shape) in enumerate(zip(sub.kept_blocks, sub.shapes, strict=True))
        ),
    ]
    return "\n\n".join(parts) + "\n"


def _embedding(exported: Exported) -> str:
    table = factorised_embedding(exported.model)
    if table is None:
        return ""
    return f" Its word embedding has rank {table.rank} of {table.embedding_dim}."


def _origin(sub: Subnetwork, origin: str | None) -> str:
    name = origin or str(sub.model.config.name_or_path or "")
    if not name:
        return f"a {type(sub.model).__name__}"
    return Path(name).name if Path(name).is_absolute() else name
