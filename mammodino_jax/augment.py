"""Photometric augmentation and normalisation on the device; crops come as grey uint8 from the host.

B images, V views of side S. Background (0) stays 0: a jittered background would tell views apart by its grey.
Hue, saturation and grayscale of DINOv2 do nothing on grey images and are left out.
"""

import dataclasses

import jax
import jax.numpy as jnp

from mammodino_jax.errors import UserError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
    """Strengths for global view 1, global view 2 and the local views, in this order where there are three.

    The paper publishes none. Defaults: mild, without solarize and with at most 0.5 px of blur, because
    DINOv2's blur (up to sigma 2) and solarize teach a model to ignore calcifications.
    """

    jitter_prob: float = 0.8
    brightness: float = 0.2
    contrast: float = 0.2
    gamma: float = 0.2
    blur_prob: tuple[float, float, float] = (0.5, 0.1, 0.5)
    blur_sigma: tuple[float, float] = (0.1, 0.5)
    solarize_prob: tuple[float, float, float] = (0.0, 0.0, 0.0)
    adjacent_jitter: float = (
        0.1  # brightness and contrast of slice pairs, drawn independently for the two slices
    )
    normalise: str = "given"  # mean and std as written; "tissue": train() measures them on the records first
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __post_init__(self):
        if self.normalise not in ("given", "tissue"):
            raise UserError(f'augment.normalise is "{self.normalise}"; expected "given" or "tissue"')


def normalise(x_BVSS, c: AugmentConfig, channels: int):
    """Grey [0, 1] to float32 [..., S, S, C]; channels is 1 (first statistics) or 3."""
    mean, std = jnp.asarray(c.mean[:channels]), jnp.asarray(c.std[:channels])
    return (x_BVSS[..., None] - mean) / std


def _blur(x, sigma, taps: int = 9):
    """Separable Gaussian blur of one view [S, S] with reflected edges; sigma 0 leaves it as it is."""
    offsets = jnp.arange(taps) - taps // 2
    weights = jnp.exp(-0.5 * (offsets / jnp.maximum(sigma, 1e-3)) ** 2)
    weights = weights / weights.sum()
    pad, size = taps // 2, x.shape[0]
    for axis in (0, 1):
        padded = jnp.pad(x, [(pad, pad) if a == axis else (0, 0) for a in (0, 1)], mode="reflect")
        x = sum(weights[i] * jax.lax.dynamic_slice_in_dim(padded, i, size, axis) for i in range(taps))
    return x


def _jitter(x, tissue, key, brightness, contrast, gamma):
    """Brightness factor, contrast about the tissue mean, gamma, each from U(1 - s, 1 + s)."""
    b, c, g = jax.random.uniform(key, (3,), minval=-1.0, maxval=1.0)
    x = jnp.clip(x * (1 + brightness * b), 0, 1)
    mean = jnp.sum(x * tissue) / jnp.maximum(tissue.sum(), 1.0)
    x = jnp.clip((x - mean) * (1 + contrast * c) + mean, 0, 1)
    return jnp.maximum(x, 1e-6) ** (1 + gamma * g) if gamma else x


def photometric(crops_BVSS, sample_B, key, c: AugmentConfig, channels: int, first_view: int):
    """Augment and normalise the crops of a batch.

    Args:
      crops_BVSS: uint8 global crops (first_view 0) or local crops (first_view 2).
      sample_B: int32 sample numbers; with the view number they are all that randomness depends on.
      key: random key of the run and the kind of draw.
      first_view: number of the first view; 0 and 1 are the global ones.

    Returns:
      float32 [B, V, S, S, C].
    """

    def one(crop, sample, view):
        k = jax.random.split(jax.random.fold_in(jax.random.fold_in(key, sample), view), 4)
        role = jnp.minimum(view, 2)
        x = crop.astype(jnp.float32) / 255
        tissue = (crop > 0).astype(jnp.float32)
        jittered = _jitter(x, tissue, k[0], c.brightness, c.contrast, c.gamma)
        draw = jax.random.uniform(k[1], (3,))
        x = jnp.where(draw[0] < c.jitter_prob, jittered, x)
        if any(c.blur_prob):
            sigma = jax.random.uniform(k[2], (), minval=c.blur_sigma[0], maxval=c.blur_sigma[1])
            x = jnp.where(draw[1] < jnp.asarray(c.blur_prob)[role], _blur(x, sigma), x)
        if any(c.solarize_prob):
            solar = jnp.where(x >= 128 / 255, 1 - x, x)
            x = jnp.where(draw[2] < jnp.asarray(c.solarize_prob)[role], solar, x)
        return x * tissue

    views = first_view + jnp.arange(crops_BVSS.shape[1])
    augmented = jax.vmap(lambda crops, sample: jax.vmap(one, (0, None, 0))(crops, sample, views))
    return normalise(augmented(crops_BVSS, sample_B), c, channels)


def photometric_pairs(crops_APSS, sample_A, key, c: AugmentConfig, channels: int):
    """Slice pairs: mild brightness and contrast, drawn for each slice; no blur, no solarize."""

    def one(crop, sample, view):
        k = jax.random.fold_in(jax.random.fold_in(key, sample), view)
        tissue = (crop > 0).astype(jnp.float32)
        x = crop.astype(jnp.float32) / 255
        return _jitter(x, tissue, k, c.adjacent_jitter, c.adjacent_jitter, 0.0) * tissue

    views = jnp.arange(crops_APSS.shape[1])
    augmented = jax.vmap(lambda crops, sample: jax.vmap(one, (0, None, 0))(crops, sample, views))
    return normalise(augmented(crops_APSS, sample_A), c, channels)
