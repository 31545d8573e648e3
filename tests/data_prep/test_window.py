"""The look-up table against pydicom's float chain, and the ends of the percentile window."""

import numpy as np
import pytest
from pydicom.dataset import Dataset
from pydicom.pixels import apply_voi_lut

from data_prep.header import Header, _voi
from data_prep.window import (
    choose_voi,
    display,
    is_padding,
    linear_table,
    tissue_percentiles,
    voi_curve,
    voi_table,
)

RAMP = np.arange(4096, dtype=np.uint16)


def _header(ds: Dataset, inverted: bool):
    return Header("2d", 1, 1, bits=12, inverted=inverted, voi=_voi(ds, {"window": None, "voi_index": None}))


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("inverted", [False, True])
@pytest.mark.parametrize("form", ["LINEAR", "LINEAR_EXACT", "SIGMOID", "LUT"])
def test_voi_equals_pydicom_on_the_full_ramp(form, inverted, index):
    ds = Dataset()
    ds.BitsStored, ds.PixelRepresentation, ds.PhotometricInterpretation = 12, 0, "MONOCHROME2"
    ds.WindowCenter, ds.WindowWidth = [2000, 1700], [1500, 3000]
    top = 4095
    if form == "LUT":
        ds.VOILUTSequence = []
        for first, bits, power in ((1000, 10, 0.7), (0, 14, 1.6)):
            lut = Dataset()
            data = np.rint(((1 << bits) - 1) * (np.arange(2048) / 2047) ** power).astype(int)
            lut.LUTDescriptor, lut.LUTData = [2048, first, bits], data.tolist()
            ds.VOILUTSequence.append(lut)
        top = (1 << (10, 14)[index]) - 1
    else:
        ds.VOILUTFunction = form
    expected = apply_voi_lut(RAMP, ds, index=index, prefer_lut=True) / top
    expected = 1 - expected if inverted else expected
    header = _header(ds, inverted)
    curve = voi_curve(header, choose_voi(header, index))[RAMP]
    np.testing.assert_allclose(curve, expected, atol=1e-12)
    table = voi_table(header, choose_voi(header, index))[RAMP]
    assert np.abs(table - np.clip(255 * expected, 1, 255)).max() <= 0.5 + 1e-9


def test_invalid_windows_are_dropped_and_the_table_of_vendors_goes_first():
    ds = Dataset()
    ds.BitsStored, ds.PixelRepresentation = 12, 0
    for centres, widths in (([2000], [0]), ([2000, 1], [100]), ("", "")):
        ds.WindowCenter, ds.WindowWidth = centres, widths
        assert _header(ds, False).voi == ()
    ds.WindowCenter, ds.WindowWidth, ds.VOILUTFunction = 2000, 100, ""  # pydicom raises for ''
    assert _header(ds, False).voi[0]["function"] == "LINEAR"
    assert _voi(ds, {"window": (540.0, 580.0), "voi_index": None})[0]["centre"] == 540
    ds.WindowCenter, ds.WindowWidth = [1, 2], [10, 20]
    assert [v["centre"] for v in _voi(ds, {"window": None, "voi_index": 1})] == [2, 1]


def test_monochrome1_gives_the_same_picture():
    plain, inverted = Header("2d", 1, 1, bits=12), Header("2d", 1, 1, bits=12, inverted=True)
    turned = (4095 - RAMP).astype(np.uint16)
    np.testing.assert_array_equal(
        linear_table(plain, 500, 3000)[RAMP], linear_table(inverted, 1095, 3595)[turned]
    )
    np.testing.assert_array_equal(display(turned, inverted), RAMP)
    np.testing.assert_array_equal(display(turned, Header("2d", 1, 1, bits=12, slope=-1.0)), RAMP)


def test_percentile_window_keeps_tissue_above_zero():
    table = linear_table(Header("2d", 1, 1, bits=12), 500, 3000)
    assert table[0] == table[500] == 1 and table[3000] == table[65535] == 255
    assert (np.diff(table.astype(int)) >= 0).all()
    low, high = tissue_percentiles(np.repeat(RAMP, 3))
    assert abs(low - 20) <= 1 and abs(high - 4075) <= 1


def test_for_processing_makes_air_dark():
    header = Header("2d", 1, 1, bits=14, for_processing=True)
    shown = display(np.array([[100, 8000, 16000]], np.uint16), header)
    assert shown[0, 0] > shown[0, 1] > shown[0, 2]  # much exposure is little tissue
    table = linear_table(header, 100, 16000)
    assert table[100] == 255 and table[16000] == 1


def test_padding_is_shown_as_zero_also_where_signed():
    header = Header("2d", 1, 1, bits=12, signed=True, padding=(-2048, -2000), inverted=True)
    stored = np.array([[0, 48, 49, 3000]], np.uint16)
    assert is_padding(stored, header).tolist() == [[True, True, False, False]]
    assert display(stored, header).tolist() == [[0, 0, 4046, 1095]]
