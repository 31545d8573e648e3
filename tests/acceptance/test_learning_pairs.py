"""Acceptance of the learning algorithm, line 8: what DINO-adj does to slices. It prints its figures.

    python -m pytest -s -m accept tests/acceptance/test_learning_pairs.py

About a quarter of an hour on two cores. Needs the VICTRE phantom (MAMMODINO_SHARED/data/dbt_phantom_cc0). The
volumes measured are those trained on, and one seed is one draw: differences in the second digit mean nothing.
A scaled-down twin runs in `make test`.
"""

import json
import time

import pytest
import slice_features
import victre

pytestmark = [pytest.mark.accept, pytest.mark.timeout(5400)]
STEPS = 400


def test_line_08_pairs(shared, tmp_path):
    """One VICTRE and 8 phantom volumes; the same seed, with and without DINO-adj."""
    data = victre.write_volumes(tmp_path, victre.load_labels(shared))
    began = time.time()
    workdirs = slice_features.train_both(data, tmp_path, STEPS)
    print(f"\n8. one VICTRE and 8 phantom volumes, nano, {STEPS} steps of 16 images with 8 pairs, "
          f"{(time.time() - began) / 60:.1f} min for both runs")  # fmt: skip
    first, last = slice_features.check_same_images(workdirs, STEPS)
    print(f"   adjacent term: {first:.3f} in the first tenth, {last:.3f} in the last")
    found = slice_features.compare(workdirs, data, side=98)
    slice_features.show(found)
    (tmp_path / "line_08.json").write_text(json.dumps(found, indent=1))
    slice_features.check_finite(found)
