"""One mesh ("data", "fsdp"), one rule for where arrays lie."""

import functools

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from mammodino_jax.errors import UserError

ROWS = P(("data", "fsdp"))  # a batch's first axis lies over all devices
MIN_BYTES = 4 * 2**20  # smaller arrays are replicated: gathering them costs more than it saves


def make_mesh(fsdp: int = 1) -> jax.sharding.Mesh:
    """All devices as [devices / fsdp, fsdp]; fsdp > 1 shards large parameters that many ways."""
    devices = jax.device_count()
    if fsdp < 1 or devices % fsdp:
        raise UserError(f"config.fsdp = {fsdp} does not divide the {devices} devices")
    # in process order, which jax.make_mesh need not keep: process p feeds rows p*b..(p+1)*b-1 of a batch
    order = sorted(jax.devices(), key=lambda d: (d.process_index, d.id))
    grid = np.array(order).reshape(devices // fsdp, fsdp)
    return jax.sharding.Mesh(grid, ("data", "fsdp"), axis_types=(AxisType.Auto, AxisType.Auto))


def state_shardings(abstract, mesh):
    """Shardings of a state tree: the largest axis that fsdp divides, of arrays of 4 MiB and more."""

    def rule(x):
        fsdp = mesh.shape["fsdp"]
        spec = [None] * x.ndim
        if fsdp > 1 and x.size * x.dtype.itemsize >= MIN_BYTES:
            axes = [a for a in range(x.ndim) if x.shape[a] % fsdp == 0]
            if axes:
                spec[max(axes, key=lambda a: x.shape[a])] = "fsdp"
        return NamedSharding(mesh, P(*spec))

    return jax.tree.map(rule, abstract)


def put_batch(batch: dict[str, np.ndarray], mesh) -> dict[str, jax.Array]:
    """This process's rows of a global batch as arrays over all devices."""
    rows = NamedSharding(mesh, ROWS)
    return jax.tree.map(functools.partial(jax.make_array_from_process_local_data, rows), batch)


def spread_rows(tree, mesh):
    """Lay the second axis of [micro-batches, rows, ...] arrays over a mesh's devices (None: one device)."""
    if mesh is None:
        return tree
    rows = NamedSharding(mesh, P(None, *ROWS))
    return jax.lax.with_sharding_constraint(tree, jax.tree.map(lambda _: rows, tree))
