"""A LoRA that was trained at one rank -> a super-network over its ranks. Nothing is trained.

Shears and its kin train adapters whose first ranks work by themselves. Of an adapter that was
trained otherwise any rank may matter; ordered by their singular values the first ranks are the best
there are. At its largest configuration the super-network computes what the adapter did.

Shapes: `I` in features, `O` out features, `k` ranks of a module.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from elastune.adapters.energies import SHARES, AdapterEnergies, ModuleEnergies, check_shares
from elastune.adapters.peft_folder import PeftLora, read_adapter
from elastune.adapters.svd import order_by_outputs, svd_factors
from elastune.elastic.lora import ElasticLoRALinear
from elastune.errors import InvalidSpace, UnsupportedModel
from elastune.importance.passes import Batches, Passes
from elastune.models.families import architecture
from elastune.name_patterns import NamePatterns
from elastune.space import ElasticDim, SearchSpace
from elastune.supernet import SuperNetwork

Ranks = Sequence[int] | Mapping[str, Sequence[int]]
"""Choices of ranks for all modules, or by patterns over dim names; see `lora_space`."""


def from_adapter(
    model: PreTrainedModel,
    folder: str | Path,
    *,
    shares: Sequence[float] = SHARES,
    ranks: Ranks | None = None,
    calibration: Batches | None = None,
) -> tuple[SuperNetwork, AdapterEnergies]:
    """Make a super-network of a model and a PEFT LoRA that was trained for it.

    Its dims are one a module, named ``layers.<block>.<role>`` (or as the module, outside of the
    blocks). The largest choice of each computes what was saved.

    Args:
        model: the base; changed in place, as `SuperNetwork` does. Modules that were trained whole
            get the adapter's weights.
        folder: as `PeftModel.save_pretrained` wrote it.
        shares: choices are the least ranks that keep these parts of a module's energy.
        ranks: choices instead of ``shares``; those above a module's own rank are left out, and its
            own rank is always one.
        calibration: token ids ``(N, L)`` or batches, which the ranks are then ordered by: the
            least error of the outputs on these instead of the least error of the weights.

    Returns:
        The super-network, and how much of the adapter each rank carries.

    Raises:
        BadArtifact: a file is missing or damaged, or the adapter is of another model.
        UnsupportedModel: an adapter of another kind, or one that adds nothing.
        InvalidSpace: a pattern of ``ranks`` that matches no module, or a negative rank.
        BadRecipe: a share outside 0..1.
    """
    check_shares(shares)
    lora = read_adapter(folder, model)
    ordered = order_ranks(model, lora, calibration)
    return elastic_adapter(model, lora, ordered, choices_of(ordered.energies, shares, ranks))


@dataclass(frozen=True)
class Ordered:
    """Factors in their order, and what each rank adds.

    Attributes:
        factors: module name -> A ``(k, I)``, B ``(O, k)``, such that ``scale B A`` is added.
        scale: one for all modules.
        energies: of the modules in ``factors``.
    """

    factors: dict[str, tuple[Tensor, Tensor]]
    scale: float
    energies: AdapterEnergies


def order_ranks(
    model: PreTrainedModel, lora: PeftLora, calibration: Batches | None = None
) -> Ordered:
    """Order the ranks of an adapter by weights, or by outputs on calibration inputs.

    Raises:
        UnsupportedModel: every product B A is zero.
    """
    scales = Counter(abs(scale) for _, _, scale in lora.factors.values() if scale)
    # One scale for all, as super-networks have it; where a module's own differs, the factors do.
    common = scales.most_common(1)[0][0] if scales else 1.0
    names = dim_names(model, list(lora.factors))
    factors, rows, empty = {}, [], []
    for name, (a, b, scale) in lora.factors.items():
        new_a, new_b, values = svd_factors(a, b.double() * (scale / common))
        if not len(values):
            empty.append(name)
            continue
        factors[name] = (new_a, new_b)
        own = tuple((common * values).tolist())
        rows.append(ModuleEnergies(names[name], name, a.shape[0], own, sum_features(a, b)))
    if not factors:
        raise UnsupportedModel(
            "the adapter adds nothing: B A is zero in every module", try_="train it first"
        )
    energies = AdapterEnergies(tuple(rows), tuple(empty), n_stored=lora.n_params)
    ordered = Ordered(factors, common, energies)
    return ordered if calibration is None else _by_outputs(model, lora, ordered, calibration)


def sum_features(a: Tensor, b: Tensor) -> int:
    """Return in and out features together."""
    return int(a.shape[1] + b.shape[0])


def dim_names(model: PreTrainedModel, modules: Sequence[str]) -> dict[str, str]:
    """Return module name -> ``layers.<block>.<role>``, or its own where it has no role."""
    try:
        record = architecture(model)
        blocks = list(record.block_names(model))
    except UnsupportedModel:
        return {name: name for name in modules}
    places = {
        f"{block}.{path}": f"layers.{index}.{role}"
        for index, block in enumerate(blocks)
        for role, path in record.roles.items()
    }
    return {name: places.get(name, name) for name in modules}


def choices_of(
    energies: AdapterEnergies, shares: Sequence[float] = SHARES, ranks: Ranks | None = None
) -> dict[str, tuple[int, ...]]:
    """Return dim -> its choices, the module's full rank first.

    Raises:
        InvalidSpace: a pattern that matches no dim, or a negative rank.
    """
    if ranks is None:
        wanted = {m.dim: [m.rank_for(share) for share in shares] for m in energies.modules}
    else:
        patterns = NamePatterns(ranks)
        wanted = {m.dim: list(patterns.choices_of(m.dim) or ()) for m in energies.modules}
        if patterns.unused:
            raise InvalidSpace(
                f"ranks: {', '.join(map(repr, patterns.unused))} matches no dim; dims are named "
                f"like {energies.modules[0].dim!r}"
            )
    for dim, found in wanted.items():
        if min(found, default=0) < 0:
            raise InvalidSpace(f"{dim}: ranks must be at least 0, got {found}")
    return {
        m.dim: tuple(sorted({m.rank, *(r for r in wanted[m.dim] if r < m.rank)}, reverse=True))
        for m in energies.modules
    }


def elastic_adapter(
    model: PreTrainedModel,
    lora: PeftLora,
    ordered: Ordered,
    choices: Mapping[str, Sequence[int]],
) -> tuple[SuperNetwork, AdapterEnergies]:
    """Put ordered factors into a super-network with these choices of ranks."""
    modules = ordered.energies.modules
    space = SearchSpace(
        [ElasticDim(m.dim, "rank", tuple(choices[m.dim]), (m.module,)) for m in modules]
    )
    largest = max(m.rank for m in modules)
    net = SuperNetwork(
        model,
        space,
        alpha=ordered.scale * largest,
        dropout=lora.dropout,
        trained=tuple(lora.whole),
    )
    with torch.no_grad():
        for name, (a, b) in ordered.factors.items():
            net.adapters[name].lora_A.copy_(a)
            net.adapters[name].lora_B.copy_(b)
        for name, state in lora.whole.items():
            model.get_submodule(name).load_state_dict(state, strict=False)
    return net, ordered.energies


# --- by outputs -----------------------------------------------------------------------------------


def _by_outputs(
    model: PreTrainedModel, lora: PeftLora, plain: Ordered, calibration: Batches
) -> Ordered:
    """Order ranks by outputs, on inputs as the whole adapted model has them."""
    largest = {m.dim: (m.rank,) for m in plain.energies.modules}
    net, _ = elastic_adapter(model, lora, plain, largest)
    try:
        grams = _second_moments(net, calibration)
    finally:
        net.unwrap()
    factors, rows = {}, []
    for m in plain.energies.modules:
        a, b, values = order_by_outputs(*plain.factors[m.module], grams[m.module])
        factors[m.module] = (a, b)
        rows.append(replace(m, values=tuple((plain.scale * values).tolist())))
    energies = replace(plain.energies, modules=tuple(rows), by_outputs=True)
    return Ordered(factors, plain.scale, energies)


@torch.no_grad()
def _second_moments(net: SuperNetwork, calibration: Batches) -> dict[str, Tensor]:
    """Return ``E[(A x)(A x)^T]``, ``(k, k)``, of each module's inputs x."""
    model = net.model
    inner = set(map(id, model.base_model.modules()))
    is_whole = all(id(adapter) in inner for adapter in net.adapters.values())
    batches: Batches = calibration
    if isinstance(calibration, Tensor) and not is_whole:
        # Token ids alone are run without the head, and a head's adapter would see nothing.
        batches = [{"input_ids": row[None]} for row in calibration]
    passes = Passes(model, batches, None, 4096, None)
    sums = {
        n: a.lora_A.new_zeros(2 * (a.max_rank,), dtype=torch.float64)
        for n, a in net.adapters.items()
    }
    counts = Counter[str]()

    def add(name: str, adapter: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(adapter, ElasticLoRALinear)
        x = passes.counted(inputs[0].reshape(-1, inputs[0].shape[-1]))
        low = x.to(adapter.lora_A.dtype) @ adapter.lora_A.T
        sums[name] += (low.T @ low).double()
        counts[name] += len(low)

    with ExitStack() as stack:
        for name, adapter in net.adapters.items():
            handle = adapter.register_forward_pre_hook(partial(add, name))
            stack.callback(handle.remove)
        for batch in passes:
            passes.forward(batch)
    unseen = [name for name in net.adapters if not counts[name]]
    if unseen:
        raise UnsupportedModel(
            f"the calibration inputs never reach {unseen[0]}, which has an adapter",
            try_="leave calibration out: ranks are then ordered by weights",
        )
    return {name: (total / counts[name]).cpu() for name, total in sums.items()}
