"""The law, for structure: activated == extracted == extracted with its adapter beside it.

For every family and the layouts it comes in, every kind of dim, and every head that transformers
has for it. ``python tests/test_structure_law.py`` prints how many cases there are and the largest
difference.
"""

from __future__ import annotations

import tempfile
import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from peft import PeftModel
from tiny_models import (
    VARIANTS,
    fill_adapters,
    heads_of,
    inputs_of,
    outputs_of,
    stir,
    tiny_variant,
)
from torch import Tensor

from elastune.build_space import lora_space
from elastune.build_structure import structure_space
from elastune.models.blocks import blocks
from elastune.models.families import known_model_types
from elastune.space import SearchSpace, SubnetConfig
from elastune.subnetwork import extract_model
from elastune.supernet import SuperNetwork

# PEFT still asks for a property that transformers renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

NAMES = (*known_model_types(), *VARIANTS)
KINDS = ("rank", "heads", "ffn", "depth", "all")
TARGETS = ("q", "k", "v", "o", "up", "gate", "down")
TOLERANCE = 1e-5

#: Model types whose word embedding is elastic, too: those with one that no output head shares.
FACTORISED = ("llama", "gpt_neox", "bert", "roberta", "electra", "deberta-v2", "distilbert")

#: Fields for the number of blocks, where they have another name.
LAYERS = {"mpt": "n_layers", "distilbert": "n_layers"}


class LawCase(NamedTuple):
    """One model, one head, and the kind of dim that is not at its largest."""

    name: str
    """A model type, or one of `VARIANTS`."""
    head: str
    kind: str


def law_cases() -> list[LawCase]:
    """Return all cases."""
    return [
        LawCase(*pair, kind)
        for pair in law_models()
        for kind in (*KINDS, *(("embedding",) if pair[0] in FACTORISED else ()))
    ]


def law_models() -> list[tuple[str, str]]:
    """Return the model and head of all cases, once each."""
    return [(name, head) for name in NAMES for head in _heads(name)]


def is_slow(name: str, head: str, kind: str = "all") -> bool:
    """Tell whether a case is left to the long run: heads beside a model's main one, mostly."""
    main = "causal-lm" if "causal-lm" in _heads(name) else "base"
    return head != main and (kind != "all" or name in VARIANTS)


def _heads(name: str) -> list[str]:
    return heads_of(VARIANTS.get(name, (name,))[0])


def law_model(name: str, head: str) -> Any:
    """Build a model of three blocks, tame enough that rounding errors stay small."""
    model = stir(tiny_variant(name, head, **{LAYERS.get(name, "num_hidden_layers"): 3}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(0.6)
    return model


def law_net(name: str, head: str) -> SuperNetwork:
    """Build a super-network of three blocks of which all is elastic that can be."""
    model = law_model(name, head)
    first = blocks(model)[0]
    space = lora_space(model, [4, 2, 0], targets=TARGETS) + structure_space(
        model,
        heads=[4, 0] if first.fixed_heads else [4, 2, 0],
        ffn=[1.0, 0.5, 0.25, 0],
        depth="all",
        embedding=[1.0, 0.5, 0.25] if name in FACTORISED else None,
        round_to=4,
    )
    net = SuperNetwork(model, space, alpha=16)
    fill_adapters(net)
    return net


def law_configs(space: SearchSpace, kind: str) -> list[SubnetConfig]:
    """Return two sub-networks that are cut in one kind of dim; in the first, block 0 the most.

    The last block is always there.
    """
    rng = np.random.default_rng(0)
    found = []
    for is_first in (True, False):
        config = dict(space.largest())
        dims = [dim for dim in space.dims if kind in (dim.kind, "all")]
        for dim in dims:
            if dim.kind != "depth" or not dim.name.startswith("layers.2."):
                config[dim.name] = int(rng.choice(dim.choices))
            if is_first and dim.name.startswith(("layers.0.", "embeddings.")):
                config[dim.name] = dim.choices[-1]
        found.append(SubnetConfig(config))
    return found


@lru_cache(maxsize=1)
def _net(name: str, head: str) -> SuperNetwork:
    return law_net(name, head)


def _difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max())


def check(case: LawCase) -> float:
    """Return the largest difference between outputs that should be equal."""
    net = _net(case.name, case.head)
    inputs = inputs_of(net.model)
    net.activate(net.space.largest())
    whole = outputs_of(net, inputs)
    differences = [0.0]
    for config in law_configs(net.space, case.kind):
        if config == net.space.largest():
            continue  # nothing of this kind can be cut
        net.activate(config)
        activated = outputs_of(net, inputs)
        assert _difference(activated, whole) > 1e-3, "the cut changes nothing"
        merged = extract_model(net, config).model
        differences += [
            _difference(outputs_of(merged, inputs), activated),
            _difference(outputs_of(_with_peft(net, config), inputs), activated),
        ]
        if case.head == "causal-lm":
            tokens = _generated(net.model, inputs, use_cache=False)
            differences += [
                _difference(_generated(net.model, inputs, use_cache=True), tokens),
                _difference(_generated(merged, inputs, use_cache=True), tokens),
            ]
    return max(differences)


def _with_peft(net: SuperNetwork, config: SubnetConfig) -> Any:
    """Return the unmerged sub-network, its adapter read and run by stock PEFT."""
    sub = extract_model(net, config, merge=False)
    if sub.adapter is None:
        return sub.model
    with tempfile.TemporaryDirectory() as folder:
        sub.adapter.save(Path(folder) / "adapter")
        return PeftModel.from_pretrained(sub.model, Path(folder) / "adapter").eval()


def _generated(model: Any, inputs: dict[str, Tensor], *, use_cache: bool) -> Tensor:
    """Return the logits of four tokens that follow."""
    out = model.generate(
        **inputs,
        attention_mask=torch.ones_like(inputs["input_ids"]),
        max_new_tokens=4,
        min_new_tokens=4,
        do_sample=False,
        use_cache=use_cache,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return torch.stack(out.logits)


def _marked(*args: Any, slow: bool) -> Any:
    return pytest.param(*args, marks=[pytest.mark.slow] if slow else [])


@pytest.mark.parametrize(
    "case", [_marked(case, slow=is_slow(*case)) for case in law_cases()], ids="-".join
)
def test_activated_extracted_and_peft_outputs_are_equal(case: LawCase) -> None:
    assert check(case) <= TOLERANCE


@pytest.mark.parametrize(
    ("name", "head"), [_marked(*pair, slow=is_slow(*pair)) for pair in law_models()]
)
def test_the_largest_is_the_original_and_unwrap_gives_it_back(name: str, head: str) -> None:
    original = law_model(name, head)
    inputs = inputs_of(original)
    expected = outputs_of(original, inputs)
    classes = {module_name: type(m) for module_name, m in original.named_modules()}

    net = law_net(name, head)
    with torch.no_grad():
        for adapter in net.adapters.values():
            adapter.lora_B.zero_()
    net.activate(net.space.smallest())
    net.activate(net.space.largest())
    torch.testing.assert_close(outputs_of(net, inputs), expected, atol=1e-6, rtol=0)

    net.activate(net.space.smallest())
    model = net.unwrap()
    assert torch.equal(outputs_of(model, inputs), expected)
    assert {module_name: type(m) for module_name, m in model.named_modules()} == classes


DECODERS = [n for n, head in law_models() if head == "causal-lm"]


@pytest.mark.parametrize("name", DECODERS)
def test_a_later_token_changes_no_earlier_logits(name: str) -> None:
    net = _net(name, "causal-lm")
    before = inputs_of(net.model)
    after = {"input_ids": before["input_ids"].clone()}
    after["input_ids"][:, 6] = 3 + (after["input_ids"][:, 6] + 7) % 50
    for config in law_configs(net.space, "all"):
        net.activate(config)
        one, other = outputs_of(net, before), outputs_of(net, after)
        torch.testing.assert_close(one[:, :6], other[:, :6], atol=1e-6, rtol=0)
        assert _difference(one[:, 6:], other[:, 6:]) > 1e-3


def main() -> None:
    """Print how many cases there are, and the largest difference of all."""
    warnings.simplefilter("ignore")
    found = {case: check(case) for case in law_cases()}
    worst = max(found, key=lambda case: found[case])
    models = {(case.name, case.head) for case in found}
    print(  # noqa: T201
        f"{len(found)} cases ({len({case.name for case in found})} layouts of "
        f"{len(known_model_types())} families, {len(models)} with their heads), "
        f"largest difference {found[worst]:.1e} ({'-'.join(worst)})"
    )


if __name__ == "__main__":
    main()
