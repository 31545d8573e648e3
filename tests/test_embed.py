"""embed: the features of files are those that evaluate gives their records, whatever happens on the way."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
import windows

from data_prep.build import BuildOptions, Settings, build
from data_prep.phantom import write_phantoms
from mammodino_jax import embed as module
from mammodino_jax.data import records
from mammodino_jax.embed import embed, preprocessing
from mammodino_jax.encoder import load_encoder
from mammodino_jax.errors import UserError
from mammodino_jax.evaluate.features import aggregate, encoder_extractor, record_features
from mammodino_jax.evaluate.items import group, read_rows

REPO = Path(__file__).resolve().parents[1]
LONG_SIDE = 84


@pytest.fixture(scope="module")
def encoder():
    from mammodino_jax.encoder import Encoder
    from mammodino_jax.model.head import init_params
    from mammodino_jax.model.vit import ViTConfig

    vit = ViTConfig(dim=12, depth=1, heads=1, image_size=28)
    return Encoder("tiny", vit, init_params(vit, None, seed=1))


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """3 phantom patients of 4 views and a volume, an 8-bit picture twice, and what is no mammogram."""
    folder = tmp_path_factory.mktemp("files") / "in"
    write_phantoms(folder, 3, 0, coarsen=4)
    (folder / "labels.csv").unlink(), (folder / "findings.csv").unlink(), (folder / "labels.json").unlink()
    first = sorted(folder.glob("*/L_CC.dcm"))[0]
    shutil.copy(first, folder / "copy.dcm")
    (folder / "empty.png").touch()
    y, x = np.mgrid[:300, :200]
    picture = np.where((y - 150) ** 2 / 140**2 + x**2 / 150**2 < 1, 100 + 60 * np.sin(x / 9 + y / 7), 0)
    cv2.imwrite(str(folder / "picture.png"), picture.astype(np.uint8))
    cv2.imwrite(str(folder / "same.tiff"), picture.astype(np.uint8))
    (folder / "cut.png").write_bytes((folder / "picture.png").read_bytes()[:3000])
    return folder


@pytest.fixture(autouse=True)
def key(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("MAMMODINO_KEY_FILE", str(tmp_path_factory.getbasetemp() / "key"))


@pytest.fixture(scope="module")
def whole(encoder, files, tmp_path_factory):
    """The table over `files`, with a picture of each input."""
    folder = tmp_path_factory.mktemp("whole")
    os.environ["MAMMODINO_KEY_FILE"] = str(tmp_path_factory.getbasetemp() / "key")
    done = embed(encoder, BuildOptions((files,), folder / "f.parquet"), LONG_SIDE, images=folder / "png")
    return folder, pq.read_table(folder / "f.parquet"), done


def column(table, name) -> np.ndarray:
    return np.stack(table[name].to_pylist())


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_row_an_accepted_image_and_a_reason_for_every_other_file(whole, files):
    folder, table, done = whole
    local = folder / "f.parquet.local"
    rejects, manifest = lines(local / "rejects.jsonl"), lines(local / "manifest.jsonl")
    assert len(table) == done["rows"] == 12 + 3 + 2
    assert done["rejects"] == {"not_dicom": 2, "duplicate": 1, "truncated": 1}  # README.txt and empty.png
    names = {Path(r["path"]).name for r in rejects}
    assert names == {"README.txt", "empty.png", "cut.png", "copy.dcm"}
    assert done["inputs"] == len(table) + len(rejects)
    assert {i for line in manifest for i in line["ids"]} == set(table["id"].to_pylist())
    assert len({line["path"] for line in manifest}) == len(table)
    kinds = table["kind"].to_pylist()
    assert kinds.count("dbt") == 3 and all(
        (n or 0) > 1 for n, k in zip(table["num_slices"].to_pylist(), kinds, strict=True) if k == "dbt"
    )
    same = [d for d in table["duplicate_of"].to_pylist() if d]
    assert len(same) == 1 and same[0] in table["id"].to_pylist()  # the picture and its TIFF
    mm = (
        table["pixel_mm"].to_numpy() * np.maximum(table["height"].to_numpy(), table["width"].to_numpy())
    ) / LONG_SIDE
    np.testing.assert_allclose(table["mm_per_px"].to_numpy(), mm, rtol=1e-5)
    text = (folder / "f.parquet").read_bytes()
    assert str(files).encode() not in text and b"picture" not in text
    assert sorted(p.name for p in local.iterdir()) == [
        "embed.json",
        "lock",
        "manifest.jsonl",
        "rejects.jsonl",
    ]


def test_features_are_those_that_evaluate_gives_the_records_of_a_build(whole, encoder, files, tmp_path):
    table = whole[1]
    build(BuildOptions((files,), tmp_path / "data"))
    rows = read_rows([tmp_path / "data"])
    items = group(rows)
    found = record_features(rows, encoder_extractor(encoder), LONG_SIDE)
    place = {name: i for i, name in enumerate(table["id"].to_pylist())}
    assert set(items.id) <= place.keys()
    order = [place[name] for name in items.id]
    for name in ("cls", "mean"):
        expected = aggregate(found[name], rows, items)
        np.testing.assert_allclose(column(table, name)[order], expected, atol=2e-6)
    for name in ("patient_id", "kind", "laterality", "view"):
        assert table[name].take(order).to_pylist() == rows.columns[name][items.first].tolist()


def test_the_saved_picture_gives_the_features_of_its_row(whole, encoder):
    folder, table, _ = whole
    expected = {
        name for row in table.to_pylist() for name in
        ([f"{row['id']}-{i}" for i in range(row["num_slices"])] if row["kind"] == "dbt" else [row["id"]])
    }  # fmt: skip
    assert {p.stem for p in (folder / "png").iterdir()} == expected
    for row in table.slice(0, 4).to_pylist() + [r for r in table.to_pylist() if r["kind"] != "dbt"][:2]:
        if row["kind"] != "dbt":
            image = cv2.imread(str(folder / f"png/{row['id']}.png"), cv2.IMREAD_UNCHANGED)
            assert image.ndim == 2 and not any(s % 14 for s in image.shape) and max(image.shape) == LONG_SIDE
            np.testing.assert_allclose(encoder(image[None])["cls"][0], row["cls"], atol=2e-6)


def test_slices_average_to_their_volume_and_npz_holds_the_same(whole, encoder, files, tmp_path):
    table = whole[1]
    embed(encoder, BuildOptions((files,), tmp_path / "f.npz"), LONG_SIDE, per_slice=True)
    with np.load(tmp_path / "f.npz") as f:
        found = {name: f[name] for name in f.files}
    assert found["cls"].shape == (sum(n or 1 for n in table["num_slices"].to_pylist()), 12)
    assert json.loads(str(found["about"]))["long_side"] == LONG_SIDE
    for row in table.to_pylist():
        own = "volume_id" if row["kind"] == "dbt" else "id"
        mine = found["mean"][found[own] == row["id"]]
        np.testing.assert_allclose(mine.mean(axis=0), row["mean"], atol=2e-6)
    index = found["slice_index"]
    assert np.isnan(index).sum() == sum(k != "dbt" for k in table["kind"].to_pylist())


class Interrupted(Exception):
    pass


def test_an_interrupted_run_goes_on_where_it_was(whole, encoder, files, tmp_path, monkeypatch):
    """In this process: calls of the encoder are counted."""
    monkeypatch.setattr(module, "PART", 8)
    calls, stop = [], [10**6]

    class Counted(type(encoder)):
        def __call__(self, images, sizes=None):
            calls.append(1)
            if len(calls) > stop[0]:
                raise Interrupted
            return super().__call__(images, sizes)

    counted = Counted(**{f.name: getattr(encoder, f.name) for f in dataclasses.fields(encoder)})
    embed(counted, BuildOptions((files,), tmp_path / "g.parquet"), LONG_SIDE)
    total, stop[0] = len(calls), len(calls) // 2
    calls.clear()
    options = BuildOptions((files,), tmp_path / "f.parquet")
    with pytest.raises(Interrupted):
        embed(counted, options, LONG_SIDE)
    kept = len(list((tmp_path / "f.parquet.local/parts").glob("*.parquet")))
    assert kept and not (tmp_path / "f.parquet").exists()
    calls.clear()
    stop[0] = 10**6
    done = embed(counted, options, LONG_SIDE)
    assert done["kept"] == kept < done["parts"] and len(calls) < total
    table = pq.read_table(tmp_path / "f.parquet")
    assert table.equals(pq.read_table(tmp_path / "g.parquet"))  # the same bits
    assert table["id"].equals(whole[1]["id"])
    calls.clear()
    assert embed(counted, options, LONG_SIDE)["kept"] == done["parts"] and not calls  # it is complete


@pytest.mark.slow
def test_a_killed_run_goes_on(files, tmp_path, monkeypatch):
    """The command, killed with all its processes; against a run in this process that was not."""
    code = "import sys; from mammodino_jax import embed; embed.PART = 8; embed.main(sys.argv[1:])"
    command = [sys.executable, "-c", code, "--encoder", "random:nano", "--input", str(files), "--long-side", "98",
               "--workers", "1", "--output", str(tmp_path / "f.parquet")]  # fmt: skip
    local = tmp_path / "f.parquet.local"
    process = subprocess.Popen(command, cwd=REPO, start_new_session=True, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)  # fmt: skip
    while len(list(local.glob("parts/*.parquet"))) < 2 and process.poll() is None:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    kept = len(list(local.glob("parts/*.parquet")))
    assert kept >= 2 and not (tmp_path / "f.parquet").exists()
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"{kept} of " in done.stdout
    assert "2 not_dicom" in done.stdout and "1 truncated" in done.stdout
    monkeypatch.setattr(module, "PART", 8)
    embed(load_encoder("random:nano"), BuildOptions((files,), tmp_path / "g.parquet"), 98)
    assert pq.read_table(tmp_path / "f.parquet").equals(pq.read_table(tmp_path / "g.parquet"))


def test_another_encoder_size_or_input_on_the_same_output_is_refused(encoder, files, tmp_path):
    one = sorted(files.glob("*/L_CC.dcm"))[0]
    options = BuildOptions((one,), tmp_path / "f.parquet")
    embed(encoder, options, LONG_SIDE)
    before = (tmp_path / "f.parquet").read_bytes()
    other = dataclasses.replace(encoder, mean=(0.1, 0.2, 0.3))
    for what, arguments in (
        ("fingerprint", (other, options, LONG_SIDE)),
        ("long_side: 84 there, 56 now", (encoder, options, 56)),
        ("per_slice", (encoder, options, LONG_SIDE, 0, True)),
        ("inputs", (encoder, dataclasses.replace(options, inputs=(one.with_name("R_CC.dcm"),)), LONG_SIDE)),
        (
            r"preprocessing\.clahe: 2\.0 there, 0\.0 now",
            (encoder, dataclasses.replace(options, settings=Settings(clahe=0.0)), LONG_SIDE),
        ),
    ):
        with pytest.raises(UserError, match=f"begun with other {what}"):
            embed(*arguments)
    assert (tmp_path / "f.parquet").read_bytes() == before
    (tmp_path / "mine.npz").write_text("precious")
    with pytest.raises(UserError, match="was not written by embed"):
        embed(encoder, dataclasses.replace(options, output=tmp_path / "mine.npz"), LONG_SIDE)


def test_pictures_go_to_one_folder_outside_the_inputs(encoder, files, tmp_path):
    (tmp_path / "in").mkdir()
    shutil.copy(files / "picture.png", tmp_path / "in")
    options = BuildOptions((tmp_path / "in",), tmp_path / "f.parquet")
    with pytest.raises(UserError, match=r"in/png lies in the input"):
        embed(encoder, options, LONG_SIDE, images=tmp_path / "in/png")
    assert not (tmp_path / "f.parquet.local").exists()
    for _ in range(2):
        embed(encoder, options, LONG_SIDE, images=tmp_path / "a")
    with pytest.raises(UserError, match=r"other save_images: \S+/a there, \S+/b now"):
        embed(encoder, options, LONG_SIDE, images=tmp_path / "b")
    assert str(tmp_path).encode() not in (tmp_path / "f.parquet").read_bytes()


def test_changed_files_and_a_broken_description_are_noticed(encoder, files, tmp_path):
    shutil.copy(files / "picture.png", tmp_path / "a.png")
    options = BuildOptions((tmp_path / "a.png",), tmp_path / "f.parquet")
    embed(encoder, options, LONG_SIDE)
    said = tmp_path / "f.parquet.local/embed.json"
    assert not list(said.parent.glob("*.tmp"))
    os.utime(tmp_path / "a.png", ns=(1, 1))  # written again, as long as before
    with pytest.raises(UserError, match=r"other inputs \(files, sizes, times"):
        embed(encoder, options, LONG_SIDE)
    said.write_text(said.read_text()[:50])
    with pytest.raises(UserError, match=r"embed\.json cannot be read .* to begin again delete"):
        embed(encoder, options, LONG_SIDE)


def test_a_table_with_other_columns_is_mapped_as_in_a_build(encoder, files, tmp_path):
    (tmp_path / "in").mkdir()
    shutil.copy(files / "picture.png", tmp_path / "in")
    (tmp_path / "in/labels.csv").write_text("Bild,PatNr,Arzt\npicture.png,77,Dr. X\n")
    options = BuildOptions((tmp_path / "in",), tmp_path / "f.npz")
    with pytest.raises(UserError, match="expected a column file"):
        embed(encoder, options, LONG_SIDE)
    command = ["--encoder", "E", "--input", str(tmp_path / "in"), "--workers", "1", "--long-side", "56",
               "--columns", "file=Bild,patient_id=PatNr"]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mammodino_jax.encoder.load_encoder", lambda spec: encoder)
        module.main([*command, "--output", str(options.output)])
    columns = {"file": "Bild", "patient_id": "PatNr"}
    build(dataclasses.replace(options, output=tmp_path / "data", columns=columns))
    index = pq.read_table(tmp_path / "data/index.parquet").to_pylist()
    with np.load(options.output) as f:
        assert [(r["image_id"], r["patient_id"]) for r in index] == [(f["id"][0], f["patient_id"][0])]


read_records = module.read_records


def die_of_one(p, **settings):
    return os._exit(9) if p.row.name == "picture.png" else read_records(p, **settings)


@pytest.mark.slow
def test_a_file_that_kills_its_process_is_rejected(whole, encoder, files, tmp_path, monkeypatch):
    """A process of the pool, and then one of its own."""
    monkeypatch.setattr(module, "read_records", die_of_one)
    done = embed(encoder, BuildOptions((files,), tmp_path / "f.parquet", workers=2), LONG_SIDE)
    assert done["rejects"] == whole[2]["rejects"] | {"crashed": 1} and done["rows"] == whole[2]["rows"] - 1
    found = {Path(r["path"]).name: r["code"] for r in lines(tmp_path / "f.parquet.local/rejects.jsonl")}
    assert found["picture.png"] == "crashed"
    table = pq.read_table(tmp_path / "f.parquet")
    assert set(table["id"].to_pylist()) < set(whole[1]["id"].to_pylist())


def test_bad_input_is_one_line(encoder, files, tmp_path):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/a.png").write_text("x")
    good, bad = sorted(files.glob("*/L_CC.dcm"))[0], tmp_path / "bad"
    for inputs, name, long_side, message in (
        ((good,), "f.csv", LONG_SIDE, "ends in .parquet or .npz"),
        ((tmp_path / "no",), "f.npz", LONG_SIDE, "does not exist"),
        ((bad,), "g.npz", LONG_SIDE, r"none of 1 input files is usable \(1 not_dicom\)"),
        ((bad,), "bad/f.npz", LONG_SIDE, "lies in the input"),
        ((good,), "f.npz", 100, "not a positive multiple of the patch size 14; 98 is"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            embed(encoder, BuildOptions(inputs, tmp_path / name), long_side)
        assert "\n" not in str(caught.value) and not (tmp_path / name).exists()


def test_preprocessing_is_what_the_encoder_was_made_for(encoder):
    settings, origin = preprocessing(encoder)
    assert settings == Settings() and "names none" in origin
    made_for = {"preset": "mammodino", "box": "full", "size": [518, 518], "dataset": "x", "seed": 0}
    ours = dataclasses.replace(encoder, made_for=made_for)
    settings, origin = preprocessing(ours)
    assert settings == Settings(box="full", size=(518, 518)) and "made for" in origin
    with pytest.raises(UserError, match="box tissue, not full"):
        preprocessing(ours, "mammodino")
    settings, origin = preprocessing(ours, "mammodino", foreign=True)
    assert settings == Settings() and "foreign to the encoder" in origin
    with pytest.raises(UserError, match="table of vendors"):
        preprocessing(dataclasses.replace(encoder, made_for={"vendor_table": "0123"}))


def test_the_command(files, tmp_path, capsys, monkeypatch, encoder):
    monkeypatch.setattr("mammodino_jax.encoder.load_encoder", lambda spec: encoder)
    one = str(sorted(files.glob("*/L_CC.dcm"))[0])
    command = [
        "--encoder",
        "E",
        "--input",
        one,
        str(files / "README.txt"),
        "--workers",
        "1",
        "--long-side",
        "56",
    ]
    module.main([*command, "--output", str(tmp_path / "f.npz"), "--preset", "raw", "--dataset", "d"])
    shown = capsys.readouterr().out
    assert "preprocessing: preset raw" in shown and "wrote 1 rows from 2 files" in shown
    assert "rejected: 1 not_dicom" in shown
    with np.load(tmp_path / "f.npz") as f:
        assert f["dataset"].tolist() == ["d"] and f["coverage"].tolist() == [1.0]
    with pytest.raises(UserError, match="--batch-size -1"):
        module.main([*command, "--output", str(tmp_path / "g.npz"), "--batch-size", "-1"])


def test_terms_that_forbid_a_release_go_with_the_features(files, tmp_path, capsys, monkeypatch, encoder):
    forbidding = dataclasses.replace(encoder, provenance={"no_release": ["embed"]})
    monkeypatch.setattr("mammodino_jax.encoder.load_encoder", lambda spec: forbidding)
    command = ["--encoder", "E", "--input", str(files / "picture.png"), "--workers", "1", "--long-side", "56"]
    for name in ("f.npz", "f.parquet"):
        module.main([*command, "--output", str(tmp_path / name)])
        assert "trained on embed: the terms forbid publishing these features" in capsys.readouterr().out
    with np.load(tmp_path / "f.npz") as f:
        assert f["no_release"].tolist() == ["embed"]
    about = pq.read_schema(tmp_path / "f.parquet").metadata[b"mammodino_jax.embed"]
    assert json.loads(about)["no_release"] == ["embed"]


def test_windows_of_one_image_are_nearer_than_patients(encoder, files, tmp_path):
    """A phantom under its window, linear and sigmoid, and under percentiles. Random weights: this tests the
    way there, not an encoder."""
    one = sorted(files.glob("*/L_CC.dcm"))[0]
    names = windows.write_variants(one, tmp_path)
    assert names == ["percentile", "window 1 LINEAR", "window 1 SIGMOID"]
    others = tuple(p for p in sorted(files.glob("*/L_CC.dcm")) if p != one)
    options = BuildOptions((tmp_path,), tmp_path / "../windows.npz", settings=Settings(window="tag"))
    embed(encoder, options, LONG_SIDE)
    embed(encoder, dataclasses.replace(options, inputs=others, output=tmp_path / "../others.npz"), LONG_SIDE)
    with np.load(tmp_path / "../windows.npz") as w, np.load(tmp_path / "../others.npz") as o:
        assert "window_fallback" in w["flags"].tolist() and len(set(w["pixel_hash"])) == 3
        patients = np.concatenate([w["mean"][:1], o["mean"]])
        found = windows.plain_cosines(w["mean"], patients)
        assert len(found["within"]) == len(found["between"]) == 3
        assert found["within"].min() > found["between"].mean()


def test_schema_keeps_the_names_of_the_index():
    assert set(module.SCHEMA.names) - set(records.INDEX.names) == {
        "id", "mm_per_px", "decoder", "number", "cls", "mean",
    }  # fmt: skip
