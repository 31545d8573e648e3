"""One mammogram under other display windows: what a file's header may ask for, as a file each."""

from pathlib import Path

import numpy as np
import pydicom
from pydicom.uid import generate_uid


def cosines(windows_vD: np.ndarray, patients_pD: np.ndarray) -> dict[str, np.ndarray]:
    """Cosines of pairs of windows of one image ("within"), of pairs of patients ("between"), and from each
    window to each patient ("to others"), after the mean over patients was subtracted from all."""
    mean = patients_pD.mean(axis=0)
    return plain_cosines(windows_vD - mean, patients_pD - mean)


def plain_cosines(windows_vD: np.ndarray, patients_pD: np.ndarray) -> dict[str, np.ndarray]:
    """The same of the features as they are."""
    v, p = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (windows_vD, patients_pD))
    pairs = lambda x: (x @ x.T)[np.triu_indices(len(x), 1)]  # noqa: E731
    return {"within": pairs(v), "between": pairs(p), "to others": (v @ p.T).ravel()}


def write_variants(path: Path, folder: Path) -> list[str]:
    """Write `path` once for each of its VOI LUTs and each of its windows in each VOI LUT function, and once with
    neither (which data_prep windows by tissue percentiles). Returns the names; files are NAME.dcm."""
    ds = pydicom.dcmread(path)
    luts = list(ds.get("VOILUTSequence") or [])
    centres, widths = (v if isinstance(v, list | pydicom.multival.MultiValue) else [v]
                       for v in (ds.WindowCenter, ds.WindowWidth))  # fmt: skip
    for keyword in ("VOILUTSequence", "WindowCenter", "WindowWidth", "WindowCenterWidthExplanation",
                    "VOILUTFunction"):  # fmt: skip
        if keyword in ds:
            del ds[keyword]
    variants = {"percentile": {}}
    variants |= {f"LUT {i + 1}": {"VOILUTSequence": [lut]} for i, lut in enumerate(luts)}
    for i, (centre, width) in enumerate(zip(centres, widths, strict=True)):
        for function in ("LINEAR", "SIGMOID"):
            window = {"WindowCenter": centre, "WindowWidth": width, "VOILUTFunction": function}
            variants[f"window {i + 1} {function}"] = window
    for name, tags in variants.items():
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        for keyword, value in tags.items():
            setattr(ds, keyword, value)
        ds.save_as(folder / f"{name}.dcm")
        for keyword in tags:
            del ds[keyword]
    return list(variants)
