"""ViT-B/14 at 518 px with DINO-M, iBOT-M and DINO-adj: the paper's setting (arXiv 2510.11883).

    python main.py --config=configs/vitb14_518.py:data=DATA --workdir=DIR
    python main.py --config=configs/vitb14_518.py:photometrics=dinov2 --workdir=DIR \\
        --config.data.sources="(('DATA','train',('2d','dbt'),1.0),('OTHER','train',('2d',),0.5))"

Cost by formula: 2.7 TFLOP an image and 1.2 a dedicated slice pair: 3.0 an image with a pair for every fourth;
about 4e20 FLOP for 100 epochs of 1.4 M images. Expected result: not run by us so far; no score is claimed.

The paper leaves tau, rho, d, the loss weights, batch, schedules and augmentations unpublished. Every value
below is ours or DINOv2's, with the reason beside it.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder  # unset, of a type

from configs import options


def get_config(arg=None):
    _, o = options.parse(arg, data="", photometrics="mammo")
    c = ConfigDict()
    c.seed = 0
    c.steps = 125_000  # DINOv2's short recipe (100 "epochs" of 1250 steps)
    c.batch_size = 1024
    c.dbt_rows = 256  # a quarter of the rows come from tomosynthesis volumes; the paper's mix is unknown
    c.accumulate = 1  # micro-batches of a step; more need loss.centering="centering"
    c.fsdp = 1  # ViT-B fits a 16 GB chip without sharded parameters
    c.profile_steps = ""  # "10:13": a trace of steps 10, 11 and 12 under WORKDIR/profile

    c.init = ConfigDict(dict(weights="", heads="", freeze_steps=0, unfreeze_steps=0))  # random weights
    c.crops = ConfigDict(
        dict(
            global_size=518,  # the paper's input
            local_size=98,  # DINOv2 at patch 14
            local_number=8,
            global_scale=(0.32, 1.0),  # DINOv2
            local_scale=(0.05, 0.32),  # DINOv2
            global_mm=placeholder(tuple),  # side in mm instead of by scale; unset: DINOv2's law
            local_mm=placeholder(tuple),
            # rho, unpublished. Unset: 0.8 on records cropped to the breast, where lower values reject next to
            # nothing, and 0.5 on full frames, where 0.8 leaves many large windows without any place
            global_coverage=placeholder(float),
            local_coverage=placeholder(float),
            sampler="size_first",  # or "rejection", the paper's; ours keeps DINOv2's law of sizes at any rho
            ratio=(3 / 4, 4 / 3),  # width / height; DINOv2
            hflip=0.5,
            patch=14,
        )
    )
    c.mask = ConfigDict(
        dict(
            ratio=(0.1, 0.5),  # DINOv2; of the tissue patches
            of="tissue",
            min_coverage=0.5,  # a patch counts as tissue if most of it is
            strength=1.0,  # blocks drawn in proportion to coverage, as the paper words it
            lesions="ignore",  # no labels needed; "always" and "never" ask whether small lesions matter
        )
    )
    c.pairs = ConfigDict(
        dict(
            mode="dedicated",  # the paper's: both slices under conservative transforms of their own
            symmetric=False,  # the paper's student sees slice k alone; True costs 1.2 TFLOP a pair more
            offsets=(1, 2),  # d: a structure stays in view over one to two 1-mm slices
            unit="slices",
            end_share=0.1,
            scale=(0.8, 1.0),  # conservative: nearly the whole breast
            coverage=0.7,  # narrow breasts have no large window of 0.8
            jitter=0.02,  # ours: the partner's window shifts by less than a patch
        )
    )
    c.model = ConfigDict(
        dict(
            dim=768,
            depth=12,
            heads=12,
            mlp_ratio=4.0,
            ffn="mlp",
            patch_size=c.crops.get_ref("patch"),
            image_size=c.crops.get_ref("global_size"),
            channels=3,  # as DINOv2 weights expect; grey is repeated on the device
            registers=0,
            layerscale=1e-5,  # DINOv2
            drop_path=0.1,  # DINOv2 uses 0.3 for ViT-L; its author advises 0.1 against instability at ViT-B
            pos_antialias=True,  # DINOv2's register convention, right for new training
            pos_offset=0.0,
            remat="block",  # 16 GB chips need it; "dots" or "attention" are faster where memory allows
            scan=True,
            attention="auto",
            dtype="bfloat16",
        )
    )
    c.head = ConfigDict(dict(prototypes=65_536, bottleneck=256, hidden=2048, separate_ibot=True))
    c.loss = ConfigDict(
        dict(
            dino_weight=1.0,  # DINOv2
            ibot_weight=1.0,  # DINOv2
            koleo_weight=0.1,  # DINOv2
            adjacent_weight=1.0,  # ours: as much as DINO-M, from the first step to the last
            final_adjacent_weight=1.0,
            adjacent_warmup_steps=0,
            adjacent_updates_center=False,  # slices are more alike than views: they would drag the center
            adjacent_sinkhorn=True,  # pairs share the prototypes' balance with the global rows
            centering="sinkhorn",  # DINOv2's large recipes
            koleo_group=0,
            drop_path_group=8,  # consecutive images: the draw stays on one device where it holds as many
            patch_chunk=64,  # slots of an image: 16 MB of logits each; of all slots it would be 180
        )
    )
    c.optim = ConfigDict(
        dict(
            base_lr=2e-3,  # half of DINOv2's 4e-3, its author's advice for ViT-B
            final_lr=1e-6,
            warmup_steps=12_500,
            freeze_last_layer_steps=1250,
            weight_decay=0.04,
            final_weight_decay=0.2,
            momentum=0.994,
            final_momentum=1.0,
            teacher_temp=0.07,
            warmup_teacher_temp=0.04,
            warmup_teacher_temp_steps=37_500,
            layer_decay=0.9,
            patch_embed_lr=0.2,
            clip=3.0,
            beta1=0.9,
            beta2=0.99,  # with the halved rate, its author's advice for ViT-B
        )
    )
    c.augment = ConfigDict(
        dict(
            **options.photometrics(o["photometrics"]),
            adjacent_jitter=0.1,
            normalise="given",  # ImageNet's, as DINOv2's weights expect; or "tissue", of the training records
            mean=(0.485, 0.456, 0.406),
            std=(0.229, 0.224, 0.225),
        )
    )
    c.data = ConfigDict(
        dict(
            sources=(),  # (built folder, split, kinds, weight), ...
            box="",  # "tissue" or "full": refuse data sets built with another --box
            exclude_flags=("stereo", "spot", "mask_suspect"),  # partial views, doubtful masks
            flat_slices=False,  # slices come in pairs only
            workers=8,
            threads=2,
        )
    )
    c.run = ConfigDict(dict(log_every=50, checkpoint_every=1000, keep_checkpoints=2, diagnose_every=1000))
    return options.on_data(c, o["data"])
