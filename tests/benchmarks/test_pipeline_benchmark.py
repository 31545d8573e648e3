import pytest

from benchmarks import pipeline


@pytest.mark.slow
def test_quick_report_has_every_stage_and_the_peer(tmp_path):
    pytest.importorskip("torchvision", reason="the peer of this benchmark")
    output = tmp_path / "table.md"
    pipeline.main(["--quick", "--output", str(output)])
    text = output.read_text()
    assert text.startswith("## Host pipeline")
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    table = {row[0]: row[1:] for row in rows}
    stages = [
        "draw records",
        "read",
        "decode",
        "integral image, windows",
        "2 crops of 518 px",
        "8 crops of 98 px",
    ]
    assert all(float(table[stage][0]) > 0 for stage in [*stages, "mask", "**whole, pairs for 1/4**"])
    ours, theirs, ratio = map(float, table["geometry, from decoded arrays"])
    assert ratio == pytest.approx(theirs / ours, rel=0.02) and ratio > 2
    assert float(table["2 processes"][2]) > 0
    assert str(tmp_path) not in text
