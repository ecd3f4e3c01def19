"""``compressed-tensors``: INT4 weights, packed, as transformers reads them.

The format is "pack-quantized" of the package compressed-tensors: eight codes in an int32, a scale
and a zero point for each group. Numbers come back exactly as they were merged.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from elastune.elastic.merge_rules import Int4Grid
from elastune.errors import BadRecipe
from elastune.export.card import CardText, card, pipeline_tag
from elastune.export.card_facts import CardFacts
from elastune.export.saved import Saved
from elastune.export.verify import auto_class, verify
from elastune.files import read_json, whole_folder, write_json, write_text
from elastune.models.save import write_model
from elastune.subnetwork import Subnetwork

FORMAT = "compressed-tensors"
LOADS_WITH = "transformers, where compressed-tensors is installed"


@torch.no_grad()
def save_compressed(
    sub: Subnetwork,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    *,
    origin: str | None = None,
    facts: CardFacts | None = None,
) -> Saved:
    """Save a merged sub-network on an INT4 grid, packed, and prove it by loading it.

    Args:
        sub: whose ``grids`` say what its weights lie on.
        tokenizer: saved beside it.
        folder: replaced whole.
        origin: the name of the model it was cut from, for the README.md.
        facts: what else the README.md is to say.

    Raises:
        BadRecipe: no grid, or an adapter that is not merged.
        ElastuneError: the folder computes something else; nothing is left of it.
    """
    if not sub.grids or sub.adapter is not None:
        raise BadRecipe(
            f"format {FORMAT} holds weights on an INT4 grid, with their adapter merged",
            try_="a super-network made with keep='int4'",
        )
    state = packed_state(sub.model.state_dict(), sub.grids)
    folder = Path(folder).absolute()
    with whole_folder(folder) as partial:
        write_model(sub.model, tokenizer, partial, state)
        config = read_json(partial / "config.json")
        about = {"quantization_config": _settings(sub)}
        write_json(partial / "config.json", config | about)
        auto = auto_class(sub.model)
        worst = verify(partial, sub.model, auto)
        write_text(partial / "subnet.json", sub.config.to_json() + "\n")
        text = _card(sub, folder.name, auto.__name__, origin, worst)
        write_text(partial / "README.md", card(text, facts))
        files = sorted(p for p in partial.rglob("*") if p.is_file())
        names = tuple(p.relative_to(partial).as_posix() for p in files)
        n_bytes = sum(p.stat().st_size for p in files)
    n_params = sum(p.numel() for p in sub.model.parameters())
    loads = f"loads with {LOADS_WITH}"
    return Saved(folder, FORMAT, loads, worst, n_params, n_bytes, names)


def _card(sub: Subnetwork, title: str, auto: str, origin: str | None, worst: float) -> CardText:
    weights = [sub.model.get_parameter(f"{name}.weight") for name in sub.grids]
    zeros = sum(int(torch.count_nonzero(weight == 0)) for weight in weights)
    total = sum(weight.numel() for weight in weights)
    return CardText(
        title=title,
        about=f"{origin or type(sub.model).__name__}, its linear layers in INT4 with an adapter "
        f"merged on their own grid; {zeros:,} of {total:,} weights ({zeros / total:.1%}) are zero.",
        loads_with=LOADS_WITH,
        code=f'from transformers import {auto}\n\nmodel = {auto}.from_pretrained("{title}")',
        parts=[f"Largest difference of an output from the model that was saved: {worst:.1e}."],
        pipeline_tag=pipeline_tag(sub.model),
        tags=["compressed-tensors", "int4"],
    )


def packed_state(state: Mapping[str, Tensor], grids: Mapping[str, Int4Grid]) -> dict[str, Tensor]:
    """Return a state with the weights of all ``grids`` as packed codes."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    found = {name: tensor.contiguous() for name, tensor in state.items()}
    for name, grid in grids.items():
        weight, grid = found.pop(f"{name}.weight").cpu(), grid.to(torch.device("cpu"))
        codes = grid.codes(weight).to(torch.int8)
        found[f"{name}.weight_packed"] = pack_to_int32(codes, 4)
        found[f"{name}.weight_scale"] = grid.scale.contiguous()
        found[f"{name}.weight_zero_point"] = pack_to_int32(grid.zero_point, 4, packed_dim=0)
        found[f"{name}.weight_shape"] = torch.tensor(weight.shape)
    return found


def _settings(sub: Subnetwork) -> dict[str, Any]:
    """Return what config.json says of the weights."""
    import compressed_tensors
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
    )

    name, grid = next(iter(sub.grids.items()))
    width = int(sub.model.get_submodule(name).in_features)  # type: ignore[arg-type]
    weights = QuantizationArgs(
        num_bits=4,
        symmetric=False,
        strategy="group",
        group_size=width // grid.scale.shape[1],
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, format="pack-quantized")
    linears = (n for n, m in sub.model.named_modules() if isinstance(m, torch.nn.Linear))
    config = QuantizationConfig(
        config_groups={"group_0": scheme},
        ignore=[n for n in linears if n not in sub.grids],
        format="pack-quantized",
        quantization_status="compressed",
    )
    found: dict[str, Any] = config.model_dump(mode="json")
    return found | {
        "quant_method": "compressed-tensors",
        "version": compressed_tensors.__version__,
        # Of zero points that are packed, transformers can only unpack weights while it loads them.
        "dequantize": True,
    }
