"""Labels that several data sets give: what a BI-RADS category says, and what it does not."""

IMAGE = {"level": "image"}
NO_YES = IMAGE | {"classes": ["no", "yes"]}
BIRADS_LABELS = {
    "label_birads": IMAGE | {
        "classes": list("12345"),
        "rule": "BI-RADS 1 to 5 (4a, 4b, 4c: 4); of several abnormalities the highest; 0 and 6: unknown",
    },
    "label_recall": NO_YES | {"rule": "1: BI-RADS 0; 0: BI-RADS 1 or 2; 3 to 6: unknown"},
    "label_suspicious_birads45": NO_YES | {"rule": "1: BI-RADS 4 or 5; 0: 1 to 3; else unknown; no biopsy"},
    "label_suspicious_birads5": NO_YES | {"rule": "1: BI-RADS 5; 0: 1 to 4; else unknown; no biopsy"},
}  # fmt: skip


def birads_labels(birads: int | None) -> dict[str, int | None]:
    """The labels that a BI-RADS category 0 to 6 gives; BIRADS_LABELS has their rules."""
    known = birads is not None and 1 <= birads <= 5
    return {
        "label_birads": birads - 1 if known else None,
        "label_recall": {0: 1, 1: 0, 2: 0}.get(birads),
        "label_suspicious_birads45": int(birads >= 4) if known else None,
        "label_suspicious_birads5": int(birads == 5) if known else None,
    }
