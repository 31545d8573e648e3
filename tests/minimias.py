"""The shared mini-MIAS films in the layout of the original data set, for `data_prep build --source mias`."""

import csv
from pathlib import Path

import cv2


def write_source(shared: Path, folder: Path, films: int | None = None) -> Path:
    """Info.txt and films as .pgm, from labels.csv and PNG; `films`: only so many, evenly spaced pairs."""
    folder.mkdir(parents=True)
    with open(shared / "data/minimias/labels.csv") as f:
        lines = list(csv.DictReader(f))
    patients = sorted({line["patient"] for line in lines})
    if films:
        step = len(patients) / (films // 2)
        patients = {patients[int(i * step)] for i in range(films // 2)}
    lines = [line for line in lines if line["patient"] in patients]
    with open(folder / "Info.txt", "w") as f:
        for line in lines:
            words = [line["image"], line["density_FGD"], line["finding"]]
            if line["finding"] != "NORM":
                words.append(line["severity"])
                if line["x_px"]:  # y counts from the bottom in the original
                    words += [line["x_px"], str(1024 - int(line["y_px_top_left_origin"])), line["radius_px"]]
            f.write(" ".join(words) + "\n")
    for name in {line["image"] for line in lines}:
        image = cv2.imread(str(shared / "data/minimias/images" / f"{name}.png"), cv2.IMREAD_GRAYSCALE)
        cv2.imwrite(str(folder / f"{name}.pgm"), image)
    return folder
