"""The build as a whole: records, ids, findings, determinism, and one clear line for bad input."""

import hashlib
import itertools
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
from array_record.python.array_record_module import ArrayRecordReader

from data_prep import build as build_module
from data_prep.__main__ import main
from data_prep.build import BuildOptions, Settings, build
from data_prep.header import Header
from data_prep.plan import Planned, Row, assign_splits, make_shards
from data_prep.prepare import prepare as prepare_files
from data_prep.reject import Reject
from mammodino_jax.data import records
from mammodino_jax.errors import UserError


def prepare(path, settings):
    return prepare_files([path], settings)


@pytest.fixture(autouse=True)
def key_file(tmp_path, monkeypatch):
    monkeypatch.setenv("MAMMODINO_KEY_FILE", str(tmp_path / "secret" / "key"))


@pytest.fixture
def exams(tmp_path, breast, write_dicom) -> Path:
    """Four patients with two views each, one of them also with a volume, a bad file, and tables."""
    folder = tmp_path / "exams"
    folder.mkdir()
    rows = []
    for patient in range(4):
        for side in "LR":
            image = breast(side="left" if side == "L" else "right", seed=10 * patient + (side == "R"))
            name = f"Smith{patient}-{side}.dcm"
            if (patient, side) == (0, "R"):
                image[150:160, 220:240] = 4000  # the finding below
            write_dicom(folder / name, image, PatientID=f"Smith{patient}", ImageLaterality=side)
            rows.append(f"{name},Smith{patient},{side},{patient},{'train' if patient < 2 else ''}")
    volume = np.stack([breast(seed=50 + z) for z in range(3)])
    write_dicom(folder / "Smith0-tomo.dcm", volume, positions=[2.0, 1.0, 0.0], PatientID="Smith0")
    (folder / "broken.dcm").write_bytes(b"\0" * 500)
    (folder / "labels.csv").write_text(
        "file,patient_id,laterality,label_density,split\n" + "\n".join(rows) + "\n"
    )
    (folder / "labels.json").write_text(
        json.dumps({"label_density": {"classes": list("ABCD"), "rule": "r", "level": "exam"}})
    )
    (folder / "findings.csv").write_text(
        "file,category,shape,y0,x0,y1,x1,slice_index\n"
        "Smith0-R.dcm,mass,box,150,220,160,240,\nSmith0-R.dcm,asymmetry,,,,,,\n"
        "Smith0-tomo.dcm,mass,box,100,30,120,50,0\nSmith0-tomo.dcm,mass,box,100,30,120,50,\n"
    )
    return folder


def read_all(folder: Path) -> tuple[list[dict], list[np.ndarray]]:
    rows = pq.read_table(folder / "index.parquet").to_pylist()
    shards = [path for split in records.SPLITS for path in records.shard_paths(folder, split)]
    found = [records.decode(record) for path in shards for record in ArrayRecordReader(path).read_all()]
    assert [record["image_id"] for record in found] == [row["image_id"] for row in rows]
    return rows, [record["image"] for record in found]


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def test_records_and_index_hold_the_contract(tmp_path, exams):
    counts = build(BuildOptions((exams,), tmp_path / "out"))
    assert counts["inputs"] == 10 and counts["records"] == 11 and counts["rejects"] == 1
    rows, images = read_all(tmp_path / "out")
    for row, image in zip(rows, images, strict=True):
        assert image.shape == (row["height"], row["width"]) and max(image.shape) <= 1024
        assert abs((image > 0).mean() - row["coverage"]) < 1e-4
        assert (image == 0).any() and image.max() == 255
        left, right = (image[:, :20] > 0).mean(), (image[:, -20:] > 0).mean()
        assert left > 2 * right  # chest wall on the left, whatever the side
        if row["laterality"]:
            assert row["flipped"] == (row["laterality"] == "R")
    volume = [row for row in rows if row["kind"] == "dbt"]
    start = rows.index(volume[0])
    assert rows[start : start + 3] == volume
    assert [row["slice_index"] for row in volume] == [0, 1, 2]
    assert [row["slice_position_mm"] for row in volume] == [0, 1, 2]
    for name in ("box_y0", "box_x1", "window_lo", "window_hi", "height", "flipped", "volume_id"):
        assert len({row[name] for row in volume}) == 1
    masks = [images[start + k] > 0 for k in range(3)]
    assert (masks[0] == masks[1]).all() and (masks[0] == masks[2]).all()
    by_patient = {row["patient_id"]: row for row in rows}
    assert len(by_patient) == 4 and all(len(i) == 32 for i in by_patient)
    for patient in by_patient:
        assert len({row["split"] for row in rows if row["patient_id"] == patient}) == 1
    assert {row["label_density"] for row in rows} == {0, 1, 2, 3, None}  # the volume has no label line
    assert json.loads((tmp_path / "out/labels.json").read_text())["label_density"]["classes"] == list("ABCD")
    assert records.read_prep(tmp_path / "out")["schema_version"] == records.SCHEMA_VERSION
    reject = json.loads((tmp_path / "out.local/rejects.jsonl").read_text())
    assert reject["code"] == "not_dicom" and reject["path"].endswith("broken.dcm")
    manifest = [json.loads(line) for line in (tmp_path / "out.local/manifest.jsonl").read_text().splitlines()]
    assert len(manifest) == 9 and sorted(i for line in manifest for i in line["image_ids"]) == sorted(
        row["image_id"] for row in rows
    )


def test_findings_follow_crop_scale_and_flip(tmp_path, exams):
    build(BuildOptions((exams,), tmp_path / "out", settings=Settings(long_side=160, clahe=0)))
    rows, images = read_all(tmp_path / "out")
    findings = pq.read_table(tmp_path / "out/findings.parquet").to_pylist()
    assert len(findings) == 4
    placed, unplaced, in_slice, in_volume = (
        findings if findings[0]["volume_id"] is None else findings[2:] + findings[:2]
    )
    where = [row["image_id"] for row in rows].index(placed["image_id"])
    y0, x0, y1, x1 = (round(placed[f"record_{name}"]) for name in ("y0", "x0", "y1", "x1"))
    image = images[where]
    assert rows[where]["flipped"] and max(image.shape) == 160
    assert image[y0 + 1 : y1 - 1, x0 + 1 : x1 - 1].min() > 240  # the bright square, nothing else
    assert image[y0 - 4 : y0 - 1, x0:x1].mean() < 230
    assert unplaced["record_y0"] is None and unplaced["image_id"] == placed["image_id"]
    assert in_slice["slice_index"] == 2 and in_slice["image_id"] is not None  # frame 0 is the last slice
    assert in_volume["image_id"] is None and in_volume["volume_id"] == in_slice["volume_id"]


def test_no_identifier_in_what_is_shared_or_logged(tmp_path, exams, caplog):
    build(BuildOptions((exams,), tmp_path / "out"))
    for path in (tmp_path / "out").iterdir():
        data = path.read_bytes()
        assert b"Smith" not in data and b"Doe" not in data and str(tmp_path).encode() not in data
    assert caplog.messages and not any("Smith" in m or "broken" in m for m in caplog.messages)
    key = Path(os.environ["MAMMODINO_KEY_FILE"])
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    with pytest.raises(UserError, match="lies in the output folder"):
        build(BuildOptions((exams,), tmp_path / "other", key=str(tmp_path / "other" / "key")))


@pytest.mark.slow
def test_same_bytes_whatever_the_workers(tmp_path, exams):
    for workers in (1, 2):
        build(BuildOptions((exams,), tmp_path / f"out{workers}", workers=workers, dataset="x"))
    assert digests(tmp_path / "out1") == digests(tmp_path / "out2")
    build(BuildOptions((exams,), tmp_path / "seeded", seed=1, dataset="x"))
    assert digests(tmp_path / "out1") != digests(tmp_path / "seeded")


def test_tfds_reads_it_without_tensorflow(tmp_path, exams):
    build(BuildOptions((exams,), tmp_path / "out"))
    code = (
        "import sys, tensorflow_datasets as tfds\n"
        f"source = tfds.builder_from_directory({str(tmp_path / 'out')!r}).as_data_source(split='train')\n"
        "record = source[0]\n"
        "print(len(source), record['image'].dtype, record['image'].ndim, 'tensorflow' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    train = len(pq.read_table(tmp_path / "out/index.parquet", filters=[("split", "==", "train")]))
    assert done.stdout.split() == [str(train), "uint8", "2", "False"]


def test_duplicates_and_for_processing_siblings(tmp_path, breast, write_dicom):
    folder = tmp_path / "in"
    folder.mkdir()
    image = breast()
    first = write_dicom(folder / "a.dcm", image, StudyInstanceUID="1.2.3")
    (folder / "b.dcm").write_bytes(first.read_bytes())  # the same instance again
    write_dicom(folder / "c.dcm", image)  # the same pixels under another UID
    raw = np.where(image > 0, 4095 - image, 4095).astype(np.uint16)
    write_dicom(folder / "d.dcm", raw, StudyInstanceUID="1.2.3", PresentationIntentType="FOR PROCESSING")
    write_dicom(folder / "e.dcm", raw, ViewPosition="CC", PresentationIntentType="FOR PROCESSING")
    build(BuildOptions((folder,), tmp_path / "out"))
    rows, _ = read_all(tmp_path / "out")
    assert len(rows) == 3
    assert [row["duplicate_of"] for row in rows].count(None) == 2
    codes = [
        json.loads(line)["code"] for line in (tmp_path / "out.local/rejects.jsonl").read_text().splitlines()
    ]
    assert codes == ["duplicate", "for_processing"]


def test_a_truncated_copy_does_not_displace_the_whole_file(tmp_path, breast, write_dicom):
    folder = tmp_path / "in"
    folder.mkdir()
    whole = write_dicom(folder / "z.dcm", breast()).read_bytes()
    (folder / "a.dcm").write_bytes(whole[: len(whole) // 2])  # listed first
    build(BuildOptions((folder,), tmp_path / "out"))
    rows, _ = read_all(tmp_path / "out")
    reject = json.loads((tmp_path / "out.local/rejects.jsonl").read_text())
    assert len(rows) == 1 and reject["code"] == "duplicate" and reject["path"].endswith("a.dcm")


def test_full_box_and_fixed_scale(tmp_path, breast, write_dicom):
    image = breast(400, 300, share=0.25)
    path = write_dicom(tmp_path / "a.dcm", image, ImagerPixelSpacing=[0.1, 0.1])
    full = prepare(path, Settings(box="full", mask="none", clahe=0))
    assert full.box == (0, 0, 400, 300) and next(full.images()).shape == (400, 300)
    assert next(full.images()).min() == 1  # no mask: nothing is background
    scaled = prepare(path, Settings(mm_per_px=0.2))
    box, record = scaled.box, next(scaled.images())
    assert record.shape == (round((box[2] - box[0]) / 2), round((box[3] - box[1]) / 2))
    assert scaled.facts(0)["pixel_mm"] == pytest.approx(0.2, rel=0.01)
    cv2.imwrite(str(tmp_path / "a.png"), image)
    with pytest.raises(Reject, match="no_spacing"):
        prepare(tmp_path / "a.png", Settings(mm_per_px=0.2))


def test_laterality_conflict_is_flagged_and_pixels_decide(tmp_path, breast, write_dicom):
    wrong = prepare(write_dicom(tmp_path / "a.dcm", breast(side="right"), ImageLaterality="L"), Settings())
    assert wrong.flags == ["laterality_conflict"] and wrong.flipped
    turned = write_dicom(
        tmp_path / "b.dcm", breast(side="right"), ImageLaterality="L", PatientOrientation=["P", "L"]
    )
    assert prepare(turned, Settings()).flags == []  # the header says that it is stored turned


def test_noise_and_blank_images_are_rejected(tmp_path, write_dicom):
    noise = np.random.default_rng(0).integers(0, 4096, (300, 200)).astype(np.uint16)
    for image, code in ((noise, "qc"), (np.zeros_like(noise), "empty_tissue")):
        with pytest.raises(Reject, match=code):
            prepare(write_dicom(tmp_path / "a.dcm", image), Settings())


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda d: None, "does not exist"),
        (lambda d: d.mkdir(), "holds no files"),
        (lambda d: (d.mkdir(), (d / "a.dcm").write_text("x")), "1 not_dicom"),
        (
            lambda d: (d.mkdir(), (d / "a.png").write_text("x"), (d / "labels.csv").write_text("name\n")),
            "column file",
        ),
        (
            lambda d: (
                d.mkdir(),
                (d / "a.png").write_text("x"),
                (d / "labels.csv").write_text("file\nb.png\n"),
            ),
            "line 2: b.png is not in the folder",
        ),
        (
            lambda d: (
                d.mkdir(),
                (d / "a.png").write_text("x"),
                (d / "labels.csv").write_text("file,label_x\na.png,high\n"),
            ),
            "line 2, label_x: high, expected a number",
        ),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, make, expected, capsys):
    make(tmp_path / "in")
    with pytest.raises(UserError, match=expected) as caught:
        main(["build", "--input", str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--workers", "1"])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob("out.local/parts"))


def test_exit_code_two(tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "data_prep",
            "build",
            "--input",
            str(tmp_path / "no"),
            "--output",
            str(tmp_path / "out"),
        ],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_complete_interrupted_and_foreign_outputs(tmp_path, exams):
    options = BuildOptions((exams,), tmp_path / "out")
    build(options)
    before = digests(tmp_path / "out")
    assert build(options)["already_built"]
    with pytest.raises(UserError, match=r"other clahe: 2\.0 there, 0\.0 now"):
        build(BuildOptions((exams,), tmp_path / "out", settings=Settings(clahe=0.0)))
    (tmp_path / "out/prep.json").unlink()  # as a kill during the last step leaves it
    (tmp_path / "out/mammograms-train.array_record-00009-of-00010").write_bytes(b"")
    build(options)
    assert digests(tmp_path / "out") == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="is not empty"):
        build(BuildOptions((exams,), tmp_path / "mine"))
    assert (tmp_path / "mine/thesis.txt").exists()


def _die(*_, **__):
    os._exit(9)


@pytest.mark.slow
def test_a_dying_worker_is_an_error_not_a_hang(tmp_path, exams, monkeypatch):
    monkeypatch.setattr(build_module, "write_shard", _die)
    with pytest.raises(UserError, match="worker process died"):
        build(BuildOptions((exams,), tmp_path / "out", workers=2))
    assert not (tmp_path / "out").exists()


_scan_chunk = build_module._scan_chunk


def _die_of_one(files, settings):
    return _die() if any(path.name == "Smith1-L.dcm" for path, _ in files) else _scan_chunk(files, settings)


@pytest.mark.slow
def test_a_file_that_kills_the_header_scan_is_rejected(tmp_path, exams, monkeypatch):
    monkeypatch.setattr(build_module, "_scan_chunk", _die_of_one)
    counts = build(BuildOptions((exams,), tmp_path / "out", workers=2))
    lines = (tmp_path / "out.local/rejects.jsonl").read_text().splitlines()
    found = {Path(json.loads(line)["path"]).name: json.loads(line)["code"] for line in lines}
    assert found == {"broken.dcm": "not_dicom", "Smith1-L.dcm": "crashed"} and counts["records"] == 10


def test_a_refused_second_build_leaves_the_first_its_folder(tmp_path):
    output, local = tmp_path / "out", tmp_path / "out.local"
    with build_module.locked(output, local):
        output.mkdir()
        with pytest.raises(UserError, match="another run is writing"), build_module.locked(output, local):
            pass
        assert output.is_dir()
    assert not output.exists()


def test_dry_run_and_inspect(tmp_path, exams, capsys):
    main(["build", "--input", str(exams), "--output", str(tmp_path / "out"), "--workers", "1", "--dry-run"])
    assert "would build up to 11 records" in capsys.readouterr().out
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.local").exists()
    main(["inspect", str(exams / "Smith0-R.dcm"), str(exams / "broken.dcm")])
    lines = capsys.readouterr().out.splitlines()
    assert "2d R MLO" in lines[0] and "flipped" in lines[0] and "rejected, not_dicom" in lines[1]


def _planned(patients: int) -> list[Planned]:
    header = Header("2d", 1, 1)
    return [
        Planned(i, Row(Path(f"{i}.dcm"), f"{i}.dcm"), header, f"p{i // 4}", f"s{i // 4}", str(i))
        for i in range(4 * patients)
    ]


def test_splits_are_grouped_seeded_and_stable():
    few = _planned(10)
    assign_splits(few, (0.7, 0.1, 0.2), seed=0)
    assert [sum(p.split == s for p in few) for s in records.SPLITS] == [28, 4, 8]
    many, more = _planned(1000), _planned(1500)
    assign_splits(many, (0.7, 0.1, 0.2), seed=0)
    assign_splits(more, (0.7, 0.1, 0.2), seed=0)
    shares = [sum(p.split == s for p in many) / len(many) for s in records.SPLITS]
    np.testing.assert_allclose(shares, (0.7, 0.1, 0.2), atol=0.05)
    assert [p.split for p in many] == [p.split for p in more[:4000]]  # a later delivery moves nobody
    assert all(len({p.split for p in many[i : i + 4]}) == 1 for i in range(0, 4000, 4))
    many[0].row.split, many[1].row.split = "train", "test"
    with pytest.raises(UserError, match="a patient must be in one split"):
        assign_splits(many, (0.7, 0.1, 0.2), seed=0)


def test_shards_keep_patients_together():
    planned = _planned(300)
    assign_splits(planned, (0.7, 0.1, 0.2), seed=0)
    shards = make_shards(planned, seed=0)
    order = [p.patient for split in records.SPLITS for chunk in shards[split] for p in chunk]
    assert len(order) == 1200 and sum(a != b for a, b in itertools.pairwise(order)) == 299
    assert order != sorted(order)
    assert max(len(chunk) for chunks in shards.values() for chunk in chunks) <= 512
