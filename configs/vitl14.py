"""ViT-L/14 at 518 px, with DINOv2's values for its own ViT-L/14 where they differ from ViT-B's.

    python main.py --config=configs/vitl14.py:data=DATA --workdir=DIR --config.fsdp=8

Cost by formula: 8.9 TFLOP an image without slice pairs. Options as in vitb14_518.py. Its feed-forward
layers are plain MLPs, as in DINOv2's released ViT-L (which is distilled), not SwiGLU as in its
pretraining from scratch. Expected result: not run by us so far; no score is claimed.
"""

from configs import vitb14_518


def get_config(arg=None):
    c = vitb14_518.get_config(arg)
    c.steps = 625_000  # 500 "epochs" of 1250 steps
    c.batch_size, c.dbt_rows = 3072, 768
    c.model.update(dim=1024, depth=24, heads=16, drop_path=0.4)
    c.head.update(prototypes=131_072, bottleneck=384)  # its iBOT head has 256; ours are of one shape
    c.optim.update(
        base_lr=2e-4,
        warmup_steps=100_000,  # 80 "epochs"
        warmup_teacher_temp_steps=37_500,
        layer_decay=1.0,
        beta2=0.999,
    )
    return c
