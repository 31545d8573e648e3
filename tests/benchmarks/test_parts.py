import json

import pytest

from benchmarks import parts


@pytest.mark.slow
def test_parts_add_up(tmp_path, capsys):
    output = tmp_path / "parts.md"
    parts.main(["--recipe", "nano_42", "--batch", "4", "--steps", "2", "--output", str(output)])
    found = json.loads(output.with_suffix(".json").read_text())
    assert sum(found["parts"].values()) == pytest.approx(found["step"])
    assert sum(found["flops"]["parts"].values()) == pytest.approx(found["flops"]["model_per_image"])
    assert all(seconds > 0 for name, seconds in found["parts"].items() if name != "heads and losses")
    assert "share of the step" in output.read_text()
