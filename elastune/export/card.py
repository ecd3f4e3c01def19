"""The README.md of an export: what it is, how to load it, its figures, and where it comes from.

The front matter is the hub's: licence, base, tags, and figures as its model index has them. What is
not known is left out, but for the licence: a card without one says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from huggingface_hub import ModelCardData
from transformers import PreTrainedModel

from elastune.export.base import Exported, Format, factorised_embedding
from elastune.export.base_facts import UNKNOWN, BaseFacts, base_facts
from elastune.export.card_facts import CardFacts, eval_results, is_baseline
from elastune.export.verify import auto_class
from elastune.extract import PeftAdapter
from elastune.report.tables import markdown_table
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

#: Ending of a class name -> the hub's name for what such models do.
PIPELINE_TAGS: Mapping[str, str] = {
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "ForSequenceClassification": "text-classification",
    "ForQuestionAnswering": "question-answering",
    "ForTokenClassification": "token-classification",
    "ForMaskedLM": "fill-mask",
    "ForImageClassification": "image-classification",
}


@dataclass(frozen=True)
class CardText:
    """What a card says of one export, whatever wrote it.

    Attributes:
        title: the name of the folder.
        about: what it is, in a sentence or two.
        loads_with: what loads it, in a few words.
        code: lines that load it.
        language: of these lines.
        parts: Markdown that follows: notes, tables of sizes.
        library: as the hub names what loads it, such as ``transformers`` or ``peft``.
        pipeline_tag: as the hub names what it does.
        tags: for the hub; ``elastune`` is among them in any case.
    """

    title: str
    about: str
    loads_with: str
    code: str
    language: str = "python"
    parts: Sequence[str] = ()
    library: str = "transformers"
    pipeline_tag: str = "text-generation"
    tags: Sequence[str] = ()


def card(text: CardText, facts: CardFacts | None = None) -> str:
    """Return the text of a README.md, front matter included.

    Args:
        text: of the export.
        facts: recipe, budget, figures and base, as far as they are known.
    """
    facts = facts or CardFacts()
    base = facts.base
    licence = base.license if base else None
    results = eval_results(facts, text.pipeline_tag)
    data = ModelCardData(
        license=licence.id if licence else None,
        license_name=licence.name if licence else None,
        license_link=licence.link if licence else None,
        base_model=base.hub_id if base else None,
        library_name=text.library,
        pipeline_tag=text.pipeline_tag,
        tags=["elastune", *text.tags, *facts.tags],
        model_name=text.title if results else None,  # it only goes with figures
        eval_results=results or None,
    )
    parts = [
        f"# {text.title}",
        text.about,
        f"Loads with {text.loads_with}.",
        f"```{text.language}\n{text.code.strip()}\n```",
        *text.parts,
        *_figures(facts),
        *_origin_part(facts),
    ]
    body = "\n\n".join(part.strip("\n") for part in parts if part) + "\n"
    return f"---\n{data.to_yaml()}\n---\n\n{body}"


def _figures(facts: CardFacts) -> list[str]:
    """Return the section of scores beside those of the baselines."""
    if not facts.rows:
        return []
    table = markdown_table({"rows": [dict(row) for row in facts.rows]})
    compared = list(dict.fromkeys(r["name"] for r in facts.rows if is_baseline(r["name"])))
    beside = [name for name in compared if name != facts.system]
    said = f"This is `{facts.system}`. ± is one standard error of the mean over the test examples."
    if beside:
        said += f" Baselines, scored on the same examples: {', '.join(beside)}."
    return ["## Figures", said, table]


def _origin_part(facts: CardFacts) -> list[str]:
    """Return the section of base, licence, recipe and budget."""
    base = facts.base
    lines = {}
    if base is not None:
        link = f"[{base.hub_id}](https://huggingface.co/{base.hub_id})"
        lines["base model"] = link if base.hub_id else base.name
    licence = base.license if base else None
    source = f" (from {licence.source})" if licence and licence.source else ""
    lines["licence of the base"] = f"{licence}{source}" if licence else UNKNOWN
    if facts.budget:
        lines["budget"] = facts.budget
    lines |= dict(facts.recipe)
    listed = "\n".join(f"- **{name}**: {_one_line(value)}" for name, value in lines.items())
    return ["## How it was made", listed, f"Made with elastune {__version__}."]


def _one_line(value: Any) -> str:
    return " ".join(str(value).split())


def pipeline_tag(model: PreTrainedModel) -> str:
    """Return the hub's name for what a model does: ``feature-extraction`` without a head."""
    name = type(model).__name__
    found = (tag for ending, tag in PIPELINE_TAGS.items() if name.endswith(ending))
    return next(found, "feature-extraction")


def model_card(
    sub: Subnetwork,
    exported: Exported,
    format: Format,
    *,
    origin: str | None,
    folder: str,
    facts: CardFacts | None = None,
) -> str:
    """Return the text of README.md of a saved sub-network.

    Args:
        sub: what was saved.
        exported: in this form.
        format: its format.
        origin: name of the model it was cut from; None takes what the model says, if it is no path
            of this machine.
        folder: the folder's own name.
        facts: what else is known of it; its base is looked up by ``origin`` where they lack one.
    """
    model = exported.model
    auto = auto_class(model).__name__
    lines = _LOADING.get(format.name, _PLAIN).format(
        auto=f"model = transformers.{auto}", folder=folder
    )
    imports = "import transformers\n"
    if exported.adapter is not None:
        imports = "import peft\nimport transformers\n"
        lines += _ADAPTER.format(folder=folder)
    base = _base(sub, origin)
    facts = facts or CardFacts()
    if facts.base is None and base is not None:
        facts = replace(facts, base=base)
    n_params = sum(p.numel() for p in model.parameters())
    name = facts.base.name if facts.base else f"a {type(sub.model).__name__}"
    text = CardText(
        title=folder,
        about=f"Cut from {name} with elastune {__version__}: {n_params:,} weights, "
        f"{len(sub.shapes)} blocks.{_embedding(exported)} Format `{format.name}`.",
        loads_with=format.loads_with,
        code=imports + lines,
        parts=[*exported.notes, _sizes(sub)],
        pipeline_tag=pipeline_tag(sub.model),
        tags=[format.name],
    )
    return card(text, facts)


def adapter_card(
    adapter: PeftAdapter,
    model: PreTrainedModel,
    *,
    folder: str,
    origin: str | None,
    base: str | None = None,
    about: str = "",
    parts: Sequence[str] = (),
    facts: CardFacts | None = None,
) -> str:
    """Return the text of README.md of a saved adapter.

    Args:
        adapter: what was saved.
        model: the base, or one like it.
        folder: the folder's own name.
        origin: the name of the model it was made from.
        base: where the base is loaded from, if not by that name: one that was pruned, say.
        about: what it is; ranks and weights are told in any case.
        parts: Markdown that follows.
        facts: what else is known of it; its base is looked up by ``origin`` where they lack one.
    """
    facts = facts or CardFacts()
    if facts.base is None and origin:
        facts = replace(facts, base=base_facts(origin))
    known = facts.base
    name = (known.hub_id or known.name) if known else "the base model"
    ranks = sorted(a.shape[0] for a, _, _ in adapter.weights.values())
    n_params = sum(a.numel() + b.numel() for a, b, _ in adapter.weights.values())
    spread = str(ranks[0]) if ranks[0] == ranks[-1] else f"{ranks[0]} to {ranks[-1]}"
    said = about or f"A LoRA for {name}, made with elastune {__version__}."
    text = CardText(
        title=folder,
        about=f"{said} {len(ranks)} modules of rank {spread}, {n_params:,} weights.",
        loads_with="plain PEFT",
        code="import peft\nimport transformers\n"
        f'model = transformers.{auto_class(model).__name__}.from_pretrained("{base or name}")\n'
        f'model = peft.PeftModel.from_pretrained(model, "{folder}")',
        parts=parts,
        library="peft",
        pipeline_tag=pipeline_tag(model),
        tags=["lora"],
    )
    return card(text, facts)


def _sizes(sub: Subnetwork) -> str:
    """Return the table of the blocks."""
    return (
        "| block | cut from block | heads | key/value heads | channels |\n"
        "|---|---|---|---|---|\n"
        + "\n".join(
            f"| {number} | {old} | {shape.heads} | {shape.kv_heads} | {shape.ffn} |"
            for number, (old, shape) in enumerate(zip(sub.kept_blocks, sub.shapes, strict=True))
        )
    )


def _embedding(exported: Exported) -> str:
    table = factorised_embedding(exported.model)
    if table is None:
        return ""
    return f" Its word embedding has rank {table.rank} of {table.embedding_dim}."


def _base(sub: Subnetwork, origin: str | None) -> BaseFacts | None:
    name = origin or str(sub.model.config.name_or_path or "")
    return base_facts(name) if name else None
