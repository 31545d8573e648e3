"""A tiny built data set with labels: what evaluate and the report read."""

import importlib.util
import json
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

_spec = importlib.util.spec_from_file_location(
    "make_dataset", Path(__file__).parents[1] / "data/make_dataset.py"
)
make_dataset = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(make_dataset)


def breast(grey: int, seed: int, height=70, width=42, roughness=30) -> np.ndarray:
    """u8 [H, W]: half an ellipse of tissue around a grey level, background 0."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    inside = ((y - height / 2) / (height / 2)) ** 2 + (x / width) ** 2 < 0.9
    texture = cv2.GaussianBlur(rng.normal(0, 1, (height, width)), (0, 0), 2)
    image = np.clip(grey + roughness * texture / texture.std(), 1, 255)
    return np.where(inside, image, 0).astype(np.uint8)


def items(patients=20, views=("CC", "MLO"), slices=3):
    """(image, index row with labels) of patients: density shows in the grey level, cancer in nothing."""
    out = []
    for p in range(patients):
        density, cancer = p % 4, int(p // 4 % 2)
        ids = {
            "patient_id": f"p{p}",
            "split": ("train", "val", "test")[0 if p < patients * 0.5 else 1 if p < patients * 0.7 else 2],
        }
        labels = {"label_density": density, "label_cancer": cancer, "label_lesion": cancer}
        for v, view in enumerate(views):
            image = breast(60 + 40 * density, seed=10 * p + v)
            name = f"p{p}-{view}"
            row = make_dataset.row(image, name, view=view, pixel_hash=f"h-{name}", **ids, **labels)
            out.append((image, row))
        for image, row in make_dataset.volume(f"v{p}", slices, **ids) if slices else []:
            image = np.where(image > 0, breast(60 + 40 * density, 999, *image.shape), 0).astype(np.uint8)
            out.append((image, {**row, **labels, "pixel_hash": f"h-{row['image_id']}"}))
    return out


def write(folder: Path, content, **prep) -> Path:
    """Write a built data set whose index keeps its label columns."""
    make_dataset.write_dataset(folder, content, terms={"test": "made for tests"}, **prep)
    rows = [row for split in ("train", "val", "test") for _, row in content if row["split"] == split]
    table = pq.read_table(folder / "index.parquet")
    for name in sorted({n for row in rows for n in row if n.startswith("label_")}):
        table = table.append_column(name, pa.array([row.get(name) for row in rows], pa.int8()))
    pq.write_table(table, folder / "index.parquet")
    labels = {"label_density": {"classes": list("ABCD"), "level": "image"}}
    (folder / "labels.json").write_text(json.dumps(labels))
    return folder
