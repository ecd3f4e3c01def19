"""Run in a process of its own, where elastune cannot be imported: load folders, say what they do.

Arguments: a JSON file of cases, ``{"name": {"folder", "auto", "generates"}}``; the file to write.
"""

from __future__ import annotations

import copy
import json
import sys
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any

import torch


class _NoElastune(MetaPathFinder):
    def find_spec(self, name: str, path: Any, target: Any = None) -> None:
        if name.partition(".")[0] == "elastune":
            raise ImportError(f"{name} is not here")


if __name__ == "__main__":
    sys.meta_path.insert(0, _NoElastune())

import transformers  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402

IDS = torch.tensor([[5, 9, 4, 7, 3, 8, 6, 11]])
IMAGE = torch.linspace(-1, 1, 3 * 12 * 12).reshape(1, 3, 12, 12)


@torch.no_grad()
def first(model: Any) -> torch.Tensor:
    """Return the first output for fixed inputs."""
    is_image = model.main_input_name == "pixel_values"
    inputs = {"pixel_values": IMAGE} if is_image else {"input_ids": IDS}
    return model.eval()(**inputs)[0].float()


def generated(model: Any, **options: Any) -> torch.Tensor:
    found = model.generate(
        input_ids=IDS,
        attention_mask=torch.ones_like(IDS),
        max_new_tokens=5,
        min_new_tokens=5,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    return torch.stack(found.logits)


def gap(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


def facts(case: dict[str, Any], spare: Path) -> dict[str, Any]:
    auto = getattr(transformers, case["auto"])
    load = {"trust_remote_code": True, "dtype": torch.float32}
    model = auto.from_pretrained(case["folder"], **load).eval()
    out = first(model)
    found: dict[str, Any] = {
        "output": out.flatten().tolist(),
        "n_params": sum(p.numel() for p in model.parameters()),
        "class": type(model).__name__,
    }
    eager = auto.from_pretrained(case["folder"], attn_implementation="eager", **load)
    found["eager"] = gap(first(eager), out)
    found["eager_is_kept"] = eager.config._attn_implementation
    half = auto.from_pretrained(case["folder"], trust_remote_code=True, dtype=torch.bfloat16)
    flat = first(half).flatten(), out.flatten()
    found["bfloat16"] = float(torch.nn.functional.cosine_similarity(*flat, dim=0))
    found["dtype"] = str(next(half.parameters()).dtype)
    model.save_pretrained(spare)
    again = auto.from_pretrained(spare, **load)
    found["saved_again"] = gap(first(again), out)
    found["copied"] = gap(first(copy.deepcopy(model)), out)
    if case["generates"]:
        plain = generated(model, use_cache=False)
        found["dynamic"] = gap(generated(model), plain)
        if model._can_compile_fullgraph:
            found["static"] = gap(generated(model, cache_implementation="static"), plain)
    found["trained"] = trained(model)
    return found


def trained(model: Any) -> list[bool]:
    """Return whether PEFT wraps the model, and whether every adapter gets a gradient."""
    wanted = (torch.nn.Linear, transformers.pytorch_utils.Conv1D)
    blocks = max((m for m in model.modules() if isinstance(m, torch.nn.ModuleList)), key=len)
    inside = {id(module) for module in blocks.modules()}
    names = [n for n, m in model.named_modules() if id(m) in inside and isinstance(m, wanted)]
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=names, init_lora_weights=False))
    is_image = model.main_input_name == "pixel_values"
    inputs = {"pixel_values": IMAGE} if is_image else {"input_ids": IDS}
    wrapped.train()(**inputs)[0].square().mean().backward()
    lora = [p for n, p in wrapped.named_parameters() if "lora_" in n]
    return [len(lora) == 2 * len(names), all(p.grad is not None for p in lora)]


def main() -> None:
    cases = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    spare = Path(sys.argv[2]).with_suffix(".again")
    results = {name: facts(case, spare / name) for name, case in cases.items()}
    results["elastune"] = [name for name in sys.modules if name.startswith("elastune.")]
    Path(sys.argv[2]).write_text(json.dumps(results), encoding="utf-8")


if __name__ == "__main__":
    main()
