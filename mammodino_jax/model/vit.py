"""Vision transformer of DINOv2; attribute names are those of its PyTorch modules, so weights convert by name.

B batch rows, T tokens, N patches, D width, H heads, C channels.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mammodino_jax.sharding import gathered, over_rows

normal_02 = nnx.initializers.normal(0.02)  # DINOv2's trunc_normal_ cuts at 100 sigma: a plain normal


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """Shape of the backbone. Defaults: ViT-B/14 as in the paper (arXiv 2510.11883)."""

    dim: int = 768
    depth: int = 12
    heads: int = 12
    mlp_ratio: float = 4.0
    ffn: str = "mlp"  # mlp | swiglu: DINOv2's ViT-g
    patch_size: int = 14
    image_size: int = 518  # side in pixels of the images that size pos_embed
    channels: int = 3
    registers: int = 0
    layerscale: float = 1e-5
    drop_path: float = 0.0  # share of rows that skip a residual branch in training
    pos_antialias: bool = (
        True  # (True, 0.0) for new training and registers; hub without registers: (False, 0.1);
    )
    pos_offset: float = 0.0  # Hugging Face without registers: (False, 0.0)
    remat: str = "none"  # what the backward pass computes again: see REMAT
    scan: bool = False  # blocks as one compiled loop: one is compiled instead of `depth`
    attention: str = "auto"  # xla | cudnn: see attend
    dtype: str = "float32"  # of activations; parameters are always float32

    @property
    def grid(self) -> int:
        return self.image_size // self.patch_size


# Recomputed in the backward pass, from most memory to least. cuDNN's attention never keeps probabilities.
REMAT = {
    "none": None,
    "attention": None,  # attention scores and probabilities only (in attend)
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # all but the linear layers
    "block": jax.checkpoint_policies.nothing_saveable,  # everything but the input of each block
}


@functools.lru_cache(maxsize=64)
def resize_matrix(n_in: int, n_out: int, antialias: bool, offset: float) -> np.ndarray:
    """1-D bicubic resampling as PyTorch's F.interpolate does it, as a matrix.

    Args:
      n_in, n_out: grid sizes.
      antialias: torch's antialias=True (a = -0.5, support grows with the shrink factor).
      offset: DINOv2's 0.1, which enters the coordinate transform by scale_factor = (n_out + offset) / n_in.

    Returns:
      float32 [n_out, n_in], rows sum to 1.
    """
    scale = n_in / (n_out + offset)
    a, stretch = (-0.5, max(scale, 1.0)) if antialias else (-0.75, 1.0)
    matrix = np.zeros((n_out, n_in))
    for row in range(n_out):
        center = (row + 0.5) * scale - 0.5
        taps = np.arange(math.floor(center - 2 * stretch), math.ceil(center + 2 * stretch) + 1)
        x = np.abs(taps - center) / stretch
        near = ((a + 2) * x - (a + 3)) * x * x + 1
        far = a * (((x - 5) * x + 8) * x - 4)
        weights = np.where(x < 1, near, np.where(x < 2, far, 0.0))
        if antialias:  # taps outside the grid are dropped, the rest renormalised
            weights = np.where((taps >= 0) & (taps < n_in), weights, 0.0)
        np.add.at(matrix[row], np.clip(taps, 0, n_in - 1), weights / weights.sum())
    return matrix.astype(np.float32)


def own_grids(c: ViTConfig, sizes_B2, height: int, width: int) -> tuple[np.ndarray, ...]:
    """What images need that fill only a part of a canvas, from its upper left corner.

    Args:
      sizes_B2: height and width in pixels that each image takes.
      height, width: of the canvas in pixels, multiples of the patch size.

    Returns:
      y f32 [B, rows, side] and x f32 [B, cols, side], which resample the trained positions to each image's
      own grid (0 beyond it), and bool [B, N], the patches that the image reaches.
    """
    rows, cols = height // c.patch_size, width // c.patch_size
    own_B2 = -(-np.asarray(sizes_B2) // c.patch_size)
    y = np.zeros((len(own_B2), rows, c.grid), np.float32)
    x = np.zeros((len(own_B2), cols, c.grid), np.float32)
    for i, (r, s) in enumerate(own_B2.tolist()):
        trained = (r, s) == (c.grid, c.grid)  # is not resampled, whatever the offset
        y[i, :r] = np.eye(r) if trained else resize_matrix(c.grid, r, c.pos_antialias, c.pos_offset)
        x[i, :s] = np.eye(s) if trained else resize_matrix(c.grid, s, c.pos_antialias, c.pos_offset)
    inside = (np.arange(n) < own_B2[:, i, None] for i, n in enumerate((rows, cols)))
    return y, x, np.einsum("by,bx->byx", *inside).reshape(len(own_B2), -1)


def layer_norm(dim: int, dtype: str, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """LayerNorm of DINOv2, with the variance about the mean as PyTorch takes it.

    flax's default, mean of squares minus squared mean, loses digits where the mean is large.
    """
    return nnx.LayerNorm(dim, epsilon=1e-6, use_fast_variance=False, dtype=dtype, rngs=rngs)


class PatchEmbed(nnx.Module):
    def __init__(self, c: ViTConfig, rngs: nnx.Rngs):
        bound = 1 / math.sqrt(c.channels * c.patch_size**2)  # torch's Conv2d default, weight and bias

        def uniform(key, shape, dtype=jnp.float32):
            return jax.random.uniform(key, shape, dtype, -bound, bound)

        p = (c.patch_size, c.patch_size)
        self.proj = nnx.Conv(
            c.channels, c.dim, p, strides=p, padding="VALID", kernel_init=uniform, bias_init=uniform,
            dtype=c.dtype, rngs=rngs,
        )  # fmt: skip

    def __call__(self, x):
        return self.proj(x)


def attend(q_BTHd, k_BTHd, v_BTHd, real_BT=None, implementation: str = "auto", remat: bool = False):
    """Softmax attention, [B, T, H, d].

    Args:
      real_BT: bool, tokens to look at; None: all.
      implementation: "xla" (scores of all pairs of tokens in memory), "cudnn" (flash attention, on NVIDIA
        GPUs in half precision, without real_BT) or "auto": cudnn where it can be used.
      remat: compute xla's scores again in the backward pass instead of keeping them, as cudnn always does.
    """
    half = q_BTHd.dtype in (jnp.bfloat16, jnp.float16) and real_BT is None and q_BTHd.shape[-1] % 8 == 0
    if implementation == "auto":
        implementation = "cudnn" if half and jax.default_backend() == "gpu" else "xla"
    if implementation == "cudnn" and real_BT is None:
        return _cudnn(q_BTHd, k_BTHd, v_BTHd)
    mask = None if real_BT is None else real_BT[:, None, None]
    attention = functools.partial(jax.nn.dot_product_attention, mask=mask, implementation="xla")
    return (jax.checkpoint(attention) if remat else attention)(q_BTHd, k_BTHd, v_BTHd)


def _cudnn(q_BTHd, k_BTHd, v_BTHd):
    """Flash attention. JAX does not differentiate it at odd T (224 px: 257): a token is added, and hidden."""
    B, T = q_BTHd.shape[:2]
    if T % 2 == 0:
        return jax.nn.dot_product_attention(q_BTHd, k_BTHd, v_BTHd, implementation="cudnn")
    padded = (jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) for x in (q_BTHd, k_BTHd, v_BTHd))
    real_B = jnp.full(B, T, jnp.int32)
    return jax.nn.dot_product_attention(
        *padded, query_seq_lengths=real_B, key_value_seq_lengths=real_B, implementation="cudnn"
    )[:, :T]


class Attention(nnx.Module):
    def __init__(self, c: ViTConfig, rngs: nnx.Rngs):
        self.heads, self.implementation, self.remat = c.heads, c.attention, c.remat == "attention"
        self.qkv = nnx.Linear(c.dim, 3 * c.dim, kernel_init=normal_02, dtype=c.dtype, rngs=rngs)
        self.proj = nnx.Linear(c.dim, c.dim, kernel_init=normal_02, dtype=c.dtype, rngs=rngs)

    def __call__(self, x_BTD, real_BT=None):
        B, T, D = x_BTD.shape
        q, k, v = jnp.unstack(self.qkv(x_BTD).reshape(B, T, 3, self.heads, D // self.heads), axis=2)
        return self.proj(attend(q, k, v, real_BT, self.implementation, self.remat).reshape(B, T, D))


class Mlp(nnx.Module):
    def __init__(self, c: ViTConfig, rngs: nnx.Rngs):
        hidden = int(c.dim * c.mlp_ratio)
        self.fc1 = nnx.Linear(c.dim, hidden, kernel_init=normal_02, dtype=c.dtype, rngs=rngs)
        self.fc2 = nnx.Linear(hidden, c.dim, kernel_init=normal_02, dtype=c.dtype, rngs=rngs)

    def __call__(self, x):
        return self.fc2(jax.nn.gelu(self.fc1(x), approximate=False))


class SwiGLU(nnx.Module):
    """DINOv2's SwiGLUFFNFused: two thirds of the MLP's width, rounded up to a multiple of 8."""

    def __init__(self, c: ViTConfig, rngs: nnx.Rngs):
        hidden = (int(int(c.dim * c.mlp_ratio) * 2 / 3) + 7) // 8 * 8
        self.w12 = nnx.Linear(c.dim, 2 * hidden, kernel_init=normal_02, dtype=c.dtype, rngs=rngs)
        self.w3 = nnx.Linear(hidden, c.dim, kernel_init=normal_02, dtype=c.dtype, rngs=rngs)

    def __call__(self, x):
        gate, up = jnp.split(self.w12(x), 2, axis=-1)
        return self.w3(jax.nn.silu(gate) * up)


class LayerScale(nnx.Module):
    def __init__(self, c: ViTConfig):
        self.gamma = nnx.Param(
            jnp.full((c.dim,), c.layerscale, jnp.float32)
        )  # a weak type would compile twice

    def __call__(self, x):
        return x * self.gamma[...].astype(x.dtype)


def residual(x_BTD, branch, key, rate: float, group: int, *others, mesh=None):
    """x + branch(x, *others); in training the branch runs on a random subset of each group of rows only.

    DINOv2's batch-subset stochastic depth: of every `group` consecutive rows, int(group * (1 - rate)) are
    drawn (at least one), and their branch is scaled by group / drawn. The size is static: compute is saved.
    `others` are arrays [B, ...] that the branch needs of the same rows.
    """
    if key is None or rate == 0.0:
        return x_BTD + branch(x_BTD, *others)
    B, T, D = x_BTD.shape
    group = group or B
    keep = max(int(group * (1 - rate)), 1)
    x_GRTD = x_BTD.reshape(B // group, group, T, D)
    rows_GS = jax.vmap(lambda k: jax.random.permutation(k, group)[:keep])(jax.random.split(key, B // group))
    drawn = jax.vmap(lambda x, rows: x[rows])(over_rows(x_GRTD, mesh), rows_GS)
    flat_S = (jnp.arange(0, B, group)[:, None] + rows_GS).ravel()
    y = branch(over_rows(drawn.reshape(-1, T, D), mesh), *(a[flat_S] for a in others))
    y_GSTD = over_rows(y.reshape(drawn.shape) * (group / keep), mesh)
    x_GRTD = jax.vmap(lambda x, rows, y: x.at[rows].add(y))(x_GRTD, rows_GS, y_GSTD)
    return over_rows(x_GRTD.reshape(B, T, D), mesh)


class Block(nnx.Module):
    def __init__(self, c: ViTConfig, rngs: nnx.Rngs):
        self.rate = c.drop_path
        self.norm1 = layer_norm(c.dim, c.dtype, rngs)
        self.attn = Attention(c, rngs)
        self.ls1 = LayerScale(c)
        self.norm2 = layer_norm(c.dim, c.dtype, rngs)
        self.mlp = {"mlp": Mlp, "swiglu": SwiGLU}[c.ffn](c, rngs)
        self.ls2 = LayerScale(c)

    def __call__(self, x_BTD, key=None, group: int = 0, real_BT=None, mesh=None):
        keys = (None, None) if key is None else jax.random.split(key)
        mask = () if real_BT is None else (real_BT,)

        def attend(x, *real):
            return self.ls1(self.attn(self.norm1(x), *real))

        def feed_forward(x):
            return self.ls2(self.mlp(self.norm2(x)))

        x_BTD = residual(x_BTD, attend, keys[0], self.rate, group, *mask, mesh=mesh)
        return residual(x_BTD, feed_forward, keys[1], self.rate, group, mesh=mesh)


class ViT(nnx.Module):
    """DINOv2's vision transformer (facebookresearch/dinov2 `DinoVisionTransformer`)."""

    def __init__(self, c: ViTConfig, rngs: nnx.Rngs):
        self.c = c
        self.patch_embed = PatchEmbed(c, rngs)
        tiny = nnx.initializers.normal(1e-6)
        self.cls_token = nnx.Param(tiny(rngs.params(), (1, 1, c.dim)))
        if c.registers:
            self.register_tokens = nnx.Param(tiny(rngs.params(), (1, c.registers, c.dim)))
        self.pos_embed = nnx.Param(normal_02(rngs.params(), (1, 1 + c.grid**2, c.dim)))
        self.mask_token = nnx.Param(jnp.zeros((1, c.dim)))
        self.blocks = nnx.List([Block(c, rngs) for _ in range(c.depth)])
        self.norm = layer_norm(c.dim, "float32", rngs)  # features are float32

    def positions(self, rows: int, cols: int):
        """Position embeddings [1, 1 + rows*cols, D], resampled in float32 from the trained grid."""
        pos, grid = self.pos_embed[...], math.isqrt(self.pos_embed.shape[1] - 1)
        if (rows, cols) == (grid, grid):
            return pos
        y = resize_matrix(grid, rows, self.c.pos_antialias, self.c.pos_offset)
        x = resize_matrix(grid, cols, self.c.pos_antialias, self.c.pos_offset)
        patches = jnp.einsum("yi,xj,ijd->yxd", y, x, pos[0, 1:].reshape(grid, grid, -1), precision="highest")
        return jnp.concatenate([pos[:, :1], patches.reshape(1, rows * cols, -1)], axis=1)

    def own_positions(self, y_BRs, x_BSs):
        """Position embeddings [B, 1 + R*S, D] of images with grids of their own (own_grids)."""
        pos, side = self.pos_embed[...], self.c.grid
        trained = pos[0, 1:].reshape(side, side, -1)
        patches = jnp.einsum("byi,bxj,ijd->byxd", y_BRs, x_BSs, trained, precision="highest")
        B, rows, cols, D = patches.shape
        cls = jnp.broadcast_to(pos[:, :1], (B, 1, D))
        return jnp.concatenate([cls, patches.reshape(B, rows * cols, D)], axis=1)

    def _run_blocks(self, x_BTD, key, group: int, real_BT, mesh):
        """All blocks, one after the other or as the body of a loop (`scan`); drop-path keys by number."""
        c = self.c

        def body(graph, x, layer):
            i, params = layer
            block_key = None if key is None else jax.random.fold_in(key, i)
            block = nnx.merge(graph, gathered(params, mesh))
            return block(over_rows(x, mesh), block_key, group, real_BT, mesh), None

        def stack(*layers):
            # matrices in the dtype that the layers would cast them to: half the copy
            return jnp.stack([a.astype(c.dtype) if a.ndim > 1 else a for a in layers])

        if c.remat in ("dots", "block"):  # what a loop computes twice is not merged anyway
            body = jax.checkpoint(body, policy=REMAT[c.remat], prevent_cse=not c.scan, static_argnums=0)
        graphs, params = zip(*(nnx.split(block) for block in self.blocks), strict=True)
        if c.scan:
            layers = jnp.arange(c.depth), jax.tree.map(stack, *params)
            return jax.lax.scan(functools.partial(body, graphs[0]), x_BTD, layers)[0]
        for layer in enumerate(params):
            x_BTD, _ = body(graphs[layer[0]], x_BTD, layer)
        return x_BTD

    def __call__(self, images, mask=None, key=None, group: int = 0, grids=None, mesh=None):
        """Encode images.

        Args:
          images: float [B, H, W, C], normalised; H and W multiples of the patch size.
          mask: bool [B, N], patches (row-major) that are replaced by the mask token; None masks nothing.
          key: random key of drop-path; None evaluates.
          group: rows that share one drop-path draw; 0 is all of them.
          grids: of own_grids, where images fill only a part of the canvas: the features of each are those
            of the image alone.
          mesh: over whose devices the images lie; None: one device, or as XLA sees fit.

        Returns:
          {"cls": [B, D], "patches": [B, N, D]}, both after the final norm.
        """
        c = self.c
        B, height, width, _ = images.shape
        if height % c.patch_size or width % c.patch_size:
            raise ValueError(
                f"image size {height}x{width} is not a multiple of the patch size {c.patch_size}"
            )
        x = over_rows(self.patch_embed(over_rows(images, mesh)), mesh)
        rows, cols = x.shape[1:3]
        x = x.reshape(B, rows * cols, c.dim)
        if mask is not None:  # before the position embedding, as in DINOv2
            x = jnp.where(mask[..., None], self.mask_token[...].astype(x.dtype), x)
        cls = jnp.broadcast_to(self.cls_token[...].astype(x.dtype), (B, 1, c.dim))
        positions = self.positions(rows, cols) if grids is None else self.own_positions(*grids[:2])
        x = jnp.concatenate([cls, x], axis=1) + positions.astype(x.dtype)
        real = None
        if grids is not None:
            real = jnp.pad(grids[2], ((0, 0), (1 + c.registers, 0)), constant_values=True)
        if c.registers:  # they get no position
            registers = jnp.broadcast_to(self.register_tokens[...].astype(x.dtype), (B, c.registers, c.dim))
            x = jnp.concatenate([x[:, :1], registers, x[:, 1:]], axis=1)
        x = self._run_blocks(x, key, group, real, mesh)
        out = self.norm(x)
        first = 1 + c.registers
        return {"cls": out[:, 0], "patches": out[:, first:]}


def cls_attention(model: ViT, images, grids=None):
    """Attention of the CLS token to the patches in the last block, f32 [B, H, N].

    What is left to 1 goes to itself and to the registers. Arguments as of ViT; `model` is of no other use
    afterwards.
    """
    a, seen = model.blocks[-1].attn, []

    class Watched(nnx.Module):
        def __call__(self, x_BTD, real_BT=None):
            B, T, D = x_BTD.shape
            q, k, _ = jnp.unstack(a.qkv(x_BTD).reshape(B, T, 3, a.heads, D // a.heads), axis=2)
            scores = jnp.einsum("bhd,bthd->bht", q[:, 0], k) / math.sqrt(D // a.heads)
            if real_BT is not None:
                scores = jnp.where(real_BT[:, None], scores, -jnp.inf)
            seen.append(jax.nn.softmax(scores.astype(jnp.float32), axis=-1))
            return a(x_BTD, real_BT)

    model.blocks[-1].attn = Watched()
    model.c = dataclasses.replace(model.c, scan=False)  # the last block is no longer like the others
    model(images, grids=grids)
    return seen[0][:, :, 1 + model.c.registers :]
