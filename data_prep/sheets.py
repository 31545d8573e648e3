"""Contact sheets of the quality report: masks and boxes drawn on the source files."""

import dataclasses
import html
import json
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_prep import window
from data_prep.merge import local_folder
from data_prep.plan import Row
from data_prep.prepare import Prepared, prepare
from data_prep.reject import Reject
from data_prep.settings import Settings
from mammodino_jax.page import figure, jpeg

HEIGHT = 220  # px of a tile
GAMMA = 0.6  # lifts dark greys: else the skin is black and every outline looks too wide
OUTLINE, BOX = (40, 225, 255), (255, 150, 40)  # BGR: tissue mask, part of the frame that is the record


class Sources:
    """Re-reads what records were made of, by the chain that made them; None where that is not possible."""

    def __init__(self, folder: Path, slices: pa.Table, settings: dict, shown: list[dict]):
        """`slices`: image_id, volume_id, slice_index of all records; `shown`: the items to be asked for."""
        values = {field.name: settings[field.name] for field in dataclasses.fields(Settings)}
        values["size"] = values["size"] and tuple(values["size"])
        if values["vendor_table"]:  # prep.json has its checksum only
            table = local_folder(folder) / "vendors.csv"
            values["vendor_table"] = table.read_text() if table.is_file() else ""
        self.settings, self.ids = Settings(**values), {}
        for item in shown:
            ids = [item["image_id"]]
            if item["volume_id"]:
                own = slices.filter(pc.equal(slices["volume_id"], item["volume_id"]))
                ids = own.sort_by("slice_index")["image_id"].to_pylist()
            self.ids[item["image_id"]] = ids
        wanted = {image_id for ids in self.ids.values() for image_id in ids}
        manifest, self.paths = local_folder(folder) / "manifest.jsonl", {}
        if manifest.is_file():
            with open(manifest, encoding="utf-8") as lines:
                for line in map(json.loads, lines):
                    self.paths |= dict.fromkeys(wanted.intersection(line["image_ids"]), line["path"])

    def read(self, item: dict) -> Prepared | None:
        ids = self.ids[item["image_id"]]
        if not all(image_id in self.paths for image_id in ids):
            return None
        paths = [Path(path) for path in dict.fromkeys(self.paths[image_id] for image_id in ids)]
        spacing = item["pixel_mm"] and item["pixel_mm"] * item["height"] / (item["box_y1"] - item["box_y0"])
        try:
            found = prepare(paths, self.settings, Row(paths[0], "", pixel_mm=spacing))
        except (Reject, OSError):
            return None
        same = found.box == tuple(item[f"box_{name}"] for name in ("y0", "x0", "y1", "x1"))
        return found if same else None  # else the file has changed since, or is read in another way


def draw_source(found: Prepared) -> np.ndarray:
    """BGR [HEIGHT, w]: the whole frame, the mask's outline and the record's box."""
    low, high = np.percentile(found.shown[found.tissue.mask], window.PERCENTILES)
    share = np.clip((found.shown - low) / max(1, high - low), 0, 1)
    grey = (255 * share**GAMMA).astype(np.uint8)
    border, (height, width) = found.settings.border, found.source_shape
    y, x = 1 / (height - 2 * border), 1 / (width - 2 * border)
    box = [(v - border) * share for v, share in zip(found.box, (y, x, y, x), strict=True)]
    return _outlined(grey, found.tissue.mask, box)


def draw_record(image: np.ndarray) -> np.ndarray:
    """BGR [HEIGHT, w] of a record u8 [H, W] with the border of its tissue."""
    return _outlined(image, image > 0)


def _outlined(grey: np.ndarray, mask: np.ndarray, box: list[float] | None = None) -> np.ndarray:
    """`box`: (y0, x0, y1, x1) as shares of the frame."""
    size = max(1, round(grey.shape[1] * HEIGHT / grey.shape[0])), HEIGHT
    picture = cv2.cvtColor(cv2.resize(grey, size, interpolation=cv2.INTER_AREA), cv2.COLOR_GRAY2BGR)
    if box:
        y0, x0, y1, x1 = (round(v * side) for v, side in zip(box, size[::-1] * 2, strict=True))
        cv2.rectangle(picture, (x0, y0), (x1 - 1, y1 - 1), BOX, 1)
    small = cv2.resize(mask.astype(np.uint8) * 255, size, interpolation=cv2.INTER_AREA) > 127
    contours, _ = cv2.findContours(small.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    return cv2.drawContours(picture, contours, -1, OUTLINE, 1)


def choose_groups(items: list[dict], solidity: dict[str, float], samples: int, rng) -> dict[str, list[dict]]:
    """The items on each contact sheet; `solidity` by image_id is known of some."""
    few, order = -(-samples // 2), [items[i] for i in rng.permutation(len(items))]
    by_area = sorted(order, key=lambda item: item["area"])
    suspect = [item for item in order if "mask_suspect" in item["flags"]]
    measured = [i for i in order if i["image_id"] in solidity and "mask_suspect" not in i["flags"]]
    suspect += sorted(measured, key=lambda item: solidity[item["image_id"]])
    return {
        "Random": order[:samples],
        "Smallest mask area": by_area[:few],
        "Largest mask area": by_area[::-1][:few],
        "Most suspect masks, flagged first, then the least compact": suspect[:few],
        "Text touching tissue": [i for i in order if "text_on_tissue" in i["flags"]][:few],
        "Markers and implants": [i for i in order if {"marker", "implant"}.intersection(i["flags"])][:few],
    }


def tile(item: dict, picture: np.ndarray, fell_back: bool) -> str:
    """One picture with its caption, and what the filter goes by."""
    what = " ".join(filter(None, (item["kind"], item["laterality"], item["view"])))
    slices = f"{item['num_slices']} slices" if item["volume_id"] else ""
    size = f"{item['area']:.0f} cm²" if item["cm2"] else ""
    tissue = f"tissue {item['coverage']:.0%}"
    parts = (item["image_id"][:8], what, slices, item["vendor"], tissue, size, ", ".join(item["flags"]))
    caption = " · ".join(filter(None, (*parts, "from the record" if fell_back else "")))
    marks = {"vendor": item["vendor"], "kind": item["kind"], "flags": "|".join(item["flags"])}
    return figure(jpeg(picture, caption, quality=82), caption, **marks)


FILTER = """<script>
const bar = document.querySelector(".filter"), tiles = [...document.querySelectorAll("figure[data-kind]")];
function show() {
  const wanted = [...bar.querySelectorAll("select")].filter(s => s.value);
  let shown = 0;
  for (const tile of tiles) {
    tile.hidden = !wanted.every(s => tile.dataset[s.name].split("|").includes(s.value));
    shown += !tile.hidden;
  }
  bar.querySelector("output").textContent = `${shown} of ${tiles.length} tiles shown`;
}
bar.addEventListener("change", show);
show();
</script>"""


def filter_bar(items: list[dict]) -> str:
    """Menus of the vendors, kinds and flags of `items`, and the counter."""
    values = {"vendor": {i["vendor"] for i in items}, "kind": {i["kind"] for i in items}}
    values["flags"] = {flag for i in items for flag in i["flags"]}
    menus = ""
    for name, choices in values.items():
        options = "".join(f"<option>{html.escape(choice)}</option>" for choice in sorted(choices))
        any_value = f'<option value="">any {name.rstrip("s")}</option>'
        menus += f'<select name="{name}" aria-label="{name}">{any_value}{options}</select>'
    return f'<div class="filter">{menus}<output></output></div>'
