"""Load a checkpoint or an adapter in a process of its own, without elastune, and save its outputs.

Run as a script: ``python -I checkpoint_run.py FOLDER OUT``. Only a folder that says that its code
is to be run (``hf-hetero``, whose modelling file elastune wrote) has it run.
"""

from __future__ import annotations

import json
import sys
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any


class _Hidden(MetaPathFinder):
    """Lets elastune look as if it were not installed."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> None:
        if name.partition(".")[0] == "elastune":
            raise ImportError(f"{name} is hidden")


def main() -> None:
    """Load, run the stored inputs, write the outputs."""
    folder, out = Path(sys.argv[1]), Path(sys.argv[2])
    sys.meta_path.insert(0, _Hidden())
    import torch
    import transformers
    from safetensors.torch import load_file, save_file

    about = json.loads((folder / "export.json").read_text(encoding="utf-8"))
    base = Path(about["base"]) if about["format"] == "peft" else folder
    auto = getattr(transformers, about["auto_class"])
    runs_code = about["format"] == "hf-hetero"
    model = auto.from_pretrained(
        base, dtype=torch.float32, use_safetensors=True, trust_remote_code=runs_code
    )
    adapter = folder if about["format"] == "peft" else folder / "adapter"
    if (adapter / "adapter_config.json").is_file():
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(adapter))
    model.eval()
    stored = load_file(folder / "reference.safetensors")
    inputs = {n.removeprefix("in."): t for n, t in stored.items() if n.startswith("in.")}
    with torch.no_grad():
        found = model(**inputs)
    save_file({name: found[name].contiguous() for name in about["outputs"]}, out)


if __name__ == "__main__":
    main()
