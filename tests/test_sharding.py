"""The shape rule on the layouts of real recipes, and buckets, which are no folders."""

import functools
import math

import jax
import pytest
from jax.sharding import AbstractMesh

from configs import vitb14_518, vitl14
from mammodino_jax import encoder
from mammodino_jax.data import records
from mammodino_jax.errors import UserError
from mammodino_jax.recipe import from_config
from mammodino_jax.sharding import MIN_BYTES, state_shardings
from mammodino_jax.train import init_state, train

# MiB a device of the train state (student, teacher, Adam's two moments; fp32), by fsdp
MIB = {"vitb14_518": {1: 2027, 8: 372}, "vitl14": {1: 6400, 8: 838}}


@pytest.mark.slow
@pytest.mark.parametrize("module", [vitb14_518, vitl14])
def test_every_large_array_is_sharded_and_moments_and_teacher_alike(module):
    abstract = jax.eval_shape(functools.partial(init_state, from_config(module.get_config())))
    for fsdp in (1, 8):
        state = state_shardings(abstract, AbstractMesh((8 // fsdp, fsdp), ("data", "fsdp")))
        student, *others = state["student"], state["teacher"], state["opt"].mu, state["opt"].nu
        assert all(tree == student for tree in others)
        held = 0
        for (path, a), sharding in zip(
            jax.tree_util.tree_leaves_with_path(abstract), jax.tree.leaves(state), strict=True
        ):
            mine = math.prod(sharding.shard_shape(a.shape)) * a.dtype.itemsize
            whole = a.size * a.dtype.itemsize
            assert mine == whole // (fsdp if whole >= MIN_BYTES else 1), jax.tree_util.keystr(path)
            held += mine
        assert round(held / 2**20) == MIB[module.__name__.rpartition(".")[2]][fsdp]


def test_a_bucket_is_not_taken_for_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mount = r"gcsfuse --implicit-dirs b /mnt/b; options in docs/launch.md\) and give /mnt/b/run"
    with pytest.raises(UserError, match=r"workdir gs://b/run is in a bucket; mount it \(" + mount):
        train(vitb14_518.get_config(), "gs://b/run")
    with pytest.raises(UserError, match=r"data folder gs://b/run is in a bucket"):
        records.read_prep("gs://b/run")
    with pytest.raises(UserError, match=r"encoder s3://b/run is in a bucket; mount it \(its own"):
        encoder.load_encoder("s3://b/run")
    assert not list(tmp_path.iterdir())
