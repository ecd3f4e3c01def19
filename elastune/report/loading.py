"""The lines of Python that load an extracted sub-network."""

from __future__ import annotations

import json

from elastune.report.load import RunData
from elastune.report.quantities import one_line

HEADS = {
    "ForCausalLM": "AutoModelForCausalLM",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForQuestionAnswering": "AutoModelForQuestionAnswering",
    "ForMaskedLM": "AutoModelForMaskedLM",
}


def load_code(run: RunData, name: str) -> str:
    """Write the program that loads ``subnets/<name>``, in the format that it was saved in."""
    folder = json.dumps(str(run.path / "subnets" / name), ensure_ascii=False)
    base_path = str(run.path / "base")
    if run.architecture is None and run.recipe and run.recipe.get("model"):
        base_path = one_line(run.recipe["model"])
    base = json.dumps(base_path, ensure_ascii=False)
    ends = ((end, auto) for end, auto in HEADS.items() if (run.architecture or "").endswith(end))
    auto = next(ends, ("", "AutoModelForCausalLM" if run.architecture is None else "AutoModel"))[1]
    imports = f"from transformers import {auto}, AutoTokenizer\n\n"
    if run.subnets[name] == "peft":
        return (
            f"from peft import PeftModel\n{imports}"
            f"model = {auto}.from_pretrained({base})\n"
            f"model = PeftModel.from_pretrained(model, {folder})\n"
            f"tokenizer = AutoTokenizer.from_pretrained({base})\n"
        )
    own_code = ", trust_remote_code=True" if run.subnets[name] == "own-code" else ""
    return (
        f"{imports}model = {auto}.from_pretrained({folder}{own_code})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({folder}{own_code})\n"
    )
