"""Heads leave in the formats that others continue from, and come back bit by bit."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from convert.test_pretrained import HEAD, SEPARATE, VIT, same, save_torch, weights, write_workdir
from safetensors.numpy import load_file

from mammodino_jax.convert.foreign import STATISTICS
from mammodino_jax.convert.pretrained import load_pretrained
from mammodino_jax.encoder import load_encoder
from mammodino_jax.errors import UserError
from mammodino_jax.export import main


@pytest.mark.parametrize("head", [HEAD, SEPARATE], ids=["shared", "separate"])
def test_heads_come_back_bit_exact(tmp_path, head):
    torch = pytest.importorskip("torch", reason="writes the checkpoint of PyTorch's training")
    vit, network = write_workdir(tmp_path / "run", head)
    out = tmp_path / "out"
    main(["--workdir", str(tmp_path / "run"), "--format", "hub", "--heads", "--output", str(out)])
    heads = {name: a for name, a in network.items() if not name.startswith("backbone.")}
    written = load_file(out / "heads.safetensors")
    assert written.keys() == heads.keys() and "dino_head.last_layer.weight_g" in written
    # our own way: configs/continue.py:OUT,heads=OUT/heads.safetensors
    same(load_pretrained(str(out), str(out / "heads.safetensors"), vit, head), network)
    # Meta's: its training writes "teacher" and reads "model" (student.pretrained_weights)
    meta = str(out / "teacher_checkpoint.pth")
    same(load_pretrained(f"hub:{meta}", meta, vit, head), network)
    # and they leave again, from the folder and from Meta's file alone; the backbone starts without them
    (tmp_path / "meta.pth").write_bytes(Path(meta).read_bytes())
    for i, spec in enumerate((str(out), f"hub:{out}", f"hub:{tmp_path / 'meta.pth'}")):
        again = tmp_path / f"again{i}"
        main(["--encoder", spec, "--format", "hub", "--heads", "--output", str(again)])
        assert all((a == heads[n]).all() for n, a in load_file(again / "heads.safetensors").items())
        assert load_file(again / "heads.safetensors").keys() == heads.keys()
    assert load_pretrained(str(out), "", vit, head).keys() == {"backbone"}
    state = torch.load(out / "teacher_checkpoint.pth", weights_only=True)
    assert state.keys() == {"teacher", "model"} and state["teacher"].keys() == network.keys()
    assert {f"backbone.{name}" for name in state["model"]} | heads.keys() == network.keys()
    for name, a in state["model"].items():
        np.testing.assert_array_equal(a, network[f"backbone.{name}"], err_msg=name)
    size = sum(a.nbytes for a in network.values())
    assert (out / "teacher_checkpoint.pth").stat().st_size < 1.2 * size + 50_000  # the backbone is there once
    assert "continue.py:out,heads=out/heads.safetensors" in (out / "README.md").read_text()


def test_heads_of_a_checkpoint_of_others_are_kept(tmp_path):
    network = weights(VIT, HEAD)
    spec = "dbt-dino:" + save_torch(tmp_path / "t.pth", network, wrap="teacher")
    main(["--encoder", spec, "--format", "hub", "--heads", "--output", str(tmp_path / "out")])
    out, (mean, std) = tmp_path / "out", STATISTICS["dbt-dino"]
    same(load_pretrained(str(out), str(out / "heads.safetensors"), VIT, HEAD, mean, std), network)
    assert load_encoder(str(tmp_path / "out")).vit == load_encoder(spec).vit


def test_without_pytorch_heads_are_written_all_the_same(tmp_path, monkeypatch, caplog):
    write_workdir(tmp_path / "run", HEAD)
    monkeypatch.setitem(sys.modules, "torch", None)
    main(
        ["--workdir", str(tmp_path / "run"), "--format", "hub", "--heads", "--output", str(tmp_path / "out")]
    )
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert "heads.safetensors" in names and "teacher_checkpoint.pth" not in names
    assert "no teacher_checkpoint.pth" in caplog.text
    about = json.loads((tmp_path / "out/mammodino.json").read_text())
    assert about["provenance"] == {"sources": [["x"]]}


def test_an_encoder_without_heads_says_so(tmp_path):
    with pytest.raises(
        UserError, match=r"random:nano has no projection heads; training workdirs have, .*hub:FILE"
    ):
        main(["--encoder", "random:nano", "--format", "hub", "--heads", "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
