import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mammodino_jax.data import records
from mammodino_jax.errors import UserError


@settings(deadline=None, max_examples=40)
@given(hnp.arrays(np.uint8, st.tuples(st.integers(1, 19), st.integers(2, 19))), st.text(max_size=12))
def test_decode_inverts_encode(image, image_id):
    out = records.decode(records.encode(image, image_id))
    np.testing.assert_array_equal(out["image"], image)
    np.testing.assert_array_equal(out["mask"], image > 0)
    assert out["image_id"] == image_id


def test_stored_mask_is_the_packed_tissue_mask():
    image = np.random.default_rng(0).integers(0, 3, (5, 7)).astype(np.uint8)
    stored = records.features().deserialize_example_np(records.encode(image, "a"))["mask"]
    np.testing.assert_array_equal(np.unpackbits(stored)[:35].reshape(5, 7).astype(bool), image > 0)


@pytest.mark.parametrize("image", [np.zeros((4, 4), np.uint16), np.zeros((4, 4, 1), np.uint8)])
def test_encode_rejects_other_arrays(image):
    with pytest.raises(ValueError, match="expected uint8"):
        records.encode(image, "a")


def test_read_prep_names_what_is_wrong(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        records.read_prep(tmp_path / "none")
    with pytest.raises(UserError, match="not a built data set"):
        records.read_prep(tmp_path)
    (tmp_path / "prep.json").write_text(json.dumps({"schema_version": "0.1.0"}))
    with pytest.raises(UserError, match=r"schema version 0\.1\.0, this code reads 1\.0\.0"):
        records.read_prep(tmp_path)


def test_shards_are_listed_in_record_order(tmp_path):
    for split, shard in (("train", 10), ("train", 2), ("val", 0)):
        (tmp_path / records.shard_name(split, shard, 11)).touch()
    names = [path.rsplit("/", 1)[1] for path in records.shard_paths(tmp_path, "train")]
    assert names == [records.shard_name("train", 2, 11), records.shard_name("train", 10, 11)]


def test_threads_may_be_the_first_to_decode():
    """TFDS is imported at the first record, and its lazy imports are not for several threads at once."""
    code = """
from concurrent.futures import ThreadPoolExecutor
from mammodino_jax.data import records
with ThreadPoolExecutor(8) as pool:
    assert len({id(f) for f in pool.map(lambda _: records.features(), range(8))}) == 1
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1000:]
