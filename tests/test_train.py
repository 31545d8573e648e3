"""The training loop on a tiny synthetic data set: it learns, resumes, survives bad steps and bad input."""

import functools
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny, tiny_dataset

from mammodino_jax import checkpoint, metrics
from mammodino_jax.data.pipeline import make_batches
from mammodino_jax.encoder import load_encoder
from mammodino_jax.errors import UserError
from mammodino_jax.flops import Chip, step_flops
from mammodino_jax.recipe import from_config
from mammodino_jax.train import init_state, train, train_step

REPO = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return tiny_dataset(tmp_path_factory.mktemp("tiny") / "data")


def rows(workdir) -> list[dict]:
    """Metrics without what varies by run."""
    return [
        {k: v for k, v in r.items() if not k.startswith("time/")}
        for r in metrics.read(workdir / "metrics.jsonl")
    ]


def test_run_writes_metrics_pictures_and_a_loadable_encoder(dataset, tmp_path):
    state = train(tiny(dataset), tmp_path)
    got = rows(tmp_path)
    assert [r["step"] for r in got] == list(range(8))
    for r in got:
        assert all(np.isfinite(list(r.values()))) and r["bad"] == 0
        assert {"dino_global", "dino_local", "ibot", "koleo", "adjacent", "data/global_coverage"} <= r.keys()
    assert {p.name for p in (tmp_path / "samples").iterdir()} == {"crops.png", "pairs.png"}
    timed = metrics.read(tmp_path / "metrics.jsonl")[4:]  # the step is compiled, the pipeline filled
    assert np.median([r["time/data_wait"] for r in timed]) < 0.3
    encoder = load_encoder(str(tmp_path))
    assert encoder.provenance["terms"] == {"test": "synthetic"} and len(encoder.provenance["patients"]) == 50
    for a, b in zip(
        jax.tree.leaves(encoder.params), jax.tree.leaves(state["teacher"]["backbone"]), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    assert encoder(np.zeros((2, 42, 42), np.uint8))["cls"].shape == (2, 32)


def test_mfu_is_logged_where_the_chip_is_known(dataset, tmp_path, monkeypatch):
    recipe = from_config(tiny(dataset, run={"log_every": 1}))
    plain = {"loss": 1.0, "teacher_entropy": 0.5, "bad": 0.0}
    for name, known in (("unknown", None), ("known", Chip(flops=1e12, hbm=1, hbm_rate=1, link_rate=1))):
        monkeypatch.setattr(metrics, "chip", lambda _, known=known: known)
        (tmp_path / name).mkdir()
        writer = metrics.MetricsWriter(tmp_path / name, 0, recipe)
        writer.write(0, plain)
        writer.close()
    assert "time/mfu" not in metrics.read(tmp_path / "unknown/metrics.jsonl")[0]
    (row,) = metrics.read(tmp_path / "known/metrics.jsonl")
    expected = row["time/images_per_s"] * step_flops(recipe)["model_per_image"] / (1e12 * jax.device_count())
    assert row["time/mfu"] == pytest.approx(expected)


def batch_of(recipe, start_step=0):
    return next(
        make_batches(
            recipe.data, recipe.crops, recipe.mask, recipe.pairs, batch_size=recipe.batch_size,
            dbt_rows=recipe.dbt_rows, steps=recipe.steps, seed=recipe.seed, start_step=start_step,
        )
    )  # fmt: skip


def test_a_step_that_is_not_finite_changes_nothing_but_the_step(dataset):
    recipe = from_config(tiny(dataset, loss={"centering": "centering"}))
    state = init_state(recipe)
    bad = {**state, "teacher": jax.tree.map(lambda a: a * jnp.nan, state["teacher"])}
    step = jax.jit(functools.partial(train_step, recipe=recipe))
    new, logged = step(bad, batch_of(recipe))
    assert logged["bad"] == 1 and new["step"] == 1
    for name in ("student", "teacher", "opt", "center"):
        for a, b in zip(jax.tree.leaves(new[name]), jax.tree.leaves(bad[name]), strict=True):
            np.testing.assert_array_equal(a, b)
    good, logged = step(state, batch_of(recipe))
    assert logged["bad"] == 0
    moved = [
        float(jnp.abs(a - b).max())
        for a, b in zip(*map(jax.tree.leaves, (good["center"], state["center"])), strict=True)
    ]
    assert min(moved) > 0


@pytest.mark.parametrize(
    "changes",
    [
        {"dbt_rows": 0},
        {"pairs": {"mode": "reuse"}},
        {"loss": {"centering": "centering"}, "head": {"separate_ibot": True}},
        {
            "model": {
                "drop_path": 0.5,
                "remat": "block",
                "scan": True,
                "registers": 2,
                "channels": 1,
                "dtype": "bfloat16",
            },
            "loss": {"drop_path_group": 4},
        },
    ],
    ids=["no-dbt", "reuse", "centering-separate", "drop-path-remat-registers-grey-bf16"],
)
@pytest.mark.slow
def test_variants_step(dataset, changes):
    recipe = from_config(tiny(dataset, **changes))
    step = jax.jit(functools.partial(train_step, recipe=recipe), donate_argnums=0)
    state = init_state(recipe)
    for i in range(3):
        state, logged = step(state, batch_of(recipe, i))
        assert logged["bad"] == 0
    assert ("adjacent" in logged) == (recipe.dbt_rows > 0)


def test_three_bad_steps_stop_the_run_before_a_checkpoint(dataset, tmp_path):
    c = tiny(dataset)
    c.augment.std = (0.0, 0.0, 0.0)  # divides by zero
    with pytest.raises(FloatingPointError, match="steps 0 to 2"):
        train(c, tmp_path)
    assert checkpoint.steps(tmp_path / "checkpoints") == []


def test_workdir_of_another_config_is_refused(dataset, tmp_path):
    train(tiny(dataset, steps=1), tmp_path)
    with pytest.raises(
        UserError, match=r"belongs to another config: optim.base_lr is 0.006 there and 0.1 here"
    ):
        c = tiny(dataset, steps=1)
        c.optim.base_lr = 0.1
        train(c, tmp_path)
    c = tiny(dataset, steps=1)
    c.run.log_every = 2  # how a run is watched may change
    train(c, tmp_path)


def test_bad_configs_are_named_before_anything_is_written(dataset, tmp_path):
    cases = {
        r"config.loss has no field 'kolo_weight'. Did you mean \"koleo_weight\"": {
            "loss": {"kolo_weight": 1.0}
        },
        r"centering is 'sinkhorm', expected centering or sinkhorn. Did you mean \"sinkhorn\"": {
            "loss": {"centering": "sinkhorm"}
        },
        "10 volumes.* 40|40.*10": {"batch_size": 80, "dbt_rows": 40},
        "does not exist": {"data": {"sources": (("none", "train", ("2d",), 1.0),)}},
    }
    for message, changes in cases.items():
        c = tiny(dataset)
        c.unlock()
        c.update(changes)
        with pytest.raises(UserError, match=message):
            train(c, tmp_path / "w")
        assert not (tmp_path / "w" / "config.json").exists(), message


def test_main_names_a_mistyped_field(tmp_path):
    command = [sys.executable, "main.py", "--config=configs/nano.py:x", f"--workdir={tmp_path}/w"]
    done = subprocess.run([*command, "--config.optim.base_lrr=1"], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 2 and 'Did you mean "base_lr"' in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and not (tmp_path / "w").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"crops": {"patch": 7}}, "patch"),
        ({"crops": {"local_number": 0}}, "local_number is 0"),
        ({"run": {"log_every": 0}}, "log_every is 0"),
        ({"loss": {"drop_path_group": 6}}, "drop_path_group 6 does not divide"),
        ({"loss": {"drop_path_group": 3}}, "drop_path_group 3 is not a multiple of batch_size / dbt_rows 2"),
        ({"crops": {"global_size": 50}}, "multiple of"),
        ({"model": {"remat": "blok"}}, "remat is 'blok'.* Did you mean \"block\""),
        ({"model": {"attention": "cudnn"}}, "cudnn needs dtype bfloat16"),
        ({"loss": {"patch_chunk": -1}}, "patch_chunk is -1"),
        ({"model": {"heads": 3}}, "not a multiple of config.model.heads"),
    ],
)
def test_values_that_do_not_fit_together_are_named(dataset, changes, message):
    values = tiny(dataset).to_dict()  # plain: in a ConfigDict model.patch_size follows crops.patch
    for section, fields in changes.items():
        values[section] |= fields
    with pytest.raises(UserError, match=message):
        from_config(values)


def test_another_fsdp_is_refused_before_writing(dataset, tmp_path):
    with pytest.raises(UserError, match="does not divide the 1 devices"):
        train(tiny(dataset, fsdp=3), tmp_path / "w")
    assert not (tmp_path / "w").exists()


def test_koleo_is_float32_whatever_the_features_are(dataset):
    from mammodino_jax.losses import koleo_loss

    x = jax.random.normal(jax.random.key(0), (16, 32)).astype(jnp.bfloat16)
    assert koleo_loss(x)[0].dtype == jnp.float32
    np.testing.assert_array_equal(koleo_loss(x)[0], koleo_loss(x.astype(jnp.float32))[0])
