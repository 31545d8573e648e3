"""Pictures of what an encoder sees: python -m mammodino_jax.visualize --encoder E --data DIR --output DIR.

Writes patch_pca.png: a row an image, beside it the first three principal components of its patch tokens as
colours, for the encoder and for the same architecture with random weights.
"""

import argparse
import dataclasses
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq

from mammodino_jax.data import records
from mammodino_jax.data.eval import letterbox
from mammodino_jax.data.index import open_split
from mammodino_jax.errors import UserError, run_command
from mammodino_jax.evaluate.features import untrained
from mammodino_jax.pictures import stack, strip

ROWS_OF_PATCHES = 32  # at least: fewer make a mosaic that shows nothing


@dataclasses.dataclass(frozen=True)
class Picture:
    """A record to show: its image u8 [H, W], and its row of index.parquet."""

    image: np.ndarray
    row: dict


def choose(folder: Path, count: int) -> list[Picture]:
    """Records that show the most of a data set: kinds and views in turn, other patients, findings first.

    A tomosynthesis volume is shown by the slice of its finding, or its middle one. The test split comes
    first, then val, then train.

    Raises:
      UserError: the folder is no built data set.
    """
    records.read_prep(folder)
    findings = Path(folder) / "findings.parquet"
    found = {}
    if findings.is_file():
        for finding in pq.read_table(findings, columns=["image_id", "volume_id", "slice_index"]).to_pylist():
            found.setdefault(finding["image_id"] or finding["volume_id"], finding)
    present = set(pq.read_table(Path(folder) / "index.parquet", columns=["split"])["split"].to_pylist())
    candidates = []
    for split in [s for s in reversed(records.SPLITS) if s in present]:
        shards, table = open_split(folder, split)
        for place, row in enumerate(table.to_pylist()):
            finding = found.get(row["image_id"]) or found.get(row["volume_id"])
            middle = (row["num_slices"] or 0) // 2
            if finding and finding["slice_index"] is not None:
                middle = finding["slice_index"]
            if row["kind"] != "dbt" or row["slice_index"] == middle:
                candidates.append((shards, place, row, finding is None))
    chosen, used = [], {}
    while candidates and len(chosen) < count:
        keys = [((r["kind"], r["view"]), r["patient_id"]) for _, _, r, _ in candidates]
        ranks = [(used.get(k, 0), used.get(p, 0), c[3]) for (k, p), c in zip(keys, candidates, strict=True)]
        best = min(range(len(ranks)), key=ranks.__getitem__)
        shards, place, row, _ = candidates.pop(best)
        for key in keys[best]:
            used[key] = used.get(key, 0) + 1
        chosen.append(Picture(shards.read(place), row))
    return chosen


def patch_pca(tokens_TD: np.ndarray, tissue_T: np.ndarray) -> np.ndarray:
    """Colours of patch tokens: three principal components, fitted on the tissue of all images together.

    Args:
      tokens_TD: float [T, D], patches of all images.
      tissue_T: float [T], tissue share of each patch; below a half it is background.

    Returns:
      u8 [T, 3]; each component stretched from its 2nd to its 98th percentile, background 0.
    """
    inside = np.asarray(tissue_T) >= 0.5
    colour = np.zeros((len(tokens_TD), 3))
    if inside.sum() < 4:
        return colour.astype(np.uint8)
    x = tokens_TD[inside].astype(np.float64)
    x -= x.mean(axis=0)
    _, _, axes = np.linalg.svd(x, full_matrices=False)
    axes = axes[:3]
    axes *= np.sign(axes[np.arange(3), np.abs(axes).argmax(axis=1)])[:, None]  # LAPACK's signs are arbitrary
    low, high = np.percentile(x @ axes.T, [2, 98], axis=0)
    colour[inside] = np.clip((x @ axes.T - low) / np.maximum(high - low, 1e-12), 0, 1) * 235 + 20
    return colour.astype(np.uint8)


def pca_tiles(encoder, pictures: list[Picture], long_side: int) -> list[np.ndarray]:
    """The patch-PCA picture of each image, BGR u8, as large as the image at `long_side` pixels."""
    patch, grids, tokens, tissue, scales = encoder.vit.patch_size, [], [], [], []
    for picture in pictures:
        scale = long_side / max(picture.image.shape)
        size = [max(1, round(s * scale)) for s in picture.image.shape]
        padded = [-(-s // patch) * patch for s in size]
        image, share = letterbox(picture.image, *padded, patch)
        tokens.append(np.asarray(encoder(image[None])["patches"])[0])
        tissue.append(share.astype(np.float32).ravel())
        grids.append(share.shape)
        scales.append(size)
    colours = patch_pca(np.concatenate(tokens), np.concatenate(tissue))
    tiles = np.split(colours, np.cumsum([len(t) for t in tokens])[:-1])
    return [_enlarge(t.reshape(*g, 3), patch, s) for t, g, s in zip(tiles, grids, scales, strict=True)]


def _enlarge(grid, patch: int, size) -> np.ndarray:
    return np.kron(grid, np.ones((patch, patch, 1), np.uint8))[: size[0], : size[1]]


def default_long_side(encoder) -> int:
    return max(2 * encoder.vit.image_size, ROWS_OF_PATCHES * encoder.vit.patch_size)


def main(argv=None) -> None:
    parser = argparse.ArgumentParser("python -m mammodino_jax.visualize", description=__doc__)
    parser.add_argument(
        "--encoder",
        required=True,
        help="workdir, export, hub:FILE, timm:FILE, hf:DIR, dbt-dino:FILE or random:ARCH",
    )
    parser.add_argument("--data", required=True, type=Path, help="a built data set")
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--images", type=int, default=6)
    parser.add_argument("--long-side", type=int, help="pixels of the image's long side")
    args = parser.parse_args(argv)
    if args.images < 1:
        raise UserError(f"--images {args.images}: expected 1 or more")
    from mammodino_jax.encoder import load_encoder

    encoder = load_encoder(args.encoder)
    pictures = choose(args.data, args.images)
    long_side = args.long_side or default_long_side(encoder)
    columns = [pca_tiles(e, pictures, long_side) for e in (encoder, untrained(encoder))]
    rows = [strip([p.image, *tiles], 320) for p, *tiles in zip(pictures, *columns, strict=True)]
    args.output.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(args.output / "patch_pca.png"), stack(rows))
    print(f"wrote {args.output / 'patch_pca.png'}: image, {encoder.name}, random init")


if __name__ == "__main__":
    run_command(main)
