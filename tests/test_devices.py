"""One step on 1 and on 8 fake devices, replicated and sharded, agrees."""

import numpy as np
import pytest
from compare_devices import differences, run_layouts
from make_dataset import breast, row, volume, write_dataset

from configs import nano
from mammodino_jax.data.pipeline import make_batches
from mammodino_jax.recipe import from_config


@pytest.mark.slow
def test_one_step_is_the_same_on_1_and_8_devices(tmp_path):
    images = [breast(100, 70, seed) for seed in range(40)]
    items = [(image, row(image, f"i{n}")) for n, image in enumerate(images)]
    for v in range(10):  # textured slices: KoLeo's distance between equal images is rounding noise
        items += [
            (breast(100, 70, 100 * v + s + 99), r) for s, (_, r) in enumerate(volume(f"v{v}", 12, 100, 70))
        ]
    c = nano.get_config(str(write_dataset(tmp_path / "data", items)))
    c.batch_size, c.dbt_rows = 32, 8
    c.crops.update(global_size=42, local_size=28, local_number=2)
    c.model.update(dim=32, depth=3, heads=2, drop_path=0.25)  # rows that skip every attention would be equal
    c.loss.update(drop_path_group=4)
    c.head.update(prototypes=64, bottleneck=16, hidden=32)
    r = from_config(c)
    batch = next(
        make_batches(r.data, r.crops, r.mask, r.pairs, batch_size=32, dbt_rows=8, steps=1, seed=0)
    )  # fmt: skip
    results = run_layouts(
        c.to_dict(), {k: np.asarray(v) for k, v in batch.items()}, tmp_path, [(1, 1), (8, 1), (8, 4)]
    )
    for layout in ((8, 1), (8, 4)):
        loss, update = differences(results[1, 1], results[layout])
        assert loss <= 1e-5 and update <= 0.02, (layout, loss, update)
