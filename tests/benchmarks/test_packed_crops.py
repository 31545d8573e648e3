import jax
import numpy as np

from benchmarks import packed_crops
from benchmarks.jax_step import recipe_of
from mammodino_jax.model.head import init_params


def test_packed_rows_give_the_same():
    recipe = recipe_of({"recipe": "nano_56", "batch": 2, "dtype": "float32", "remat": "none"})
    ways, tokens = packed_crops.both_ways(recipe)
    assert tokens == 2 * 17 + 4 * 10
    params = init_params(recipe.model, None, 0)
    x = jax.random.normal(jax.random.key(0), (2, tokens, recipe.model.dim))
    two, packed = (jax.jit(way)(params, x) for way in ways.values())
    np.testing.assert_allclose(two, packed, atol=1e-4 * float(abs(two).max()))
