"""Mammo-CLIP's image tower (Ghosh et al., MICCAI 2024, arXiv 2405.12255): EfficientNet-B5 or B2, frozen.

Its authors build it from lukemelas/EfficientNet-PyTorch: names are those of that state dict. Batch
normalisation uses its stored statistics, so it is folded into the convolution before it.
"""

import functools
import math
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from mammodino_jax.convert.foreign import check, made_for, tensors
from mammodino_jax.encoder import Encoder
from mammodino_jax.errors import UserError

MEAN, STD = (0.3089279,), (0.25053555408335154,)  # base.mean and base.std of the authors' configuration
STAGES = [  # (blocks, kernel, stride of the first, expansion, channels) of EfficientNet-B0, arXiv 1905.11946
    (1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192), (1, 3, 1, 6, 320),
]  # fmt: skip
VARIANTS = {2048: (1.6, 2.2, 456), 1408: (1.1, 1.2, 260)}  # features: width, depth, image side; B5, B2
STRIDE = 32  # pixels a cell of the last feature map covers


class MammoClip(Encoder):
    """An encoder without a ViT: patches are the cells of the last feature map, cls is their mean.

    Every image is first scaled to its own minimum and maximum, as its authors do.
    """

    patch_size = STRIDE

    @property
    def dim(self) -> int:
        return len(self.params["_conv_head"]["bias"])

    def __call__(self, images, sizes=None) -> dict[str, jax.Array]:
        """As Encoder's, but images are not padded to whole patches."""
        images = np.asarray(images)
        sizes = np.broadcast_to(images.shape[1:] if sizes is None else sizes, (len(images), 2))
        params, rows, whole = self._placed
        splits = len(images) % len(rows.device_set) == 0
        images, sizes = jax.device_put((images, sizes), rows if splits else whole)
        return _encode(params, images, sizes, self.dim, self.mean[0], self.std[0])


def read(path: Path) -> MammoClip:
    """The image tower of a checkpoint.

    Args:
      path: the authors' .tar (a torch file: {"model": state dict, "config": ..., ...}), or safetensors with
        the same names, with or without "image_encoder." before them.

    Raises:
      UserError: unreadable, or no EfficientNet-B5 or B2 in those names.
    """
    named = tensors(path)
    tower = {n.removeprefix("image_encoder."): a for n, a in named.items() if n.startswith("image_encoder.")}
    tower = {n: a for n, a in (tower or named).items() if not n.endswith("num_batches_tracked")}
    head = tower.get("_conv_head.weight", np.empty(0)).shape
    if head[0] not in VARIANTS:
        raise UserError(
            f"{path}: image_encoder._conv_head.weight has {head[0] or 'no'} features, expected "
            f"{' or '.join(map(str, VARIANTS))}: Mammo-CLIP's EfficientNet-B5 and B2 load, in the names of "
            f"EfficientNet-PyTorch; first names there: {', '.join(list(named)[:3])}"
        )
    check(path, tower, shapes(head[0]), "; give the authors' file, or all of its image_encoder.*")
    params = {conv: _folded(tower, conv, norm) for conv, norm, _ in _layers(head[0])}
    made = made_for("mammoclip")
    return MammoClip(path.stem, None, params, MEAN, STD, kind="mammoclip", made_for=made, side=1520)


def _blocks(features: int) -> list[tuple[int, int, int, int, int]]:
    """(kernel, stride, expansion, channels in, channels out) of each block, by EfficientNet's scaling."""
    width, depth, _ = VARIANTS[features]
    blocks, inputs = [], _channels(32, width)
    for number, kernel, stride, expansion, channels in STAGES:
        for i in range(math.ceil(number * depth)):
            outputs = _channels(channels, width)
            blocks.append((kernel, 1 if i else stride, expansion, inputs, outputs))
            inputs = outputs
    return blocks


def _channels(base: int, width: float) -> int:
    """`base` scaled, to the nearest multiple of 8 that is not more than 10 % less."""
    scaled = base * width
    rounded = max(8, int(scaled + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * scaled else rounded


def _layers(features: int) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """(convolution, its batch normalisation or "", shape of its weight [out, in, h, w]) in order."""
    blocks = _blocks(features)
    yield "_conv_stem", "_bn0", (blocks[0][3], 3, 3, 3)
    for i, (kernel, _, expansion, inputs, outputs) in enumerate(blocks):
        wide, at = inputs * expansion, f"_blocks.{i}."
        squeezed = max(1, inputs // 4)
        if expansion > 1:
            yield f"{at}_expand_conv", f"{at}_bn0", (wide, inputs, 1, 1)
        yield f"{at}_depthwise_conv", f"{at}_bn1", (wide, 1, kernel, kernel)
        yield f"{at}_se_reduce", "", (squeezed, wide, 1, 1)
        yield f"{at}_se_expand", "", (wide, squeezed, 1, 1)
        yield f"{at}_project_conv", f"{at}_bn2", (outputs, wide, 1, 1)
    yield "_conv_head", "_bn1", (features, blocks[-1][4], 1, 1)


def shapes(features: int) -> dict[str, tuple[int, ...]]:
    """{name: shape} of the tower's tensors."""
    out = {}
    for conv, norm, weight in _layers(features):
        leaves = ("weight", "bias", "running_mean", "running_var") if norm else ("bias",)
        out |= {f"{conv}.weight": weight} | {f"{norm or conv}.{leaf}": weight[:1] for leaf in leaves}
    return out


def _folded(tower: dict[str, np.ndarray], conv: str, norm: str) -> dict[str, np.ndarray]:
    """Kernel [h, w, in, out] and bias of a convolution with the batch normalisation that follows it."""
    kernel, bias = tower[f"{conv}.weight"].astype(np.float64), tower[f"{norm or conv}.bias"]
    if norm:
        scale = tower[f"{norm}.weight"] / np.sqrt(tower[f"{norm}.running_var"].astype(np.float64) + 1e-3)
        kernel, bias = kernel * scale[:, None, None, None], bias - tower[f"{norm}.running_mean"] * scale
    return {"kernel": kernel.transpose(2, 3, 1, 0).astype(np.float32), "bias": bias.astype(np.float32)}


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def _encode(params, images_BHW, sizes_B2, features: int, mean: float, std: float):
    """{"cls": [B, D], "patches": [B, N, D]} of uint8 images that fill sizes_B2 of the canvas.

    What lies beyond an image is zeroed before every convolution that reaches there, as padding would be.
    """
    sizes, side = sizes_B2, VARIANTS[features][2]

    def inside(x):
        (rows, cols), (height, width) = map(jnp.arange, x.shape[1:3]), jnp.unstack(sizes, axis=1)
        within = (rows < height[:, None])[:, :, None] & (cols < width[:, None])[:, None, :]
        return within.reshape(*within.shape, *[1] * (x.ndim - 3))

    def mean_inside(x):
        return (x * inside(x)).sum(axis=(1, 2), keepdims=True) / sizes.prod(axis=1)[:, None, None, None]

    def strided(x, layer, convolve, kernel: int, stride: int):
        nonlocal sizes, side
        pad = _padding(side, kernel, stride)
        x = jax.nn.silu(convolve(x * inside(x), layer["kernel"], stride, pad) + layer["bias"])
        sizes, side = (sizes + sum(pad) - kernel) // stride + 1, -(-side // stride)
        return x

    def pointwise(x, layer):
        return x @ layer["kernel"][0, 0] + layer["bias"]

    x = images_BHW.astype(jnp.float32)
    low = x.min(axis=(1, 2), keepdims=True, where=inside(x), initial=255)
    high = x.max(axis=(1, 2), keepdims=True, where=inside(x), initial=0)
    x = ((x - low) / jnp.maximum(high - low, 1) - mean) / std
    with jax.default_matmul_precision("highest"):  # features must not depend on the device
        x = strided(jnp.repeat(x[..., None], 3, axis=-1), params["_conv_stem"], _dense, 3, 2)
        for i, (kernel, stride, expansion, inputs, outputs) in enumerate(_blocks(features)):
            block = {k.rpartition(".")[2]: v for k, v in params.items() if k.startswith(f"_blocks.{i}.")}
            y = jax.nn.silu(pointwise(x, block["_expand_conv"])) if expansion > 1 else x
            y = strided(y, block["_depthwise_conv"], _depthwise, kernel, stride)
            gate = jax.nn.silu(pointwise(mean_inside(y), block["_se_reduce"]))
            y = pointwise(y * jax.nn.sigmoid(pointwise(gate, block["_se_expand"])), block["_project_conv"])
            x = x + y if stride == 1 and inputs == outputs else y
        x = jax.nn.silu(pointwise(x, params["_conv_head"]))
    return {"cls": mean_inside(x)[:, 0, 0], "patches": x.reshape(len(x), -1, features)}


def _padding(side: int, kernel: int, stride: int) -> tuple[int, int]:
    """TensorFlow's "same" padding of an image of `side`.

    EfficientNet-PyTorch fixes it for the side of ImageNet's images, whatever is fed: at 1520 x 912 the
    padding is that of 456 x 456, which is not "same".
    """
    total = max((-(-side // stride) - 1) * stride + kernel - side, 0)
    return total // 2, total - total // 2


def _dense(x_BHWC, kernel, stride: int, pad: tuple[int, int]):
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x_BHWC, kernel, [stride] * 2, [pad] * 2, dimension_numbers=numbers)


def _depthwise(x_BHWC, kernel, stride: int, pad: tuple[int, int]):
    """A sum of shifted images: on a CPU 3 to 15 times as fast as XLA's grouped convolution."""
    x, side = jnp.pad(x_BHWC, ((0, 0), pad, pad, (0, 0))), len(kernel)
    rows, cols = (n - side + 1 for n in x.shape[1:3])
    taps = ((i, j) for i in range(side) for j in range(side))
    return sum(kernel[i, j, 0] * x[:, i : i + rows : stride, j : j + cols : stride] for i, j in taps)
