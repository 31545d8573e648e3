"""The recipes: complete, what their options say, and errors that name the mistake."""

import dataclasses
import importlib
import sys

import jax
import pytest
from absl import flags
from ml_collections import config_flags

from configs import ablation, nano, vitb14_518
from mammodino_jax.errors import UserError
from mammodino_jax.recipe import from_config
from mammodino_jax.train import schedule

RECIPES = [
    ("nano", "DATA"), ("vitb14_518", ""), ("vitb14_518", "photometrics=dinov2,data=DATA"),
    ("vits14", "data=DATA"), ("vitl14", ""), ("vitb14_224_518", "224"), ("vitb14_224_518", "518,start=RUN"),
    ("continue", "hub:FILE"), ("continue", "hf:DIR,heads=FILE"), ("continue", "dbt-dino:FILE"),
    *[("small_batch", b) for b in ("16", "32", "64", "128", "256")],
    *[("ablation", f"{name},base=nano") for name in ablation.NAMES], ("ablation", "full"),
    ("sweep", "rho=0.6"), ("sweep", "d=2,base=nano"), ("sweep", "tau=60,data=DATA"),
]  # fmt: skip


def config(name, arg):
    return importlib.import_module(f"configs.{name}").get_config(arg)


@pytest.mark.parametrize(("name", "arg"), RECIPES)
def test_recipes_name_every_field(name, arg):
    """A field left to a default could not be set from the command line, and would not be in config.json."""
    c = config(name, arg).to_dict()
    recipe = from_config(c)
    for field in dataclasses.fields(recipe):
        if dataclasses.is_dataclass(value := getattr(recipe, field.name)):
            assert c[field.name].keys() == {f.name for f in dataclasses.fields(value)}, field.name
    assert ("DATA" in arg) == any("DATA" in source[0] for source in recipe.data.sources)


@pytest.mark.parametrize(
    ("name", "arg", "message"),
    [
        ("vitb14_518", "photometric=dinov2", 'did you mean "photometrics"'),
        ("vitb14_518", "dinov2", "unknown option 'dinov2'"),
        ("vits14", "photometrics=dino", "did you mean"),
        ("ablation", "dino_m", 'did you mean "dino_m_'),
        ("ablation", "full,base=vitb", "base is 'vitb'"),
        ("vitb14_224_518", "518", "start=WORKDIR"),
        ("small_batch", "48", "micro-batch is '48'"),
        ("sweep", "", "needs one of rho"),
        ("sweep", "tau=60", "needs data"),
    ],
)
def test_mistakes_after_the_colon_are_named(name, arg, message):
    with pytest.raises(ValueError, match=message):
        config(name, arg)


def test_photometric_presets_differ_in_what_hides_calcifications():
    mammo, released, intended = (
        from_config(config("vitb14_518", f"photometrics={p}")).augment
        for p in ("mammo", "dinov2", "dinov2_intended")
    )
    assert max(mammo.blur_sigma) <= 0.5 and not any(mammo.solarize_prob)
    # DINOv2's GaussianBlur(p) hands 1 - p to RandomApply: the rates of its released checkpoints
    assert released.blur_prob == tuple(round(1 - p, 6) for p in intended.blur_prob) == (0.0, 0.9, 0.5)
    assert released.blur_sigma == (0.1, 2.0) and released.solarize_prob == (0.0, 0.2, 0.0)


def test_ablations_differ_in_their_terms_alone():
    runs = {name: from_config(config("ablation", f"{name},base=nano")) for name in ablation.NAMES}
    full = runs["full"]
    assert full.crops == from_config(nano.get_config()).crops and full.pairs.mode == "dedicated"
    for name, r in runs.items():
        same = dataclasses.replace(r, crops=full.crops, mask=full.mask, pairs=full.pairs, data=full.data)
        assert same == full, name
        assert r.data == dataclasses.replace(full.data, box="full" if name.endswith("_full") else "tissue")
        free = r.crops.global_coverage == r.crops.local_coverage == 0
        assert free == (name not in ("dino_m_full", "dino_m_box", "full"))
        plain = (r.mask.of, r.mask.strength, r.mask.min_coverage) == ("all", 0, 0)
        assert plain == (name not in ("ibot_m", "full"))
        assert (r.pairs.mode == "none") == (name not in ("adj", "full"))


def test_continuation_is_constant_after_its_ramps_and_short_where_heads_are_known():
    fresh, warm = (from_config(config("continue", a)) for a in ("hub:FILE", "dbt-dino:FILE"))
    assert fresh.init.freeze_steps > 5 * warm.init.freeze_steps
    assert fresh.head.separate_ibot and not warm.head.separate_ibot
    with jax.ensure_compile_time_eval():
        rates = [schedule(fresh, s) for s in (0, 3000, 9999, 10_500, 11_000, 24_999)]
    peak = 2e-4  # at batch 1024
    assert [float(r["body_lr"]) for r in rates[:3]] == [0, 0, 0]
    assert 0.4 < float(rates[3]["body_lr"]) / peak < 0.6
    assert [float(r["body_lr"]) for r in rates[4:]] == pytest.approx([peak, peak])
    assert float(rates[1]["lr"]) == float(rates[-1]["lr"]) == pytest.approx(peak)


def test_continuation_keeps_the_grid_of_its_weights():
    c = config("continue", "hub:FILE")
    c.crops.global_size = 70
    assert from_config(c).model.grid == 37 and not from_config(c).model.pos_antialias
    ours = from_config(config("continue", "RUN"))  # has heads, and the positions of new training
    assert ours.init.freeze_steps == 1000 and ours.head.separate_ibot and ours.model.pos_antialias
    c.optim.final_lr = 1e-6  # constant unless set
    assert from_config(c).optim.final_lr == 1e-6


@pytest.mark.parametrize(
    ("arg", "init", "message"),
    [
        ("", {}, "weights is empty"),
        ("hub:FILE", {"freeze_steps": 25_000}, "must thaw"),
        ("hub:FILE", {"unfreeze_steps": -1}, "negative"),
    ],
)
def test_a_start_that_cannot_be_is_named(arg, init, message):
    c = config("continue", arg)
    c.init.update(init)
    with pytest.raises(UserError, match=message):
        from_config(c)


def test_unset_fields_take_values_from_the_command_line(monkeypatch):
    argv = ["main", "--config.crops.local_mm=(12.0, 40.0)", "--config.crops.local_coverage=0.6"]
    monkeypatch.setattr(sys, "argv", argv)  # config_flags looks there for the fields to define
    values = flags.FlagValues()
    config_flags.DEFINE_config_dict("config", vitb14_518.get_config(), flag_values=values)
    values(argv)
    crops = from_config(values.config).crops
    assert crops.local_mm == (12.0, 40.0) and crops.rho("local", full=True) == 0.6
    assert crops.global_mm is None and crops.global_coverage is None and crops.rho("global") == 0.8
