"""The losses, as pure functions on arrays; everything here is float32.

B images, V views, K prototypes, D width, R rows, M masked-patch slots an image. Sources: dinov2/loss and
ssl_meta_arch.py (Oquab et al. 2023), MammoDINO (arXiv 2510.11883).
"""

import jax
import jax.numpy as jnp

STUDENT_TEMP = 0.1  # both heads, as in DINOv2
SINKHORN_ITERATIONS = 3  # DINOv2
CELLS = 32  # a side of the maps that slice pairs are compared on


def center_softmax(logits_RK, center_K, temp):
    """Teacher probabilities by centering and sharpening."""
    return jax.nn.softmax((logits_RK - center_K) / temp, axis=-1)


def center_sum(logits_RK, weight_R=None):
    """What a center is moved by: the sum of the teacher's logits [K] over rows, and the number of rows.

    Rows of weight 0 do not count.
    """
    if weight_R is None:
        return logits_RK.sum(axis=0), jnp.float32(len(logits_RK))
    valid = (weight_R > 0).astype(jnp.float32)
    return jnp.matmul(valid, logits_RK, precision="highest"), valid.sum()


def update_center(center_K, sum_K, count, momentum: float = 0.9):
    """Moving mean of the teacher's logits (center_sum), used from the next step on; as it was for no rows."""
    mean = jnp.where(count > 0, sum_K / jnp.maximum(count, 1.0), center_K)
    return momentum * center_K + (1 - momentum) * mean


def sinkhorn(logits_RK, temp, weight_R=None):
    """Teacher probabilities by Sinkhorn-Knopp over all rows of the global batch.

    In the log domain: equal to DINOv2's exp form, which overflows once a logit / temp exceeds 88. Rows of
    weight 0 (empty slots) are left out of the sums and come back with unspecified content.
    """
    log_q = logits_RK / temp
    valid = None if weight_R is None else (weight_R > 0)[:, None]
    for _ in range(SINKHORN_ITERATIONS):
        kept = log_q if valid is None else jnp.where(valid, log_q, -jnp.inf)
        column = jax.nn.logsumexp(kept, axis=0, keepdims=True)
        log_q = log_q - jnp.where(jnp.isfinite(column), column, 0.0)  # no valid row at all: leave as it is
        log_q = log_q - jax.nn.logsumexp(log_q, axis=1, keepdims=True)
    return jnp.exp(log_q)


def cross_entropy(teacher, student_logits):
    """-sum_k t log softmax(s / 0.1) over the last axis; leading axes broadcast."""
    return -jnp.sum(teacher * jax.nn.log_softmax(student_logits / STUDENT_TEMP, axis=-1), axis=-1)


def dino_loss(teacher_BVK, global_BVK, local_BLK):
    """DINO over all pairs of a teacher view and another student view.

    Args:
      teacher_BVK: probabilities of the 2 global views.
      global_BVK, local_BLK: student logits of the 2 global and L local views.

    Returns:
      (global term, local term); both are divided by all 2 + 2L pairs, so they add up.
    """
    locals_ = local_BLK.shape[1]
    pairs = 2 + 2 * locals_
    swapped = cross_entropy(teacher_BVK[:, ::-1], global_BVK).mean(axis=0).sum()
    log_p_BLK = jax.nn.log_softmax(local_BLK / STUDENT_TEMP, axis=-1)
    local = (
        -jnp.einsum("bvk,blk->", teacher_BVK, log_p_BLK, precision="highest") / teacher_BVK.shape[0]
        if locals_
        else 0.0
    )
    return swapped / pairs, local / pairs


def ibot_loss(teacher_BMK, student_BMK, weight_BM):
    """Cross-entropy of masked patches: a view's masked patches weigh 1/count; mean over all 2B views.

    The plain statement of the term: training computes it in chunks (patch_loss.py); tests compare them.
    """
    views = 2 * weight_BM.shape[0]
    return jnp.sum(cross_entropy(teacher_BMK, student_BMK) * weight_BM) / views


def adjacent_loss(teacher_ASK, student_ASK):
    """DINO-adj: student CLS of slice k against teacher CLS of slice k±d, mean over pairs (and directions)."""
    return cross_entropy(teacher_ASK, student_ASK).mean()


def koleo_loss(x_BD, group: int = 0, patient_B=None):
    """Kozachenko-Leonenko spread of one view's CLS tokens (dinov2/loss/koleo_loss.py).

    Args:
      x_BD: CLS tokens before the head.
      group: consecutive rows among which the nearest neighbour is sought; 0 is the global batch.
      patient_B: rows of the same patient are not neighbours (they would fight DINO-adj); None compares all.

    Returns:
      (loss, share of nearest neighbours that would have been of the same patient).
    """
    x_BD = x_BD.astype(jnp.float32)  # neighbours differ by less than half precision resolves
    B = x_BD.shape[0]
    group = group or B
    # sqrt of a floored square: jnp.linalg.norm has a NaN gradient at 0
    norm = jnp.sqrt(jnp.maximum(jnp.sum(x_BD * x_BD, axis=1, keepdims=True), 1e-16))
    x_GRD = (x_BD / norm).reshape(B // group, group, -1)
    similarity = jnp.einsum("grd,gsd->grs", x_GRD, x_GRD, precision="highest")
    similarity = jnp.where(jnp.eye(group, dtype=bool), -1.0, jax.lax.stop_gradient(similarity))
    same_share = 0.0
    weight = jnp.ones(x_GRD.shape[:2])
    if patient_B is not None:
        patient = patient_B.reshape(B // group, group)
        same = (patient[:, :, None] == patient[:, None, :]) & ~jnp.eye(group, dtype=bool)
        nearest = similarity.argmax(axis=-1)[..., None]
        same_share = jnp.take_along_axis(same, nearest, axis=-1).mean()
        similarity = jnp.where(same, -2.0, similarity)
        others = jnp.any(
            ~same & ~jnp.eye(group, dtype=bool), axis=-1
        )  # a row without any other patient does not count
        weight = others.astype(jnp.float32)
    nearest = similarity.argmax(axis=-1)
    neighbour = jax.vmap(lambda x, i: x[i])(x_GRD, nearest)
    distance = jnp.sqrt(jnp.sum((x_GRD - neighbour + 1e-8) ** 2, axis=-1))
    spread_G = jnp.sum(-jnp.log(distance + 1e-8) * weight, axis=1) / jnp.maximum(weight.sum(axis=1), 1.0)
    return spread_G.mean(), same_share


def entropies(probs_RK):
    """Entropy of each row, in units of ln K: 1 is uniform, 0 is one prototype."""
    return -jnp.sum(probs_RK * jnp.log(jnp.maximum(probs_RK, 1e-30)), axis=-1) / jnp.log(probs_RK.shape[-1])


def entropy(probs_RK):
    """Mean of `entropies`."""
    return entropies(probs_RK).mean()


def prototype_use(probs_RK):
    """How unevenly the rows of a batch use the prototypes.

    Returns:
      KL divergence of the batch-mean probabilities from uniform, in units of ln K (1: all rows on one
      prototype), and the share of prototypes whose mean probability is under a hundredth of 1 / K.
    """
    K = probs_RK.shape[-1]
    mean_K = probs_RK.mean(axis=0)
    return 1 - entropy(mean_K[None]), jnp.mean(mean_K < 0.01 / K)


def _unit(x):
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-24))


def cosine(x, y):
    """Cosine of vectors along the last axis, float32."""
    return jnp.sum(_unit(x) * _unit(y), axis=-1)


def mean_cosine(x_BD):
    """Mean cosine between different rows: 1 where all are alike. NaN for a single row."""
    x_BD, B = _unit(x_BD), len(x_BD)
    total = jnp.sum(x_BD.sum(axis=0) ** 2) - jnp.sum(x_BD * x_BD)
    return total / (B * (B - 1)) if B > 1 else jnp.float32(jnp.nan)


def pair_gap(one_AD, other_AD):
    """Cosine of each pair minus the mean cosine of its first half with the other pairs' second halves, [A].

    At most one pair of a volume is in a batch, so the second is across volumes; NaN for a single pair.
    """
    A = len(one_AD)
    if A == 1:
        return jnp.full(1, jnp.nan)
    cos_AA = jnp.matmul(_unit(one_AD), _unit(other_AD).T, precision="highest")
    within = jnp.diagonal(cos_AA)
    return within - (cos_AA.sum(axis=1) - within) / (A - 1)


def compare_pairs(one_ASS, other_ASS):
    """How alike the two slices of a pair are in content and place.

    Args:
      one_ASS, other_ASS: uint8 crops, background 0.

    Returns:
      Normalised cross-correlation over their common tissue [A], and the shift between them [A]: the place of
      the peak of their cross-correlation, the larger of |dy| and |dx|, as a share of the side. Both from maps
      of 32 x 32 cells; NaN where the common tissue has no contrast.
    """

    def to_cells(x_ASS):
        return jax.image.resize(x_ASS.astype(jnp.float32), (len(x_ASS), CELLS, CELLS), "linear")

    def centred(x_ACC, where):
        mean = x_ACC.sum((1, 2), keepdims=True, where=where) / jnp.maximum(
            where.sum((1, 2), keepdims=True), 1
        )
        return (x_ACC - mean) * where

    tissue = [to_cells(x > 0) for x in (one_ASS, other_ASS)]
    # the mean of the tissue in a cell, so that an outline is not taken for content
    grey = [to_cells(x) / jnp.maximum(t, 1e-3) for x, t in zip((one_ASS, other_ASS), tissue, strict=True)]
    tissue = [t > 0.5 for t in tissue]
    a, b = (centred(g, tissue[0] & tissue[1]) for g in grey)
    power = jnp.sqrt(jnp.sum(a * a, (1, 2)) * jnp.sum(b * b, (1, 2)))
    seen = power > CELLS**2  # a contrast of one grey level and more
    ncc = jnp.sum(a * b, (1, 2)) / jnp.maximum(power, 1.0)

    padded = (2 * CELLS, 2 * CELLS)
    one, other = (jnp.fft.rfft2(centred(g, t), padded) for g, t in zip(grey, tissue, strict=True))
    peak = jnp.fft.irfft2(one * other.conj(), padded).reshape(len(a), -1).argmax(axis=1)
    away = jnp.stack(jnp.divmod(peak, 2 * CELLS))
    shift = jnp.minimum(away, 2 * CELLS - away).max(axis=0) / CELLS
    return jnp.where(seen, ncc, jnp.nan), jnp.where(seen, shift, jnp.nan)
