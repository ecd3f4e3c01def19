"""Text for calibration that is not the task's own: C4, or a file."""

from __future__ import annotations

from pathlib import Path

from elastune.errors import BadData
from elastune.tasks.sources import JSON_SUFFIXES, read_rows, read_text

_C4_PASSAGES = 2000


def calibration_texts(source: str, data_dir: Path | None) -> list[str]:
    """Return passages of ``"c4"`` or of a file (.txt, .jsonl with a ``text`` field; also .gz).

    C4 is read from ``data_dir/c4_sample``, or streamed from the hub where no folder is given.

    Raises:
        BadData: the file or data set is missing, or lacks the field.
    """
    if source == "c4" and data_dir is None:
        return _c4_from_hub()
    path = data_dir / "c4_sample" / "train.jsonl.gz" if source == "c4" else Path(source)  # type: ignore[operator]
    if path.name.endswith(JSON_SUFFIXES):
        return [row.text("text") for row in read_rows(path)]
    return [part for part in read_text(path).split("\n\n") if part.strip()]


def _c4_from_hub() -> list[str]:
    try:
        import datasets
    except ImportError as error:
        raise BadData(
            "reading C4 from the hub needs the package datasets",
            try_="pip install 'elastune[data]', or sparsify.calibration.source=task",
        ) from error
    try:
        stream = datasets.load_dataset("allenai/c4", "en", split="train", streaming=True)
        return [row["text"] for row in stream.take(_C4_PASSAGES)]
    except Exception as error:  # the hub client raises many unrelated classes
        raise BadData(
            f"C4 cannot be had from the hub: {error}",
            try_="data.dir with a c4_sample folder, or sparsify.calibration.source=task",
        ) from error
