"""The look-up table against pydicom's float chain, and the ends of the percentile window."""

import numpy as np
import pytest
from pydicom.dataset import Dataset
from pydicom.pixels import apply_voi_lut

from data_prep.header import Header
from data_prep.window import display, is_padding, percentile_table, tag_table, tissue_percentiles

RAMP = np.arange(4096, dtype=np.uint16)


@pytest.mark.parametrize("inverted", [False, True])
@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
def test_tag_window_equals_pydicom(function, inverted):
    ds = Dataset()
    ds.BitsStored, ds.PixelRepresentation, ds.PhotometricInterpretation = 12, 0, "MONOCHROME2"
    ds.WindowCenter, ds.WindowWidth, ds.VOILUTFunction = 2000, 1500, function
    voi = {"centre": 2000.0, "width": 1500.0, "function": function}
    expected = apply_voi_lut(RAMP, ds) / 4095
    expected = 255 * (1 - expected if inverted else expected)
    table = tag_table(Header("2d", 1, 1, bits=12, inverted=inverted, voi=voi))
    assert np.abs(table[RAMP] - np.clip(expected, 1, 255)).max() <= 1  # 8-bit rounding


def test_voi_lut_sequence_clamps_at_its_ends():
    table = tag_table(Header("2d", 1, 1, bits=12, voi={"lut": list(range(1024)), "first": 1000, "bits": 10}))
    assert table[0] == table[1000] == 1 and table[2023] == table[4095] == 255
    assert abs(int(table[1512]) - 128) <= 1


def test_monochrome1_gives_the_same_picture():
    plain, inverted = Header("2d", 1, 1, bits=12), Header("2d", 1, 1, bits=12, inverted=True)
    turned = (4095 - RAMP).astype(np.uint16)
    np.testing.assert_array_equal(
        percentile_table(plain, 500, 3000)[RAMP], percentile_table(inverted, 1095, 3595)[turned]
    )
    np.testing.assert_array_equal(display(turned, inverted), RAMP)
    np.testing.assert_array_equal(display(turned, Header("2d", 1, 1, bits=12, slope=-1.0)), RAMP)


def test_percentile_window_keeps_tissue_above_zero():
    table = percentile_table(Header("2d", 1, 1, bits=12), 500, 3000)
    assert table[0] == table[500] == 1 and table[3000] == table[65535] == 255
    assert (np.diff(table.astype(int)) >= 0).all()
    low, high = tissue_percentiles(np.repeat(RAMP, 3))
    assert abs(low - 20) <= 1 and abs(high - 4075) <= 1


def test_for_processing_makes_air_dark():
    header = Header("2d", 1, 1, bits=14, for_processing=True)
    shown = display(np.array([[100, 8000, 16000]], np.uint16), header)
    assert shown[0, 0] > shown[0, 1] > shown[0, 2]  # much exposure is little tissue
    table = percentile_table(header, 100, 16000)
    assert table[100] == 255 and table[16000] == 1


def test_padding_is_shown_as_zero_also_where_signed():
    header = Header("2d", 1, 1, bits=12, signed=True, padding=(-2048, -2000), inverted=True)
    stored = np.array([[0, 48, 49, 3000]], np.uint16)
    assert is_padding(stored, header).tolist() == [[True, True, False, False]]
    assert display(stored, header).tolist() == [[0, 0, 4046, 1095]]
