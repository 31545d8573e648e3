"""Phantoms: valid DICOM, the truth where the CSVs say it is, the same bytes from the same seed."""

import csv
import dataclasses
import hashlib
import itertools
import json

import cv2
import numpy as np
import pydicom
import pytest

from data_prep import phantom
from data_prep import phantom_breast as anatomy
from mammodino_jax.errors import UserError

COARSEN = 4.0
PATIENTS = 9  # three blocks of vendors, two of densities
SEED = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("phantom") / "out"
    counts = phantom.write_phantoms(path, PATIENTS, SEED, coarsen=COARSEN)
    files, volumes = len(list(path.glob("*/*.dcm"))), len(list(path.glob("*/*_tomo.dcm")))
    assert counts == {
        "patients": 9,
        "files": files,
        "volumes": volumes,
        "findings": len(table(path, "findings")),
    }
    assert (files, volumes) == (45, 9)
    return path


@pytest.fixture(scope="module")
def datasets(folder):
    return {str(path.relative_to(folder)): pydicom.dcmread(path) for path in sorted(folder.glob("*/*.dcm"))}


def table(folder, name):
    with (folder / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def shown(ds):
    """Pixels f32 with bright tissue, whatever the polarity."""
    pixels = ds.pixel_array.astype(np.float32)
    return 4095 - pixels if ds.PhotometricInterpretation == "MONOCHROME1" else pixels


def hashes(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def lesion_pair(category, coarsen=1.0, view="CC"):
    """Slabs of one breast with its lesions (the first of `category`) and without any."""
    for number in range(40):
        patient = anatomy.make_patient(SEED, number)
        lesions = tuple(lesion for lesion in patient.lesions if lesion.category == category)[:1]
        if lesions and lesions[0].malignant:
            breast = anatomy.make_breast(patient, patient.lesion_side, coarsen)
            return [
                anatomy.compress(dataclasses.replace(breast, lesions=chosen), view, 0.4 * coarsen)
                for chosen in (lesions, ())
            ]
    raise AssertionError(f"no malignant {category} in 40 patients")


def test_2d_headers(datasets):
    for name, ds in datasets.items():
        if "tomo" in name:
            continue
        assert ds.SOPClassUID == "1.2.840.10008.5.1.4.1.1.1.2"
        assert ds.file_meta.MediaStorageSOPInstanceUID == ds.SOPInstanceUID
        assert (ds.ImageLaterality, ds.ViewPosition) == tuple(name.split("/")[1][:-4].split("_"))
        assert ds.ViewCodeSequence[0].CodeValue == {"CC": "399162004", "MLO": "399368009"}[ds.ViewPosition]
        assert (ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation) == (16, 12, 11, 0)
        assert ds.PresentationIntentType == "FOR PRESENTATION"
        inverse = ds.PhotometricInterpretation == "MONOCHROME1"
        assert ds.PresentationLUTShape == ("INVERSE" if inverse else "IDENTITY")
        assert ds.PatientOrientation[0] == ("A" if ds.ImageLaterality == "L" else "P")
        assert ds.WindowWidth > 0 and 0 < ds.WindowCenter < 4096
        assert ds.ImagerPixelSpacing[0] * ds.Rows == pytest.approx(240, abs=3)
        assert "PHANTOM" in str(ds.PatientName) and "SYNTHETIC" in ds.StudyDescription
        assert ds.pixel_array.shape == (ds.Rows, ds.Columns) and ds.pixel_array.max() <= 4095


def test_tomosynthesis_headers(datasets):
    volumes = {name: ds for name, ds in datasets.items() if "tomo" in name}
    for name, ds in volumes.items():
        assert ds.SOPClassUID == "1.2.840.10008.5.1.4.1.1.13.1.3"
        assert ds.PhotometricInterpretation == "MONOCHROME2"
        assert 22 <= ds.NumberOfFrames <= 29 and ds.pixel_array.shape[0] == ds.NumberOfFrames
        assert "VOILUTFunction" not in ds and "WindowCenter" not in ds  # forbidden outside functional groups
        shared = ds.SharedFunctionalGroupsSequence[0]
        side = name.split("/")[1][0]
        assert shared.FrameAnatomySequence[0].FrameLaterality == side
        assert shared.FrameVOILUTSequence[0].WindowWidth > 0
        assert shared.PixelValueTransformationSequence[0].RescaleSlope == 1
        measures = shared.PixelMeasuresSequence[0]
        assert measures.SliceThickness == measures.SpacingBetweenSlices == 1
        assert measures.PixelSpacing[0] * ds.Rows == pytest.approx(240, abs=3)
        orientation = np.array(shared.PlaneOrientationSequence[0].ImageOrientationPatient, float)
        along, down = orientation.reshape(2, 3)
        frames = ds.PerFrameFunctionalGroupsSequence
        places = np.array([f.PlanePositionSequence[0].ImagePositionPatient for f in frames], float)
        beam = np.broadcast_to(np.cross(along, down), (len(places) - 1, 3))
        np.testing.assert_allclose(np.diff(places, axis=0), beam, atol=2e-4)
        assert along[1] == (-1 if side == "L" else 1)  # towards anterior in L
        assert np.cross(along, down)[2] < 0  # the beam goes down
    assert {name.split("/")[1] for name in volumes} == {
        f"{s}_{v}_tomo.dcm" for s in "LR" for v in ("CC", "MLO")
    }


def test_vendors_differ(datasets):
    flat = [ds for name, ds in datasets.items() if "tomo" not in name]
    assert {ds.PhotometricInterpretation for ds in flat} == {"MONOCHROME1", "MONOCHROME2"}
    assert len({ds.ImagerPixelSpacing[0] for ds in flat}) == len({ds.Rows for ds in flat}) == 3
    assert any(ds.file_meta.TransferSyntaxUID == pydicom.uid.RLELossless for ds in flat)
    for ds in flat:
        image = shown(ds)
        wall = 0 if ds.ImageLaterality == "L" else -1
        far = image[ds.Rows // 3 : -20, -40:-10] if wall == 0 else image[ds.Rows // 3 : -20, 10:40]
        if ds.Manufacturer == "Phantom A":
            assert far.max() == 0
        else:
            assert 50 < far.mean() < 400 and far.std() > 3
        if "PixelPaddingValue" in ds:
            assert (image[:, -1 - wall] == ds.PixelPaddingValue).all() and (image[20:-20, wall] > 0).all()


def test_chest_wall_side_and_label(datasets):
    for ds in datasets.values():
        image = shown(ds)
        if image.ndim == 3:
            image = image[len(image) // 2]
            left = ds.SharedFunctionalGroupsSequence[0].FrameAnatomySequence[0].FrameLaterality == "L"
        else:
            left = ds.ImageLaterality == "L"
            corner = (
                image[: ds.Rows // 6, -ds.Columns // 3 :]
                if left
                else image[: ds.Rows // 6, : ds.Columns // 3]
            )
            assert corner.max() > 3000  # burned-in label, upper corner away from the breast
        if not left:
            image = image[:, ::-1]
        rows = slice(image.shape[0] // 3, -image.shape[0] // 3)
        assert image[rows, 5:30].mean() > 600 > image[rows, -30:-5].mean()


def test_pectoral_muscle_in_mlo_only(datasets):
    for name, ds in datasets.items():
        if "tomo" in name:
            continue
        image = shown(ds) if ds.ImageLaterality == "L" else shown(ds)[:, ::-1]
        top_of_wall = image[8:20, 5:12].mean()
        assert top_of_wall > 1500 if ds.ViewPosition == "MLO" else top_of_wall < 500


def test_tables(folder, datasets):
    labels, findings = table(folder, "labels"), table(folder, "findings")
    assert list(labels[0]) == [
        "file", "patient_id", "study_id", "laterality", "view",
        "label_density", "label_cancer", "label_lesion",
    ]  # fmt: skip
    assert {row["file"] for row in labels} == set(datasets)
    assert sorted(row["label_density"] for row in labels[:40:5]) == sorted("00112233")
    with_finding = {row["file"] for row in findings}
    malignant = {row["file"] for row in findings if row["pathology"] == "malignant"}
    for row in labels:
        ds = datasets[row["file"]]
        assert (ds.PatientID, ds.StudyInstanceUID) == (row["patient_id"], row["study_id"])
        assert (row["label_lesion"] == "1") == (row["file"] in with_finding)
        assert (row["label_cancer"] == "1") == (row["file"] in malignant)
    assert malignant and with_finding - malignant and len(with_finding) < len(labels)
    for row in findings:
        ds = datasets[row["file"]]
        assert 0 <= int(row["y0"]) < int(row["y1"]) <= ds.Rows
        assert 0 <= int(row["x0"]) < int(row["x1"]) <= ds.Columns
        assert row["category"] in ("mass", "calcification") and row["shape"] == "box"
        if "tomo" in row["file"]:
            assert 0 <= int(row["slice_index"]) < ds.NumberOfFrames
        else:
            assert row["slice_index"] == ""
    meaning = json.loads((folder / "labels.json").read_text())
    assert list(meaning) == ["label_density", "label_cancer", "label_lesion"]
    assert meaning["label_density"]["classes"] == ["A", "B", "C", "D"]
    assert "SYNTHETIC" in (folder / "README.txt").read_text()


def test_boxes_are_brighter_than_their_surroundings(folder, datasets):
    contrasts = []
    for row in table(folder, "findings"):
        image = shown(datasets[row["file"]])
        if row["slice_index"]:
            image = image[int(row["slice_index"])]
        y0, x0, y1, x1 = (int(row[key]) for key in ("y0", "x0", "y1", "x1"))
        h, w = y1 - y0, x1 - x0
        around = image[max(0, y0 - h // 2) : y1 + h // 2, max(0, x0 - w // 2) : x1 + w // 2]
        core = image[y0 + h // 4 : y1 - h // 4, x0 + w // 4 : x1 - w // 4]
        contrasts.append(core.mean() - around.mean())
    assert np.mean(np.array(contrasts) > 0) > 0.8 and np.median(contrasts) > 80, contrasts


@pytest.mark.parametrize("category", ["mass", "calcification"])
@pytest.mark.parametrize("view", ["CC", "MLO"])
def test_lesion_lies_in_its_box(category, view):
    lesion, plain = lesion_pair(category, coarsen=2.0, view=view)
    images = [phantom.project(slab, np.random.default_rng(0)) for slab in (lesion, plain)]
    change = np.maximum(images[0] - images[1], 0)
    *_, y0, x0, y1, x1, _ = phantom._finding("f", change.shape, lesion, *lesion.findings[0], "L")
    inside = change[y0:y1, x0:x1].sum()
    assert inside > 0.75 * change.sum() > 0
    *_, y0, x0, y1, x1, _ = phantom._finding("f", change.shape, lesion, *lesion.findings[0], "R")
    flipped = change[:, ::-1][y0:y1, x0:x1].sum()
    assert flipped == pytest.approx(inside, rel=1e-5)


@pytest.mark.parametrize("category", ["mass", "calcification"])
def test_lesion_is_sharpest_in_its_slice(category):
    lesion, plain = lesion_pair(category, coarsen=1.6)
    volumes = [phantom.tomosynthesis(slab, np.random.default_rng(0)) for slab in (lesion, plain)]
    sharpness = [cv2.Laplacian(a - b, cv2.CV_32F).std() for a, b in zip(*volumes, strict=True)]
    middle = phantom._finding("f", volumes[0].shape, lesion, *lesion.findings[0], "L")[-1]
    away = 2 if category == "mass" else 1  # spicules leave a mass at random
    assert abs(int(np.argmax(sharpness)) - middle) <= away
    assert min(sharpness) < 0.6 * max(sharpness)


def test_slices_are_coherent_but_not_equal():
    patient = anatomy.make_patient(SEED, 1)
    slab = anatomy.compress(anatomy.make_breast(patient, "L", 2.0), "CC", 0.8)
    volume = phantom.tomosynthesis(slab, np.random.default_rng(0))[:, 100:200, 10:70]
    volume = volume - volume.mean((1, 2), keepdims=True)
    similarity = [np.corrcoef(volume[10].ravel(), volume[10 + d].ravel())[0, 1] for d in (1, 4, 10)]
    assert 1 > similarity[0] > similarity[1] > similarity[2] > 0


def test_density_classes_brighten():
    means = [[] for _ in range(4)]
    for number in range(8):
        patient = anatomy.make_patient(SEED, number)
        breast = anatomy.make_breast(patient, "R", COARSEN)
        slab = anatomy.compress(breast, "CC", 1.6)
        dense = slab.path.mean(0)[slab.thickness > 2 * patient.half - 0.5] > (anatomy.FAT + anatomy.GLAND) / 2
        means[patient.density].append(dense.mean())
    shares = [np.mean(m) for m in means]
    assert (np.diff(shares) > 0.1).all(), shares


def test_texture_follows_a_power_law():
    """The exponent of mammographic texture is about 3 (Burgess, Jacobson and Judy 2001)."""
    slopes = []
    for number in range(3):
        patient = anatomy.make_patient(SEED, number)
        image = anatomy.compress(anatomy.make_breast(patient, "L"), "CC", 0.4).path.sum(0)
        n, x = 128, int(patient.depth / 2 / 0.4)
        part = image[300 - n // 2 : 300 + n // 2, x - n // 2 : x + n // 2]
        power = np.abs(np.fft.fft2((part - part.mean()) * np.outer(np.hanning(n), np.hanning(n)))) ** 2
        f = np.hypot(*np.meshgrid(np.fft.fftfreq(n, 0.4), np.fft.fftfreq(n, 0.4)))
        edges = np.geomspace(0.1, 0.8, 9)
        mean = [power[(f >= low) & (f < high)].mean() for low, high in itertools.pairwise(edges)]
        slopes.append(-np.polyfit(np.log(edges[1:] * edges[:-1]) / 2, np.log(mean), 1)[0])
    assert 2.5 < np.mean(slopes) < 3.5 and min(slopes) > 2.2, slopes


def test_same_seed_same_bytes_and_prefix(folder, tmp_path):
    phantom.write_phantoms(tmp_path / "two", 2, SEED, coarsen=COARSEN)
    two, nine = hashes(tmp_path / "two"), hashes(folder)
    files = {name for name in two if name.endswith(".dcm")}
    assert len(files) == 10 and all(two[name] == nine[name] for name in files)
    assert table(tmp_path / "two", "labels") == table(folder, "labels")[:10]
    phantom.write_phantoms(tmp_path / "other", 1, SEED + 1, coarsen=COARSEN)
    assert not set(hashes(tmp_path / "other").values()) & set(nine.values()) - {nine["labels.json"]}


@pytest.mark.slow
def test_same_bytes_with_workers(folder, tmp_path):
    phantom.write_phantoms(tmp_path / "out", PATIENTS, SEED, workers=2, coarsen=COARSEN)
    assert hashes(tmp_path / "out") == hashes(folder)


def test_bad_input_is_one_clear_error(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(UserError, match="not an empty folder"):
        phantom.write_phantoms(tmp_path / "full", 1, 0)
    with pytest.raises(UserError, match="patients is 0, expected at least 1"):
        phantom.write_phantoms(tmp_path / "new", 0, 0)
    assert not (tmp_path / "new").exists()


def test_interrupted_run_leaves_no_output(tmp_path, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(phantom, "write_dicom", fail)
        with pytest.raises(KeyboardInterrupt):
            phantom.write_phantoms(tmp_path / "out", 1, 0, coarsen=COARSEN)
    assert not (tmp_path / "out").exists()
    phantom.write_phantoms(tmp_path / "out", 1, 0, coarsen=COARSEN)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
