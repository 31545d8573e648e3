"""One step on 1 and on 8 fake devices and in 2 processes agrees; a checkpoint of each goes on in each."""

import numpy as np
import pytest
from compare_devices import LOSSES, Layout, compare, differences
from make_dataset import breast, row, volume, write_dataset

from configs import nano


@pytest.mark.parametrize("name", ["metric/koleo", "student/w", "mu/w"])
def test_what_is_not_finite_does_not_agree(name):
    step = {f"metric/{n}": np.float32(1) for n in (*LOSSES, "lr")} | {
        "student/w": np.ones(3),
        "mu/w": np.ones(3),
    }
    assert differences(step, step) == (0, 0)
    broken = {**step, name: step[name] * np.nan}
    with pytest.raises(AssertionError):
        differences(broken, step)


@pytest.mark.slow
def test_steps_and_checkpoints_are_the_same_in_all_layouts(tmp_path):
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
    c.loss.update(drop_path_group=4, patch_chunk=3)  # 4 slots: two chunks that overlap
    c.head.update(prototypes=64, bottleneck=16, hidden=32)
    layouts = [Layout(1, 1), Layout(8, 4), Layout(4, 4, processes=2)]
    lines, loss, update = compare(c.to_dict(), tmp_path, layouts)
    assert loss <= 1e-5 and update <= 0.02, "\n".join(lines)
