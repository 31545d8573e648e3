"""A frozen encoder, wherever its weights come from: grey uint8 images in, features out."""

import dataclasses
import functools
import hashlib
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from mammodino_jax import checkpoint
from mammodino_jax.augment import IMAGENET_MEAN, IMAGENET_STD, AugmentConfig, normalise
from mammodino_jax.errors import UserError, refuse_bucket, suggest
from mammodino_jax.model.head import bind, init_params
from mammodino_jax.model.vit import ViTConfig, own_grids

ARCHITECTURES = {
    "nano": ViTConfig(dim=192, depth=4, heads=3, image_size=98),
    "vits14": ViTConfig(dim=384, depth=12, heads=6),
    "vitb14": ViTConfig(),
    "vitl14": ViTConfig(dim=1024, depth=24, heads=16),
    "vitg14": ViTConfig(dim=1536, depth=40, heads=24, ffn="swiglu"),
}
FOREIGN = ("hub", "timm", "hf", "dbt-dino", "biomedclip", "mammoclip")  # kinds of weight files of others


SCALE = 2  # whole images at twice the side of the training crops: near the mm per pixel of those crops


@dataclasses.dataclass(frozen=True)
class Encoder:
    """A backbone with its normalisation. Evaluation takes any object with the same attributes.

    Attributes:
      name: how tables call it.
      vit: shape of the backbone; None: it is not a ViT.
      params: its parameters, nested.
      mean, std: statistics of the input normalisation, one a channel (grey is repeated to 3 channels).
      provenance: what pretraining saw (provenance.collect), or names of foreign weights; empty: untrained.
      kind: of the spec it was loaded from: workdir, export, random, or one of FOREIGN.
      made_for: fields of data_prep.settings.Settings that all builds it was trained on share; empty: any.
      side: long side in pixels that it wants images in; 0: SCALE times that of its training crops.
    """

    name: str
    vit: ViTConfig | None
    params: dict
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    provenance: dict = dataclasses.field(default_factory=dict)
    kind: str = ""
    made_for: dict = dataclasses.field(default_factory=dict)
    side: int = 0

    @property
    def patch_size(self) -> int:
        return self.vit.patch_size

    @property
    def dim(self) -> int:
        return self.vit.dim

    @property
    def long_side(self) -> int:
        return self.side or SCALE * self.vit.image_size

    @functools.cached_property
    def fingerprint(self) -> str:
        """Of weights, shape and input statistics: what features depend on. 16 hexadecimal digits."""
        digest = hashlib.sha256(repr((self.vit, self.mean, self.std)).encode())
        for path, a in jax.tree_util.tree_leaves_with_path(self.params):
            digest.update(jax.tree_util.keystr(path).encode() + np.asarray(a).tobytes())
        return digest.hexdigest()[:16]

    @functools.cached_property
    def _placed(self):
        """The parameters on all devices; shardings of a batch that splits, and of one that does not."""
        mesh = jax.sharding.Mesh(np.array(jax.local_devices()), ("data",))
        rows, whole = (jax.sharding.NamedSharding(mesh, jax.P(*axes)) for axes in (("data",), ()))
        return jax.device_put(self.params, whole), rows, whole

    def __call__(self, images, sizes=None) -> dict[str, jax.Array]:
        """Features after the final norm.

        Args:
          images: uint8 [B, H, W]; a batch that is a multiple of the devices is split over them.
          sizes: int [B, 2], height and width that each image takes of the canvas [H, W], from its upper left
            corner; its features are then those of the image alone, padded to whole patches. None: all of it.

        Returns:
          float32 {"cls": [B, D], "patches": [B, N, D]}; patches outside an image mean nothing.
        """
        images = np.asarray(images)
        grids = None if sizes is None else own_grids(self.vit, sizes, *images.shape[1:])
        params, rows, whole = self._placed
        splits = len(images) % len(rows.device_set) == 0
        images, grids = jax.device_put((images, grids), rows if splits else whole)
        return _encode(params, images, grids, self.vit, tuple(self.mean), tuple(self.std))


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def _encode(params, images_BHW, grids, vit: ViTConfig, mean, std):
    x = normalise(images_BHW.astype(jnp.float32) / 255, AugmentConfig(mean=mean, std=std), vit.channels)
    with jax.default_matmul_precision("highest"):  # features must not depend on the device
        return bind(params, vit)(x, grids=grids)


def load_encoder(spec: str) -> Encoder:
    """Load the encoder that `spec` names.

    Args:
      spec: a training workdir (the teacher of its newest checkpoint) or a checkpoint of one
        (workdir/checkpoints/STEP), a folder that mammodino_jax.export wrote, foreign weights (`hub:FILE`,
        `timm:FILE`, `hf:DIR`, `dbt-dino:FILE`, `biomedclip:DIR`, `mammoclip:FILE`, see convert.foreign.read),
        or `random:ARCH` (nano, vits14, vitb14, vitl14, vitg14) for untrained weights.

    Raises:
      UserError: nothing loadable there.
    """
    if spec.startswith("random:"):
        arch = spec.removeprefix("random:")
        if arch not in ARCHITECTURES:
            raise UserError(
                f"unknown architecture {arch!r}, known: {', '.join(ARCHITECTURES)}."
                + suggest(arch, ARCHITECTURES)
            )
        return Encoder(
            spec, ARCHITECTURES[arch], init_params(ARCHITECTURES[arch], None, seed=0), kind="random"
        )
    if spec.partition(":")[0] in FOREIGN and ":" in spec:
        from mammodino_jax.convert import foreign

        return foreign.read(spec)
    refuse_bucket(spec, "encoder")
    folder = Path(spec)
    if not folder.is_dir():
        kinds = ", ".join(f"{kind}:FILE" for kind in FOREIGN)
        raise UserError(
            f"encoder {spec!r} is neither a folder nor random:ARCH, {kinds} (hf, biomedclip: or DIR)"
        )
    if checkpoint.workdir_of(folder):
        return _from_workdir(folder)
    if any((folder / name).is_file() for name in ("mammodino.json", "model.safetensors")):
        from mammodino_jax.convert import folder as exported

        return exported.load(folder)
    raise UserError(
        f"{spec} holds neither checkpoints/ (a workdir) nor mammodino.json (an exported folder); "
        f"weights of others are named with their kind: {', '.join(FOREIGN)}"
    )


def read_recipe(workdir: Path):
    """The Recipe of a training workdir.

    Raises:
      UserError: its config.json is missing or damaged.
    """
    from mammodino_jax.recipe import from_config

    path = workdir / "config.json"
    try:
        return from_config(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError, AttributeError) as error:  # JSON's error is a ValueError
        raise UserError(
            f"{path} is not the configuration of a run ({error}): a workdir needs the one its run wrote"
        ) from None


def _from_workdir(folder: Path) -> Encoder:
    """Of a workdir, or of one of its checkpoints."""
    workdir = checkpoint.workdir_of(folder)
    recipe = read_recipe(workdir)
    vit = dataclasses.replace(
        recipe.model, drop_path=0.0, remat="none", scan=False, attention="auto", dtype="float32"
    )
    backbone = jax.eval_shape(functools.partial(init_params, vit, None, 0))
    state = checkpoint.load(folder, "state", {"teacher": {"backbone": backbone}})
    mean, std = (s[: vit.channels] for s in (recipe.augment.mean, recipe.augment.std))
    seen = checkpoint.load(folder, "provenance")
    first, *others = seen.get("builds") or [{}]
    made_for = {k: v for k, v in first.items() if all(k in b and b[k] == v for b in others)}
    name = workdir.name if folder.absolute() == workdir else f"{workdir.name}-{folder.name}"
    side = SCALE * recipe.crops.global_size
    return Encoder(name, vit, state["teacher"]["backbone"], mean, std, seen, "workdir", made_for, side)
