"""The AUC of a task within groups of its items: by site, vendor, view, density, lesion size, ...

r records, n items of a level, m items of a task, G groups. An item's value is that of its records where
they agree, else "mixed".
"""

import dataclasses
import itertools
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mammodino_jax.evaluate.metrics import summarise

LEAST = 5  # items of every class that an AUC is computed from
SIZES_MM = (5.0, 10.0, 20.0)
OF_POSITIVES = ("lesion_size", "lesion_type", "invasive")


def breakdown(rows, items, chosen, folds, scored, columns, draws: int, seed: int) -> dict[str, dict]:
    """AUC (macro-AUC of more than two classes) of a probe's test items by group.

    An AUC is computed within each fold and averaged, never over pooled scores. `OF_POSITIVES` group the
    positives of a two-class task; what is no positive has no such property, or one that must not make the
    groups unequal (benign lesions), so all negatives are in all of these groups.

    Args:
      rows, items: items.Rows, items.Items.
      chosen: i64 [m], the task's items.
      folds: probes.Fold, places among `chosen`.
      scored: metrics.Scored of each fold's test part.
      columns: index columns; names of labels; "resolution": mm per px of the record, in thirds;
        "lesion_size": long side in mm of an item's largest marked finding; "lesion_type": by the labels mass
        and calcification. A column is left out where the data lack it, all items are alike in it, or it
        is what the task asks.
      draws, seed: of the bootstrap.

    Returns:
      {column: {value: {n, positive, auc, low, high}}}: n and positive count distinct items, positive is None
      with more than two classes; auc is None where a class has fewer than 5 items in the group.
    """
    classes = scored[0].score.shape[1]
    label_m = np.full(len(chosen), -1)  # -1: never tested
    for fold, s in zip(folds, scored, strict=True):
        label_m[fold.test] = s.label
    found = {}
    for column in columns:
        shared = column in OF_POSITIVES
        value_n = values(rows, items, column, chosen) if classes == 2 or not shared else None
        if value_n is None:
            continue
        value_m, tested_m, in_all_m = value_n[chosen], label_m >= 0, (label_m == 0) & shared
        named = sorted(np.unique(value_m[tested_m & ~in_all_m]), key=_order)
        groups = {name: tested_m & ((value_m == name) | in_all_m) for name in named}
        if len(groups) < 2 or all(len(np.unique(label_m[inside_m])) < 2 for inside_m in groups.values()):
            continue
        found[column] = {
            name: _score_group(inside_m, label_m, classes, folds, scored, draws, seed)
            for name, inside_m in groups.items()
        }
    return found


def _score_group(inside_m, label_m, classes: int, folds, scored, draws: int, seed: int) -> dict:
    counts = np.bincount(label_m[inside_m], minlength=classes)
    positive = int(counts[1]) if classes == 2 else None
    group = {"n": int(counts.sum()), "positive": positive, "auc": None, "low": None, "high": None}
    if counts.min() < LEAST:
        return group
    parts = [_take(s, inside_m[fold.test]) for fold, s in zip(folds, scored, strict=True)]
    auc = summarise([p for p in parts if len(p.label)], draws, seed, metrics=("auc",))["auc"]
    return group | {"auc": auc["value"], "low": auc["low"], "high": auc["high"]}


def _take(scored, kept: np.ndarray):
    arrays = {name: x[kept] for name, x in vars(scored).items() if isinstance(x, np.ndarray)}
    return dataclasses.replace(scored, **arrays)


def _order(value: str) -> tuple:
    """Ranges by where they begin, then names, then what is no value."""
    number = re.match(r"[\d.]+", value)
    return value in ("mixed", "unknown"), float(number[0]) if number else np.inf, value


def values(rows, items, column: str, chosen) -> np.ndarray | None:
    """The group of each item, text [n]; None where the data do not have the column.

    `chosen`: the items whose thirds "resolution" means.
    """
    if column == "resolution":
        return _thirds(_mean(items, rows.columns["pixel_mm"]), chosen)
    if column == "lesion_size":
        return _sizes(lesion_mm(rows, items))
    if column == "lesion_type":
        return _types(items) if {"mass", "calcification"} <= rows.labels.keys() else None
    if column in rows.labels:
        names = rows.class_names.get(column, [])
        numbers = map(str, range(len(names), 128))  # of values that labels.json does not name
        record_r = np.array([*names, *numbers, None], object)[rows.labels[column]]  # -1: None
    elif column in rows.columns:
        record_r = rows.columns[column]
    else:
        return None
    said = {None: "unknown", True: "yes", False: "no"}
    return np.array([said.get(v, v) for v in common(items, record_r)], object)


def common(items, record_r: np.ndarray) -> np.ndarray:
    """What the records of an item say: object [n]; None where none is known, "mixed" where they differ."""
    encoded = pa.array(record_r, from_pandas=True).dictionary_encode()
    code_r = encoded.indices.fill_null(-1).to_numpy()
    known = (code_r >= 0) & (items.item >= 0)
    names = np.array([*encoded.dictionary.to_pylist(), None], object)
    low_n, high_n = np.full(len(items.id), len(names)), np.full(len(items.id), -1)  # -1: None
    np.minimum.at(low_n, items.item[known], code_r[known])
    np.maximum.at(high_n, items.item[known], code_r[known])
    value_n = names[high_n]
    value_n[low_n < high_n] = "mixed"
    return value_n


def _mean(items, number_r: np.ndarray) -> np.ndarray:
    """Mean over the records of each item that know it, f64 [n]; NaN where none does."""
    known = np.isfinite(number_r) & (items.item >= 0)
    of_item, n = items.item[known], len(items.id)
    with np.errstate(invalid="ignore"):
        return np.bincount(of_item, number_r[known], n) / np.bincount(of_item, minlength=n)


def _thirds(mm_n: np.ndarray, chosen) -> np.ndarray:
    known_n = np.isfinite(mm_n)
    third_n, value_n = np.full(len(mm_n), -1), np.full(len(mm_n), "unknown", object)
    mine = chosen[known_n[chosen]]
    if len(mine):
        edges = np.quantile(mm_n[mine], [1 / 3, 2 / 3])
        third_n[mine] = np.digitize(mm_n[mine], edges, right=True)
    for third in range(3):
        inside = third_n == third
        if inside.any():
            value_n[inside] = f"{mm_n[inside].min():.3f} to {mm_n[inside].max():.3f} mm/px"
    return value_n


def _sizes(mm_n: np.ndarray) -> np.ndarray:
    edges = [f"{mm:g}" for mm in (0, *SIZES_MM)]
    ranges = [f"{low} to {high} mm" for low, high in itertools.pairwise(edges)]
    names = np.array([*ranges, f"{edges[-1]} mm or more", "unknown"], object)
    return names[np.where(np.isfinite(mm_n), np.digitize(mm_n, SIZES_MM), -1)]


def _types(items) -> np.ndarray:
    mass_n, calcification_n = items.label("mass"), items.label("calcification")
    cases = {
        "mass and calcification": (mass_n == 1) & (calcification_n == 1),
        "mass": mass_n == 1,
        "calcification": calcification_n == 1,
        "other": (mass_n == 0) & (calcification_n == 0),
    }
    return np.select(list(cases.values()), list(cases), default="unknown").astype(object)


def lesion_mm(rows, items) -> np.ndarray:
    """Long side in mm of the largest box among each item's findings, f64 [n]; NaN where no size is known."""
    mm_n = np.full(len(items.id), np.nan)
    column, corners = rows.columns, ["y0", "x0", "y1", "x1"]
    source_mm = column["pixel_mm"] * column["height"] / (column["box_y1"] - column["box_y0"])
    for number, folder in enumerate(rows.folders):
        path = Path(folder) / "findings.parquet"
        if not path.is_file():
            continue
        mine = np.flatnonzero((rows.source == number) & (items.item >= 0))
        record_of = {}
        for name in ("volume_id", "image_id"):
            record_of |= dict(zip(column[name][mine], mine, strict=True))
        record_of.pop(None, None)
        for found in pq.read_table(path, columns=["image_id", "volume_id", *corners]).to_pylist():
            record = record_of.get(found["image_id"], record_of.get(found["volume_id"]))
            y0, x0, y1, x1 = (found[name] for name in corners)
            if record is None or y0 is None:
                continue
            item = items.item[record]
            mm_n[item] = np.fmax(mm_n[item], max(y1 - y0, x1 - x0) * source_mm[record])
    return mm_n
