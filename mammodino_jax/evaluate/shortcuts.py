"""What features say that a diagnosis should not rest on: patient, slice depth, vendor, site, side, size.

r records, u units (an image, or the middle slice of a tomosynthesis volume), F features, W bootstrap draws.
Patients are kept apart: in folds, and among neighbours.
"""

import functools

import numpy as np
from scipy.stats import rankdata
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import r2_score
from sklearn.model_selection import GridSearchCV, GroupKFold, StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from mammodino_jax.evaluate import intervals
from mammodino_jax.evaluate.items import units
from mammodino_jax.evaluate.probes import standardise

MOST = 5000  # units, or slices, that a probe looks at; whole patients are drawn
VOLUME_SLICES = 12  # of a volume at most, evenly spaced, that the depth probe looks at
LEAST_SLICES = 5  # volumes of fewer are too short to speak of depth
FOLDS = 5
LEAST_PATIENTS = 10  # of each value that is predicted
COLUMNS = ("manufacturer", "site", "dataset", "kind", "laterality", "view")
STRENGTH = 0.01  # C of the classifier: fixed, so that all features are asked by one rule
RIDGE = (1.0, 1e2, 1e4)  # L2, chosen within the training part
OFFSETS = range(1, 11)
OTHERS = 10  # volumes of other patients that each volume is compared with
NEAR = 5  # neighbours shown of a query


class _NotAskedError(Exception):
    """The data cannot answer a probe; why."""


def run(rows, features: dict[str, np.ndarray], draws: int, seed: int) -> dict:
    """Ask all features everything that the data can answer.

    Args:
      features: {name: f32 [r, F]}.

    Returns:
      "rows": features, probe, metric, value, low, high (95 %, patients drawn with replacement), chance, n and
      patients; sizes and depth with "r2" too. "not_asked": {probe: why}. "looked_at": how many images and
      volumes, "of" how many.
    """
    found = representatives(rows)
    places = _whole_patients(rows, found, seed)
    out, not_asked = [], {}
    for probe, ask in PROBES.items():
        for name, x_rF in features.items():
            try:
                out.append({"features": name, "probe": probe, **ask(rows, x_rF, places, draws, seed)})
            except _NotAskedError as why:
                not_asked[probe] = str(why)
                break
    return {"rows": out, "not_asked": not_asked, "looked_at": len(places), "of": len(found)}


def representatives(rows) -> np.ndarray:
    """i64 [u]: the record of each image, and the middle one of each volume."""
    return np.sort([of[len(of) // 2] for of in _groups(rows, np.arange(len(rows)))])


def _groups(rows, places) -> list[np.ndarray]:
    """The places of each image or volume, in slice order."""
    name = units(rows)[places].astype(str)
    order = np.lexsort((np.nan_to_num(rows.columns["slice_index"][places]), name))
    return np.split(places[order], np.flatnonzero(name[order][1:] != name[order][:-1]) + 1)


def _whole_patients(rows, places, seed: int) -> np.ndarray:
    """All places of as many patients, drawn at random, as have MOST places together; one at least."""
    patients, code = np.unique(rows.columns["patient_id"][places].astype(str), return_inverse=True)
    drawn = np.random.default_rng(seed).permutation(len(patients))
    kept = np.cumsum(np.bincount(code)[drawn]) <= MOST
    kept[:1] = True
    return places[np.isin(code, drawn[kept])]


def _patients(rows, places, least: int = LEAST_PATIENTS) -> np.ndarray:
    """Their ids; too few of them for folds is a reason not to ask."""
    patient = rows.columns["patient_id"][places].astype(str)
    if (count := len(np.unique(patient))) < least:
        raise _NotAskedError(f"known for {count} patients, {least} are needed")
    return patient


def _directions(x_nF) -> np.ndarray:
    """Standardised features, as the k-NN probe sees them, of length 1: their products are cosines."""
    x = standardise(x_nF, np.arange(len(x_nF))).astype(np.float32)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-9)


def retrieve(rows, x_rF, places, draws, seed, apart: str | None = None) -> dict:
    """Share of images whose nearest other, by cosine of standardised features, is of the same patient.

    apart: a column; images with the query's value of it are no neighbours.
    """
    patient, x = _patients(rows, places, 2), _directions(x_rF[places])
    allowed = ~np.eye(len(places), dtype=bool)
    if apart:
        value = rows.columns[apart][places]
        known = value != None  # noqa: E711
        allowed &= (value[:, None] != value) & known[:, None] & known
    same = (patient[:, None] == patient) & allowed
    counted = same.any(axis=1)
    if not counted.any():
        raise _NotAskedError(f"no patient has two images{f' that differ in {apart}' if apart else ''}")
    nearest = np.where(allowed, x @ x.T, -np.inf).argmax(axis=1)
    found = intervals.mean(same[np.arange(len(same)), nearest][counted], patient[counted], draws, seed)
    chance = (same.sum(axis=1) / np.maximum(allowed.sum(axis=1), 1))[counted].mean()
    return {"metric": "top 1", **found, "chance": float(chance), "patients": len(np.unique(patient[counted]))}


def classify(rows, x_rF, places, draws, seed, column: str) -> dict:
    """Balanced accuracy of a logistic regression that predicts a column, 5-fold, patients apart."""
    patient, value = rows.columns["patient_id"].astype(str), rows.columns[column]
    known = {v: places[value[places] == v] for v in set(value[places]) - {None}}
    count = {v: len(np.unique(patient[of])) for v, of in sorted(known.items())}
    values = [v for v, patients in count.items() if patients >= LEAST_PATIENTS]
    if len(values) < 2:
        said = ", ".join(f"{v}: {n}" for v, n in count.items()) or "no value known"
        raise _NotAskedError(f"two values of {LEAST_PATIENTS} patients each are needed ({said})")
    places = np.sort(np.concatenate([known[v] for v in values]))
    label, patient, x = np.searchsorted(values, value[places].astype(str)), patient[places], x_rF[places]
    predicted = np.zeros(len(places), int)
    splitter = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=seed)
    for train, test in splitter.split(x, label, patient):
        model = LogisticRegression(C=STRENGTH, class_weight="balanced", max_iter=1000)
        predicted[test] = make_pipeline(StandardScaler(), model).fit(x[train], label[train]).predict(x[test])
    weights = intervals.weightings(patient, draws, seed)
    with np.errstate(invalid="ignore"):
        of_class = [weights[:, label == c] for c in range(len(values))]
        right = [w @ (predicted[label == c] == c) / w.sum(axis=1) for c, w in enumerate(of_class)]
    accuracy = np.mean(right, axis=0)
    return {
        "metric": "balanced accuracy", **intervals.estimate(accuracy, patient, draws),
        "chance": 1 / len(values), "n": len(label), "patients": len(np.unique(patient)), "values": values,
    }  # fmt: skip


def _predict(x_nF, target_n, patient_n) -> tuple[np.ndarray, np.ndarray]:
    """Ridge regression, 5-fold, patients apart: predictions [n], and the fold of each."""
    predicted, fold = np.zeros(len(target_n)), np.zeros(len(target_n), int)
    for f, (train, test) in enumerate(GroupKFold(FOLDS).split(x_nF, target_n, patient_n)):
        model = make_pipeline(StandardScaler(), Ridge())
        search = GridSearchCV(model, {"ridge__alpha": RIDGE}, cv=GroupKFold(3))
        search.fit(x_nF[train], target_n[train], groups=patient_n[train])
        predicted[test], fold[test] = search.predict(x_nF[test]), f
    return predicted, fold


def depth(rows, x_rF, places, draws, seed) -> dict:
    """Spearman's correlation of predicted and true relative depth of slices: its mean over volumes."""
    c = rows.columns
    slices = np.flatnonzero((c["kind"] == "dbt") & (c["num_slices"] >= LEAST_SLICES))
    if not len(slices):
        raise _NotAskedError(f"no volume of {LEAST_SLICES} slices")
    spread = [
        of[np.linspace(0, len(of) - 1, VOLUME_SLICES).round().astype(int)] for of in _groups(rows, slices)
    ]
    slices = _whole_patients(rows, np.unique(np.concatenate(spread)), seed)
    patient, target = _patients(rows, slices), c["slice_index"][slices] / (c["num_slices"][slices] - 1)
    predicted, _ = _predict(x_rF[slices], target, patient)
    volumes = _groups(rows, slices)
    at = [np.searchsorted(slices, of) for of in volumes]
    found = intervals.mean(
        [_correlation(*map(rankdata, (predicted[of].round(9), target[of])))[0] for of in at],
        c["patient_id"][[of[0] for of in volumes]], draws, seed,
    )  # fmt: skip
    return {
        "metric": "Spearman", **found, "chance": 0.0, "patients": len(np.unique(patient)),
        "r2": float(r2_score(target, predicted)),
    }  # fmt: skip


def _correlation(a_n, b_n, weights_Wn=None) -> np.ndarray:
    """Pearson's correlation under each weighting; 0 where one of both is constant."""
    weights_Wn = np.ones((1, len(a_n))) if weights_Wn is None else weights_Wn
    total = np.maximum(weights_Wn.sum(axis=1), 1e-9)
    a_n, b_n = a_n - np.mean(a_n), b_n - np.mean(b_n)
    mean_a, mean_b, aa, bb, ab = ((weights_Wn @ v) / total for v in (a_n, b_n, a_n**2, b_n**2, a_n * b_n))
    spread = np.sqrt(np.maximum(aa - mean_a**2, 0) * np.maximum(bb - mean_b**2, 0))
    return np.where(spread > 1e-9, (ab - mean_a * mean_b) / np.maximum(spread, 1e-9), 0)


def size(rows, x_rF, places, draws, seed, what: str) -> dict:
    """Spearman's correlation, ranked within folds, of a predicted size with the true one; patients apart.

    what: "breast area" (mm2 of records whose pixel size is known; px where it is known of none), "mm per px".
    """
    c, unit = rows.columns, "mm"
    target = c["pixel_mm"]
    if what == "breast area":
        known = np.isfinite(target[places]).any()
        unit = "mm2" if known else "px"
        target = c["coverage"] * c["height"] * c["width"] * (target**2 if known else 1)
    places = places[np.isfinite(target[places])]
    patient, target = _patients(rows, places), target[places]
    if np.ptp(target) <= 1e-6 * np.abs(target).max():
        raise _NotAskedError("it is the same in all images")
    predicted, fold = _predict(x_rF[places], target, patient)
    weights = intervals.weightings(patient, draws, seed)
    ranks = np.zeros((2, len(target)))
    for part in (fold == f for f in range(FOLDS)):  # predictions of two folds are not ranked together
        ranks[:, part] = [rankdata(v[part]) / part.sum() for v in (predicted, target)]
    value = _correlation(*ranks, weights)
    return {
        "metric": "Spearman", **intervals.estimate(value, patient, draws), "chance": 0.0, "n": len(target),
        "patients": len(np.unique(patient)), "r2": float(r2_score(target, predicted)), "unit": unit,
    }  # fmt: skip


PROBES = {
    "patient": retrieve,
    "patient, from another view": functools.partial(retrieve, apart="view"),
    "patient, from the other side": functools.partial(retrieve, apart="laterality"),
    "slice depth": depth,
    **{column: functools.partial(classify, column=column) for column in COLUMNS},
    **{what: functools.partial(size, what=what) for what in ("breast area", "mm per px")},
}


def cross_slice(rows, features: dict[str, np.ndarray], draws: int = 1000, seed: int = 0) -> dict[str, dict]:
    """Cosine of slices of a volume, by their offset, and of slices of volumes of other patients.

    The mean over volumes is subtracted first, since features share a large common part. Slice k is compared
    with k + d of its own volume, and with the slices at the relative depth of k + d of others: the difference
    is then not one of depth. Volumes weigh equally.

    Returns:
      {name: {"offsets", "within", "across" (a mean an offset; None where no volume has two slices so far
      apart, or all are of one patient), "difference" (value, low, high, n volumes), "gap_mm" (median distance
      of slices, None if unknown), "volumes"}}; {} without volumes.
    """
    c = rows.columns
    volumes = [of for of in _groups(rows, np.flatnonzero(c["kind"] == "dbt")) if len(of) > 1]
    if not volumes:
        return {}
    volumes = [volumes[v] for v in np.random.default_rng(seed).permutation(len(volumes))]
    patient = c["patient_id"][[of[0] for of in volumes]].astype(str)
    number = [c["slice_index"][of].astype(int) for of in volumes]
    relative = [n / np.maximum(c["num_slices"][of] - 1, 1) for n, of in zip(number, volumes, strict=True)]
    others = []
    for v in range(len(volumes)):
        after = np.roll(np.arange(len(volumes)), -v)
        others.append(after[patient[after] != patient[v]][:OTHERS])
    gap = c["slice_mm"][[of[0] for of in volumes]]
    out = {}
    for name, x_rF in features.items():
        x_rF = x_rF - np.mean([x_rF[of].mean(axis=0) for of in volumes], axis=0)
        x_rF = x_rF / np.maximum(np.linalg.norm(x_rF, axis=1, keepdims=True), 1e-9)
        within, across = (np.full((len(volumes), len(OFFSETS)), np.nan) for _ in range(2))
        for v, of in enumerate(volumes):
            near = [
                volumes[u][np.abs(relative[u][:, None] - relative[v]).argmin(axis=0)] for u in others[v]
            ]  # a list an other volume: its slice at the depth of each of v's
            for column, d in enumerate(OFFSETS):
                k = np.flatnonzero(np.isin(number[v] + d, number[v]))
                if not len(k):
                    break
                further = np.searchsorted(number[v], number[v][k] + d)
                within[v, column] = np.sum(x_rF[of[k]] * x_rF[of[further]], axis=1).mean()
                if near:
                    across[v, column] = (
                        np.mean([x_rF[of[k]] * x_rF[u[further]] for u in near]) * x_rF.shape[1]
                    )
        difference = []
        for column in (within - across).T:
            kept = np.isfinite(column)
            difference.append(intervals.mean(column[kept], patient[kept], draws, seed))
        out[name] = {
            "offsets": list(OFFSETS), "within": _means(within), "across": _means(across),
            "difference": difference, "volumes": len(volumes),
            "gap_mm": float(np.nanmedian(gap)) if np.isfinite(gap).any() else None,
        }  # fmt: skip
    return out


def _means(values_vd) -> list[float | None]:
    known = [column[np.isfinite(column)] for column in values_vd.T]
    return [float(column.mean()) if len(column) else None for column in known]


def neighbours(rows, x_rF, count: int, seed: int) -> list[dict]:
    """Nearest images of other patients, by cosine of standardised features; volumes by their middle slice.

    Queries are drawn in turn from each data set, kind and value of the best-known label.

    Returns:
      [{"query": record, "near": [records, nearest first], "cosine": [of each]}], `count` of them at most.
    """
    places = _whole_patients(rows, representatives(rows), seed)
    patient = rows.columns["patient_id"][places].astype(str)
    label = max(rows.labels.values(), key=lambda v: (v[places] >= 0).sum(), default=np.zeros(len(rows)))
    groups, rng = {}, np.random.default_rng(seed)
    for u in rng.permutation(len(places)):
        i = places[u]
        groups.setdefault((rows.columns["dataset"][i], rows.columns["kind"][i], label[i]), []).append(u)
    turn = [(nth, place, u) for place, of in enumerate(groups.values()) for nth, u in enumerate(of)]
    queries = [u for *_, u in sorted(turn)[:count]]
    x, out = _directions(x_rF[places]), []
    for u, cosine in zip(queries, x[queries] @ x.T, strict=True):
        near = np.argsort(np.where(patient == patient[u], np.inf, -cosine), kind="stable")
        near = near[: min(NEAR, (patient != patient[u]).sum())]
        cosines = cosine[near].astype(float).tolist()
        out.append({"query": int(places[u]), "near": places[near].tolist(), "cosine": cosines})
    return out
