"""A nano ViT (4 blocks, width 192) at 98 px: the demo's recipe, made to finish in minutes on two CPU cores.

    python main.py --config=configs/nano.py:demo/data --workdir=DIR

The argument is the built data set. All terms are on (DINO-M, iBOT-M, DINO-adj, KoLeo); schedules are short.
Expect the DINO and iBOT terms to fall; the features are a demonstration, not an encoder to use.
"""

from configs import vitb14_518


def get_config(arg="demo/data"):
    c = vitb14_518.get_config()
    c.steps = 300
    c.batch_size = 32
    c.dbt_rows = 8
    c.crops.update(global_size=98, local_size=42, local_number=4)
    c.model.update(dim=192, depth=4, heads=3, drop_path=0.0, remat="none", dtype="float32")
    c.model.layerscale = 1.0  # at 1e-5 all images look alike to the head for longer than this run lasts
    c.head.update(prototypes=1024, bottleneck=64, hidden=256, separate_ibot=False)
    c.loss.update(drop_path_group=0)
    c.optim.update(
        base_lr=6e-3,  # at batch 32: 1e-3
        warmup_steps=30,
        freeze_last_layer_steps=10,
        final_weight_decay=0.1,
        momentum=0.98,  # a short run needs a fast teacher
        teacher_temp=0.04,  # no warmup to DINOv2's 0.07: in so few steps it flattens the targets
        warmup_teacher_temp_steps=0,
        layer_decay=1.0,
        beta2=0.999,
    )
    c.data.update(sources=((arg, "train", ("2d", "synthetic2d", "dbt"), 1.0),), workers=0)
    c.run.update(log_every=1, checkpoint_every=100, diagnose_every=50)
    return c
