"""What real archives hold and users do: copies, shared UIDs, stray folders, free text, two builds at once."""

import fcntl
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from data_prep import vendors
from data_prep.build import BuildOptions, build
from data_prep.plan import Planned, Row, assign_splits
from data_prep.read import Header
from data_prep.settings import Settings
from mammodino_jax.data.index import open_records
from mammodino_jax.errors import UserError

CT = "1.2.840.10008.5.1.4.1.1.2"


@pytest.fixture(autouse=True)
def key_file(tmp_path, monkeypatch):
    monkeypatch.setenv("MAMMODINO_KEY_FILE", str(tmp_path / "secret" / "key"))


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "in").mkdir()
    return tmp_path / "in"


def made(tmp_path, folder, **options) -> list[dict]:
    build(BuildOptions((folder,), tmp_path / "out", **options))
    return pq.read_table(tmp_path / "out/index.parquet").to_pylist()


def rejects(tmp_path) -> dict[str, str]:
    lines = (tmp_path / "out.local/rejects.jsonl").read_text().splitlines()
    return {Path(r["path"]).name: r["code"] for r in map(json.loads, lines)}


def slices(folder, breast, write_dicom, count=3, **attributes) -> list[Path]:
    tags = {"SOPClassUID": CT, "Modality": "CT", "ImageType": ["DERIVED", "PRIMARY", "TOMO"],
            "ImageOrientationPatient": [1, 0, 0, 0, 1, 0], "SeriesInstanceUID": "1.2.3", "StudyInstanceUID": "1.2"}  # fmt: skip
    name, shape = attributes.pop("name", "s"), attributes.pop("shape", (160, 128))
    paths = []
    for z in range(count):
        place = {"ImagePositionPatient": [0, 0, z], "InstanceNumber": z}
        image = breast(*shape, seed=z)
        paths.append(write_dicom(folder / f"{name}{z}.dcm", image, **tags | place | attributes))
    return paths


def test_one_build_at_a_time(tmp_path, folder, breast, write_dicom):
    write_dicom(folder / "a.dcm", breast(160, 128))
    (tmp_path / "out.local").mkdir()
    with open(tmp_path / "out.local/lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another run is writing"):
            build(BuildOptions((folder,), tmp_path / "out"))
    assert len(made(tmp_path, folder)) == 1


def test_an_output_that_cannot_be_is_one_line(tmp_path, folder, breast, write_dicom):
    write_dicom(folder / "a.dcm", breast(160, 128))
    (tmp_path / "file").write_text("x")
    for output in (tmp_path / "file" / "out", Path("/proc/none/out")):
        with pytest.raises(UserError, match="cannot write to"):
            build(BuildOptions((folder,), output))
    with pytest.raises(UserError, match="give a folder of its own"):
        build(BuildOptions((folder,), Path("/")))


def test_output_inside_the_input_is_refused(tmp_path, folder, breast, write_dicom):
    write_dicom(folder / "a.dcm", breast(160, 128))
    for output in (folder / "out", folder):
        with pytest.raises(UserError, match="lies in the input"):
            build(BuildOptions((folder,), output))
    assert [p.name for p in folder.iterdir()] == ["a.dcm"]


def test_two_acquisitions_in_one_series_are_two_volumes(tmp_path, folder, breast, write_dicom):
    slices(folder, breast, write_dicom, name="a")
    slices(folder, breast, write_dicom, name="b", shape=(180, 128))
    rows = made(tmp_path, folder, split=(1.0, 0.0, 0.0))
    assert len(rows) == 6 and len({r["volume_id"] for r in rows}) == 2
    opened = open_records([(str(tmp_path / "out"), "train", "dbt", 1.0)])
    assert [len(v) for v in opened.volumes] == [3, 3]


def test_a_cut_slice_gives_its_place_to_a_copy(tmp_path, folder, breast, write_dicom):
    paths = slices(folder, breast, write_dicom)
    whole = paths[1].read_bytes()
    (folder / "copy.dcm").write_bytes(whole)
    at = whole.rindex(b"\xe0\x7f\x10\x00")
    (folder / "s1.dcm").write_bytes(whole[:at] + b"\0" * 10 + whole[at:])  # larger, and broken at its pixels
    rows = made(tmp_path, folder)
    assert [r["slice_position_mm"] for r in rows] == [0, 1, 2]
    assert rejects(tmp_path) == {"s1.dcm": "truncated"}


def test_one_uid_in_two_patients_is_two_images(tmp_path, folder, breast, write_dicom):
    for p in range(3):
        write_dicom(
            folder / f"{p}.dcm", breast(160, 128, seed=p), PatientID=f"P{p}", SOPInstanceUID="1.2.3.4"
        )
    rows = made(tmp_path, folder)
    assert len({r["image_id"] for r in rows}) == len({r["patient_id"] for r in rows}) == 3


def test_a_copy_keeps_what_the_table_says_of_it(tmp_path, folder, breast, write_dicom):
    data = write_dicom(folder / "a.dcm", breast(160, 128)).read_bytes()
    (folder / "b.dcm").write_bytes(data)
    (folder / "labels.csv").write_text("file,patient_id,split,label_x\nb.dcm,P9,test,1\n")
    (row,) = made(tmp_path, folder)
    assert (row["split"], row["label_x"]) == ("test", 1) and rejects(tmp_path) == {"b.dcm": "duplicate"}
    (folder / "labels.csv").write_text("file,split\na.dcm,train\nb.dcm,test\n")
    with pytest.raises(UserError, match="two copies of input 0 have different split"):
        build(BuildOptions((folder,), tmp_path / "other"))


def test_a_volume_is_no_sibling_of_a_raw_image(tmp_path, folder, breast, write_dicom):
    image = breast(160, 128)
    raw = np.where(image > 0, 4095 - image, 4095).astype(np.uint16)
    same = {"StudyInstanceUID": "1.2", "ViewPosition": "CC"}
    write_dicom(folder / "raw.dcm", raw, PresentationIntentType="FOR PROCESSING", **same)
    write_dicom(folder / "tomo.dcm", np.stack([image] * 3), **same)
    assert sorted(r["kind"] for r in made(tmp_path, folder)) == ["2d", "dbt", "dbt", "dbt"]


def test_dry_run_leaves_a_built_data_set_alone(tmp_path, folder, breast, write_dicom):
    write_dicom(folder / "a.dcm", breast(160, 128))
    (folder / "labels.csv").write_text("file,label_x\na.dcm,0\n")
    made(tmp_path, folder)
    before = (tmp_path / "out/index.parquet").read_bytes()
    (folder / "labels.csv").write_text("file,label_x\na.dcm,1\n")
    build(BuildOptions((folder,), tmp_path / "out", dry_run=True))
    assert (tmp_path / "out/index.parquet").read_bytes() == before


def test_relabelling_without_the_files_is_one_line(tmp_path, folder, breast, write_dicom):
    path = write_dicom(folder / "a.dcm", breast(160, 128))
    write_dicom(folder / "b.dcm", breast(160, 128, seed=1))
    made(tmp_path, folder)
    path.write_bytes(b"\0" * path.stat().st_size)
    (folder / "labels.csv").write_text("file,label_x\nb.dcm,1\n")
    with pytest.raises(UserError, match=r"1 of its files are no longer usable \(the first is input 0\)"):
        build(BuildOptions((folder,), tmp_path / "out"))
    assert (tmp_path / "out/prep.json").is_file()


def test_previous_with_another_key_is_refused(tmp_path, folder, breast, write_dicom):
    write_dicom(folder / "a.dcm", breast(160, 128))
    made(tmp_path, folder)
    with pytest.raises(UserError, match="built with another --key"):
        build(
            BuildOptions((folder,), tmp_path / "feb", previous=(tmp_path / "out",), key=str(tmp_path / "k2"))
        )


def test_splits_with_shares_of_zero():
    def split(shares, count, no_test=False):
        header = Header("2d", 1, 1)
        planned = [
            Planned(
                i,
                Row(Path(f"{i}"), f"{i}", split="trainval" if no_test else None),
                header,
                f"p{i}",
                "s",
                f"{i}",
            )
            for i in range(count)
        ]
        assign_splits(planned, shares, seed=0)
        return [sum(p.split == s for p in planned) for s in ("train", "val", "test")]

    assert split((0.0, 0.5, 0.5), 5)[0] == 0 and split((0.0, 0.0, 1.0), 1) == [0, 0, 1]
    assert min(split((0.05, 0.475, 0.475), 10)) >= 1 and split((1.0, 0.0, 0.0), 4) == [4, 0, 0]
    for count in (20, 120):
        with pytest.raises(UserError, match="leaves nothing for train and val"):
            split((0.0, 0.0, 1.0), count, no_test=True)


def test_links_are_followed_once_and_unreadable_folders_named(
    tmp_path, folder, breast, write_dicom, monkeypatch
):
    away = tmp_path / "away"
    away.mkdir()
    write_dicom(away / "a.dcm", breast(160, 128))
    (folder / "site").symlink_to(away)
    (away / "loop").symlink_to(folder)
    write_dicom(folder / "b.dcm", breast(160, 128, seed=1))
    assert len(made(tmp_path, folder)) == 2
    real = os.scandir

    def scandir(path):
        if str(path).endswith("site"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(UserError, match="site cannot be read"):
        build(BuildOptions((folder,), tmp_path / "other"))


def test_names_that_are_no_utf8(tmp_path, folder, breast):
    import cv2

    name = os.fsdecode(bytes(folder) + b"/\xff\xfe.png")
    Path(name).write_bytes(cv2.imencode(".png", breast(160, 128))[1].tobytes())
    assert len(made(tmp_path, folder)) == 1


@pytest.mark.parametrize(
    ("table", "line", "message"),
    [
        ("labels.csv", "file,view\na.dcm,doe^jane 1950-01-01", "line 2, view"),
        ("labels.csv", "file,site\na.dcm,Dr Smith ward", "line 2, site: expected a short term"),
        ("labels.csv", "file,label_DOE^JANE\na.dcm,1", "unknown column label_DOE"),
        ("findings.csv", "file,pathology\na.dcm,see report 2019-03-01 Dr Smith", "line 2, pathology: expected a short term"),
        ("findings.csv", "file,shpae\na.dcm,box", 'unknown column shpae. Did you mean "shape"'),
        ("findings.csv", "file,shape,y0,x0,y1,x1\na.dcm,box,5,5,4,9", "line 2: expected y0 < y1"),
        ("findings.csv", "file,slice_index\na.dcm,-1", "line 2, slice_index"),
        ("labels.csv", "file,label_x\na.dcm," + "9" * 200_000, "labels.csv line"),
    ],
)  # fmt: skip
def test_tables_that_would_publish_or_mislead_are_refused(
    tmp_path, folder, breast, write_dicom, table, line, message
):
    write_dicom(folder / "a.dcm", breast(160, 128))
    (folder / table).write_text(line + "\n")
    with pytest.raises(UserError, match=message.replace("^", r"\^")):
        made(tmp_path, folder)


def test_columns_without_a_table_are_refused(tmp_path, folder, breast, write_dicom):
    write_dicom(folder / "a.dcm", breast(160, 128))
    with pytest.raises(UserError, match=r"--columns maps the columns of labels\.csv"):
        made(tmp_path, folder, columns={"patient_id": "PatNr"})


def test_models_are_products_of_the_table():
    known = vendors.look_up("HOLOGIC, Inc.", "Selenia Dimensions", "")
    assert (known["name"], known["model"]) == ("Hologic", "SELENIA DIMENSIONS")
    assert vendors.look_up("HOLOGIC, Inc.", "Room 3 Jane Doe 1950-01-01", "")["model"] is None
    assert vendors.look_up("St Mary's workshop", "Selenia", "") | {} == {
        "name": "other", "model": None, "window": None, "voi_index": None, "invert": False}  # fmt: skip


@pytest.mark.parametrize(
    ("row", "message"),
    [("x,,,,,5,-5,,,", "window_width"), ("x,,,,,5,,,,", "go together"), ("x,,,,,,,1.5,,", "voi_index"),
     ("x,,,,,,,,yes,", "invert"), ("(,,,,,,,,,", "regular expression")],
)  # fmt: skip
def test_mistakes_in_the_table_of_vendors(row, message):
    with pytest.raises(UserError, match=rf"--vendors line 2.*{message}"):
        vendors.check(",".join(vendors.COLUMNS) + "\n" + row + "\n")


def test_the_table_of_vendors_stays_local(tmp_path, folder, breast, write_dicom):
    write_dicom(folder / "a.dcm", breast(160, 128), Manufacturer="ACME")
    table = ",".join(vendors.COLUMNS) + "\nacme,,,,,2000,1000,,,asked Dr Smith\n"
    (row,) = made(tmp_path, folder, settings=Settings(window="tag", vendor_table=table))
    assert (row["window_lo"], row["window_hi"]) == (1500, 2500)
    assert all(b"Smith" not in p.read_bytes() for p in (tmp_path / "out").iterdir())
    assert "Smith" in (tmp_path / "out.local/vendors.csv").read_text()
    from data_prep.report import write_report

    assert write_report(tmp_path / "out").is_file()


def test_no_header_value_reaches_the_console(tmp_path, folder, breast, write_dicom):
    path = write_dicom(folder / "a.dcm", breast(160, 128), StudyInstanceUID="1.2.3.4.5.6.7.8")
    data = path.read_bytes().replace(b"1.2.3.4.5.6.7.8", b"JANEDOE1950xxxx").replace(b"P-1", b"P\xff1")
    path.write_bytes(data)
    command = [
        sys.executable,
        "-m",
        "data_prep",
        "build",
        "--input",
        str(folder),
        "--output",
        str(tmp_path / "out"),
    ]
    done = subprocess.run(
        [*command, "--workers", "1"], capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 0 and "JANEDOE" not in done.stdout + done.stderr


def test_slices_in_two_splits_are_refused(tmp_path, folder, breast, write_dicom):
    slices(folder, breast, write_dicom)
    lines = [f"s{z}.dcm,{split}" for z, split in enumerate(("train", "train", "test"))]
    (folder / "labels.csv").write_text("\n".join(["file,split", *lines]) + "\n")
    with pytest.raises(UserError, match="a patient must be in one split"):
        made(tmp_path, folder)


def test_the_order_of_inputs_does_not_matter(tmp_path, breast, write_dicom):
    for name, seed in itertools.product("ab", range(2)):
        (tmp_path / name).mkdir(exist_ok=True)
        write_dicom(tmp_path / name / f"{seed}.dcm", breast(160, 128, seed=seed + 2 * (name == "b")))
    build(BuildOptions((tmp_path / "a", tmp_path / "b"), tmp_path / "out"))
    assert build(BuildOptions((tmp_path / "b", tmp_path / "a"), tmp_path / "out"))["already_built"]
