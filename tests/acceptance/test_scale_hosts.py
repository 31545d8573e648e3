"""Acceptance of scale, line 1: the same training on any layout of devices and processes (make accept-scale).

Some ten minutes on 2 cores. The scaled-down twin is tests/test_devices.py. Synthetic images.
"""

import time

import pytest
from compare_devices import Layout, compare
from make_dataset import breast, row, volume, write_dataset

from configs import nano

pytestmark = [pytest.mark.accept, pytest.mark.timeout(5400)]


def test_line_1_layouts(tmp_path):
    """The nano recipe at its own learning rate, drop-path on: 5 layouts, and each one's checkpoint in each."""
    images = [breast(200, 140, seed) for seed in range(60)]
    items = [(image, row(image, f"i{n}")) for n, image in enumerate(images)]
    for v in range(12):
        items += [
            (breast(200, 140, 100 * v + s + 99), r) for s, (_, r) in enumerate(volume(f"v{v}", 12, 200, 140))
        ]
    c = nano.get_config(str(write_dataset(tmp_path / "data", items)))
    c.model.drop_path = 0.2
    c.loss.drop_path_group = 4  # as many rows as a device holds
    layouts = [Layout(1, 1), Layout(8, 1), Layout(8, 4), Layout(8, 8), Layout(4, 4, processes=2)]
    began = time.time()
    lines, loss, update = compare(c.to_dict(), tmp_path, layouts)
    print("", *(f"1. {line}" for line in lines), f"1. {time.time() - began:.0f} s", sep="\n")
    assert loss <= 1e-5 and update <= 0.02
