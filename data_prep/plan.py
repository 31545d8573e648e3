"""What a source lists, and what is decided before any pixel is read: duplicates, siblings, splits, shards."""

import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from data_prep.header import Header, Reject
from mammodino_jax.data.records import SPLITS
from mammodino_jax.errors import UserError

SHARD_RECORDS = 512  # about 200 MB of records of 1024 px
SHARD_RECORDS_MIN = 16
SHARDS_MIN = 8  # keeps several workers busy on a small data set; must not depend on how many there are
DRAWN_PATIENTS = 100


@dataclass
class Row:
    """One file as its source lists it. Ids are the data set's own; they are hashed before anything is
    written."""

    path: Path
    name: str  # the data set's own name of the file: relative path
    patient: str | None = None  # None: from the header, else the file itself
    study: str | None = None
    laterality: str | None = None
    view: str | None = None
    split: str | None = None
    labels: dict[str, int | None] = field(default_factory=dict)
    findings: list[dict] = field(default_factory=list)


@dataclass
class Listing:
    """All files of a source, what its labels mean (labels.json), and the terms under which it may be used."""

    rows: list[Row]
    labels: dict[str, dict] = field(default_factory=dict)
    terms: str = ""


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

    @property
    def laterality(self) -> str | None:
        return self.row.laterality or self.header.laterality

    @property
    def view(self) -> str | None:
        return self.row.view or self.header.view

    @property
    def exposure(self) -> tuple:
        """Equal for the FOR PROCESSING and the FOR PRESENTATION form of an image."""
        return self.patient, self.study, self.laterality, self.view


def identify(number: int, row: Row, header: Header) -> Planned:
    patient = row.patient or header.patient or header.study or row.name.rsplit(".", 1)[0]
    study = row.study or header.study or patient
    return Planned(number, row, header, patient, study, header.instance or row.name)


def reject_line(number: int, row: Row, reject: Reject) -> dict:
    """A line of rejects.jsonl."""
    return {"number": number, "path": str(row.path), "code": reject.code, "detail": reject.detail}


def drop_repeats(planned: list[Planned]) -> tuple[list[Planned], list[dict]]:
    """Settle what the header scan can settle: equal SOP instances, and FOR PROCESSING images with a sibling.

    Returns:
      The files to keep, and the lines of rejects.jsonl for the others.
    """
    shown = {p.exposure for p in planned if not p.header.for_processing and p.header.syntax}
    whole: dict[
        str, Planned
    ] = {}  # of equal instances the largest file: a truncated copy must not displace it
    for p in planned:
        if p.image not in whole or p.row.path.stat().st_size > whole[p.image].row.path.stat().st_size:
            whole[p.image] = p
    kept, rejects = [], []
    for p in planned:
        if p.header.for_processing and p.exposure in shown:
            reject = Reject("for_processing", "its FOR PRESENTATION image is among the inputs")
        elif whole[p.image] is not p:
            reject = Reject("duplicate", f"same SOP instance as input {whole[p.image].number}")
        else:
            kept.append(p)
            continue
        rejects.append(reject_line(p.number, p.row, reject))
    return kept, rejects


def assign_splits(planned: list[Planned], shares: tuple[float, float, float], seed: int) -> None:
    """Set `split` of every file, a patient as a whole: as given, else from a hash of seed and original id.

    From 100 patients on each patient is drawn by itself, so it keeps its split in later deliveries. Fewer are
    ranked and cut, so that no split with a share is empty.

    Raises:
      UserError: the table puts a patient into two splits.
    """
    splits = {}
    for p in planned:
        if p.row.split and splits.setdefault(p.patient, p.row.split) != p.row.split:
            raise UserError(
                f"the patient of input {p.number} is in the splits {splits[p.patient]} and {p.row.split}; "
                "a patient must be in one split"
            )
    rest = {p.patient: _digest(seed, "split", p.patient) for p in planned if p.patient not in splits}
    if len(rest) >= DRAWN_PATIENTS:
        places = {patient: int.from_bytes(digest[:8], "big") / 2**64 for patient, digest in rest.items()}
        cuts = shares[0], shares[0] + shares[1]
    else:
        places = {patient: rank for rank, patient in enumerate(sorted(rest, key=rest.get))}
        val, test = (max(round(share * len(rest)), int(share > 0 and len(rest) > 2)) for share in shares[1:])
        cuts = len(rest) - val - test, len(rest) - test
    splits |= {patient: SPLITS[(place >= cuts[0]) + (place >= cuts[1])] for patient, place in places.items()}
    for p in planned:
        p.split = splits[p.patient]


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
    return hashlib.sha256(f"{seed}\0{purpose}\0{original}".encode()).digest()


def count_by(values: Iterable[str]) -> str:
    """'3 truncated, 1 not_dicom': for one line to the user."""
    return ", ".join(f"{n} {value}" for value, n in Counter(sorted(values)).most_common())
