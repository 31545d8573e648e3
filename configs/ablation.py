"""What each term adds: seven runs with equal seed, steps, batches and images.

    python main.py --config=configs/ablation.py:NAME,base=vitb14_518,data=DATA --workdir=DIR

| NAME | records (`data_prep build --box`) | crops | masks | slice pairs |
|---|---|---|---|---|
| dinov2_full | full | anywhere | DINOv2's | no |
| dinov2_box | tissue | anywhere | DINOv2's | no |
| dino_m_full | full | tissue >= rho | DINOv2's | no |
| dino_m_box | tissue | tissue >= rho | DINOv2's | no |
| ibot_m | tissue | anywhere | weighted by tissue | no |
| adj | tissue | anywhere | DINOv2's | yes |
| full | tissue | tissue >= rho | weighted by tissue | yes |

`dinov2_full` and `dino_m_full` differ as in the paper; on records cropped to the tissue a crop has less
to avoid. A data set of the other box is refused. Photometrics are equal in all (photometrics=dinov2 for
Meta's). Runs without slice pairs still see the same slices k. base: nano, vits14, vitb14_518, vitl14.
Cost: see the base's head.
"""

from configs import options

NAMES = ("dinov2_full", "dinov2_box", "dino_m_full", "dino_m_box", "ibot_m", "adj", "full")


def get_config(arg="full"):
    name, o = options.parse(arg, "full", base="vitb14_518", data="", photometrics="mammo")
    options.choose("the ablation", name, NAMES)
    c = options.base_recipe(o["base"], o["data"])
    c.augment.update(options.photometrics(o["photometrics"]))
    c.data.box = "full" if name.endswith("_full") else "tissue"
    if name not in ("dino_m_full", "dino_m_box", "full"):
        c.crops.update(global_coverage=0.0, local_coverage=0.0)
    if name not in ("ibot_m", "full"):
        c.mask.update(of="all", min_coverage=0.0, strength=0.0)
    if name not in ("adj", "full"):
        c.pairs.mode = "none"
    return c
