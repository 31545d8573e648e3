import pytest

from configs import nano
from mammodino_jax.metrics import WATCHED, MetricsWriter
from mammodino_jax.recipe import from_config


def written(tmp_path, shares, steps=300, **crops):
    """What is logged when so large shares of free global crops would be rejected, step by step."""
    config = nano.get_config()
    config.steps = steps
    config.crops.update(crops)
    writer = MetricsWriter(tmp_path, 0, from_config(config))
    for step, share in enumerate(shares):
        rejected = {"data/global_would_reject": share, "data/local_would_reject": 0.3}
        writer.write(step, {"loss": 1.0, "teacher_entropy": 1.0, "bad": 0, **rejected})
    writer.close()


def test_a_rho_that_rejects_nothing_is_told_once(tmp_path, caplog):
    with caplog.at_level("WARNING"):
        written(tmp_path, [0.01, float("nan")] + [0.005] * (WATCHED - 3))
        assert not caplog.text
        written(tmp_path, [0.01] + [0.005] * (2 * WATCHED))
    assert caplog.text.count("it does nothing on these records") == 1
    assert "crops.global_coverage (rho) would reject 0.5 %" in caplog.text and "at its default" in caplog.text


@pytest.mark.parametrize(
    ("shares", "crops", "warned"),
    [
        ([0.0] * 30, {}, True),  # a run shorter than what is watched
        ([0.03] * 30, {}, False),
        ([0.0] * 29 + [0.7], {}, False),  # the mean counts
        ([0.0] * 30, {"global_coverage": 0.4}, True),
        ([0.0] * 30, {"global_coverage": 0.0}, False),  # switched off on purpose
    ],
)
def test_when_it_is_told(tmp_path, caplog, shares, crops, warned):
    with caplog.at_level("WARNING"):
        written(tmp_path, shares, steps=30, **crops)
    assert ("does nothing" in caplog.text) == warned
