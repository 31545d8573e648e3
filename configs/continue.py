"""Continue from pretrained weights in two stages: DINOv2, RAD-DINO, DBT-DINO, or a run of ours.

    python main.py --config=configs/continue.py:hub:dinov2_vitb14_pretrain.pth --workdir=DIR \\
        --config.data.sources="(('DATA','train',('2d','dbt'),1.0),)"
    python main.py --config=configs/continue.py:hf:RAD,heads=RAD/dino_head.safetensors --workdir=DIR ...
    python main.py --config=configs/continue.py:dbt-dino:FILE.pth --workdir=DIR ...

Released DINOv2 weights have no heads, and fresh heads on a moving backbone wreck it within 30,000 images
(k-NN 80 % to 10 %, facebookresearch/dinov2 issue 204). So the backbone, but for its patch embedding,
stays frozen for 10,000 steps while the heads warm up, then its rate rises over 1000 steps and stays low
and constant: Meta's FINO branch. With heads (RAD-DINO, DBT-DINO) the first stage is short. ViT-S:
--config.model.dim=384 --config.model.heads=6. Cost as in vitb14_518.py. Expected result: see
docs/training.md for what a small run did; no score is claimed.
"""

from ml_collections.config_dict import placeholder

from configs import options, vitb14_518


def get_config(arg=None):
    weights, o = options.parse(arg, "", heads="", data="", photometrics="mammo")
    c = vitb14_518.get_config(f"photometrics={o['photometrics']},data={o['data']}")
    ours = bool(weights) and weights.partition(":")[0] not in ("hub", "timm", "hf", "dbt-dino", "biomedclip")
    warm = ours or bool(o["heads"]) or weights.startswith("dbt-dino:")
    c.init.update(
        weights=weights, heads=o["heads"], freeze_steps=1000 if warm else 10_000, unfreeze_steps=1000
    )
    c.steps = 25_000
    del c.model.image_size  # it would follow crops.global_size
    c.model.image_size = 518  # the grid of the weights' position embeddings, whatever the crops
    if not ours:  # with registers: --config.model.pos_antialias=True --config.model.pos_offset=0.0
        c.model.update(pos_antialias=False, pos_offset=0.1)  # as weights without registers were trained
    c.head.separate_ibot = ours or not warm  # DBT-DINO has one head for both; RAD-DINO, we assume, too
    c.optim.update(
        base_lr=2e-4,  # FINO's 5e-5 by DINOv3's rule, which has a factor of 4 more
        final_lr=placeholder(float),  # unset: constant; nobody knows how long is long enough
        warmup_steps=3000,
        freeze_last_layer_steps=450,
        weight_decay=0.04,
        final_weight_decay=0.04,
        momentum=0.994,
        final_momentum=0.999,
        warmup_teacher_temp_steps=10_000,
        beta2=0.999,
    )
    return c
