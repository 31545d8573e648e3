"""Mean and deviation of the tissue pixels that training will see: an alternative to ImageNet's statistics."""

import numpy as np

from mammodino_jax.data.index import open_records
from mammodino_jax.data.pipeline import DataConfig
from mammodino_jax.errors import UserError

RECORDS = 512  # evenly spaced in the index; the mean of so many breasts is known to about 1 grey level


def tissue_statistics(data: DataConfig, dbt_share: float = 0.0) -> tuple[float, float]:
    """Mean and standard deviation of tissue (grey > 0, in [0, 1]); every record weighs alike in its stream.

    `dbt_share` is the share of training rows that volumes give; single slices of the flat stream
    (data.flat_slices) count among the others. Weights of sources are not looked at. Deterministic for given
    sources. Raises UserError as index.open_records does.
    """
    records = open_records(data.sources, data.exclude_flags)
    flat = ~records.dbt | data.flat_slices
    total, weights = np.zeros(2), 0.0
    for chosen, weight in ((flat, 1 - dbt_share), (records.dbt, dbt_share)):
        places = np.flatnonzero(chosen)
        if not weight or not places.size:
            continue
        places = places[np.unique(np.linspace(0, len(places) - 1, RECORDS).astype(int))]
        tissue = [image[image > 0] / 255 for image in map(records.image, places.tolist())]
        moments = [(t.mean(), (t**2).mean()) for t in tissue if t.size]
        if moments:
            total, weights = total + weight * np.mean(moments, axis=0), weights + weight
    if not weights:
        raise UserError("augment.normalise is tissue, but no record in use holds tissue or is trained on")
    mean, square = total / weights
    return round(float(mean), 4), round(float(np.sqrt(max(square - mean**2, 0))), 4)
