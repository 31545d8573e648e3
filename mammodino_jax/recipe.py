"""From a ConfigDict to frozen dataclasses, checked once at the boundary."""

import dataclasses
from dataclasses import MISSING

import jax

from mammodino_jax.augment import AugmentConfig
from mammodino_jax.data.crops import CropConfig
from mammodino_jax.data.masking import MaskConfig
from mammodino_jax.data.pairs import PairConfig
from mammodino_jax.data.pipeline import DataConfig
from mammodino_jax.errors import UserError, suggest
from mammodino_jax.model.head import HeadConfig
from mammodino_jax.model.vit import REMAT, ViTConfig
from mammodino_jax.optimizer import OptimConfig
from mammodino_jax.profiling import steps_of


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Weights and variants of the loss terms. The paper publishes none; DINOv2's where it has them."""

    dino_weight: float = 1.0
    ibot_weight: float = 1.0
    koleo_weight: float = 0.1
    adjacent_weight: float = 1.0  # as much as DINO-M: the paper sums its terms without naming weights
    final_adjacent_weight: float = 1.0  # reached along a half cosine at the last step
    adjacent_warmup_steps: int = 0  # linear from 0
    adjacent_updates_center: bool = False  # slice pairs are more alike than views: they would drag the center
    adjacent_sinkhorn: bool = True  # under Sinkhorn, pairs' rows join the global rows; False: only centred
    centering: str = "centering"  # or "sinkhorn"
    koleo_group: int = 0  # consecutive rows within which neighbours are sought; 0: the global batch
    drop_path_group: int = 0  # images that share one drop-path draw; 0: the global batch
    patch_chunk: int = 0  # masked slots of an image whose logits are held at once; 0: all


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """How a run is watched and saved: may differ between a run and its continuation."""

    log_every: int = 50
    checkpoint_every: int = 1000
    keep_checkpoints: int = 2
    diagnose_every: int = 1000  # steps between looks at held-out images (diagnostics.py); 0: none


@dataclasses.dataclass(frozen=True)
class InitConfig:
    """Where training starts. The defaults start from random weights."""

    weights: str = ""  # a workdir, an exported folder, hub:FILE, timm:FILE, hf:DIR or dbt-dino:FILE
    heads: str = ""  # a file with a DINO head that belongs to them (RAD-DINO's dino_head.safetensors)
    # Fresh heads on a moving backbone wreck it (DINOv2 issue 204): the backbone, but for its patch embedding,
    # stays frozen for some steps, then its learning rate rises linearly. FINO's two stages.
    freeze_steps: int = 0
    unfreeze_steps: int = 0


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything that determines a training run."""

    seed: int
    steps: int
    batch_size: int  # images of a global batch
    dbt_rows: int  # of them, rows from tomosynthesis volumes, each with a slice pair (0: no DINO-adj)
    accumulate: int  # micro-batches of a step
    fsdp: int  # devices over which large parameters are sharded
    init: InitConfig
    model: ViTConfig
    head: HeadConfig
    loss: LossConfig
    optim: OptimConfig
    augment: AugmentConfig
    data: DataConfig
    crops: CropConfig
    mask: MaskConfig
    pairs: PairConfig
    run: RunConfig
    profile_steps: str = ""  # "10:13": a trace of steps 10, 11 and 12; may differ in a continuation


def _plain(value):
    return tuple(_plain(v) for v in value) if isinstance(value, list | tuple) else value


def _section(cls, values, name: str):
    known = [f.name for f in dataclasses.fields(cls)]
    for key in values:
        if key not in known:
            raise UserError(f"config.{name} has no field {key!r}.{suggest(key, known)}")
    return cls(**{key: _plain(value) for key, value in values.items()})


def from_config(config) -> Recipe:
    """Build and check a Recipe from a ConfigDict or the dict of a workdir's config.json.

    Raises:
      UserError: an unknown field (with a suggestion), a missing one, or values that do not fit together.
    """
    values = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    fields = {f.name: f.type for f in dataclasses.fields(Recipe)}
    for key in values:
        if key not in fields:
            raise UserError(f"config has no field {key!r}.{suggest(key, fields)}")
    missing = [f.name for f in dataclasses.fields(Recipe) if f.name not in values and f.default is MISSING]
    if missing:
        raise UserError(f"config lacks {', '.join(missing)}")
    built = {
        k: _section(t, values[k], k) if dataclasses.is_dataclass(t) else values[k] for k, t in fields.items()
    }
    recipe = Recipe(**built)
    _check(recipe)
    return recipe


def _check_init(r: Recipe) -> None:
    c = r.init
    if not c.weights and (c.heads or c.freeze_steps or c.unfreeze_steps):
        raise UserError(
            "config.init.weights is empty, but heads, freeze_steps or unfreeze_steps are set: a random "
            "backbone would be frozen. Give weights, e.g. --config=configs/continue.py:hub:FILE"
        )
    if min(c.freeze_steps, c.unfreeze_steps) < 0 or c.freeze_steps >= r.steps:
        raise UserError(
            f"config.init.freeze_steps {c.freeze_steps} and unfreeze_steps {c.unfreeze_steps} must not be "
            f"negative, and the backbone must thaw before the last of {r.steps} steps"
        )


def _check(r: Recipe) -> None:
    _check_init(r)
    if r.loss.centering not in ("centering", "sinkhorn"):
        hint = suggest(r.loss.centering, ("centering", "sinkhorn"))
        raise UserError(
            f"config.loss.centering is {r.loss.centering!r}, expected centering or sinkhorn.{hint}"
        )
    if r.model.channels not in (1, 3):
        raise UserError(f"config.model.channels is {r.model.channels}, expected 1 or 3")
    if r.model.ffn not in ("mlp", "swiglu"):
        raise UserError(f"config.model.ffn is {r.model.ffn!r}, expected mlp or swiglu")
    for name, known in (("remat", tuple(REMAT)), ("attention", ("auto", "xla", "cudnn"))):
        value = getattr(r.model, name)
        if value not in known:
            raise UserError(
                f"config.model.{name} is {value!r}, expected {', '.join(known)}.{suggest(str(value), known)}"
            )
    if r.model.attention == "cudnn" and r.model.dtype not in ("bfloat16", "float16"):
        raise UserError(f"config.model.attention cudnn needs dtype bfloat16 or float16, not {r.model.dtype}")
    if r.model.dim % r.model.heads:
        raise UserError(
            f"config.model.dim {r.model.dim} is not a multiple of config.model.heads {r.model.heads}"
        )
    if r.crops.patch != r.model.patch_size:
        raise UserError(
            f"config.crops.patch {r.crops.patch} is not config.model.patch_size {r.model.patch_size}"
        )
    at_least_one = {"steps": r.steps, "crops.local_number": r.crops.local_number, "accumulate": r.accumulate}
    for name, value in at_least_one.items():
        if value < 1:
            raise UserError(f"config.{name} is {value}, expected 1 or more")
    if r.loss.patch_chunk < 0:
        raise UserError(f"config.loss.patch_chunk is {r.loss.patch_chunk}, expected 0 (all) or more")
    steps_of(r.profile_steps)
    for name in ("log_every", "checkpoint_every", "keep_checkpoints"):
        if getattr(r.run, name) < 1:
            raise UserError(f"config.run.{name} is {getattr(r.run, name)}, expected 1 or more")
    for name, rows in (("batch_size", r.batch_size), ("dbt_rows", r.dbt_rows)):
        if rows % r.accumulate:
            raise UserError(f"config.accumulate {r.accumulate} does not divide config.{name} {rows}")
    if r.accumulate > 1 and r.loss.centering == "sinkhorn":
        raise UserError(
            "config.accumulate is above 1 with config.loss.centering sinkhorn, which needs all rows at once; "
            "use centering, or accumulate 1"
        )
    if r.dbt_rows and r.batch_size % r.dbt_rows:
        raise UserError(f"config.dbt_rows {r.dbt_rows} does not divide config.batch_size {r.batch_size}")
    rows, group = r.batch_size // r.accumulate, r.loss.drop_path_group  # rows of a micro-batch
    every = r.batch_size // r.dbt_rows if r.dbt_rows and r.pairs.mode == "dedicated" else 1
    if r.model.drop_path and group % every:
        raise UserError(
            f"config.loss.drop_path_group {group} is not a multiple of batch_size / dbt_rows {every}: slice "
            f"pairs drop paths with the images that they lie among; take a multiple of {every}, or 0"
        )
    for name in ("global_size", "local_size"):
        size = getattr(r.crops, name)
        if size % r.model.patch_size:
            raise UserError(
                f"config.crops.{name} {size} is not a multiple of the patch size {r.model.patch_size}"
            )
    for name in ("koleo_group", "drop_path_group"):
        group = getattr(r.loss, name)
        if group and rows % group:
            raise UserError(
                f"config.loss.{name} {group} does not divide config.batch_size / accumulate {rows}"
            )


def check_devices(r: Recipe, devices: int | None = None) -> None:
    """Raise a UserError where the batch cannot be laid over the devices (None: those that are here)."""
    devices = jax.device_count() if devices is None else devices
    for name in ("batch_size", "dbt_rows"):
        rows = getattr(r, name) // r.accumulate
        if rows % devices:
            raise UserError(f"config.{name} / accumulate {rows} is not a multiple of the {devices} devices")
