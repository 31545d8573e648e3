"""Miniature VinDr-Mammo, RSNA, EMBED and CMMD trees in the layout of each, with their traps.

Each `make_*(root, breast, write_dicom)` fills the folder `root` and returns it; `breast` and `write_dicom` are
the fixtures of tests/data_prep/conftest.py.
"""

import csv

JPEG_2000 = "1.2.840.10008.1.2.4.90"


def _write(breast, write_dicom, path, side: str, view: str, seed: int, **attributes):
    """A u16 [160, 128] image with the chest wall where a breast of that side (L | R) has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = breast(160, 128, "left" if side == "L" else "right", seed=seed)
    attributes = {"ImageLaterality": side, "ViewPosition": view} | attributes
    if attributes.get("PhotometricInterpretation") == "MONOCHROME1":
        pixels = 4095 - pixels
    write_dicom(path, pixels, **attributes)


def _write_csv(path, columns: str, lines: list[tuple]):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([columns.split(","), *lines])


VINDR = "study_id,series_id,image_id,laterality,view_position,height,width,breast_birads,breast_density"


def make_vindr(root, breast, write_dicom):
    """s1 (training): L CC twice and no L MLO, densities of L and R differ, a mass with calcifications. s2 (test):
    BI-RADS 5, an axillary finding without a box. s3 (training): BI-RADS 2 and 4, one file not on disk. s4
    (training): blank labels, absent from the findings. s1 and s5: files in no table."""
    base = root / "vindr-mammo" / "1.0.0"
    images = [  # study, image, side, view, BI-RADS, density, split
        ("s1", "i11", "L", "CC", 4, "C", "training"),
        ("s1", "i12", "L", "CC", 4, "C", "training"),
        ("s1", "i13", "R", "CC", 1, "B", "training"),
        ("s1", "i14", "R", "MLO", 1, "B", "training"),
        ("s2", "i21", "L", "MLO", 5, "A", "test"),
        ("s2", "i22", "R", "MLO", 3, "A", "test"),
        ("s3", "i31", "L", "CC", 2, "D", "training"),
        ("s3", "i32", "R", "CC", 1, "D", "training"),  # not on disk
        ("s4", "i41", "R", "MLO", None, None, "training"),
    ]
    lines, known = [], {}
    for seed, (study, image, side, view, birads, density, split) in enumerate(images):
        values = f"BI-RADS {birads}" if birads else "", f"DENSITY {density}" if density else ""
        known[image] = (study, f"series{seed}", image, side, view, 160, 128, *values)
        lines.append((*known[image], split))
        if image != "i32":
            path = base / "images" / study / f"{image}.dicom"
            inverted = {"PhotometricInterpretation": "MONOCHROME1"} if image == "i14" else {}
            _write(breast, write_dicom, path, side, view, seed, PatientID=f"other-{seed}", **inverted)
    _write_csv(base / "breast-level_annotations.csv", f"{VINDR},split", lines)
    for study, image, seed in (("s1", "extra", 20), ("s5", "i51", 21)):
        path = base / "images" / study / f"{image}.dicom"
        _write(breast, write_dicom, path, "L", "MLO", seed, PatientID=f"other-{seed}")
    findings = [  # image, categories, BI-RADS, xmin, ymin, xmax, ymax
        ("i11", "['Mass', 'Suspicious Calcification']", "BI-RADS 4", 10.5, 60.0, 40.5, 90.25),
        ("i11", "['Skin Thickening']", "BI-RADS 3", 5, 20, 15, 80),
        ("i12", "['No Finding']", "", "", "", "", ""),
        ("i13", "['No Finding']", "", "", "", "", ""),
        ("i14", "['No Finding']", "", "", "", "", ""),
        ("i21", "['Suspicious Lymph Node']", "", "", "", "", ""),
        ("i22", "['Suspicious Calcification']", "BI-RADS 3", 90, 70, 100, 85),
        ("i31", "['No Finding']", "", "", "", "", ""),
        ("i32", "['No Finding']", "", "", "", "", ""),
    ]
    columns = f"{VINDR},finding_categories,finding_birads,xmin,ymin,xmax,ymax,split"
    splits = {line[2]: line[-1] for line in lines}
    lines = [(*known[image], *rest, splits[image]) for image, *rest in findings]
    _write_csv(base / "finding_annotations.csv", columns, lines)
    return root


def make_rsna(root, breast, write_dicom):
    """10006 (site 2): cancer left, invasive, BIRADS 0. 10011 (site 1): BIRADS 1 and 2, density C, an AT view. 10025
    (site 1): recalled, difficult; one blank BIRADS, one file not on disk. 10038 (site 2): BIRADS 2 and density A
    where there should be none. 10008: in test.csv. 10011 and 10099: files in no table."""
    images = [  # site, patient, image, side, view, cancer, invasive, BIRADS, implant, density, machine, difficult
        (2, 10006, 1, "L", "CC", 1, 1, "0", 0, "", 29, False),
        (2, 10006, 2, "R", "CC", 0, 0, "", 0, "", 29, False),
        (1, 10011, 3, "L", "CC", 0, 0, "1.0", 0, "C", 49, False),
        (1, 10011, 4, "R", "MLO", 0, 0, "2.0", 0, "C", 49, False),
        (1, 10011, 5, "R", "AT", 0, 0, "2.0", 0, "C", 49, False),
        (1, 10025, 6, "L", "MLO", 0, 0, "0.0", 1, "B", 21, True),
        (1, 10025, 7, "R", "MLO", 1, 0, "", 1, "B", 21, False),
        (1, 10025, 8, "R", "CC", 1, 0, "", 1, "B", 21, False),  # not on disk
        (2, 10038, 9, "L", "LMO", 0, 0, "2", 0, "A", 48, False),
    ]
    lines = []
    for site, patient, image, side, view, cancer, invasive, birads, implant, density, machine, hard in images:
        outcomes = cancer, cancer, invasive, birads, implant, density, machine, hard
        lines.append((site, patient, image, side, view, 58.0, *outcomes))
        if image != 8:
            path = root / "train_images" / str(patient) / f"{image}.dcm"
            attributes = {"syntax": JPEG_2000} if image in (1, 6) else {}
            _write(breast, write_dicom, path, side, view, image, PatientID=str(patient), **attributes)
    columns = "site_id,patient_id,image_id,laterality,view,age,cancer,biopsy,invasive,BIRADS,implant,density,machine_id,difficult_negative_case"
    _write_csv(root / "train.csv", columns, lines)
    columns = "site_id,patient_id,image_id,laterality,view,age,implant,machine_id,prediction_id"
    _write_csv(root / "test.csv", columns, [(2, 10008, 70, "L", "MLO", 81, 0, 29, "10008_L")])
    for name in ("test_images/10008/70", "train_images/10011/80", "train_images/10099/90"):
        _, patient, image = name.split("/")
        _write(breast, write_dicom, root / f"{name}.dcm", "L", "MLO", int(image), PatientID=patient)
    return root


# patient, exam, date, desc, density, asses, side, path_severity, bside
EMBED_FINDINGS = [
    # 101: recalled left, cancer found 3 weeks later; right negative, and negative again after 13 months.
    (101, 1, "2015-01-10", "MG Screening Bilateral", "2.0", "A", "L", "", ""),
    (101, 1, "2015-01-10", "MG Screening Bilateral", "2.0", "N", "R", "", ""),
    (101, 2, "2015-02-01", "MG Diagnostic Left", "3.0", "S", "L", "0.0", "L"),
    (101, 2, "2015-02-01", "MG Diagnostic Left", "3.0", "P", "L", "4.0", "L"),
    (101, 3, "2016-02-15", "MG Screening Bilateral", "2.0", "N", "", "", ""),
    # 102: negative in one line for both breasts; an interval cancer in situ on the right.
    (102, 4, "2015-03-01", "MG SCREENING BILAT", "4.0", "N", "B", "", ""),
    (102, 5, "2015-12-20", "MG Diagnostic Bilateral", "4.0", "M", "B", "1.0", "R"),
    # 103: male; two findings right; known cancer left; A beside B; a result that says nothing.
    (103, 6, "2015-05-05", "MG Diagnostic Bilateral", "5.0", "B", "R", "6.0", "R"),
    (103, 6, "2015-05-05", "MG Diagnostic Bilateral", "5.0", "P", "R", "", ""),
    (103, 6, "2015-05-05", "MG Diagnostic Bilateral", "5.0", "K", "L", "", ""),
    (103, 6, "2015-05-05", "MG Diagnostic Bilateral", "5.0", "N", "L", "", ""),
    (103, 7, "2017-05-05", "MG Screening Bilateral", "", "A", "R", "", ""),
    (103, 7, "2017-05-05", "MG Screening Bilateral", "", "B", "R", "", ""),
    # 104: left cancer after 17 months, before the next negative screening; right recalled, benign on the same day.
    (104, 8, "2015-01-01 00:00:00", "MG Screening Bilateral", "1.0", "B", "L", "", ""),
    (104, 8, "2015-01-01 00:00:00", "MG Screening Bilateral", "1.0", "A", "R", "", ""),
    (104, 9, "2015-01-01 00:00:00", "MG Diagnostic Right", "1.0", "S", "R", "3.0", "R"),
    (104, 10, "2016-06-01 00:00:00", "MG Diagnostic Left", "1.0", "M", "L", "0", ""),
    (104, 11, "2017-01-01 00:00:00", "MG Screening Bilateral", "1.0", "N", "B", "", ""),
]
# patient, exam, file, type, side, view, spot_mag, ROI_coords
EMBED_FILES = [
    (101, 1, "a", "2D", "L", "MLO", "", "((40, 10, 80, 50), (90, 5, 120, 30))"),
    (101, 1, "b", "2D", "R", "MLO", "0", "()"),
    (101, 1, "c", "C-view", "L", "CC", "0.0", "[[40, 10, 80, 50]]"),
    (101, 2, "d", "2D", "L", "CC", "1.0", "()"),
    (101, 2, "e", "ROI_SSC", "L", "CC", "", "((40, 10, 80, 50))"),
    (101, 2, "f", "2D", "R", "CC", "", ""),  # a breast without a line in that exam
    (101, 3, "g", "2D", "R", "CC", "", "()"),
    (102, 4, "h", "cview", "R", "CC", "", "()"),
    (102, 4, "i", "2D", "L", "CC", "", "()"),
    (102, 5, "j", "2D", "R", "XCCL", "", "()"),
    (102, 5, "k", "2D", "L", "MLO", "", "()"),
    (103, 6, "l", "2D", "R", "MLO", "", "()"),
    (103, 6, "m", "2D", "L", "MLO", "", "()"),
    (103, 7, "n", "2D", "R", "MLO", "", "()"),
    (104, 8, "o", "2D", "L", "MLO", "", "()"),
    (104, 8, "p", "2D", "R", "MLO", "", "()"),
    (104, 9, "q", "3D", "R", "MLO", "", "()"),  # not on disk
    (104, 11, "r", "2D", "", "", "", "()"),
]
EMBED_CLINICAL = "empi_anon,acc_anon,study_date_anon,desc,tissueden,asses,side,path_severity,bside"
EMBED_METADATA = (
    "anon_dicom_path,empi_anon,acc_anon,FinalImageType,ImageLateralityFinal,ViewPosition,spot_mag,ROI_coords"
)


def make_embed(root, breast, write_dicom):
    """EMBED_FINDINGS and EMBED_FILES; patient 104 in paths without a cohort, and 101/1/z.dcm in no table."""
    files = []
    for seed, (patient, exam, name, kind, side, view, spot, rois) in enumerate(EMBED_FILES):
        place = f"cohort_1/{patient}/{exam}/{name}.dcm" if patient < 104 else f"{patient}/{exam}/{name}.dcm"
        prefix = "/mnt/NAS2/mammo/anon_dicom" if patient < 104 else "/mnt/elsewhere"
        # Patients are written as floats here and as whole numbers in the clinical table.
        files.append((f"{prefix}/{place}", f"{patient}.0", exam, kind, side, view, spot, rois))
        if name != "q":
            text = {"SeriesDescription": f"{side} {view} {'C-View' if 'view' in kind.lower() else ''}"}
            path = root / "images" / place
            attributes = {"PatientID": str(patient), "StudyInstanceUID": f"1.2.{exam}"} | text
            _write(breast, write_dicom, path, side or "L", view or "CC", seed, **attributes)
    extra = root / "images" / "cohort_1" / "101" / "1" / "z.dcm"
    _write(breast, write_dicom, extra, "L", "CC", 50, PatientID="101", StudyInstanceUID="1.2.1")
    tables = root / "tables"
    _write_csv(tables / "EMBED_OpenData_clinical.csv", EMBED_CLINICAL, EMBED_FINDINGS)
    _write_csv(tables / "EMBED_OpenData_metadata.csv", EMBED_METADATA, files)
    _write_csv(tables / "EMBED_OpenData_clinical_reduced.csv", EMBED_CLINICAL, EMBED_FINDINGS)
    _write_csv(tables / "EMBED_OpenData_metadata_reduced.csv", EMBED_METADATA, files[:2])
    return root


def make_cmmd(root, breast, write_dicom):
    """D1-0001: both breasts on disk, a line for the right one only. D1-0002: a line for each. D2-0003: the side
    only in Laterality, and a broken file; two lines for one breast. D2-0004: in a folder of a study UID. D2-0005: no
    line, no side."""
    import openpyxl

    tree = root / "manifest-1616439774456" / "CMMD"
    series = "07-18-2010-NA-NA-79377/1.000000-NA-70244"
    files = [  # patient, file, folder, side, view, attributes
        ("D1-0001", 1, series, "L", "CC", {}),
        ("D1-0001", 2, series, "L", "MLO", {}),
        ("D1-0001", 3, series, "R", "CC", {}),
        ("D1-0001", 4, series, "R", "MLO", {}),
        ("D1-0002", 1, series, "R", "CC", {}),  # the right one first
        ("D1-0002", 2, series, "L", "CC", {}),
        ("D2-0003", 1, series, "R", "CC", {"ImageLaterality": "", "Laterality": "R"}),
        ("D2-0004", 1, None, "L", "CC", {}),
        ("D2-0005", 1, series, "L", "CC", {"ImageLaterality": ""}),
    ]
    for seed, (patient, number, folder, side, view, attributes) in enumerate(files):
        path = tree / (f"{patient}/{folder}" if folder else "1.3.6.1.4.1.77") / f"1-{number}.dcm"
        _write(breast, write_dicom, path, side, view, seed, PatientID=patient, **attributes)
    (tree / "D2-0003" / series / "1-2.dcm").write_bytes(b"not a DICOM file")
    book = openpyxl.Workbook()
    for line in (
        ("ID1", "LeftRight", "Age", "number", "abnormality", "classification", "subtype"),
        ("D1-0001", "R", 44, 2, "calcification", "Benign"),
        ("D1-0002", "L", 40, 2, "both", "Malignant", "Luminal A"),
        ("D1-0002", "R", 40, 2, "mass", "Benign", None),
        (),
        ("D2-0003", "R", 61, 2, "mass", "Benign", None),
        ("D2-0003", "R", 61, 2, "calcification", "Malignant", None),
        ("D2-0004", "L", 50, 2, "mass", "Malignant", "HER2-enriched"),
        ("D2-0999", "L", 50, 2, "mass", "Malignant", None),  # not on disk
    ):
        book.active.append(line)
    book.create_sheet("notes").append(("ID1",))
    book.save(root / "CMMD_clinicaldata_revision.xlsx")
    return root
