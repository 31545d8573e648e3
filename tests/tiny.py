"""A synthetic data set and a recipe that compiles in seconds, for tests that train."""

import numpy as np
from make_dataset import breast, row, volume, write_dataset
from ml_collections import ConfigDict

from configs import nano


def tiny_dataset(folder, margin=0, **prep):
    """40 single images and 10 volumes of 12 slices, synthetic, with `margin` pixels of background around."""
    images = [breast(100, 70, seed) for seed in range(40)]
    items = [(image, row(image, f"i{n}")) for n, image in enumerate(images)]
    for v in range(10):
        items += volume(f"v{v}", 12, 100, 70)
    if margin:
        items = [(wide := np.pad(image, margin), columns | frame(wide)) for image, columns in items]
    return write_dataset(folder, items, terms={"test": "synthetic"}, **prep)


def frame(image) -> dict:
    return {"height": image.shape[0], "width": image.shape[1], "coverage": float((image > 0).mean())}


def shrink(c: ConfigDict) -> ConfigDict:
    """A recipe of any size with the sizes of a toy."""
    c.batch_size, c.dbt_rows, c.steps = 8, 4, 8
    c.crops.update(global_size=42, local_size=28, local_number=2)
    c.model.update(dim=32, depth=2, heads=2)
    c.head.update(prototypes=64, bottleneck=16, hidden=32)
    c.optim.update(warmup_steps=2, freeze_last_layer_steps=1, warmup_teacher_temp_steps=4)
    c.run.update(checkpoint_every=4)
    return c


def tiny(dataset, **changes) -> ConfigDict:
    """The nano recipe, smaller still."""
    c = shrink(nano.get_config(str(dataset)))
    c.update(changes)
    return c
