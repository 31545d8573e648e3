"""Parameter groups of DINOv2's ViT-B (reference: its param_groups.py), clipping, one Adam step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mammodino_jax.model.head import HeadConfig, init_params
from mammodino_jax.model.vit import ViTConfig
from mammodino_jax.optimizer import OptimConfig, adam, adamw_update, clip_by_module, multipliers

DEPTH = 12


@pytest.fixture(scope="module")
def trees():
    vit = ViTConfig(dim=6, depth=DEPTH, heads=1, image_size=28, registers=1)
    params = jax.eval_shape(lambda: init_params(vit, HeadConfig(8, 4, 4), 0))
    return multipliers(params, OptimConfig(), DEPTH)


@pytest.mark.parametrize(
    ("path", "lr", "decay"),
    [
        ("cls_token", 0.25419, 1), ("pos_embed", 0.25419, 1), ("mask_token", 0.25419, 1),
        ("register_tokens", 0.25419, 1),
        ("patch_embed.proj.kernel", 0.05084, 1), ("patch_embed.proj.bias", 0.05084, 0),
        ("blocks.0.attn.qkv.kernel", 0.28243, 1), ("blocks.11.mlp.fc2.kernel", 0.9, 1),
        ("blocks.11.ls1.gamma", 0.9, 0),
        ("blocks.11.norm1.scale", 0.9, 0), ("norm.scale", 1, 0), ("norm.bias", 1, 0),
    ],
)  # fmt: skip
def test_backbone_groups(trees, path, lr, decay):
    def at(tree):
        node = tree["backbone"]
        for part in path.split("."):
            node = node[int(part) if part.isdigit() else part]
        return node

    assert at(trees[0]) == pytest.approx(lr, rel=1e-4) and at(trees[1]) == decay and at(trees[2]) == 0


def test_head_groups(trees):
    lr, decay, last = (t["dino_head"] for t in trees)
    assert set(jax.tree.leaves(lr)) == {1.0}
    assert decay["mlp"]["0"] == {"kernel": 1, "bias": 0} and decay["last_layer"] == {
        "weight_g": 1,
        "weight_v": 1,
    }
    assert set(jax.tree.leaves(last["last_layer"])) == {1.0} and set(jax.tree.leaves(last["mlp"])) == {0.0}


def test_each_module_is_clipped_by_its_own_norm():
    grads = {"backbone": {"a": jnp.full(4, 3.0)}, "dino_head": {"a": jnp.full(4, 0.1)}}
    clipped, norms = clip_by_module(grads, 3.0)
    assert float(norms["backbone"]) == pytest.approx(6.0)
    np.testing.assert_allclose(clipped["backbone"]["a"], 1.5, rtol=1e-5)
    np.testing.assert_array_equal(clipped["dino_head"]["a"], grads["dino_head"]["a"])


def test_frozen_last_layer_stays_while_its_moments_move():
    params = {
        "dino_head": {"last_layer": {"weight_v": jnp.ones(3)}, "mlp": {"0": {"kernel": jnp.ones((2, 2))}}}
    }
    grads = jax.tree.map(jnp.ones_like, params)
    c = OptimConfig()
    new, opt = adamw_update(
        params, grads, adam(c).init(params), c, DEPTH, lr=0.1, last_layer_lr=0.0, weight_decay=0.5
    )  # fmt: skip
    np.testing.assert_array_equal(new["dino_head"]["last_layer"]["weight_v"], 1)
    np.testing.assert_allclose(new["dino_head"]["mlp"]["0"]["kernel"], 1 - 0.1 * (1 + 0.5), rtol=1e-5)
    assert float(opt.mu["dino_head"]["last_layer"]["weight_v"][0]) > 0
