"""mini-MIAS: 322 film mammograms (MLO) of 161 patients, 1024x1024 at 0.2 mm. Terms: MIAS, research only.

Layout: Info.txt and mdb001.pgm to mdb322.pgm, each anywhere below the root. Info.txt is prose around a table:

    mdb001 G CIRC B 535 425 197     film, tissue, abnormality, severity, x, y, radius
    mdb003 D NORM
    mdb059 F CIRC B                 the place is not known; also written *NOTE 3*

Rules and traps:
- A film with several abnormalities has several lines: labels are the maximum.
- y counts from the bottom edge: the row from the top is 1024 - y.
- F, G, D (fatty, glandular, dense) are not BI-RADS densities: label_fgd.
- Two films in a row are one patient (mdb001 and mdb002). By Info.txt odd numbers are right breasts and even
  ones left, and the pixels fit: the chest wall is on the image's right in odd films and on its left in even
  ones (all 238 that we have). But the lead markers in the films are mirrored and read L in odd films and R in
  even ones (wherever we could read one, but for mdb026): the scans seem to be mirror images. We give the side
  of Info.txt; if it matters whether a breast is truly left or right, swap it.
"""

import re
from pathlib import Path

from data_prep.plan import Listing, Row, finding
from data_prep.tables import find_table, number, one_of, only_folder
from mammodino_jax.errors import UserError

TERMS = "MIAS licence: research only; name the MIAS database (Suckling et al. 1994) in publications"
CATEGORIES = {"CALC": "calcification", "CIRC": "mass", "SPIC": "mass", "MISC": "mass",
              "ARCH": "architectural_distortion", "ASYM": "asymmetry", "NORM": None}  # fmt: skip
LABELS = {
    "label_fgd": {"classes": ["fatty", "glandular", "dense"], "rule": "tissue F, G or D; not BI-RADS"},
    "label_cancer_biopsy": {
        "classes": ["no", "malignant"],
        "rule": "1: an abnormality of severity M; 0: all are B, or NORM (no abnormality, no biopsy)",
    },
    "label_lesion": {"classes": ["no", "yes"], "rule": "1: any abnormality; 0: NORM"},
    "label_mass": {"classes": ["no", "yes"], "rule": "1: CIRC, SPIC or MISC; 0: none of these"},
    "label_calcification": {"classes": ["no", "yes"], "rule": "1: CALC; 0: none"},
}
LABELS = {name: meaning | {"level": "image"} for name, meaning in LABELS.items()}
_SIDE = 1024
_FILM = re.compile(r"mdb(\d{3})")
_LINE = re.compile(r"mdb\d{3}\s")


def list_files(inputs: list[Path]) -> Listing:
    """List every film of Info.txt, and unlabelled those on disk that it does not name.

    Raises:
      UserError: no single folder is given, Info.txt is missing or has no table, or a line of it is wrong.
    """
    root = only_folder(inputs, "mias")
    rows = {
        path.stem: _make_row(root, path) for path in sorted(root.rglob("*.pgm")) if _FILM.fullmatch(path.stem)
    }
    info = find_table(root, "Info.txt", "info.txt")
    lines = enumerate(info.read_text(encoding="utf-8", errors="replace").splitlines(), start=1)
    lines = [(f"{info.name} line {n}", line.split()) for n, line in lines if _LINE.match(line)]
    if not lines:
        raise UserError(f"{info.name}: expected lines like mdb001 G CIRC B 535 425 197, found none")
    for where, words in lines:
        row = rows.setdefault(words[0], _make_row(root, root / f"{words[0]}.pgm"))
        _add(row, where, words)
    return Listing([rows[name] for name in sorted(rows)], LABELS, TERMS)


def _make_row(root: Path, path: Path) -> Row:
    """What the film's number tells."""
    film = int(path.stem[3:])
    row = Row(path, path.relative_to(root).as_posix(), patient=f"P{(film + 1) // 2:03d}")
    row.laterality, row.view, row.kind, row.pixel_mm = "LR"[film % 2], "MLO", "film", 0.2
    return row


def _add(row: Row, where: str, words: list[str]) -> None:
    """Add one line of the table to its film."""
    tissue, code, severity, *place = (*words[1:], "", "", "")[: max(len(words) - 1, 3)]
    one_of(tissue, ("F", "G", "D"), f"{where}, tissue")
    one_of(code, tuple(CATEGORIES), f"{where}, abnormality")
    one_of(severity, ("B", "M"), f"{where}, severity")
    if not code or (code != "NORM" and not severity):
        raise UserError(f"{where}: expected film, tissue, abnormality, and severity unless NORM")
    category = CATEGORIES[code]
    new = {
        "label_cancer_biopsy": severity == "M",
        "label_lesion": category is not None,
        "label_mass": category == "mass",
        "label_calcification": category == "calcification",
    }
    row.labels = {name: max(int(value), row.labels.get(name, 0)) for name, value in new.items()}
    row.labels["label_fgd"] = "FGD".index(tissue)
    if category is None:
        return
    box = None
    if place and not place[0].startswith("*"):
        if len(place) < 3:
            raise UserError(f"{where}: expected x, y and radius, found {' '.join(place)}")
        x, y, radius = (number(word, f"{where}, x, y or radius") for word in place[:3])
        y = _SIDE - y
        box = y - radius, x - radius, y + radius, x + radius
    row.findings.append(finding(category, None, {"B": "benign", "M": "malignant"}[severity], "circle", box))
