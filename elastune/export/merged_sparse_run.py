"""Load a checkpoint in a process of its own, and write how many zeros each weight has, as JSON.

Run as a script: ``python -P merged_sparse_run.py FOLDER AUTO OUT``, AUTO the name of an auto class.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main() -> None:
    """Load as users do, count, write."""
    import transformers

    folder, auto, out = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    if json.loads((folder / "config.json").read_text())["model_type"].startswith("elastune_"):
        import elastune  # noqa: F401  (knows these classes, so that no code of the folder is run)
    model = getattr(transformers, auto).from_pretrained(
        folder, use_safetensors=True, trust_remote_code=False
    )
    counts = {n: int((t == 0).sum()) for n, t in model.state_dict().items() if t.dim() == 2}
    out.write_text(json.dumps(counts), encoding="utf-8")


if __name__ == "__main__":
    main()
