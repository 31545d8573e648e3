"""What decides a record's pixels: the fields of a build's recipe, and the recipes of published encoders.

A preset reproduces the chain that another encoder was trained on, as far as its authors document it, so that
a comparison gives every encoder its own input. What a preset cannot say is in its comment.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """The same settings and files give the same bytes."""

    preset: str = "mammodino"  # the name only; its values are in the other fields
    kind: str = "2d"  # of files that are no DICOM
    border: int = 0  # px cut off each side of the frame before anything else
    mask: str = "robust"  # robust | percentile (the paper's) | none
    tau: float = 60.0  # percentile of all pixels above which --mask percentile sees tissue; not in the paper
    box: str = "tissue"  # tissue | full | varying: rows and columns that are not constant
    window: str = "percentile"  # percentile of tissue | tag (VOI LUT or window of the header) | minmax
    voi_index: int = 0  # which of the header's VOI LUTs or windows
    long_side: int = 1024  # px, at most; 518 / sqrt(0.32) = 916 would do for global crops without upsampling
    mm_per_px: float | None = None  # one scale for all records, instead of long_side
    size: tuple[int, int] | None = None  # (height, width) of all records, instead of long_side
    fit: str = "stretch"  # to `size`: stretch | center: short side to it, then the central part
    clahe: float = 2.0  # clip limit; 0: none
    flip: str = "chest_wall"  # chest_wall: always on the left | display: L left, R right | none: as stored
    burned_in: str = "reject"  # reject | keep: BurnedInAnnotation=YES, text that may identify the patient
    for_processing: str = "auto"  # auto: unless its presentation image is there | reject | keep
    fast_j2k: bool = False  # decode JPEG 2000 at half size where that suffices: 3x faster, not the same bytes
    vendor_table: str = ""  # text of --vendors: rows that go before those of vendors.csv


PRESETS = {
    "mammodino": {},
    # The frame as it is: what an encoder makes of files that nobody prepared.
    "raw": dict(mask="none", box="full", window="minmax", clahe=0.0, flip="none"),
    # Mammo-CLIP's script: 5 px border off, min-max, rows and columns constant at <= 40 of 255 cut off, 1520 x
    # 912 without regard to the aspect. Its normalisation (0.3089, 0.2505) is the encoder's.
    "mammoclip": dict(
        border=5, mask="none", box="varying", window="minmax", size=(1520, 912), clahe=0.0, flip="none"
    ),
    # DBT-DINO: the header's VOI (where there is none: tissue percentiles, flagged window_fallback; theirs is
    # centre and width 512), display orientation, the whole slice squashed to a square.
    "dbt-dino": dict(
        mask="none", box="full", window="tag", size=(518, 518), clahe=0.0, flip="display", burned_in="keep"
    ),
    # RAD-DINO's image processor: short side to 518, centre crop. Its min-max before that is what its authors
    # did to chest radiographs; nothing is documented for mammograms.
    "rad-dino": dict(
        mask="none", box="full", window="minmax", size=(518, 518), fit="center", clahe=0.0, flip="none"
    ),
}
