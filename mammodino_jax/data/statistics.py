"""Mean and deviation of the tissue pixels that training will see: an alternative to ImageNet's statistics."""

import numpy as np

from mammodino_jax.data.index import open_records
from mammodino_jax.data.pipeline import DataConfig

RECORDS = 512  # evenly spaced in the index; the mean of so many breasts is known to about 1 grey level


def tissue_statistics(data: DataConfig) -> tuple[float, float]:
    """Mean and standard deviation of tissue (grey > 0, in [0, 1]) over records in use, each record alike.

    Deterministic for given sources. Raises UserError as index.open_records does.
    """
    records = open_records(data.sources, data.exclude_flags)
    places = np.unique(np.linspace(0, len(records.record) - 1, RECORDS).astype(int))
    moments = []
    for place in places.tolist():
        tissue = records.image(place)
        tissue = tissue[tissue > 0] / 255
        if tissue.size:
            moments.append((tissue.mean(), (tissue**2).mean()))
    mean, square = np.mean(moments, axis=0)
    return round(float(mean), 4), round(float(np.sqrt(max(square - mean**2, 0))), 4)
