"""The page of an evaluation: page.html beside results.json, one file that loads nothing from elsewhere."""

import html
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mammodino_jax import charts
from mammodino_jax.evaluate.table import LEGEND, tested
from mammodino_jax.page import embed, facts, figure, jpeg, page, paragraph, section, table
from mammodino_jax.pictures import strip

GRID = np.linspace(0, 1, 101)  # false-positive rates at which ROC curves are averaged
DRAWS, BAND = 200, [2.5, 97.5]
HEADS = {
    "average_precision": "average precision",
    "balanced_accuracy": "balanced accuracy",
    "sensitivity_at_90_specificity": "sensitivity at 90 % specificity",
    "pf1": "pF1",
    "quadratic_kappa": "quadratic kappa",
}
MARKS = (
    ("dot and bar", "Estimate on the test items, and its 95 % interval over draws of test patients. Hollow: kNN."),
    ("grey, broken lines", "Baselines: what an encoder has to beat. Random init is its own architecture, untrained."),
    ("shaded band", f"95 % of ROC curves over {DRAWS} draws of test patients; the probes stay as trained."),
    ("AUC of folds", "Scores of two folds are never ranked against each other: curves and AUCs are averaged."),
    ("transductive", "Pretraining saw test patients or test images, without labels."),
    ("pretraining patients unknown", "The weights do not say whom they were trained on; overlap is possible."),
    ("layout tested on random weights only", "The real weights of this encoder were never run here."),
    ("foreign preprocessing", "The encoder read a build that it was not made for."),
)  # fmt: skip


def write_page(results: dict, scores, rows, output: Path) -> Path:
    """Write output/page.html.

    Args:
      results: what results.json holds.
      scores: what evaluate.scores.read_scores gives (columns of every test item's scores); None: no ROC curves.
      rows: the records (evaluate.items.Rows) that retrieval pictures are read from; None: no pictures.
      output: folder.

    Returns:
      The file.
    """
    scores = pa.table(scores) if isinstance(scores, dict) else scores
    title = html.escape(f"Evaluation: {results['title']}")
    lead = "Frozen features of encoders for mammograms, probed on built data sets. For research only."
    parts = [f"<h1>{title}</h1>", paragraph(lead, "lead"), asked_section(results)]
    parts += [task_section(task, scores) for task in results["tasks"]]
    for name, heading, text in PROBES:
        if results.get(name):
            parts.append(section(heading, paragraph(text), records_table(results[name])))
    if results.get("cross_slice"):
        parts.append(cross_slice_section(results["cross_slice"]))
    if results.get("retrieval") and rows is not None:
        parts.append(retrieval_section(results["retrieval"], rows))
    if results.get("sweep"):
        parts.append(sweep_section(results))
    parts.append(closing_section(results))
    path = Path(output) / "page.html"
    path.write_text(page(title, parts), encoding="utf-8")
    return path


def number(value, interval: bool = True) -> str:
    """A metric {value, low, high}, or a plain figure, as text."""
    if isinstance(value, dict):
        low, high = value.get("low"), value.get("high")
        shown = number(value.get("value", value.get("auc")))
        return f"{shown} [{low:.3f}, {high:.3f}]" if interval and low is not None else shown
    return "not computed" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)


def is_baseline(row: dict) -> bool:
    return row["kind"] in ("baseline", "random")


def asked_section(results: dict) -> str:
    """What was asked: the benchmark, the data, the encoders, the settings."""
    data, settings = results["data"], results["settings"]
    kinds = ", ".join(f"{n} {kind}" for kind, n in data["items_by_kind"].items())
    patients = data["patients_by_split"]
    folds = max(task["folds"] for task in results["tasks"])
    repeats = max(task.get("repeats", 1) for task in results["tasks"])
    by_patient = f"{folds}-fold x {repeats}" if folds > 1 else "splits of the index"
    cards = [
        ("Items", str(sum(data["items_by_kind"].values())), kinds),
        ("Patients", str(sum(patients.values())), ", ".join(f"{n} {split}" for split, n in patients.items())),
        ("Left out", f"{data['records_left_out']} records", "duplicates, or flagged"),
        ("Test", by_patient, "patients kept together; nothing is chosen on test items"),
    ]
    seen = {row["features"]: row for task in results["tasks"] for row in task["rows"]}
    lines = [
        [name, row["kind"], row.get("fingerprint") or "-", *_input(row), "; ".join(row["remarks"])]
        for name, row in seen.items()
    ]
    head = ["features", "kind", "fingerprint", "long side", "mm/px", "remarks"]
    marked = {i for i, row in enumerate(seen.values()) if not is_baseline(row)}
    absent = results.get("absent_tasks")
    shown = [[key.replace("_", " "), _plain(key, value)] for key, value in settings.items()]
    return section(
        "What was asked", paragraph(results["note"]), facts(cards),
        paragraph(f"Not asked, no such images in the data: {', '.join(absent)}.") if absent else "",
        table(head, lines, marked), _folded("Settings", table(["setting", "value"], shown)),
    )  # fmt: skip


def _input(row: dict) -> tuple[str, str]:
    side, mm = row["long_side"], row["mm_per_px"]
    return f"{side} px" if side else "-", f"{mm:.3f}" if mm else "-"


def _plain(key: str, value) -> str:
    """A setting as text; of folders the last part only, since the page may be shared."""
    if key in ("data", "builds", "encoders"):
        return ", ".join(Path(str(v)).name for v in value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _folded(summary: str, inside: str) -> str:
    return f"<details><summary>{html.escape(summary)}</summary>{inside}</details>"


def task_section(task: dict, scores: pa.Table | None) -> str:
    rows = task["rows"]
    found = {name for row in rows for name in row["metrics"]}
    metrics = [name for name in HEADS if name in found]
    head = ["features", "probe", "AUC [95 %]", *(HEADS[m] for m in metrics), "remarks"]
    lines = []
    for row in rows:
        remarks = row["remarks"] + ([f"{row['not_computed']} AUCs not computed"] if row["not_computed"] else [])
        probe = "-" if row["probe"] == "none" else row["probe"]
        values = [number(row["metrics"].get(m), interval=False) for m in metrics]
        lines.append([row["features"], probe, number(row["metrics"]["auc"]), *values, "; ".join(remarks)])
    marked = {i for i, row in enumerate(rows) if not is_baseline(row)}
    baselines = {row["features"] for row in rows if is_baseline(row)}
    drawn = charts.strokes(dict.fromkeys(row["features"] for row in rows), baselines)
    curves = [chart for chart in (roc_chart(task, scores, drawn), few_chart(task, drawn)) if chart]
    return section(
        task["task"], paragraph(tested(task)), table(head, lines, marked),
        figure(embed(charts.probes({"tasks": [task]}), "svg+xml", f"{task['task']}: AUC and interval of each row")),
        f'<div class="grid">{"".join(curves)}</div>' if curves else "", breakdown(rows),
    )  # fmt: skip


def roc_chart(task: dict, scores: pa.Table | None, drawn: dict) -> str:
    """ROC curves of the linear probe; "" where there are no scores of it."""
    if scores is None:
        return ""
    mine = scores.filter((pc.field("task") == task["task"]) & (pc.field("probe") == "linear"))
    lines = {}
    for name in drawn:
        own = mine.filter(pc.field("features") == name)
        if not len(own):
            continue
        label, patient, repeat, fold = (own[c].to_numpy() for c in ("label", "patient", "repeat", "fold"))
        score = own["score"].combine_chunks().flatten().to_numpy().reshape(len(own), -1)
        lines[name] = mean_roc(patient, repeat * (fold.max() + 1) + fold, label, score)
    if not lines:
        return ""
    kind = "macro one-vs-rest, " if len(task["classes"]) > 2 else ""
    picture = embed(charts.roc(lines, GRID, drawn), "svg+xml", f"{task['task']}: ROC curves, linear probe")
    return figure(picture, f"ROC curves, linear probe; {kind}mean over folds, band: 95 % over draws of patients.")


def mean_roc(patient_n, fold_n, label_n, score_nC, draws: int = DRAWS, seed: int = 0) -> np.ndarray:
    """Sensitivity at the false-positive rates GRID, averaged over folds, and its band over draws of patients.

    More than two classes: the mean over classes of one against the rest. Folds (and in a draw: folds that lose
    a class) without items in and out of a class are left out.

    Returns:
      f64 [3, len(GRID)]: mean, 2.5th and 97.5th percentile; NaN where nothing could be computed.
    """
    classes = score_nC.shape[1]
    patients, place_n = np.unique(patient_n, return_inverse=True)
    drawn = np.random.default_rng(seed).multinomial(len(patients), np.full(len(patients), 1 / len(patients)), draws)
    weights = np.concatenate([np.ones((1, len(patients)), int), drawn])
    curves = []  # [C][W, G]
    for c in range(1, 2) if classes == 2 else range(classes):
        total, count = np.zeros((1 + draws, len(GRID))), np.zeros((1 + draws, 1))
        for fold in np.unique(fold_n):
            own = fold_n == fold
            found = _roc(label_n[own] == c, score_nC[own, c], weights[:, place_n[own]])
            known = np.isfinite(found).all(axis=1, keepdims=True)
            total, count = total + np.where(known, found, 0), count + known
        curves.append(np.where(count > 0, total / np.maximum(count, 1), np.nan))
    mean = np.mean(curves, axis=0)
    if np.isnan(mean[1:]).all():
        return np.stack([mean[0], *np.full((2, len(GRID)), np.nan)])
    return np.stack([mean[0], *np.nanpercentile(mean[1:], BAND, axis=0)])


def _roc(positive_n, score_n, weights_Wn) -> np.ndarray:
    """Sensitivity at GRID, linear between thresholds: [W, G]; NaN where a weighting leaves one class."""
    order = np.argsort(-score_n, kind="stable")
    last = np.r_[np.flatnonzero(np.diff(score_n[order])), len(order) - 1]  # of each run of equal scores
    weights, positive = weights_Wn[:, order], positive_n[order]
    tp, fp = (np.cumsum(weights * side, axis=1)[:, last] for side in (positive, ~positive))
    out = np.full((len(weights), len(GRID)), np.nan)
    if np.isfinite(score_n).all():
        for w in np.flatnonzero((tp[:, -1] > 0) & (fp[:, -1] > 0)):
            out[w] = np.interp(GRID, np.r_[0, fp[w] / fp[w, -1]], np.r_[0, tp[w] / tp[w, -1]])
    return out


def few_chart(task: dict, drawn: dict) -> str:
    """AUC over the share of patients with labels, a panel a probe."""
    panels = {}
    for name, probes in (task.get("few_label") or {}).items():
        for probe, line in probes.items():
            found = [(100 * p["share"], p["auc"], p["low"], p["high"]) for p in line if p["auc"] is not None]
            if found:
                panels.setdefault(probe, {})[name] = found
    if not panels:
        return ""
    chart = charts.points(panels, drawn, "labelled patients (%)")
    return figure(
        embed(chart, "svg+xml", f"{task['task']}: AUC over the share of labelled patients"),
        "Few labels: the probe is trained and chosen on a share of the patients; the test items stay the same.",
    )


def breakdown(rows: list[dict]) -> str:
    """AUC by the values of index columns, features side by side; "" where there is none."""
    rows = [row for row in rows if row.get("breakdown")]
    if not rows:
        return ""
    groups = dict.fromkeys((c, v) for row in rows for c, values in row["breakdown"].items() for v in values)
    lines = []
    for column, value in groups:
        cells = [row["breakdown"].get(column, {}).get(value) for row in rows]
        n = next(cell["n"] for cell in cells if cell)
        lines.append([column.replace("_", " "), value, n, *(number(c) if c else "-" for c in cells)])
    head = ["", "value", "items", *(f"{row['features']}, {row['probe']}" for row in rows)]
    return _folded("AUC [95 %] by site, machine and kind of item", table(head, lines))


PROBES = (
    ("dense", "Where lesions are: patch tokens", "Patches of a lesion against tissue patches of the same image."),
    ("shortcuts", "Shortcuts and leakage", "What else the features tell, beside what guessing would reach."),
)


def records_table(found) -> str:
    """Rows of results as they are, a column a field."""
    rows = found["rows"] if isinstance(found, dict) else found
    fields = list(dict.fromkeys(name for row in rows for name in row))
    lines = [[number(row[f]) if f in row else "-" for f in fields] for row in rows]
    return table([f.replace("_", " ") for f in fields], lines)


def cross_slice_section(found: dict) -> str:
    return section(
        "Slices of a volume",
        paragraph("Cosine of the features of two slices by their distance, and of slices of two volumes."),
        figure(embed(charts.cross_slice(found), "svg+xml", "cosine of slices over their distance")),
    )


def retrieval_section(found: list[dict], rows) -> str:
    """Nearest neighbours of some records: pictures named by what they show, never by patient or file."""
    parts = []
    for encoder in dict.fromkeys(f["encoder"] for f in found):
        parts.append(f"<h3>{html.escape(encoder)}</h3>")
        for one in (f for f in found if f["encoder"] == encoder):
            tiles = [_record(rows, one["query"], "query")]
            near = zip(one["near"], one["cosine"], strict=True)
            tiles += [_record(rows, i, f"cosine {cosine:.3f}") for i, cosine in near]
            parts.append(f'<div class="tiles sheet">{"".join(tiles)}</div>')
    about = "First a query, then the records of other patients whose features are nearest to it by cosine."
    return section("What the encoder finds alike", paragraph(about), *parts)


def _record(rows, i: int, what: str) -> str:
    seen = [rows.columns[c][i] for c in ("kind", "laterality", "view")]
    for name, values in rows.labels.items():
        if values[i] >= 0:
            names = rows.class_names.get(name, [])
            seen.append(f"{name} {names[values[i]] if values[i] < len(names) else values[i]}")
    caption = f"{what}: {', '.join(str(s) for s in seen if s)}"
    return figure(jpeg(strip([rows.image(i)], 220), caption), caption)


def sweep_section(results: dict) -> str:
    """AUC over the size of an input pixel; over the long side where that is unknown."""
    kinds = {row["features"]: row for task in results["tasks"] for row in task["rows"]}
    figures = []
    for task, found in results["sweep"].items():
        unit = "mm_per_px" if all(p["mm_per_px"] for p in found) else "long_side"
        names = list(dict.fromkeys(p["features"] for p in found))
        drawn = charts.strokes(names, {n for n in names if n in kinds and is_baseline(kinds[n])})
        lines = {n: [] for n in names}
        for p in found:
            if p["auc"] is not None:
                lines[p["features"]].append((p[unit], p["auc"], p["low"], p["high"]))
        label = "mm per input pixel" if unit == "mm_per_px" else "long side (px)"
        chart = charts.points({task: {n: line for n, line in lines.items() if line}}, drawn, label)
        figures.append(figure(embed(chart, "svg+xml", f"{task}: AUC over resolution")))
    about = "The same probe on the same items at several input resolutions."
    return section("Resolution", paragraph(about), f'<div class="grid">{"".join(figures)}</div>')


def closing_section(results: dict) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    command = results.get("command")
    return section(
        "How to read this page", table(["mark", "meaning"], [list(m) for m in MARKS]), paragraph(LEGEND),
        paragraph(f"Versions: {versions}."),
        f"<p><code>{html.escape(command)}</code></p>" if command else "",
    )  # fmt: skip
