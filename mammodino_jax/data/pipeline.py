"""The training input: global batch k as a pure function of (settings, seed, k), made by grain.

Two streams of records, shuffled and repeated without end: `flat` (one record a row) and `dbt` (a volume a
row, then a pair of its slices). Row r of a global batch of B comes from dbt iff r % (B / A) == 0. A grain
element is a whole local batch and everything random in it is keyed by (seed, sample), so any number of
processes, workers and threads gives the same bytes, and a run resumes from its step number alone.
"""

import dataclasses
import math
from collections.abc import Iterator

import cv2
import grain
import numpy as np
from absl import logging

from mammodino_jax.data import masking
from mammodino_jax.data.crops import (
    CropConfig,
    Window,
    crop,
    draw_window,
    integral_image,
    patch_coverage,
    random_generator,
    rekey,
)
from mammodino_jax.data.index import Records, open_records
from mammodino_jax.data.masking import MaskConfig
from mammodino_jax.data.pairs import PairConfig, draw_windows, possible_pairs
from mammodino_jax.data.workers import iterate, note
from mammodino_jax.errors import UserError

# Purposes of a sample's random numbers. Views are 0, 1 (global) and 2.. (local); these lie far above.
_MASK, _PAIR, _PAIR_WINDOW, _VOLUMES, _PLAIN_MASK = 1000, 1001, 1002, 1003, 1004

PLAIN_EVERY = 8  # samples; a plain mask, drawn only to be counted, takes half a millisecond


@dataclasses.dataclass(frozen=True)
class DataConfig:
    # (folder, split, kinds, weight) each; the weight is the source's share of the draws within a stream.
    sources: tuple = ()
    box: str = ""  # "tissue" or "full": refuse sources that were built with another --box
    exclude_flags: tuple[str, ...] = ("stereo", "spot", "mask_suspect")  # partial views, unreliable masks
    flat_slices: bool = False  # True: single tomosynthesis slices in the flat stream too
    workers: int = 0  # processes; 0: threads of this one, enough where the device is the slower side
    threads: int = 2  # a process; OpenCV and the decoder release the interpreter lock

    def __post_init__(self):
        if self.box not in ("", "tissue", "full"):
            raise UserError(f'data.box is "{self.box}"; expected "tissue", "full" or nothing')


def make_batches(
    data: DataConfig,
    crops: CropConfig,
    mask: MaskConfig,
    pairs: PairConfig,
    *,
    batch_size: int,
    dbt_rows: int,
    steps: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    start_step: int = 0,
) -> Iterator[dict[str, np.ndarray]]:
    """Iterate over this process's rows of global batches start_step..steps-1.

    With B = batch_size, A = dbt_rows, P = process_count, b = B / P, a = A / P, process p gets rows
    p*b..(p+1)*b-1 of each global batch:
      global_crops    u8 [b, 2, S, S]
      local_crops     u8 [b, L, s, s]
      mask_index      i32 [b, M], mask_weight f32 [b, M]: see masking.pack_mask
      sample          i32 [b]: k * B + r
      patient         i32 [b]: low 31 bits of the id's hash
      count/<metric>  f32 [b]; NaN: not applicable
      adjacent_crops  u8 [a, 2, S, S], only where A > 0: slices k and k +- d; mode "reuse": [a, 1, S, S], only
                      k +- d, in the window of row i * B / A, view 0
      adjacent_gap_mm f32 [a], only where A > 0; NaN: unknown
      adjacent_offset i32 [a], only where A > 0: place of the pair's distance in pairs.offsets
      (mode "none": rows r still come from dbt, but no adjacent_*)

    The iterator's close() stops its workers, and so do its end and an error. OpenCV's own threads are
    switched off: batches run in parallel.

    Raises:
      UserError: sizes that do not divide, fewer volumes than A, an empty stream, bad sources (index.py); from
        the iterator, an unreadable record.
      DataError: from the iterator; a worker process was killed, or another error in making a batch.
    """
    for name, value in (("dbt_rows", dbt_rows), ("process count", process_count)):
        if value and batch_size % value:
            raise UserError(f"batch_size {batch_size} must be a multiple of {name} {value}")
    if dbt_rows % process_count:
        raise UserError(f"dbt_rows {dbt_rows} must be a multiple of process count {process_count}")
    if not 0 <= seed < 2**32:
        raise UserError(f"seed {seed} must be between 0 and 2^32 - 1")
    if steps * batch_size >= 2**31:
        raise UserError(f"steps {steps} x batch_size {batch_size} must stay below 2^31 samples")
    cv2.setNumThreads(0)
    opened = open_records(data.sources, data.exclude_flags)
    for (folder, *_), full in zip(data.sources, opened.full, strict=True):
        if data.box and (data.box == "full") != full:
            box = "full" if full else "tissue"
            raise UserError(f"{folder} was built with --box {box}, but data.box asks for {data.box}")
    if opened.dbt.any() and not (dbt_rows or data.flat_slices):
        logging.warning("%d tomosynthesis slices are left out: dbt_rows is 0", opened.dbt.sum())
    flat = _flat_stream(opened, data.flat_slices, seed) if dbt_rows < batch_size else None
    volumes = _paired_volumes(opened, pairs) if dbt_rows else []
    if len(volumes) < dbt_rows:
        raise UserError(
            f"{len(volumes)} volumes offer slice pairs but dbt_rows is {dbt_rows}, and a global batch holds "
            "at most one pair a volume; add volumes or lower dbt_rows"
        )
    dbt = _mixed([opened.source[v[0]] for v in volumes], opened.weights, 2 * seed + 1) if volumes else None
    build = _Batches(
        opened, crops, mask, pairs, flat, dbt, volumes,
        batch_size=batch_size, dbt_rows=dbt_rows, seed=seed, process=process_index, processes=process_count,
    )  # fmt: skip
    return iterate(build, opened.name, range(start_step, steps), data.workers, data.threads)


def _mixed(sources, weights, seed: int) -> grain.MapDataset:
    """An endless stream of places in `sources` (the source of each item), shuffled anew in every epoch.

    Source s gives weights[s] of the draws, relative to the other sources present.
    """
    present = [int(s) for s in np.unique(sources)]
    items = [grain.MapDataset.source(np.flatnonzero(np.equal(sources, s))) for s in present]
    streams = [part.seed(seed + (s << 33)).shuffle().repeat() for s, part in zip(present, items, strict=True)]
    return grain.MapDataset.mix(streams, [weights[s] for s in present])


def _flat_stream(opened: Records, flat_slices: bool, seed: int) -> grain.MapDataset:
    """Endless places in `opened` of single images."""
    places = np.flatnonzero(~opened.dbt | flat_slices)
    if not places.size:
        raise UserError(
            "data.sources hold tomosynthesis slices only, but rows of the batch are left for single images; "
            "add a 2D source, set data.flat_slices, or give every row to volumes (dbt_rows = batch_size)"
        )
    return _mixed(opened.source[places], opened.weights, 2 * seed).map(places.__getitem__)


def _paired_volumes(opened: Records, config: PairConfig) -> list[np.ndarray]:
    """The volumes that offer at least one slice pair; how many do not, or show the same tissue, is logged."""
    paired = [v for v in opened.volumes if _pairs_of(opened, v, config).size]
    if len(paired) < len(opened.volumes):
        logging.warning(
            "%d of %d volumes offer no slice pair at offsets %s %s (too few slices, or unknown positions)",
            len(opened.volumes) - len(paired), len(opened.volumes), config.offsets, config.unit,
        )  # fmt: skip
    slabs = [(opened.slab_mm[v[0]], _gap(opened, v, config)) for v in paired if opened.slab_mm[v[0]] > 0]
    thick = [(slab, gap) for slab, gap in slabs if slab > gap]
    if thick:
        logging.warning(
            "%d of %d volumes have slabs thicker than the gap of their closest pairs (for example %.1f and "
            "%.1f mm): both slices show the same tissue, an easy task for DINO-adj; raise pairs.offsets",
            len(thick), len(paired), *thick[0],
        )  # fmt: skip
    return paired


def _gap(opened: Records, volume: np.ndarray, config: PairConfig) -> float:
    """The smallest distance of a volume's slice pairs in mm; NaN: unknown."""
    position = opened.position_mm[volume][_pairs_of(opened, volume, config)]
    return np.abs(position[:, 0] - position[:, 1]).min()


def _pairs_of(opened: Records, volume: np.ndarray, config: PairConfig) -> np.ndarray:
    return possible_pairs(opened.slice_index[volume], opened.position_mm[volume], config)


@dataclasses.dataclass
class _Batches:
    """Makes the local batch of a step; travels to the worker processes."""

    records: Records
    crops: CropConfig
    mask: MaskConfig
    pairs: PairConfig
    flat: grain.MapDataset | None  # places in records
    dbt: grain.MapDataset | None  # places in volumes
    volumes: list[np.ndarray]
    batch_size: int
    dbt_rows: int
    seed: int
    process: int
    processes: int

    def __call__(self, step: int) -> dict[str, np.ndarray]:
        b, a = self.batch_size // self.processes, self.dbt_rows // self.processes
        batch = empty_batch(self.crops, self.mask, self.pairs, b, a, len(self.records.lesion_box) > 0)
        volumes = self._volumes(step)[self.process * a : (self.process + 1) * a]
        every = b // a if a else b + 1
        flat = step * (self.batch_size - self.dbt_rows) + self.process * (b - a)
        for r in range(b):
            sample = step * self.batch_size + self.process * b + r
            if a and r % every == 0:
                self._dbt_row(batch, r, r // every, sample, self.volumes[volumes[r // every]])
            else:
                place = int(self.flat[flat])
                self._row(batch, r, sample, place, self._read(sample, place))
                flat += 1
        return batch

    def _volumes(self, step: int) -> np.ndarray:
        """The volumes of a global batch, i64 [A], all distinct.

        Where an epoch ends inside the batch some are drawn twice: the second is replaced by another.
        """
        drawn = np.array([self.dbt[step * self.dbt_rows + i] for i in range(self.dbt_rows)], np.int64)
        again = np.setdiff1d(np.arange(len(drawn)), np.unique(drawn, return_index=True)[1])
        if again.size:
            others = np.setdiff1d(np.arange(len(self.volumes)), drawn)
            rng = random_generator(self.seed, step, _VOLUMES)
            drawn[again] = rng.choice(others, again.size, replace=False)
        return drawn

    def _read(self, sample: int, place: int) -> np.ndarray:
        note(sample // self.batch_size, place)
        return self.records.image(place)

    def _row(self, batch, r: int, sample: int, place: int, image: np.ndarray) -> tuple[np.ndarray, Window]:
        """Fill row r from a record's image u8 [H, W]; returns its integral image and the window of view 0."""
        c = self.crops
        batch["sample"][r], batch["patient"][r] = sample, self.records.patient[place]
        integral = integral_image(image > 0)
        windows = self._windows(batch, r, sample, place, integral, "global", range(2))
        local = self._windows(batch, r, sample, place, integral, "local", range(2, 2 + c.local_number))
        for view, window in enumerate(windows):
            batch["global_crops"][r, view] = crop(image, window, c.global_size)
        for view, window in enumerate(local):
            batch["local_crops"][r, view] = crop(image, window, c.local_size)
        pixel_mm = self.records.pixel_mm[place]
        _count(batch, r, "global", windows, pixel_mm / c.global_size)
        if local:
            _count(batch, r, "local", local, pixel_mm / c.local_size)
        if len(local) > 1:
            batch["count/local_spread"][r] = spread(local, image.shape)
        self._mask_row(batch, r, sample, place, integral, windows)
        return integral, windows[0]

    def _windows(self, batch, r, sample, place, integral, kind: str, views) -> list[Window]:
        """The windows of a record's views of a kind ("global" or "local")."""
        c, pixel_mm = self.crops, self.records.pixel_mm[place]
        rho, mm = c.rho(kind, self.records.full[self.records.source[place]]), getattr(c, f"{kind}_mm")
        side = None
        if mm is not None and views:
            unknown = not pixel_mm > 0  # NaN too: by scale, and counted
            side = None if unknown else (mm[0] / pixel_mm, mm[1] / pixel_mm)
            batch[f"count/{kind}_mm_unknown"][r] = unknown
        rng = random_generator(self.seed, sample, 0)
        windows = [
            draw_window(
                integral, getattr(c, f"{kind}_scale"), c.ratio, rho, c.hflip,
                rekey(rng, self.seed, sample, view), c.sampler, side,
            )
            for view in views
        ]  # fmt: skip
        if side is not None:  # as large as the record allows; half a pixel a side is rounding
            short = [math.sqrt(w.height * w.width) < side[0] - 1 for w in windows]
            batch[f"count/{kind}_mm_short"][r] = np.mean(short)
        return windows

    def _mask_row(self, batch, r: int, sample: int, place: int, integral, windows: list[Window]) -> None:
        rng = random_generator(self.seed, sample, _MASK)
        view = int(rng.integers(2))
        grid = self.crops.global_size // self.crops.patch
        coverage = patch_coverage(integral, windows[view], grid)
        boxes, lesions = self.records.lesions(place), None
        if len(boxes):
            lesions = masking.lesion_patches(boxes, windows[view], grid)
        mask = masking.draw_mask(coverage, self.mask, rng, lesions)
        M = batch["mask_index"].shape[1]
        batch["mask_index"][r], batch["mask_weight"][r] = masking.pack_mask(mask, view, M)
        batch["count/view_coverage"][r] = coverage.mean()
        if lesions is not None and lesions.any():
            batch["count/mask_lesion"][r] = mask[lesions].mean()
        if sample % PLAIN_EVERY == 0:  # what DINOv2's masks would have held
            rng = random_generator(self.seed, sample, _PLAIN_MASK)
            plain = masking.draw_mask(coverage, masking.plain(self.mask), rng)
            if plain.any():
                batch["count/plain_mask_coverage"][r] = coverage[plain].mean()
        tissue = (coverage >= self.mask.min_coverage).sum()
        batch["count/visible_tissue"][r] = tissue - mask.sum()
        if tissue:
            batch["count/masked_share"][r] = mask.sum() / tissue
        if mask.any():
            batch["count/mask_coverage"][r] = coverage[mask].mean()

    def _dbt_row(self, batch, r: int, i: int, sample: int, volume: np.ndarray) -> None:
        """Fill row r with slice k of a volume, and pair i with slices k and k +- d in like windows."""
        possible = _pairs_of(self.records, volume, self.pairs)
        k, partner = volume[possible[random_generator(self.seed, sample, _PAIR).integers(len(possible))]]
        image = self._read(sample, int(k))
        if self.pairs.mode == "none":
            self._row(batch, r, sample, int(k), image)
            return
        other = self._read(sample, int(partner))
        if image.shape != other.shape:
            raise UserError(
                f"{self.records.name(k)} and record {self.records.record[partner]} are slices of one volume "
                "but differ in shape; build the data set again"
            )
        integral, window = self._row(batch, r, sample, int(k), image)
        size = self.crops.global_size
        if self.pairs.mode == "dedicated":
            rng = random_generator(self.seed, sample, _PAIR_WINDOW)
            first, window = draw_windows(integral, self.pairs, self.crops.ratio, self.crops.hflip, rng)
            batch["adjacent_crops"][i, 0] = crop(image, first, size)
            _count(batch, r, "adjacent", [first, window], self.records.pixel_mm[k] / size)
        batch["adjacent_crops"][i, -1] = crop(other, window, size)
        gap = abs(self.records.position_mm[partner] - self.records.position_mm[k])
        slices = abs(int(self.records.slice_index[partner]) - int(self.records.slice_index[k]))
        apart = slices if self.pairs.unit == "slices" else gap
        batch["adjacent_gap_mm"][i] = gap
        batch["adjacent_offset"][i] = np.abs(np.array(self.pairs.offsets) - apart).argmin()


def empty_batch(
    c: CropConfig, mask: MaskConfig, pairs: PairConfig, b: int, a: int, lesions: bool = False
) -> dict[str, np.ndarray]:
    """The arrays of make_batches' contract for b rows and a pairs, to be filled.

    `lesions`: the records have findings, so their masking is counted.
    """
    M = masking.slots(mask, (c.global_size // c.patch) ** 2)
    batch = {
        "global_crops": np.empty((b, 2, c.global_size, c.global_size), np.uint8),
        "local_crops": np.empty((b, c.local_number, c.local_size, c.local_size), np.uint8),
        "mask_index": np.empty((b, M), np.int32),
        "mask_weight": np.empty((b, M), np.float32),
        "sample": np.empty(b, np.int32),
        "patient": np.empty(b, np.int32),
    }
    metrics = ["mask_coverage", "plain_mask_coverage", "view_coverage", "masked_share", "visible_tissue"]
    metrics += ["local_spread"] if c.local_number > 1 else []
    metrics += ["mask_lesion"] if lesions else []
    kinds = ("global", "local") if c.local_number else ("global",)
    metrics += [f"{kind}_{metric}" for kind in kinds for metric in _VIEW_METRICS]
    by_mm = [kind for kind in kinds if getattr(c, f"{kind}_mm") is not None]
    metrics += [f"{kind}_mm_{metric}" for kind in by_mm for metric in ("unknown", "short")]
    if a and pairs.mode != "none":
        dedicated = pairs.mode == "dedicated"
        shape = (a, 2 if dedicated else 1, c.global_size, c.global_size)
        batch |= {
            "adjacent_crops": np.empty(shape, np.uint8),
            "adjacent_gap_mm": np.empty(a, np.float32),
            "adjacent_offset": np.empty(a, np.int32),
        }
        metrics += [f"adjacent_{metric}" for metric in _VIEW_METRICS] if dedicated else []
    return batch | {f"count/{metric}": np.full(b, np.nan, np.float32) for metric in metrics}


def spread(windows: list[Window], shape: tuple[int, int]) -> float:
    """Rms distance of windows' centres from their mean, relative to free uniform places of the same sizes.

    NaN where the windows fill the record [H, W] and have no other place.
    """
    y, x, h, w = np.array([window[:4] for window in windows], float).T
    room = np.sum((shape[0] - h) ** 2 + (shape[1] - w) ** 2) / 12  # sum of the variances of free places
    found = len(windows) * (np.var(y + h / 2) + np.var(x + w / 2))
    return math.sqrt(found / (room * (1 - 1 / len(windows)))) if room else math.nan


_VIEW_METRICS = ("coverage", "would_reject", "fallback", "mm_per_px")


def _count(batch, r: int, kind: str, windows: list[Window], mm_per_pixel: float) -> None:
    """Counters of a row's views of a kind; `mm_per_pixel` is of a view made from a window one pixel wide."""
    values = [(w.coverage, w.would_reject, w.fallback, math.sqrt(w.height * w.width)) for w in windows]
    means = np.array(list(zip(*values, strict=True)), float).mean(1) * (1, 1, 1, mm_per_pixel)
    for metric, mean in zip(_VIEW_METRICS, means.tolist(), strict=True):
        batch[f"count/{kind}_{metric}"][r] = mean
