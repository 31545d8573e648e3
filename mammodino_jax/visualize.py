"""Pictures of what an encoder sees: python -m mammodino_jax.visualize --encoder E --data DIR --output DIR.

Over the images of a built data set, or of files read as embed reads them (--input PATH...): the first three
principal components of the patch tokens as colours, beside them those of the same architecture with random
weights; where the CLS token attends; the images of other patients that are nearest by CLS; the slices of a
tomosynthesis volume. Each as a PNG file, and all in index.html.
"""

import argparse
import dataclasses
import functools
import html
import tempfile
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq

from mammodino_jax.data import records
from mammodino_jax.data.eval import check_long_side, make_eval_batches
from mammodino_jax.data.index import open_split
from mammodino_jax.errors import UserError, run_command
from mammodino_jax.evaluate.features import (
    aggregate,
    encoder_extractor,
    record_features,
    untrained,
)
from mammodino_jax.evaluate.items import Rows, group, read_rows
from mammodino_jax.page import facts, figure, jpeg, page, paragraph, section
from mammodino_jax.pictures import stack, strip

ROWS_OF_PATCHES = 32  # at least: fewer make a mosaic that shows nothing
NEIGHBOURS = 4
SLICES = 8  # of a volume, at most


@dataclasses.dataclass(frozen=True)
class Picture:
    """A record to show: its image u8 [H, W], and its row of index.parquet."""

    image: np.ndarray
    row: dict


def choose(folder: Path, count: int) -> list[Picture]:
    """Records that show the most of a data set: kinds and views in turn, other patients, findings first.

    A tomosynthesis volume is shown by the slice of its finding, or its middle one. The test split comes
    first, then val, then train. Duplicates and flagged records are left out, as by `read_rows`.

    Raises:
      UserError: the folder is no built data set, or has no record to show.
    """
    usable = set(read_rows([folder]).columns["image_id"])
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
            shown = row["kind"] != "dbt" or row["slice_index"] == middle
            if shown and row["image_id"] in usable:
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
    if not chosen:
        raise UserError(f"{folder} has no image to show: the middle slices are all duplicates or flagged")
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


@dataclasses.dataclass(frozen=True)
class Look:
    """What an encoder makes of an image: tokens [gh, gw, D], tissue share and attention [gh, gw] of the
    patches (attention: of the CLS token in the last block, mean over heads; None where it has none), and the
    size in pixels that the image had."""

    tokens: np.ndarray
    tissue: np.ndarray
    attention: np.ndarray | None
    size: tuple[int, int]


def look(encoder, images: list[np.ndarray], long_side: int) -> list[Look]:
    found, patch = [None] * len(images), encoder.patch_size
    attend = _attention(encoder) if encoder.vit else None
    settings = dict(long_side=long_side, patch=patch, batch_size=lambda patches: 1)
    for batch in make_eval_batches(images.__getitem__, [i.shape for i in images], **settings):
        grid = tuple(n // patch for n in batch["image"].shape[1:])
        inside = tuple(slice(n) for n in -(-batch["size"][0] // patch))
        tokens = np.asarray(encoder(batch["image"], batch["size"])["patches"])[0].reshape(*grid, -1)
        seen = attend and np.asarray(attend(batch["image"], batch["size"]))[0].reshape(grid)[inside]
        size = tuple(batch["size"][0].tolist())
        found[batch["row"][0]] = Look(tokens[inside], batch["tissue"][0][inside], seen, size)
    return found


def _attention(encoder):
    """(u8 [B, H, W], sizes [B, 2]) -> f32 [B, N], mean over the heads."""
    import jax
    import jax.numpy as jnp

    from mammodino_jax.augment import AugmentConfig, normalise
    from mammodino_jax.model.head import bind
    from mammodino_jax.model.vit import cls_attention, own_grids

    vit, statistics = encoder.vit, AugmentConfig(mean=encoder.mean, std=encoder.std)

    @jax.jit
    def run(params, images, grids):
        x = normalise(images.astype(jnp.float32) / 255, statistics, vit.channels)
        return cls_attention(bind(params, vit), x, grids).mean(axis=1)

    return lambda images, sizes: run(encoder.params, images, own_grids(vit, sizes, *images.shape[1:]))


def pca_tiles(encoder, pictures: list[Picture], long_side: int) -> list[np.ndarray]:
    """The patch-PCA picture of each image, BGR u8, as large as the image at `long_side` pixels."""
    return colour(look(encoder, [p.image for p in pictures], long_side), encoder.patch_size)


def colour(looks: list[Look], patch: int, centre: bool = False) -> list[np.ndarray]:
    """Patch-PCA pictures, with axes and range fitted to all of `looks` together. `centre` takes the mean over
    its tissue off each image first: what differs within images then has the colours to itself."""
    tokens = [x.tokens.reshape(-1, x.tokens.shape[-1]).astype(np.float64) for x in looks]
    tissue = [x.tissue.astype(np.float64).ravel() for x in looks]
    if centre:
        tokens = [t - w @ t / max(w.sum(), 1e-6) for t, w in zip(tokens, tissue, strict=True)]
    colours = patch_pca(np.concatenate(tokens), np.concatenate(tissue))
    tiles = np.split(colours, np.cumsum([x.tissue.size for x in looks])[:-1])
    return [_enlarge(t.reshape(*x.tissue.shape, 3), patch, x.size) for t, x in zip(tiles, looks, strict=True)]


def _enlarge(grid, patch: int, size) -> np.ndarray:
    return np.kron(grid, np.ones((patch, patch, 1), np.uint8))[: size[0], : size[1]]


def overlay(image: np.ndarray, tile: np.ndarray, share: float = 0.5) -> np.ndarray:
    """A BGR tile over the grey image that it is of; what is black in the tile shows the image alone."""
    grey = cv2.resize(image, tile.shape[1::-1], interpolation=cv2.INTER_AREA)[..., None].repeat(3, axis=2)
    mixed = cv2.addWeighted(grey, 1 - share, tile, share, 0)
    return np.where(tile.any(axis=2, keepdims=True), mixed, grey)


def heat(x: Look, patch: int) -> np.ndarray:
    """Attention as a picture, BGR, from the least to the 99th percentile of the tissue; background black."""
    inside = x.tissue >= 0.5
    values = x.attention[inside] if inside.any() else x.attention
    low, high = values.min(), np.percentile(values, 99)
    levels = np.clip((x.attention - low) / max(high - low, 1e-12), 0, 1) * 255
    colours = cv2.applyColorMap(levels.astype(np.uint8), cv2.COLORMAP_INFERNO)
    return _enlarge(np.where(inside[..., None], np.maximum(colours, 1), 0).astype(np.uint8), patch, x.size)


def default_long_side(encoder) -> int:
    return max(encoder.long_side, ROWS_OF_PATCHES * encoder.patch_size)


def neighbours(encoder, rows: Rows, pictures: list[Picture], long_side: int, cache: Path):
    """The NEIGHBOURS images or volumes of other patients whose CLS features are nearest to each picture's.

    Yields:
      the picture, and [(cosine, record)] from the nearest on; volumes by their middle slice.
    """
    items = group(rows)
    features = record_features(rows, encoder_extractor(encoder), long_side, cache, name=encoder.name)
    x = aggregate(features["cls"], rows, items)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    places = {name: i for i, name in enumerate(rows.columns["image_id"])}
    for picture in pictures:
        item = items.item[places[picture.row["image_id"]]]
        others = np.flatnonzero(items.patient != items.patient[item])
        cosine = x[others] @ x[item]
        best = np.argsort(-cosine, kind="stable")[:NEIGHBOURS]
        middle = [(of := np.flatnonzero(items.item == others[b]))[len(of) // 2] for b in best]
        yield picture, list(zip(cosine[best].tolist(), middle, strict=True))


def caption(row: dict) -> str:
    return " ".join(str(row[k]) for k in ("kind", "laterality", "view") if row[k])


def write_page(encoder, data: Path, output: Path, count: int, long_side: int, settings: str) -> list[str]:
    """Write the pictures of `count` images and index.html. Returns the names of the files."""
    pictures, rows, patch = choose(data, count), read_rows([data]), encoder.patch_size
    images, written, body = [p.image for p in pictures], [], []

    def show(name: str, title: str, text: str, tiles: list[tuple[list[np.ndarray], str]]) -> None:
        sheet = [strip(images, 420) for images, _ in tiles]
        cv2.imwrite(str(output / f"{name}.png"), stack(sheet))
        written.append(f"{name}.png")
        figures = "".join(figure(jpeg(s, c), c) for s, (_, c) in zip(sheet, tiles, strict=True))
        body.append(section(title, paragraph(text), f'<div class="tiles">{figures}</div>'))

    looks = look(encoder, images, long_side)
    columns, beside = [colour(looks, patch), colour(looks, patch, centre=True)], ""
    if encoder.vit:
        columns.append(colour(look(untrained(encoder), images, long_side), patch, centre=True))
        beside = ", and the latter for the same architecture with random weights"
    tiles = [
        ([p.image, *(overlay(p.image, t) for t in mine)], caption(p.row))
        for p, *mine in zip(pictures, *columns, strict=True)
    ]
    show("patch_pca", "Patch tokens", "The image; over it the first three principal components of the patch "
         "tokens, fitted on the tissue of all images shown (equal colours are alike to the encoder); the "
         f"same after the mean of each image was taken off{beside}.", tiles)  # fmt: skip
    if encoder.vit:
        tiles = []
        for p, x in zip(pictures, looks, strict=True):
            weight = x.tissue.astype(np.float64)
            share = (x.attention * weight).sum() / x.attention.sum()
            text = f"{caption(p.row)}: {share:.0%} on tissue, {weight.mean():.0%} of the patches"
            tiles.append(([p.image, overlay(p.image, heat(x, patch))], text))
        show("attention", "Where the CLS token attends", "Attention of the CLS token in the last block, mean "
             "over the heads; bright is much. Below: the share of it that lies on tissue, and the share of "
             "the input that is tissue.", tiles)  # fmt: skip
    else:
        text = f"{encoder.name} is no vision transformer: it has no attention to show."
        body.append(section("Where the CLS token attends", paragraph(text)))
    found = list(neighbours(encoder, rows, pictures, long_side, output / "features"))
    if any(near for _, near in found):
        tiles = []
        for p, near in found:
            text = "; ".join(
                f"{cosine:.3f} {caption({k: v[i] for k, v in rows.columns.items()})}" for cosine, i in near
            )
            tiles.append(([p.image, *(rows.image(i) for _, i in near)], f"{caption(p.row)}. {text}"))
        show("neighbours", "Nearest neighbours", "An image, and those of other patients that are nearest by "
             "the cosine of their CLS features (volumes: mean over slices, shown by the middle one).",
             tiles)  # fmt: skip
    volumes = [p.row["volume_id"] for p in pictures if p.row["kind"] == "dbt"]
    if volumes:
        mine = np.flatnonzero(rows.columns["volume_id"] == volumes[0])
        mine = mine[np.argsort(rows.columns["slice_index"][mine])]
        mine = mine[np.unique(np.linspace(0, len(mine) - 1, min(len(mine), SLICES)).round().astype(int))]
        slices = [rows.image(i) for i in mine]
        tiles = colour(look(encoder, slices, long_side), patch)
        names = [f"slice {int(rows.columns['slice_index'][i]) + 1}" for i in mine]
        tiles = [([i, overlay(i, t)], n) for i, t, n in zip(slices, tiles, names, strict=True)]
        show("slices", "Slices of a volume", "Principal components of the patch tokens, fitted on these "
             "slices together.", tiles)  # fmt: skip
    cards = [
        ("Encoder", encoder.name, f"fingerprint {encoder.fingerprint}"),
        ("Input", f"{long_side} px", f"long side; a patch is {patch} px"),
        ("Data", f"{len(rows)} records", settings),
    ]
    title = html.escape(f"What {encoder.name} sees")
    (output / "index.html").write_text(
        page(title, [f"<h1>{title}</h1>", facts(cards), *body]), encoding="utf-8"
    )
    return [*written, "index.html"]


def main(argv=None) -> None:
    parser = argparse.ArgumentParser("python -m mammodino_jax.visualize", description=__doc__)
    add = parser.add_argument
    add("--encoder", required=True, help="workdir, exported folder, or weights of others (see the README)")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", type=Path, help="a built data set")
    source.add_argument("--input", nargs="+", type=Path, metavar="PATH", help="files and folders")
    add("--output", required=True, type=Path, metavar="DIR")
    add("--images", type=int, default=6)
    add("--long-side", type=int, help="pixels of the image's long side")
    args = parser.parse_args(argv)
    if args.images < 1:
        raise UserError(f"--images {args.images}: expected 1 or more")
    from mammodino_jax.embed import preprocessing
    from mammodino_jax.encoder import load_encoder
    from mammodino_jax.evaluate.entries import mismatch

    encoder = load_encoder(args.encoder)
    long_side = args.long_side or default_long_side(encoder)
    if encoder.vit:
        check_long_side(long_side, encoder.patch_size)
    args.output.mkdir(parents=True, exist_ok=True)
    draw = functools.partial(write_page, encoder, output=args.output, count=args.images, long_side=long_side)
    if args.data:
        settings = records.read_prep(args.data).get("settings", {})
        differ = mismatch(encoder.made_for, settings)
        origin = f"built with preset {settings.get('preset', 'unknown')}"
        written = draw(
            args.data, settings=origin + f"; foreign to the encoder: {'; '.join(differ)}" * bool(differ)
        )
    else:
        from data_prep.build import BuildOptions, build

        settings, origin = preprocessing(encoder, foreign=True)
        with tempfile.TemporaryDirectory() as folder:
            data = Path(folder) / "data"
            build(BuildOptions(tuple(args.input), data, settings=settings))
            written = draw(data, settings=origin)
    print(f"wrote {', '.join(written)} to {args.output}")


if __name__ == "__main__":
    run_command(main)
