"""EMBED Open Data (Emory, AWS): 2D and C-view exams of 22,382 patients over years. Terms: see TERMS.

Layout: EMBED_OpenData_clinical.csv (a line a finding) and EMBED_OpenData_metadata.csv (a line a file), else
their _reduced forms, anywhere below the root; files .../cohort_{1,2}/<empi_anon>/<acc_anon>/<SOP UID>.dcm.

Rules and traps:
- `anon_dicom_path` has a prefix of Emory's disks: a file is found by its last three parts.
- Lines are joined on patient, exam and side (`side` = `ImageLateralityFinal`); B and blank are of both
  breasts. Pathology is of the breast in `bside` where that is filled, else of `side`. What a breast has says
  nothing of the other one, and a breast without a line in an exam is unlabelled.
- `path_severity` 0 is invasive cancer, not "none"; it may be written "0.0". 6 is no cancer of the breast and
  tells nothing.
- Pathology stands on the exam that led to the biopsy, mostly a diagnostic one: screening exams get theirs by
  follow-up (rule of label_cancer_biopsy). Dates are shifted by patient, so their distances hold.
- BI-RADS 0 (A) among a breast's findings is a recall without a category; 6 (K, known cancer) leaves all of
  its BI-RADS labels unknown.
- Image types ROI_SSC and ROI_SS are screen shots, spot_mag marks spot and magnification views: rejected.
- There are no official splits.
"""

import ast
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path, PurePosixPath

from data_prep.header import VIEWS
from data_prep.labels import birads_labels
from data_prep.plan import Listing, Row, finding
from data_prep.tables import find_table, one_of, only_folder, read_table, whole
from mammodino_jax.errors import UserError

TERMS = (
    "EMBED licence: academic, non-commercial use; clause 5: no public release of models, model weights or "
    "embedding spaces trained, pre-trained or fine-tuned on any portion of it"
)
BREAST = {"level": "breast"}
NO_YES = BREAST | {"classes": ["no", "yes"]}
WORST = "worst asses of the breast's findings in the exam"
LABELS = {
    "label_density": {
        "level": "exam",
        "classes": list("ABCD"),
        "rule": "tissueden 1 to 4 = A to D, the highest of the exam; 5 (male): unknown",
    },
    "label_birads": BREAST
    | {
        "classes": list("12345"),
        "rule": f"{WORST}: N, B, P, S, M = 1 to 5; an A (0) or K (6) among them: unknown",
    },
    "label_recall": NO_YES
    | {"rule": f"1: a finding of the breast is A (0); 0: {WORST} is N or B (1, 2); else unknown"},
    "label_suspicious_birads45": NO_YES
    | {"rule": f"1: {WORST} is S or M (4, 5); 0: N, B or P (1 to 3); else unknown"},
    "label_suspicious_birads5": NO_YES | {"rule": f"1: {WORST} is M (5); 0: N to S (1 to 4); else unknown"},
    "label_cancer_biopsy": NO_YES
    | {
        "rule": "1: path_severity 0 or 1 in the exam, same breast; 0: 2 to 5 only. A screening exam "
        "('screen' in desc) without either takes it from the same breast's exams up to 365 days later. "
        "Without any: 0 where the screening was negative (N or B only) and another of 365 days later or more "
        "is negative too, with no cancer (path_severity 0 or 1, or K) up to then; this 0 has no biopsy. "
        "Else unknown"
    },
}
YEAR = 365  # days
_CLINICAL = ("empi_anon", "acc_anon", "study_date_anon", "desc", "tissueden", "asses", "side",
             "path_severity")  # fmt: skip
_METADATA = ("empi_anon", "acc_anon", "anon_dicom_path", "FinalImageType", "ImageLateralityFinal",
             "ViewPosition", "spot_mag", "ROI_coords")  # fmt: skip
_TYPES = ("2d", "3d", "c-view", "cview", "roi_ssc", "roi_ss")
_KINDS = {"c-view": "synthetic2d", "cview": "synthetic2d", "3d": "dbt"}
_SIDES = ("L", "R", "B")


@dataclass
class Breast:
    """One breast in one exam."""

    day: date | None = None
    screening: bool = False
    assessed: set[str] = field(default_factory=set)  # asses
    severities: set[int] = field(default_factory=set)  # path_severity

    @property
    def negative(self) -> bool:
        return bool(self.assessed) and self.assessed <= {"N", "B"}

    @property
    def cancer(self) -> bool:
        return bool(self.severities & {0, 1}) or "K" in self.assessed


def list_files(inputs: list[Path]) -> Listing:
    """List every file of the metadata table, and unlabelled those on disk that it does not name.

    Raises:
      UserError: no single folder is given, a table or a column is missing, or a cell is wrong.
    """
    root = only_folder(inputs, "embed")
    labels, densities = _read_clinical(_find(root, "EMBED_OpenData_clinical"))
    found = [path for path in sorted(root.rglob("*.dcm")) if path.name[0] != "."]
    files = {path.parts[-3:]: path for path in found}
    rows, listed = [], set()
    for where, cells in read_table(_find(root, "EMBED_OpenData_metadata"), _METADATA):
        exam = _id(cells["empi_anon"]), _id(cells["acc_anon"])
        parts = _inside(where, cells["anon_dicom_path"])
        path = files.get(parts[-3:]) or root.joinpath(*parts)
        row = Row(path, path.relative_to(root).as_posix(), *exam)
        side = one_of(cells["ImageLateralityFinal"].upper(), _SIDES, f"{where}, ImageLateralityFinal")
        row.laterality = None if side == "B" else side
        row.view = cells["ViewPosition"].upper() if cells["ViewPosition"].upper() in VIEWS else None
        kind = one_of(cells["FinalImageType"].lower(), _TYPES, f"{where}, FinalImageType")
        row.kind = _KINDS.get(kind)
        if kind in ("roi_ssc", "roi_ss"):
            row.reject = "secondary_capture", f"FinalImageType {cells['FinalImageType']}: a screen shot"
        elif whole(cells["spot_mag"], f"{where}, spot_mag", 0, 1):
            row.reject = "spot_mag", "spot_mag 1: spot compression or magnification"
        row.labels = densities.get(exam, {}) | labels.get((*exam, side), {})
        row.findings = _rois(cells["ROI_coords"], f"{where}, ROI_coords")
        rows.append(row)
        listed.add(path)
    for path in found:
        if path not in listed:
            parts = path.relative_to(root).parts
            rows.append(Row(path, "/".join(parts), parts[-3] if len(parts) > 2 else None))
    return Listing(rows, LABELS, TERMS, no_release=True)


def _find(root: Path, name: str) -> Path:
    return find_table(root, f"{name}.csv", f"{name}_reduced.csv")


def _id(text: str) -> str:
    return text.removesuffix(".0")  # pandas writes a column of whole numbers with a blank as floats


def _inside(where: str, listed: str) -> tuple[str, ...]:
    """The parts of a listed path from cohort_* on, else the last three."""
    parts = PurePosixPath(listed).parts
    if len(parts) < 3:
        raise UserError(
            f"{where}, anon_dicom_path: {listed or 'blank'}, expected patient/exam/file at its end"
        )
    start = next((i for i, part in enumerate(parts) if part.startswith("cohort_")), len(parts) - 3)
    return parts[start:]


def _read_clinical(path: Path) -> tuple[dict[tuple, dict], dict[tuple, dict]]:
    """({(patient, exam, side): labels}, {(patient, exam): label of density})."""
    breasts, densities = defaultdict(Breast), defaultdict(set)
    for where, cells in read_table(path, _CLINICAL):
        exam = _id(cells["empi_anon"]), _id(cells["acc_anon"])
        side = one_of(cells["side"].upper(), _SIDES, f"{where}, side") or "B"
        sampled = one_of(cells.get("bside", "").upper(), _SIDES, f"{where}, bside") or side
        assessed = one_of(cells["asses"].upper(), tuple("ANBPSMK"), f"{where}, asses")
        severity = whole(cells["path_severity"], f"{where}, path_severity", 0, 6)
        density = whole(cells["tissueden"], f"{where}, tissueden", 1, 5)
        day = _day(cells["study_date_anon"], f"{where}, study_date_anon")
        densities[exam] |= set() if density is None else {density}
        for s in "LR":
            told = {assessed} - {None} if side in (s, "B") else set()
            sample = {severity} - {None} if sampled in (s, "B") else set()
            if side in (s, "B") or sample:
                breast = breasts[(*exam, s)]
                breast.day = breast.day or day
                breast.screening |= "screen" in cells["desc"].lower()
                breast.assessed |= told
                breast.severities |= sample
    history = defaultdict(list)
    for (patient, _, side), breast in breasts.items():
        history[patient, side].append(breast)
    labels = {key: _breast_labels(breast, history[key[0], key[2]]) for key, breast in breasts.items()}
    worst = {exam: None if 5 in seen or not seen else max(seen) - 1 for exam, seen in densities.items()}
    return labels, {exam: {"label_density": value} for exam, value in worst.items()}


def _day(text: str, where: str) -> date | None:
    try:
        return date.fromisoformat(text[:10]) if text else None  # a time may follow
    except ValueError as error:
        raise UserError(f"{where}: {text}, expected a date such as 2015-01-31 or blank") from error


def _breast_labels(breast: Breast, history: list[Breast]) -> dict[str, int | None]:
    order = [" NBPSM".index(code) for code in breast.assessed - {"A", "K"}]
    category = None if "K" in breast.assessed else 0 if "A" in breast.assessed else max(order, default=None)
    return birads_labels(category) | {"label_cancer_biopsy": _cancer(breast, history)}


def _cancer(breast: Breast, history: list[Breast]) -> int | None:
    """label_cancer_biopsy; `history`: the same breast in all exams."""
    own = _biopsy([breast])
    if own is not None or not breast.screening or not breast.day:
        return own
    later = [((other.day - breast.day).days, other) for other in history if other.day and other is not breast]
    later = [(days, other) for days, other in later if days >= 0]  # a recall may be on the same day
    found = _biopsy(other for days, other in later if days <= YEAR)
    if found is not None or not breast.negative:
        return found
    clear = [days for days, other in later if days >= YEAR and other.screening and other.negative]
    ill = [days for days, other in later if other.cancer]
    return 0 if clear and min(ill, default=min(clear) + 1) > min(clear) else None


def _biopsy(breasts: Iterable[Breast]) -> int | None:
    severities = set().union(*(breast.severities for breast in breasts))
    return 1 if severities & {0, 1} else 0 if severities & {2, 3, 4, 5} else None


def _rois(text: str, where: str) -> list[dict]:
    """((ymin, xmin, ymax, xmax), ...) in round or square brackets; a single box may stand alone."""
    try:
        boxes = ast.literal_eval(text or "()")
        boxes = [boxes] if boxes and isinstance(boxes[0], int | float) else boxes
        return [finding("roi", shape="box", box=box) for box in boxes if box]
    except (ValueError, SyntaxError, TypeError, KeyError) as error:
        raise UserError(f"{where}: {text}, expected ((ymin, xmin, ymax, xmax), ...)") from error
