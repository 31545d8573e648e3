"""One task -> one shard. Runs in the workers."""

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from data_prep.identity import hash_id
from data_prep.plan import Planned, reject_line
from data_prep.prepare import prepare
from data_prep.reject import Reject
from data_prep.settings import Settings
from mammodino_jax.data import records
from mammodino_jax.errors import UserError


def write_shard(part: Path, files: list[Planned], settings: Settings, dataset: str, key: bytes) -> dict:
    """Write the records of `files` to `part`.array_record and their index rows to `part`.json.

    Both are written under another name and renamed, the .json last, so that its presence means a complete
    shard. Files that turn out unusable are listed in it as rejects; where a spare (another copy, or the raw
    form of an image) takes a file's place, its number is in `used`.

    Returns:
      {"files": how many were planned, "rejects": how many of them failed}
    """
    done = {"rows": [], "files": [], "rejects": [], "used": []}
    temporary = Path(f"{part}.array_record.tmp")
    writer = ArrayRecordWriter(str(temporary), "group_size:1")
    for planned in files:
        found, facts = make_records(planned, settings, dataset, key, done["rejects"])
        # Only now: a volume that breaks off in its last slice leaves nothing behind, and a disk that is full
        # ends the build.
        for row, record in found:
            done["rows"].append(row)
            writer.write(record)
        spared = {f["number"] for f in facts} - {m.number for m in planned.members or [planned]}
        done["used"] += sorted(spared)
        done["files"] += facts
    writer.close()
    temporary.replace(f"{part}.array_record")
    Path(f"{part}.json.tmp").write_text(json.dumps(done))
    Path(f"{part}.json.tmp").replace(f"{part}.json")
    return {"files": sum(len(p.members or [p]) for p in files), "rejects": len(done["rejects"])}


def is_written(part: Path) -> bool:
    return Path(f"{part}.json").is_file() and Path(f"{part}.array_record").is_file()


def _encoded(row: dict, image: np.ndarray) -> bytes:
    return records.encode(image, row["image_id"])


def make_records(p: Planned, settings: Settings, dataset: str, key: bytes, rejects: list[dict],
                 store: Callable[[dict, np.ndarray], object] = _encoded):  # fmt: skip
    """The (index row, record) pairs of an image or a volume, and what the manifest says of its files; empty
    where it is unusable.

    A file that is gives its place to its spares. A volume of one file a slice goes on without it where it has
    none. Lines of rejects.jsonl are appended to `rejects`. `store` makes the record of a row and its image;
    where a spare takes over it is called for the first slice again.
    """
    slots = [[member, *member.spares] for member in p.members or [p]]
    while slots:
        try:
            images = _records(p, [slot[0] for slot in slots], settings, dataset, key)
            found = [(row, store(row, image)) for row, image in images]
            return found, _file_facts([slot[0] for slot in slots], {row["number"]: row for row, _ in found})
        except UserError:  # of `store`, as of a disk that is full
            raise
        except Exception as error:  # one odd file must not end a build of a million
            if not isinstance(error, Reject):
                error = Reject("failed", f"{type(error).__name__}: {error}")
            at_fault = slots if error.member is None else [slots[error.member]]
            rejects += [reject_line(slot[0].number, slot[0].row, error) for slot in at_fault]
            for slot in at_fault:
                del slot[0]
            slots = [slot for slot in slots if slot]
    return [], []


def _records(p: Planned, members: list[Planned], settings: Settings, dataset: str, key: bytes) -> Iterator:
    """(index row, u8 image) of the image, or of each slice."""
    prepared = prepare([m.row.path for m in members], settings, p.row)
    header, frames = prepared.header, prepared.frames
    dbt = header.kind == "dbt"
    file_row = {
        "split": p.split, "dataset": dataset, "site": p.row.site, "laterality": p.laterality, "view": p.view,
        "patient_id": hash_id(key, dataset, "patient", p.patient),
        "study_id": hash_id(key, dataset, "study", p.study),
        "volume_id": hash_id(key, dataset, "volume", p.image) if dbt else None,
        "source_height": prepared.source_shape[0], "source_width": prepared.source_shape[1],
    }  # fmt: skip
    for index, image in enumerate(prepared.images()):
        member, frame = members[header.places[index] if header.places else 0], header.frames[index]
        name = f"{member.image}#{frame}" if dbt and not p.members else member.image
        image_id = hash_id(key, dataset, "image", name)
        pixel_hash = hashlib.sha256(repr(image.shape).encode() + image.tobytes()).hexdigest()[:32]
        row = prepared.facts(index) | file_row | {
            "image_id": image_id, "pixel_hash": pixel_hash, "source_frame": frame,
            "number": member.number, "decoder": frames.decoder, "notes": frames.notes[:3],
        }  # fmt: skip
        yield row, image


def _file_facts(files: list[Planned], rows: dict[int, dict]) -> list[dict]:
    """What the manifest says of each file that became records: bit rot in a decoded file shows in no other
    way than by its checksum."""
    facts = []
    for p in files:
        with open(p.row.path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        said = {"decoder": rows[p.number]["decoder"], "warnings": rows[p.number]["notes"]}
        facts.append({"number": p.number, "sha256": digest} | said)
    return facts
