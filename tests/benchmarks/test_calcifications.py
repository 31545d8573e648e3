import numpy as np
import pytest

from benchmarks import calcifications
from benchmarks.preprocess import synthetic_mammogram, write_dicom


@pytest.fixture(scope="module")
def mammogram(tmp_path_factory):
    path = tmp_path_factory.mktemp("calcifications") / "breast.dcm"
    return write_dicom(path, synthetic_mammogram(1536, 1248), ImagerPixelSpacing=[0.08, 0.08])


@pytest.fixture(scope="module")
def cnr(mammogram):
    result = calcifications.measure(mammogram, 8, seed=0)
    return {key: float(np.median(values)) for key, values in result.items()}


def test_cnr_grows_with_size_and_resolution(cnr):
    for kind in calcifications.KINDS:
        for size in calcifications.SIZES:
            small, middle, large = (cnr[size, kind, d] for d in calcifications.DIAMETERS)
            assert small < middle < large, (size, kind)
        for diameter in calcifications.DIAMETERS:
            assert cnr["518 px", kind, diameter] < cnr["1024 px", kind, diameter], (kind, diameter)


def test_a_sphere_keeps_its_volume():
    for diameter in (0.2, 0.5):
        for shift in ((0, 0), (0.4, -0.3)):
            volume = calcifications.sphere(diameter, 0.08, shift).sum() * 0.08**2
            assert volume == pytest.approx(np.pi / 6 * diameter**3, rel=0.02)


def test_table_has_all_rows(mammogram, tmp_path):
    output = tmp_path / "table.md"
    calcifications.main(["--file", str(mammogram), "--places", "4", "--output", str(output)])
    text = output.read_text()
    for size in calcifications.SIZES:
        assert text.count(f"| {size} |") == 2  # the CNR, and the smallest that is seen
    for kind in calcifications.KINDS:
        assert kind in text
    assert str(tmp_path) not in text and str(mammogram.parent) not in text


def test_a_breast_too_small_is_refused(tmp_path):
    path = write_dicom(tmp_path / "a.dcm", synthetic_mammogram(320, 256), ImagerPixelSpacing=[0.08, 0.08])
    with pytest.raises(SystemExit, match="places fit"):
        calcifications.measure(path, 20, seed=0)
