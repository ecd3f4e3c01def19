"""A super-network and a configuration -> a stock PEFT adapter.

The active rows of A and columns of B are written as they are, with the rank of each module in
``rank_pattern`` and its alpha in ``alpha_pattern``, so that plain `peft` computes the same
function. Modules of rank 0 are left out of ``target_modules``.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from peft import LoraConfig, TaskType
from safetensors.torch import save_file
from torch import Tensor

from elastune.errors import InvalidSubnet
from elastune.files import whole_folder, write_text
from elastune.linears import is_transposed
from elastune.space import SubnetConfig
from elastune.supernet import SuperNetwork


@dataclass(frozen=True)
class PeftAdapter:
    """An extracted sub-adapter.

    Attributes:
        config: the configuration it was cut for.
        weights: module name -> (A ``(r, I)``, B ``(O, r)``, what multiplies B A).
        task_type: of the model it belongs to; None unless it is a causal language model.
        head: module name -> its trained weights; empty unless the head was trained, too.
        transposed: the modules keep their weights as ``(I, O)`` (`Conv1D` of GPT-2).
    """

    config: SubnetConfig
    weights: dict[str, tuple[Tensor, Tensor, float]]
    task_type: TaskType | None
    head: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    transposed: bool = False

    def save(self, folder: Path, *, base: str | None = None) -> None:
        """Write ``adapter_config.json``, ``adapter_model.safetensors`` and ``subnet.json``.

        Args:
            folder: replaced whole.
            base: where the base model is loaded from, noted in the adapter's config.
        """
        ranks = Counter(a.shape[0] for a, _, _ in self.weights.values())
        rank = ranks.most_common(1)[0][0]
        alphas = {name: scale * a.shape[0] for name, (a, _, scale) in self.weights.items()}
        alpha = Counter(
            alphas[name] for name, (a, _, _) in self.weights.items() if a.shape[0] == rank
        ).most_common(1)[0][0]
        lora = LoraConfig(
            r=rank,
            lora_alpha=alpha,  # type: ignore[arg-type]
            rank_pattern={
                re.escape(name): a.shape[0]
                for name, (a, _, _) in self.weights.items()
                if a.shape[0] != rank
            },
            alpha_pattern={
                re.escape(name): value  # type: ignore[misc]
                for name, value in alphas.items()
                if value != alpha
            },
            modules_to_save=sorted(self.head) or None,
            base_model_name_or_path=base,
            task_type=self.task_type,
            fan_in_fan_out=self.transposed,
            inference_mode=True,
        )
        lora.target_modules = sorted(self.weights)  # PEFT makes a set of an argument, in any order
        tensors = {}
        for name, (a, b, _) in self.weights.items():
            tensors[f"base_model.model.{name}.lora_A.weight"] = a.contiguous().cpu()
            tensors[f"base_model.model.{name}.lora_B.weight"] = b.contiguous().cpu()
        for name, state in self.head.items():
            for part, tensor in state.items():
                tensors[f"base_model.model.{name}.{part}"] = tensor.contiguous().cpu()
        with whole_folder(folder) as partial:
            lora.save_pretrained(str(partial))
            save_file(tensors, partial / "adapter_model.safetensors", {"format": "pt"})
            write_text(partial / "subnet.json", self.config.to_json() + "\n")


def extract(net: SuperNetwork, config: SubnetConfig) -> PeftAdapter:
    """Cut the sub-adapter of ``config`` out of a super-network whose structure is not elastic.

    Raises:
        InvalidSubnet: not in the space, all ranks are 0 (the base alone is that sub-network), or
            the base is elastic itself.
    """
    if net.has_elastic_base:
        raise InvalidSubnet(
            "the base of this super-network is elastic, too: an adapter alone is no sub-network",
            try_="extract_model(net, config)",
        )
    return sub_adapter(net, config)


def refuse_unmerged(net: SuperNetwork) -> None:
    """Raise InvalidSubnet if a super-network's adapters mean nothing beside its weights."""
    if net.keep != "nothing":
        raise InvalidSubnet(
            f"adapters that keep {net.keep} are no sums: they cannot stand beside their base",
            try_="extract_model(net, config), which merges them and keeps what they keep",
        )


def sub_adapter(net: SuperNetwork, config: SubnetConfig) -> PeftAdapter:
    """Cut the sub-adapter of ``config``, for the base as it is cut by ``config``.

    Raises:
        InvalidSubnet: not in the space, nothing is left of the adapter, or it is no sum.
    """
    refuse_unmerged(net)
    with net.active(config):
        weights = {
            name: adapter.extract() for name, adapter in net.adapters.items() if not adapter.is_off
        }
    if not weights:
        raise InvalidSubnet(
            "every rank of this sub-network is 0, so there is no adapter to extract",
            try_="use the base model as it is",
        )
    # A named task makes PEFT look for a head by names of its own list; ours is named in full, and
    # may be the base model's own. Only language models name their task.
    name = type(net.model).__name__
    is_causal = name.endswith(("CausalLM", "LMHeadModel"))
    task_type = TaskType.CAUSAL_LM if is_causal else None
    head = {name: net.model.get_submodule(name).state_dict() for name in net.trained}
    transposed = all(is_transposed(net.adapters[name].base) for name in weights)
    return PeftAdapter(config, weights, task_type, head, transposed)
