"""Cut the ranks of a trained LoRA to a size, in one call; no training, no search."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from rich.table import Table
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from elastune.adapters.energies import AdapterEnergies
from elastune.adapters.from_adapter import elastic_adapter, order_ranks
from elastune.adapters.peft_folder import CONFIG, WEIGHTS, read_adapter, read_config
from elastune.data import calibration_rows
from elastune.errors import BadRecipe, ElastuneError, UnsupportedModel
from elastune.export.card import adapter_card
from elastune.export.source import check_adapter
from elastune.export.verify import example_inputs
from elastune.extract import PeftAdapter, extract
from elastune.files import whole_folder, write_text
from elastune.models import load_model
from elastune.search.limits import parse_limits, resolve
from elastune.space import SubnetConfig
from elastune.version import __version__

_SHARE = 1e-5
_TOLERANCE = 1e-4
_HEADS = {"classifier": "sequence-classification", "score": "sequence-classification"}
_HEADS |= {"qa_outputs": "question-answering"}
_OUTPUTS = ("logits", "start_logits", "end_logits", "last_hidden_state")


@dataclass(frozen=True)
class CutAdapter:
    """An adapter cut to fewer ranks, and saved.

    Attributes:
        folder: where; it loads with stock PEFT.
        config: dim -> rank.
        energies: of the adapter that it was cut from.
        kept: the part of the energy that is left, 0..1.
        n_params: weights of its factors.
        n_before: those of the adapter as it came.
        n_bytes: of all files.
        files: their names.
        largest_difference: of an output, between stock PEFT with what was written and the
            super-network at ``config``.
    """

    folder: Path
    config: SubnetConfig
    energies: AdapterEnergies
    kept: float
    n_params: int
    n_before: int
    n_bytes: int
    files: tuple[str, ...]
    largest_difference: float

    def table(self, *, whole: bool = False) -> Table:
        """Make a terminal table of the ranks that keep parts of the energy, and those chosen."""
        table = self.energies.table(whole=whole, chosen=self.config)
        table.caption = (
            f"{self.n_params:,} of {self.n_before:,} weights keep {100 * self.kept:.1f} % of the "
            "energy"
        )
        return table


def cut_adapter(
    folder: str | Path,
    out: str | Path,
    *,
    model: str | Path | PreTrainedModel | None = None,
    energy: float | None = None,
    rank: int | None = None,
    target: str | None = None,
    calibration: Sequence[str] | Tensor | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> CutAdapter:
    """Cut a LoRA to fewer ranks and save it as a stock PEFT adapter; PEFT itself proves it.

    Args:
        folder: the adapter, as `PeftModel.save_pretrained` wrote it.
        out: replaced whole.
        model: the base it was trained on, or its name; None takes what the adapter's config says.
            A model given is as it was afterwards, but for modules that the adapter trained whole.
        energy: every module keeps at least this part of its energy, 0..1.
        rank: every module keeps at most this rank.
        target: a limit on the adapter's weights, such as ``"params<=0.5x"`` of what it has (also
            ``%``) or ``"params<=1M"``: the ranks that keep the most energy within it. Without
            ``energy``, ``rank`` and ``target``, what is lossless is cut: ranks of energy zero.
        calibration: texts or token ids ``(N, L)``; energies are of outputs on these, then, and not
            of weights.
        tokenizer: for texts; None takes the model's.

    Raises:
        BadRecipe: more than one of ``energy``, ``rank`` and ``target``, or one that cannot be kept.
        BadArtifact: files that are missing or damaged, or of another model.
        UnsupportedModel: an adapter that is no plain LoRA.
        ElastuneError: stock PEFT computes something else with what was written.
    """
    if sum(given is not None for given in (energy, rank, target)) > 1:
        raise BadRecipe("energy, rank and target each choose the ranks: give one of them")
    out = _replaceable(Path(out).absolute())
    loaded, source, tokenizer = _base(folder, model, tokenizer)
    rows = _token_rows(calibration, tokenizer)
    lora = read_adapter(folder, loaded)
    ordered = order_ranks(loaded, lora, rows)
    energies = ordered.energies
    ranks = _ranks(energies, energy, rank, target)
    choices = {m.dim: sorted({m.rank, ranks[m.dim]}, reverse=True) for m in energies.modules}
    net, _ = elastic_adapter(loaded, lora, ordered, choices)
    chosen = SubnetConfig(ranks)
    net.eval()
    with whole_folder(out) as partial:
        try:
            with net.active(chosen):
                expected = _outputs(net.model)
            adapter = extract(net, chosen)
            adapter.save(partial, base=str(source) if source else None)
        finally:
            net.unwrap()
        worst = _compare(loaded, expected, partial)
        write_text(partial / "README.md", _card(out, adapter, loaded, (energies, ranks), source))
        files = sorted(p for p in partial.rglob("*") if p.is_file())
        names = tuple(p.relative_to(partial).as_posix() for p in files)
        n_bytes = sum(p.stat().st_size for p in files)
    return CutAdapter(
        out,
        chosen,
        energies,
        energies.kept(ranks),
        energies.n_params(ranks),
        energies.n_stored,
        n_bytes,
        names,
        worst,
    )


def _replaceable(out: Path) -> Path:
    """Return the folder, which must hold an adapter or nothing."""
    if out.is_dir() and any(out.iterdir()) and not (out / CONFIG).is_file():
        raise BadRecipe(
            f"{out} is there already and is no adapter, so it is not replaced",
            try_="another --out",
        )
    return out


def _base(
    folder: str | Path,
    model: str | Path | PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase | None,
) -> tuple[PreTrainedModel, Any, PreTrainedTokenizerBase | None]:
    """Return the model an adapter is of, what it is called, and the tokenizer."""
    config = read_config(folder)
    said = config.get("base_model_name_or_path")
    if isinstance(model, PreTrainedModel):
        return model, said or model.config.name_or_path, tokenizer
    source = model or said
    loaded, own = _load(folder, config, source)
    return loaded, source, tokenizer or own


def _ranks(
    energies: AdapterEnergies, energy: float | None, rank: int | None, target: str | None
) -> dict[str, int]:
    """Return dim -> the rank that is asked for."""
    if energy is not None:
        return energies.for_energy(energy)
    if rank is not None:
        return energies.at_most(rank)
    if target is None:
        return energies.largest()
    limits = parse_limits(target)
    wrong = [str(limit) for limit in limits if limit.name != "params" or limit.sign != "<="]
    if wrong:
        raise BadRecipe(
            f"an adapter's target is on its params, which may be at most so many; got {wrong[0]}",
            try_='"params<=0.5x", half of the weights it has',
        )
    bounds = resolve(limits, {"dense": {"params": float(energies.n_stored)}})
    return energies.within(bounds["params"][1])


def _load(
    folder: str | Path, config: dict[str, Any], source: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the base with the head that the adapter was trained with."""
    if not source or not isinstance(source, str | Path):
        raise BadRecipe(
            "the adapter's config does not say which model it was trained on", try_="give the model"
        )
    task = config.get("task_type")
    check_adapter(Path(folder))
    with safe_open(Path(folder) / WEIGHTS, framework="pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    for part, head in _HEADS.items():
        weights = [s for n, s in shapes.items() if f".{part}." in n and ".lora_" not in n]
        if weights:
            # The last layer of a head has a row for each class.
            n_labels = next(iter(weights[-1]), 0) if head == "sequence-classification" else None
            return load_model(source, head=head, num_labels=n_labels)  # type: ignore[arg-type]
    if task not in (None, "CAUSAL_LM", "FEATURE_EXTRACTION"):
        raise UnsupportedModel(
            f"the adapter is for {task}, and holds no head that tells which class of model to load",
            try_="load the model yourself and give it in place of its name",
        )
    return load_model(source, head="base" if task == "FEATURE_EXTRACTION" else None)


def _token_rows(
    calibration: Sequence[str] | Tensor | None, tokenizer: PreTrainedTokenizerBase | None
) -> Tensor | None:
    if calibration is None or isinstance(calibration, Tensor):
        return calibration
    if tokenizer is None:
        raise BadRecipe("calibration texts need a tokenizer", try_="token ids, or tokenizer=...")
    n_tokens = sum(len(ids) for ids in tokenizer(list(calibration))["input_ids"])
    length = max(1, min(512, n_tokens))
    return calibration_rows(calibration, tokenizer, n_sequences=64, length=length, seed=0)


@torch.no_grad()
def _outputs(model: Any) -> dict[str, Tensor]:
    model.eval()
    inputs = {name: value.to(model.device) for name, value in example_inputs(model).items()}
    found = model(**inputs)
    return {name: found[name].float().cpu() for name in _OUTPUTS if name in found}


def _compare(model: PreTrainedModel, expected: dict[str, Tensor], folder: Path) -> float:
    """Return the largest difference between outputs and those of stock PEFT with what was written.

    Raises:
        ElastuneError: it is more than rounding.
    """
    wrapped = PeftModel.from_pretrained(model, str(folder))
    try:
        found = {}
        with torch.no_grad():
            inputs = {n: v.to(model.device) for n, v in example_inputs(model).items()}
            out = wrapped.eval()(**inputs)
            found = {name: out[name].float().cpu() for name in expected}
    finally:
        wrapped.unload()
    worst = max(float((found[name] - expected[name]).abs().max()) for name in expected)
    size = max(float(value.abs().max()) for value in expected.values())
    # Half-precision bases round the sums of either side in another order.
    share = _SHARE if model.dtype == torch.float32 else 4 * torch.finfo(model.dtype).eps
    if not worst <= max(_TOLERANCE, share * size):
        raise ElastuneError(
            f"stock PEFT does not compute what was to be saved: outputs differ by up to "
            f"{worst:.1e}; nothing was kept",
            try_="report this",
        )
    return worst


def _card(
    folder: Path,
    adapter: PeftAdapter,
    model: PreTrainedModel,
    cut: tuple[AdapterEnergies, dict[str, int]],
    source: Any,
) -> str:
    """Return the text of README.md."""
    energies, ranks = cut
    of = "outputs on calibration inputs" if energies.by_outputs else "the weights it adds"
    rows = "\n".join(
        f"| {m.module} | {m.stored_rank} | {ranks[m.dim]} | {100 * m.kept(ranks[m.dim]):.1f} |"
        for m in energies.modules
    )
    return adapter_card(
        adapter,
        model,
        folder=folder.name,
        origin=str(source) if source else None,
        about=f"A LoRA cut to fewer ranks with elastune {__version__}: "
        f"{energies.n_params(ranks):,} of {energies.n_stored:,} weights.",
        parts=[
            f"It keeps {100 * energies.kept(ranks):.1f} % of the energy of {of}.",
            f"| module | rank before | rank | energy kept % |\n|---|---|---|---|\n{rows}",
        ],
    )
