"""Acceptance of the learning algorithm, lines 1 to 3: parity with DINOv2. A test a line; each prints its figures.

    python -m pytest -s -m accept tests/acceptance/test_learning_parity.py

A few minutes on two cores. Line 1 needs golden files (MAMMODINO_GOLDEN, or MAMMODINO_SHARED/golden), line 2
torch, timm, lightly and transformers. Scaled-down twins run in `make test`.
"""

import pytest
import specification
from model.test_golden import GOLDEN, LIMITS, golden_folder, step_errors

from mammodino_jax.model.head import HeadConfig
from mammodino_jax.model.vit import ViTConfig

pytestmark = [
    pytest.mark.accept,
    pytest.mark.timeout(5400),
    pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning"),  # in lightly
]

VIT_S = ViTConfig(dim=384, depth=12, heads=6, image_size=518)
VIT_B = ViTConfig(registers=4)


def test_line_1_golden_steps():
    if not GOLDEN:
        pytest.skip(f"no step_*.npz under {golden_folder()} (MAMMODINO_GOLDEN)")
    failed = []
    for path in GOLDEN:
        print(f"\n{path.name}")
        for kind, (error, where) in step_errors(path).items():
            print(f"  {kind}: {error:.2e} (limit {LIMITS[kind]:g}) {where}")
            failed += [f"{path.stem}: {kind}"] * (error > LIMITS[kind])
    assert not failed, failed


def test_line_2_forward():
    pytest.importorskip("timm", reason="timm is an oracle of this test")
    pytest.importorskip("transformers", reason="transformers is an oracle of this test")
    from oracle_vit import CASES, CONVENTIONS, case_id, forward_error

    print("\nlargest difference of ViT-S/14 with random weights, tokens of scale 1, fp32 (limit 1e-4)")
    worst = 0.0
    for case in CASES:
        error = forward_error(case, VIT_S)
        worst = max(worst, error)
        print(f"  {case_id(case)}: {error:.1e}")
    print("without registers at 224, ours resampling as (row) against (column)")
    for ours in CONVENTIONS:
        errors = {p: forward_error((p, 0, (224, 224), False), VIT_S, convention=ours) for p in CONVENTIONS}
        print(f"  {ours:13s}" + "".join(f" {p} {e:.1e}" for p, e in errors.items()))
    assert worst <= 1e-4


def test_line_2_lightly():
    pytest.importorskip("lightly", reason="lightly is the oracle of this test")
    from oracle_lightly import COMPARISONS

    print("\nlargest difference in units of the reference's largest value (limit 1e-5)")
    worst = 0.0
    for name, compare in COMPARISONS.items():
        errors = compare()
        worst = max(worst, *errors.values())
        print(f"  {name}: " + ", ".join(f"{what} {error:.1e}" for what, error in errors.items()))
    assert worst <= 1e-5


def test_line_3_tables():
    tables = {
        "initial distributions, ViT-B/14 at 518": specification.init_table(
            VIT_B, HeadConfig(separate_ibot=True)
        ),
        "parameter groups, ViT-B/14": specification.group_table(),
        "schedules, 125,000 steps of batch 2048": specification.schedule_table(),
        "drop-path": specification.drop_path_table(),
    }
    for title, rows in tables.items():
        specification.show(title, rows)
    assert not [r for rows in tables.values() for r in rows if not r.ok]
