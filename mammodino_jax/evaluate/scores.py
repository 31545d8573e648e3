"""The score file beside results.json: what every probe said about every test item, so that `compare` can test
differences between encoders of several runs without their features.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mammodino_jax.errors import UserError
from mammodino_jax.evaluate.metrics import Scored
from mammodino_jax.provenance import digest

NAME = "scores.parquet"
KEY = ("task", "features", "probe")
SCHEMA = pa.schema(
    [(name, pa.dictionary(pa.int32(), pa.string())) for name in KEY]
    + [
        ("repeat", pa.int8()),
        ("fold", pa.int8()),  # within its repeat
        ("item", pa.string()),
        ("patient", pa.string()),  # salted hash
        ("label", pa.int16()),  # 0..C-1
        ("score", pa.list_(pa.float32())),  # C a row
        ("predicted", pa.int16()),
    ]
)


def write_scores(path: Path, rows: Iterable[tuple[str, str, str, list[Scored]]]) -> None:
    """Write (task, features, probe, folds), a line an item of a fold; `Scored.item` is needed."""
    tables = []
    for *key, folds in rows:
        count: dict = {}
        for fold in folds:
            number = count[fold.repeat] = count.get(fold.repeat, -1) + 1
            n = len(fold.label)
            columns = [[value] * n for value in (*key, fold.repeat, number)]
            columns += [fold.item, [digest(p) for p in fold.patient]]
            columns += [fold.label, list(fold.score.astype(np.float32)), fold.predicted]
            tables.append(pa.table(dict(zip(SCHEMA.names, columns, strict=True)), schema=SCHEMA))
    pq.write_table(pa.concat_tables(tables), path, compression="zstd")


def read_scores(path: Path) -> dict[tuple[str, str, str], list[Scored]]:
    """{(task, features, probe): folds}; patients are hashes, items of a fold are in the order of their ids.

    Raises:
      UserError: the file is not there, or is no score file.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist; run first: python -m mammodino_jax.evaluate")
    try:
        table = pq.read_table(path)
    except pa.ArrowInvalid:
        table = None
    if table is None or table.schema.names != SCHEMA.names:
        raise UserError(f"{path} is no score file of python -m mammodino_jax.evaluate; run that again")
    scores = table["score"].combine_chunks()
    column = {name: table[name].to_numpy() for name in SCHEMA.names if name not in ("score", *KEY)}
    column |= {name: np.asarray(table[name].to_pylist(), object) for name in KEY}
    same = [column[name][1:] == column[name][:-1] for name in (*KEY, "repeat", "fold")]
    begins = np.flatnonzero(np.r_[True, ~np.all(same, axis=0)])
    found: dict = {}
    for begin, end in zip(begins, [*begins[1:], len(table)], strict=True):
        rows = begin + np.argsort(column["item"][begin:end])
        score = scores.slice(begin, end - begin).flatten().to_numpy().reshape(end - begin, -1)
        fold = Scored(column["patient"][rows], column["label"][rows].astype(np.int64), score[rows - begin],
                      column["predicted"][rows].astype(np.int64), column["item"][rows],
                      int(column["repeat"][begin]))  # fmt: skip
        found.setdefault(tuple(column[name][begin] for name in KEY), []).append(fold)
    return found
