"""Each rule fires on its made-up signature and not on a healthy run; pair figures, held-out figures, dumps."""

import functools
import json
from pathlib import Path

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from failures import FAILURES, phantoms, run
from make_dataset import breast, row, volume, write_dataset

from configs import nano
from mammodino_jax import checkpoint, held_out, metrics
from mammodino_jax import train as training
from mammodino_jax.data.crops import Window
from mammodino_jax.data.pipeline import spread
from mammodino_jax.diagnostics import AWAY, RULES, WINDOW, Watch, start_steps
from mammodino_jax.losses import compare_pairs
from mammodino_jax.metrics import MetricsWriter
from mammodino_jax.recipe import from_config
from mammodino_jax.sharding import make_mesh

BY_NAME = {rule.name: rule for rule in RULES}

LN_K = np.log(1024)
HEALTHY = {
    "bad": 0.0, "contrast": 40.0, "teacher_distance": 0.4, "dino_global": 1.38, "dino_local": 5.6, "teacher_entropy": 0.9, "prototype_kl": 0.002,
    "prototypes_dead": 0.0, "cls_cosine": 0.2, "koleo": 0.5, "koleo_same_patient": 0.1, "loss": 17.0,
    "grad_norm/backbone": 5.0, "pair_ncc": 0.96, "pair_shift": 0.0, "data/global_coverage": 0.9,
    "data/global_fallback": 0.0, "data/local_fallback": 0.0, "data/global_would_reject": 0.12,
    "data/local_would_reject": 0.16, "data/local_spread": 0.85, "data/visible_tissue": 31.0,
    "data/masked_share": 0.29, "held_out/rank": 10.0, "held_out/knn": 0.8,
}  # fmt: skip
SIGNATURES = {
    "not_finite": {"bad": 1.0},
    "uniform_collapse": {"dino_global": LN_K / 5, "dino_local": 4 * LN_K / 5, "teacher_entropy": 1.0},
    "one_prototype": {"prototype_kl": 0.97},
    "identical_features": {"cls_cosine": 0.9999, "koleo": 9.0},
    "dead_prototypes": {"prototypes_dead": 0.8},
    "same_patient_neighbours": {"koleo_same_patient": 0.97},
    "mask_failure": {"data/local_fallback": 0.1},
    "coverage_idle_global": {"data/global_would_reject": 0.005},
    "coverage_idle_local": {"data/local_would_reject": 0.005},
    "flat_images": {"contrast": 0.5},
    "slice_misalignment": {"pair_ncc": 0.2},
    "excessive_masking": {"data/visible_tissue": 4.0, "data/masked_share": 0.6},
    "diverging": {"teacher_distance": 0.9},
}


class Patients:
    """What a Watch asks of a HeldOut."""

    chance, patients = 0.25, 40


def recipe_of(steps=300, **crops):
    config = nano.get_config()
    config.steps = steps
    config.crops.update(crops)
    return from_config(config)


def fired(rows, recipe=None, **arguments) -> list[set]:
    """Names that hold, step by step."""
    watch = Watch(recipe or recipe_of(), held_out=Patients(), **arguments)
    seen = (watch(step, values) for step, values in enumerate(rows))
    return [{k.removeprefix("warning/") for k in out if k.startswith("warning/")} for out in seen]


def test_a_healthy_run_raises_nothing():
    assert set().union(*fired([HEALTHY] * 150)) == set()


@pytest.mark.parametrize("name", SIGNATURES)
def test_each_signature_raises_its_warning_alone(name, caplog):
    with caplog.at_level("WARNING"):
        holding = fired([HEALTHY | SIGNATURES[name]] * 150)
    first = next(step for step, names in enumerate(holding) if names)
    steps = BY_NAME[name].steps
    assert set().union(*holding) == {name} and holding[-1] == {name}
    assert first == (steps - 1 if BY_NAME[name].early else max(steps - 1, start_steps(recipe_of())))
    [line] = [r.message for r in caplog.records]
    assert line.startswith(f"{name} at step {first}: ") and "limit" in line and "Try: " in line


def test_every_rule_has_a_signature():
    assert {rule.name for rule in RULES} == set(SIGNATURES) | {"held_out_fall"}


def test_the_table_in_the_docs_has_every_rule():
    text = (Path(__file__).resolve().parents[1] / "docs/diagnostics.md").read_text()
    for rule in RULES:
        assert f"`{rule.name.replace('_global', '').replace('_local', '')}" in text, rule.name


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("one_prototype", {"teacher_entropy": 0.02}),
        ("one_prototype", {"dino_global": 0.01, "dino_local": 0.03}),
        ("diverging", {"dino_global": 2.5, "dino_local": 10.0}),
        ("identical_features", {"held_out/rank": 1.1}),
        ("mask_failure", {"data/local_spread": 0.1}),
        ("mask_failure", {"data/global_fallback": 0.2}),
        ("mask_failure", {"data/global_coverage": 1.0}),
        ("slice_misalignment", {"pair_shift": 0.2}),
        ("excessive_masking", {"data/masked_share": 0.9}),
    ],
)
def test_other_signs_of_the_same_failure(name, values):
    assert fired([HEALTHY | values] * 60)[-1] == {name}


def test_global_fallbacks_on_full_frames_say_nothing_of_masks():
    watch = Watch(recipe_of(), full=True)
    for step in range(60):
        told = watch(step, HEALTHY | {"data/global_fallback": 0.4, "data/local_fallback": 0.01})
    assert not any(name.startswith("warning/") for name in told)
    for step in range(60, 100):
        told = watch(step, HEALTHY | {"data/local_fallback": 0.2})
    assert "warning/mask_failure" in told


def test_a_warning_is_told_when_it_begins_and_when_it_comes_back(caplog):
    wrong = HEALTHY | SIGNATURES["slice_misalignment"]
    short = [HEALTHY] * WINDOW
    rows = [*[wrong] * 40, *short, *[wrong] * 40, *[HEALTHY] * (AWAY + 2 * WINDOW), *[wrong] * 40]
    with caplog.at_level("WARNING"):
        fired(rows)
    assert [r.message.split(":")[0] for r in caplog.records] == [
        "slice_misalignment at step 19", "slice_misalignment at step 249",
    ]  # fmt: skip


def test_one_odd_step_is_no_warning():
    odd = HEALTHY | {"pair_ncc": 0.0, "data/local_fallback": 0.1, "koleo": 12.0, "cls_cosine": 1.0}
    assert set().union(*fired([*[HEALTHY] * 50, odd, *[HEALTHY] * 50])) == set()


def test_a_score_that_falls_to_chance_is_told():
    scores = [0.8, 0.82, 0.3, 0.28]
    rows = [HEALTHY | {"held_out/knn": scores[step // 25]} for step in range(100)]
    holding = fired(rows)
    assert holding[60] == set()  # one low look is not enough
    assert holding[99] == {"held_out_fall"}
    steady = [HEALTHY | {"held_out/knn": (0.4, 0.27)[step > 50]} for step in range(100)]
    assert set().union(*fired(steady)) == set()  # too little lead over chance to lose


def test_a_resumed_run_goes_on_as_if_not_stopped(caplog):
    """Rows of metrics.jsonl fill the window; what was told is not told again; the first score is kept."""
    wrong = HEALTHY | SIGNATURES["mask_failure"]
    watch, rows = Watch(recipe_of()), []
    for step in range(30):
        rows.append({"step": step, **watch(step, wrong)})
    caplog.clear()
    with caplog.at_level("WARNING"):
        again = Watch(recipe_of(), past=rows)
        assert again(30, wrong)["warning/mask_failure"] == 1.0
    assert not caplog.records
    sparse = [{"step": step, **HEALTHY} for step in range(0, 1000, 50)]
    assert "warning/mask_failure" not in Watch(recipe_of(), past=sparse)(1000, wrong)


@pytest.mark.parametrize(
    ("shares", "steps", "crops", "told"),
    [
        ([0.01] + [0.005] * 98, 300, {}, False),  # not yet 100 steps
        ([0.01, float("nan")] + [0.005] * 200, 300, {}, True),
        ([0.0] * 30, 30, {}, True),  # a run shorter than what is watched
        ([0.03] * 30, 30, {}, False),
        ([0.0] * 29 + [0.7], 30, {}, False),  # the mean counts
        ([0.0] * 30, 30, {"global_coverage": 0.4}, True),
        ([0.0] * 30, 30, {"global_coverage": 0.0}, False),  # switched off on purpose
    ],
)
def test_a_rho_that_rejects_nothing_is_told_once(caplog, shares, steps, crops, told):
    rows = [HEALTHY | {"data/global_would_reject": share} for share in shares]
    with caplog.at_level("WARNING"):
        fired(rows, recipe_of(steps, **crops))
    assert caplog.text.count("crops.global_coverage (rho) does nothing") == told


def test_new_warnings_and_looks_have_a_line_in_the_metrics(tmp_path):
    config = nano.get_config()
    config.run.log_every = 50
    writer = MetricsWriter(tmp_path, 0, from_config(config))
    for step in range(60):
        more = {"warning/mask_failure": 1.0} if step >= 7 else {}
        more |= {"held_out/rank": 3.0} if step == 30 else {}
        writer.write(step, {"loss": 1.0, "teacher_entropy": 1.0, "bad": 0.0, **more})
    writer.close()
    assert [r["step"] for r in metrics.read(tmp_path / "metrics.jsonl")] == [0, 7, 30, 50]


# --- figures


def textured(seed, side=98):
    return np.stack([breast(side, side, seed + i) for i in range(3)])


@pytest.mark.parametrize("shift", [(0, 0), (0, 20), (-20, 0), (14, -31)])
def test_pairs_shifted_by_a_known_amount(shift):
    one, (dy, dx) = textured(0), shift
    other = np.zeros_like(one)
    ys, xs = (slice(max(d, 0), 98 + min(d, 0)) for d in shift)
    yo, xo = (slice(max(-d, 0), 98 + min(-d, 0)) for d in shift)
    other[:, ys, xs] = one[:, yo, xo]
    ncc, found = compare_pairs(one, other)
    np.testing.assert_allclose(found, max(abs(dy), abs(dx)) / 98, atol=1 / 32)
    assert (np.asarray(ncc) > 0.99).all() if shift == (0, 0) else np.mean(ncc) < 0.5


def test_pairs_of_other_images_and_without_contrast():
    assert abs(np.mean(compare_pairs(textured(0), textured(10))[0])) < 0.3
    flat = np.where(textured(0) > 0, 90, 0).astype(np.uint8)
    assert np.isnan(compare_pairs(flat, flat)).all()
    brighter = (textured(0) * 0.7 + 20 * (textured(0) > 0)).astype(np.uint8)
    assert (np.asarray(compare_pairs(textured(0), brighter)[0]) > 0.97).all()


def test_local_spread_is_one_for_free_windows_and_zero_at_one_place():
    rng = np.random.default_rng(0)

    def windows(place):
        return [
            Window(*place(h, w), h, w, False, 1.0, False, False)
            for h, w in rng.integers(20, 60, (4, 2)).tolist()
        ]

    free = [
        spread(windows(lambda h, w: rng.integers(0, [201 - h, 151 - w]).tolist()), (200, 150)) ** 2
        for _ in range(2000)
    ]
    assert np.mean(free) == pytest.approx(1, abs=0.03)
    assert spread(windows(lambda h, w: [(200 - h) // 2, (150 - w) // 2]), (200, 150)) < 0.02
    full = [Window(0, 0, 50, 40, False, 1.0, False, False)] * 3
    assert np.isnan(spread(full, (50, 40)))


def test_effective_rank_of_known_spectra():
    rng = np.random.default_rng(0)
    basis, _ = np.linalg.qr(rng.normal(size=(64, 64)))
    for rank in (1, 5, 20):
        x = basis[:, :rank] @ np.linalg.qr(rng.normal(size=(32, 32)))[0][:rank]
        x -= x.mean(axis=0) if rank == 1 else 0
        assert held_out.effective_rank(x + 7.0) == pytest.approx(rank, rel=0.03)
    assert held_out.effective_rank(np.ones((10, 4))) == 0


def test_knn_leaves_the_own_patient_out():
    """Features that tell patients apart but not classes score at chance, those that tell classes do not."""
    rng = np.random.default_rng(0)
    patient = np.repeat(np.arange(40), 4)
    label = (patient % 2).astype(np.int64)
    identity = np.eye(40)[patient] * 10 + rng.normal(size=(160, 40)) * 0.1
    told = np.stack([label * 2.0 - 1, rng.normal(size=160) * 0.1], axis=1)
    assert held_out.knn(told, label, patient) == 1
    assert held_out.knn(identity, label, patient) < 0.7
    label[:4] = -1
    assert held_out.knn(told, label, patient) == 1


def test_retrieval_looks_outside_the_own_volume():
    patient = np.array([0, 0, 0, 1, 1, 2])
    volume = np.array([0, 0, 1, 2, 3, 4])
    x = np.array([[1, 0], [1, 0.01], [0.9, -0.1], [-1, 0.2], [-1, 0.25], [0, 1.0]])
    assert held_out.retrieval(x, patient, volume) == 1
    assert held_out.retrieval(x[[0, 1, 3, 2, 4, 5]], patient, volume) < 1
    assert np.isnan(held_out.retrieval(x, np.arange(6), np.arange(6)))


# --- in a run


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    items = []
    for split, count in (("train", 24), ("val", 12)):
        images = [breast(100, 70, seed) for seed in range(count)]
        items += [(image, row(image, f"{split}{n}", split=split)) for n, image in enumerate(images)]
        for v in range(4):
            items += volume(f"{split}-v{v}", 10, 100, 70, split=split)
    return write_dataset(tmp_path_factory.mktemp("watched") / "data", items)


def tiny(dataset, **changes):
    c = nano.get_config(str(dataset))
    c.batch_size, c.dbt_rows, c.steps = 8, 4, 6
    c.crops.update(global_size=42, local_size=28, local_number=2)
    c.model.update(dim=32, depth=2, heads=2)
    c.head.update(prototypes=64, bottleneck=16, hidden=32)
    c.run.update(checkpoint_every=3, diagnose_every=2)
    c.update(changes)
    return c


def test_looking_changes_nothing_and_says_where(dataset, tmp_path, caplog):
    with caplog.at_level("INFO"):
        watched = training.train(tiny(dataset), tmp_path / "a")
    assert "52 images of 16 patients of split val; patient retrieval" in caplog.text
    blind = training.train(tiny(dataset, run={"diagnose_every": 0}), tmp_path / "b")
    for a, b in zip(jax.tree.leaves(watched), jax.tree.leaves(blind), strict=True):
        np.testing.assert_array_equal(a, b)
    rows = [metrics.read(tmp_path / name / "metrics.jsonl") for name in "ab"]
    assert [r["step"] for r in rows[0] if "held_out/rank" in r] == [0, 2, 4]
    assert {"held_out/cosine", "held_out/cosine_std"} <= rows[0][0].keys()
    assert not any(k.startswith("held_out/") for r in rows[1] for k in r)


def test_held_out_labels_and_other_splits(tmp_path, caplog):
    """The label with most known values whose classes have enough patients; train where there is no val."""
    images = [breast(100, 70, n) for n in range(12)]
    folder = write_dataset(
        tmp_path / "data", [(image, row(image, f"i{n}")) for n, image in enumerate(images)]
    )
    index = pq.read_table(folder / "index.parquet")
    for name, values in (
        ("label_few", [n % 2 if n < 4 else None for n in range(12)]),
        ("label_many", [n % 3 for n in range(12)]),
        ("label_one", [1] * 12),
    ):
        index = index.append_column(name, pa.array(values, pa.int8()))
    pq.write_table(index, folder / "index.parquet")
    with caplog.at_level("INFO"):
        looks = held_out.HeldOut(from_config(tiny(folder, dbt_rows=0)), make_mesh())
    assert "split train; label_many" in caplog.text and "no split val" in caplog.text
    assert looks.chance == pytest.approx(1 / 3) and looks.patients == 12
    assert looks.images.shape == (12, 42, 42)


def test_the_third_bad_step_dumps_batch_and_state_and_keeps_checkpoints(dataset, tmp_path, monkeypatch):
    """NaN from step 4 on: the dump replays to a bad step, and the same command goes on from step 3."""
    make = training.make_batches

    def broken(*args, **options):
        for step, batch in enumerate(make(*args, **options), start=options["start_step"]):
            if step >= 4:
                batch["mask_weight"][:] = np.nan
            yield batch

    monkeypatch.setattr(training, "make_batches", broken)
    config = tiny(dataset, steps=12, run={"checkpoint_every": 4})
    with pytest.raises(FloatingPointError, match=r"steps 4 to 6; .*bad/6, checkpoints are as they were"):
        training.train(config, tmp_path)
    assert checkpoint.steps(tmp_path / "checkpoints") == [4]
    rows = metrics.read(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in rows if "warning/not_finite" in r] == [4, 5, 6]
    batch = dict(np.load(tmp_path / "bad/6/batch-0.npz"))
    recipe = from_config(config)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=here),
        jax.eval_shape(functools.partial(training.init_state, recipe)),
    )
    state = checkpoint.load_dump(tmp_path / "bad/6", abstract)
    assert int(state["step"]) == 7
    assert jax.jit(functools.partial(training.train_step, recipe=recipe))(state, batch)[1]["bad"] == 1
    with pytest.raises(FloatingPointError, match="steps 4 to 6"):  # the dump is replaced
        training.train(config, tmp_path)
    monkeypatch.setattr(training, "make_batches", make)
    assert int(training.train(config, tmp_path)["step"]) == 12
    assert json.loads((tmp_path / "config.json").read_text())["steps"] == 12


@pytest.fixture(scope="module")
def small_phantoms(tmp_path_factory):
    return phantoms(tmp_path_factory.mktemp("phantoms"), patients=10, long_side=128, coarsen=4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", ["healthy", "tiny masks", "pairs of another volume", "tissue mask ratio 0.9"]
)
def test_failures_name_themselves(small_phantoms, case, tmp_path, monkeypatch):
    """Acceptance line 6, small (tests/acceptance/test_learning_failures.py)."""
    config = tiny(small_phantoms, steps=30)
    fired, error = run(config, tmp_path, FAILURES.get(case), monkeypatch, beyond=0)
    assert error is None and set(fired) >= ({FAILURES[case].expected} if case in FAILURES else set())
    assert case in FAILURES or not fired
