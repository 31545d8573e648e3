import dataclasses
import json

import jax
import pytest

from benchmarks import train_step
from benchmarks.jax_step import recipe_of, synthetic_batch
from mammodino_jax.flops import step_flops
from mammodino_jax.model.vit import ViT
from mammodino_jax.sharding import make_mesh
from mammodino_jax.train import abstract_batch, init_state
from mammodino_jax.train import train_step as our_step


def case(recipe: str, **changes) -> dict:
    return {"recipe": recipe, "batch": 4, "dtype": "float32", "remat": "none", **changes}


def test_batch_is_like_the_loaders():
    recipe = recipe_of(case("nano"))
    batch, expected = synthetic_batch(recipe), abstract_batch(recipe, make_mesh())
    assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
        k: (v.shape, v.dtype) for k, v in expected.items()
    }
    patches = (recipe.crops.global_size // 14) ** 2
    assert set(batch["mask_index"].ravel() // patches) == {0, 1}  # both views are masked somewhere
    assert all(len(set(row // patches)) == 1 for row in batch["mask_index"])  # but one of an image


@pytest.mark.slow
def test_peer_sees_the_same_images(monkeypatch):
    torch_step = pytest.importorskip(
        "benchmarks.torch_step", exc_type=ImportError, reason="needs torch and timm"
    )
    recipe = recipe_of(case("nano_42"))
    seen, call = [], ViT.__call__

    def watch(self, images, *args, **kwargs):
        seen.append(images.shape)
        return call(self, images, *args, **kwargs)

    monkeypatch.setattr(ViT, "__call__", watch)
    batch = synthetic_batch(recipe)
    jax.eval_shape(lambda s, b: our_step(s, b, recipe=recipe), init_state(recipe), batch)
    peer = torch_step.Step(recipe, "cpu")
    first = float(peer(torch_step.tensors(batch, "cpu")))
    assert sorted((B, H, W, C) for B, C, H, W in peer.seen.values()) == sorted(seen)
    for _ in range(5):
        last = float(peer(torch_step.tensors(batch, "cpu")))
    assert last < first  # it learns the batch


@pytest.mark.parametrize("name", ["vits14_98", "vits14_518", "vitb14_518", "vitl14_224"])
def test_peer_does_the_same_work(name):
    """Matrix products as torch counts them, at full size on the meta device, are our formula's model FLOPs."""
    torch_step = pytest.importorskip(
        "benchmarks.torch_step", exc_type=ImportError, reason="needs torch and timm"
    )
    from torch.utils.flop_counter import FlopCounterMode

    recipe = recipe_of(case(name))
    recipe = dataclasses.replace(  # every row runs, every slot is in use, as the formula has it
        recipe,
        model=dataclasses.replace(recipe.model, drop_path=0.0),
        mask=dataclasses.replace(recipe.mask, ratio=(0.5, 0.5)),
    )
    batch = {
        name: value.to("meta") for name, value in torch_step.tensors(synthetic_batch(recipe), "cpu").items()
    }
    step = torch_step.Step(recipe, "meta")
    with FlopCounterMode(display=False) as counter:
        step(batch)
    assert counter.get_total_flops() == pytest.approx(step_flops(recipe)["model"], rel=0.01)


@pytest.mark.slow
def test_table_is_consistent(tmp_path, capsys):
    output = tmp_path / "table.md"
    peer = ["--peer", "torch"] if torch_is_here() else []
    train_step.main(
        ["--recipes", "nano_42", "--batch", "4", "--dtype", "float32", "--steps", "2", *peer]
        + ["--seconds", "300", "--output", str(output)]
    )
    rows = json.loads(output.with_suffix(".json").read_text())
    assert [row["step"] for row in rows] == ["ours"] + ["torch"] * bool(peer)
    for row in rows:
        assert "failed" not in row, row
        assert row["images_per_s"] == pytest.approx(4 / row["seconds"])
        assert row["mfu"] == pytest.approx(row["images_per_s"] * row["flops_per_image"] / row["peak_flops"])
        assert row["fastest"] <= row["seconds"] <= row["slowest"]
        assert row["peak_bytes"] > 10e6 and 5 < row["loss"] < 50
    if peer:
        assert rows[0]["ratio"] == pytest.approx(rows[0]["images_per_s"] / rows[1]["images_per_s"])
    text = output.read_text()
    assert "MFU" in text and "Synthetic" in text and str(tmp_path) not in text


def test_without_time_every_row_says_so(capsys):
    train_step.main(
        ["--recipes", "nano,vits14_224", "--remat", "none,block", "--peer", "torch", "--seconds", "0"]
    )
    assert capsys.readouterr().out.count("not run: no time left") == 8


def torch_is_here() -> bool:
    try:
        import benchmarks.torch_step  # noqa: F401
    except ImportError:
        return False
    return True
