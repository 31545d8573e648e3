"""The page of an evaluation: page.html beside results.json, one file that loads nothing from elsewhere."""

import html
import json
from pathlib import Path

from mammodino_jax import charts
from mammodino_jax.evaluate.roc import DRAWS, GRID, mean_roc
from mammodino_jax.evaluate.table import HEAD, LEGEND, cells, chance, estimate, tested
from mammodino_jax.page import embed, facts, figure, jpeg, page, paragraph, section, table
from mammodino_jax.pictures import strip

DENSE = {
    "supervised_auc": "linear probe: AUC",
    "left_right_auc": "unlike the other breast: AUC",
    "mean_distance_auc": "unlike the rest of the breast: AUC",
}
DENSE_HEAD = (
    "features", "rank", "rank by chance", *(f"sensitivity at {n}" for n in (1, 2, 4)), "mean, 1 to 4",
    "mm/px", "remarks",
)  # fmt: skip
MARKS = (
    ("dot and bar", "Figure, 95 % interval over draws of test patients. Hollow: kNN, full: linear probe."),
    ("square, diamond", "Attentive pooling of patch tokens, and the encoder fine-tuned."),
    ("grey", "Baseline that an encoder has to beat; random init: its architecture, untrained."),
    ("shaded band", f"95 % of the ROC curves over {DRAWS} draws of test patients; probes as trained."),
    ("folds", "Scores of two folds are never ranked against each other: AUCs and curves are averaged."),
    ("transductive", "Pretraining saw test patients or test images, without their labels."),
    ("pretraining patients unknown", "Weights do not say whom they learnt from: it may be test patients."),
    ("layout tested on random weights only", "The real weights of this encoder were never measured here."),
    ("foreign preprocessing", "The encoder reads a build that it was not made for."),
)


def write_page(results: dict, scores: dict | None, rows, output: Path) -> Path:
    """Write output/page.html.

    Args:
      results: what results.json holds.
      scores: {(task, features, probe): Scored of each fold}, as from scores.read_scores; None: no ROC curves.
      rows: the records (items.Rows) that pictures are read from; None: no pictures.
      output: folder.

    Returns:
      The file.
    """
    title = html.escape(f"Evaluation: {results['title']}")
    lead = "Frozen features of encoders for mammograms, probed on built data sets. For research only."
    parts = [f"<h1>{title}</h1>", paragraph(lead, "lead"), asked_section(results)]
    parts += [task_section(task, scores or {}) for task in results["tasks"]]
    for name, make in (
        ("sweep", sweep_section), ("dense", dense_section), ("shortcuts", shortcuts_section),
        ("cross_slice", cross_slice_section), ("retrieval", retrieval_section),
    ):  # fmt: skip
        if results.get(name):
            parts.append(make(results, rows))
    path = Path(output) / "page.html"
    path.write_text(page(title, [*parts, closing_section(results)]), encoding="utf-8")
    return path


def _baselines(results: dict) -> set[str]:
    """Names of features that are no encoder's; in a sweep without their long sides too."""
    rows = [row for task in results["tasks"] for row in task["rows"] if _is_baseline(row)]
    return {name for row in rows for name in (row["features"], row["features"].rsplit(" @ ", 1)[0])}


def _is_baseline(row: dict) -> bool:
    return row["encoder"] is None


def _encoders(rows) -> set[int]:
    """Places of the rows of encoders, which stand out."""
    return {i for i, row in enumerate(rows) if not _is_baseline(row)}


def _folded(summary: str, inside: str) -> str:
    return f"<details><summary>{html.escape(summary)}</summary>{inside}</details>"


def _figures(head: list[str], lines, marked=frozenset()) -> str:
    return f'<div class="figures">{table(head, lines, marked)}</div>'


def _chart(svg: bytes, alt: str, caption: str = "") -> str:
    return figure(embed(svg, "svg+xml", alt), caption)


def _grid(figures: list[str]) -> str:
    return f'<div class="grid">{"".join(figures)}</div>' if figures else ""


def asked_section(results: dict) -> str:
    """What was asked: the benchmark, the data, the encoders, the settings."""
    data, first = results["data"], results["tasks"][0]
    kinds, patients = data["records_by_kind"], data["patients_by_split"]
    of_kind = ", ".join(f"{n} {kind}" for kind, n in kinds.items())
    left_out = f"{data['records_left_out']} left out as copies or flagged"
    by_patient = f"{first['folds']} folds x {first['repeats']}" if first["folds"] > 1 else "the test split"
    cards = [
        ("Records", str(sum(kinds.values())), f"{of_kind}; {left_out}"),
        ("Patients", str(sum(patients.values())), ", ".join(f"{n} {split}" for split, n in patients.items())),
        ("Tested on", by_patient, "patients kept together; nothing is chosen on test items"),
    ]
    seen, lines = {row["features"]: row for task in results["tasks"] for row in task["rows"]}, []
    for name, row in seen.items():
        side, mm = row["long_side"], row["mm_per_px"]
        size = f"{side} px" if side else "-", f"{mm:.3f}" if mm else "-"
        fingerprint = results["encoders"].get(name, {}).get("fingerprint", "-")
        lines.append([name, row["kind"], *size, fingerprint, "; ".join(row["remarks"])])
    head = ["features", "kind", "long side", "mm/px", "fingerprint", "remarks"]
    shown = [[name.replace("_", " "), _setting(value)] for name, value in results["settings"].items()]
    absent = ", ".join(results["absent_tasks"])
    return section(
        "What was asked", paragraph(results["note"]), facts(cards),
        table(head, lines, _encoders(seen.values())),
        paragraph(f"Not asked, no such images in the data: {absent}.") if absent else "",
        _folded("Settings", table(["setting", "value"], shown)),
    )  # fmt: skip


def _setting(value) -> str:
    """As text; of paths the last part only, since the page may be shared."""
    if isinstance(value, list | tuple):
        return ", ".join(_setting(v) for v in value) or "-"
    return value.rsplit("/", 1)[-1] if isinstance(value, str) else json.dumps(value)


def task_section(task: dict, scores: dict) -> str:
    """The figures of a task, its charts, and its groups of items."""
    rows = task["rows"]
    table_ = [HEAD[:-1] + ["remarks"], *map(cells, rows)]
    head, *lines = ([*line[:2], *line[3:]] for line in table_)  # the size of the input is said above
    largest = f" @ {max(row['long_side'] or 0 for row in rows)}"
    names = dict.fromkeys(row["features"] for row in rows)  # of a sweep one size: 20 curves say nothing
    drawn = [name for name in names if " @ " not in name or name.endswith(largest)]
    drawn = charts.strokes(drawn, _baselines({"tasks": [task]}))
    intervals = _chart(charts.probes({"tasks": [task]}), f"{task['task']}: AUC and interval of each row")
    return section(
        task["task"], paragraph(f"{task['note']} {tested(task)}".strip()),
        _figures(head, lines, _encoders(rows)), intervals,
        _grid([*roc_chart(task, scores, drawn), *few_charts(task, drawn)]), breakdown(rows),
    )  # fmt: skip


def roc_chart(task: dict, scores: dict, drawn: dict) -> list[str]:
    """ROC curves of the linear probe, or the last where that was not asked, as far as there are scores."""
    asked = [row["probe"] for row in task["rows"]]
    probe = "linear" if "linear" in asked else asked[-1]
    found = {name: scores.get((task["task"], name, probe)) for name in drawn}
    lines = {name: mean_roc(folds) for name, folds in found.items() if folds}
    if not lines:
        return []
    kind = ", mean over classes against the rest" if len(task["classes"]) > 2 else ""
    alt = f"{task['task']}: ROC curves of the {probe} probe"
    caption = f"ROC curves, {probe} probe{kind}; mean over folds."
    return [_chart(charts.roc(lines, GRID, drawn), alt, caption)]


def few_charts(task: dict, drawn: dict) -> list[str]:
    """AUC over the share of patients with labels, a chart a probe."""
    lines, figures = {}, []
    for name in drawn:
        for probe, line in task["few_label"].get(name, {}).items():
            found = [(100 * p["share"], p["auc"], p["low"], p["high"]) for p in line if p["auc"] is not None]
            if found:
                lines.setdefault(probe, {})[name] = found
    for probe, found in lines.items():
        chart = charts.points(found, drawn, "patients with labels (%)")
        alt = f"{task['task']}: AUC of the {probe} probe over the share of labelled patients"
        figures.append(_chart(chart, alt, f"Few labels, {probe} probe; the test items stay the same."))
    return figures


def breakdown(rows: list[dict]) -> str:
    """AUC within groups of the test items, features side by side; "" where there are none."""
    rows, lines = [row for row in rows if row["breakdown"]], []
    values = [(column, value) for row in rows for column, of in row["breakdown"].items() for value in of]
    for column, value in dict.fromkeys(values):
        groups = [row["breakdown"].get(column, {}).get(value) for row in rows]
        n = next(group["n"] for group in groups if group)
        aucs = [estimate({"value": g["auc"], **g}) if g else "-" for g in groups]
        lines.append([column.replace("_", " "), value, n, *aucs])
    head = ["group", "value", "items", *(f"{row['features']}, {row['probe']}" for row in rows)]
    return _folded("AUC [95 %] within groups of the test items", table(head, lines)) if lines else ""


def sweep_section(results: dict, rows) -> str:
    """AUC over the size of an input pixel; over the long side where that is unknown."""
    figures = []
    for task, found in results["sweep"].items():
        unit = "mm_per_px" if all(p["mm_per_px"] for p in found) else "long_side"
        lines = {}
        for p in [p for p in found if p["auc"] is not None]:
            lines.setdefault(p["features"], []).append((p[unit], p["auc"], p["low"], p["high"]))
        label = "mm per input pixel" if unit == "mm_per_px" else "long side (px)"
        if lines:
            chart = charts.points(lines, charts.strokes(lines, _baselines(results)), label)
            figures.append(_chart(chart, f"{task}: AUC over the resolution of the input", task))
    about = "One probe on the same items at several input sizes."
    return section("Resolution", paragraph(about), _grid(figures))


def dense_section(results: dict, rows) -> str:
    """Do patch tokens tell lesions from other tissue, and find them: a table a kind of item."""
    parts, found = [], results["dense"]["rows"]
    for unit in dict.fromkeys(row["unit"] for row in found):
        mine, lines = [row for row in found if row["unit"] == unit], []
        for row in mine:
            rates = [estimate(row["sensitivity"][rate] | {"low": None}) for rate in ("1", "2", "4")]
            mm = f"{row['mm_per_px']:.3f}" if row["mm_per_px"] else "-"
            lines.append([
                row["features"], estimate(row["supervised_rank"]), chance(row),
                *(estimate(row[name]) for name in DENSE), *rates, estimate(row["mean_sensitivity"]), mm,
                "; ".join(row["remarks"]),
            ])  # fmt: skip
        first, places = mine[0], "slices" if unit == "volume" else "images"
        parts += [
            f"<h3>{unit.capitalize()}s</h3>",
            paragraph(
                f"{first['lesions']} lesions in {first['images']} {places}; {first['normals']} {unit}s "
                f"without, of {first['normals_at_most']} at most."
            ),
            _figures([*DENSE_HEAD[:3], *DENSE.values(), *DENSE_HEAD[3:]], lines),
        ]
    about = (
        "Patches of a lesion against tissue patches of the same image, mean over images: by a linear probe, "
        "and without labels. Rank: share of the other patches below a lesion's best, beside that of the best "
        "of as many patches that say nothing. Sensitivity: share of lesions found at so many false positives "
        "an image or volume; its mean over 1 to 4 is of those with lesions (of volumes: DBTex's). Left out: "
        f"{results['dense']['counts']['unlocated']} findings whose place is unknown."
    )
    return section("Where lesions are, by patch tokens", paragraph(about), *parts)


def shortcuts_section(results: dict, rows) -> str:
    """What else features tell: a line a probe, features side by side."""
    found = results["shortcuts"]
    names, lines = list(dict.fromkeys(row["features"] for row in found["rows"])), {}
    for row in found["rows"]:
        about = [row["probe"], row["metric"], row["n"], f"{row['chance']:.3f}"]
        line = lines.setdefault(row["probe"], about + ["-"] * len(names))
        line[len(about) + names.index(row["features"])] = estimate(row)
    remarks = {row["features"]: "; ".join(row["remarks"]) for row in found["rows"]}
    if any(remarks.values()):
        lines["remarks"] = ["remarks", "", "", "", *remarks.values()]
    not_asked = "; ".join(f"{probe}: {reason}" for probe, reason in found["not_asked"].items())
    return section(
        "Shortcuts and leakage",
        paragraph(
            "What else the features tell, beside what guessing reaches: why high figures may mislead. "
            f"Asked of the {found['records']} records that test."
        ),
        table(["probe", "metric", "n", "chance", *names], list(lines.values())),
        paragraph(f"Not asked: {not_asked}.") if not_asked else "",
    )  # fmt: skip


def cross_slice_section(results: dict, rows) -> str:
    about = "Cosine of the features of two slices of a volume, less that of slices of two patients."
    chart = _chart(charts.cross_slice(results["cross_slice"]), "likeness of slices over their distance")
    return section("Slices of a volume", paragraph(about), chart)


def retrieval_section(results: dict, rows) -> str:
    """Nearest neighbours of some records: pictures named by what they show, never by patient or file."""
    parts = [paragraph("A query, then the records whose features are most like its own, by cosine.")]
    for encoder in dict.fromkeys(f["encoder"] for f in results["retrieval"] if rows is not None):
        parts.append(f"<h3>{html.escape(encoder)}</h3>")
        for one in [f for f in results["retrieval"] if f["encoder"] == encoder]:
            near = zip(one["near"], one["cosine"], strict=True)
            tiles = [_record(rows, one["query"], "query"), *(_record(rows, i, f"{c:.3f}") for i, c in near)]
            parts.append(f'<div class="tiles sheet">{"".join(tiles)}</div>')
    return section("What the encoders find alike", *parts)


def _record(rows, i: int, what: str) -> str:
    seen = [rows.columns[c][i] for c in ("kind", "laterality", "view")]
    for name, values in rows.labels.items():
        if values[i] >= 0:
            value = dict(enumerate(rows.class_names.get(name, []))).get(values[i], values[i])
            seen.append(f"{name}\N{NO-BREAK SPACE}{value}")
    caption = f"{what}: {', '.join(s for s in seen if s)}"
    return figure(jpeg(strip([rows.image(i)], 220), caption), caption)


def closing_section(results: dict) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    command = " ".join(map(_setting, results["command"].split()))
    marks, about = table(["mark", "meaning"], [list(m) for m in MARKS]), f"Versions: {versions}. Command: "
    said = f'<p class="note">{html.escape(about)}<code>{html.escape(command)}</code></p>'
    return section("How to read this page", marks, paragraph(LEGEND), said)
