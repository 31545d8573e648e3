"""What a source lists, and what is decided before any pixel is read: duplicates, siblings, splits, shards."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from data_prep.header import Header, stack_headers
from data_prep.reject import Reject
from mammodino_jax.data.records import SPLITS
from mammodino_jax.errors import UserError

SHARD_RECORDS = 512  # about 200 MB of records of 1024 px
SHARD_RECORDS_MIN = 16
SHARDS_MIN = 8  # keeps several workers busy on a small data set; must not depend on how many there are
DRAWN_PATIENTS = 100


@dataclass
class Row:
    """One file as its source lists it. Ids are the data set's own; they are hashed before anything is
    written. What is None is taken from the header, or stays unknown."""

    path: Path
    name: str  # the data set's own name of the file: relative path
    patient: str | None = None  # None: from the header, else the file itself
    study: str | None = None
    laterality: str | None = None  # L | R
    view: str | None = None
    split: str | None = None  # train | val | test; trainval: not test, val is cut off by the seed
    kind: str | None = None  # records.KINDS, where the table knows better than the header
    site: str | None = None
    manufacturer: str | None = None
    model: str | None = None
    implant: bool | None = None
    pixel_mm: float | None = None  # of the file's pixels
    flags: tuple[str, ...] = ()
    reject: tuple[str, str] | None = None  # (code, detail): the tables rule the file out
    # The stored orientation is unreliable, `laterality` is the truth: where the pixels show the chest wall on
    # the other side the image is turned by 180 degrees. Findings are given in the turned image.
    upright: bool = False
    labels: dict[str, int | None] = field(default_factory=dict)  # label_<name>; None: unknown
    findings: list[dict] = field(default_factory=list)  # `finding(...)`


def finding(category: str | None = None, birads: str | None = None, pathology: str | None = None,
            shape: str | None = None, box: tuple[float, float, float, float] | None = None,
            slice_index: int | None = None) -> dict:  # fmt: skip
    """A finding of a file. `shape`: box | circle | mask; `box`: (y0, x0, y1, x1) in the file's pixels, end
    exclusive, None: place unknown; `slice_index`: frame number in the file, 0-based, None: unknown."""
    corners = dict(zip(("y0", "x0", "y1", "x1"), map(float, box) if box else (None,) * 4, strict=True))
    kinds = {"category": category, "birads": birads, "pathology": pathology}
    return kinds | {"shape": shape if box else None, **corners, "slice_index": slice_index}


@dataclass
class Listing:
    """All files of a source, what its labels mean (labels.json: {label_<name>: {"classes": [...], "rule": "",
    "level": image | breast | exam}}), and the terms under which it may be used."""

    rows: list[Row]
    labels: dict[str, dict] = field(default_factory=dict)
    terms: str = ""
    no_release: bool = False  # the terms forbid publishing weights or embeddings made from it


@dataclass
class Planned:
    """A file that passed the header scan. `number` (its place in the listing) is the only name in logs."""

    number: int
    row: Row
    header: Header
    patient: str  # original ids, from the table, else the header, else the file's name
    study: str
    image: str
    split: str = ""
    members: list["Planned"] = field(default_factory=list)  # the files of a volume that has one a slice
    spares: list["Planned"] = field(default_factory=list)  # tried in this order where this one is unreadable

    @property
    def laterality(self) -> str | None:
        return self.row.laterality or self.header.laterality

    @property
    def view(self) -> str | None:
        return self.row.view or self.header.view

    @property
    def exposure(self) -> tuple | None:
        """Equal for the FOR PROCESSING and the FOR PRESENTATION form of an image; None where side or view are
        unknown."""
        known = self.laterality and self.view
        return (self.patient, self.study, self.header.kind, self.laterality, self.view) if known else None


def with_table(header: Header, row: Row | None) -> Header:
    """The header with what the table knows better."""
    if row is None:
        return header
    known = {"manufacturer": row.manufacturer, "model": row.model, "implant": row.implant}
    if row.kind and len(header.frames) == 1:
        known["kind"] = row.kind
    if row.pixel_mm:
        known |= {"pixel_mm": row.pixel_mm, "pixel_mm_source": "table"}
    flags = header.flags + tuple(flag for flag in row.flags if flag not in header.flags)
    if row.implant and "implant" not in flags:
        flags += ("implant",)
    return replace(header, flags=flags, **{k: v for k, v in known.items() if v is not None})


def identify(number: int, row: Row, header: Header) -> Planned:
    header = with_table(header, row)
    patient = (
        row.patient or header.patient or header.study or row.name.removesuffix(PurePosixPath(row.name).suffix)
    )
    study = row.study or header.study or patient
    return Planned(number, row, header, patient, study, header.instance or row.name)


def reject_line(number: int, row: Row, reject: Reject) -> dict:
    """A line of rejects.jsonl."""
    return {"number": number, "path": str(row.path.absolute()), "code": reject.code, "detail": reject.detail}


def drop_repeats(planned: list[Planned], keep_raw: bool = False) -> tuple[list[Planned], list[dict]]:
    """Settle what the header scan can settle: equal SOP instances, and FOR PROCESSING images with a sibling.
    What is dropped becomes a spare of what stays.

    Args:
      planned: the files.
      keep_raw: FOR PROCESSING images stay beside their siblings.

    Returns:
      The files to keep, and the lines of rejects.jsonl for the others.
    """
    copies: dict[tuple, list[Planned]] = {}  # poor anonymisers give one UID to many patients
    for p in planned:
        copies.setdefault((p.image, p.header.patient), []).append(p)
    whole, seen = {}, set()
    for (image, _), group in copies.items():
        best = max(group, key=lambda p: p.row.path.stat().st_size)  # the others may be cut off
        if len(group) > 1:
            best = _join_rows(best, group)
        if image in seen:  # of another patient
            best.image = f"{image}\0{best.header.patient}"
        seen.add(image)
        whole |= {p.number: best for p in group}
    shown: dict[tuple, list[Planned]] = {}
    for p in planned:
        if not p.header.for_processing and whole[p.number].number == p.number and p.exposure:
            shown.setdefault(p.exposure, []).append(whole[p.number])
    kept, rejects = [], []
    for p in planned:
        if whole[p.number].number != p.number:
            other, code, what = whole[p.number], "duplicate", "same SOP instance as input {}"
        elif p.header.for_processing and not keep_raw and shown.get(p.exposure):
            other = shown[p.exposure].pop(0)
            code, what = "for_processing", "its FOR PRESENTATION image is input {}"
        else:
            kept.append(whole[p.number])
            continue
        other.spares.append(whole[p.number] if code == "for_processing" else p)
        rejects.append(reject_line(p.number, p.row, Reject(code, what.format(other.number))))
    return kept, rejects


def _join_rows(best: Planned, group: list[Planned]) -> Planned:
    """The best copy of an image, with what the tables say of any copy. Raises UserError where they differ."""
    row = best.row
    for other in (p.row for p in group if p is not best):
        for name in ("patient", "study", "laterality", "view", "split", "kind"):
            mine, theirs = getattr(row, name), getattr(other, name)
            if None not in (mine, theirs) and mine != theirs:
                raise UserError(f"two copies of input {best.number} have different {name} in the tables")
            row = replace(row, **{name: mine if theirs is None else theirs})
        labels = other.labels | {k: v for k, v in row.labels.items() if v is not None}
        row = replace(row, labels=labels, findings=row.findings or other.findings)
    return identify(best.number, row, best.header)


def group_slices(planned: list[Planned]) -> list[Planned]:
    """Join tomosynthesis files of one frame into volumes: those of a series, side, view and pixel format.

    The volume takes the place of its first file, whose row it also takes; labels are joined.
    """
    volumes: dict[tuple, list[Planned]] = {}
    for p in planned:
        h = p.header
        if h.kind == "dbt" and len(h.frames) == 1 and h.series:
            form = (h.rows, h.columns, h.bits, h.signed, h.inverted, h.slope, h.intercept, h.for_processing)
            volumes.setdefault((p.patient, h.series, p.laterality, p.view, *form), []).append(p)
    joined, inside = {}, set()
    for members in volumes.values():
        if len(members) > 1:
            labels = {}
            for m in reversed(members):
                labels |= {k: v for k, v in m.row.labels.items() if v is not None or k not in labels}
            first, name = members[0], min(m.image for m in members)
            header = stack_headers([m.header for m in members])
            row = replace(first.row, labels=labels)
            joined[first.number] = replace(first, image=name, header=header, row=row, members=members)
            inside |= {m.number for m in members}
    return [joined.get(p.number, p) for p in planned if p.number in joined or p.number not in inside]


def assign_splits(
    planned: list[Planned],
    shares: tuple[float, float, float],
    seed: int,
    before: Callable[[str], str | None] = lambda patient: None,
) -> None:
    """Set `split` of every file, a patient as a whole: that of an earlier delivery, else as the table says,
    else from a hash of seed and original id.

    From 100 patients on each patient is drawn by itself, so it keeps its split in later deliveries. Fewer are
    ranked and cut, so that no split with a share is empty.

    Args:
      planned: the files.
      shares: of train, val and test.
      seed: of the hash.
      before: the split of a patient (original id) in earlier deliveries.

    Raises:
      UserError: the table puts a patient into two splits.
    """
    splits, no_test = {}, set()
    for p in planned:
        if split := before(p.patient):
            splits[p.patient] = split
        elif p.row.split == "trainval":
            no_test.add(p.patient)
        elif p.row.split and splits.setdefault(p.patient, p.row.split) != p.row.split:
            raise UserError(
                f"the patient of input {p.number} is in the splits {splits[p.patient]} and {p.row.split}; "
                "a patient must be in one split"
            )
    for patient in no_test & splits.keys():
        if splits[patient] == "test":
            raise UserError("the tables put one patient both into test and not into test")
    rest = {p.patient: _digest(seed, "split", p.patient) for p in planned if p.patient not in splits}
    _draw({k: v for k, v in rest.items() if k not in no_test}, shares, splits)
    if no_test - splits.keys() and not shares[0] + shares[1]:
        raise UserError("the data set has patients for training; --split leaves nothing for train and val")
    learn = shares[0] + shares[1] or 1
    _draw({k: v for k, v in rest.items() if k in no_test}, (shares[0] / learn, shares[1] / learn, 0), splits)
    for p in planned:
        p.split = splits[p.patient]


def _draw(rest: dict[str, bytes], shares: tuple[float, float, float], splits: dict[str, str]) -> None:
    """Draw the splits of patients by their digests, into `splits`."""
    if len(rest) >= DRAWN_PATIENTS:
        places = {patient: int.from_bytes(digest[:8], "big") / 2**64 for patient, digest in rest.items()}
        cuts = shares[0], shares[0] + shares[1]
    else:
        places = {patient: rank for rank, patient in enumerate(sorted(rest, key=rest.get))}
        counts = [max(round(share * len(rest)), int(share > 0 and len(rest) > 2)) for share in shares]
        largest = shares.index(max(shares))
        counts[largest] += len(rest) - sum(counts)
        cuts = counts[0], counts[0] + counts[1]
    splits |= {patient: SPLITS[(place >= cuts[0]) + (place >= cuts[1])] for patient, place in places.items()}


def make_shards(planned: list[Planned], seed: int) -> dict[str, list[list[Planned]]]:
    """Cut each split into shards: patients in seeded order, each patient's files together, volumes whole."""
    total = sum(len(p.header.frames) for p in planned)
    size = min(SHARD_RECORDS, max(SHARD_RECORDS_MIN, -(-total // SHARDS_MIN)))
    shards, filled = {split: [] for split in SPLITS}, dict.fromkeys(SPLITS, size)
    for p in sorted(planned, key=lambda p: (_digest(seed, "order", p.patient), p.row.name)):
        if filled[p.split] >= size:
            shards[p.split].append([])
            filled[p.split] = 0
        shards[p.split][-1].append(p)
        filled[p.split] += len(p.header.frames)
    return shards


def _digest(seed: int, purpose: str, original: str) -> bytes:
    return hashlib.sha256(f"{seed}\0{purpose}\0{original}".encode(errors="surrogateescape")).digest()


def count_by(values: Iterable[str]) -> str:
    """'3 truncated, 1 not_dicom': for one line to the user."""
    return ", ".join(f"{n} {value}" for value, n in Counter(sorted(values)).most_common())
