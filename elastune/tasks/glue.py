"""GLUE (Wang et al., 2019, arXiv 1804.07461) without WNLI: the tasks of compression papers' tables.

Results are reported on the official development split, as papers do: the test labels are hidden.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from elastune.errors import BadData
from elastune.metrics import ACCURACY, F1, MATTHEWS
from elastune.tasks.base import ClassificationExample
from elastune.tasks.classification import (
    ClassificationTask,
    RegressionTask,
    labelled,
    number_of,
)
from elastune.tasks.sources import ROW_SUFFIXES, Row, hub_rows, local_file, read_rows

HUB = "nyu-mll/glue"
HELD_OUT = "heldout"
"""A local file of training rows that stands in for an official development split."""


class GLUETask(ClassificationTask):
    """One GLUE task, from ``data_dir/glue/SUBSET`` or from the hub.

    Attributes:
        subset: its name on the hub and of its local folder.
        fields: of the text, or of both texts.
        report_split: the official development split.
        stands_in: whether a local file ``heldout`` may take that split's place.
    """

    subset: ClassVar[str]
    fields: ClassVar[tuple[str, ...]] = ("sentence1", "sentence2")
    report_split: ClassVar[str] = "validation"
    stands_in: ClassVar[bool] = True

    @property
    def notes(self) -> str:
        """Says when the report split is not the official one."""
        folder = self._folder
        if folder is None or local_file(folder, self.report_split) is not None:
            return ""
        if not self.stands_in or local_file(folder, HELD_OUT) is None:
            return ""
        return (
            "report split is held out of the official train split: "
            "not comparable with published figures"
        )

    def train_examples(self) -> list[ClassificationExample]:
        return [self._from_row(row) for row in self._rows("train")]

    def report_examples(self) -> list[ClassificationExample]:
        stand_in = (HELD_OUT,) if self.stands_in else ()
        return [self._from_row(row) for row in self._rows(self.report_split, *stand_in)]

    @property
    def _folder(self) -> Path | None:
        root = self.context.data_dir
        return None if root is None else root / "glue" / self.subset

    def _rows(self, split: str, *stand_ins: str) -> list[Row]:
        folder = self._folder
        if folder is None:
            return hub_rows(HUB, subset=self.subset, split=split)
        path = local_file(folder, split, *stand_ins)
        if path is None:
            raise BadData(
                f"task {self.name!r} finds no {split} split in {folder}.",
                try_=f"put {split}.jsonl.gz there (or {', '.join(ROW_SUFFIXES)}); "
                "without data_dir it is read from the hub",
            )
        return read_rows(path)

    def _from_row(self, row: Row) -> ClassificationExample:
        texts = [row.text(field) for field in self.fields]
        label = self._checked(number_of(row, "label"), row)
        return labelled(texts[0], texts[1] if len(texts) > 1 else None, label)

    def _checked(self, label: float, row: Row) -> float:
        if label == -1:
            raise _hidden(row)
        if label not in range(len(self.labels)):
            names = ", ".join(f"{i} {name}" for i, name in enumerate(self.labels))
            raise BadData(f"{row.place}: label {label:g} is not one of {names}.")
        return label


class SST2(GLUETask):
    """SST-2: is a piece of a film review positive? (Socher et al., 2013)."""

    name = subset = "sst2"
    fields = ("sentence",)
    labels = ("negative", "positive")


class CoLA(GLUETask):
    """CoLA: is a sentence acceptable English? (Warstadt et al., 2019)."""

    name = subset = "cola"
    fields = ("sentence",)
    labels = ("unacceptable", "acceptable")
    metrics = (MATTHEWS, ACCURACY)


class MRPC(GLUETask):
    """MRPC: do two sentences say the same? (Dolan and Brockett, 2005).

    F1 goes first, as EFTNAS searches by it; LoNAS's table has accuracy.
    """

    name = subset = "mrpc"
    labels = ("not_equivalent", "equivalent")
    metrics = (F1, ACCURACY)


class RTE(GLUETask):
    """RTE: does the first sentence entail the second? (Dagan et al., 2006, and later)."""

    name = subset = "rte"
    labels = ("entailment", "not_entailment")


class STSB(RegressionTask, GLUETask):
    """STS-B: how alike are two sentences, from 0 to 5? (Cer et al., 2017)."""

    name = subset = "stsb"

    def _checked(self, label: float, row: Row) -> float:
        if label == -1:
            raise _hidden(row)
        if not 0 <= label <= 5:
            raise BadData(f"{row.place}: label {label:g} is not between 0 and 5.")
        return label


class QNLI(GLUETask):
    """QNLI: does the sentence answer the question? Made of SQuAD."""

    name = subset = "qnli"
    fields = ("question", "sentence")
    labels = ("entailment", "not_entailment")


class QQP(GLUETask):
    """QQP: do two questions ask the same? Accuracy goes first, as in the tables of EFTNAS."""

    name = subset = "qqp"
    fields = ("question1", "question2")
    labels = ("not_duplicate", "duplicate")
    metrics = (ACCURACY, F1)


class MNLI(GLUETask):
    """MNLI: does the premise entail the hypothesis? Reported on the matched genres."""

    name = subset = "mnli"
    fields = ("premise", "hypothesis")
    labels = ("entailment", "neutral", "contradiction")
    report_split = "validation_matched"


class MNLIMismatched(MNLI):
    """MNLI, reported on the genres that are not in the training split."""

    name = "mnli_mm"
    report_split = "validation_mismatched"
    stands_in = False  # rows held out of train are of the matched genres


def _hidden(row: Row) -> BadData:
    return BadData(
        f"{row.place}: label -1 hides the gold answer, as in GLUE's test splits.",
        try_="report on the development split: GLUE's server alone knows the test labels",
    )
