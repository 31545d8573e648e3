"""One page about a finished run: what went in, what training did, what the features can do.

    python -m mammodino_jax.report --workdir W --data DIR --results DIR --export DIR --output FILE.html

The page is one file: pictures are inside it, nothing is loaded from elsewhere.
"""

import argparse
import collections
import html
import json
import os
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq

from mammodino_jax import __version__, charts, checkpoint, metrics
from mammodino_jax.data import records
from mammodino_jax.diagnostics import RULES
from mammodino_jax.errors import UserError, run_command
from mammodino_jax.evaluate.features import untrained
from mammodino_jax.evaluate.table import HEAD, LEGEND, cells, tested
from mammodino_jax.page import embed, facts, figure, jpeg, page, paragraph, section, table
from mammodino_jax.pictures import strip
from mammodino_jax.visualize import Picture, choose, default_long_side, pca_tiles

PICTURES = 6
OUTLINE, BOX = (255, 200, 60), (40, 120, 255)  # BGR: tissue mask, finding


def tenths(rows: list[dict], names: tuple[str, ...]) -> tuple[float, float]:
    """Mean over the first and over the last tenth of the logged steps of a sum of metrics."""
    values = np.sum([charts.series(rows, name)[1] for name in names], axis=0)
    tenth = max(1, len(values) // 10)
    return float(values[:tenth].mean()), float(values[-tenth:].mean())


def run_section(config: dict, rows: list[dict], data: Path, vit) -> str:
    """What was trained, on what, and the figures that say whether it went well."""
    index = pq.read_table(
        data / "index.parquet", columns=["kind", "split", "patient_id", "volume_id"]
    ).to_pylist()
    counts = collections.Counter((r["kind"], r["split"]) for r in index)
    kinds = [k for k in records.KINDS if any(kind == k for kind, _ in counts)]
    lines = []
    for kind in kinds:
        mine = [r for r in index if r["kind"] == kind]
        name = "DBT slices" if kind == "dbt" else f"{kind} images"
        if kind == "dbt":
            name += f" (of {len({r['volume_id'] for r in mine})} volumes)"
        lines.append([name, *(counts[kind, s] for s in records.SPLITS), len(mine)])
    by_split = [len({r["patient_id"] for r in index if r["split"] == s}) for s in records.SPLITS]
    lines.append(["patients", *by_split, len({r["patient_id"] for r in index})])

    first, last = tenths(rows, ("dino_global", "dino_local", "ibot"))
    entropy = charts.series(rows, "teacher_entropy")[1]
    speed = float(np.median(charts.series(rows, "time/images_per_s")[1]))
    done, seed = rows[-1]["step"] + 1, config["seed"]
    model = f"width {vit.dim}, {vit.depth} blocks, {vit.heads} heads"
    crops = f"{config['crops']['global_size']} and {config['crops']['local_size']} px crops"
    bad = int(sum(row.get("bad", 0) for row in rows))
    cards = [
        ("Encoder", f"ViT, patch {vit.patch_size}", model),
        ("Steps", f"{done} of {config['steps']}", f"seed {seed}, {bad} not finite"),
        ("Batch", f"{config['batch_size']} images", f"{config['dbt_rows']} of them DBT slice pairs; {crops}"),
        ("Speed", f"{speed:.1f} images/s", "median over the logged steps"),
        (
            "DINO + iBOT terms",
            f"{first:.2f} → {last:.2f}",
            "mean of the first and of the last tenth of steps",
        ),
        (
            "Teacher entropy",
            f"{entropy.min():.2f} to {entropy.max():.2f}",
            "of ln K; 1 is uniform, 0 one prototype",
        ),
    ]
    return section("What was run", facts(cards), table(["records", *records.SPLITS, "all"], lines))


def outlined(picture: Picture, findings: list[dict], height: int = 420) -> np.ndarray:
    """The image, BGR, with the edge of its tissue mask and boxes around its findings."""
    scale = height / picture.image.shape[0]
    size = (max(1, round(picture.image.shape[1] * scale)), height)
    mask = cv2.resize((picture.image > 0).astype(np.uint8), size, interpolation=cv2.INTER_NEAREST)
    image = cv2.cvtColor(cv2.resize(picture.image, size, interpolation=cv2.INTER_AREA), cv2.COLOR_GRAY2BGR)
    contours, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(image, contours, -1, OUTLINE, 1)
    for f in findings:
        corners = [f[k] for k in ("record_x0", "record_y0", "record_x1", "record_y1")]
        if None in corners:
            continue
        x0, y0, x1, y1 = (round(c * scale) for c in corners)
        cv2.rectangle(image, (x0 - 4, y0 - 4), (x1 + 4, y1 + 4), BOX, 1)
    return image


def samples_section(pictures: list[Picture], data: Path) -> str:
    path = data / "findings.parquet"
    findings = pq.read_table(path).to_pylist() if path.is_file() else []
    tiles = []
    for p in pictures:
        mine = [f for f in findings if f["image_id"] == p.row["image_id"]]
        if p.row["volume_id"]:
            mine += [
                f for f in findings
                if f["volume_id"] == p.row["volume_id"] and f["slice_index"] in (None, p.row["slice_index"])
            ]  # fmt: skip
        where = (
            f", slice {p.row['slice_index'] + 1} of {p.row['num_slices']}" if p.row["kind"] == "dbt" else ""
        )
        what = ", ".join(sorted({f["category"] for f in mine if f["category"]})) or "no finding"
        caption = f"{p.row['kind'].upper()} {p.row['laterality'] or ''} {p.row['view'] or ''}{where}: {what}"
        tiles.append(figure(jpeg(outlined(p, mine), caption), caption))
    return section(
        "Images as training reads them",
        paragraph(
            "Cropped to the tissue, background exactly 0, chest wall on the left. Blue: edge of the tissue "
            "mask. Orange: findings known to the data set."
        ),
        f'<div class="tiles">{"".join(tiles)}</div>',
    )


def batch_section(samples: Path, dbt_rows: int) -> str:
    """The pictures of the first batch."""
    crops = embed((samples / "crops.png").read_bytes(), "png", "crops with masked patches")
    figures = figure(crops, "A row an image: two global views, masked patches tinted, then local views.")
    if dbt_rows and (samples / "pairs.png").is_file():
        pairs = embed((samples / "pairs.png").read_bytes(), "png", "slice pairs")
        figures += figure(
            pairs, "DINO-adj: two slices of a volume in one window; student left, teacher right."
        )
    return section("First training batch", f'<div class="side">{figures}</div>')


def warnings_section(rows: list[dict]) -> str:
    """What the run's diagnostics warned of (diagnostics.RULES), in the order it began."""
    lines = []
    for rule in RULES:
        held = [row["step"] for row in rows if f"warning/{rule.name}" in row]
        if held:
            lines.append([rule.name, held[0], held[-1], rule.means, rule.advice])
    if not lines:
        return section("Warnings", paragraph("None: no signature of a known failure held at a logged step."))
    head = ["warning", "first step", "last step", "what it means", "what to try"]
    return section("Warnings", table(head, sorted(lines, key=lambda line: line[1])))


def counters_section(rows: list[dict]) -> str:
    """Counters of the input pipeline, averaged over the logged steps."""

    def mean(name: str) -> float:
        values = charts.series(rows, f"data/{name}")[1]
        return float(values.mean()) if len(values) else float("nan")

    def text(value: float, share: bool = True) -> str:
        return "-" if np.isnan(value) else f"{100 * value:.1f} %" if share else f"{value:.2f}"

    lines = []
    for kind in ("global", "local", "adjacent"):
        shares = [text(mean(f"{kind}_{m}")) for m in ("coverage", "would_reject", "fallback")]
        lines.append([f"{kind} views", *shares, text(mean(f"{kind}_mm_per_px"), share=False)])
    head = ["", "tissue in the crop", "unconstrained draws rejected", "fall-backs (flagged)", "mm per pixel"]
    return section(
        "Where the crops fell",
        table([*head], lines),
        paragraph(
            f"Masked patches hold {text(mean('mask_coverage'))} tissue; DINOv2's masks would hold "
            f"{text(mean('plain_mask_coverage'))}. {text(mean('masked_share'))} of the tissue patches of a "
            "masked view are masked. Means over the logged steps."
        ),
    )


def pca_section(encoder, pictures: list[Picture]) -> str:
    long_side = default_long_side(encoder)
    columns = [pca_tiles(e, pictures, long_side) for e in (encoder, untrained(encoder))]
    strips = [strip([p.image, *tiles], 400) for p, *tiles in zip(pictures, *columns, strict=True)]
    figures = "".join(figure(jpeg(s, "image, trained, random")) for s in strips)
    return section(
        "What the patch tokens see",
        paragraph(
            "Each trio: the image, patch tokens of the trained encoder, and those of the same architecture "
            "with random weights. Colours are the first three principal components over the tissue of all "
            f"images shown ({long_side} px, a patch is {encoder.vit.patch_size} px): equal colours are alike "
            "to the encoder."
        ),
        f'<div class="tiles">{figures}</div>',
    )


def probes_section(results: dict) -> str:
    settings = results["settings"]
    folds = settings["folds"]
    split = f"{folds}-fold cross-validation by patient" if folds else "the data set's own split by patient"
    parts = [
        paragraph(
            f"Frozen features, {split}. Dots: AUC (hollow kNN, full linear probe); bars: 95 % interval from "
            f"{settings['draws']} draws of test patients. Macro one-vs-rest where there are more than two "
            f"classes. Hand-made features are the bar to clear, random weights the floor. {LEGEND}"
        ),
        embed(charts.probes(results), "svg+xml", "AUC by task, features and probe"),
    ]
    baselines = ("majority class", "hand-made")
    for task in results["tasks"]:
        rows = task["rows"]
        marked = {i for i, r in enumerate(rows) if not r["features"].startswith(("random init", *baselines))}
        parts += [
            f"<h3>{html.escape(task['task'])}</h3>",
            table(HEAD, list(map(cells, rows)), marked),
            paragraph(tested(task)),
        ]
    return section("What the features can do", *parts)


def artefacts_section(places: dict[str, Path], output: Path) -> str:
    """Paths relative to the page."""
    rows = []
    for what, path in places.items():
        relative = os.path.relpath(path, output.parent)
        rows.append(f"<tr><td>{html.escape(what)}</td><td><code>{html.escape(relative)}</code></td></tr>")
    return section(
        "Where it lies",
        paragraph("Paths are relative to this page."),
        f'<div class="wide"><table>{"".join(rows)}</table></div>',
    )


def read_inputs(workdir: Path, data: Path, results: Path, export: Path) -> tuple[dict, list[dict], dict]:
    """Config, metrics rows and evaluation results.

    Raises:
      UserError: a file that the page needs is not there.
    """
    records.read_prep(data)
    needed = {
        workdir / "config.json": "train first: python main.py",
        workdir / "metrics.jsonl": "train first: python main.py",
        workdir / "samples/crops.png": "train first: python main.py",
        results / "results.json": "run first: python -m mammodino_jax.evaluate",
        export: "run first: python -m mammodino_jax.export",
    }
    for path, remedy in needed.items():
        if not path.exists():
            raise UserError(f"{path} does not exist; {remedy}")
    rows = metrics.read(workdir / "metrics.jsonl")
    if not rows:
        raise UserError(f"{workdir / 'metrics.jsonl'} has no rows; train first: python main.py")
    config, evaluation = (
        json.loads(p.read_text()) for p in (workdir / "config.json", results / "results.json")
    )
    return config, rows, evaluation


def build(encoder, workdir: Path, data: Path, results: Path, export: Path, output: Path) -> str:
    """The page as HTML. `encoder` is the trained one; the other arguments are those of the command line."""
    config, rows, evaluation = read_inputs(workdir, data, results, export)
    pictures = choose(data, PICTURES)
    places = {
        "training workdir (metrics.jsonl, TensorBoard events)": workdir,
        "exported encoder": export,
        "data set (shards and index)": data,
        "evaluation (every number, setting and version)": results / "results.json",
    }
    finished = checkpoint.steps(workdir / "checkpoints")
    if finished:
        places["newest checkpoint"] = workdir / "checkpoints" / str(finished[-1])
    body = [
        "<h1>MammoDINO in JAX: report of a run</h1>",
        paragraph(
            "Self-supervised pretraining of a vision transformer on mammograms, from image files to an "
            "exported encoder.", "lead",
        ),
        f'<section class="banner"><p><strong>{html.escape(evaluation["title"])}.</strong> '
        f"{html.escape(evaluation['note'])}</p><p>An independent, unofficial implementation, not affiliated "
        "with the authors of MammoDINO. For research only; not a medical device.</p></section>",
        run_section(config, rows, data, encoder.vit),
        samples_section(pictures, data),
        batch_section(workdir / "samples", config["dbt_rows"]),
        section("How training went", embed(charts.training(rows), "svg+xml", "loss terms, entropy, lr")),
        warnings_section(rows),
        counters_section(rows),
        pca_section(encoder, pictures),
        probes_section(evaluation),
        artefacts_section(places, output),
        paragraph(f"mammodino-jax {__version__}"),
    ]  # fmt: skip
    return page("MammoDINO report", body)


def main(argv=None) -> None:
    parser = argparse.ArgumentParser("python -m mammodino_jax.report", description=__doc__.splitlines()[0])
    for name, what in (
        ("workdir", "training workdir"),
        ("data", "built data set"),
        ("results", "output of evaluate"),
        ("export", "exported encoder"),
        ("output", "the page, FILE.html"),
    ):
        parser.add_argument(f"--{name}", required=True, type=Path, help=what)
    args = parser.parse_args(argv)
    read_inputs(args.workdir, args.data, args.results, args.export)  # before jax and weights are loaded
    from mammodino_jax.encoder import load_encoder

    page = build(load_encoder(str(args.workdir)), **vars(args))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(page, encoding="utf-8")
    print(f"report: {args.output}")


if __name__ == "__main__":
    run_command(main)
