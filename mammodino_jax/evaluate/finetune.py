"""End-to-end fine-tuning of a ViT encoder: what its weights are worth as a start.

The paper's "fine-tuned and evaluated" suggests this protocol; it publishes no settings. Images of an item
(views of a breast or an exam, slices of a volume) are trained one by one with the item's label, one of them
an epoch, so that items count equally; an item's score is the mean probability over its images.

n items, r records, B images of a batch, A micro-batches of M images, D width, C classes, N patches.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator

import grain
import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from mammodino_jax.augment import AugmentConfig, normalise, photometric
from mammodino_jax.data.crops import resample
from mammodino_jax.data.eval import check_long_side, fitted
from mammodino_jax.errors import UserError
from mammodino_jax.evaluate.attentive import NOTHING, balanced_log_loss, class_weights, untrainable
from mammodino_jax.evaluate.items import Items, Rows
from mammodino_jax.evaluate.probes import at_prevalence
from mammodino_jax.model.head import bind
from mammodino_jax.model.vit import ViTConfig, own_grids
from mammodino_jax.optimizer import OptimConfig, adam, adamw_update, clip_by_module
from mammodino_jax.schedules import Cosine

SLICES = 16  # images of an item at most that are read, evenly spaced: a volume has up to a hundred
SCALE, SHIFT = 0.1, 0.05  # of augmentation: size within 1 -+ SCALE, place within SHIFT of the image's sides


@dataclasses.dataclass(frozen=True)
class FinetuneConfig:
    """MAE's fine-tuning of ViT-B (He et al. 2022, table 9), for data sets a hundredth of ImageNet's size."""

    epochs: int = 30  # MAE: 100 at most; small sets overfit sooner, and the best epoch is kept
    patience: int = 8  # epochs without a better validation loss that end it
    warmup: float = 0.1  # share of the updates; MAE: 5 of 100 epochs
    learning_rate: float = 1e-4  # peak: MAE's 5e-4 to 1e-3 at 256 images, scaled to 32
    layer_decay: float = 0.75
    weight_decay: float = 0.05
    drop_path: float = 0.1
    clip: float = 3.0  # of the gradients of backbone and head, as in pretraining
    batch_size: int = 32  # images of an update
    micro_batch: int = 8  # of them differentiated at once, over all devices: what memory allows

    @property
    def optim(self) -> OptimConfig:
        """What a step needs of it."""
        return OptimConfig(
            layer_decay=self.layer_decay, weight_decay=self.weight_decay, clip=self.clip, patch_embed_lr=1.0
        )


@dataclasses.dataclass(frozen=True)
class Images:
    """Where the images of the items come from.

    Attributes:
      read: record 0..r-1 to image u8 [H, W].
      item: i64 [r], the item 0..n-1 that each record belongs to; -1: none.
      shape: i64 [r, 2], height and width of each record.
    """

    read: Callable[[int], np.ndarray]
    item: np.ndarray
    shape: np.ndarray

    def of_items(self) -> dict[int, np.ndarray]:
        """{item: its records, SLICES evenly spaced ones where it has more}."""
        order = np.argsort(self.item, kind="stable")
        items, first = np.unique(self.item[order], return_index=True)
        parts = np.split(order, first[1:])
        even = (np.unique(np.linspace(0, len(p) - 1, min(len(p), SLICES)).round().astype(int)) for p in parts)
        return {int(i): part[at] for i, part, at in zip(items, parts, even, strict=True) if i >= 0}

    def canvas(self, long_side: int, patch: int) -> tuple[int, int]:
        """Height and width, in whole patches, that hold every image at `long_side`."""
        sizes = [fitted(*shape, long_side) for shape in self.shape[self.item >= 0]]
        height, width = (-(-n // patch) * patch for n in np.max(sizes, axis=0).tolist())
        return height, width


def images_of(rows: Rows, items: Items, chosen) -> Images:
    """The images of the items at `chosen`, which become items 0..n-1."""
    shape = np.stack([rows.columns["height"], rows.columns["width"]], axis=1).astype(int)
    return Images(rows.image, items.take(chosen).item, shape)


def warp(image_HW, size_2, key):
    """The image [h, w] of a canvas [H, W], a little larger or smaller and moved a little within its frame."""
    scale, y, x = jax.random.uniform(key, (3,), minval=-1.0, maxval=1.0)
    scale, shift = 1 + SCALE * scale, SHIFT * jnp.stack([y, x]) * size_2
    moved = jax.image.scale_and_translate(
        image_HW, image_HW.shape, (0, 1), jnp.stack([scale, scale]), shift, "linear", antialias=True
    )
    inside = [jnp.arange(n) < size_2[a] for a, n in enumerate(image_HW.shape)]
    return moved * (inside[0][:, None] & inside[1])


def forward(params, x_BHWC, tissue_BHW, grids, vit: ViTConfig, key=None):
    """Logits [B, C] of the head on CLS and the tissue-weighted mean of the patch tokens."""
    out = bind(params["backbone"], vit)(x_BHWC, key=key, grids=grids)
    B, H, W = tissue_BHW.shape
    p = vit.patch_size
    weight_BN = tissue_BHW.reshape(B, H // p, p, W // p, p).mean(axis=(2, 4)).reshape(B, -1)
    weight_BN = weight_BN / jnp.maximum(weight_BN.sum(axis=1, keepdims=True), 1e-6)
    mean_BD = jnp.einsum("bn,bnd->bd", weight_BN, out["patches"])
    head = params["head"]
    return jnp.concatenate([out["cls"], mean_BD], axis=1) @ head["kernel"] + head["bias"]


def finetune_step(
    state, batch, class_weight_C, lr, key, *, vit: ViTConfig, look: AugmentConfig, optim: OptimConfig
):
    """One update on A micro-batches.

    Args:
      state: {"params": {"backbone", "head"}, "opt"}.
      batch: image u8 [A, M, H, W], size i32 [A, M, 2], grids (own_grids; [A, M] in front), label i32 [A, M].
      class_weight_C: of the cross-entropy; 0: the class is absent and gets no probability.

    Returns:
      (new state, loss).
    """
    micros = len(batch["image"])

    def loss_fn(params, micro, key):
        keys = jax.random.split(key, 1 + len(micro["image"]))
        moved = jax.vmap(warp)(micro["image"].astype(jnp.float32), micro["size"], keys[1:])
        sample = jnp.arange(len(moved))
        x = photometric(moved[:, None], sample, keys[0], look, vit.channels, first_view=0)[:, 0]
        z = forward(params, x, moved > 0, micro["grids"], vit, keys[0] if vit.drop_path else None)
        log_prob = jax.nn.log_softmax(jnp.where(class_weight_C > 0, z, NOTHING))
        picked = jnp.take_along_axis(log_prob, micro["label"][:, None], axis=1)[:, 0]
        return -(class_weight_C[micro["label"]] * picked).mean() / micros

    def add(total, micro_and_key):
        found = jax.value_and_grad(loss_fn)(state["params"], *micro_and_key)
        return jax.tree.map(jnp.add, total, found), None

    zero = (jnp.float32(0), jax.tree.map(jnp.zeros_like, state["params"]))
    (loss, grads), _ = jax.lax.scan(add, zero, (batch, jax.random.split(key, micros)))
    grads, _ = clip_by_module(grads, optim.clip)
    params, opt = adamw_update(
        state["params"], grads, state["opt"], optim, vit.depth,
        lr=lr, last_layer_lr=lr, weight_decay=optim.weight_decay,
    )  # fmt: skip
    return {"params": params, "opt": opt}, loss


train_step = jax.jit(finetune_step, static_argnames=("vit", "look", "optim"), donate_argnames="state")


@functools.partial(jax.jit, static_argnames=("vit", "look"))
def predict(params, batch, class_weight_C, *, vit: ViTConfig, look: AugmentConfig):
    """Probabilities [M, C] of images as they are."""
    x = normalise(batch["image"].astype(jnp.float32) / 255, look, vit.channels)
    z = forward(params, x, batch["image"] > 0, batch["grids"], vit)
    return jax.nn.softmax(jnp.where(class_weight_C > 0, z, NOTHING))


def init_state(encoder, classes: int) -> dict:
    """The encoder's parameters under a linear head of zeros."""
    head = {"kernel": jnp.zeros((2 * encoder.dim, classes)), "bias": jnp.zeros(classes)}
    params = {"backbone": jax.tree.map(jnp.array, encoder.params), "head": head}  # a copy: steps donate it
    return {"params": params, "opt": adam(OptimConfig()).init(params)}


def placements(micro_batch: int) -> tuple[jax.sharding.NamedSharding, ...]:
    """Of what all devices hold, of one micro-batch, and of several.

    As many devices work as split a micro-batch evenly: the result does not depend on their number.
    """
    devices = jax.local_devices()[: math.gcd(jax.local_device_count(), micro_batch)]
    mesh = jax.sharding.Mesh(np.array(devices), ("data",))
    return tuple(jax.sharding.NamedSharding(mesh, jax.P(*s)) for s in ((), ("data",), (None, "data")))


def batches(images: Images, records, rows: int, long_side: int, vit: ViTConfig) -> Iterator[dict]:
    """`records` in order, `rows` at a time; the last batch is padded with the first records."""
    records = np.resize(records, math.ceil(len(records) / rows) * rows).reshape(-1, rows)
    canvas = images.canvas(long_side, vit.patch_size)

    def build(number: int) -> dict:
        image, size = np.zeros((rows, *canvas), np.uint8), np.zeros((rows, 2), np.int32)
        for i, record in enumerate(records[number]):
            h, w = size[i] = fitted(*images.shape[record], long_side)
            image[i, :h, :w] = resample(images.read(int(record)), (h, w))
        return {"image": image, "size": size, "grids": own_grids(vit, size, *canvas)}

    reading = grain.ReadOptions(num_threads=4, prefetch_buffer_size=4)
    return iter(grain.MapDataset.range(0, len(records)).map(build).to_iter_dataset(reading))


def finetune(
    images: Images,
    label_n,
    fold,
    classes: int,
    seed: int,
    encoder,
    long_side: int,
    c: FinetuneConfig | None = None,
):
    """Fine-tune on the training part; the epoch is chosen by the validation part's balanced log-loss.

    The settings are not tuned: one run a fold. The test part is read once, with the weights that were kept.

    Args:
      long_side: in px, of every image at its own aspect; all lie in one canvas, so that a task compiles once.

    Returns:
      score [test, C] (probabilities; NaN: a class without training items), predicted class [test], settings.

    Raises:
      UserError: the encoder is not one of our ViTs; a long side that is no multiple of its patch size; a
        micro-batch that does not divide the batch; training that never gave a finite validation loss.
    """
    c = c or FinetuneConfig()
    if encoder.vit is None:
        raise UserError(
            f"{encoder.name} cannot be fine-tuned: its network is not one of this package's ViTs; "
            "leave finetune out of --probes, or give a ViT"
        )
    if c.batch_size % c.micro_batch:
        raise UserError(f"micro_batch {c.micro_batch} must divide batch_size {c.batch_size}")
    check_long_side(long_side, encoder.patch_size)
    if (answer := untrainable(label_n, fold, classes)) is not None:
        return answer
    still = dataclasses.replace(encoder.vit, drop_path=0.0)
    moving = dataclasses.replace(encoder.vit, drop_path=c.drop_path, remat="block")
    look = AugmentConfig(blur_prob=(0.0, 0.0, 0.0), mean=tuple(encoder.mean), std=tuple(encoder.std))
    of_item = images.of_items()
    balance = class_weights(label_n[fold.train], classes)
    known = fold.val[balance[label_n[fold.val]] > 0]
    updates = math.ceil(len(fold.train) / c.batch_size)
    total = c.epochs * updates
    rate = Cosine(c.learning_rate, 0.0, total, round(c.warmup * total))
    whole, rows, micros = placements(c.micro_batch)
    state = jax.device_put(init_state(encoder, classes), whole)
    weight_C, key = jax.device_put((balance, jax.random.key(seed)), whole)

    def probabilities(params, items, title):
        """[len(items), C]: means over the images of each item."""
        records = [of_item[int(i)] for i in items]
        owner = np.repeat(np.arange(len(items)), [len(r) for r in records])
        read = batches(images, np.concatenate(records), c.micro_batch, long_side, still)
        n = math.ceil(len(owner) / c.micro_batch)
        found = [
            np.asarray(predict(params, jax.device_put(batch, rows), weight_C, vit=still, look=look))
            for batch in tqdm(read, title, total=n, unit="batch", leave=False)
        ]
        out = np.zeros((len(items), classes))
        np.add.at(out, owner, np.concatenate(found)[: len(owner)])
        return out / np.bincount(owner)[:, None]

    rng, best, best_loss = np.random.default_rng(seed), (0, None), np.inf
    for epoch in range(1, c.epochs + 1):
        items = np.resize(rng.permutation(fold.train), updates * c.batch_size)
        records = np.array([rng.choice(of_item[int(i)]) for i in items])
        read = batches(images, records, c.batch_size, long_side, still)
        title = f"fine-tuning, epoch {epoch} of {c.epochs}"
        pending = None
        for i, batch in enumerate(tqdm(read, title, total=updates, unit="update", leave=False)):
            batch["label"] = label_n[items[i * c.batch_size : (i + 1) * c.batch_size]].astype(np.int32)
            batch = jax.tree.map(lambda a: a.reshape(-1, c.micro_batch, *a.shape[1:]), batch)
            batch, step = jax.device_put(batch, micros), (epoch - 1) * updates + i
            jax.block_until_ready(pending)  # at most two batches on the device; the bar tells the truth
            state, pending = train_step(
                state, batch, weight_C, rate(step), jax.random.fold_in(key, step),
                vit=moving, look=look, optim=c.optim,
            )  # fmt: skip
        loss = balanced_log_loss(probabilities(state["params"], known, "validation"), label_n[known])
        if loss < best_loss:
            best, best_loss = (epoch, jax.tree.map(jnp.copy, state["params"])), loss
        elif epoch >= best[0] + c.patience:
            break
    if best[1] is None:
        raise UserError(
            f"fine-tuning of {encoder.name} at learning rate {c.learning_rate} gave no finite "
            "validation loss; lower it"
        )
    prob = probabilities(best[1], fold.test, "test")
    settings = {"epoch": best[0], "validation_loss": float(best_loss)} | dataclasses.asdict(c)
    score = np.where(balance > 0, at_prevalence(prob, label_n[fold.train]), np.nan)
    return score, prob.argmax(axis=1), settings
