"""One mesh ("data", "fsdp"), one rule for where arrays lie."""

import functools

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from mammodino_jax.errors import UserError

ROWS = P(("data", "fsdp"))  # a batch's first axis lies over all devices
MIN_BYTES = 4 * 2**20  # smaller arrays are replicated: gathering them costs more than it saves


def make_mesh(fsdp: int = 1, devices=None) -> jax.sharding.Mesh:
    """All devices, or those given, as [devices / fsdp, fsdp]; fsdp > 1 shards large parameters so many ways.

    Devices lie in process order, and a host's (of several slices, a slice's) are consecutive: parameters are
    gathered within a host where fsdp divides the devices of one, and within a slice where it divides those of
    a slice. The gradients of "data" cross hosts once a step.
    """
    devices = jax.devices() if devices is None else devices
    if fsdp < 1 or len(devices) % fsdp:
        raise UserError(f"config.fsdp = {fsdp} does not divide the {len(devices)} devices; 1 shards nothing")
    # in process order, which jax.make_mesh need not keep: process p feeds rows p*b..(p+1)*b-1 of a batch
    order = sorted(devices, key=lambda d: (d.process_index, d.id))
    grid = np.array(order).reshape(-1, fsdp)
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


def over_rows(x, mesh):
    """Keep axis 0 of activations over all devices, whatever the parameters' sharding suggests to XLA.

    As it is without a mesh, or where the devices do not divide the axis.
    """
    if mesh is None or x.shape[0] % mesh.size:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, ROWS))


def gathered(params, mesh):
    """Parameters whole on every device: FSDP gathers them where they are used, and never the activations."""
    if mesh is None or mesh.shape["fsdp"] == 1:
        return params
    whole = NamedSharding(mesh, P())
    return jax.tree.map(lambda a: jax.lax.with_sharding_constraint(a, whole), params)
