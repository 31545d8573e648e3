"""ViT-S/14 at 224 px for one GPU: 256 images a step, in micro-batches of as many as fit (16 to 256).

    python main.py --config=configs/small_batch.py:32,data=DATA --workdir=DIR

What changes at a small batch, and why (DINOv2's values are for 1000 to 3000 images): a lower rate, a
tighter clip and a longer frozen last layer against collapse (found by the DINOv2-3D-Med project at batch
120); 8,192 prototypes, because a batch must be able to use them; centering, because Sinkhorn balances
them within one batch; KoLeo within a micro-batch. Cost by formula: 0.2 TFLOP an image. Expected result:
not run by us so far; no score is claimed.
"""

from configs import options, vits14

BATCH = 256


def get_config(arg=None):
    fits, o = options.parse(arg, "32", data="", photometrics="mammo")
    micro = int(options.choose("the micro-batch", fits, ("16", "32", "64", "128", "256")))
    c = vits14.get_config(f"photometrics={o['photometrics']},data={o['data']}")
    c.batch_size, c.dbt_rows, c.accumulate = BATCH, 64, BATCH // micro
    c.crops.update(global_size=224, local_size=98)
    c.head.prototypes = 8192
    # of a micro-batch, and a multiple of the 4 images that a slice pair lies among
    c.loss.update(centering="centering", koleo_group=micro, drop_path_group=64 // c.accumulate)
    c.optim.update(base_lr=1e-3, clip=1.0, freeze_last_layer_steps=6250, final_weight_decay=0.2)
    return c
