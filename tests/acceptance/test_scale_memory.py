"""Acceptance line 4 of scale: memory of heads and losses at 65,536 prototypes. `make accept-scale` runs it."""

import pytest
from heads_memory import Sizes, temporaries

pytestmark = [pytest.mark.accept, pytest.mark.timeout(3600)]
CHUNK = 64  # the recipe's


@pytest.mark.parametrize("center", [False, True], ids=["sinkhorn", "centering"])
def test_line_04_memory_of_heads_and_losses(center):
    """8 images: 100 and 800 masked slots an image at a chunk of 64, and all 800 at once; nothing is run."""
    sizes = {slots: temporaries(Sizes(), slots, CHUNK, center) for slots in (100, 200, 400, 800)}
    whole = temporaries(Sizes(), 800, 0, center)
    name = "centering" if center else "sinkhorn"
    print(f"\n4. {name}, 8 images, K 65,536, chunk {CHUNK}: temporaries "
          + ", ".join(f"{slots} slots {size / 2**20:.0f} MiB" for slots, size in sizes.items())
          + f"; 800 slots unchunked {whole / 2**20:.0f} MiB ({whole / sizes[800]:.1f} x)")  # fmt: skip
    assert max(sizes.values()) <= 1.1 * min(sizes.values())
    assert sizes[800] < whole / 4
