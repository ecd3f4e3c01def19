"""Save a sub-network: choose the format, write the folder, load it back, and say what loads it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from elastune.errors import BadRecipe, nearest
from elastune.export.base import Format, factorised_embedding
from elastune.export.card import model_card
from elastune.export.card_facts import CardFacts
from elastune.export.formats import FORMATS
from elastune.export.verify import auto_class, verify
from elastune.files import whole_folder, write_text
from elastune.models.save import write_model
from elastune.subnetwork import Subnetwork


@dataclass(frozen=True)
class Saved:
    """A saved sub-network.

    Attributes:
        folder: where.
        format: in which of `FORMATS`.
        loads_with: what loads it, in a few words.
        largest_difference: between its outputs after loading and those of the sub-network, with
            the adapter where there is one.
        n_params: weights stored, the adapter's left out.
        n_bytes: of all files.
        files: their names.
        notes: what else the user should know, a sentence each.
    """

    folder: Path
    format: str
    loads_with: str
    largest_difference: float
    n_params: int
    n_bytes: int
    files: tuple[str, ...]
    notes: tuple[str, ...] = ()


def save_subnetwork(
    sub: Subnetwork,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    *,
    format: str = "auto",
    origin: str | None = None,
    facts: CardFacts | None = None,
) -> Saved:
    """Save a sub-network so that others can load it, and prove it by loading it.

    The folder is replaced whole, once what was written computes the same as ``sub.model``. It holds
    the model, the tokenizer, a README.md, ``subnet.json``, and an adapter that was not merged in
    ``adapter/`` (stock PEFT).

    Args:
        sub: from `elastune.subnetwork.extract_model`.
        tokenizer: saved beside it.
        folder: where to.
        format: one of `FORMATS`; ``"auto"`` is ``hf`` where that is possible and as small as the
            sub-network, else ``hf-hetero``.
        origin: the name of the model it was cut from, for the README.md.
        facts: what else the README.md is to say: recipe, budget, figures.

    Raises:
        BadRecipe: an unknown format, or one that cannot hold this sub-network.
        UnsupportedModel: a task head that the format has no class for.
        ElastuneError: the saved model computes something else; nothing is left of it.
    """
    chosen = _choose(sub, format)
    exported = chosen.make(sub)
    folder = Path(folder).absolute()
    with whole_folder(folder) as partial:
        write_model(exported.model, tokenizer, partial)
        auto = auto_class(exported.model)
        worst = verify(partial, sub.model, auto)
        if sub.adapter is not None and exported.adapter is not None:
            exported.adapter.save(partial / "adapter", base=str(folder))
            worst = max(worst, verify(partial, sub.model, auto, adapter=sub.adapter))
        write_text(partial / "subnet.json", sub.config.to_json() + "\n")
        n_params = sum(p.numel() for p in exported.model.parameters())
        card = model_card(sub, exported, chosen, origin=origin, folder=folder.name, facts=facts)
        write_text(partial / "README.md", card)
        files = sorted(p for p in partial.rglob("*") if p.is_file())
        names = tuple(p.relative_to(partial).as_posix() for p in files)
        n_bytes = sum(p.stat().st_size for p in files)
    return Saved(
        folder,
        chosen.name,
        f"loads with {chosen.loads_with}",
        worst,
        n_params,
        n_bytes,
        names,
        exported.notes,
    )


def _choose(sub: Subnetwork, name: str) -> Format:
    """Return the format, having made sure that it can hold the sub-network."""
    if name == "auto":
        is_stock = factorised_embedding(sub.model) is None and FORMATS["hf"].why_not(sub) is None
        name = "hf" if is_stock else "hf-hetero"
    if name not in FORMATS:
        raise BadRecipe(
            f"unknown format {name!r}{nearest(name, FORMATS)}; known are auto, "
            f"{', '.join(FORMATS)}",
            try_="leave it out: the format with the fewest demands is taken",
        )
    why = FORMATS[name].why_not(sub)
    if why is not None:
        fitting = [n for n, format in FORMATS.items() if format.why_not(sub) is None]
        raise BadRecipe(
            f"format {name} cannot hold this sub-network: {why}",
            try_=f"format {' or '.join(fitting)}"
            + ("; snap_to_uniform makes the blocks alike" if name == "hf" else ""),
        )
    return FORMATS[name]
