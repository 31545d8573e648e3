"""The 42 DICOM pitfalls that the reader was written against, each with a test on a file that the test writes.

PITFALLS says which tests cover which number; those of other files are not repeated here.
"""

import ast
import hashlib
import json
import struct
import sys
import zlib
from pathlib import Path

import cv2
import imagecodecs
import numpy as np
import pyarrow.parquet as pq
import pydicom
import pytest
from array_record.python.array_record_module import ArrayRecordReader
from pydicom import uid
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate, generate_frames
from pydicom.pixels import encoders
from pydicom.sr import _snomed_dict
from pydicom.sr.codedict import codes

from data_prep import read
from data_prep.build import BuildOptions, build
from data_prep.prepare import prepare
from data_prep.read import Frames
from data_prep.reject import Reject
from data_prep.settings import Settings
from data_prep.window import choose_voi, voi_curve
from mammodino_jax.data import records

HERE = "test_pitfalls"
PITFALLS = {  # number: (what, {file: tests})
    1: ("MONOCHROME1", {HERE: ["test_01_monochrome1"], "test_window": ["test_monochrome1_gives_the_same_picture"]}),
    2: ("sigmoid window", {"test_window": ["test_voi_equals_pydicom_on_the_full_ramp"]}),
    3: ("empty VOI LUT function", {"test_window": ["test_invalid_windows_are_dropped_and_the_table_of_vendors_goes_first"]}),
    4: ("empty or zero window", {HERE: ["test_04_useless_windows_fall_back"], "test_window": ["test_invalid_windows_are_dropped_and_the_table_of_vendors_goes_first"]}),
    5: ("several windows", {HERE: ["test_05_several_windows"], "test_window": ["test_voi_equals_pydicom_on_the_full_ramp"]}),
    6: ("window and VOI LUT", {HERE: ["test_06_lut_goes_before_windows"], "test_window": ["test_voi_equals_pydicom_on_the_full_ramp"]}),
    7: ("windows that cut off tissue", {HERE: ["test_07_the_tag_window_is_not_the_default"], "test_window": ["test_percentile_window_keeps_tissue_above_zero"]}),
    8: ("FOR PROCESSING", {HERE: ["test_08_policy", "test_08_raw_form_stands_in", "test_08_sign_and_logarithm"], "test_window": ["test_for_processing_makes_air_dark"], "test_build": ["test_duplicates_and_for_processing_siblings"]}),
    9: ("no PresentationIntentType", {HERE: ["test_09_intent_by_class"]}),
    10: ("padding value and range", {HERE: ["test_10_padding"], "test_window": ["test_padding_is_shown_as_zero_also_where_signed"], "test_mask": ["test_empty_and_padded"]}),
    11: ("stray bits", {HERE: ["test_11_bits_above_bits_stored_of_a_stream"], "test_read": ["test_stray_bits_high_bit_and_sign"]}),
    12: ("HighBit", {HERE: ["test_12_high_bit"], "test_read": ["test_stray_bits_high_bit_and_sign"]}),
    13: ("signed pixels", {HERE: ["test_13_signed_and_compressed"], "test_read": ["test_stray_bits_high_bit_and_sign"]}),
    14: ("rescale", {HERE: ["test_14_rescale"]}),
    15: ("JPEG lossless", {HERE: ["test_16_every_codec", "test_16_a_blank_slice_is_short"]}),
    16: ("JPEG-LS, JPEG 2000, HTJ2K, RLE, and the uncompressed syntaxes", {HERE: ["test_16_every_codec", "test_16_uncompressed", "test_16_constant_decoders", "test_16_htj2k_errors_are_not_swallowed", "test_16_empty_and_split_fragments"], "test_read": ["test_pixels_are_exact", "test_rle_is_exact", "test_a_constant_or_wrong_decode_is_refused_and_counted"]}),
    17: ("Pillow shifts JPEG 2000", {HERE: ["test_17_half_size_values"]}),
    18: ("lossy", {HERE: ["test_18_lossy_is_flagged", "test_16_every_codec"]}),
    19: ("JPEG XL and other syntaxes", {HERE: ["test_19_unsupported_syntax", "test_19_wrong_or_no_syntax"]}),
    20: ("deflated", {HERE: ["test_16_uncompressed", "test_20_deflated_bomb"]}),
    21: ("no preamble, no meta", {HERE: ["test_21_without_meta", "test_21_garbage"], "test_read": ["test_no_preamble"]}),
    22: ("truncated header", {HERE: ["test_22_truncated_header"]}),
    23: ("truncated pixel data", {HERE: ["test_23_truncated_file"], "test_read": ["test_broken_files"]}),
    24: ("truncated stream", {HERE: ["test_24_truncated_stream"]}),
    25: ("bit rot", {HERE: ["test_25_checksums"]}),
    26: ("trailing bytes", {HERE: ["test_26_trailing_bytes"]}),
    27: ("NumberOfFrames", {HERE: ["test_27_number_of_frames"]}),
    28: ("Breast Tomosynthesis Object", {HERE: ["test_28_functional_groups", "test_28_slices_by_position"], "test_read": ["test_slices_are_ordered_by_position"]}),
    29: ("projections", {HERE: ["test_29_projections"]}),
    30: ("private Hologic container", {HERE: ["test_30_hologic_container"]}),
    31: ("one file a slice", {HERE: ["test_31_one_file_a_slice", "test_31_one_unreadable_slice", "test_31_two_sides_in_a_series"]}),
    32: ("BCS-DBT laterality", {HERE: ["test_32_the_table_wins"]}),
    33: ("synthetic 2D", {HERE: ["test_33_synthetic"]}),
    34: ("view modifiers", {HERE: ["test_34_view_modifiers", "test_34_views", "test_34_specimen_stereo_implant_magnified"]}),
    35: ("laterality", {HERE: ["test_35_laterality", "test_35_view_conflict"], "test_build": ["test_laterality_conflict_is_flagged_and_pixels_decide"]}),
    36: ("burned-in annotation", {HERE: ["test_36_burned_in", "test_36_label_at_the_skin"], "test_mask": ["test_labels_and_film_edges_are_left_out"]}),
    37: ("overlays, RGB, screenshots", {HERE: ["test_37_overlay_bits", "test_37_colour_and_screenshots"]}),
    38: ("spacing", {HERE: ["test_38_spacing"], "test_build": ["test_full_box_and_fixed_scale"]}),
    39: ("quality control, blank", {HERE: ["test_39_no_breast"], "test_build": ["test_noise_and_blank_images_are_rejected"]}),
    40: ("DICOMDIR, duplicates", {HERE: ["test_40_dicomdir"], "test_build": ["test_duplicates_and_for_processing_siblings", "test_a_truncated_copy_does_not_displace_the_whole_file"]}),
    41: ("identifying data", {HERE: ["test_41_nothing_that_identifies"], "test_build": ["test_no_identifier_in_what_is_shared_or_logged"]}),
    42: ("huge claims", {HERE: ["test_42_huge_headers", "test_42_huge_streams", "test_42_huge_image_files"], "test_fuzz": ["test_mutants_of_small_files"]}),
}  # fmt: skip

SC, CT = "1.2.840.10008.5.1.4.1.1.7", "1.2.840.10008.5.1.4.1.1.2"
JPEG = "1.2.840.10008.1.2.4."  # and all kin
LOSSY_12 = dict(level=95, bitspersample=12)
# syntax: (encoder, greatest error, decoder that takes it)
CODECS = {
    JPEG + "50": (lambda a: imagecodecs.jpeg8_encode(a, level=95), 8, "jpeg8"),
    JPEG + "51": (lambda a: imagecodecs.jpeg8_encode(a, **LOSSY_12), 16, "jpeg8"),
    JPEG + "57": (lambda a: imagecodecs.jpeg8_encode(a, lossless=True, predictor=6, bitspersample=12), 0, "jpeg8"),
    JPEG + "70": (lambda a: imagecodecs.jpeg8_encode(a, lossless=True, predictor=1, bitspersample=12), 0, "jpeg8"),
    JPEG + "80": (imagecodecs.jpegls_encode, 0, "jpegls"),
    JPEG + "81": (lambda a: imagecodecs.jpegls_encode(a, level=2), 2, "jpegls"),
    JPEG + "90": (lambda a: imagecodecs.jpeg2k_encode(a, codecformat="j2k", level=0, bitspersample=12), 0, "jpeg2k"),
    JPEG + "91": (
        lambda a: imagecodecs.jpeg2k_encode(a, codecformat="j2k", level=80, reversible=False, bitspersample=12),
        40,
        "jpeg2k",
    ),
    JPEG + "201": (imagecodecs.htj2k_encode, 0, "jpeg2k"),
    JPEG + "202": (imagecodecs.htj2k_encode, 0, "jpeg2k"),
    JPEG + "203": (lambda a: imagecodecs.htj2k_encode(a, reversible=False), 2, "jpeg2k"),
    "1.2.840.10008.1.2.5": (lambda a: _rle(a), 0, "rle"),
}  # fmt: skip


def _rle(image: np.ndarray) -> bytes:
    facts = dict(rows=image.shape[0], columns=image.shape[1], samples_per_pixel=1, pixel_representation=0)
    facts |= dict(bits_allocated=16, bits_stored=16, photometric_interpretation="MONOCHROME2")
    return encoders.RLELosslessEncoder.encode(image, **facts, number_of_frames=1)


@pytest.fixture
def file(tmp_path, breast, write_dicom):
    """file(pixels=a breast, **attributes) -> path of a new file."""
    count = iter(range(1000))

    def make(image=None, **attributes) -> Path:
        image = breast() if image is None else image
        return write_dicom(tmp_path / f"{next(count)}.dcm", image, **attributes)

    return make


@pytest.fixture
def compressed(file):
    """compressed(pixels, syntax, streams=None, **attributes) -> path; of streams as they are given."""

    def make(pixels, syntax, streams=None, **attributes) -> Path:
        frames = pixels if pixels.ndim == 3 else pixels[None]
        if syntax == JPEG + "50":
            frames = (frames >> 4).astype(np.uint8)
            attributes = dict(BitsAllocated=8, BitsStored=8, HighBit=7) | attributes
        streams = streams or [bytes(CODECS[syntax][0](np.ascontiguousarray(frame))) for frame in frames]
        path = file(pixels, **attributes)
        ds = pydicom.dcmread(path)
        ds.file_meta.TransferSyntaxUID = uid.UID(syntax)
        ds.PixelData = encapsulate(streams)
        ds["PixelData"].is_undefined_length = True
        ds.save_as(path)
        return path

    return make


def scan(path: Path, **settings):
    return read.scan(path, Settings(**settings))


def frame_of(path: Path, index: int = 0) -> np.ndarray:
    return Frames(path, scan(path))[index]


def code_of(path: Path, **settings) -> str:
    """The code with which the whole chain rejects a file; 'record' where it does not."""
    try:
        images = list(prepare([path], Settings(**settings)).images())
    except Reject as reject:
        return reject.code
    assert images
    return "record"


def picture(path: Path, **settings) -> np.ndarray:
    return next(prepare([path], Settings(**settings)).images())


def items(**attributes) -> list[Dataset]:
    ds = Dataset()
    for name, value in attributes.items():
        setattr(ds, name, value)
    return [ds]


def concept(code) -> list[Dataset]:
    return items(
        CodeValue=code.value, CodingSchemeDesignator=code.scheme_designator, CodeMeaning=code.meaning
    )


@pytest.fixture
def built(tmp_path, monkeypatch):
    """built(folder, **settings) -> (index rows, codes by file name, manifest by file name)."""
    monkeypatch.setenv("MAMMODINO_KEY_FILE", str(tmp_path / "secret" / "key"))

    def run(folder: Path, **settings):
        settings = Settings(**({"long_side": 128} | settings))
        output = folder.with_name(folder.name + "-out")
        build(BuildOptions((folder,), output, settings=settings))
        local = output.with_name(output.name + ".local")
        lines = {n: (local / f"{n}.jsonl").read_text().splitlines() for n in ("rejects", "manifest")}
        rejects, manifest = ([json.loads(line) for line in lines[n]] for n in ("rejects", "manifest"))
        rows = pq.read_table(output / "index.parquet").to_pylist()
        return (
            rows,
            {Path(r["path"]).name: r["code"] for r in rejects},
            {Path(m["path"]).name: m for m in manifest},
        )

    return run


def test_every_pitfall_has_its_tests():
    assert sorted(PITFALLS) == list(range(1, 43))
    named = {}
    for path in Path(__file__).parent.glob("test_*.py"):
        tree = ast.parse(path.read_text())
        named[path.stem] = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    for number, (_, tests) in PITFALLS.items():
        assert any(tests.values()), number
        for module, names in tests.items():
            assert set(names) <= named[module], (number, module, set(names) - named[module])
    ours = {name for _, tests in PITFALLS.values() for name in tests.get(HERE, ())}
    assert named[HERE] - ours <= {n for n in named[HERE] if not n.startswith("test_")} | {
        "test_every_pitfall_has_its_tests"
    }


def test_01_monochrome1(file, breast):
    plain = picture(file())
    turned = picture(file(4095 - breast(), PhotometricInterpretation="MONOCHROME1"))
    np.testing.assert_array_equal(turned, plain)
    # The range is fixed: an image whose maximum is not 4095 is turned by the same amount.
    dim = file(
        np.minimum(4095 - breast(), 3000),
        PhotometricInterpretation="MONOCHROME1",
        WindowCenter=2048,
        WindowWidth=4096,
    )
    curve = voi_curve(scan(dim), choose_voi(scan(dim), 0))
    assert curve[0] == 1 and curve[4095] == 0
    np.testing.assert_allclose(curve[3000], 1 - 3000 / 4095, atol=1e-3)


@pytest.mark.parametrize("window", [("", ""), (2000, 0), ([2000, 100], [300]), (2000, -5)])
def test_04_useless_windows_fall_back(file, window):
    path = file(WindowCenter=window[0], WindowWidth=window[1])
    prepared = prepare([path], Settings(window="tag"))
    assert "window_fallback" in prepared.flags
    np.testing.assert_array_equal(next(prepared.images()), picture(path))
    good = prepare([file(WindowCenter=2000, WindowWidth=1)], Settings(window="tag"))
    assert "window_fallback" not in good.flags


def test_05_several_windows(file):
    path = file(
        WindowCenter=[2000, 1500, 900],
        WindowWidth=[1000, 600, 400],
        WindowCenterWidthExplanation=["NORMAL", "HARDER", "SOFTER"],
    )
    limits = [prepare([path], Settings(window="tag", voi_index=i)).window for i in range(4)]
    assert limits == [(1500, 2500), (1200, 1800), (700, 1100), (700, 1100)]  # beyond the last: the last


def test_06_lut_goes_before_windows(file):
    ramp = np.arange(1024) * 1023 // 1023
    lut = items(LUTDescriptor=[1024, 1000, 10], LUTData=ramp.astype("<u2").tobytes())
    path = file(VOILUTSequence=lut, WindowCenter=2000, WindowWidth=1000)
    header = scan(path)
    curve = voi_curve(header, choose_voi(header, 0))
    assert curve[[0, 1000, 2023, 4095]].tolist() == [0, 0, 1, 1]  # by the LUT's 10 bits, not by 16
    assert prepare([path], Settings(window="tag")).window == (1000, 2023)
    assert prepare([path], Settings(window="tag", voi_index=1)).window == (1500, 2500)


def test_07_the_tag_window_is_not_the_default(file):
    path = file(WindowCenter=3500, WindowWidth=400)  # floors nearly all tissue
    plain, tagged = picture(path, clahe=0), picture(path, clahe=0, window="tag")
    inside = plain > 0
    assert (plain[inside] == 1).mean() < 0.03 and (tagged[inside] == 1).mean() > 0.8


def _raw(image: np.ndarray) -> np.ndarray:
    """Exposure of a breast: air is bright, and it falls with thickness."""
    return np.rint(60 + 4000 * np.exp(image / -1000.0)).astype(np.uint16)


def test_08_policy(tmp_path, breast, write_dicom, built):
    folder = tmp_path / "in"
    folder.mkdir()
    image = breast()
    for study in ("1.2.3", "1.2.4"):  # the second study has the raw form only
        attributes = dict(StudyInstanceUID=study, PresentationIntentType="FOR PROCESSING")
        write_dicom(folder / f"raw{study[-1]}.dcm", _raw(image), **attributes)
    write_dicom(folder / "shown3.dcm", image, StudyInstanceUID="1.2.3")
    outcomes = {}
    for policy in ("auto", "reject", "keep"):
        copy = tmp_path / policy
        folder.rename(copy)
        folder = copy
        rows, codes_, _ = built(folder, for_processing=policy)
        outcomes[policy] = len(rows), codes_
    assert outcomes["auto"] == (2, {"raw3.dcm": "for_processing"})
    assert outcomes["reject"] == (1, {"raw3.dcm": "for_processing", "raw4.dcm": "for_processing"})
    assert outcomes["keep"] == (3, {})


def test_08_raw_form_stands_in(tmp_path, breast, write_dicom, built):
    folder = tmp_path / "in"
    folder.mkdir()
    attributes = dict(StudyInstanceUID="1.2.3", PresentationIntentType="FOR PROCESSING")
    write_dicom(folder / "raw.dcm", _raw(breast()), **attributes)
    shown = write_dicom(folder / "shown.dcm", breast(), StudyInstanceUID="1.2.3")
    shown.write_bytes(shown.read_bytes()[:-20000])  # the header is whole
    rows, codes_, manifest = built(folder)
    assert len(rows) == 1 and codes_ == {"shown.dcm": "truncated"} and list(manifest) == ["raw.dcm"]


def test_08_sign_and_logarithm(file, breast):
    """The same breast in the four forms that PixelIntensityRelationship and its sign can say."""
    image = breast()
    linear = _raw(image)
    log = np.rint(np.log(linear) / np.log(4095) * 4095).astype(np.uint16)
    shown = {}
    for relation, stored in (("LIN", linear), ("LOG", log)):
        for sign in (1, -1):
            pixels = stored if sign == 1 else 4095 - stored
            path = file(
                pixels,
                PresentationIntentType="FOR PROCESSING",
                PixelIntensityRelationship=relation,
                PixelIntensityRelationshipSign=sign,
            )
            shown[relation, sign] = picture(path, clahe=0)
    np.testing.assert_array_equal(shown["LIN", 1], shown["LIN", -1])
    np.testing.assert_array_equal(shown["LOG", 1], shown["LOG", -1])
    reference = picture(file(), clahe=0).astype(int)
    for found in shown.values():  # the logarithm of exposure is the thickness that made it
        assert found.shape == reference.shape
        both = (found > 0) & (reference > 0)
        assert np.corrcoef(found[both], reference[both])[0, 1] > 0.95


def test_09_intent_by_class(file):
    raw = "1.2.840.10008.5.1.4.1.1.1.2.1"
    assert scan(file(PresentationIntentType="", SOPClassUID=raw)).for_processing
    assert scan(file(PresentationIntentType="FOR PROCESSING")).for_processing
    assert not scan(file(PresentationIntentType="")).for_processing
    assert not scan(file(PresentationIntentType="FOR PRESENTATION", SOPClassUID=raw)).for_processing


# name: (signed, MONOCHROME1, VR of the tags, their values)
PADDING = {
    "value": (False, False, "US", [4095]),
    "range": (False, False, "US", [4000, 4095]),
    "turned range": (False, True, "US", [95, 0]),
    "unsigned by SS": (False, False, "SS", [-1]),
    "signed": (True, False, "SS", [2047]),
    "signed range": (True, True, "SS", [-2048, -1953]),
    "signed by US": (True, True, "US", [0xF800]),  # -2048, as writers leave it that know unsigned tags only
}


@pytest.mark.parametrize("how", PADDING)
def test_10_padding(file, breast, how):
    """A bright strip of padding across the breast changes neither mask nor window: it is as air."""
    signed, inverted, vr, values = PADDING[how]
    plain = breast()
    plain[:70] = 0
    padded = plain.copy()
    padded[:70] = 4095
    if len(values) > 1:
        padded[:70, :90] = 4000
    tags = dict(PixelRepresentation=int(signed), PhotometricInterpretation=f"MONOCHROME{2 - inverted}")
    paths = []
    for image in (plain, padded, padded):
        stored = (4095 - image if inverted else image).astype(np.int16) - (2048 if signed else 0)
        paths.append(file(stored.view(np.uint16), **tags))
    ds = pydicom.dcmread(paths[1])
    for element, value in zip((0x0120, 0x0121), values, strict=False):
        ds.add_new((0x0028, element), vr, value)
    ds.save_as(paths[1])
    expected, found, untagged = (picture(path) for path in paths)
    np.testing.assert_array_equal(found, expected)
    assert untagged.shape != expected.shape  # without the tag the strip is taken for tissue


def test_11_bits_above_bits_stored_of_a_stream(compressed, breast):
    image = breast(60, 50)
    stream = imagecodecs.jpegls_encode(image | 0x1000)  # 13 bits, which pydicom would mask
    path = compressed(image, JPEG + "80", [stream])
    with pytest.raises(Reject, match=r"decode_error.*values .* in 12 bits"):
        frame_of(path)


def test_12_high_bit(file, compressed, breast):
    image = breast(60, 50)
    for shift in range(1, 5):
        np.testing.assert_array_equal(frame_of(file(image << shift, HighBit=11 + shift)), image)
    for high_bit in (10, 16):
        assert code_of(file(image, HighBit=high_bit)) == "highbit"
    assert code_of(compressed(image, JPEG + "80", HighBit=15)) == "highbit"


def test_13_signed_and_compressed(compressed, breast):
    image = breast(60, 50)
    signed = image.astype(np.int16) - 2048
    attributes = dict(PixelRepresentation=1)
    j2k = bytes(imagecodecs.jpeg2k_encode(signed, codecformat="j2k", level=0))
    np.testing.assert_array_equal(frame_of(compressed(image, JPEG + "90", [j2k], **attributes)), image)
    twos = signed.view(np.uint16) & 0xFFF  # JPEG knows no sign
    np.testing.assert_array_equal(frame_of(compressed(twos, JPEG + "70", **attributes)), image)
    wide = (signed.view(np.uint16), dict(BitsStored=16, HighBit=15, PixelRepresentation=1))
    rle = compressed(wide[0], "1.2.840.10008.1.2.5", **wide[1])
    np.testing.assert_array_equal(frame_of(rle).astype(int) - 32768, signed)


def test_14_rescale(file, breast):
    plain = picture(file())
    scaled = dict(RescaleSlope=0.25, RescaleIntercept=-100, WindowCenter=400, WindowWidth=1000)
    np.testing.assert_array_equal(picture(file(**scaled)), plain)  # percentiles do not care
    # Window ends -100..900 in rescaled units are 0..4000 stored.
    tagged = picture(file(WindowCenter=2000, WindowWidth=4000), window="tag", clahe=0)
    same = picture(file(**scaled), window="tag", clahe=0)
    assert np.abs(tagged.astype(int) - same).max() <= 1
    turned = file(4095 - breast(), RescaleSlope=-1, RescaleIntercept=4095)
    np.testing.assert_array_equal(picture(turned), plain)
    assert scan(file(RescaleSlope=0)).slope == 1  # no slope would make a constant
    assert prepare([file(**scaled)], Settings(window="minmax")).window[0] == -100


@pytest.mark.parametrize("syntax", CODECS)
def test_16_every_codec(compressed, breast, syntax):
    image = breast(101, 77)
    _, error, decoder = CODECS[syntax]
    path = compressed(image, syntax)
    frames = Frames(path, scan(path))
    expected = image >> 4 if syntax == JPEG + "50" else image
    assert np.abs(frames[0].astype(int) - expected).max() <= error
    assert (frames.decoder, frames.fallbacks) == (decoder, 0)
    # Frames of a volume are found through the offset table, and by counting fragments.
    volume = np.stack([breast(101, 77, seed=s) for s in range(3)])
    if syntax != JPEG + "50":
        frames = Frames(path := compressed(volume, syntax), scan(path))
        for i in (2, 0, 1):
            assert np.abs(frames[i].astype(int) - volume[i]).max() <= error


@pytest.mark.parametrize(
    "name",
    [
        "ImplicitVRLittleEndian",
        "ExplicitVRLittleEndian",
        "ExplicitVRBigEndian",
        "DeflatedExplicitVRLittleEndian",
    ],
)
def test_16_uncompressed(file, breast, name):
    image = np.stack([breast(101, 77, seed=s) for s in range(2)])
    path = file(image, syntax=getattr(uid, name))
    assert pydicom.dcmread(path).file_meta.TransferSyntaxUID.keyword == name
    np.testing.assert_array_equal(frame_of(path, 1), image[1])
    odd = file(
        PixelData=(breast(101, 77) >> 4).astype(np.uint8).tobytes() + b"\0",
        Rows=101,
        Columns=77,
        BitsAllocated=8,
        BitsStored=8,
        HighBit=7,
        syntax=getattr(uid, name),
    )
    if name != "ExplicitVRBigEndian":  # there OW words of 8-bit pixels are turned
        np.testing.assert_array_equal(frame_of(odd), breast(101, 77) >> 4)


def test_16_a_blank_slice_is_short(compressed, breast):
    volume = np.stack([breast(), np.zeros_like(breast()), breast(seed=1)])
    for syntax in (s for s in CODECS if s != JPEG + "50"):
        path = compressed(volume, syntax)
        assert not frame_of(path, 1).any() and frame_of(path, 2).any(), syntax


@pytest.mark.parametrize("syntax", [s for s in CODECS if s != JPEG + "50"])
def test_16_constant_decoders(compressed, breast, syntax, monkeypatch):
    """A decoder that gives a constant for a long stream is not believed, nor one that stops half way with an
    error."""
    path = compressed(breast(noise=40), syntax)
    constant = ("constant", lambda data: np.full((320, 256), 4095, np.uint16))

    def raising(data):
        raise ValueError("half way")

    real = Frames._decoders
    bad = [constant, ("raising", raising)]
    monkeypatch.setattr(Frames, "_decoders", lambda self, number: iter([*bad, *real(self, number)]))
    frames = Frames(path, scan(path))
    assert frames[0].std() > 100 and frames.fallbacks == 2
    monkeypatch.setattr(Frames, "_decoders", lambda self, number: iter(bad))
    assert code_of(path) == "decode_error"


def test_16_htj2k_errors_are_not_swallowed(compressed, breast, monkeypatch):
    """imagecodecs.htj2k_decode of 2026.3 prints what went wrong and returns an array that it did not fill;
    later ones raise."""
    image = breast(noise=20)
    stream = bytes(imagecodecs.htj2k_encode(image))
    swallowed, seen = [], 0
    monkeypatch.setattr(sys, "unraisablehook", swallowed.append)
    for at in range(200, len(stream) - 2, 97):
        broken = stream[:at] + bytes([stream[at] ^ 0x80]) + stream[at + 1 :]
        swallowed.clear()
        try:
            imagecodecs.htj2k_decode(broken)
        except imagecodecs.Htj2kError as error:
            swallowed.append(error)
        if swallowed and (seen := seen + 1) <= 20:
            assert code_of(compressed(image, JPEG + "201", [broken])) == "decode_error"
    assert seen


def test_16_empty_and_split_fragments(compressed, breast):
    image = breast(101, 77)
    stream = bytes(CODECS[JPEG + "70"][0](image))
    path = compressed(image, JPEG + "70")
    ds = pydicom.dcmread(path)
    ds.PixelData = encapsulate([stream], fragments_per_frame=3)
    ds["PixelData"].is_undefined_length = True
    ds.save_as(path)
    np.testing.assert_array_equal(frame_of(path), image)
    assert code_of(compressed(image, JPEG + "70", [b"\0\0"])) == "truncated"


def test_17_half_size_values(compressed, breast):
    image = breast(400, 320)
    path = compressed(image, JPEG + "90")
    header = scan(path)
    half = Frames(path, header, halvings=1)
    assert half[0].shape == (200, 160) and half.decoder == "pillow"
    mean = cv2.resize(image, (160, 200), interpolation=cv2.INTER_AREA)
    assert abs(half[0].mean() / mean.mean() - 1) < 0.02  # Pillow's own values are 16 times as much
    fast = prepare([path], Settings(fast_j2k=True, long_side=64))
    assert fast.frames.halvings and next(fast.images()).any()


def test_18_lossy_is_flagged(compressed, breast):
    path = compressed(breast(), JPEG + "51", LossyImageCompression="01")
    prepared = prepare([path], Settings())
    assert "lossy" in prepared.facts(0)["flags"]
    assert scan(compressed(breast(), JPEG + "70", LossyImageCompression="00")).flags == ()


VIDEO = [
    f"1.2.840.10008.1.2.4.{n}"
    for n in ("100", "100.1", "101", "102", "103", "104", "105", "106", "107", "108")
]
PART_2_AND_JPIP = [JPEG + n for n in ("92", "93", "94", "95", "204", "205")]
JPEG_XL = [JPEG + n for n in ("110", "111", "112")]
OLD_AND_PRIVATE = [
    JPEG + "52",
    JPEG + "64",
    "1.2.840.10008.1.2.7.1",
    "1.2.840.113619.5.2",
    "1.2.840.10008.1.2.6.2",
]


def _with_syntax(path: Path, syntax: str) -> Path:
    """Write another transfer syntax into the meta group, also one that pydicom does not let through."""
    data = path.read_bytes()
    at = data.index(b"\x02\0\x10\0UI")
    length = struct.unpack("<H", data[at + 6 : at + 8])[0]
    value = syntax.encode() + b"\0" * (len(syntax) % 2)
    data = data[: at + 6] + struct.pack("<H", len(value)) + value + data[at + 8 + length :]
    group = struct.unpack("<I", data[140:144])[0] + len(value) - length
    path.write_bytes(data[:140] + struct.pack("<I", group) + data[144:])
    return path


@pytest.mark.parametrize("syntax", [*VIDEO, *PART_2_AND_JPIP, *JPEG_XL, *OLD_AND_PRIVATE])
def test_19_unsupported_syntax(compressed, breast, syntax):
    volume = np.stack([breast(60, 50)] * 3)
    path = _with_syntax(compressed(volume[0], JPEG + "80"), syntax)
    with pytest.raises(Reject) as caught:
        scan(path)  # at once: before any pixel is read
    assert caught.value.code == "unsupported_syntax" and caught.value.detail


def test_19_wrong_or_no_syntax(file, compressed, breast):
    """A syntax that is none of the data: encapsulated pixels are never read as if they were plain ones."""
    image = breast(60, 50, noise=50)
    wrong = _with_syntax(compressed(image, JPEG + "80"), "1.2.840.10008.1.2.1")
    assert code_of(wrong) == "unsupported_syntax"
    assert code_of(_with_syntax(file(image), JPEG + "70")) == "truncated"
    assert code_of(_with_syntax(compressed(image, JPEG + "80"), JPEG + "90")) == "decode_error"
    assert code_of(_with_syntax(compressed(image, JPEG + "90"), JPEG + "70")) == "decode_error"


def test_20_deflated_bomb(file, tmp_path, monkeypatch):
    path = file(syntax=uid.DeflatedExplicitVRLittleEndian)
    assert code_of(path) == "record"
    size = len(zlib.decompress(path.read_bytes()[144 + _meta_length(path) :], -zlib.MAX_WBITS))
    monkeypatch.setattr(read, "INFLATED_MAX", size)
    assert code_of(path) == "record"
    monkeypatch.setattr(read, "INFLATED_MAX", size - 1)
    assert code_of(path) == "too_large"
    data = bytearray(path.read_bytes())
    data[140:144] = struct.pack("<I", 7)  # a wrong length of the meta group hides nothing
    path.write_bytes(data)
    assert code_of(path) == "too_large"
    path.write_bytes(data[132:])  # nor does it help to leave out the preamble
    assert code_of(path) == "too_large"


def _meta_length(path: Path) -> int:
    return pydicom.dcmread(path).file_meta.FileMetaInformationGroupLength


@pytest.mark.parametrize("name", ["ImplicitVRLittleEndian", "ExplicitVRLittleEndian", "ExplicitVRBigEndian"])
def test_21_without_meta(file, breast, name):
    """With a preamble but without a transfer syntax, and with neither."""
    path = file(breast(60, 50), syntax=getattr(uid, name))
    data = path.read_bytes()
    body = data[144 + _meta_length(path) :]
    path.write_bytes(data[:132] + body)
    np.testing.assert_array_equal(frame_of(path), breast(60, 50))
    path.write_bytes(body)
    if name == "ExplicitVRBigEndian":
        assert code_of(path) == "not_dicom"
    else:
        np.testing.assert_array_equal(frame_of(path), breast(60, 50))


def test_21_garbage(tmp_path):
    rng = np.random.default_rng(0)
    for start, code in ((b"", "not_dicom"), (b"\0" * 128 + b"DICM", None), (b"\x08\0\x05\0", None)):
        path = tmp_path / "a.dcm"
        path.write_bytes(start + rng.bytes(5000))
        assert code_of(path) in ([code] if code else ["truncated", "unsupported_class"])
    path.write_bytes(b"\0" * 128 + b"DICM")
    assert code_of(path) == "unsupported_class"


def test_22_truncated_header(file):
    data = (path := file()).read_bytes()
    end = data.index(b"\xe0\x7f\x10\0")  # the pixel data element
    for cut in (140, 300, end // 2, end - 40, end, end + 4, end + 12):
        path.write_bytes(data[:cut])
        assert code_of(path) in ("truncated", "unsupported_class", "not_monochrome", "highbit"), cut
    path.write_bytes(data[: end + 4])
    assert code_of(path) == "truncated"


NATIVE = [
    uid.ImplicitVRLittleEndian,
    uid.ExplicitVRLittleEndian,
    uid.ExplicitVRBigEndian,
    uid.DeflatedExplicitVRLittleEndian,
]


@pytest.mark.parametrize("syntax", [*NATIVE, *CODECS])
def test_23_truncated_file(file, compressed, breast, syntax):
    image = breast(noise=20)
    path = compressed(image, syntax) if syntax in CODECS else file(image, syntax=syntax)
    data = path.read_bytes()
    assert code_of(path) == "record"
    for share in (0.5, 0.98):
        path.write_bytes(data[: int(len(data) * share)])
        assert code_of(path) == "truncated", share
    if syntax in CODECS:
        path.write_bytes(data[:-8])  # all there but the delimiter
        assert code_of(path) == "truncated"


@pytest.mark.parametrize("syntax", CODECS)
def test_24_truncated_stream(compressed, breast, syntax):
    """The file is whole, but the stream was cut before it was put there. Several decoders return half an image
    without a word; no share of it may pass."""
    image = breast(noise=20)
    whole = next(generate_frames(pydicom.dcmread(compressed(image, syntax)).PixelData, number_of_frames=1))
    for share in (0.1, 0.5, 0.9, 0.98, 0.999):
        path = compressed(image, syntax, [whole[: int(len(whole) * share) // 2 * 2]])
        assert code_of(path) in ("truncated", "decode_error"), share
    volume = np.stack([image] * 2)
    path = compressed(volume, syntax, [whole, whole[: len(whole) // 4 * 2]])
    assert code_of(path) in ("truncated", "decode_error")


def test_25_checksums(tmp_path, breast, write_dicom, built):
    """A flipped bit in a compressed stream decodes; the manifest's checksum is what tells."""
    folder = tmp_path / "in"
    folder.mkdir()
    path = write_dicom(folder / "a.dcm", breast(), JPEG + "70")
    _, _, manifest = built(folder)
    assert manifest["a.dcm"]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    stream = next(generate_frames(pydicom.dcmread(path).PixelData, number_of_frames=1))
    image, data = frame_of(path), path.read_bytes()
    for share in range(20, 90):  # to the first place where the decoder does not see it
        at = data.index(stream) + len(stream) * share // 100
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        if code_of(path) == "record" and not np.array_equal(frame_of(path), image):
            break
    else:
        pytest.fail("every flip was seen")
    folder.rename(tmp_path / "rotten")
    _, _, rotten = built(tmp_path / "rotten")
    digest = hashlib.sha256((tmp_path / "rotten/a.dcm").read_bytes()).hexdigest()
    assert rotten["a.dcm"]["sha256"] == digest != manifest["a.dcm"]["sha256"]


def test_26_trailing_bytes(tmp_path, breast, write_dicom, built):
    folder = tmp_path / "in"
    folder.mkdir()
    image = breast()
    write_dicom(folder / "more.dcm", image, PixelData=image.tobytes() + b"\1" * 100)
    after = write_dicom(folder / "after.dcm", breast(seed=1))
    after.write_bytes(after.read_bytes() + b"\xff" * 33)  # behind the data set
    write_dicom(folder / "plain.dcm", breast(seed=2))
    rows, codes_, manifest = built(folder)
    assert len(rows) == 3 and not codes_
    assert "100 bytes" in manifest["more.dcm"]["warnings"][0]
    assert manifest["plain.dcm"]["warnings"] == []
    np.testing.assert_array_equal(frame_of(folder / "more.dcm"), image)
    np.testing.assert_array_equal(frame_of(after), breast(seed=1))


def test_27_number_of_frames(file, breast):
    image = breast(60, 50)
    for count in (0, 1, None):
        header = scan(file(image, NumberOfFrames=count))
        assert header.frames == (0,)
    np.testing.assert_array_equal(frame_of(file(image, NumberOfFrames=0)), image)
    volume = np.stack([image] * 3)
    assert code_of(file(volume, NumberOfFrames=4)) == "truncated"
    assert code_of(file(volume, NumberOfFrames=401)) == "too_large"
    assert code_of(file(volume, NumberOfFrames=-3)) != "failed"


@pytest.mark.parametrize("shared", [True, False])
def test_28_functional_groups(file, breast, shared):
    """Rescale, window, spacing and side of a tomosynthesis object are in groups, shared or one a frame."""
    volume = np.stack([breast(side="right", seed=s) for s in range(3)])
    group = items(
        PixelValueTransformationSequence=items(RescaleSlope=2, RescaleIntercept=-50, RescaleType="US"),
        FrameVOILUTSequence=items(WindowCenter=3000, WindowWidth=2000),
        PixelMeasuresSequence=items(PixelSpacing=[0.09, 0.09], SliceThickness=1.5, SpacingBetweenSlices=1.25),
        FrameAnatomySequence=items(FrameLaterality="R"),
    )
    name = "SharedFunctionalGroupsSequence" if shared else "PerFrameFunctionalGroupsSequence"
    groups = group if shared else group * 3
    view = concept(codes.cid4014.CranioCaudal)
    path = file(volume, ImageLaterality="", ViewPosition="", ViewCodeSequence=view, **{name: groups})
    header = scan(path)
    assert (header.kind, header.laterality, header.view) == ("dbt", "R", "CC")
    assert (header.slope, header.intercept) == (2, -50)
    assert (header.pixel_mm, header.pixel_mm_source) == (0.09, "pixel_measures")
    assert (header.slice_mm, header.slab_mm) == (1.25, 1.5)
    prepared = prepare([path], Settings(window="tag"))
    assert prepared.window == (2000, 4000) and prepared.flipped


def test_28_slices_by_position(file, breast):
    """Along the normal of the slices, whatever its direction in the patient."""
    volume = np.stack([breast(60, 50, seed=s) for s in range(3)])
    axes = items(ImageOrientationPatient=[0, 1, 0, 0, 0, -1])  # the normal is -x
    groups = [items(PlanePositionSequence=items(ImagePositionPatient=[x, 50, 9]))[0] for x in (5.0, 7.0, 6.0)]
    shared = items(PlaneOrientationSequence=axes)
    path = file(volume, SharedFunctionalGroupsSequence=shared, PerFrameFunctionalGroupsSequence=groups)
    header = scan(path)
    assert header.frames == (1, 2, 0) and header.positions_mm == (-7, -6, -5) and header.slice_mm == 1
    np.testing.assert_array_equal(frame_of(path, 1), volume[2])
    broken = file(volume, PerFrameFunctionalGroupsSequence=groups[:2])  # one group too few: file order
    assert scan(broken).frames == (0, 1, 2) and scan(broken).positions_mm == (None,) * 3


def test_29_projections(file):
    for n in ("4", "5"):
        assert code_of(file(SOPClassUID=f"1.2.840.10008.5.1.4.1.1.13.1.{n}")) == "projection"
    assert code_of(file(ImageType=["ORIGINAL", "PRIMARY", "TOMO_PROJ", "RIGHT"])) == "projection"


def test_30_hologic_container(file, tmp_path):
    path = file(SOPClassUID=SC)
    ds = pydicom.dcmread(path)
    block = ds.private_block(0x7E01, "HOLOGIC, Inc.", create=True)
    block.add_new(0x10, "SQ", items(Rows=5))
    block.add_new(0x12, "OB", b"\0" * 64)
    ds.save_as(path)
    with pytest.raises(Reject, match="Breast Tomosynthesis Image Storage") as caught:
        scan(path)
    assert caught.value.code == "hologic_sco"


def _slices(folder: Path, write_dicom, breast, how: str, positions: bool, **attributes) -> list[np.ndarray]:
    """Five files of one volume, listed in another order than they lie in."""
    folder.mkdir(exist_ok=True)
    image_type = ["DERIVED", "PRIMARY", "TOMO", "NONE"]
    tags = {"SOPClassUID": CT, "Modality": "CT"} if how == "CT" else {"SOPClassUID": SC, "Modality": "MG"}
    images = [breast(seed=40 + z) for z in range(5)]
    for z, image in enumerate(images):
        if positions:  # InstanceNumber then says something else
            tags |= dict(ImagePositionPatient=[0, 0, 1.5 * z], ImageOrientationPatient=[1, 0, 0, 0, 1, 0])
        name = folder / f"{'dbace'[z]}-{attributes.get('ImageLaterality', 'L')}.dcm"
        number = 9 - z if positions else z
        write_dicom(name, image, **(dict(SeriesInstanceUID="1.2.9", PatientID="P-9", InstanceNumber=number, ImageType=image_type, StudyInstanceUID="1.2") | tags | attributes))  # fmt: skip
    return images


def _records(folder: Path) -> list[np.ndarray]:
    shards = [path for split in records.SPLITS for path in records.shard_paths(folder, split)]
    return [records.decode(r)["image"] for path in shards for r in ArrayRecordReader(path).read_all()]


@pytest.mark.parametrize("positions", [True, False])
@pytest.mark.parametrize("how", ["CT", "SC"])
def test_31_one_file_a_slice(tmp_path, breast, write_dicom, built, how, positions):
    images = _slices(tmp_path / "in", write_dicom, breast, how, positions)
    rows, codes_, manifest = built(tmp_path / "in", clahe=0, box="full", mask="none", long_side=320)
    assert len(rows) == 5 and not codes_ and len(manifest) == 5
    assert len({row["volume_id"] for row in rows}) == 1 and len({row["image_id"] for row in rows}) == 5
    assert [row["slice_index"] for row in rows] == list(range(5))
    assert [row["slice_position_mm"] for row in rows] == ([0, 1.5, 3, 4.5, 6] if positions else [None] * 5)
    assert {row["slice_mm"] for row in rows} == {1.5 if positions else None}
    for image, record in zip(images, _records(tmp_path / "in-out"), strict=True):
        inside = image > 500
        assert np.corrcoef(image[inside], record[inside])[0, 1] > 0.99  # each in its place


def test_31_one_unreadable_slice(tmp_path, breast, write_dicom, built):
    _slices(tmp_path / "in", write_dicom, breast, "CT", True)
    bad = tmp_path / "in/a-L.dcm"  # of the third slice
    bad.write_bytes(bad.read_bytes()[:-5000])
    rows, codes_, manifest = built(tmp_path / "in")
    assert codes_ == {"a-L.dcm": "truncated"} and len(manifest) == 4
    assert [row["slice_position_mm"] for row in rows] == [0, 1.5, 4.5, 6]
    assert [row["slice_index"] for row in rows] == list(range(4)) and {row["num_slices"] for row in rows} == {
        4
    }


def test_31_two_sides_in_a_series(tmp_path, breast, write_dicom, built):
    for side in "LR":
        _slices(tmp_path / "in", write_dicom, breast, "CT", True, ImageLaterality=side)
    rows, _, _ = built(tmp_path / "in")
    volumes = {}
    for row in rows:
        volumes.setdefault(row["volume_id"], []).append(row)
    assert sorted(len(v) for v in volumes.values()) == [5, 5]
    assert {frozenset(r["laterality"] for r in v) for v in volumes.values()} == {
        frozenset("L"),
        frozenset("R"),
    }


def test_32_the_table_wins(file, breast):
    """A source that knows the orientation to be unreliable turns the image by 180 degrees where the pixels
    show the chest wall on the wrong side."""
    from data_prep.plan import Row

    volume = np.stack([breast(side="right", seed=s) for s in range(3)])
    path = file(volume, ImageLaterality="R")
    row = Row(path, "v.dcm", laterality="L", upright=True)
    turned, plain = prepare([path], Settings(clahe=0), row), prepare([path], Settings(clahe=0))
    assert "upside_down" in turned.flags
    np.testing.assert_array_equal(next(turned.images()), next(plain.images())[::-1])


@pytest.mark.parametrize(
    ("attributes", "kind"),
    [
        ({"ImageType": ["DERIVED", "PRIMARY", "TOMOSYNTHESIS", "GENERATED_2D"]}, "synthetic2d"),
        ({"ImageType": ["DERIVED", "PRIMARY", "TOMOSYNTHESIS", "NONE"]}, "synthetic2d"),
        ({"SeriesDescription": "L MLO C-View"}, "synthetic2d"),
        ({"SeriesDescription": "R CC CView"}, "synthetic2d"),
        ({"SeriesDescription": "Intelligent 2D"}, "synthetic2d"),
        ({"SeriesDescription": "Insight 2D L CC"}, "synthetic2d"),
        ({"SeriesDescription": "V-Preview"}, "synthetic2d"),
        ({"SeriesDescription": "L MLO S-2D"}, "synthetic2d"),
        ({"SeriesDescription": "L CC View"}, "2d"),
        ({"ImageType": ["DERIVED", "PRIMARY", "", "LEFT"]}, "2d"),
    ],
)  # fmt: skip
def test_33_synthetic(file, attributes, kind):
    assert scan(file(**attributes)).kind == kind


MODIFIERS = {
    "Magnification": "spot_mag", "SpotCompression": "spot_mag", "ImplantDisplaced": "implant_displaced",
    "Tangential": "tangential", "AxillaryTail": "axillary_tail", "Cleavage": "cleavage",
    "RolledInferior": "rolled", "RolledLateral": "rolled", "RolledMedial": "rolled", "RolledSuperior": "rolled",
}  # fmt: skip
VIEWS = {
    "CaudoCranial": "FB", "CranioCaudal": "CC", "CranioCaudalExaggeratedLaterally": "XCCL",
    "CranioCaudalExaggeratedMedially": "XCCM", "InferomedialToSuperolateralOblique": "ISO",
    "LateroMedial": "LM", "LateroMedialOblique": "LMO", "MedioLateralObliqueProjection": "MLO",
    "MedioLateralProjection": "ML", "SuperolateralToInferomedialOblique": "SIO",
    "TissueSpecimenFromBreast": "SPECIMEN",
}  # fmt: skip


def _both_codes(code) -> list[str]:
    """A concept's SCT code and the SRT code of older files, by pydicom's table."""
    old = _snomed_dict.mapping["SCT"].get(code.value)
    return [code.value] + ([old] if old else [])


@pytest.mark.parametrize("name", MODIFIERS)
def test_34_view_modifiers(file, name):
    for value in _both_codes(getattr(codes.cid4015, name)):
        view = concept(codes.cid4014.CranioCaudal)
        view[0].ViewModifierCodeSequence = items(CodeValue=value, CodingSchemeDesignator="SCT")
        path = file(ViewPosition="", ViewCodeSequence=view)
        if MODIFIERS[name] == "spot_mag":
            assert code_of(path) == "spot_mag"
        else:
            header = scan(path)
            assert (header.view, header.view_modifier) == ("CC", MODIFIERS[name])
            assert header.flags == (("implant",) if name == "ImplantDisplaced" else ())


@pytest.mark.parametrize("name", VIEWS)
def test_34_views(file, name):
    for value in _both_codes(getattr(codes.cid4014, name)):
        path = file(ViewPosition="", ViewCodeSequence=items(CodeValue=value, CodingSchemeDesignator="SCT"))
        if name == "TissueSpecimenFromBreast":
            assert code_of(path) == "specimen"
        else:
            assert scan(path).view == VIEWS[name]


def test_34_specimen_stereo_implant_magnified(file):
    assert code_of(file(ViewPosition="SPECIMEN")) == "specimen"
    assert scan(file(ImageType=["DERIVED", "PRIMARY", "STEREO", "LEFT"])).flags == ("stereo",)
    assert scan(file(BreastImplantPresent="YES")).flags == ("implant",)
    assert scan(file(BreastImplantPresent="NO")).implant is False
    for factor, code in (("1.0", "record"), ("1.07", "record"), ("1.5", "spot_mag")):  # 1.07: of the support
        assert code_of(file(EstimatedRadiographicMagnificationFactor=factor)) == code


@pytest.mark.parametrize(
    ("tags", "side", "conflict"),
    [
        ({"ImageLaterality": "R"}, "R", False),
        ({"Laterality": "R"}, "R", False),
        ({"ViewPosition": "RIGHT MLO"}, "R", False),
        ({"ViewPosition": "RMLO"}, "R", False),
        ({"SeriesDescription": "Right breast CC"}, "R", False),
        ({"SeriesDescription": "both: left and right"}, None, False),
        ({"SeriesDescription": "PLR screening"}, None, False),
        ({"FrameAnatomySequence": "R"}, "R", False),
        ({"ImageLaterality": "B"}, None, False),
        ({"ImageLaterality": "L", "Laterality": "R"}, "L", True),
        ({"ImageLaterality": "R", "SeriesDescription": "L CC"}, "R", True),
        ({"ImageLaterality": "L", "ViewPosition": "RIGHT MLO"}, "L", True),
        ({"ImageLaterality": "L", "FrameAnatomySequence": "R"}, "L", True),
        ({"ImageLaterality": "R", "SeriesDescription": "R MLO"}, "R", False),
    ],
)
def test_35_laterality(file, tags, side, conflict):
    if frame := tags.get("FrameAnatomySequence"):
        group = items(FrameAnatomySequence=items(FrameLaterality=frame))
        tags = {k: v for k, v in tags.items() if k != "FrameAnatomySequence"}
        tags["SharedFunctionalGroupsSequence"] = group
    header = scan(file(**({"ImageLaterality": "", "ViewPosition": ""} | tags)))
    assert header.laterality == side and ("laterality_conflict" in header.flags) == conflict


def test_35_view_conflict(file):
    coded = concept(codes.cid4014.CranioCaudal)
    for tags in ({"ViewPosition": "MLO", "ViewCodeSequence": coded}, {"SeriesDescription": "L CC"}):
        header = scan(file(**tags))
        assert header.view == "MLO" and header.flags == ("view_conflict",)
    assert scan(file(ViewPosition="CC", ViewCodeSequence=coded, SeriesDescription="L CC")).flags == ()


def test_36_burned_in(file):
    path = file(BurnedInAnnotation="YES")
    assert code_of(path) == "burned_in"
    assert "burned_in" in prepare([path], Settings(burned_in="keep")).facts(0)["flags"]
    assert code_of(file(BurnedInAnnotation="NO")) == "record"


def test_36_label_at_the_skin(file, breast):
    """A bright label that touches the skin, of a header that says there is none."""
    image = breast(512, 400)
    mask = cv2.morphologyEx((image > 0).astype(np.uint8), cv2.MORPH_OPEN, np.ones((9, 9), np.uint8)) > 0
    x = int(np.flatnonzero(mask[180])[-1])
    image[166:190, x - 4 : x + 44] = 4095
    prepared = prepare([file(image, BurnedInAnnotation="NO")], Settings())
    assert "text_on_tissue" in prepared.flags
    assert not prepared.tissue.mask[160:196, x + 8 :].any()  # and it is cut off


def test_37_overlay_bits(file, breast):
    """An overlay in bit 12 of the pixels, as older devices store it, and one of its own, larger than the
    image."""
    image = breast(60, 50)
    overlay = np.zeros_like(image)
    overlay[10:20, 10:20] = 0x1000
    embedded = file(image | overlay)
    own = [(0x10, "US", 500), (0x11, "US", 900), (0x40, "CS", "G"), (0x50, "SS", [-20, 9999])]
    for path, elements in (
        (embedded, [(0x102, "US", 12)]),
        (file(image), [*own, (0x3000, "OW", b"\xff" * 10)]),
    ):
        ds = pydicom.dcmread(path)
        for element, vr, value in elements:
            ds.add_new((0x6000, element), vr, value)
        ds.save_as(path)
        np.testing.assert_array_equal(frame_of(path), image)


def test_37_colour_and_screenshots(file):
    for photometric in ("RGB", "YBR_FULL_422", "PALETTE COLOR"):
        assert code_of(file(PhotometricInterpretation=photometric, SamplesPerPixel=3)) == "not_monochrome"
    assert code_of(file(SamplesPerPixel=3)) == "not_monochrome"
    assert code_of(file(SOPClassUID=SC, Modality="OT", BodyPartExamined="")) == "secondary_capture"
    assert scan(file(SOPClassUID=SC)).kind == "film"


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ({}, (None, None)),
        ({"ImagerPixelSpacing": [0.07, 0.07], "PixelSpacing": [0.06, 0.06]}, (0.07, "imager")),
        ({"PixelSpacing": [0.06, 0.06]}, (0.06, "pixel_spacing")),
        ({"NominalScannedPixelSpacing": [0.05, 0.05]}, (0.05, "nominal_scanned")),
        ({"ImagerPixelSpacing": [0, 0], "PixelSpacing": [0.06, 0.06]}, (0.06, "pixel_spacing")),
        ({"ImagerPixelSpacing": "", "PixelSpacing": [-1, -1]}, (None, None)),
    ],
)
def test_38_spacing(file, tags, expected):
    prepared = prepare([file(**tags)], Settings())
    facts = prepared.facts(0)
    assert (prepared.header.pixel_mm, facts["pixel_mm_source"]) == expected
    assert (facts["pixel_mm"] is None) == (expected[0] is None)


def test_39_no_breast(file, breast):
    assert code_of(file(QualityControlImage="YES")) == "qc"
    flat = np.where(breast() > 0, 2000, 0).astype(np.uint16)
    assert code_of(file(flat)) == "low_contrast"
    assert code_of(file(breast(800, 640, share=0.012))) in ("tissue_fraction", "empty_tissue")
    assert code_of(file(np.full((300, 200), 700, np.uint16))) == "empty_tissue"


def test_40_dicomdir(file, tmp_path):
    path = file()
    ds = pydicom.dcmread(path)
    for name in (
        "SOPClassUID",
        "SOPInstanceUID",
        "Modality",
        "BodyPartExamined",
        "Rows",
        "Columns",
        "PixelData",
    ):
        delattr(ds, name)
    ds.file_meta.MediaStorageSOPClassUID = uid.MediaStorageDirectoryStorage
    ds.FileSetID, ds.DirectoryRecordSequence = "DISC1", []
    ds.save_as(path, enforce_file_format=False)
    with pytest.raises(Reject, match="DICOMDIR") as caught:
        scan(path)
    assert caught.value.code == "unsupported_class"


def test_41_nothing_that_identifies(tmp_path, breast, write_dicom, built, caplog):
    folder = tmp_path / "Mustermann"
    folder.mkdir()
    secret = {
        "PatientName": "Mustermann^Erika", "PatientID": "MUSTER-4711", "PatientBirthDate": "19640812",
        "AccessionNumber": "ACC998877", "StudyDate": "20190203", "ContentTime": "141516.1718",
        "InstitutionName": "Klinikum Musterstadt", "ReferringPhysicianName": "Quacksalber^Dr",
        "StationName": "MAMSTATION7", "DeviceSerialNumber": "SN-55667788", "ImageComments": "lump felt by Erika",
        "StudyDescription": "Erika screening", "SeriesDescription": "L MLO Mustermann",
        "ManufacturerModelName": "Selenia", "Manufacturer": "HOLOGIC Mustermann", "OperatorsName": "Opera^Tor",
        "StudyInstanceUID": "1.2.276.0.99.1234567", "SeriesInstanceUID": "1.2.276.0.99.7654321",
        "SOPInstanceUID": "1.2.276.0.99.1111111", "FrameOfReferenceUID": "1.2.276.0.99.2222222",
    }  # fmt: skip
    path = write_dicom(folder / "Erika.dcm", breast(), **secret)
    ds = pydicom.dcmread(path)
    ds.private_block(0x0019, "SECRETCREATOR", create=True).add_new(1, "LO", "PRIVATETEXT")
    ds.save_as(path)
    write_dicom(
        folder / "bad.dcm",
        breast(),
        **(secret | {"SOPInstanceUID": "1.2.276.0.99.3", "PhotometricInterpretation": "ERIKA"}),
    )
    rows, codes_, _ = built(folder)
    assert len(rows) == 1 and codes_ == {"bad.dcm": "not_monochrome"}
    assert rows[0]["manufacturer"] == "Hologic"
    words = [w for text in secret.values() for w in text.replace("^", " ").split() if len(w) > 4]
    words = {w.lower() for w in (*words, "SECRETCREATOR", "PRIVATETEXT", "19640812", "MUSTER")} - {
        "selenia",
        "hologic",
        "screening",
    }
    for shared in [p for p in (tmp_path / "Mustermann-out").rglob("*") if p.is_file()]:
        data = shared.read_bytes().lower()
        assert not [word for word in words if word.encode() in data], shared.name
    assert caplog.messages and not [w for w in words if any(w in m.lower() for m in caplog.messages)]


@pytest.mark.parametrize(
    "tags",
    [
        {"Rows": 60000},
        {"Columns": 20001},
        {"Rows": 15000, "Columns": 15000},
        {"NumberOfFrames": 401},
        {"NumberOfFrames": 2**31 - 1},
    ],
)
def test_42_huge_headers(file, breast, tags):
    volume = np.stack([breast(60, 50)] * 2)
    assert code_of(file(volume, **tags)) == "too_large"


@pytest.mark.parametrize(
    ("syntax", "what"),
    [
        (syntax, what)
        for syntax in CODECS
        for what in ("size", "components", "tiles")
        if syntax != "1.2.840.10008.1.2.5" and (what != "tiles" or syntax in read._J2K)
    ],
)
def test_42_huge_streams(compressed, breast, syntax, what, monkeypatch):
    """The stream's own header claims more than the DICOM header; no decoder is asked."""
    image = breast(60, 50)
    stream = bytearray(
        next(generate_frames(pydicom.dcmread(compressed(image, syntax)).PixelData, number_of_frames=1))
    )
    j2k = stream.find(b"\xff\x51")
    sof = next(
        (i for m in (b"\xff\xc0", b"\xff\xc1", b"\xff\xc3", b"\xff\xf7") if (i := stream.find(m)) > 0), -1
    )
    if j2k == 2:
        at, value = {"size": (j2k + 6, struct.pack(">II", 60000, 60000)), "components": (j2k + 38, struct.pack(">H", 16384)), "tiles": (j2k + 22, struct.pack(">II", 1, 1))}[what]  # fmt: skip
        if what == "tiles":  # of 50 x 60, so that they are few enough to be tiles of a real image
            monkeypatch.setattr(read, "MAX_TILES", 2999)
    else:
        at, value = {"size": (sof + 5, struct.pack(">HH", 60000, 60000)), "components": (sof + 9, b"\xff")}[
            what
        ]
    stream[at : at + len(value)] = value
    path = compressed(image, syntax, [bytes(stream)])
    monkeypatch.setattr(Frames, "_decoders", lambda *_: pytest.fail("a decoder was asked"))
    with pytest.raises(Reject, match="stream of") as caught:
        frame_of(path)
    assert caught.value.code == "decode_error"


def test_42_huge_image_files(tmp_path):
    """PNG and TIFF: what their header claims is read before they are decoded."""
    image = np.zeros((8, 8), np.uint8)
    cv2.imwrite(str(tmp_path / "a.png"), image)
    data = bytearray((tmp_path / "a.png").read_bytes())
    data[16:24] = struct.pack(">II", 30000, 30000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    (tmp_path / "a.png").write_bytes(data)
    assert code_of(tmp_path / "a.png") == "too_large"
