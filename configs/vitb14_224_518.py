"""ViT-B/14 first at 224 px, then for 10,000 steps at 518 px: most steps at a fifth of the cost.

    python main.py --config=configs/vitb14_224_518.py:224,data=DATA --workdir=LOW
    python main.py --config=configs/vitb14_224_518.py:518,data=DATA,start=LOW --workdir=HIGH

The second stage follows DINOv2's paper (appendix B.2): it starts from the first one's teacher, heads
included, and goes through all schedules once more, compressed to 10,000 steps, at a lower rate; position
embeddings are resampled from 16 x 16 to 37 x 37. How much lower the rate was is unpublished: ours is
half. Cost by formula: 0.59 TFLOP an image at 224 px, 2.7 at 518 px, without slice pairs. Expected result:
not run by us so far; no score is claimed.
"""

from configs import options, vitb14_518


def get_config(arg="224"):
    stage, o = options.parse(arg, "224", data="", start="", photometrics="mammo")
    options.choose("the stage", stage, ("224", "518"))
    c = vitb14_518.get_config(f"photometrics={o['photometrics']},data={o['data']}")
    if stage == "224":
        c.crops.update(global_size=224, local_size=98)
        return c
    if not o["start"]:
        raise ValueError("stage 518 starts from the workdir of stage 224: give start=WORKDIR")
    c.init.weights = o["start"]
    c.steps = 10_000
    c.optim.update(
        base_lr=1e-3, warmup_steps=1000, freeze_last_layer_steps=100, warmup_teacher_temp_steps=3000
    )
    return c
