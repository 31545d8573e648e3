"""Init statistics, learning-rate and decay factors, schedules and drop-path sizes equal DINOv2's tables.

`pytest -s tests/test_specification.py` prints them; tests/acceptance/test_learning_parity.py does at full size.
"""

import pytest
import specification
from specification import show

from mammodino_jax.model.head import HeadConfig
from mammodino_jax.model.vit import ViTConfig

SMALL = (
    ViTConfig(dim=192, depth=2, heads=3, image_size=98, registers=4),
    HeadConfig(prototypes=512, bottleneck=256, hidden=256, separate_ibot=True),
)
TABLES = {
    "initial distributions": lambda: specification.init_table(*SMALL),
    "parameter groups": specification.group_table,
    "schedules": specification.schedule_table,
    "drop-path": specification.drop_path_table,
}


@pytest.mark.parametrize("title", TABLES)
def test_table(title):
    rows = TABLES[title]()
    show(title, rows)
    assert all(r.ok for r in rows), [r for r in rows if not r.ok]
