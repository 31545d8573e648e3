"""Photometric augmentation presets of the recipes; a recipe's head says how to choose one.

`mammo` is ours: DINOv2's blur (sigma up to 2 px) and solarize teach a model to ignore calcifications.
`dinov2` is what every released DINOv2 checkpoint was trained with: its GaussianBlur(p) hands 1 - p to
RandomApply (facebookresearch/dinov2 pull request 411), so global view 1 is never blurred, global view 2
nearly always. `dinov2_intended` has the rates that were meant. Hue, saturation and grayscale do nothing
on grey images. Probabilities are for global view 1, global view 2 and local views.
"""

_DINOV2 = dict(
    jitter_prob=0.8,
    brightness=0.4,
    contrast=0.4,
    gamma=0.0,
    blur_sigma=(0.1, 2.0),
    solarize_prob=(0.0, 0.2, 0.0),
)
PRESETS = {
    "mammo": dict(
        jitter_prob=0.8,
        brightness=0.2,
        contrast=0.2,
        gamma=0.2,
        blur_prob=(0.5, 0.1, 0.5),
        blur_sigma=(0.1, 0.5),  # at most half a pixel
        solarize_prob=(0.0, 0.0, 0.0),
    ),
    "dinov2": dict(_DINOV2, blur_prob=(0.0, 0.9, 0.5)),
    "dinov2_intended": dict(_DINOV2, blur_prob=(1.0, 0.1, 0.5)),
}
