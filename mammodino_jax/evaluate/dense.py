"""Dense probe: do patch features tell lesions from the tissue around them, and find them in the image?

k lesions, n units (an image, or a tomosynthesis volume), c candidates, D width, W bootstrap draws, gh x gw
patches. Boxes are (y0, x0, y1, x1). A patch is tissue where half of it or more is. Builds differ in crop,
scale and mirroring: distances are in pixels of the source file, and tissue is one build's for all encoders.
"""

import collections
import dataclasses
import functools
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from scipy.ndimage import binary_dilation
from scipy.special import expit
from sklearn.linear_model import LogisticRegression

from mammodino_jax.data.crops import box_coverage, integral_image
from mammodino_jax.data.records import read_prep
from mammodino_jax.evaluate import intervals
from mammodino_jax.evaluate.features import mm_per_px, patch_grids
from mammodino_jax.evaluate.froc import RATES, froc, peaks, suppress
from mammodino_jax.evaluate.metrics import auc

UNITS = ("image", "volume")
PATCHES = 256  # of lesions, and of tissue, that an image gives to the fit; tests use all
FIT = 100_000  # patches in a fit
STRENGTHS = (1e-5, 1e-3, 1e-1)  # C = 1 / L2, chosen by the AUC within validation images
NORMALS = {"image": 1000, "volume": 100}  # tested units without a lesion, at most
CLEAR = ("cancer", "cancer_biopsy", "suspicious_birads45", "suspicious_birads5")  # labels of a unit without
WINDOW = 0.15  # of the height: how far from its own place a patch may look like one of the other breast
SUPPRESS = 0.05  # of the tissue's long side: candidates closer than this to a better one are dropped
DBT_REACH, DBT_DEPTH = 100, 1 / 4  # DBTex's rule: source px, and share of the volume's slices
HELD = 256  # records whose patches may be in memory at once


@dataclasses.dataclass(frozen=True)
class Lesions:
    """Located findings, one for each different box of a record.

    Attributes:
      record: i64 [k], place in the rows.
      box: f64 [k, 4], in pixels of the record, beyond which it may reach.
      unlocated: i64, a record of each finding whose box or slice is unknown.
      elsewhere: number of findings of records that are not in use.
    """

    record: np.ndarray
    box: np.ndarray
    unlocated: np.ndarray
    elsewhere: int


def lesions(rows) -> Lesions:
    """Read findings.parquet of every folder, as far as there is one."""
    ids = [rows.columns[name] for name in ("image_id", "volume_id", "slice_index")]
    located, unlocated, elsewhere = [], [], 0
    for number, folder in enumerate(rows.folders):
        path = Path(folder) / "findings.parquet"
        if not path.is_file():
            continue
        by_image, by_slice, by_volume = {}, {}, {}
        for i in np.flatnonzero(rows.source == number):
            image, volume, index = (column[i] for column in ids)
            by_image[image] = i
            if volume is not None:
                by_slice[volume, index] = i
                by_volume.setdefault(volume, i)
        for f in pq.read_table(path).to_pylist():
            box = [f[f"record_{name}"] for name in ("y0", "x0", "y1", "x1")]
            i = by_image.get(f["image_id"], by_slice.get((f["volume_id"], f["slice_index"])))
            if i is not None and None not in box:
                located.append((i, *box))
            elif (i := by_volume.get(f["volume_id"]) if i is None else i) is not None:
                unlocated.append(i)
            else:
                elsewhere += 1
    # a box with two categories is two findings and one lesion
    located = np.unique(np.array(located, np.float64).reshape(-1, 5), axis=0)
    return Lesions(located[:, 0].astype(np.int64), located[:, 1:], np.array(unlocated, np.int64), elsewhere)


@dataclasses.dataclass(frozen=True)
class GreyPatches:
    """What an encoder has to beat: mean and deviation of the grey levels of each patch; no learnt weights."""

    patch_size: int = 14
    long_side: int = 1036
    name: str = "grey level of patches"
    dim: int = 3
    vit: None = None
    fingerprint: str = "grey patches 1"

    def __call__(self, images, sizes=None) -> dict[str, np.ndarray]:
        """u8 [B, H, W] -> {"patches": f32 [B, N, 3]}; the third is constant, so that cosines see levels."""
        B, H, W = images.shape
        p = self.patch_size
        cells = np.float32(images).reshape(B, H // p, p, W // p, p) / 255
        mean, deviation = cells.mean((2, 4)), cells.std((2, 4))
        return {"patches": np.stack([mean, deviation, np.ones_like(mean)], axis=-1).reshape(B, -1, 3)}


def to_source(rows, i: int) -> tuple[np.ndarray, np.ndarray]:
    """Where a record's pixels lie in the source file: it is at offset + scale * record, f64 [2] (y, x) each.

    The scales of y and x may differ; that of a mirrored axis is negative.
    """
    c = rows.columns
    low, high = (np.array([c[f"box_{axis}{end}"][i] for axis in "yx"]) for end in "01")
    scale = (high - low) / (c["height"][i], c["width"][i])
    mirrored = np.array(["upside_down" in (c["flags"][i] or ()), bool(c["flipped"][i])])
    return np.where(mirrored, high, low), np.where(mirrored, -scale, scale)


def tissue_share(mask, y_edges, x_edges) -> np.ndarray:
    """Share of each cell of a grid that a mask bool [H, W] covers, [gh, gw].

    Edges are in its pixels; they may descend, and lie beyond it.
    """
    inside = [np.clip(edges, 0, n) for edges, n in zip((y_edges, x_edges), mask.shape, strict=True)]
    return box_coverage(integral_image(mask), *inside) / np.outer(np.diff(y_edges), np.diff(x_edges))


def grids(rows, reference, encoder, long_side: int, batch_size: int, places):
    """`patch_grids`, with the tissue of the masks of a reference build of the same files.

    In a build without masks all is tissue, and air would be easy to tell from lesions.

    Yields:
      the place, tokens f16 [gh, gw, D], tissue share of each patch, their centres (y [gh], x [gw]) in heights
      of the reference's record, and the side of a patch in px of the record that was read.
    """
    for i, tokens, tissue, scale in patch_grids(rows, places, encoder, long_side, batch_size):
        side = encoder.patch_size / scale
        edges = [np.arange(n + 1) * side for n in tissue.shape]
        if rows is not reference:
            (offset, px), (start, reference_px) = to_source(rows, i), to_source(reference, i)
            edges = [(offset[a] + px[a] * e - start[a]) / reference_px[a] for a, e in enumerate(edges)]
            tissue = tissue_share(reference.image(i) > 0, *edges)
        centres = [(e[1:] + e[:-1]) / 2 / reference.columns["height"][i] for e in edges]
        yield i, tokens, tissue, centres, side


def patch_labels(box_k4, tissue) -> tuple[np.ndarray, np.ndarray]:
    """Which patches are lesion, and which are tissue apart from lesions.

    Lesion: tissue of which a box covers half or more, or that holds half or more of a box smaller than a
    patch; the centre's patch where there is none. Between both lies a margin of one patch that is neither.

    Args:
      box_k4: in patches.
      tissue: share of each patch, [gh, gw].

    Returns:
      bool [gh, gw] each.
    """
    inside = tissue >= 0.5
    lesion, touched = np.zeros_like(inside), np.zeros_like(inside)
    for y0, x0, y1, x1 in box_k4:
        cover = np.outer(_overlap(y0, y1, len(tissue)), _overlap(x0, x1, tissue.shape[1]))
        own = (cover >= min(1, max((y1 - y0) * (x1 - x0), 1e-9)) / 2) & inside
        centre = int((y0 + y1) // 2), int((x0 + x1) // 2)
        if not own.any() and all(0 <= c < s for c, s in zip(centre, tissue.shape, strict=True)):
            own[centre] = tissue[centre] > 0
        lesion |= own
        touched |= own | (cover > 0)
    return lesion, inside & ~binary_dilation(touched, np.ones((3, 3)))


def _overlap(low: float, high: float, count: int) -> np.ndarray:
    edges = np.arange(count + 1)
    return np.clip(np.minimum(edges[1:], high) - np.maximum(edges[:-1], low), 0, None)


def within_image(score, lesion, tissue) -> tuple[float, float]:
    """AUC of lesion against tissue patches, and the percentile of the best lesion patch among the latter.

    NaN where there are none of either.
    """
    if not lesion.any() or not tissue.any():
        return float("nan"), float("nan")
    positive, negative = score[lesion], score[tissue]
    area = auc(np.r_[np.ones(len(positive)), np.zeros(len(negative))], np.r_[positive, negative])[0]
    best = positive.max()
    return float(area), float((negative < best).mean() + (negative == best).mean() / 2)


def left_right(tokens, tissue, centres, other_tokens, other_tissue, other_centres) -> np.ndarray:
    """1 - cosine with the most similar patch around the same place of the other breast: [gh, gw].

    Centres (`grids`) are of records with the chest wall on the left: the place is that of the mirrored
    breast, by height from the upper end and distance from the chest wall. A patch in whose window the other
    breast has no tissue is compared with all of it; 0 where there is no tissue.
    """
    on, on_other = tissue > 0, other_tissue >= 0.5
    (y, x), (other_y, other_x) = (
        [of[at] for of, at in zip(place, np.nonzero(mask), strict=True)]
        for place, mask in ((centres, on), (other_centres, on_other))
    )
    near = (np.abs(y[:, None] - other_y) <= WINDOW) & (np.abs(x[:, None] - other_x) <= WINDOW)
    near |= ~near.any(axis=1, keepdims=True)
    cosine = np.where(near, _unit(tokens[on]) @ _unit(other_tokens[on_other]).T, -1)
    out = np.zeros(tissue.shape)
    out[on] = 1 - cosine.max(axis=1, initial=-1)
    return out


def mean_distance(tokens, tissue) -> np.ndarray:
    """1 - cosine with the mean of the image's tissue patches: [gh, gw]."""
    mean = tokens[tissue >= 0.5].astype(np.float32).mean(axis=0)
    return 1 - _unit(tokens) @ _unit(mean)


def _unit(x) -> np.ndarray:
    x = np.asarray(x, np.float32)
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-6)


def contralateral(rows) -> dict[int, int]:
    """{record: the record of the other breast} in the same view, kind and study; slices at equal depth.

    Where the study is unknown it is the patient's only one.
    """
    names = ("patient_id", "study_id", "kind", "view", "laterality", "slice_index", "num_slices")
    table = list(zip(*(rows.columns[name] for name in names), strict=True))
    depth = [s / max(count - 1, 1) if count == count else 0.0 for *_, s, count in table]
    sides = collections.defaultdict(list)
    for i, (*where, side, _, _) in enumerate(table):
        sides[*where, side].append(i)
    found = {}
    for i, (patient, study, kind, view, side, _, _) in enumerate(table):
        others = sides.get((patient, study, kind, view, {"L": "R", "R": "L"}.get(side, "unknown")))
        if others and view is not None:
            found[i] = min(others, key=lambda j: abs(depth[j] - depth[i]))
    return found


@dataclasses.dataclass
class _Fit:
    """A logistic regression on standardised tokens, as one product with the tokens themselves."""

    weight: np.ndarray  # f32 [D]
    bias: float
    strength: float

    def __call__(self, tokens) -> np.ndarray:
        return tokens.astype(np.float32) @ self.weight + self.bias


def _fit(samples: dict, train, val, seed: int) -> _Fit | None:
    """Choose the L2 by the mean AUC within validation images; without any, the strongest is taken.

    Args:
      samples: {record: (tokens f16 [m, D], lesion bool [m])}.
      train, val: records.

    Returns:
      None where the training part has no lesion.
    """
    parts = [samples[i] for i in train if i in samples]
    if not parts:
        return None
    x, y = (np.concatenate(part) for part in zip(*parts, strict=True))
    kept = np.sort(np.random.default_rng(seed).permutation(len(y))[:FIT])
    x, y = x[kept].astype(np.float32), y[kept]
    mean, deviation = x.mean(axis=0), x.std(axis=0)
    scale = np.where(deviation > 1e-6, 1 / np.maximum(deviation, 1e-6), 0)
    best, found = -1.0, None
    for strength in STRENGTHS:  # ascending: a tie keeps the stronger L2
        model = LogisticRegression(C=strength, class_weight="balanced", max_iter=1000)
        weight = model.fit((x - mean) * scale, y).coef_[0] * scale
        fit = _Fit(weight.astype(np.float32), float(model.intercept_[0] - mean @ weight), strength)
        areas = [auc(lesion, fit(tokens))[0] for tokens, lesion in (samples[i] for i in val if i in samples)]
        if (area := np.mean(areas) if areas else 0.0) > best:
            best, found = area, fit
    return found


def _samples(read, boxes: dict, seed: int) -> dict:
    """{record: (tokens f16 [m, D], lesion bool [m])} of records that have both lesion and tissue patches."""
    found = {}
    for i, tokens, tissue, _, side in read(list(boxes)):
        rng, taken = np.random.default_rng([seed, i]), []
        for part in patch_labels(boxes[i] / side, tissue):
            taken.append(rng.permutation(np.flatnonzero(part))[:PATCHES])
        if all(map(len, taken)):
            x = tokens.reshape(-1, tokens.shape[-1])[np.concatenate(taken)]
            found[i] = x, np.arange(len(x)) < len(taken[0])
    return found


def _truths(rows, unit: str, number: dict[int, int], boxes: dict, items) -> np.ndarray:
    """Lesions as `froc` takes them, in source px. Images: the centre within half the diagonal of the box."""
    out, c = [], rows.columns
    for i, own in boxes.items():
        offset, px = to_source(rows, i)
        for box in own if items.item[i] in number else ():
            (low, high), z, depth = box.reshape(2, 2), 0, 0
            y, x = offset + px * (low + high) / 2
            reach = np.hypot(*(px * (high - low))) / 2
            if unit == "volume":
                reach = max(reach, DBT_REACH)
                z, depth = c["slice_index"][i], DBT_DEPTH * c["num_slices"][i]
            out.append((number[items.item[i]], z, y, x, reach, depth))
    return np.array(out, np.float64).reshape(-1, 6)


def _normals(unit: str, items, tested, found: Lesions, seed: int) -> list[int]:
    """Tested items of this kind of unit that are said to have no lesion, at most NORMALS of them.

    Said: label lesion is 0, or, in data without it, every label of CLEAR that they have. Unknown is not 0.
    None has a finding; where there is no such label at all, that has to do.
    """
    names = ["lesion"] if "lesion" in items.rows.labels else set(CLEAR).intersection(items.rows.labels)
    clear = np.setdiff1d(tested, items.item[np.concatenate([found.record, found.unlocated])])
    for name in names:
        clear = clear[items.label(name)[clear] == 0]
    clear = clear[(items.kind[clear] == "dbt") == (unit == "volume")]
    return sorted(np.random.default_rng(seed).permutation(clear)[: NORMALS[unit]].tolist())


def reference_of(builds: list):
    """The build whose masks say where tissue is: the first of these Rows that has masks, else the first."""
    return next((rows for rows in builds if not _without_masks(rows)), builds[0])


def _without_masks(rows) -> bool:
    return bool((rows.columns["mask_recipe"] == "none").any())


def run(
    rows, encoder, long_side: int, items, folds, draws: int, seed: int, batch_size: int = 0, reference=None
) -> dict:
    """Probe the patch features of an encoder (or of `GreyPatches`) on all located findings.

    Images are encoded twice: first those with lesions for the fit, then all that are tested.

    Args:
      rows, items: records, and the items of level "image" that they make up.
      folds: of places in items; patients do not cross them.
      reference: the same records in the build whose masks say where tissue is (`reference_of`); None: `rows`.

    Returns:
      "rows": one for single images and one for tomosynthesis volumes, as far as there are lesions to fit and
      to test on. AUCs and percentiles are means over images with lesions (repeats of one image first): a
      logistic regression ("supervised"), and without labels the difference from the other breast
      ("left_right") and from the image's mean ("mean_distance"). "rank_chance": the percentile of the best of
      as many patches, where they say nothing. "sensitivity" by false positives a unit, over all tested units;
      "mean_sensitivity" over 1 to 4 of them on units with lesions alone, which for volumes is DBTex's.
      Thresholds are set within folds. "normals": tested units without a lesion, "normals_at_most" of them.
      "remarks": what a reader must know. "counts": what was left out.
    """
    reference, remarks = rows if reference is None else reference, []
    if _without_masks(reference):
        remarks.append("no tissue mask in any build: air counts as tissue without a lesion")
    preps = [read_prep(folder).get("settings", {}) for folder in reference.folders]
    mirrored = all(prep.get("flip", "chest_wall") == "chest_wall" for prep in preps)
    if not mirrored:
        remarks.append("no build with the chest wall on the left: not compared with the other breast")
    found = lesions(rows)
    boxes = collections.defaultdict(list)
    for i, box in zip(found.record.tolist(), found.box, strict=True):
        if items.item[i] >= 0:
            boxes[i].append(box)
    read = functools.partial(grids, rows, reference, encoder, long_side, batch_size)
    other = contralateral(rows) if mirrored else {}
    table = []
    for unit in UNITS:
        of_unit = [i for i in boxes if (rows.columns["kind"][i] == "dbt") == (unit == "volume")]
        mine = {i: np.array(boxes[i]) for i in of_unit}
        samples = _samples(read, mine, seed) if mine else {}
        inside = [
            [[i for i in mine if items.item[i] in part] for part in (set(f.train), set(f.val))] for f in folds
        ]
        fits = [_fit(samples, train, val, seed) for train, val in inside]
        usable = [(fold.test, fit) for fold, fit in zip(folds, fits, strict=True) if fit]
        tested = np.unique(np.concatenate([test for test, _ in usable])) if usable else np.zeros(0, int)
        mine = {i: mine[i] for i in np.intersect1d(list(mine), np.flatnonzero(np.isin(items.item, tested)))}
        if not mine:
            continue
        normal = _normals(unit, items, tested, found, seed)
        chosen = sorted({items.item[i] for i in mine} | set(normal))
        scored, chance, candidates = _score(rows, reference, read, other, items, usable, mine, chosen)
        facts = {
            "features": encoder.name, "unit": unit, "long_side": long_side,
            "mm_per_px": _median(mm_per_px(rows, long_side)[list(mine)]),
            "images": len(mine), "lesions": sum(map(len, mine.values())),
            "patients": len(np.unique(items.patient[chosen].astype(str))), "normals": len(normal),
            "normals_at_most": NORMALS[unit], "remarks": remarks,
            "folds": len(usable), "folds_without_lesions": len(folds) - len(usable),
            "C": [fit.strength for _, fit in usable],
        }  # fmt: skip
        for name, of in scored.items():
            of = {i: np.mean(values, axis=0) for i, values in of.items() if np.isfinite(values).all()}
            patient = rows.columns["patient_id"][list(of)]
            for column, what in enumerate(("auc", "rank")):
                values = [value[column] for value in of.values()]
                facts[f"{name}_{what}"] = intervals.mean(values, patient, draws, seed)
        facts["rank_chance"] = float(np.mean(chance)) if chance else None
        facts["without_lesion_patches"] = len(mine) - facts["supervised_auc"]["n"]
        facts["without_other_breast"] = len(mine) - len(scored["left_right"])
        table.append(facts | _sensitivity(rows, unit, items, usable, mine, chosen, candidates, draws, seed))
    located = len(found.record)
    counts = {"located": located, "unlocated": len(found.unlocated), "of_records_not_in_use": found.elsewhere}
    return {"rows": table, "counts": counts}


def _median(values) -> float | None:
    return float(np.nanmedian(values)) if np.isfinite(values).any() else None


def _score(rows, reference, read, other: dict[int, int], items, usable, boxes: dict, chosen: list[int]):
    """Encode the chosen items, and the `other` breasts of images with lesions.

    Returns:
      {name: {record: [(AUC, percentile) for each fold that tests it]}} of records with lesions; for each, the
      percentile that the best of as many patches reaches by chance; and {(fold, item): candidates (z, y, x,
      score) in source px, f64 [c, 4]}.
    """
    folds_of = collections.defaultdict(list)
    for f, (test, _) in enumerate(usable):
        for item in test:
            folds_of[item].append(f)
    scored, chance = {"supervised": {}, "left_right": {}, "mean_distance": {}}, []
    candidates, c = collections.defaultdict(list), reference.columns
    places = np.flatnonzero(np.isin(items.item, chosen)).tolist()
    for first in range(0, len(places), HELD):
        part = set(places[first : first + HELD])
        pairs = {i: other.get(i) for i in part if i in boxes}
        needed, held, labels = (set(pairs) | set(pairs.values())) - {None}, {}, {}
        for i, tokens, tissue, centres, side in read(sorted(part | needed)):
            offset, px = to_source(rows, i)
            if i in needed:
                held[i] = tokens, tissue, centres
            for f in folds_of[items.item[i]] if i in part else ():
                at = peaks(expit(usable[f][1](tokens).astype(np.float64)), tissue)
                z = np.full((len(at), 1), np.nan_to_num(c["slice_index"][i]))
                candidates[f, items.item[i]].append(np.hstack([z, offset + px * at[:, :2] * side, at[:, 2:]]))
            if i in pairs:
                labels[i] = patch_labels(boxes[i] / side, tissue)
        for i, j in pairs.items():
            (tokens, tissue, _), parts = held[i], labels[i]
            if parts[0].any():
                chance.append(parts[0].sum() / (parts[0].sum() + 1))
            fits = [usable[f][1] for f in folds_of[items.item[i]]]
            scored["supervised"][i] = [within_image(fit(tokens), *parts) for fit in fits]
            scored["mean_distance"][i] = [within_image(mean_distance(tokens, tissue), *parts)]
            if j is not None:
                scored["left_right"][i] = [within_image(left_right(*held[i], *held[j]), *parts)]
    for (f, item), found in candidates.items():
        i = items.first[item]
        radius = SUPPRESS * max(c[f"box_{axis}1"][i] - c[f"box_{axis}0"][i] for axis in "yx")
        depth = DBT_DEPTH * np.nan_to_num(c["num_slices"][i])
        candidates[f, item] = suppress(np.concatenate(found), radius, depth)
    return scored, chance, candidates


def _sensitivity(rows, unit, items, usable, boxes, chosen, candidates, draws: int, seed: int) -> dict:
    """FROC figures of the candidates: thresholds within folds, lesions of all folds together."""
    patient = items.patient[chosen]
    weights = intervals.weightings(patient, draws, seed)
    with_lesion, found = {items.item[i] for i in boxes}, {}
    for name, wanted in (("all", set(chosen)), ("located", with_lesion)):
        hits, total = np.zeros((len(weights), len(RATES))), np.zeros((len(weights), 1))
        for f, (test, _) in enumerate(usable):
            inside = wanted.intersection(test)
            places = [p for p, item in enumerate(chosen) if item in inside]
            number = {chosen[p]: u for u, p in enumerate(places)}
            truths = _truths(rows, unit, number, boxes, items)
            if not len(truths):
                continue
            table = [
                np.pad(candidates[f, item], ((0, 0), (1, 0)), constant_values=u) for item, u in number.items()
            ]
            count = weights[:, places][:, truths[:, 0].astype(int)].sum(axis=1, keepdims=True)
            hits += np.nan_to_num(froc(np.concatenate(table), truths, weights[:, places])) * count
            total += count
        with np.errstate(invalid="ignore"):
            found[name] = hits / total
    by_rate = zip(RATES, found["all"].T, strict=True)
    return {
        "sensitivity": {str(rate): intervals.estimate(values, patient, draws) for rate, values in by_rate},
        "mean_sensitivity": intervals.estimate(found["located"].mean(axis=1), patient, draws),
    }
