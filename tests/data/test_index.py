import hashlib
import os
import pickle
import resource
from pathlib import Path

import numpy as np
import pytest

from mammodino_jax.data import index
from mammodino_jax.data.index import open_records, open_split, patient_number
from mammodino_jax.data.records import shard_paths
from mammodino_jax.errors import UserError


@pytest.fixture(scope="module")
def folder(make, tmp_path_factory):
    """Train: 3 2D (one flagged, one a duplicate), 1 film, two volumes interleaved badly; val: 1."""
    image = [make.breast(20 + i, 16, i) for i in range(6)]
    items = [
        (image[0], make.row(image[0], "a", patient_id="p1")),
        (image[1], make.row(image[1], "b", patient_id="p1", flags=["marker", "stereo"])),
        (image[2], make.row(image[2], "c", duplicate_of="a")),
        (image[3], make.row(image[3], "d", kind="film", pixel_mm=None)),
        *make.volume("v", 4),
        *reversed(make.volume("w", 3, spacing=None)),  # slice order is the index's, not the shard's
        (image[4], make.row(image[4], "e", split="val")),
    ]
    items[5][1]["slice_position_mm"] = 2.5
    return make.write_dataset(tmp_path_factory.mktemp("data") / "set", items, shards=3)


def test_records_come_in_index_order_with_their_pixels(folder, make):
    records = open_records([(folder, "train", ("2d", "film"), 1.0)], ["stereo"])
    assert records.record.tolist() == [0, 3]  # b is flagged, c a duplicate
    for place, seed in ((0, 0), (1, 3)):
        np.testing.assert_array_equal(records.image(place), make.breast(20 + seed, 16, seed))
    assert records.patient.tolist() == [patient_number("p1"), patient_number("p-d")]
    np.testing.assert_array_equal(records.pixel_mm, np.float32([0.2, np.nan]))
    assert not records.volumes and not records.dbt.any()


def test_flags_left_in_where_not_excluded(folder):
    assert open_records([(folder, "train", "2d", 1.0)]).record.tolist() == [0, 1]


def test_volumes_are_in_slice_order_with_positions(folder):
    records = open_records([(folder, "train", ("2d", "dbt"), 1.0), (folder, "train", "dbt", 2.0)])
    assert [len(v) for v in records.volumes] == [4, 3, 4, 3]
    for volume in records.volumes:
        assert records.slice_index[volume].tolist() == list(range(len(volume)))
        assert len(set(records.source[volume])) == 1
    v, w = records.volumes[0], records.volumes[1]
    np.testing.assert_array_equal(
        records.position_mm[v], np.float32([0, 2.5, 2, 3])
    )  # a stored position wins
    assert np.isnan(records.position_mm[w]).all()
    for place in (*v, *w):
        assert records.image(place).max() == 20 + records.slice_index[place]


def test_findings_lie_with_their_records(make, tmp_path):
    image = make.breast(20, 16, 0)
    items = [(image, make.row(image, name, kind="film" if name == "b" else "2d")) for name in "abcd"]
    folder = make.write_dataset(tmp_path / "set", items + make.volume("v", 3, slab_mm=6.0))
    box = {"record_y0": 1.0, "record_x0": 2.0, "record_y1": 3.0, "record_x1": 4.0}
    make.write_findings(
        folder,
        [
            {"image_id": "v-1", **box},
            {"image_id": "d", **box, "record_y1": 9.0},
            {"image_id": "b", **box},  # a film: not in use
            {"image_id": "a"},  # no box
            {"image_id": "d", **box},
            {"volume_id": "v", **box},  # no known slice
        ],
    )
    plain = make.write_dataset(tmp_path / "plain", items[:1], settings={"box": "full"})
    opened = open_records([(plain, "train", "2d", 1.0), (folder, "train", ("2d", "dbt"), 1.0)])
    found = [opened.lesions(place).tolist() for place in range(len(opened.record))]
    one = [1, 2, 3, 4]  # places: a of `plain`; a, c, d, v-0, v-1, v-2
    assert found == [[], [], [], [[1, 2, 9, 4], one], [], [one], []]
    assert opened.full == [True, False]
    assert np.isnan(opened.slab_mm[:4]).all() and (opened.slab_mm[4:] == 6).all()


def test_patient_number_is_the_low_31_bits():
    digest = int(hashlib.sha256(b"p1").hexdigest(), 16)
    assert patient_number("p1") == digest % 2**31


def test_records_pickle_for_worker_processes(folder):
    records = open_records([(folder, "train", "dbt", 1.0)])
    copy = pickle.loads(pickle.dumps(records))
    np.testing.assert_array_equal(copy.image(2), records.image(2))


@pytest.mark.parametrize(
    ("source", "flags", "message"),
    [
        (("train", "2dd", 1.0), (), r'unknown kind "2dd".*Did you mean "2d"'),
        (("trian", "2d", 1.0), (), r'unknown split "trian".*Did you mean "train"'),
        (("test", "2d", 1.0), (), r'no records of split "test"'),
        (("train", "2d", 0.0), (), "weight 0.0 of source .* must be positive"),
        (
            ("train", "synthetic2d", 1.0),
            (),
            "of 11, 11 are of other kinds than synthetic2d, 0 have .* 0 are dupl",
        ),
        (("val", "2d", 1.0), ("x", "spot"), None),
    ],
)
def test_bad_sources_are_named(folder, source, flags, message):
    if message is None:
        assert len(open_records([(folder, *source)], flags).record) == 1
        return
    with pytest.raises(UserError, match=message):
        open_records([(folder, *source)], flags)


def test_filters_count_each_record_once(make, tmp_path):
    image = make.breast(20, 16, 0)
    items = [
        (image, make.row(image, "a", flags=["spot", "stereo"])),
        (image, make.row(image, "b", flags=["spot"], duplicate_of="a")),
        (image, make.row(image, "c", duplicate_of="a")),
        (image, make.row(image, "d", kind="film")),
    ]
    folder = make.write_dataset(tmp_path / "set", items)
    expected = (
        r"of 4, 1 are of other kinds than 2d, 2 have an excluded flag \(spot, stereo\), 1 are duplicates"
    )
    with pytest.raises(UserError, match=expected):
        open_records([(folder, "train", "2d", 1.0)], ("spot", "stereo"))


def test_bad_folders_are_named(make, tmp_path):
    with pytest.raises(UserError, match=r"data\.sources is empty"):
        open_records([])
    with pytest.raises(UserError, match="does not exist"):
        open_records([(tmp_path / "none", "train", "2d", 1.0)])
    image = make.breast(20, 16, 0)
    folder = make.write_dataset(tmp_path / "old", [(image, make.row(image, "a"))], schema_version="0.0.1")
    with pytest.raises(UserError, match=r"schema version 0\.0\.1"):
        open_records([(folder, "train", "2d", 1.0)])


def test_index_and_shards_must_agree(make, tmp_path):
    image = make.breast(20, 16, 0)
    items = [(image, make.row(image, name)) for name in "abcd"]
    folder = make.write_dataset(tmp_path / "set", items, shards=2)
    (tmp_path / "set" / shard_paths(folder, "train")[1]).unlink()
    with pytest.raises(UserError, match="2 records but 4 rows"):
        open_split(folder, "train")


def test_row_numbers_are_of_the_whole_index(folder):
    _, table = open_split(folder, "val", ["image_id"])
    assert table["row"].to_pylist() == [11] and table["image_id"].to_pylist() == ["e"]


def test_more_shards_than_open_files_are_allowed(make, tmp_path):
    """1.4 million records are 2,700 shards; a process may often open 1,024 files."""
    images = [make.breast(16, 12, i) for i in range(60)]
    folder = make.write_dataset(
        tmp_path / "set", [(x, make.row(x, f"i{i}")) for i, x in enumerate(images)], 60
    )
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, hard))
    try:
        opened = open_records([(folder, "train", "2d", 1.0)])
        for place, image in enumerate(images):
            np.testing.assert_array_equal(opened.image(place), image)
    finally:
        del opened
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize(
    ("soft", "hard", "wanted"),
    [
        (256, resource.RLIM_INFINITY, 356),
        (256, 300, 300),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, None),
    ],
)
def test_the_limit_of_open_files_is_raised_as_far_as_it_goes(monkeypatch, soft, hard, wanted):
    """macOS: 256 of any number."""
    given = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: given.append(limits))
    index._allow_open_files(100)
    assert given == ([(wanted, hard)] if wanted else [])


@pytest.mark.parametrize("left", [0, 0.5])
def test_a_truncated_shard_is_named(make, tmp_path, left):
    images = [make.breast(400, 300, i) for i in range(4)]
    folder = make.write_dataset(
        tmp_path / "set", [(x, make.row(x, f"i{i}")) for i, x in enumerate(images)], 2
    )
    second = Path(shard_paths(folder, "train")[1])
    whole = second.read_bytes()
    second.write_bytes(whole[: int(left * len(whole))])
    with pytest.raises(UserError, match=f"set: shard {second.name} is damaged .*; build the data set again"):
        open_records([(folder, "train", "2d", 1.0)])
