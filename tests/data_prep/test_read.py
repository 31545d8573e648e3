"""Reading: exact pixels whatever the syntax, facts of the header, and a reason for every refusal."""

import cv2
import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset

from data_prep import read
from data_prep.read import Frames
from data_prep.reject import Reject
from data_prep.settings import Settings


def scan(path, **settings):
    return read.scan(path, Settings(**settings))


def code_of(path) -> str:
    with pytest.raises(Reject) as caught:
        Frames(path, scan(path))[0]
    return caught.value.code


@pytest.mark.parametrize(
    ("syntax", "decoder"),
    [
        ("1.2.840.10008.1.2.1", "native"),
        ("1.2.840.10008.1.2.2", "native"),
        ("1.2.840.10008.1.2.4.70", "jpeg8"),
        ("1.2.840.10008.1.2.4.80", "jpegls"),
        ("1.2.840.10008.1.2.4.90", "jpeg2k"),
    ],
)
def test_pixels_are_exact(tmp_path, breast, write_dicom, syntax, decoder):
    image = breast(101, 77)
    path = write_dicom(tmp_path / "a.dcm", image, syntax)
    frames = Frames(path, scan(path))
    np.testing.assert_array_equal(frames[0], image)
    assert (frames.decoder, frames.fallbacks) == (decoder, 0)


def test_rle_is_exact(tmp_path, breast, write_dicom):
    image = breast(90, 70)
    path = write_dicom(tmp_path / "a.dcm", image)
    ds = pydicom.dcmread(path)
    ds.compress(pydicom.uid.RLELossless)
    ds.save_as(path)
    frames = Frames(path, scan(path))
    np.testing.assert_array_equal(frames[0], image)
    assert frames.decoder == "rle"


def test_stray_bits_high_bit_and_sign(tmp_path, breast, write_dicom):
    image = breast(60, 50)
    stray = write_dicom(tmp_path / "stray.dcm", image | 0x8000)
    np.testing.assert_array_equal(Frames(stray, scan(stray))[0], image)
    shifted = write_dicom(tmp_path / "shifted.dcm", image << 4, HighBit=15)
    np.testing.assert_array_equal(Frames(shifted, scan(shifted))[0], image)
    signed = write_dicom(
        tmp_path / "signed.dcm", (image.astype(np.int16) - 2048).view(np.uint16), PixelRepresentation=1
    )
    np.testing.assert_array_equal(Frames(signed, scan(signed))[0], image)  # 2^11 is added back


@pytest.mark.parametrize(
    ("suffix", "dtype"),
    [("png", "u1"), ("png", "u2"), ("pgm", "u1"), ("pgm", "u2"), ("tif", "u2"), ("jpg", "u1")],
)
def test_image_files(tmp_path, breast, suffix, dtype):
    image = (breast(80, 60) >> (4 if dtype == "u1" else 0)).astype(dtype)
    path = tmp_path / f"a.{suffix}"
    cv2.imwrite(str(path), image, [cv2.IMWRITE_JPEG_QUALITY, 100])
    header = scan(path, kind="film")
    decoded = Frames(path, header)[0]
    assert header.kind == "film"
    assert np.abs(decoded.astype(int) - image).max() <= (4 if suffix == "jpg" else 0)


def test_no_preamble(tmp_path, breast, write_dicom):
    path = write_dicom(tmp_path / "a.dcm", breast(60, 50))
    ds = pydicom.dcmread(path)
    del ds.file_meta
    ds.preamble = None
    pydicom.dcmwrite(path, ds, implicit_vr=True, little_endian=True)
    assert path.read_bytes()[128:132] != b"DICM"
    np.testing.assert_array_equal(Frames(path, scan(path))[0], breast(60, 50))


def test_a_constant_or_wrong_decode_is_refused_and_counted(tmp_path, breast, write_dicom, monkeypatch):
    image = breast(60, 50)
    path = write_dicom(tmp_path / "a.dcm", image, "1.2.840.10008.1.2.4.70")
    bad = [
        ("constant", lambda data: np.full_like(image, 4095)),
        ("over", lambda data: image + 4096),
        ("shape", lambda data: image[:-1]),
    ]
    monkeypatch.setattr(Frames, "_decoders", lambda *_: iter([*bad, ("good", lambda data: image)]))
    frames = Frames(path, scan(path))
    np.testing.assert_array_equal(frames[0], image)
    assert (frames.decoder, frames.fallbacks) == ("good", 3)
    monkeypatch.setattr(Frames, "_decoders", lambda *_: iter(bad))
    assert code_of(path) == "decode_error"


@pytest.mark.parametrize(
    ("attributes", "code"),
    [
        ({"PhotometricInterpretation": "RGB", "SamplesPerPixel": 3}, "not_monochrome"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.2", "Modality": "CT"}, "unsupported_class"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.13.1.4"}, "projection"),
        (
            {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7", "Modality": "OT", "BodyPartExamined": ""},
            "secondary_capture",
        ),
        ({"EstimatedRadiographicMagnificationFactor": "1.8"}, "spot_mag"),
        ({"QualityControlImage": "YES"}, "qc"),
        ({"ViewPosition": "SPECIMEN"}, "specimen"),
        ({"BitsAllocated": 32}, "highbit"),
        ({"Rows": 30000}, "too_large"),
        ({"NumberOfFrames": 2}, "unsupported_class"),
        ({"Rows": None}, "truncated"),
        ({"Rows": 400}, "truncated"),
    ],
)
def test_reject_codes(tmp_path, breast, write_dicom, attributes, code):
    assert code_of(write_dicom(tmp_path / "a.dcm", breast(60, 50), **attributes)) == code


def test_broken_files(tmp_path, breast, write_dicom):
    (tmp_path / "text.dcm").write_text("not a picture")
    assert code_of(tmp_path / "text.dcm") == "not_dicom"
    (tmp_path / "empty.dcm").write_bytes(b"")
    assert code_of(tmp_path / "empty.dcm") == "not_dicom"
    for syntax in (
        "1.2.840.10008.1.2.1",
        "1.2.840.10008.1.2.4.70",
        "1.2.840.10008.1.2.4.80",
        "1.2.840.10008.1.2.4.90",
    ):
        data = write_dicom(tmp_path / "whole.dcm", breast(120, 90), syntax).read_bytes()
        for share in (0.3, 0.6, 0.98):
            (tmp_path / "cut.dcm").write_bytes(data[: int(len(data) * share)])
            assert code_of(tmp_path / "cut.dcm") in ("truncated", "decode_error")
    for suffix in ("png", "jpg"):
        cv2.imwrite(str(tmp_path / f"a.{suffix}"), (breast(120, 90) >> 4).astype(np.uint8))
        data = (tmp_path / f"a.{suffix}").read_bytes()
        (tmp_path / f"a.{suffix}").write_bytes(data[: len(data) // 2])
        assert code_of(tmp_path / f"a.{suffix}") == "truncated"
    cv2.imwrite(
        str(tmp_path / "colour.png"), np.random.default_rng(0).integers(0, 255, (50, 40, 3), np.uint8)
    )
    assert code_of(tmp_path / "colour.png") == "not_monochrome"


def test_slices_are_ordered_by_position(tmp_path, breast, write_dicom):
    volume = np.stack([breast(60, 50, seed=s) for s in range(4)])
    path = write_dicom(tmp_path / "v.dcm", volume, positions=[3.0, 1.0, 4.0, 2.0])
    header = scan(path)
    assert header.kind == "dbt" and header.frames == (1, 3, 0, 2)
    assert header.positions_mm == (1.0, 2.0, 3.0, 4.0) and header.slice_mm == 1.0
    np.testing.assert_array_equal(Frames(path, header)[0], volume[1])


def test_header_facts(tmp_path, breast, write_dicom):
    def facts(**attributes):
        return scan(write_dicom(tmp_path / "a.dcm", breast(60, 50), **attributes))

    code = Dataset()
    code.CodeValue, code.CodingSchemeDesignator = "R-10242", "SNM3"
    coded = facts(ViewPosition="", ViewCodeSequence=[code])
    assert coded.view == "CC"
    assert facts(ImageLaterality="", SeriesDescription="R CC").laterality == "R"
    assert facts(ImageLaterality="", Laterality="R").laterality == "R"
    assert facts(ImageType=["DERIVED", "PRIMARY", "STEREO", "LEFT"]).flags == ("stereo",)
    assert facts(ImageType=["DERIVED", "PRIMARY", "TOMOSYNTHESIS", "GENERATED_2D"]).kind == "synthetic2d"
    assert facts(SeriesDescription="SYNTHETIC L CC").kind == "2d"  # a phantom, not a synthetic 2D view
    assert facts(BreastImplantPresent="YES").implant is True
    assert facts(ImagerPixelSpacing=[0.07, 0.07]).pixel_mm == 0.07
    assert facts(PatientOrientation=["P", "L"]).chest_wall == "right"
    assert facts(PatientOrientation=["R", "P"]).chest_wall == "bottom"
    assert facts(PixelPaddingValue=4095, PixelPaddingRangeLimit=4000).padding == (4000, 4095)


def test_real_files_decode_right(shared):
    folder = shared / "data/dicom"
    hologic = folder / "hologic_dbt_slice_GH1376_deid_jpegll.dcm"  # one common decoder returns constant 4095
    frame = Frames(hologic, scan(hologic))[0]
    assert scan(hologic).kind == "dbt" and frame.min() == 0 and 2000 < frame.max() < 4095
    jpeg, j2k = (Frames(folder / name, scan(folder / name))[0] for name in ("MG1_JPLY.dcm", "MG1_J2KI.dcm"))
    assert np.abs(jpeg.astype(int) - j2k).mean() < 30  # two lossy copies of one 12-bit film scan
    assert scan(folder / "OutOfBoundsOverlay.dcm").flags == ("stereo",)
    assert code_of(folder / "MG_Explicit_Little.dcm") == "spot_mag"
