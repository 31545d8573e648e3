"""Pictures of batches: crops with the masked patches tinted, slice pairs. numpy and OpenCV only."""

from pathlib import Path

import cv2
import numpy as np

TINT = np.array([60, 140, 255])  # BGR: masked patches


def tint_mask(crop_SS: np.ndarray, masked_N: np.ndarray, patch: int) -> np.ndarray:
    """A grey crop u8 [S, S] as BGR [S, S, 3] with masked patches (bool [N], row-major) tinted."""
    side = crop_SS.shape[0] // patch
    mask = np.kron(masked_N.reshape(side, side), np.ones((patch, patch), bool))
    colour = np.repeat(crop_SS[..., None], 3, axis=2).astype(np.float32)
    colour[mask] = 0.55 * colour[mask] + 0.45 * TINT
    return colour.astype(np.uint8)


def strip(images: list[np.ndarray], height: int) -> np.ndarray:
    """Images (grey or BGR) scaled to one height, side by side with a thin gap."""
    tiles = []
    for image in images:
        image = image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=2)
        width = max(1, round(image.shape[1] * height / image.shape[0]))
        tiles += [
            cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA),
            np.full((height, 4, 3), 90, np.uint8),
        ]
    return np.concatenate(tiles[:-1], axis=1)


def stack(rows: list[np.ndarray]) -> np.ndarray:
    """Strips under each other, padded to the widest."""
    width = max(r.shape[1] for r in rows)
    padded = [np.pad(r, ((0, 4), (0, width - r.shape[1]), (0, 0)), constant_values=90) for r in rows]
    return np.concatenate(padded, axis=0)


def draw_batch(batch: dict, folder: Path, patch: int, images: int = 6, height: int = 160) -> None:
    """Write crops.png (an image a row: 2 global views, masked patches tinted, then locals) and pairs.png."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(min(images, len(batch["global_crops"]))):
        views = batch["global_crops"][i]
        patches = (views.shape[1] // patch) ** 2
        masked = np.zeros(2 * patches, bool)
        masked[batch["mask_index"][i][batch["mask_weight"][i] > 0]] = True
        tinted = [tint_mask(v, m, patch) for v, m in zip(views, masked.reshape(2, -1), strict=True)]
        rows.append(strip([*tinted, *batch["local_crops"][i]], height))
    cv2.imwrite(str(folder / "crops.png"), stack(rows))
    if "adjacent_crops" in batch:
        pairs = [strip(list(pair), height) for pair in batch["adjacent_crops"][:images]]
        cv2.imwrite(str(folder / "pairs.png"), stack(pairs))
