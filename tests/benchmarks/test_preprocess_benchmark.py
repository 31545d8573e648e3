import pytest
from pydicom.uid import JPEGLosslessSV1, RLELossless

from benchmarks import preprocess
from data_prep.read import Frames, scan
from data_prep.settings import Settings


def test_quick_table_has_a_row_for_each_syntax(tmp_path):
    output = tmp_path / "table.md"
    real = preprocess.write_dicom(tmp_path / "a.dcm", preprocess.synthetic_mammogram(640, 512))
    preprocess.main(["--quick", "--files", str(real), "--output", str(output)])
    text = output.read_text()
    for name in (*preprocess.CASES, "a.dcm"):
        assert f"\n| {name} |" in text, name
    for said in ("Machine: ", "Date: ", "Versions: ", "images/s/core", "slices/s/core", "grey levels rms"):
        assert said in text
    assert "rejected" not in text
    assert str(tmp_path) not in text  # a report names no folder of the machine


@pytest.mark.parametrize("syntax", [*preprocess.ENCODERS, RLELossless, preprocess.NATIVE])
def test_files_hold_the_pixels(tmp_path, syntax):
    image = preprocess.synthetic_mammogram(512, 416)
    path = preprocess.write_dicom(tmp_path / "a.dcm", image, syntax)
    assert (Frames(path, scan(path, Settings()))[0] == image).all()


def test_synthetic_mammogram_is_like_a_real_one(tmp_path):
    image = preprocess.synthetic_mammogram(1024, 832)
    assert 0.28 < (image > 0).mean() < 0.34
    size = preprocess.write_dicom(tmp_path / "a.dcm", image, JPEGLosslessSV1).stat().st_size
    assert 5e6 < size * 16 < 6.5e6  # of the full size
