"""The plan: what it reads of a compiled step, what it says of a batch, and that the step sends little."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from tiny import shrink, tiny, tiny_dataset

from configs import nano, vitb14_518, vitl14
from mammodino_jax import hlo, plan
from mammodino_jax.data.pipeline import make_batches
from mammodino_jax.errors import UserError
from mammodino_jax.flops import CHIPS, GIB
from mammodino_jax.recipe import from_config
from mammodino_jax.sharding import make_mesh
from mammodino_jax.train import abstract_batch

REPO = Path(__file__).resolve().parents[1]
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu (pip install .[tpu]), but no TPU"
)

# As TPU and CPU compilers write it: a loop whose length is in its condition, one whose length is noted.
TEXT = """HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  ROOT %sum = f32[]{:T(128)} add(%a, %a)
}

%condition (p: (s32[], f32[64,16])) -> pred[] {
  %limit = s32[]{:T(128)} constant(12)
  %p = (s32[]{:T(128)}, f32[64,16]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %less = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

%body (q: (s32[], f32[64,16])) -> (s32[], f32[64,16]) {
  %q = (s32[]{:T(128)}, f32[64,16]{1,0:T(8,128)}) parameter(0)
  %n = s32[]{:T(128)} get-tuple-element(%q), index=0
  %x = f32[64,16]{1,0:T(8,128)} get-tuple-element(%q), index=1
  %all-reduce.1 = (f32[64,16]{1,0:T(8,128)}, /*index=1*/bf16[8]{0:T(128)(2,1)S(1)}) all-reduce(%x, %n), channel_id=1, replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}, to_apply=%add, metadata={op_name="jit(step)/while/body/sum"}
  %y = f32[64,16]{1,0:T(8,128)} get-tuple-element(%all-reduce.1), index=0
  ROOT %t = (s32[]{:T(128)}, f32[64,16]{1,0:T(8,128)}) tuple(%n, %y)
}

ENTRY %main (p0: f32[64,16]) -> f32[64,16] {
  %p0 = f32[64,16]{1,0:T(8,128)} parameter(0), sharding={replicated}
  %zero = s32[]{:T(128)} constant(0)
  %t0 = (s32[]{:T(128)}, f32[64,16]{1,0:T(8,128)}) tuple(%zero, %p0)
  %w1 = (s32[]{:T(128)}, f32[64,16]{1,0:T(8,128)}) while(%t0), condition=%condition, body=%body
  %w2 = (s32[]{:T(128)}, f32[64,16]{1,0:T(8,128)}) while(%w1), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %z = f32[64,16]{1,0:T(8,128)} get-tuple-element(%w2), index=1
  %all-gather-start.1 = (f32[64,16]{1,0:T(8,128)}, f32[512,16]{1,0:T(8,128)}) all-gather-start(%z), channel_id=2, replica_groups=[1,8]<=[8], dimensions={0}
  %all-gather-done.1 = f32[512,16]{1,0:T(8,128)} all-gather-done(%all-gather-start.1)
  ROOT %out = f32[64,16]{1,0:T(8,128)} slice(%all-gather-done.1), slice={[0:64], [0:16]}
}
"""


def test_collectives_count_as_often_as_their_loop_runs():
    program = hlo.parse(TEXT)
    five, twelve, gather = sorted(
        hlo.collectives(program, chips=8), key=lambda c: (c.kind != "all-reduce", c.times)
    )
    assert (five.times, twelve.times, gather.times) == (5, 12, 1)
    assert five.group == 4 and gather.group == 8 and five.where == "jit(step)/while/body/sum"
    assert five.bytes == 64 * 16 * 4 + 8 * 2 and gather.bytes == 512 * 16 * 4
    assert twelve.sent == 12 * twelve.bytes * 2 * 3 / 4 and gather.sent == gather.bytes * 7 / 8
    assert [a.hbm for a in five.arrays] == [True, False]


def test_memory_traffic_counts_loops_and_slices():
    """XLA's own count of a loop-free program; a loop n times that of its body, slices of its input once."""

    def body(x, w):
        return jnp.tanh(x @ w), None

    x, w = jnp.ones((256, 256)), jnp.ones((10, 256, 256))
    one = jax.jit(lambda x, w: body(x, w[0])[0]).lower(x, w[:1]).compile()
    many = jax.jit(lambda x, w: jax.lax.scan(body, x, w)[0]).lower(x, w).compile()
    once = hlo.hbm_bytes(hlo.parse(one.as_text()))
    assert once == pytest.approx(one.cost_analysis()["bytes accessed"], rel=0.35)
    loop = hlo.hbm_bytes(hlo.parse(many.as_text()))
    assert 0.8 * 10 * once < loop < 2 * 10 * once


@pytest.mark.parametrize(
    "changes", [{}, dict(pairs=dict(mode="reuse")), dict(dbt_rows=0), dict(crops=dict(local_mm=(20.0, 40.0)))],
    ids=str,
)  # fmt: skip
def test_the_abstract_batch_is_a_real_one(tmp_path, changes):
    r = from_config(tiny(tiny_dataset(tmp_path / "data"), **changes))
    batches = make_batches(
        r.data, r.crops, r.mask, r.pairs, batch_size=r.batch_size, dbt_rows=r.dbt_rows, steps=1, seed=0
    )
    real = {name: (x.shape, x.dtype) for name, x in next(batches).items()}
    assert {name: (x.shape, x.dtype) for name, x in abstract_batch(r, make_mesh()).items()} == real


def collective(kind, *shape, times=1):
    return hlo.Collective(kind, (hlo.Array("f32", shape, True),), times, 8, "here")


def test_large_collectives_are_named_and_gradients_are_not():
    c = vitb14_518.get_config()
    c.batch_size, c.dbt_rows = 8, 2
    one = from_config(c)
    found = plan.large(
        [
            collective("all-gather", 128, 1369, 768),
            collective("all-to-all", 8 * 2, 1369, 768),
            collective("all-gather", 16, 65_536),
            collective("all-reduce", 65_536, 256),
            collective("all-reduce", 12, 768, 3072),
            collective("all-reduce", 65_536),
            collective("all-gather", 2, 64, 768),
        ],
        one, make_mesh(1, jax.devices()[:1]),
    )  # fmt: skip
    assert [(f["shape"][0], f["as_large_as"]) for f in found] == [
        (128, "patch tokens"),
        (16, "patch tokens"),
        (16, "prototype logits"),
    ]


def test_images_per_chip_keep_the_share_of_volumes():
    c = vitb14_518.get_config()
    r = plan.fit_batch(c, 256, 8)
    assert (r.batch_size, r.dbt_rows) == (2048, 512)
    assert plan.fit_batch(c, 16, None).batch_size == 1024
    with pytest.raises(UserError, match=r"--images-per-chip 6 is not a multiple of 4: .* 256 of .* 1024"):
        plan.fit_batch(c, 16, 6)
    with pytest.raises(UserError, match="is not a multiple of the 96 devices"):
        plan.fit_batch(c, 96, None)
    c.dbt_rows = 0
    assert plan.fit_batch(c, 16, 3).batch_size == 48


def test_warnings():
    c = vitb14_518.get_config()
    assert plan.batch_warnings(plan.fit_batch(c, 16, 8), 16) == []
    (spans,) = plan.batch_warnings(plan.fit_batch(c, 16, 4), 16)
    assert "drop_path_group 8 does not divide the 4 images of a chip" in spans
    assert "2^31 samples" in plan.batch_warnings(plan.fit_batch(vitl14.get_config(), 256, 16), 256)[0]


def test_the_largest_batch_takes_few_compiles(monkeypatch):
    sizes = []

    def fake(recipe, devices, quick):
        images = recipe.batch_size // len(devices)
        sizes.append(images)
        total = (2 + 0.021 * images + 0.01 * (images > 100)) * GIB
        return {"fits": total <= 16 * GIB, "memory": {"total": total}, "compile_seconds": 0, "n": images}

    @dataclasses.dataclass
    class Device:
        device_kind: str = "TPU v5 lite"

    monkeypatch.setattr(plan, "plan", fake)
    best = plan.largest(vitb14_518.get_config(), [Device()] * 16, quick=False, say=lambda text: None)
    assert best["n"] == 664 and len(sizes) <= 5  # (16 - 2.01) / 0.021 = 666, in eights
    with pytest.raises(UserError, match="the memory of cpu is unknown"):
        plan.largest(vitb14_518.get_config(), [Device("cpu")], quick=False)
    monkeypatch.setattr(
        plan, "plan", lambda *_: fake(plan.fit_batch(vitb14_518.get_config(), 16, 800), [0] * 16, 0)
    )
    with pytest.raises(UserError, match=r"8 images a chip need 18\.8 GiB of 16"):
        plan.largest(vitb14_518.get_config(), [Device()] * 16, quick=False, say=lambda text: None)


def test_what_the_compiler_needed_is_read_from_its_error():
    for text in (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (36.50G) "
        "exceeds available HBM (15.75G).",
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 36.50G of 15.75G hbm. Exceeded hbm "
        "capacity by 20.75G.",
    ):
        assert plan.needed_bytes(text) == 36.5 * GIB
    assert plan.needed_bytes("INTERNAL: Mosaic failed to compile 2 kernels of 3.5G") is None


def test_the_estimate_is_the_roofline_it_says_it_is():
    v5e = CHIPS["TPU v5 lite"]
    s = plan.estimate(v5e, 197e12, 8.19e9, [collective("all-reduce", 50_000_000)])
    assert s["compute"] == 2.0 and s["hbm"] == pytest.approx(0.01)
    assert s["links"] == pytest.approx(2 * 200e6 * 7 / 8 / 200e9)
    assert s["step"] == 2.0 and s["unhidden"] == pytest.approx(sum(s[k] for k in ("compute", "hbm", "links")))


def test_without_libtpu_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"v5e:4x4 is compiled for by libtpu.*pip install .\[tpu\]"):
        plan.topology_devices("v5e:4x4")


@needs_libtpu
def test_unknown_topologies_are_suggested():
    assert len(plan.topology_devices("v5e:16x16")) == 256 and len(plan.topology_devices("v5e:1x1")) == 1
    for name, near in (("v5e:5x5", "v5e:8x8"), ("v5x:16x16", "v5e:16x16"), ("v5p4x4x4", "v5p:4x4x4")):
        with pytest.raises(UserError, match=f'Did you mean "{near}"'):
            plan.topology_devices(name)


def small(tmp_path) -> str:
    """A config file with all that a step can have, and tokens larger than the maps of slice pairs."""
    path = tmp_path / "small.py"
    path.write_text(
        "from tiny import shrink\nfrom configs import nano\n\n\ndef get_config():\n"
        "    c = shrink(nano.get_config('unread'))\n"
        "    c.batch_size, c.dbt_rows = 64, 8\n"
        "    c.crops.global_size = 98\n"
        "    c.model.update(dim=192, heads=3, drop_path=0.2, remat='block', dtype='bfloat16')\n"
        "    c.head.update(prototypes=1000)\n"
        "    c.loss.update(drop_path_group=8, patch_chunk=8)\n"
        "    c.data.sources = ()\n"
        "    return c\n"
    )
    return str(path)


def command(*arguments, devices=8):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    env = {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": f"{REPO}:{REPO}/tests:{REPO}/tests/data"}
    words = [sys.executable, "-m", "mammodino_jax.plan", *map(str, arguments)]
    return subprocess.run(words, env=env, cwd=REPO, capture_output=True, text=True)


def test_bad_flags_are_one_line(tmp_path):
    done = command(f"--config={small(tmp_path)}", "--config.modle.depth=3")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and 'Did you mean "model"' in done.stderr


@pytest.mark.slow
def test_a_plan_for_the_devices_here(tmp_path):
    """8 fake devices: gradients and sums over prototypes are sent, no patch tokens, no logits."""
    done = command(f"--config={small(tmp_path)}", f"--json={tmp_path / 'plan.json'}")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "8 x cpu, mesh data 8 x fsdp 1; batch 64: 8 images a chip" in done.stdout
    report = json.loads((tmp_path / "plan.json").read_text())
    assert report["memory"]["total"] > report["memory"]["temporaries"] > 1e6
    assert report["collectives"]["all-reduce"]["count"] > 5 and report["unknown_loops"] == 0
    assert report["large_collectives"] == [] and report["warnings"] == []


@needs_libtpu
@pytest.mark.slow
def test_a_plan_for_a_tpu(tmp_path):
    c = shrink(nano.get_config("unread"))
    c.model.update(remat="block", dtype="bfloat16", drop_path=0.2)
    c.batch_size, c.fsdp = 16, 2
    c.loss.drop_path_group = 4
    report = plan.plan(from_config(c), plan.topology_devices("v5e:2x2"), quick=True)
    assert report["fits"] and report["chip"] == "TPU v5 lite" and report["mesh"] == {"data": 2, "fsdp": 2}
    assert 0 < report["memory"]["total"] < GIB and report["collectives"]["all-reduce"]["count"] > 5
    assert report["seconds"]["step"] > 0 and report["unknown_loops"] == 0
    text = plan.render(report)
    assert "fits" in text and "Estimate, not measured" in text
