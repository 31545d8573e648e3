"""The fuzzer of benchmarks/ at small size, and that it does find what it looks for."""

import importlib
import multiprocessing
import os
import sys
import time
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks/fuzz_dicom.py"


@pytest.fixture(scope="module")
def fuzz_dicom():
    """The script as a module that spawned workers can import too."""
    sys.path.insert(0, str(SCRIPT.parent))
    yield importlib.import_module("fuzz_dicom")
    sys.path.remove(str(SCRIPT.parent))


@pytest.fixture
def files(tmp_path, breast, write_dicom) -> list[Path]:
    plain = write_dicom(tmp_path / "plain.dcm", breast(noise=10))
    volume = np.stack([breast(noise=10, seed=s) for s in range(2)])
    return [plain, write_dicom(tmp_path / "volume.dcm", volume, "1.2.840.10008.1.2.4.70", positions=[1, 0])]


def test_mutants_of_small_files(files, fuzz_dicom):
    found = fuzz_dicom.fuzz(files, 60, seed=0, processes=1)
    assert found["failures"] == []
    assert sum(found["outcomes"].values()) == 60
    assert {"record", "truncated", "decode_error"} <= found[
        "outcomes"
    ].keys()  # no mutation is without effect
    # growth: a process's peak begins with that of the one that started it
    assert found["peak_gb"] > 0 and found["worst_gb"][0] < 2 and found["worst_s"][0] < 20


def test_the_layout_is_that_of_the_file(files, fuzz_dicom):
    plain, volume = (fuzz_dicom.Layout.of(path) for path in files)
    assert plain.needed == len(plain.data) == plain.pixels + 12 + 2 * 320 * 256
    assert volume.data[volume.needed - 2 : volume.needed] == b"\xff\xd9" and len(volume.items) == 3
    for layout in (plain, volume):
        start, place, size, _ = next(e for e in layout.elements if e[3] == "Rows")
        assert layout.data[start : start + 4] == b"\x28\0\x10\0" and (place - start, size) == (6, 2)
        assert layout.data[layout.values["Rows"] :][:2] == (320).to_bytes(2, "little")
    rng = np.random.default_rng(0)
    mutants = [fuzz_dicom.mutate(layout, rng) for layout in (plain, volume) for _ in range(200)]
    assert {what for what, _, missing in mutants if missing} == {"cut", "stream_cut"}
    assert len({what for what, *_ in mutants}) == 12 and all(
        isinstance(data, bytes) for _, data, _ in mutants
    )


class _Reader:
    """Stands for `prepare`: does what no reader may, but for the worker's first file."""

    def __init__(self, how: str):
        self.how, self.calls = how, 0

    def __call__(self, paths, settings):
        self.calls += 1
        if self.calls > 1:
            if self.how == "EXCEPTION":
                raise KeyError("Rows")
            if self.how == "CRASH":
                os._exit(3)
            if self.how == "HANG":
                time.sleep(60)
            if self.how == "MEMORY":
                self.block = np.ones(300 << 17)
        return self

    def images(self):
        return iter([] if self.how == "NO IMAGE" and self.calls > 1 else [1])


@pytest.mark.parametrize("how", ["ACCEPTED", "EXCEPTION", "NO IMAGE", "CRASH", "HANG", "MEMORY"])
def test_a_bad_reader_is_found(files, fuzz_dicom, monkeypatch, tmp_path, how):
    fork = multiprocessing.get_context("fork")  # so that the workers have what is patched here
    monkeypatch.setattr(fuzz_dicom.multiprocessing, "get_context", lambda _: fork)
    monkeypatch.setattr(fuzz_dicom, "prepare", _Reader(how))
    monkeypatch.setattr(fuzz_dicom, "LIMIT_S", 0.5 if how == "HANG" else 20)
    monkeypatch.setattr(fuzz_dicom, "LIMIT_GB", 0.25)
    count = 30 if how == "ACCEPTED" else 2
    found = fuzz_dicom.fuzz(files, count, seed=0, processes=1, keep=tmp_path / "kept")
    assert found["failures"] and all(f": {how}" in failure for failure in found["failures"])
    assert len(list((tmp_path / "kept").iterdir())) == len(found["failures"])
    if how == "ACCEPTED":
        assert len(found["failures"]) < count and all("cut of" in f for f in found["failures"])
    if how == "MEMORY":
        assert found["worst_gb"][0] > 0.25
