"""Read a LoRA as PEFT saves it: factors and scale of each module, and modules trained whole.

What computes something else than ``W x + s B A x`` is refused, and so is every setting that is not
known: a newer PEFT may mean anything by it.

Shapes: `I` in features, `O` out features, `r` rank of a module.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from elastune.errors import BadArtifact, UnsupportedModel, nearest
from elastune.files import holding
from elastune.json_text import parse_json
from elastune.linears import in_features, is_linear, out_features

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

_PREFIX = "base_model.model."
_A, _B = ".lora_A.weight", ".lora_B.weight"

#: Settings that are read below, and those that say nothing about what the adapter computes.
_READ = {"peft_type", "bias", "init_lora_weights", "r", "lora_alpha", "rank_pattern"}
_READ |= {"alpha_pattern", "use_rslora", "lora_dropout", "target_modules", "modules_to_save"}
_READ |= {"base_model_name_or_path", "task_type"}
_SILENT = {"auto_mapping", "peft_version", "revision", "inference_mode", "exclude_modules"}
_SILENT |= {"layers_to_transform", "layers_pattern", "fan_in_fan_out", "megatron_core"}
_SILENT |= {"qalora_group_size", "runtime_config", "eva_config", "velora_config"}

_REFUSED: Mapping[str, tuple[str, str]] = {
    "use_dora": ("DoRA, whose magnitudes scale the whole weight", "merge it with PEFT"),
    "loftq_config": ("LoftQ, which belongs to a base of changed weights", "merge it with PEFT"),
    "lora_bias": ("biases in its factors", "merge it with PEFT"),
    "use_qalora": ("QA-LoRA, which pools the inputs of A", "merge it with PEFT"),
    "layer_replication": ("layers that are used twice", "merge it with PEFT"),
    "trainable_token_indices": ("trained token embeddings", "merge it with PEFT"),
    "target_parameters": ("parameters that belong to no linear layer", "merge it with PEFT"),
    "alora_invocation_tokens": ("aLoRA, which begins at a token", "use it as it is"),
}
_WITH_PATTERNS = ("rank_pattern", "alpha_pattern")
_REPEATED_GROUP = re.compile(r"(?<!\\)\)[*+{]")
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class PeftLora:
    """An adapter as it was saved.

    Attributes:
        factors: module name -> (A ``(r, I)``, B ``(O, r)``, what multiplies B A).
        whole: name of a module trained whole -> its weights.
        dropout: on the adapter's inputs in training.
        base: what its config calls the model it was trained on.
    """

    factors: dict[str, tuple[Tensor, Tensor, float]]
    whole: dict[str, dict[str, Tensor]]
    dropout: float = 0.0
    base: str | None = None

    @property
    def n_params(self) -> int:
        """Weights of all factors."""
        return sum(a.numel() + b.numel() for a, b, _ in self.factors.values())


def read_config(folder: str | Path) -> dict[str, Any]:
    """Return an adapter's config, if it is of a LoRA that can be made elastic.

    Raises:
        BadArtifact: no PEFT adapter, or a config that cannot be read.
        UnsupportedModel: an adapter of another kind, or one that does more than add s B A.
    """
    file = Path(folder) / CONFIG
    try:
        config = parse_json(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadArtifact(
            f"{str(folder)!r} has no {CONFIG}, so it is no PEFT adapter",
            try_="the folder that PeftModel.save_pretrained wrote",
        ) from None
    except (OSError, ValueError) as error:
        raise BadArtifact(f"{file} cannot be read: {error}", try_="copy it again") from error
    if not isinstance(config, dict):
        raise BadArtifact(
            f"{file} holds a {type(config).__name__}, not an object",
            try_="save the adapter again with PEFT's save_pretrained",
        )
    with holding(file, try_="copy it again"):
        _refuse_other_kinds(config)
        _refuse_slow_patterns(config)
    return config


def _refuse_slow_patterns(config: Mapping[str, Any]) -> None:
    """Refuse regular expressions that are wrong, or could take for ever on a module's name."""
    patterns = [name for key in _WITH_PATTERNS for name in config.get(key) or ()]
    targets = config.get("target_modules")
    patterns += [targets] if isinstance(targets, str) else []
    excluded = config.get("exclude_modules")
    patterns += [excluded] if isinstance(excluded, str) else []
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{pattern[:80]!r} is no regular expression: {error}") from error
        if _REPEATED_GROUP.search(pattern):
            raise ValueError(f"{pattern[:80]!r} repeats a group, which can take for ever")


def _refuse_other_kinds(config: Mapping[str, Any]) -> None:
    kind = str(config.get("peft_type"))
    if kind != "LORA":
        raise UnsupportedModel(
            f"the adapter is of kind {kind}; only LORA has ranks that can be cut",
            try_="merge it into the model with PEFT",
        )
    for name, (what, way_out) in _REFUSED.items():
        if config.get(name):
            raise UnsupportedModel(
                f"the adapter has {what} ({name}); that is not supported", try_=way_out
            )
    if config.get("bias", "none") != "none":
        raise UnsupportedModel(
            f"the adapter trained biases of the base (bias={config['bias']!r}); only 'none' is "
            "supported",
            try_="merge it with PEFT",
        )
    start = config.get("init_lora_weights", True)
    if start not in _PLAIN_STARTS:
        raise UnsupportedModel(
            f"the adapter belongs to a base whose weights its start changed "
            f"(init_lora_weights={start!r})",
            try_="save it again as a plain LoRA: "
            "save_pretrained(path_initial_model_for_weight_conversion=...)",
        )
    known = _READ | _SILENT | _REFUSED.keys()
    if config.get("megatron_config"):
        raise UnsupportedModel(
            "the adapter is for Megatron, a module that its config names", try_="merge it with PEFT"
        )
    for name, value in config.items():
        is_default = not value or (name.endswith("_config") and not any(_values(value)))
        if name not in known and not is_default:
            raise UnsupportedModel(
                f"the adapter's config sets {name} to {str(value)[:60]!r}, which is not supported",
                try_="merge it with PEFT",
            )


def _values(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, Mapping) else [value]


def read_adapter(folder: str | Path, model: PreTrainedModel) -> PeftLora:
    """Read an adapter for a model.

    Args:
        folder: with ``adapter_config.json`` and ``adapter_model.safetensors``.
        model: the base it was trained on; not changed.

    Raises:
        BadArtifact: a file is missing or damaged, or the adapter is of another model.
        UnsupportedModel: an adapter of another kind, or one that does more than add s B A.
    """
    config = read_config(folder)
    tensors = _tensors(Path(folder))
    pairs, rest = _paired(tensors)
    factors = {}
    modules = dict(model.named_modules())
    with holding(Path(folder) / CONFIG, try_="copy it again"):
        for name, (a, b) in pairs.items():
            _check_module(type(model).__name__, modules, name, a, b)
            factors[name] = (a, b, _scale(config, name, a.shape[0]))
        _check_targets(config, model, factors)
        whole = _whole_modules(config, model, rest)
        dropout = float(config.get("lora_dropout") or 0.0)
    return PeftLora(factors, whole, dropout, config.get("base_model_name_or_path") or None)


def _tensors(folder: Path) -> dict[str, Tensor]:
    """Return the saved tensors by their names in the model."""
    file = folder / WEIGHTS
    if not file.is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        raise BadArtifact(
            f"{str(folder)!r} has no {WEIGHTS}"
            + ("; pickled weights (adapter_model.bin) are not loaded" if pickled else ""),
            try_="load it with PEFT and save_pretrained it again",
        )
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError) as error:
        raise BadArtifact(f"{file} is damaged: {error}", try_="copy it again") from error
    return {name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items()}


def _paired(
    tensors: Mapping[str, Tensor],
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor]]:
    """Return A and B by module, and the other tensors."""
    names = [name.removesuffix(_A) for name in tensors if name.endswith(_A)]
    alone = {n.removesuffix(_B) for n in tensors if n.endswith(_B)} ^ set(names)
    if alone:
        raise BadArtifact(
            f"the adapter has only one of lora_A and lora_B of {', '.join(sorted(alone)[:3])}",
            try_="copy it again",
        )
    if not names:
        raise BadArtifact(
            "the adapter holds no lora_A and lora_B of any module",
            try_="a folder that PEFT's save_pretrained wrote for a LoRA",
        )
    rest = {n: t for n, t in tensors.items() if not n.endswith((_A, _B))}
    strange = [n for n in rest if ".lora_" in n]
    if strange:
        raise UnsupportedModel(
            f"the adapter holds {strange[0]}, which is not supported: LoRA of linear layers is",
            try_="merge it with PEFT",
        )
    return {name: (tensors[name + _A], tensors[name + _B]) for name in names}, rest


def _check_module(
    owner: str, modules: Mapping[str, nn.Module], name: str, a: Tensor, b: Tensor
) -> None:
    module = modules.get(name)
    if module is None:
        raise BadArtifact(
            f"the adapter has weights for {name}, which a {owner} lacks{nearest(name, modules)}",
            try_="the model it was trained on, with the same head",
        )
    if not is_linear(module):
        raise UnsupportedModel(
            f"the adapter changes {name}, a {type(module).__name__}; only linear layers can be "
            "adapted here",
            try_="merge it with PEFT",
        )
    wanted = in_features(module), out_features(module)
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
        raise BadArtifact(
            f"{name}: A {tuple(a.shape)} and B {tuple(b.shape)} do not fit together",
            try_="save the adapter again, or take an earlier checkpoint of it",
        )
    if (a.shape[1], b.shape[0]) != wanted:
        raise BadArtifact(
            f"{name}: the adapter is for {a.shape[1]} in and {b.shape[0]} out features, the model "
            f"has {wanted[0]} and {wanted[1]}",
            try_="the model it was trained on",
        )
    if not (a.isfinite().all() and b.isfinite().all()):
        raise BadArtifact(
            f"{name}: the adapter's weights are not all finite",
            try_="an earlier checkpoint of the adapter: its training diverged",
        )


def _scale(config: Mapping[str, Any], name: str, rank: int) -> float:
    """Return what PEFT multiplies B A with; its patterns are regular expressions."""
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    said = ranks.get(get_pattern_key(list(ranks), name), config.get("r", 8))
    if said != rank:
        raise BadArtifact(
            f"{name}: the config says rank {said}, the weights have {rank}",
            try_="the config that was saved with these weights",
        )
    alpha = alphas.get(get_pattern_key(list(alphas), name), config.get("lora_alpha", 8))
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _check_targets(config: Mapping[str, Any], model: PreTrainedModel, found: Iterable[str]) -> None:
    """Refuse a file that lacks modules which the config names: PEFT would fill them at random."""
    targets = config.get("target_modules")
    if not targets or targets == "all-linear":
        return
    names = ("exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")
    rules = LoraConfig(target_modules=targets)
    for name in names:
        setattr(rules, name, config.get(name))
    there = set(found)
    lost = [
        name
        for name, module in model.named_modules()
        if name not in there and is_linear(module) and check_target_module_exists(rules, name)
    ]
    if lost:
        raise BadArtifact(
            f"the adapter's config names {len(lost)} modules that its weights lack, such as "
            f"{lost[0]}",
            try_="copy it again, or the model it was trained on",
        )


def _whole_modules(
    config: Mapping[str, Any], model: PreTrainedModel, rest: Mapping[str, Tensor]
) -> dict[str, dict[str, Tensor]]:
    """Return the weights of modules that were trained whole, checked to fit the model."""
    # PEFT trains new heads without always saying so in the config.
    wanted = [*(config.get("modules_to_save") or ()), "classifier", "score", "qa_outputs"]
    homes = [
        n for n, _ in model.named_modules() if any(n == w or n.endswith(f".{w}") for w in wanted)
    ]
    own = model.state_dict()
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in rest.items():
        if name not in own:
            raise BadArtifact(
                f"the adapter has weights for {name}, which a {type(model).__name__} lacks"
                f"{nearest(name, own)}",
                try_="the model it was trained on, with the same head",
            )
        if own[name].shape != tensor.shape:
            raise BadArtifact(
                f"{name}: the adapter has {tuple(tensor.shape)}, "
                f"the model {tuple(own[name].shape)}",
                try_="the model it was trained on; num_labels for a head, "
                "resize_token_embeddings for a new vocabulary",
            )
        home = next((h for h in homes if name.startswith(f"{h}.")), None)
        if home is not None:
            found.setdefault(home, {})[name.removeprefix(f"{home}.")] = tensor
        elif not tensor.to(own[name].dtype).equal(own[name].cpu()):
            raise UnsupportedModel(
                f"the adapter changes {name}, which its config does not name in modules_to_save",
                try_="merge it with PEFT",
            )
    _check_all_there(model, config.get("modules_to_save") or (), found)
    _refuse_tied(model, found)
    return found


def _check_all_there(
    model: PreTrainedModel, named: Iterable[str], found: Mapping[str, Mapping[str, Tensor]]
) -> None:
    """Refuse modules that were trained whole and that the file has not all weights of."""
    modules = dict(model.named_modules())
    wanted = {n for n in modules for w in named if n == w or n.endswith(f".{w}")} | set(found)
    for name in sorted(wanted):
        if any(name.startswith(f"{home}.") for home in found):
            continue  # inside of one that is there
        lost = modules[name].state_dict().keys() - found.get(name, {}).keys()
        if lost:
            raise BadArtifact(
                f"the adapter trained {name} whole, but lacks its {min(lost)}", try_="copy it again"
            )


def _refuse_tied(model: PreTrainedModel, names: Iterable[str]) -> None:
    """Refuse to train one of two tied modules: PEFT unties them, which elastic models cannot."""
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for module in names:
        for name, parameter in model.get_submodule(module).named_parameters(prefix=module):
            others = [other for other in owners[id(parameter)] if other != name]
            if others:
                raise UnsupportedModel(
                    f"the adapter trained {name} whole, which the model shares with {others[0]}",
                    try_="untie them in the base (tie_word_embeddings=False) and save it",
                )
