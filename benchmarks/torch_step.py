"""Our train step written plainly in PyTorch: the peer that benchmarks.train_step measures beside ours.

timm's blocks and scaled_dot_product_attention; bf16 autocast with a residual stream in bf16; on a GPU
blocks, heads and losses under torch.compile; DINOv2's batch-subset drop-path; fused AdamW; activation
checkpointing as an option. It sees the same uint8 crops, mask slots and slice pairs as ours and has the same
heads and loss terms (DINO, iBOT and DINO-adj under Sinkhorn, KoLeo).

What it leaves out of our step, to PyTorch's advantage: photometric augmentation (it only normalises: PyTorch
pipelines augment on the host), layer-wise learning rates, schedules, the figures that are watched, the check
for bad steps, and float32 logits (its heads give bf16, as DINOv2's do).

B images, V views, L local views, M mask slots, A slice pairs, K prototypes, D width, S side.
"""

import contextlib
import resource
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

from benchmarks.jax_step import MATMUL, main, recipe_of, synthetic_batch, timed
from mammodino_jax.model.head import HeadConfig
from mammodino_jax.model.vit import ViTConfig
from mammodino_jax.recipe import Recipe

try:
    import torchvision
except RuntimeError:
    # A torchvision of another torch build fails to import, and timm with it; nothing here calls its operators
    LIBRARY = torch.library.Library("torchvision", "FRAGMENT")  # kept: dropping it takes the operators back
    for name in ("nms", "qnms"):
        LIBRARY.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision  # noqa: F401

from timm.models.vision_transformer import Block, VisionTransformer

STUDENT_TEMP, TEACHER_TEMP, MOMENTUM = 0.1, 0.07, 0.994


def residual(x_BTD, branch: Callable, rate: float):
    """x + branch(x), of a random subset of the rows where rate > 0."""
    if not rate:
        return x_BTD + branch(x_BTD).to(x_BTD.dtype)
    B = len(x_BTD)
    keep = max(int(B * (1 - rate)), 1)
    rows = torch.randperm(B, device=x_BTD.device)[:keep]
    return x_BTD.index_add(0, rows, branch(x_BTD[rows]).to(x_BTD.dtype), alpha=B / keep)


class SubsetBlock(Block):
    def forward(self, x_BTD, rate: float):
        x_BTD = residual(x_BTD, lambda x: self.ls1(self.attn(self.norm1(x))), rate)
        return residual(x_BTD, lambda x: self.ls2(self.mlp(self.norm2(x))), rate)


class Backbone(VisionTransformer):
    """timm's ViT with DINOv2's mask token; returns normalised tokens [B, 1 + N, D], CLS first."""

    def __init__(self, c: ViTConfig, recompute: bool):
        super().__init__(
            img_size=c.image_size, patch_size=c.patch_size, in_chans=c.channels,
            embed_dim=c.dim, depth=c.depth, num_heads=c.heads,
            mlp_ratio=c.mlp_ratio, init_values=c.layerscale, num_classes=0, global_pool="",
            dynamic_img_size=True, block_fn=SubsetBlock,
        )  # fmt: skip
        self.mask_token = nn.Parameter(torch.zeros(c.dim))
        self.rate, self.recompute, self.dtype = c.drop_path, recompute, getattr(torch, c.dtype)

    def forward(self, images, mask_BN=None):
        x = self.patch_embed(images)
        if mask_BN is not None:
            x = torch.where(mask_BN.view(*x.shape[:3], 1), self.mask_token.to(x.dtype), x)
        x = self._pos_embed(x).to(self.dtype)
        trained = torch.is_grad_enabled()
        for block in self.blocks:
            if trained and self.recompute:
                x = checkpoint(block, x, self.rate, use_reentrant=False)
            else:
                x = block(x, self.rate if trained else 0.0)
        return self.norm(x)


class Head(nn.Module):
    def __init__(self, dim: int, c: HeadConfig):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(dim, c.hidden), nn.GELU(),
            nn.Linear(c.hidden, c.hidden), nn.GELU(),
            nn.Linear(c.hidden, c.bottleneck),
        )  # fmt: skip
        self.last_layer = weight_norm(nn.Linear(c.bottleneck, c.prototypes, bias=False))

    def forward(self, x):
        return self.last_layer(F.normalize(self.mlp(x), dim=-1))


class Network(nn.Module):
    def __init__(self, recipe: Recipe, recompute: bool):
        super().__init__()
        dim = recipe.model.dim
        self.backbone = Backbone(recipe.model, recompute)
        self.dino_head = Head(dim, recipe.head)
        self.ibot_head = Head(dim, recipe.head) if recipe.head.separate_ibot else self.dino_head


def sinkhorn(logits_RK, weight_R=None):
    """Teacher probabilities, DINOv2's three iterations in float32; rows of weight 0 do not count."""
    q = torch.exp(logits_RK.float() / TEACHER_TEMP)
    if weight_R is not None:
        q = q * (weight_R > 0)[:, None]
    for _ in range(3):
        q = q / q.sum(0, keepdim=True)
        q = q / q.sum(1, keepdim=True).clamp_min(1e-30)
    return q


def cross_entropy(teacher, logits):
    return -(teacher * F.log_softmax(logits.float() / STUDENT_TEMP, dim=-1)).sum(-1)


def koleo(x_BD):
    x_BD = F.normalize(x_BD.float(), dim=-1)
    with torch.no_grad():
        nearest = (x_BD @ x_BD.T).fill_diagonal_(-1).argmax(1)
    return -torch.log((x_BD - x_BD[nearest] + 1e-8).norm(dim=1) + 1e-8).mean()


def terms(student: Network, teacher: Network, tokens: dict, targets: dict, weight_BM, recipe: Recipe):
    """Heads and losses on tokens: "cls" [B, 2, D], "patch" [B, M, D], of the student "local" [B, L, D]; with
    slice pairs "adjacent" [A, sides, D]."""
    c, B, weight = recipe.loss, len(weight_BM), weight_BM.flatten()
    with torch.no_grad():
        cls = targets["cls"].flatten(0, 1)
        if "adjacent" in targets:  # pairs share the prototypes' balance with the global views
            cls = torch.cat([cls, targets["adjacent"].flatten(0, 1)])
        cls = sinkhorn(teacher.dino_head(cls))
        target = cls[: 2 * B].unflatten(0, (B, 2))
        patch = sinkhorn(teacher.ibot_head(targets["patch"]).flatten(0, 1), weight)

    logits, local = student.dino_head(tokens["cls"]), student.dino_head(tokens["local"])
    L = local.shape[1]
    swapped = cross_entropy(target.flip(1), logits).mean(0).sum()
    log_p = F.log_softmax(local.float() / STUDENT_TEMP, dim=-1)
    others = -torch.einsum("bk,bk->", target.sum(1), log_p.sum(1)) / B
    loss = c.dino_weight * (swapped + others) / (2 + 2 * L)
    ibot = cross_entropy(patch, student.ibot_head(tokens["patch"]).flatten(0, 1))
    loss = loss + c.ibot_weight * (ibot * weight).sum() / (2 * B)
    loss = loss + c.koleo_weight * sum(koleo(tokens["cls"][:, v]) for v in (0, 1))
    if "adjacent" in tokens:
        adjacent = cls[2 * B :].unflatten(0, targets["adjacent"].shape[:2]).flip(1)
        logits = student.dino_head(tokens["adjacent"])
        loss = loss + c.adjacent_weight * cross_entropy(adjacent, logits).mean()
    return loss


class Step:
    """One optimiser step a call, on the tensors of a batch (shapes: data/pipeline.py); returns the loss."""

    def __init__(self, recipe: Recipe, device, recompute: bool = False, compiled: bool = False):
        self.recipe, self.device, model = recipe, torch.device(device), recipe.model
        with self.device:
            self.student, self.teacher = Network(recipe, recompute), Network(recipe, recompute)
            look = recipe.augment
            mean, std = (torch.tensor(v[: model.channels]).view(-1, 1, 1) for v in (look.mean, look.std))
        self.mean, self.std = 255 * mean, 255 * std
        self.teacher.load_state_dict(self.student.state_dict())
        self.terms = terms
        if compiled:  # blocks one by one: one graph for all of them, as DINOv3 does
            for net in (self.student, self.teacher):
                for block in net.backbone.blocks:
                    block.compile(dynamic=False)
            self.terms = torch.compile(terms, dynamic=False)
        decay = [p for p in self.student.parameters() if p.ndim > 1]
        rest = [p for p in self.student.parameters() if p.ndim <= 1]
        fused = self.device.type != "meta"
        self.optimizer = torch.optim.AdamW(
            [{"params": decay, "weight_decay": 0.04}, {"params": rest, "weight_decay": 0.0}],
            lr=1e-4, betas=(recipe.optim.beta1, recipe.optim.beta2), fused=fused,
        )  # fmt: skip
        self.seen = {}  # shapes that the backbones were given, for the test

    def images(self, crops_BVSS):
        """uint8 crops to normalised views [B * V, C, S, S]."""
        x = crops_BVSS.flatten(0, 1)[:, None].expand(-1, self.recipe.model.channels, -1, -1)
        return (x - self.mean) / self.std

    def encode(self, net: Network, name: str, images, mask=None):
        self.seen[name] = tuple(images.shape)
        return net.backbone(images, mask)

    def loss(self, batch: dict):
        c = self.recipe
        index, weight = batch["mask_index"].long(), batch["mask_weight"]
        globals_, local = self.images(batch["global_crops"]), self.images(batch["local_crops"])
        B, views = len(weight), len(globals_)
        patches = (globals_.shape[-1] // c.model.patch_size) ** 2
        masked = torch.zeros(B, 2 * patches, device=weight.device)
        masked = masked.scatter_reduce(1, index, weight, "amax").view(views, patches) > 0

        def gather(tokens):  # of the masked patches
            patch = tokens[:, 1:].reshape(B, 2 * patches, -1)
            return patch.gather(1, index[..., None].expand(-1, -1, patch.shape[-1]))

        teacher_in, student_in, A = globals_, globals_, 0
        if "adjacent_crops" in batch:
            pairs, both = batch["adjacent_crops"], c.pairs.symmetric
            A, sides = len(pairs), 2 if both else 1
            teacher_in = torch.cat([globals_, self.images(pairs if both else pairs[:, -1:])])
            if c.pairs.mode == "dedicated":
                student_in = torch.cat([globals_, self.images(pairs if both else pairs[:, :1])])
                masked = F.pad(masked, (0, 0, 0, A * sides))  # slices are not masked

        def split(tokens):
            parts = {"cls": tokens[:views, 0].view(B, 2, -1), "patch": gather(tokens[:views])}
            if A and len(tokens) > views:
                parts["adjacent"] = tokens[views:, 0].view(A, sides, -1)
            return parts

        with torch.no_grad():
            targets = split(self.encode(self.teacher, "teacher", teacher_in))
        tokens = split(self.encode(self.student, "student", student_in, masked))
        tokens["local"] = self.encode(self.student, "local", local)[:, 0].view(B, -1, c.model.dim)
        if A and "adjacent" not in tokens:  # reuse: pair i belongs to row i * B / A, view 0
            tokens["adjacent"] = tokens["cls"][:: B // A, :1]
        return self.terms(self.student, self.teacher, tokens, targets, weight, c)

    def __call__(self, batch: dict):
        c = self.recipe
        half = c.model.dtype == "bfloat16"
        with torch.autocast(self.device.type, torch.bfloat16) if half else contextlib.nullcontext():
            loss = self.loss(batch)
        loss.backward()
        if c.optim.clip:
            for module in self.student.children():
                nn.utils.clip_grad_norm_(module.parameters(), c.optim.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            pairs = [list(net.parameters()) for net in (self.teacher, self.student)]
            torch._foreach_lerp_(*pairs, 1 - MOMENTUM)
        return loss.detach()


def tensors(batch: dict, device) -> dict:
    """The arrays of a loader's batch that the step reads, on the device."""
    names = ("global_crops", "local_crops", "mask_index", "mask_weight", "adjacent_crops")
    return {name: torch.from_numpy(batch[name]).to(device) for name in names if name in batch}


def measure(case: dict) -> dict:
    """As jax_step.measure; "remat" but "none" is activation checkpointing, "attention" means nothing."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    torch.set_float32_matmul_precision("high")  # TF32 on a GPU, as XLA's default
    recipe = recipe_of({k: v for k, v in case.items() if k not in ("attention", "remat")})
    compiled = cuda if case.get("compile") is None else case["compile"]
    step = Step(recipe, device, case.get("remat", "none") != "none", compiled)
    batch = tensors(synthetic_batch(recipe), device)
    start = time.perf_counter()
    losses = [float(step(batch))]
    compile_s = time.perf_counter() - start
    times = timed(lambda: losses.append(float(step(batch))), case["steps"])
    if cuda:
        peak = torch.cuda.max_memory_allocated()
    else:  # torch does not count on a CPU: the whole process, libraries included
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    step = batch = None
    a = torch.ones(MATMUL, MATMUL, dtype=getattr(torch, case["dtype"]), device=device)
    rate = 2 * MATMUL**3 / timed(lambda: (a @ a)[0, 0].item(), 3, warmup=1)["fastest"]
    return {
        **times, "compile_s": compile_s - times["seconds"], "matmul": rate, "loss": losses[-1],
        "device": torch.cuda.get_device_name() if cuda else "cpu", "devices": 1, "peak_bytes": peak,
        "compile": compiled,
    }  # fmt: skip


if __name__ == "__main__":
    main(
        measure, lambda error: isinstance(error, torch.OutOfMemoryError) or "not enough memory" in str(error)
    )
