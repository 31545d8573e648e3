"""The quality report: one self-contained page without identifiers, whose figures can be recomputed."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest

from data_prep import measures
from data_prep.build import BuildOptions, build
from data_prep.pectoral import pectoral_line, pectoral_share
from data_prep.report import write_report
from data_prep.settings import Settings
from mammodino_jax.data import crops, records
from mammodino_jax.data.index import open_split
from mammodino_jax.errors import UserError

TOMO = "1.2.840.10008.5.1.4.1.1.13.1.3"


class Page(HTMLParser):
    """Texts, attributes of the tiles and rows of the tables by section."""

    def __init__(self, text: str):
        super().__init__()
        self.tiles, self.rows, self.texts, self.section, self.tag = [], {}, [], "", ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tag = tag
        for name in ("src", "href"):
            assert dict(attributes).get(name, "data:").startswith("data:"), "loads something from elsewhere"
        if tag == "figure" and "data-kind" in dict(attributes):
            self.tiles.append(dict(attributes))
        if tag == "tr":
            self.rows.setdefault(self.section, []).append([])

    def handle_data(self, data):
        self.texts.append(data)
        if self.tag == "h2" and data.strip():
            self.section = data
        elif self.tag in ("td", "th"):
            self.rows[self.section][-1].append(data)
        self.tag = ""


@pytest.fixture
def folder(tmp_path, breast, write_dicom, monkeypatch) -> Path:
    """Two views of three patients and a volume of one file a slice, two bad files."""
    monkeypatch.setenv("MAMMODINO_KEY_FILE", str(tmp_path / "secret" / "key"))
    source = tmp_path / "exams"
    source.mkdir()
    lines = ["file,patient_id,laterality,label_density"]
    for patient in range(3):
        for side, name in (("L", "left"), ("R", "right")):
            image = breast(side=name, seed=10 * patient + (side == "R"), share=0.25 + 0.1 * patient)
            file = f"Smith{patient}-{side}.dcm"
            write_dicom(source / file, image, PatientID=f"Smith{patient}", ImageLaterality=side,
                        Manufacturer="HOLOGIC" if patient else "GE MEDICAL SYSTEMS")  # fmt: skip
            lines.append(f"{file},Smith{patient},{side},{patient if patient else ''}")
    for z in (2, 0, 1):
        write_dicom(source / f"Smith0-tomo{z}.dcm", breast(seed=50 + z), positions=[float(z)], PatientID="Smith0",
                    SOPClassUID=TOMO, SeriesInstanceUID="1.2.3", StudyInstanceUID="1.2")  # fmt: skip
    for name in ("broken1.dcm", "broken2.dcm"):
        (source / name).write_bytes(b"\0" * 500)
    (source / "labels.csv").write_text("\n".join(lines) + "\n")
    (source / "labels.json").write_text(
        json.dumps({"label_density": {"classes": list("ABCD"), "rule": "by <one> reader", "level": "exam"}})
    )
    build(BuildOptions((source,), tmp_path / "out"))
    return tmp_path / "out"


def test_page_is_one_file_without_identifiers(folder):
    output = write_report(folder, samples=4)
    assert output == folder.with_name("out.local") / "report.html"
    text = output.read_text()
    page = Page(text)
    assert "http" not in re.sub(r'"data:[^"]*"', "", text)
    for secret in ("Smith", "Doe", "exams", "broken", ".dcm", str(folder.parent)):
        assert secret not in text
    index = pq.read_table(folder / "index.parquet").to_pylist()
    for row in index:
        assert row["image_id"] not in text and row["patient_id"] not in text
    assert "by <one> reader (by exam)" in page.texts  # escaped
    assert page.rows["What was rejected"][1:] == [
        ["not_dicom", "2", "Neither DICOM nor PNG, JPEG, PGM or TIFF."]
    ]
    counts = {row[0]: row[1:] for row in page.rows["What is in it"]}
    assert counts["dbt"] == ["3", "1", "1"] and counts["2d"] == ["6", "6", "3"]
    assert counts["Hologic"] == ["4", "4", "2"] and counts["density"][:2] == ["B: 2, C: 2", "3"]
    # 4 random, 2 smallest, largest and suspect; no text; perhaps markers
    assert len(page.tiles) >= 10 and all(t["data-kind"] in records.KINDS for t in page.tiles)
    assert {t["data-vendor"] for t in page.tiles} <= {"Hologic", "GE", "unknown vendor"}
    assert all("data-flags" in t for t in page.tiles)
    assert "All pictures are drawn from the source files." in page.texts
    assert len(page.rows["The paper's percentile mask"]) == 1 + len(measures.TAUS)
    assert write_report(folder, samples=4).read_text() == text
    assert write_report(folder, samples=4, seed=1).read_text() != text


def test_rejected_crops_are_those_of_the_sampler(folder):
    page = Page(write_report(folder, samples=2, seed=5).read_text())
    config, rho, number, rejected, fallback = crops.CropConfig(), 0.8, 0, {0: [], 1: []}, []
    for split in [s for s in records.SPLITS if records.shard_paths(folder, s)]:
        shards, table = open_split(folder, split)
        for place, row in enumerate(table.to_pylist()):
            if row["volume_id"] and row["slice_index"] != row["num_slices"] // 2:
                continue
            integral = crops.integral_image(shards.read(place) > 0)
            for draw in range(measures.DRAWS):
                for purpose, scale in enumerate((config.global_scale, config.local_scale)):
                    rng = crops.random_generator(5, number * measures.DRAWS + draw, purpose)
                    window = crops.draw_window(integral, scale, config.ratio, rho, 0.5, rng)
                    rejected[purpose].append(window.would_reject)
                    if purpose == 0:
                        fallback.append(window.fallback)
            number += 1
    row = next(row for row in page.rows["Crops"] if row[0] == "0.8")
    assert 0 < np.mean(rejected[0]) < 1
    assert row[1:4] == [f"{np.mean(x):.1%}" for x in (rejected[0], rejected[1], fallback)]


def test_falls_back_to_records_where_sources_are_gone_or_changed(folder, breast, write_dicom, tmp_path):
    other = breast(side="left", seed=99, share=0.5)
    write_dicom(tmp_path / "exams" / "Smith0-L.dcm", other, PatientID="Smith0", ImageLaterality="L")
    texts = " ".join(Page(write_report(folder, samples=20).read_text()).texts)
    assert "1 of 7 images are drawn from the record" in texts
    shutil.rmtree(tmp_path / "exams")
    texts = " ".join(Page(write_report(folder, samples=20).read_text()).texts)
    assert "7 of 7 images are drawn from the record" in texts
    assert "Not computed: no source file could be read again." in texts
    shutil.rmtree(folder.with_name("out.local"))  # a copy of the shared part alone
    page = Page(write_report(folder, tmp_path / "elsewhere" / "page.html").read_text())
    assert page.tiles and page.rows["What was rejected"][1][:2] == ["not_dicom", "2"]
    with pytest.raises(UserError, match="lies in the data set"):
        write_report(folder, folder / "report.html")


def test_full_frames_warn_where_the_coverage_term_does_nothing(tmp_path, breast, write_dicom, monkeypatch):
    monkeypatch.setenv("MAMMODINO_KEY_FILE", str(tmp_path / "key"))
    (tmp_path / "in").mkdir()
    for n in range(2):
        write_dicom(tmp_path / "in" / f"{n}.dcm", breast(seed=n), PatientID=str(n))
    for name, options in (("box", {}), ("none", {"mask": "none", "box": "full"})):
        build(BuildOptions((tmp_path / "in",), tmp_path / name, settings=Settings(**options)))
        text = " ".join(Page(write_report(tmp_path / name, samples=2).read_text()).texts)
        assert ("the term does nothing" in text) == (name == "none")
        assert f"The training configs take {'0.8' if name == 'box' else '0.5'} for records like these" in text


def mlo(muscle: bool, seed: int = 0) -> tuple[np.ndarray, float]:
    """A record u8 [500, 300] with textured fat, perhaps a muscle from (0, 130) to (260, 0), and its share."""
    y, x = np.mgrid[:500, :300]
    tissue = ((y - 220) / 290) ** 2 + (x / 280) ** 2 < 1
    wedge = (x / 130 + y / 260 < 1) & tissue
    texture = cv2.GaussianBlur(np.random.default_rng(seed).normal(0, 1, (500, 300)), (0, 0), 8)
    grey = 110 + 25 * texture / texture.std() + (60 * wedge if muscle else 0)
    return np.where(tissue, np.clip(grey, 1, 255), 0).astype(np.uint8), float(wedge.sum() / tissue.sum())


@pytest.mark.parametrize("seed", range(3))
def test_pectoral_share(seed):
    image, share = mlo(True, seed)
    x, y = pectoral_line(image)
    assert abs(x - 130 / 500) < 0.03 and abs(y - 260 / 500) < 0.05
    assert abs(pectoral_share(image) - share) < 0.02


def test_no_pectoral_muscle():
    image, _ = mlo(False)
    flat = np.where(image > 0, 120, 0).astype(np.uint8)
    assert pectoral_share(flat) is None
    assert pectoral_share(np.zeros((100, 50), np.uint8)) is None
    ramp = np.where(image > 0, np.linspace(60, 200, 300)[None], 0).astype(np.uint8)  # brighter to the skin
    assert pectoral_share(ramp) is None
