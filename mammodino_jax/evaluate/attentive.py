"""Attentive probing: learned queries pool the frozen patch tokens, a linear layer classifies what they found.

Cross-attention with constant queries needs no key projection: query and keys' matrix are one vector a head
(efficient probing, Psomas et al. 2025, arXiv 2506.10178); values go into the classifier as they are. That
the probe is trained at many learning rates and weight decays at once, over one reading of the tokens, is as
in V-JEPA 2 (Assran et al. 2025, arXiv 2506.09985).

n items, K cells of an item, D width of the encoder, B items of a batch, G candidates (learning rate, weight
decay), H heads, C classes.
"""

import collections
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from mammodino_jax.evaluate.features import patch_grids
from mammodino_jax.evaluate.items import Items, Rows, units
from mammodino_jax.evaluate.probes import at_prevalence

SIDE = 16  # cells on a side of an image's grid
IMAGES = 4  # of an item at most: those of a standard exam
HEADS = 4
CANDIDATES = tuple(itertools.product((1e-4, 1e-3, 1e-2), (0.01, 1.0)))  # learning rate, weight decay
ROUNDS, PATIENCE = 30, 5  # validations, and how many of them without a better one end the training
UPDATES = 20  # of a round at least; otherwise a round is an epoch
NOTHING = -1e9  # logit of what must get no share


def cells(tokens: np.ndarray, tissue: np.ndarray, side: int = SIDE) -> tuple[np.ndarray, np.ndarray]:
    """Tissue-weighted averages of the patch tokens of an image over at most side x side cells.

    At a long side of 1036 an image has up to 74 x 74 tokens, 8.4 MB in float16 at width 768; its 256 cells
    have 0.4 MB: 7.9 GB for the 20,000 images of VinDr-Mammo, 21.5 GB for the 54,706 of RSNA.

    Args:
      tokens: float16 [gh, gw, D]; tissue: share of each patch [gh, gw].

    Returns:
      float16 [side * side, D], and the mean tissue share of each cell, float32 [side * side]. An axis of no
      more than `side` patches keeps them; cells without tissue, or beyond the grid, are 0.
    """
    (gh, gw), D = tissue.shape, tokens.shape[-1]
    row, column = (np.arange(n) * min(n, side) // n for n in (gh, gw))
    cell = (row[:, None] * side + column).ravel()
    share = tissue.astype(np.float32).ravel()
    weight = np.bincount(cell, share, minlength=side * side)
    total = np.zeros((side * side, D), np.float32)
    np.add.at(total, cell, share[:, None] * tokens.reshape(-1, D).astype(np.float32))
    mean = np.divide(total, weight[:, None], out=total, where=weight[:, None] > 0)
    patches = np.bincount(cell, minlength=side * side)
    return mean.astype(np.float16), (weight / np.maximum(patches, 1)).astype(np.float32)


def item_cells(
    rows: Rows, items: Items, encoder, long_side: int, side: int = SIDE, batch_size: int = 0
) -> tuple[np.ndarray, np.ndarray, int]:
    """Cells of the images of each item beside each other: of the first IMAGES where it has more.

    A volume is one image: its cells are means over its slices, weighted by tissue. Held in memory are what is
    returned and the sums of one volume.

    Returns:
      float16 [n, K, D], tissue shares float32 [n, K] (K = side * side * images of the largest item), and the
      number of images left out.
    """
    unit_of, slot, slices = units(rows), {}, collections.Counter()
    taken = np.zeros(len(items.first), int)
    for i in np.flatnonzero(items.item >= 0):
        slices[unit_of[i]] += 1
        if unit_of[i] not in slot:
            slot[unit_of[i]] = items.item[i], taken[items.item[i]]
            taken[items.item[i]] += 1
    images, K = min(taken.max(), IMAGES), side * side
    places = [i for i in np.flatnonzero(items.item >= 0) if slot[unit_of[i]][1] < images]
    tokens = np.zeros((len(taken), images, K, encoder.dim), np.float16)
    weight, open_units = np.zeros((len(taken), images, K), np.float32), {}
    for i, grid, tissue, _ in patch_grids(rows, places, encoder, long_side, batch_size):
        unit, (x, w) = unit_of[i], cells(grid, tissue, side)
        total, shares, seen = open_units.pop(unit, (0, 0, 0))
        total, shares, seen = total + w[:, None] * x, shares + w, seen + 1
        if seen < slices[unit]:
            open_units[unit] = total, shares, seen
            continue
        tokens[slot[unit]] = total / np.maximum(shares, 1e-9)[:, None]
        weight[slot[unit]] = shares / seen
    left_out = int(np.maximum(taken - images, 0).sum())
    return tokens.reshape(len(taken), images * K, -1), weight.reshape(len(taken), -1), left_out


def untrainable(label_n, fold, classes: int):
    """What a probe answers that cannot be trained (one class) or chosen (none of it in validation), or None.

    It is a score [test, C] of NaN, the most frequent class [test], and no settings.
    """
    y = label_n[fold.train]
    if len(np.unique(y)) > 1 and np.isin(label_n[fold.val], y).any():
        return None
    return np.full((len(fold.test), classes), np.nan), np.full(len(fold.test), np.bincount(y).argmax()), {}


def class_weights(label_n, classes: int) -> np.ndarray:
    """float32 [C] by which classes count equally, 1 on average over the items; 0: absent."""
    count = np.bincount(label_n, minlength=classes)
    weight = len(label_n) / (np.maximum(count, 1) * (count > 0).sum())
    return np.where(count > 0, weight, 0).astype(np.float32)


def balanced_log_loss(prob, label_n) -> np.ndarray:
    """Cross-entropy of probabilities [..., n, C], averaged within classes first: [...]."""
    nats = -np.log(np.maximum(prob[..., np.arange(len(label_n)), label_n], 1e-12))
    return np.mean([nats[..., label_n == c].mean(axis=-1) for c in np.unique(label_n)], axis=0)


def logits(params: dict, tokens_BKD, weight_BK, mean_D, scale_D):
    """Logits [G, B, C] of all candidates; tissue shares weigh the cells before the queries do."""
    x = (tokens_BKD.astype(jnp.float32) - mean_D) * scale_D
    prior = jnp.where(weight_BK > 0, jnp.log(jnp.maximum(weight_BK, 1e-6)), NOTHING)
    attention = jax.nn.softmax(jnp.einsum("bkd,ghd->bghk", x, params["query"]) + prior[:, None, None])
    pooled = jnp.einsum("bghk,bkd->bghd", attention, x)
    return jnp.einsum("bghd,ghdc->gbc", pooled, params["kernel"]) + params["bias"][:, None]


@jax.jit
def predict(params, tokens_BKD, weight_BK, class_weight_C, mean_D, scale_D):
    """Probabilities [G, B, C]; absent classes get none."""
    z = logits(params, tokens_BKD, weight_BK, mean_D, scale_D)
    return jax.nn.softmax(jnp.where(class_weight_C > 0, z, NOTHING))


@jax.jit
def update(state, tokens_BKD, weight_BK, label_B, class_weight_C, mean_D, scale_D):
    """One AdamW step of all candidates on the class-balanced cross-entropy; state is (params, Adam's)."""
    params, opt = state

    def loss(params):  # the candidates share no parameter: the gradient of the sum is that of each
        z = logits(params, tokens_BKD, weight_BK, mean_D, scale_D)
        log_prob = jax.nn.log_softmax(jnp.where(class_weight_C > 0, z, NOTHING))
        picked = jnp.take_along_axis(log_prob, label_B[None, :, None], axis=2)[..., 0]
        return -(class_weight_C[label_B] * picked).mean(axis=1).sum()

    direction, opt = optax.scale_by_adam().update(jax.grad(loss)(params), opt)
    rate_G, decay_G = jnp.array(CANDIDATES).T

    def step(path, p, u):
        shape = (-1, *[1] * (p.ndim - 1))
        decay = 0.0 if path[0].key == "bias" else decay_G.reshape(shape)
        return p - rate_G.reshape(shape) * (u + decay * p)

    return jax.tree_util.tree_map_with_path(step, params, direction), opt


def _statistics(tokens_nKD, weight_nK, train) -> tuple[np.ndarray, np.ndarray]:
    """Mean and 1 / deviation (0: constant) of each feature over the training part's cells with tissue."""
    count, total, squares = 0, 0.0, 0.0
    for i in train:
        x = tokens_nKD[i][weight_nK[i] > 0].astype(np.float64)
        count, total, squares = count + len(x), total + x.sum(axis=0), squares + (x * x).sum(axis=0)
    mean = total / max(count, 1)
    deviation = np.sqrt(np.maximum(squares / max(count, 1) - mean**2, 0))
    constant = deviation <= 1e-6 * np.abs(mean)
    scale = np.where(constant, 0, 1 / np.where(constant, 1, deviation))
    return mean.astype(np.float32), scale.astype(np.float32)


def attentive(x, label_n, fold, classes: int, seed: int = 0):
    """Train on the training part; learning rate, weight decay and length by the validation part's log-loss.

    Every fold of the same data runs the same compiled step: batches are gathered to one size.

    Args:
      x: (float16 [n, K, D], tissue share float32 [n, K]) of item_cells.

    Returns:
      score [test, C] (probabilities; NaN: a class without training items), predicted class [test], settings.
    """
    if (answer := untrainable(label_n, fold, classes)) is not None:
        return answer
    tokens, weight = x
    D, G, size = tokens.shape[-1], len(CANDIDATES), 256 if len(label_n) >= 4096 else 64
    balance = class_weights(label_n[fold.train], classes)
    fixed = (balance, *_statistics(tokens, weight, fold.train))

    def probabilities(params, places):
        padded = np.resize(places, math.ceil(len(places) / size) * size)
        parts = [predict(params, tokens[p], weight[p], *fixed) for p in padded.reshape(-1, size)]
        return np.concatenate(parts, axis=1)[:, : len(places)]

    query = 0.02 * jax.random.normal(jax.random.key(seed), (1, HEADS, D))  # heads differ, candidates do not
    params = {
        "query": jnp.tile(query, (G, 1, 1)), "kernel": jnp.zeros((G, HEADS, D, classes)),
        "bias": jnp.zeros((G, classes)),
    }  # fmt: skip
    state = params, optax.scale_by_adam().init(params)
    known = fold.val[balance[label_n[fold.val]] > 0]
    length = max(UPDATES, math.ceil(len(fold.train) / size))
    batches = _batches(fold.train, size, np.random.default_rng(seed))
    best, best_loss = (0, 0, params), np.inf
    for number in tqdm(range(1, ROUNDS + 1), "attentive probe", unit="round", leave=False):
        for p in itertools.islice(batches, length):
            state = update(state, tokens[p], weight[p], label_n[p], *fixed)
        loss_G = np.nan_to_num(balanced_log_loss(probabilities(state[0], known), label_n[known]), nan=np.inf)
        if loss_G.min() < best_loss:
            best, best_loss = (number, int(loss_G.argmin()), state[0]), loss_G.min()
        elif number >= best[0] + PATIENCE:
            break
    number, g, params = best
    prob = probabilities(params, fold.test)[g]
    settings = {"learning_rate": CANDIDATES[g][0], "weight_decay": CANDIDATES[g][1]}
    score = np.where(balance > 0, at_prevalence(prob, label_n[fold.train]), np.nan)
    return score, prob.argmax(axis=1), settings | {"updates": number * length}


def _batches(places, size: int, rng):
    """Endless batches of one size; every item comes once before any comes again."""
    stream = itertools.chain.from_iterable(rng.permutation(places) for _ in itertools.count())
    while True:
        yield np.fromiter(itertools.islice(stream, size), np.int64, size)
