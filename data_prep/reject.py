"""Why a file yields no record."""

REASONS = {  # by code
    "missing": "Listed in a table, but not there.",
    "not_dicom": "Neither DICOM nor PNG, JPEG, PGM or TIFF.",
    "unreadable": "The file cannot be opened or its header cannot be parsed.",
    "truncated": "Part of the file is missing.",
    "too_large": "The header claims a size that no detector has, or the file inflates without end.",
    "decode_error": "No decoder gives pixels that fit the header.",
    "unsupported_syntax": "Compressed in a way that no decoder here reads.",
    "highbit": "An unusual layout of bits, or of pixel types.",
    "not_monochrome": "A colour image.",
    "unsupported_class": "Another kind of DICOM object than a mammogram.",
    "secondary_capture": "A screenshot or scan that is no mammogram by its header.",
    "hologic_sco": "Hologic's own tomosynthesis container; export it as standard tomosynthesis objects.",
    "projection": "A tomosynthesis projection, not a reconstructed slice.",
    "spot_mag": "A spot compression or magnification view.",
    "specimen": "A radiograph of excised tissue.",
    "burned_in": "The header says that text is burned in; it may identify the patient.",
    "qc": "A quality-control image, or pixels without the structure of tissue.",
    "for_processing": "Raw exposure: its presentation image is there too, or raw images were excluded.",
    "duplicate": "The same image again.",
    "no_spacing": "The pixel size is unknown, and the settings need it.",
    "empty_tissue": "No tissue found.",
    "tissue_fraction": "Too little tissue to be a breast.",
    "low_contrast": "Hardly any grey levels in the tissue.",
    "crashed": "Reading it ended the process, as where memory does not suffice.",
    "failed": "An error of this program; please report it.",
}


class Reject(Exception):
    """A file that yields no record. `code` is one of REASONS, `detail` a sentence, `member` the place of the
    file at fault in a volume of one file a slice (None: not known, or the whole)."""

    def __init__(self, code: str, detail: str = "", member: int | None = None):
        # All in args, so that they survive pickling between processes.
        super().__init__(code, detail, member)
        self.code, self.detail, self.member = code, detail, member

    def __str__(self) -> str:
        return f"{self.code}: {self.detail}" if self.detail else self.code
