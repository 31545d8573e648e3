"""Frozen features of records: extracted once, cached, brought together to volumes, breasts and exams.

r records, n items, B images of a batch, N patches, D width of the encoder, F features.
"""

import dataclasses
import functools
import hashlib
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from mammodino_jax.data.crops import resample
from mammodino_jax.data.eval import check_long_side, fitted, make_eval_batches
from mammodino_jax.evaluate.items import Items, Rows, units

ATTENTION_BYTES = 1e9  # of one layer's attention matrix, float32, on each device
BATCH = 16  # images a device at most
CPU_TOKENS = 1500  # on a device at once where more are no faster: the last batch of a canvas is half empty
REMEMBERED = 2000  # records at most whose patch tokens are kept during a run: 9 GB of ViT-B's at 1036 px
CACHE_VERSION = 1  # raised where the same settings give other features


@dataclasses.dataclass(frozen=True)
class Extractor:
    """What turns images into features.

    Attributes:
      fingerprint: of all that the features depend on besides the images.
      patch: pixels that a patch token covers; sides of canvases are multiples of it.
      function: (image u8 [B, H, W], size i32 [B, 2], tissue f16 [B, H / patch, W / patch], mm per px [B]) to
        {name: f32 [B, F]}.
      batch_size: of a canvas, by its number of patches.
      tile: side of the tiles of `tiles`; 0: cannot be tiled, and long sides need not be multiples of `patch`.
    """

    fingerprint: str
    patch: int
    function: Callable
    batch_size: Callable[[int], int]
    tile: int = 0


def encoder_extractor(encoder, batch_size: int = 0) -> Extractor:
    """CLS ("cls") and the tissue-weighted mean of the patch tokens ("mean") of an encoder."""

    def function(image, size, tissue, mm):
        out = encoder(image, size)
        return {"cls": np.asarray(out["cls"]), "mean": tissue_mean(np.asarray(out["patches"]), tissue)}

    tile = encoder.vit.image_size if encoder.vit else 0
    return Extractor(encoder.fingerprint, encoder.patch_size, function, batches_of(encoder, batch_size), tile)


def tissue_mean(patches_BND: np.ndarray, tissue_BN) -> np.ndarray:
    """Mean of patch tokens weighted by their tissue share, f32 [B, D]; 0 where there is no tissue."""
    weight_BN = np.asarray(tissue_BN, np.float32).reshape(len(patches_BND), -1)
    weight_BN = weight_BN / np.maximum(weight_BN.sum(axis=1, keepdims=True), 1e-6)
    return np.matmul(weight_BN[:, None], patches_BND)[:, 0]


def batches_of(encoder, batch_size: int = 0) -> Callable[[int], int]:
    """Images in a batch by the patches of an image: as many as their attention matrices leave room for."""
    import jax

    devices, heads = len(jax.local_devices()), encoder.vit.heads if encoder.vit else 1
    tokens_at_once = CPU_TOKENS if jax.default_backend() == "cpu" else math.inf

    def fitting(tokens: int) -> int:
        most = min(ATTENTION_BYTES / (4 * heads * tokens**2), tokens_at_once / tokens, BATCH)
        return batch_size or devices * max(int(most), 1)

    return fitting


class Remembered:
    """An encoder that keeps its output of each image in a folder, patch tokens in float16.

    The dense probe asks for the same images as the features, and more than once.
    """

    def __init__(self, encoder, folder: Path):
        self._encoder, self._folder = encoder, Path(folder)

    def __getattr__(self, name: str):
        return getattr(self._encoder, name)

    def __call__(self, images, sizes) -> dict[str, np.ndarray]:
        files = []
        for image, (h, w) in zip(images, sizes, strict=True):
            digest = hashlib.sha256(f"{self.fingerprint} {h} {w}".encode() + image[:h, :w].tobytes())
            files.append(self._folder / f"{digest.hexdigest()}.npz")
        gh, gw = (n // self.patch_size for n in images.shape[1:])
        own = [tuple(-(-n // self.patch_size) for n in size) for size in np.asarray(sizes).tolist()]
        if all(file.is_file() for file in files):
            cells, cls = np.zeros((len(images), gh, gw, self.dim), np.float32), []
            for i, (file, (h, w)) in enumerate(zip(files, own, strict=True)):
                with np.load(file) as found:
                    cells[i, :h, :w] = found["patches"]
                    cls.append(found["cls"])
            return {"cls": np.stack(cls), "patches": cells.reshape(len(images), gh * gw, -1)}
        out = {name: np.asarray(x) for name, x in self._encoder(images, sizes).items()}
        cells = out["patches"].reshape(len(images), gh, gw, -1).astype(np.float16)
        for i, (file, (h, w)) in enumerate(zip(files, own, strict=True)):
            save(file, cls=out["cls"][i], patches=cells[i, :h, :w])
        return out


def untrained(encoder, seed: int = 0):
    """The same architecture and normalisation with random weights."""
    if encoder.vit:
        from mammodino_jax.model.head import init_params

        params = init_params(encoder.vit, None, seed)
    else:  # convolutions: He's normal kernels, no bias
        rng = np.random.default_rng(seed)
        params = _fresh(encoder.params, rng)
    return dataclasses.replace(encoder, name="random init", kind="random", params=params, provenance={})


def _fresh(node, rng: np.random.Generator):
    """Nested parameters of convolutions, drawn anew."""
    if isinstance(node, dict):
        return {name: _fresh(child, rng) for name, child in node.items()}
    if node.ndim == 1:
        return np.zeros_like(node)
    return rng.normal(0, math.sqrt(2 / math.prod(node.shape[:-1])), node.shape).astype(np.float32)


def record_features(
    rows: Rows,
    extractor: Extractor,
    long_side: int,
    cache: Path | None = None,
    tiles: bool = False,
    name: str = "",
) -> dict[str, np.ndarray]:
    """Features of every record, {name: f32 [r, F]}.

    Args:
      long_side: px of the images, of a ViT a multiple of the patch size.
      cache: a folder; features of the same records, extractor and settings are read from it.
      tiles: cut images into squares of the extractor's `tile` and average over them by tissue, instead of
        resampling positions to the whole image.
      name: of the encoder, for the progress bar.

    Raises:
      UserError: a long side that is no multiple of the patch size, an unreadable record.
    """
    if extractor.tile:  # a convolutional network takes any size: Mammo-CLIP's 1520 is 47.5 cells
        check_long_side(long_side, extractor.patch)
    if tiles and (not extractor.tile or long_side < extractor.tile):
        tiles = False  # the whole image is one tile, or the extractor reads whole images only
    mm = mm_per_px(rows, long_side)
    if np.isnan(mm).any():  # some in mm and some in pixels would be a code for the data set
        mm = np.ones_like(mm)
    key = hashlib.sha256(repr((CACHE_VERSION, extractor.fingerprint, long_side, tiles)).encode())
    for part in (rows.columns["image_id"], rows.columns["pixel_hash"], mm):
        key.update("\n".join(map(str, part)).encode())
    file = cache / f"{key.hexdigest()[:32]}.npz" if cache else None
    if file and file.is_file():
        with np.load(file) as found:
            return dict(found)
    found = _extract(rows, extractor, long_side, tiles, mm, name)
    if file:
        save(file, **found)
    return found


def save(file: Path, **arrays) -> None:
    """Write arrays as .npz; a reader never sees half a file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    half = file.with_name(f"{file.stem}-{os.getpid()}.part.npz")
    np.savez(half, **arrays)
    half.rename(file)


def mm_per_px(rows: Rows, long_side: int) -> np.ndarray:
    """f64 [r]: size of an input pixel where the long side is `long_side` px; NaN where unknown."""
    return rows.columns["pixel_mm"] * np.maximum(rows.columns["height"], rows.columns["width"]) / long_side


def _extract(
    rows: Rows, extractor: Extractor, long_side: int, tiles: bool, mm, name: str
) -> dict[str, np.ndarray]:
    shapes = np.stack([rows.columns["height"], rows.columns["width"]], axis=1).astype(int)
    side, owner, read = long_side, np.arange(len(rows)), rows.image
    if tiles:
        side, owner, shapes, read = _tiles(rows, shapes, long_side, extractor.tile)
    batches = make_eval_batches(
        read, shapes, long_side=side, patch=extractor.patch, batch_size=extractor.batch_size
    )
    total, weight = {}, np.zeros(len(rows), np.float32)
    with tqdm(total=len(owner), desc=f"{name} at {long_side} px", unit="image") as bar:
        for batch in batches:
            kept = batch["row"] >= 0
            of = owner[batch["row"]]
            found = extractor.function(batch["image"], batch["size"], batch["tissue"], mm[of])
            share = batch["tissue"].astype(np.float32).sum(axis=(1, 2)) + 1e-6 if tiles else np.ones(len(of))
            np.add.at(weight, of[kept], share[kept])
            for part, x in found.items():
                total.setdefault(part, np.zeros((len(rows), x.shape[1]), np.float32))
                np.add.at(total[part], of[kept], (x * share[:, None])[kept])
            bar.update(int(kept.sum()))
    return {part: (x / weight[:, None]).astype(np.float32) for part, x in total.items()}


def _tiles(rows: Rows, shapes, long_side: int, tile: int):
    """Squares that cover images evenly: their side, record [t], shapes [t, 2], and reader."""
    owner, corner, size = [], [], []
    for i, shape in enumerate(shapes):
        h, w = fitted(*shape, long_side)
        starts = ([round(s) for s in np.linspace(0, max(n - tile, 0), math.ceil(n / tile))] for n in (h, w))
        ys, xs = starts
        owner += [i] * (len(ys) * len(xs))
        corner += [(y, x) for y in ys for x in xs]
        size += [(min(tile, h), min(tile, w))] * (len(ys) * len(xs))

    @functools.lru_cache(maxsize=4)
    def whole(i: int) -> np.ndarray:
        return resample(rows.image(i), fitted(*shapes[i], long_side))

    def read(t: int) -> np.ndarray:
        (y, x), (h, w) = corner[t], size[t]
        return whole(owner[t])[y : y + h, x : x + w]

    return tile, np.array(owner), np.array(size), read


def aggregate(x_rF: np.ndarray, rows: Rows, items: Items, how: str = "mean") -> np.ndarray:
    """Features of items, f32 [n, F]: `how` ("mean" or "max") over slices of a volume, then over images."""
    inside = np.flatnonzero(items.item >= 0)
    _, unit = np.unique(units(rows)[inside].astype(str), return_inverse=True)
    of_unit = np.zeros(unit.max() + 1, np.int64)
    of_unit[unit] = items.item[inside]
    return _reduce(_reduce(x_rF[inside], unit, how), of_unit, how).astype(np.float32)


def _reduce(x: np.ndarray, of: np.ndarray, how: str) -> np.ndarray:
    """Mean or maximum of the rows of x that go to each place of 0..max(of)."""
    if how == "max":
        out = np.full((of.max() + 1, x.shape[1]), -np.inf)
        np.maximum.at(out, of, x)
        return out
    out = np.zeros((of.max() + 1, x.shape[1]))
    np.add.at(out, of, x)
    return out / np.bincount(of)[:, None]


def patch_grids(
    rows: Rows, places, encoder, long_side: int, batch_size: int = 0
) -> Iterator[tuple[int, np.ndarray, np.ndarray, float]]:
    """Patch tokens of records, one record at a time, those of one canvas after each other.

    Yields:
      the place, tokens f16 [gh, gw, D], tissue share of each patch f16 [gh, gw], and input px per record px:
      a box of the record times this over the patch size is in patches.
    """
    chosen, patch = rows.take(np.asarray(places)), encoder.patch_size
    shapes = np.stack([chosen.columns["height"], chosen.columns["width"]], axis=1).astype(int)
    batches = make_eval_batches(
        chosen.image, shapes, long_side=long_side, patch=patch, batch_size=batches_of(encoder, batch_size)
    )
    for batch in tqdm(batches, f"patches at {long_side} px", unit="batch"):
        gh, gw = (n // patch for n in batch["image"].shape[1:])
        tokens = np.asarray(encoder(batch["image"], batch["size"])["patches"], np.float16)
        tokens = tokens.reshape(len(tokens), gh, gw, -1)
        for i, place in enumerate(batch["row"]):
            if place >= 0:
                h, w = -(-batch["size"][i] // patch)
                scale = long_side / max(shapes[place])
                yield int(places[place]), tokens[i, :h, :w], batch["tissue"][i, :h, :w], float(scale)
