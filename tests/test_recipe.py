import sys

from absl import flags
from ml_collections import config_flags

from configs import vitb14_518
from mammodino_jax.recipe import from_config


def test_unset_fields_take_values_from_the_command_line(monkeypatch):
    argv = ["main", "--config.crops.local_mm=(12.0, 40.0)", "--config.crops.local_coverage=0.6"]
    monkeypatch.setattr(sys, "argv", argv)  # config_flags looks there for the fields to define
    values = flags.FlagValues()
    config_flags.DEFINE_config_dict("config", vitb14_518.get_config(), flag_values=values)
    values(argv)
    crops = from_config(values.config).crops
    assert crops.local_mm == (12.0, 40.0) and crops.rho("local", full=True) == 0.6
    assert crops.global_mm is None and crops.global_coverage is None and crops.rho("global") == 0.8
