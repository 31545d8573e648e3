"""Builds that are killed, run elsewhere, repeated with other labels, or continue an archive; and presets."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from array_record.python.array_record_module import ArrayRecordReader

from data_prep import build as build_module
from data_prep.__main__ import main
from data_prep.build import BuildOptions, build
from data_prep.prepare import prepare
from data_prep.settings import PRESETS, Settings
from mammodino_jax.data import records
from mammodino_jax.errors import UserError


@pytest.fixture(autouse=True)
def key_file(tmp_path, monkeypatch):
    monkeypatch.setenv("MAMMODINO_KEY_FILE", str(tmp_path / "secret" / "key"))


@pytest.fixture
def archive(tmp_path, breast, write_dicom):
    """archive(patients, first=0, folder=...) -> folder of one image a patient, with a labels.csv."""

    def make(patients: int, first: int = 0, folder: str = "archive", label: int = 0) -> Path:
        out = tmp_path / folder
        out.mkdir(exist_ok=True)
        lines = ["file,patient_id,label_x"]
        for p in range(first, first + patients):
            write_dicom(out / f"{p}.dcm", breast(160, 128, seed=p), PatientID=f"P{p}")
            lines.append(f"{p}.dcm,P{p},{label}")
        (out / "labels.csv").write_text("\n".join(lines) + "\n")
        return out

    return make


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def index(folder: Path) -> list[dict]:
    return pq.read_table(folder / "index.parquet").to_pylist()


def test_finished_shards_are_not_made_again(tmp_path, archive, monkeypatch):
    options = BuildOptions((archive(40),), tmp_path / "out")
    build(options)
    whole, made = digests(tmp_path / "out"), []
    real = build_module.write_shard

    def dying(part, files, **kwargs):
        if len(made) == 2:
            raise KeyboardInterrupt  # as good as a kill: nothing of ours runs after it
        made.append(part.name)
        return real(part, files, **kwargs)

    cut = BuildOptions((tmp_path / "archive",), tmp_path / "cut")
    monkeypatch.setattr(build_module, "write_shard", dying)
    with pytest.raises(KeyboardInterrupt):
        build(cut)
    assert not (tmp_path / "cut").exists()
    (tmp_path / "cut.local/parts/train-00001.array_record.tmp").write_bytes(b"half")
    again = []
    monkeypatch.setattr(
        build_module,
        "write_shard",
        lambda part, files, **k: again.append(part.name) or real(part, files, **k),
    )
    build(cut)
    assert not set(made) & set(again) and len(again) >= 2
    assert digests(tmp_path / "cut") == whole and not (tmp_path / "cut.local/parts").exists()


@pytest.mark.slow
def test_sigkill_at_random_moments_gives_the_same_bytes(tmp_path, archive):
    command = [sys.executable, "-m", "data_prep", "build", "--input", str(archive(60)), "--workers", "2"]
    subprocess.run([*command, "--output", str(tmp_path / "whole")], check=True, capture_output=True)
    rng = np.random.default_rng(0)
    for _ in range(3):
        process = subprocess.Popen(
            [*command, "--output", str(tmp_path / "killed")],
            start_new_session=True,
            stderr=subprocess.DEVNULL,
        )
        time.sleep(rng.uniform(0.5, 4))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    subprocess.run([*command, "--output", str(tmp_path / "killed")], check=True, capture_output=True)
    assert digests(tmp_path / "killed") == digests(tmp_path / "whole")


@pytest.mark.slow
def test_a_local_dask_cluster_gives_the_same_bytes(tmp_path, archive):
    folder = archive(20)
    build(BuildOptions((folder,), tmp_path / "one"))
    build(BuildOptions((folder,), tmp_path / "dask", workers=2, dask="local"))
    assert digests(tmp_path / "one") == digests(tmp_path / "dask")
    import distributed

    with distributed.LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=None) as cluster:
        build(BuildOptions((folder,), tmp_path / "there", dask=cluster.scheduler_address))
    assert digests(tmp_path / "one") == digests(tmp_path / "there")


def test_no_dask_scheduler_is_one_line(tmp_path, archive, monkeypatch):
    import distributed

    def refuse(*_, **__):
        raise OSError("Timed out")

    monkeypatch.setattr(distributed, "Client", refuse)
    with pytest.raises(UserError, match="no Dask scheduler answers at tcp://nowhere:8786"):
        build(BuildOptions((archive(1),), tmp_path / "out", dask="tcp://nowhere:8786"))


def test_new_labels_rewrite_the_tables_and_not_the_shards(tmp_path, archive):
    options = BuildOptions((archive(20),), tmp_path / "out")
    build(options)
    before, stat = index(tmp_path / "out"), (tmp_path / "out.local/manifest.jsonl").stat()
    shards = {p: p.stat().st_mtime_ns for p in map(Path, records.shard_paths(tmp_path / "out", "train"))}
    archive(0, label=1)
    lines = ["file,patient_id,label_x,label_y"] + [f"{p}.dcm,P{p},1,{p % 2}" for p in range(20)]
    (tmp_path / "archive/labels.csv").write_text("\n".join(lines) + "\n")
    (tmp_path / "archive/findings.csv").write_text(
        "file,category,shape,y0,x0,y1,x1\n3.dcm,mass,box,20,10,40,30\n"
    )
    counts = build(options)
    assert "already_built" not in counts and counts["records"] == 20
    after = index(tmp_path / "out")
    assert [r["label_x"] for r in after] == [1] * 20 and {r["label_y"] for r in after} == {0, 1}
    strip = lambda rows: [{k: v for k, v in r.items() if not k.startswith("label_")} for r in rows]  # noqa: E731
    assert strip(after) == strip(before)
    assert len(pq.read_table(tmp_path / "out/findings.parquet")) == 1
    assert all(p.stat().st_mtime_ns == ns for p, ns in shards.items())
    assert (tmp_path / "out.local/manifest.jsonl").stat().st_mtime_ns == stat.st_mtime_ns
    assert build(options)["already_built"]


def test_a_monthly_delivery_keeps_patients_in_their_split(tmp_path, archive):
    build(BuildOptions((archive(20),), tmp_path / "january"))
    build(
        BuildOptions(
            (archive(20, first=10, folder="more"),), tmp_path / "february", previous=(tmp_path / "january",)
        )
    )
    old = {r["patient_id"]: r["split"] for r in index(tmp_path / "january")}
    new = index(tmp_path / "february")
    known = [r for r in new if r["patient_id"] in old]
    assert len(known) == 10 and all(r["split"] == old[r["patient_id"]] for r in known)
    ids = {r["image_id"] for r in index(tmp_path / "january")}
    assert all(r["duplicate_of"] in ids for r in known)  # the same pixels again: loaders skip them
    assert all(r["duplicate_of"] is None for r in new if r["patient_id"] not in old)
    with pytest.raises(UserError, match="one patient would get two ids"):
        build(
            BuildOptions(
                (tmp_path / "more",), tmp_path / "march", dataset="march", previous=(tmp_path / "january",)
            )
        )


def test_trainval_is_cut_by_the_seed_and_never_test(tmp_path, archive):
    folder = archive(30)
    lines = ["file,patient_id,split"] + [f"{p}.dcm,P{p},{'test' if p < 5 else ''}" for p in range(30)]
    (folder / "labels.csv").write_text("\n".join(lines) + "\n")
    listing = build_module._source("folder").list_files([folder])
    for row in listing.rows:
        row.split = row.split or "trainval"
    options = BuildOptions((folder,), tmp_path / "out", split=(0.8, 0.2, 0.0))
    earlier = build_module.Earlier((), b"", "x")
    planned, _ = build_module.plan_inputs(listing, options, earlier, lambda f, *tasks, died: map(f, *tasks))
    splits = {p.patient: p.split for p in planned}
    assert all((splits[f"P{p}"] == "test") == (p < 5) for p in range(30))
    assert sum(s == "val" for s in splits.values()) == 5


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets(tmp_path, breast, write_dicom, name):
    image = breast(400, 300, side="right", share=0.25)
    image[:, :8] = 600  # a bright edge that only the 5 px border and the tissue box take off
    path = write_dicom(tmp_path / "a.dcm", image, ImageLaterality="R", WindowCenter=2000, WindowWidth=3000)
    p = prepare([path], Settings(**PRESETS[name] | {"preset": name}))
    record = next(p.images())
    if name == "mammodino":
        assert p.flipped and (record == 0).any() and p.box[1] > 100
    else:
        assert record.min() == 1 and p.mask.all()  # no mask: nothing is background
    if name in ("raw", "rad-dino", "mammoclip"):
        assert not p.flipped and p.window[0] == 0
    if name == "raw":
        assert record.shape == (400, 300) and p.window == (0, image.max())
        np.testing.assert_array_equal(record, np.rint(image * (254 / image.max())).astype(np.uint8) + 1)
    if name == "mammoclip":
        assert record.shape == (1520, 912) and p.box[0] >= 5 and p.box[3] <= 295 and p.box[1] > 100
    if name == "dbt-dino":
        assert (
            record.shape == (518, 518) and p.window == (500, 3500) and not p.flipped
        )  # R hangs on the right
    if name == "rad-dino":
        assert record.shape == (518, 518) and p.box == (50, 0, 350, 300)


def test_flags_go_before_the_preset_and_prep_json_says_both(tmp_path, archive, capsys):
    out = tmp_path / "out"
    main(
        [
            "build",
            "--input",
            str(archive(4)),
            "--output",
            str(out),
            "--preset",
            "raw",
            "--clahe",
            "1",
            "--workers",
            "1",
        ]
    )
    settings = records.read_prep(out)["settings"]
    assert (settings["preset"], settings["mask"], settings["clahe"]) == ("raw", "none", 1.0)
    with pytest.raises(UserError, match="exclude each other"):
        main(["build", "--input", "x", "--output", "y", "--long-side", "9", "--mm-per-px", "1"])


def test_dry_run_makes_no_key(tmp_path, archive):
    counts = build(BuildOptions((archive(3),), tmp_path / "out", dry_run=True))
    assert counts["records"] == 3 and not (tmp_path / "secret").exists()


@pytest.mark.slow
def test_a_long_volume_is_never_in_memory(tmp_path, breast, write_dicom):
    """160 native slices are 160 MB in the file: reading, masking and encoding them takes far less."""
    one = breast(1024, 512, share=0.35)
    path = write_dicom(
        tmp_path / "v.dcm", np.stack([np.roll(one, k, 0) for k in range(160)]), positions=range(160)
    )
    code = (
        "import resource, sys; from pathlib import Path\n"
        "from data_prep.prepare import prepare; from data_prep.settings import Settings\n"
        "rss = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10\n"
        "before = rss(); p = prepare([Path(sys.argv[1])], Settings()); n = sum(1 for _ in p.images())\n"
        "print(n, rss() - before)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    slices, grown = map(int, done.stdout.split())
    assert slices == 160 and grown < 80 and path.stat().st_size > 160 << 20


def test_planted_identifiers_appear_nowhere(tmp_path, breast, write_dicom, caplog):
    """Names, ids, dates and addresses in tags, private tags and file names."""
    secret = "Zyxwv"
    folder = tmp_path / f"{secret}-folder"
    folder.mkdir()
    for p in range(3):
        path = write_dicom(
            folder / f"{secret}{p}.dcm", breast(160, 128, seed=p), PatientID=f"{secret}{p}", PatientName=f"{secret}^A",
            InstitutionName=secret, InstitutionAddress=f"{secret} street 1", ReferringPhysicianName=secret,
            StudyDate="19711103", PatientBirthDate="19230405", AccessionNumber=f"{secret}9", StationName=secret,
            StudyDescription=f"for {secret}", SeriesDescription=f"L MLO {secret}", ImageComments=secret,
            Manufacturer=f"{secret} GmbH", ManufacturerModelName=f"{secret} 1", DeviceSerialNumber=secret,
        )  # fmt: skip
        import pydicom

        ds = pydicom.dcmread(path)
        block = ds.private_block(0x0011, f"{secret} PRIVATE", create=True)
        block.add_new(1, "LO", secret)
        ds.save_as(path)
    (folder / f"{secret}-notes.txt").write_text(secret)
    build(BuildOptions((folder,), tmp_path / "out"))
    from data_prep.report import write_report

    page = write_report(tmp_path / "out", tmp_path / "page.html")
    written = [*(tmp_path / "out").iterdir(), page]
    for path in written:
        data = path.read_bytes()
        for word in (secret, "19711103", "1971-11-03", "19230405", str(tmp_path)):
            assert word.encode() not in data and word.encode("utf-16-le") not in data, (path.name, word)
    for path in records.shard_paths(tmp_path / "out", "train"):
        for record in ArrayRecordReader(path).read_all():
            assert secret.encode() not in record
    assert caplog.messages and not any(secret in m or str(tmp_path) in m for m in caplog.messages)
    assert json.loads((tmp_path / "out.local/rejects.jsonl").read_text())["code"] == "not_dicom"
    assert {row["manufacturer"] for row in index(tmp_path / "out")} == {"other"}
    assert {row["model"] for row in index(tmp_path / "out")} == {None}
