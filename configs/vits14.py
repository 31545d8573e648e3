"""ViT-S/14 at 518 px: the paper's method on the smallest of DINOv2's backbones; for one machine with GPUs.

    python main.py --config=configs/vits14.py:data=DATA --workdir=DIR

Cost by formula: 0.9 TFLOP an image without slice pairs, a third of ViT-B's. Options as in vitb14_518.py.
Expected result: not run by us so far; no score is claimed.
"""

from configs import vitb14_518


def get_config(arg=None):
    c = vitb14_518.get_config(arg)
    c.model.update(dim=384, heads=6)
    return c
