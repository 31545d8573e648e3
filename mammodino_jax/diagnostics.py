"""Live diagnostics: the signatures of known failures, and the one plain warning that each of them raises.

A Watch sees the metrics of every step. A rule fires while one of its signs holds over the last steps; a sign
is a set of bounds on figures (means over these steps) that must all hold. Sources: reference signatures of
DINOv2 issues 143, 272, 407 and of MammoDINO (arXiv 2510.11883, failure signatures).
"""

import collections
import dataclasses
import math
import operator

from absl import logging

from mammodino_jax.data.crops import NOTHING

WINDOW = 20  # steps that figures are averaged over
AWAY = 100  # steps that a warning must have been away for to be told again
FEW_PATIENTS, LEAD = 10, 0.2  # a held-out score of fewer patients, or so close to chance, is not watched


@dataclasses.dataclass(frozen=True)
class Rule:
    """A named failure. A sign is ((figure, "<" or ">", limit), ...): all must hold; any sign will do."""

    name: str
    signs: tuple
    means: str
    advice: str
    steps: int = WINDOW  # that figures are averaged over; the whole run where it is shorter
    early: bool = True  # False: not before `start_steps`, where a healthy run looks alike


# Figures are metrics or made of them (`figure`). Before the signs, in their order: means over 20 steps of the
# nano recipe at batch 8 on phantoms, healthy (200 steps) and failing.
RULES = (
    Rule(
        "not_finite",
        ((("bad", ">", 0),),),
        "the loss or a gradient was not finite: the step changed nothing, and a third in a row ends the run",
        "halve optim.base_lr, lengthen its warmup, look into WORKDIR/bad; bfloat16 instead of float16",
        steps=1,
    ),
    Rule(
        "uniform_collapse",
        # healthy: entropy 0.87 to 0.91 while ce passes 1; learning rate x 100: entropy 1.000, ce 1.0004
        ((("ce", ">", 0.995), ("ce", "<", 1.005), ("teacher_entropy", ">", 0.98)),),
        "the cross-entropy is stuck at ln K and the teacher's targets are uniform: nothing is learnt",
        "lower optim.base_lr, then optim.teacher_temp; loss.centering sinkhorn",
        early=False,
    ),
    Rule(
        "one_prototype",
        # healthy: 0.002, 0.87, 1.00; teacher at T 0.001: 0.77, 0.005, 0.59; no centering: 0.82, 0.06, 0.20
        ((("prototype_kl", ">", 0.75),), (("teacher_entropy", "<", 0.1),), (("ce", "<", 0.05),)),
        "the targets are close to a single prototype: for all images alike, or too sharp for each",
        "raise optim.teacher_temp, lower optim.base_lr, loss.centering sinkhorn, fewer head.prototypes",
    ),
    Rule(
        "identical_features",
        # healthy: 0.42, 0.70, rank 6.6 to 15; LayerScale 1e-5: 1.000, 6.6, rank 3.7 at step 50
        ((("cls_cosine", ">", 0.995), ("koleo", ">", 3.0)), (("held_out/rank", "<", 2.0),)),
        "all images have nearly the same CLS token",
        "look at samples/ (are the images alike?), raise model.layerscale or optim.base_lr",
        early=False,
    ),
    Rule(
        "diverging",
        # healthy: 0.26 to 0.42, at most 1.05; learning rate x 100: 0.67 to 0.81, 1.07
        ((("teacher_distance", ">", 0.7),), (("ce", ">", 1.3),)),
        "the student runs away from its teacher, or guesses worse than at random: steps are too large",
        "divide optim.base_lr by 2 to 10, lengthen optim.warmup_steps, lower optim.clip",
        early=False,  # a teacher at LayerScale 1e-5 lags behind at first
    ),
    Rule(
        "dead_prototypes",
        # healthy: 0; no failing run measured
        ((("dead", ">", 0.5),),),
        "most prototypes are never used although the batch could reach them all",
        "fewer head.prototypes, loss.centering sinkhorn, longer optim.freeze_last_layer_steps",
        early=False,
    ),
    Rule(
        "same_patient_neighbours",
        # healthy: 0.02 to 0.10; no failing run measured
        ((("koleo_same_patient", ">", 0.9),),),
        "nearly every image's nearest neighbour in the batch is of its own patient: a shortcut",
        "more patients a batch (another source or weight), loss.koleo_group across patients",
        early=False,
    ),
    Rule(
        "held_out_fall",
        # DINOv2 issue 204: k-NN 80 % to 10 %; not measured here
        ((("lost", ">", 0.6),),),
        "the score on held-out images (held_out/knn or /retrieval) has lost most of its lead over chance",
        "for a start from weights: longer init.freeze_steps, lower optim.base_lr; take an earlier checkpoint",
    ),
    Rule(
        "mask_failure",
        # healthy: 0 (60 real images too; on full frames 0.38 of global, 0.009 of local windows), spread 0.80
        # to 0.89 (real 0.61 to 1.02, full frames 0.41 to 1.02), coverage 0.89; empty masks: fallback 1
        (
            (("fallback", ">", 0.01), ("full_frames", "<", 1)),
            (("data/local_fallback", ">", 0.05),),
            (("data/local_spread", "<", 0.4),),
            (("data/global_coverage", ">", 0.999),),
        ),
        "tissue masks look wrong: crops find too little tissue, crowd at one place, or see no background",
        "python -m data_prep report DATA and look at the masks; another --mask or --tau; lower rho",
    ),
    *(
        Rule(
            f"coverage_idle_{kind}",
            (((f"data/{kind}_would_reject", "<", NOTHING), (f"rho_{kind}", ">", 0.0)),),
            f"crops.{kind}_coverage (rho) does nothing on these records: DINO-M's crops are DINOv2's",
            "raise it, or build full-frame records (data_prep build --box full); 0 says that this is meant",
            steps=100,
        )
        for kind in ("global", "local")
    ),
    Rule(
        "flat_images",
        # 60 real images: mean 50, at least 28; constant: 0
        ((("contrast", "<", 3.0),),),
        "crops hold next to no contrast within the tissue: outlines and brightness are all there is to learn",
        "look at samples/; python -m data_prep report DATA: another --window, or files that are not images",
    ),
    Rule(
        "slice_misalignment",
        # healthy: 0.96, 0.002; shifted by 0.2: 0.16, 0.20; another volume: 0.05, 0.30 (real: 0.33, 0.16)
        ((("pair_ncc", "<", 0.6),), (("pair_shift", ">", 0.08),)),
        "the two slices of a pair do not show the same place",
        "check slice order and volume_id in the index; fewer pairs.offsets or in mm; lower pairs.jitter",
    ),
    Rule(
        "excessive_masking",
        # healthy: 0.63 to 0.66, 0.27 to 0.31; ratio 0.9: 0.1, 0.9 by construction
        ((("visible", "<", 0.15), ("data/masked_share", ">", 0.5)), (("data/masked_share", ">", 0.75),)),
        "too few tissue patches of a masked view stay visible for its CLS token to tell anything",
        "lower mask.ratio (DINOv2: 0.1 to 0.5), or mask.of tissue",
    ),
)
_HOLDS = {"<": operator.lt, ">": operator.gt}


def start_steps(recipe) -> int:
    """Until when features of a healthy run may still be alike: LayerScale of 1e-5 grows with the warmup."""
    return recipe.init.freeze_steps + max(WINDOW, recipe.optim.warmup_steps // 2)


def figure(name: str, rows, recipe) -> float:
    """A metric's mean over rows where it is known, or a figure made of metrics; NaN: unknown."""

    def mean(metric: str) -> float:
        values = [row[metric] for row in rows if math.isfinite(row.get(metric, math.nan))]
        return sum(values) / len(values) if values else math.nan

    K, crops = recipe.head.prototypes, recipe.crops
    match name:
        case "ce":  # in units of ln K
            return (mean("dino_global") + mean("dino_local")) / math.log(K)
        case "fallback":  # of all views
            views = 2 + crops.local_number
            return (
                2 * mean("data/global_fallback") + crops.local_number * mean("data/local_fallback")
            ) / views
        case "visible":  # share of a view's patches that are tissue and not masked
            return mean("data/visible_tissue") / (crops.global_size // crops.patch) ** 2
        case "dead":  # only where the rows, of exp(entropy) prototypes each, could use every one four times
            targets = 2 * recipe.batch_size / recipe.accumulate
            reach = targets * K ** mean("teacher_entropy") / K
            return mean("prototypes_dead") if reach >= 4 else math.nan
        case "rho_global" | "rho_local":  # unset: a positive default
            rho = getattr(crops, f"{name[4:]}_coverage")
            return 1.0 if rho is None else rho
    return mean(name)


class Watch:
    """Tells a failure once when its signature begins, and again when it comes back."""

    def __init__(self, recipe, past=(), held_out=None, active: bool = True, full: bool = False):
        """Go on after the rows `past` of metrics.jsonl.

        `active`: False never logs (other processes). `full`: some records are full frames, where many large
        windows have no place with rho tissue, whatever the masks.
        """
        self._recipe, self._active = recipe, active
        self._rows: collections.deque = collections.deque(maxlen=max(rule.steps for rule in RULES))
        self._held: dict[str, int] = {}  # the last step at which a warning held
        self._chance = held_out.chance if held_out and held_out.patients >= FEW_PATIENTS else math.nan
        self._scores: list[float] = []
        self._known = {"full_frames": float(full)}
        for row in past:
            self._take(row["step"], row)
            self._held |= {name: row["step"] for name in row if name.startswith("warning/")}

    def __call__(self, step: int, metrics: dict[str, float]) -> dict[str, float]:
        """The metrics of a step, with "warning/<name>": 1.0 for each signature that holds."""
        self._take(step, metrics)
        holding = {}
        for rule in RULES:
            if not (sign := self._sign(rule, step)):
                continue
            name = f"warning/{rule.name}"
            holding[name] = 1.0
            if self._active and step - self._held.get(name, -AWAY) >= AWAY:
                logging.warning(
                    "%s at step %d: %s (%s). Try: %s", rule.name, step, rule.means, sign, rule.advice
                )
            self._held[name] = step
        return metrics | holding

    def _take(self, step: int, metrics: dict[str, float]) -> None:
        score = metrics.get("held_out/knn", metrics.get("held_out/retrieval"))
        if score is not None:
            self._scores.append(score)
            self._known |= {name: v for name, v in metrics.items() if name.startswith("held_out/")}
            self._known["lost"] = self._lost()
        self._rows.append((step, self._known | metrics))

    def _lost(self) -> float:
        """Share of the first score's lead over chance that the last two lack; NaN: no lead to speak of."""
        lead = self._scores[0] - self._chance
        if len(self._scores) < 3 or not lead >= LEAD:
            return math.nan
        return 1 - (max(self._scores[-2:]) - self._chance) / lead

    def _sign(self, rule: Rule, step: int) -> str:
        """The sign of a rule that holds, in words, or "" where none does."""
        steps = min(rule.steps, self._recipe.steps)
        rows = [row for at, row in self._rows if at > step - steps]
        if len(rows) < steps or (step < start_steps(self._recipe) and not rule.early):
            return ""
        for sign in rule.signs:
            found = [(name, figure(name, rows, self._recipe), how, limit) for name, how, limit in sign]
            if all(_HOLDS[how](value, limit) for _, value, how, limit in found):
                return ", ".join(f"{name} {value:.4g}, limit {limit:g}" for name, value, _, limit in found)
        return ""
