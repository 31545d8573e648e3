"""What the quality report measures on sampled records and re-read files, and the sections that show it."""

import collections

import cv2
import numpy as np
from tqdm import tqdm

from data_prep.mask import find_tissue
from data_prep.pectoral import pectoral_share
from mammodino_jax import charts
from mammodino_jax.data import crops
from mammodino_jax.page import embed, figure, paragraph, section, table

CROPPED, DRAWS = 200, 20  # records that crops are drawn on, crops of each kind on each
RHOS, TAUS = np.arange(3, 10) / 10, np.arange(20, 81, 10)
DENSITIES = ("label_density", "label_fgd")


def measure(chosen: list[dict], settings: dict, seed: int) -> list[dict]:
    """Mean grey of the tissue, solidity of the mask, pectoral share and crops of sampled records."""
    measured = []
    for number, item in enumerate(tqdm(chosen, desc="records", unit="image", mininterval=1)):
        image = item["shards"].read(item["place"])
        small = cv2.resize(image, None, fx=0.25, fy=0.25, interpolation=cv2.INTER_NEAREST) > 0
        outline = cv2.findNonZero(small.astype(np.uint8))
        hull = 0.0 if outline is None else cv2.contourArea(cv2.convexHull(outline))
        mlo = item["view"] == "MLO" and settings["flip"] == "chest_wall"
        found = {"mean": float(image[image > 0].mean()), "solidity": float(small.sum()) / max(1.0, hull)}
        found |= {"mlo": mlo, "pectoral": pectoral_share(image) if mlo else None}
        cropped = number < CROPPED
        measured.append(item | found | ({"crops": crop_coverage(image > 0, seed, number)} if cropped else {}))
    return measured


def crop_coverage(mask: np.ndarray, seed: int, number: int) -> dict[str, np.ndarray]:
    """Tissue share of DRAWS unconstrained crops of each kind, by the law that training draws from, and the
    most that a window of each global crop's size can have: f64 [DRAWS] each."""
    integral, config = crops.integral_image(mask), crops.CropConfig()
    shares = collections.defaultdict(list)
    for draw in range(DRAWS):
        for purpose, kind in enumerate(("global", "local")):
            rng = crops.random_generator(seed, number * DRAWS + draw, purpose)
            scale = getattr(config, f"{kind}_scale")
            window = crops.draw_window(integral, scale, config.ratio, 0.0, 0.0, rng)  # rho 0 takes any place
            shares[kind].append(window.coverage)
            if kind == "global":
                h, w = window.height, window.width
                shares["best"].append(crops.tissue_map(integral, h, w).max() / (h * w))
    return {kind: np.array(values) for kind, values in shares.items()}


def tau_curve(shown: np.ndarray, robust: np.ndarray) -> np.ndarray:
    """Of the paper's mask by tau: its share of the frame, and its Dice against the robust mask."""
    masks = [find_tissue(shown, recipe="percentile", tau=float(tau)).mask for tau in TAUS]
    dice = [2 * (mask & robust).sum() / max(1, mask.sum() + robust.sum()) for mask in masks]
    return np.array([[mask.mean() for mask in masks], dice])


def class_name(meaning: dict, value: int) -> str:
    classes = meaning.get("classes") or []
    return str(classes[value]) if 0 <= value < len(classes) else str(value)


def distributions_section(items: list[dict], measured: list[dict], labels: dict) -> str:
    density = next((name for name in DENSITIES if name in labels), None)

    def groups(rows: list[dict], value: str, by: str) -> dict[str, list[float]]:
        found = collections.defaultdict(list)
        for row in sorted(rows, key=lambda r: (r[by] is None, r[by])):
            if row[value] is not None:
                name = row[by] if by != density else "unknown" if row[by] is None else None
                found[name or class_name(labels[by], row[by])].append(row[value])
        return dict(found)

    panels = {}
    for by, title in (("vendor", "vendor"), *([(density, "density")] if density else [])):
        panels[f"Coverage of the record, by {title}"] = groups(items, "coverage", by)
        panels[f"Mean grey of the tissue, by {title}"] = groups(measured, "mean", by)
    spacing = groups(items, "pixel_mm", "vendor")
    if spacing:
        panels["Millimetres per pixel of the record, by vendor"] = spacing
    unknown = sum(item["pixel_mm"] is None for item in items)
    text = (
        "Box: quartiles and median; line: 5 % to 95 %; in brackets the images. Coverage is the tissue share "
        f"of the record. Grey is of the 8-bit record, over {len(measured)} sampled images. Vendors far apart "
        f"would be told apart by an encoder. The pixel size is unknown of {unknown} images."
    )
    return section("Distributions", paragraph(text), figure(embed(charts.boxes(panels), "svg+xml", text)))


def pectoral_section(measured: list[dict]) -> str:
    title, mlo = "Pectoral muscle", [item for item in measured if item["mlo"]]
    if not mlo:
        return section(title, paragraph("No MLO view with its chest wall at left among the sampled records."))
    found = collections.defaultdict(list)
    for item in sorted(mlo, key=lambda item: item["vendor"]):
        if item["pectoral"] is not None:
            found[item["vendor"]].append(item["pectoral"])
    clear = sum(map(len, found.values()))
    text = (
        "The muscle is kept in the records, as in the paper; this only says how much of the tissue it is. It "
        f"is an estimate: the best straight border of a bright wedge in the upper corner, found in {clear} "
        f"of {len(mlo)} sampled MLO records (none over 35 % is taken). On film (mini-MIAS) about one border "
        "in ten was visibly wrong when we looked at 120; a dense breast can be taken for muscle. Do not read "
        "it for a single image."
    )
    if not found:
        return section(title, paragraph(text))
    chart = charts.boxes({"Share of the tissue, by vendor": dict(found)})
    return section(title, paragraph(text), figure(embed(chart, "svg+xml", "pectoral share by vendor")))


def crop_rates(measured: list[dict]) -> np.ndarray:
    """f64 [len(RHOS), 4]: share of unconstrained global crops below rho, of local ones, of global sizes of
    which no position reaches rho, and of images where none of the drawn global sizes has one."""
    cropped = [item["crops"] for item in measured if "crops" in item]
    stack = {kind: np.stack([c[kind] for c in cropped]) for kind in ("global", "local", "best")}
    rates = []
    for rho in RHOS:
        below = {kind: shares < rho for kind, shares in stack.items()}
        rates.append([below[k].mean() for k in ("global", "local", "best")] + [below["best"].all(1).mean()])
    return np.array(rates)


def crops_section(measured: list[dict], settings: dict) -> str:
    rates = crop_rates(measured)
    default = crops.CropConfig().rho("global", full=settings["box"] == "full")
    at = int(np.abs(RHOS - default).argmin())
    head = ["rho", "global crops rejected", "local crops rejected", "global sizes without a place",
            "images without any global place"]  # fmt: skip
    rows = [[f"{rho:.1f}", *(f"{rate:.1%}" for rate in line)] for rho, line in zip(RHOS, rates, strict=True)]
    lines = {name.removesuffix(" rejected"): rates[None, :, i] for i, name in enumerate(head[1:3])}
    lines["no place for the size"] = rates[None, :, 2]
    chart = charts.curves(lines, RHOS, "rho: least tissue share of a crop", default)
    text = (
        f"If crops were drawn without regard to tissue (DINOv2's sizes, {DRAWS} of each kind on each of "
        f"{min(CROPPED, len(measured))} sampled records), this share would have less tissue than rho. The "
        f"training configs take {default:g} for records like these (box {settings['box']}; marked). Where no "
        "position of a size reaches rho, training takes the one with the most tissue and counts it."
    )
    warning = ""
    if rates[at, 0] < crops.NOTHING:
        share = f"{rates[at, 0]:.1%} of the global crops would be rejected at rho {default:g}"
        warning = paragraph(f"Only {share}: the term does nothing on this data set.", "warn")
    picture = figure(embed(chart, "svg+xml", "share of rejected crops by rho"))
    return section("Crops", paragraph(text), warning, table(head, rows, {at}), picture)


def tau_section(taus: np.ndarray) -> str:
    title = "The paper's percentile mask"
    if not len(taus):
        return section(title, paragraph("Not computed: no source file could be read again."))
    share, dice = taus[:, 0], taus[:, 1]
    text = (
        "The paper takes the pixels above a percentile tau of the frame for tissue; it does not give tau. "
        f"Over {len(taus)} images re-read from their files: the share of the frame that this takes, and its "
        "Dice against the robust mask (line: median; band: 10 % to 90 %; dashed: tau 60, our guess). A fixed "
        "percentile takes the same share of every frame, whatever the size of the breast, but for a "
        "background that is constant."
    )
    lines = {"share of the frame": share, "Dice against robust": dice}
    rows = [[tau, f"{np.median(s):.0%}", f"{np.median(d):.2f}", f"{np.percentile(d, 10):.2f}"]
            for tau, s, d in zip(TAUS, share.T, dice.T, strict=True)]  # fmt: skip
    chart = charts.curves(lines, TAUS, "tau (percentile of the frame)", 60)
    head = ["tau", "share of the frame (median)", "Dice (median)", "Dice (10th percentile)"]
    picture = figure(embed(chart, "svg+xml", "percentile mask by tau"))
    return section(title, paragraph(text), table(head, rows), picture)
