"""Miniature CBIS-DDSM, INbreast, BCS-DBT and mini-MIAS trees in the layout of each, with their traps.

Each `make_*(root, breast, write_dicom)` fills the folder `root` and returns it; `breast` and `write_dicom` are
the fixtures of tests/data_prep/conftest.py.
"""

import plistlib

import cv2
import numpy as np

HEIGHT, WIDTH = 160, 128
LEFT, RIGHT = "left", "right"


def _image(breast, side: str, seed: int) -> np.ndarray:
    """u16 [160, 128] with the chest wall where a breast of that side (L | R) has it."""
    return breast(HEIGHT, WIDTH, LEFT if side == "L" else RIGHT, seed=seed)


MASS = (
    "patient_id,breast_density,left or right breast,image view,abnormality id,abnormality type,mass shape,mass "
    "margins,assessment,pathology,subtlety,image file path,cropped image file path,ROI mask file path"
)
CALC = MASS.replace("breast_density", "breast density").replace("mass shape", "calc type")
CALC = CALC.replace("mass margins", "calc distribution")
CBIS_BOX = (60, 20, 90, 50)  # of every mask that fits


def make_cbis_ddsm(root, breast, write_dicom):
    """P_00001: two abnormalities on one film, the second with mask and cropped image swapped, and a mask of
    another size on the MLO. P_00002: mass train and calc test, the CC film on disk twice. P_00003: newer file
    names, assessment 0. P_00004: in a table, not on disk. P_00005: on disk, in no table."""
    tree = root / "manifest-1" / "CBIS-DDSM"
    mask = np.zeros((HEIGHT, WIDTH), np.uint16)
    mask[CBIS_BOX[0] : CBIS_BOX[2], CBIS_BOX[1] : CBIS_BOX[3]] = 255
    crop = np.full((30, 30), 900, np.uint16)

    def write(case: str, pixels, file="1.2/1.3/000000.dcm", **attributes) -> str:
        path = tree / case / file
        path.parent.mkdir(parents=True, exist_ok=True)
        write_dicom(path, pixels, PatientID=case, **attributes)  # as in the set: the case, not the patient
        return f"{case}/{file}"

    def film(case: str, seed: int, **kwargs) -> str:
        *_, side, view = case.split("_")
        return write(
            case, _image(breast, side[0], seed), ImageLaterality=side[0], ViewPosition=view, **kwargs
        )

    def line(case, path, number, kind, assessment, pathology, roi=("", ""), density=3):
        _, patient, side, view = (
            case.replace("_P_", " P_").replace("_LEFT_", " LEFT ").replace("_RIGHT_", " RIGHT ").split()
        )
        words = [
            patient,
            density,
            side,
            view,
            number,
            kind,
            "OVAL",
            "ILL",
            assessment,
            pathology,
            4,
            path,
            *roi,
        ]
        return ",".join(map(str, words))

    tables = {"mass_train": [], "mass_test": [], "calc_train": [], "calc_test": []}
    case = "Mass-Training_P_00001_LEFT_CC"
    path = film(case, 1)
    roi = write(f"{case}_1", crop, "1.4/1.5/000001.dcm"), write(f"{case}_1", mask)
    swapped = write(f"{case}_2", mask), write(f"{case}_2", crop, "1.4/1.5/000001.dcm")
    tables["mass_train"] += [
        line(case, path, 1, "mass", 2, "BENIGN_WITHOUT_CALLBACK", roi),
        line(case, path, 2, "mass", 5, "MALIGNANT", swapped),
    ]
    case = "Mass-Training_P_00001_LEFT_MLO"
    roi = write(f"{case}_1", crop, "1.4/1.5/000001.dcm"), write(f"{case}_1", np.pad(mask, 8))
    tables["mass_train"].append(line(case, film(case, 2), 1, "mass", 4, "BENIGN", roi))

    case = "Mass-Training_P_00002_RIGHT_CC"
    tables["mass_train"].append(line(case, film(case, 3), 1, "mass", 3, "BENIGN", density=2))
    case = "Calc-Test_P_00002_RIGHT_CC"
    tables["calc_test"].append(line(case, film(case, 3), 1, "calcification", 4, "MALIGNANT", density=2))
    case = "Mass-Training_P_00002_RIGHT_MLO"
    tables["mass_train"].append(line(case, film(case, 4), 1, "mass", 3, "BENIGN", density=0))

    case = "Calc-Training_P_00003_LEFT_CC"
    film(case, 5, file="08-07-2016-DDSM-1/1.000000-full/1-1.dcm")
    write(f"{case}_1", crop, "08-07-2016-DDSM-2/1.000000-ROI/1-1.dcm")
    write(f"{case}_1", mask, "08-07-2016-DDSM-2/1.000000-ROI/1-2.dcm")
    old = (
        f"{case}_1/1.2/1.3/000001.dcm",
        f'"{case}_1/1.2/1.3/000000.dcm\n"',
    )  # with a line end, as in the set
    listed = line(case, f"{case}/1.2/1.3/000000.dcm", 1, "calcification", 0, "BENIGN", old)
    tables["calc_train"].append(listed)
    case = "Mass-Test_P_00004_LEFT_CC"
    tables["mass_test"].append(line(case, f"{case}/1.2/1.3/000000.dcm", 1, "mass", 4, "MALIGNANT"))
    film("Mass-Training_P_00005_RIGHT_MLO", 6)
    for name, lines in tables.items():
        kind, split = name.split("_")
        table = root / f"{kind}_case_description_{split}_set.csv"
        table.write_text("\n".join([MASS if kind == "mass" else CALC, *lines]) + "\n")
    return root


INBREAST = (
    "Patient ID;Patient age;Laterality;View;Acquisition date;File Name;ACR;Bi-Rads;Mass ;Micros;Distortion;"
    "Asymmetry;Findings Notes (in Portuguese);Other Notes;Lesion Annotation Status;Pectoral Muscle Annotation;"
    "Other Annotations"
)


def make_inbreast(root, breast, write_dicom):
    """Patient aaaa: two views, a mass (4c) with outlines. bbbb: BI-RADS 1, an outlined calcification without an X;
    and 6 with broken outlines. 33: a copy's file name without a hash. 44: not on disk. cccc: in no table."""
    dicoms, outlines = root / "INbreast Release 1.0" / "AllDICOMs", root / "INbreast Release 1.0" / "AllXML"
    dicoms.mkdir(parents=True)
    outlines.mkdir()
    names = ("11_aaaa_MG_L_CC_ANON", "12_aaaa_MG_L_ML_ANON", "21_bbbb_MG_R_CC_ANON", "22_bbbb_MG_R_ML_ANON", "33",
             "55_cccc_MG_R_ML_ANON")  # fmt: skip
    for seed, name in enumerate(names):
        side = "R" if "_R_" in name else "L"
        pixels = _image(breast, side, seed)
        write_dicom(dicoms / f"{name}.dcm", pixels, PatientID="", ImageLaterality=side, ViewPosition="")
    (dicoms / "._11_aaaa_MG_L_CC_ANON.dcm").write_bytes(b"\0" * 9)  # left by a Mac
    lines = [
        "removed;removed;L;CC;201001;11;2;1;;;;;;;;;",
        "removed;removed;L;MLO;201001;12.0;2;4c;X;;;;massa;;ANNOTATED;;",
        "removed;removed;R;CC;201001;21.0;4;1;;;;;;;;;",
        "removed;removed;R;MLO;201001;22.0;;6;;X;;X;;;;;",
        "removed;removed;L;CC;201001;33.0;1;2;;;;;normal;;;;",
        "removed;removed;L;CC;201001;44.0;1;3;;;X;;;;;;",
        ";;;;;;;;108;;;;;;;;",  # sums
    ]
    (root / "INbreast Release 1.0" / "INbreast.csv").write_text(
        "\n".join([INBREAST, *lines]) + "\n", "latin-1"
    )
    mass = {"Name": "Mass", "NumberOfPoints": 3, "Point_px": ["(30.5, 60.0)", "(50.0, 70.0)", "(40.0, 90.5)"]}
    point = {"Name": "Calcification", "NumberOfPoints": 1, "Point_px": ["(70.0, 80.0)"]}
    for name, rois in (("12", [mass, point]), ("21", [point])):
        content = {"Images": [{"ImageIndex": 0, "NumberOfROIs": len(rois), "ROIs": rois}]}
        (outlines / f"{name}.xml").write_bytes(plistlib.dumps(content))
    (outlines / "22.xml").write_text("<plist><dict><key>Images")
    return root


def make_bcs_dbt(root, breast, write_dicom):
    """DBT-P00001 (train): normal lcc in an unreadable laterality header, cancer rmlo stored turned by 180 degrees.
    P00002 (train): repeated view, actionable, found by its classic path under another name. P00003 (val): benign.
    P00004 (test): no labels table; one volume not on disk. P00005: on disk, in no table."""
    tree = root / "manifest-1617905855234"
    top = "Breast-Cancer-Screening-DBT"

    def volume(side: str, seed: int) -> np.ndarray:
        return np.stack([_image(breast, side, seed) + z for z in range(4)])

    def write(path: str, pixels, patient: str, side: str, view: str):
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        attributes = {"PatientID": patient, "ImageLaterality": side, "ViewPosition": view}
        write_dicom(tree / path, pixels, positions=[0.0, 1.0, 2.0, 3.0], **attributes)

    paths = {"train": [], "validation": [], "test": []}

    def add(split, patient, study, view, name="1-1.dcm", pixels=None, header=None, classic=False):
        descriptive = f"{top}/{patient}/01-01-2000-{study}-MAMMO/{view}-NA/1-1.dcm"
        old = f"{top}/{patient}/1.2.{study[-3:]}/1.3.{len(paths[split])}/1-1.dcm"
        paths[split].append(f"{patient},{study},{view},{descriptive},{old}")
        if pixels is not None:
            place = (old if classic else descriptive).replace("1-1.dcm", name)
            write(place, pixels, patient, header or view[0].upper(), view[1:].rstrip("0123456789").upper())

    add("train", "DBT-P00001", "DBT-S00001", "lcc", pixels=volume("L", 1), header="R")
    add("train", "DBT-P00001", "DBT-S00001", "rmlo", pixels=volume("R", 2)[:, ::-1, ::-1])
    add("train", "DBT-P00002", "DBT-S00002", "lmlo", pixels=volume("L", 3))
    add("train", "DBT-P00002", "DBT-S00002", "lmlo2", name="7f3e.dcm", pixels=volume("L", 4), classic=True)
    add("validation", "DBT-P00003", "DBT-S00003", "rcc", pixels=volume("R", 5))
    add("test", "DBT-P00004", "DBT-S00004", "lcc", pixels=volume("L", 6))
    add("test", "DBT-P00004", "DBT-S00004", "rcc")
    write(f"{top}/DBT-P00005/extra/1-1.dcm", volume("L", 7), "DBT-P00005", "L", "CC")

    def table(name: str, head: str, lines: list[str]):
        (root / f"BCS-DBT-{name}.csv").write_text("\n".join([head, *lines]) + "\n")

    head = "PatientID,StudyUID,View,descriptive_path,classic_path"
    table("file-paths-train", head, [])  # the older version; -v2 counts
    for split in paths:
        table(f"file-paths-{split}-v2", head, paths[split])
    head = "PatientID,StudyUID,View,Normal,Actionable,Benign,Cancer"
    lines = [
        "DBT-P00001,DBT-S00001,lcc,1,0,0,0",
        "DBT-P00001,DBT-S00001,rmlo,0,0,0,1",
        "DBT-P00002,DBT-S00002,lmlo,1,0,0,0",
        "DBT-P00002,DBT-S00002,lmlo2,0,1,0,0",
        "DBT-P09999,DBT-S09999,lcc,1,0,0,0",  # a volume of another version
    ]
    table("labels-train-v2", head, lines)
    table("labels-validation-PHASE-2-Jan-2024", head, ["DBT-P00003,DBT-S00003,rcc,0,0,1,0"])
    head = "PatientID,StudyUID,View,Subject,Slice,X,Y,Width,Height,Class,AD,VolumeSlices"
    lines = ["DBT-P00001,DBT-S00001,rmlo,1,2,90,60,20,30,cancer,0,4"]
    table("boxes-train-v2", head, lines)
    table(
        "boxes-validation-v2-PHASE-2-Jan-2024", head, ["DBT-P00003,DBT-S00003,rcc,2,0,95,70,10,12,benign,1,4"]
    )
    return root


INFO = """\
        THE MINI-MIAS DATABASE OF MAMMOGRAMS

1st column: MIAS database reference number, such as mdb001.

mdb001 G CIRC B 535 425 197
mdb002 G CIRC B 522 280 69
mdb003 D NORM
mdb004 D NORM
mdb005 F CIRC B 477 133 30
mdb005 F SPIC M 500 168 26
mdb006 F CALC M *NOTE 3*
mdb007 G CIRC B
mdb009 F ASYM B 400 300 40

NOTES
=====
1) The list is arranged in pairs of films, where each pair
   represents the left (even filename numbers) and right mammograms
   (odd filename numbers) of a single patient.
"""


def make_mias(root, breast, write_dicom=None):
    """Films 1 to 8, the eighth in no line; 9 is listed, but not on disk."""
    (root / "all-mias").mkdir(parents=True)
    (root / "Info.txt").write_text(INFO)
    for film in range(1, 9):
        pixels = breast(1024, 1024, RIGHT if film % 2 else LEFT, seed=film)
        cv2.imwrite(str(root / "all-mias" / f"mdb{film:03d}.pgm"), (pixels >> 4).astype(np.uint8))
    return root
