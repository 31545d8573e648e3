"""One page on the quality of a built data set, for a look by a radiologist: python -m data_prep report DIR.

The page is one file and names images by the first digits of their image_id only. Its pictures are drawn from
the source files, which may show burned-in text: by default it lies in DIR.local/, which is not for sharing.
A tomosynthesis volume counts once, by its middle slice, wherever the text says "images".
"""

import collections
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm

from data_prep import measures, sheets
from data_prep.mask import find_tissue
from data_prep.merge import local_folder
from data_prep.reject import REASONS
from data_prep.sheets import Sources
from mammodino_jax.data import records
from mammodino_jax.data.index import open_split
from mammodino_jax.errors import UserError
from mammodino_jax.page import facts, page, paragraph, section, table

LEAD = (
    "Look at the contact sheets first: they are the masks that training will trust. This page shows pictures "
    "of the source files, which may hold burned-in text: keep it beside the data, it is not for sharing. "
    "Images are named by the first eight digits of their id."
)
MEASURED, TAU_IMAGES = 400, 24  # records read; images re-read for the sensitivity to tau
_COLUMNS = (
    "image_id", "patient_id", "volume_id", "dataset", "kind", "laterality", "view", "manufacturer",
    "slice_index", "num_slices", "pixel_mm", "height", "width", "box_y0", "box_x0", "box_y1", "box_x1",
    "coverage", "duplicate_of", "flags",
)  # fmt: skip
FLAGS = {
    "mask_suspect": "The mask's area or outline is unlike a breast, or a second method disagrees.",
    "marker": "A metal marker or another small saturated object inside the breast; left out of the window.",
    "implant": "An implant, by the header or by a large saturated area.",
    "stereo": "Taken for biopsy guidance, not for screening.",
    "lossy": "The file was compressed with loss before it came here.",
    "laterality_conflict": "Header, table and pixels disagree on the side; the pixels decide.",
    "view_conflict": "Parts of the header name different views; the most reliable one counts.",
    "text_on_tissue": "A label touched the skin and was taken out of the mask.",
    "window_fallback": "The header has no usable window; tissue percentiles were taken.",
    "decoder_fallback": "The first decoder failed or gave nonsense; another one read it.",
    "upside_down": "The stored image was turned by 180 degrees.",
    "burned_in": "The header says that text is burned into the pixels; it may identify the patient.",
}


def write_report(folder: Path, output: Path | None = None, samples: int = 24, seed: int = 0) -> Path:
    """Write the page.

    Args:
      folder: a built data set.
      output: the file; None: DIR.local/report.html.
      samples: tiles on the random contact sheet; the others have half of it at most.
      seed: of all draws; the same seed and files give the same page.

    Raises:
      UserError: `folder` is no built data set, or the output would lie in it, where it would be shared.
    """
    prep = records.read_prep(folder)
    if "rejects" not in prep:
        raise UserError(
            f"{folder} was built by an earlier version; build it again with: python -m data_prep build"
        )
    output = local_folder(folder) / "report.html" if output is None else Path(output)
    if output.is_dir():
        raise UserError(f"output {output} is a folder; name a file")
    if output.resolve().is_relative_to(Path(folder).resolve()):
        raise UserError(f"output {output} lies in the data set; pictures of source files may not be shared")
    rng = np.random.default_rng(seed)
    items, slices, labels = read_items(folder)
    chosen = [items[i] for i in np.sort(rng.permutation(len(items))[:MEASURED])]
    measured = measures.measure(chosen, prep["settings"], seed)
    pictures, taus = sheets_section(folder, prep, items, slices, measured, samples, rng)
    parts = [
        f"<h1>Data set report</h1>{paragraph(LEAD, 'lead')}",
        overview(prep, items, slices),
        counts_section(items, labels),
        rejects_section(prep),
        pictures,
        measures.distributions_section(items, measured, labels),
        measures.pectoral_section(measured),
        measures.crops_section(measured, prep["settings"]),
        measures.tau_section(taus),
    ]
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(page("Data set report", parts), encoding="utf-8")
    return output


def read_items(folder: Path) -> tuple[list[dict], pa.Table, dict]:
    """(a dict an image or volume with `vendor`, `area`, `shards` and `place`; image_id, volume_id and
    slice_index of every record; labels.json)."""
    path = Path(folder) / "labels.json"
    labels = json.loads(path.read_text()) if path.is_file() else {}
    items, slices = [], []
    for split in [s for s in records.SPLITS if records.shard_paths(folder, s)]:
        shards, rows = open_split(folder, split, [*_COLUMNS, *labels])
        slices.append(rows.select(["image_id", "volume_id", "slice_index"]))
        rows = rows.append_column("place", pa.array(np.arange(len(rows))))
        middle = pc.equal(rows["slice_index"], pc.cast(pc.divide(rows["num_slices"], 2), pa.int32()))
        for row in rows.filter(pc.fill_null(middle, True)).to_pylist():  # null: not a slice
            items.append(row | {"shards": shards, "vendor": row["manufacturer"] or "unknown vendor"})
    in_mm = all(item["pixel_mm"] for item in items)
    for item in items:  # cm²; where that is unknown of some, source pixels of all, to sort by
        box = (item["box_y1"] - item["box_y0"]) * (item["box_x1"] - item["box_x0"])
        real = item["height"] * item["width"] * (item["pixel_mm"] or 0) ** 2 / 100
        item |= {"area": item["coverage"] * (real if in_mm else box), "cm2": in_mm}
    return items, pa.concat_tables(slices), labels


def overview(prep: dict, items: list[dict], slices: pa.Table) -> str:
    counts, settings = prep["counts"], prep["settings"]
    suspect = sum("mask_suspect" in item["flags"] for item in items)
    volumes = sum(item["volume_id"] is not None for item in items)
    repeated = sum(item["duplicate_of"] is not None for item in items)
    size = f"long side {settings['long_side']} px"
    if settings["size"]:
        size = " x ".join(map(str, settings["size"])) + f" px, {settings['fit']}"
    elif settings["mm_per_px"]:
        size = f"{settings['mm_per_px']:g} mm per pixel"
    tau = f", tau {settings['tau']:g}" if settings["mask"] == "percentile" else ""
    cards = [
        ("Records", f"{len(slices)}", f"{repeated} with the pixels of another one"),
        ("Images", f"{len(items)}", f"{volumes} of them tomosynthesis volumes"),
        ("Patients", f"{len({item['patient_id'] for item in items})}", "by pseudonym"),
        ("Rejected", f"{counts['rejects']}", f"of {counts['inputs']} input files; reasons below"),
        ("Mask suspect", f"{suspect / len(items):.1%}", f"{suspect} of {len(items)} images; shown below"),
        ("Preset", settings["preset"], f"box {settings['box']}, {size}"),
        ("Mask", settings["mask"] + tau, "robust: ours; percentile: the paper's; none: the whole frame"),
        ("Window", settings["window"], f"CLAHE {settings['clahe'] or 'off'}"),
    ]
    terms = [[dataset, text] for dataset, text in sorted(prep["terms"].items())]
    return section("At a glance", facts(cards), table(["data set", "terms of use"], terms))


def counts_section(items: list[dict], labels: dict) -> str:
    def count(title: str, key) -> str:
        groups = collections.defaultdict(list)
        for item in items:
            groups[key(item)].append(item)
        rows = []
        for name, own in sorted(groups.items(), key=lambda g: (-len(g[1]), g[0])):
            patients = len({item["patient_id"] for item in own})
            rows.append([name, sum(item["num_slices"] or 1 for item in own), len(own), patients])
        return f"<div>{table([title, 'records', 'images', 'patients'], rows)}</div>"

    def side(item: dict) -> str:
        return f"{item['view'] or 'view unknown'} {item['laterality'] or 'side unknown'}"

    names = {"data set": "dataset", "kind": "kind", "vendor": "vendor", "split": "split"}
    tables = [count(title, lambda item, name=name: item[name]) for title, name in names.items()]
    tables.append(count("view and side", side))
    flagged = collections.Counter(flag for item in items for flag in item["flags"])
    flags = []
    for flag in [*FLAGS, *sorted(flagged.keys() - FLAGS)]:
        flags.append([flag, flagged[flag], f"{flagged[flag] / len(items):.1%}", FLAGS.get(flag, "")])
    rows = []
    for name, meaning in labels.items():
        found = collections.Counter(item[name] for item in items)
        unknown = found.pop(None, 0)
        shown = [f"{measures.class_name(meaning, value)}: {found[value]}" for value in sorted(found)]
        rule = f"{meaning.get('rule') or ''} (by {meaning.get('level')})"
        rows.append([name.removeprefix("label_"), ", ".join(shown) or "none known", unknown, rule])
    about = "A volume is one image of several records." if any(i["volume_id"] for i in items) else ""
    return section(
        "What is in it", paragraph(about) if about else "", f'<div class="grid">{"".join(tables)}</div>',
        "<h3>Flags</h3>", table(["flag", "images", "share", "meaning"], flags), "<h3>Labels</h3>",
        table(["label", "images of each class", "unknown", "rule"], rows) if rows else paragraph("None."),
    )  # fmt: skip


def rejects_section(prep: dict) -> str:
    codes, title = prep["rejects"], "What was rejected"
    if not codes:
        return section(title, paragraph("Nothing: every input file became a record."))
    by_count = sorted(codes.items(), key=lambda pair: -pair[1])
    rows = [[code, count, REASONS.get(code, "")] for code, count in by_count]
    return section(title, table(["reason", "files", "meaning"], rows))


def sheets_section(folder, prep, items, slices, measured, samples: int, rng) -> tuple[str, np.ndarray]:
    """(contact sheets, `measures.tau_curve` of the random ones that could be read again: f64 [n, 2, tau])"""
    solidity = {item["image_id"]: item["solidity"] for item in measured}
    groups = sheets.choose_groups(items, solidity, samples, rng)
    shown = {item["image_id"]: item for own in groups.values() for item in own}
    sources = Sources(folder, slices, prep["settings"], list(shown.values()))
    tiles, fell_back, taus, robust_used = {}, 0, [], prep["settings"]["mask"] == "robust"
    first = {item["image_id"] for item in groups["Random"][:TAU_IMAGES]}
    for image_id, item in tqdm(shown.items(), desc="pictures", unit="image", mininterval=1):
        found = sources.read(item)
        if found is None:
            picture = sheets.draw_record(item["shards"].read(item["place"]))
        else:
            picture = sheets.draw_source(found)
            if image_id in first:
                robust = found.tissue.mask if robust_used else find_tissue(found.shown).mask
                taus.append(measures.tau_curve(found.shown, robust))
        fell_back += found is None
        tiles[image_id] = sheets.tile(item, picture, found is None)
    text = (
        "Yellow: outline of the tissue mask. Blue: the part of the frame that became the record. Dark greys "
        "are lifted so that the skin shows. Look for skin that is cut off, and for labels, film edges or air "
        "taken for tissue."
    )
    note = "All pictures are drawn from the source files."
    if fell_back:
        note = (
            f"{fell_back} of {len(shown)} images are drawn from the record (cropped; outline: border of its "
            "tissue): the source file is not reachable, has changed, or this version reads it in another way."
        )
    body = [paragraph(text), paragraph(note), sheets.filter_bar(list(shown.values()))]
    for name, own in groups.items():
        body.append(f"<h3>{name} ({len(own)})</h3>")
        drawn = "".join(tiles[item["image_id"]] for item in own)
        body.append(f'<div class="tiles sheet">{drawn}</div>' if own else paragraph("None in this data set."))
    return section("Contact sheets", *body, sheets.FILTER), np.array(taus)
