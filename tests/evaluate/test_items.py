import numpy as np
import pytest

from mammodino_jax.evaluate.items import group, read_rows


def test_items_are_images_and_whole_volumes(data):
    rows = read_rows([data])
    items = group(rows)
    assert [(items.kind == k).sum() for k in ("2d", "dbt")] == [40, 20]
    volume = np.flatnonzero(items.kind == "dbt")[0]
    assert (items.item == volume).sum() == 3
    assert set(rows.labels) == {"cancer", "density", "lesion"}
    assert set(np.unique(items.label("density"))) == {0, 1, 2, 3}
    only = group(rows, kinds=("dbt",))
    assert len(only.first) == 20 and set(only.kind) == {"dbt"}
    assert ((only.item >= 0) == (rows.columns["kind"] == "dbt")).all()


def test_breasts_and_exams_bring_images_together_and_take_the_highest_label(labelled, tmp_path):
    content = labelled.items(6, slices=0)
    for _, row in content:
        row["study_id"] = f"s-{row['patient_id']}"
    content[0][1]["laterality"], content[2][1]["laterality"] = "R", None
    content[1][1]["label_cancer"], content[3][1]["label_cancer"] = 1, None
    rows = read_rows([labelled.write(tmp_path / "d", content)])
    breasts, exams = group(rows, "breast", ("2d",)), group(rows, "exam", ("2d",))
    assert len(exams.first) == 6
    assert len(breasts.first) == 7  # p0 has two sides; the image without a side is in no breast
    assert (breasts.item == -1).sum() == 1
    assert exams.label("cancer").tolist()[:2] == [1, 0]
    assert breasts.label("cancer")[list(breasts.id).index("p1/s-p1/L")] == -1
    with pytest.raises(ValueError, match="level 'side'"):
        group(rows, "side")


def test_duplicates_and_flagged_records_are_left_out_and_counted(labelled, tmp_path):
    content = labelled.items(6, slices=0)
    content[0][1]["duplicate_of"] = "p1-CC"
    content[3][1]["flags"] = ["stereo"]
    content[4][1]["label_cancer"] = None
    rows = read_rows([labelled.write(tmp_path / "d", content)])
    assert rows.left_out == 2
    assert len(rows) == 10
    assert (rows.labels["cancer"] == -1).sum() == 1


def test_rows_read_their_own_images(labelled, tmp_path):
    folders = [labelled.write(tmp_path / n, labelled.items(4, slices=0)) for n in "ab"]
    images = {row["image_id"]: image for image, row in labelled.items(4, slices=0)}
    rows = read_rows(folders)
    assert len(rows) == 16 and rows.source.tolist() == [0] * 8 + [1] * 8
    for i in (0, 7, 8, 15):
        np.testing.assert_array_equal(rows.image(i), images[rows.columns["image_id"][i]])
    turned = rows.take(np.arange(16)[::-1])
    np.testing.assert_array_equal(turned.image(0), rows.image(15))
