import re

import pytest

from benchmarks import scaling


def test_layouts():
    found = scaling.layouts([1, 2, 4, 8], [1, 2])
    assert found[0] == {"devices": 1, "processes": 1, "mesh": "data"}
    assert len(found) == 7 + 6  # one device has no fsdp mesh, and two processes no single device


@pytest.mark.slow
def test_two_devices_do_the_work_of_one(tmp_path):
    output = tmp_path / "scaling.md"
    scaling.main(
        [
            "--recipe",
            "nano_42",
            "--devices",
            "1,2",
            "--processes",
            "1",
            "--steps",
            "2",
            "--output",
            str(output),
        ]
    )
    rows = re.findall(
        r"^\| 1 \| (\d) \| (data|fsdp) \| (\d+) \|.* ([+-]\d+) % \| ([\d.]+) \|$", output.read_text(), re.M
    )
    assert [row[:3] for row in rows] == [("1", "data", "4"), ("2", "data", "8"), ("2", "fsdp", "8")]
    assert rows[0][3] == "+0"
    assert rows[1][4] == rows[2][4]  # the same loss on either mesh
