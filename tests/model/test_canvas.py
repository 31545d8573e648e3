"""Images of any aspect in one canvas: their features are those of each alone."""

import jax
import numpy as np
import pytest

from mammodino_jax.encoder import Encoder
from mammodino_jax.model.head import bind, init_params
from mammodino_jax.model.vit import ViTConfig, own_grids


@pytest.mark.parametrize("registers, antialias, offset", [(0, False, 0.1), (2, True, 0.0)])
def test_features_do_not_depend_on_the_canvas(registers, antialias, offset):
    vit = ViTConfig(
        dim=64, depth=2, heads=2, image_size=42, registers=registers, layerscale=1.0,
        pos_antialias=antialias, pos_offset=offset,
    )  # fmt: skip
    encoder = Encoder("tiny", vit, init_params(vit, None, seed=0))
    rng = np.random.default_rng(0)
    for height, width in ((42, 42), (70, 28), (28, 56)):  # the trained grid, and others
        image = rng.integers(0, 256, (height, width), np.uint8)
        canvas = rng.integers(0, 256, (2, 84, 98), np.uint8)  # what lies beyond is not seen
        canvas[0, :height, :width] = image
        alone, there = encoder(image[None]), encoder(canvas, [(height - 3, width - 5), (84, 98)])
        patches = np.asarray(there["patches"]).reshape(2, 6, 7, -1)[0, : height // 14, : width // 14]
        np.testing.assert_allclose(there["cls"][0], alone["cls"][0], atol=5e-6)
        np.testing.assert_allclose(patches.reshape(alone["patches"][0].shape), alone["patches"][0], atol=5e-6)


def test_drop_path_takes_the_masks_of_the_rows_it_draws():
    vit = ViTConfig(dim=64, depth=2, heads=2, image_size=42, layerscale=1.0, drop_path=0.5)
    params = init_params(vit, None, seed=0)
    x = np.random.default_rng(0).normal(size=(6, 84, 98, 3)).astype(np.float32)
    grids = own_grids(vit, [(42 + 14 * (i % 3), 28 + 14 * i) for i in range(6)], 84, 98)
    beyond = ~grids[2].reshape(6, 6, 1, 7, 1, 1)
    other = np.where(beyond, 9, x.reshape(6, 6, 14, 7, 14, 3)).reshape(x.shape).astype(np.float32)
    encode = jax.jit(lambda x, grids, key: bind(params, vit)(x, key=key, grids=grids)["cls"])
    dropped = encode(x, grids, jax.random.key(3))
    np.testing.assert_array_equal(dropped, encode(other, grids, jax.random.key(3)))
    assert np.abs(dropped - encode(x, grids, jax.random.key(4))).max() > 1e-3
    wrong = (*grids[:2], grids[2][::-1])  # a mask of another row would be seen
    assert np.abs(dropped - encode(other, wrong, jax.random.key(3))).max() > 1e-3
