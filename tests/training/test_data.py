from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from training.data import (
    AmbiguousClass,
    BadTable,
    EmptyClass,
    NoClasses,
    Record,
    UnusableImage,
    class_name,
    load_tiles,
    number_labels,
    scan,
    slide_in,
)
from training.synthetic import draw_tile


def save(array: np.ndarray, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return path


# -- scan ----------------------------------------------------------------------------------------------------------


def test_a_tree_becomes_records(tree: Path):
    found = scan(tree)
    assert found.classes == ["Tumor", "Stroma"]  # the folders' order, not the alphabet's
    assert [record.label for record in found.records] == ["Tumor"] * 4 + ["Stroma"] * 4
    assert {record.slide for record in found.records} == {"01", "02", "03", "04"}
    assert len({record.sha256 for record in found.records}) == 8
    assert found.unreadable == [] and found.duplicates == []


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("01_TUMOR", "Tumor"),
        ("07_ADIPOSE", "Adipose"),
        ("2_Low grade", "2_Low grade"),
        ("3_DCIS", "3_DCIS"),
        ("01_fat", "01_fat"),
        ("MSI-H", "MSI-H"),
        ("a_b", "a_b"),
    ],
)
def test_class_names(folder: str, name: str):
    assert class_name(folder) == name


def test_slide_names():
    assert slide_in("17E8F_CRC-Prim-HE-02_007.tif_Row_151_Col_301.tif") == "02"
    assert slide_in("10BE_CRC-Prim-HE-03.tif_Row_751_Col_901.tif") == "03"
    assert slide_in("image_1_label_0.png") is None


def test_unreadable_files_are_listed_and_skipped(tree: Path):
    whole = next((tree / "01_TUMOR").glob("*.png")).read_bytes()
    (tree / "01_TUMOR" / "a_cut.png").write_bytes(whole[: len(whole) // 2])
    (tree / "01_TUMOR" / "b_text.tif").write_text("not an image")
    (tree / "02_STROMA" / "c_empty.jpg").write_bytes(b"")
    Image.new("P", (64, 64)).save(tree / "02_STROMA" / "d.gif")
    (tree / "02_STROMA" / "e_dangling.png").symlink_to("nowhere")

    found = scan(tree)
    assert [path.name for path, _ in found.unreadable] == [
        "a_cut.png",
        "b_text.tif",
        "c_empty.jpg",
        "d.gif",
        "e_dangling.png",
    ]
    reasons = [reason for _, reason in found.unreadable]
    assert all(reasons) and "GIF" in reasons[3] and "No such file" in reasons[4]
    assert len(found.records) == 8


def test_what_is_no_image_is_passed_over(tree: Path):
    for name in ("notes.txt", "labels.csv", "Thumbs.db", ".DS_Store", "._a.png", "README"):
        (tree / "01_TUMOR" / name).write_text("x")
    (tree / "__MACOSX").mkdir()
    (tree / ".cache").mkdir()
    save(draw_tile("Empty", 0), tree / "01_TUMOR" / ".hidden" / "a.png")
    found = scan(tree)
    assert len(found.records) == 8 and found.unreadable == [] and found.classes == ["Tumor", "Stroma"]


def test_folders_in_class_folders_are_read(tree: Path):
    save(draw_tile("Tumor", 99), tree / "01_TUMOR" / "patient 3" / "DEEP.PNG")
    assert sum(record.label == "Tumor" for record in scan(tree).records) == 5


def test_the_same_bytes_count_once(tree: Path):
    first = sorted((tree / "01_TUMOR").glob("*.png"))[0]
    copy = tree / "01_TUMOR" / "z_copy.png"
    copy.write_bytes(first.read_bytes())
    found = scan(tree)
    assert found.duplicates == [(first, copy)]
    assert len(found.records) == 8


def test_an_empty_class_folder_is_named(tree: Path):
    (tree / "03_DEBRIS").mkdir()
    (tree / "03_DEBRIS" / "notes.txt").touch()
    with pytest.raises(EmptyClass, match="03_DEBRIS holds no images"):
        scan(tree)
    assert len(scan(tree, classes=["Tumor", "Stroma"]).records) == 8  # not asked for


def test_a_class_of_unreadable_images_is_named(tree: Path):
    (tree / "03_DEBRIS").mkdir()
    (tree / "03_DEBRIS" / "a.png").write_text("not an image")
    with pytest.raises(EmptyClass, match=r"no image of class Debris could be used: .*a\.png: "):
        scan(tree)


def test_one_image_in_two_classes_is_named_by_both_its_files(tree: Path):
    first = min((tree / "01_TUMOR").glob("*.png"))
    (tree / "02_STROMA" / "z_copy.png").write_bytes(first.read_bytes())
    with pytest.raises(AmbiguousClass, match=rf"same image in two classes: {first} and .*02_STROMA/z_copy\.png\. Take"):
        scan(tree)


def test_two_folders_of_one_class_are_named(tree: Path):
    save(draw_tile("Tumor", 99), tree / "Tumor" / "a.png")
    with pytest.raises(AmbiguousClass, match=r"01_TUMOR and .*Tumor both mean Tumor: put"):
        scan(tree)


def test_a_folder_without_classes_is_refused(tree: Path, tmp_path: Path):
    with pytest.raises(NoClasses, match="there is no folder"):
        scan(tmp_path / "nowhere")
    with pytest.raises(NoClasses, match=r"one class, tree; .* Did you mean .*tree\?"):
        scan(tmp_path)
    with pytest.raises(NoClasses, match="no folders with images"):
        scan(tree / "01_TUMOR")


def test_classes_can_be_chosen_and_ordered(tree: Path, caplog: pytest.LogCaptureFixture):
    assert scan(tree, classes=["Stroma", "Tumor"]).classes == ["Stroma", "Tumor"]
    assert {record.label for record in scan(tree, classes=["Stroma"]).records} == {"Stroma"}
    with pytest.raises(NoClasses, match="has no class Stromma; it has Tumor, Stroma"):
        scan(tree, classes=["Stromma", "Tumor"])
    assert scan(tree, classes=["Stromma", "Stroma", "Tumor"], needs_all=False).classes == ["Stroma", "Tumor"]
    assert caplog.text == ""
    assert len(scan(tree, classes=["tumor", "Stroma"], needs_all=False).records) == 4
    assert "left out, as they are of no class of the artefact's: 4 of Tumor; it has tumor, Stroma" in caplog.text
    with pytest.raises(NoClasses, match="has no class Stromma; it has Tumor, Stroma"):
        scan(tree, classes=["Stromma"], needs_all=False)


# -- tables --------------------------------------------------------------------------------------------------------


def test_a_table_goes_before_the_names(tree: Path, tmp_path: Path):
    names = [record.path.relative_to(tree).as_posix() for record in scan(tree).records]
    table = tmp_path / "manifest.csv"
    windows = names[1].replace("/", "\\")
    table.write_text(
        f"file,label,slide,quality\n{names[0]},Debris,A,good\n{windows},,B,\n{names[2]}\n", encoding="utf-8-sig"
    )
    records = scan(tree, table).records
    assert [(record.label, record.slide, record.quality) for record in records[:4]] == [
        ("Debris", "A", "good"),
        ("Tumor", "B", None),
        ("Tumor", "03", None),
        ("Tumor", "04", None),  # not in the table
    ]


def test_a_flat_folder_with_a_table(tmp_path: Path):
    save(draw_tile("Tumor", 0), tmp_path / "a.png")
    save(draw_tile("Lympho", 0), tmp_path / "b.png")
    table = tmp_path / "labels.csv"
    table.write_text("file,label\na.png,Tumor\nb.png,Lympho\ngone.png,Lympho\n")
    found = scan(tmp_path, table)
    assert [(record.path.name, record.label) for record in found.records] == [("a.png", "Tumor"), ("b.png", "Lympho")]
    assert found.unreadable[0][0].name == "gone.png"


def test_rows_that_match_no_file_are_told(tree: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    file = scan(tree).records[0].path
    table = tmp_path / "slides.csv"
    table.write_text(f"file,slide,stain\n{file.relative_to(tree).as_posix()},A,HE\n{file.name},B,HE\n")
    with caplog.at_level("INFO"):
        assert scan(tree, table).records[0].slide == "A"
    assert f"1 of 2 rows of {table} match no file, such as {file.name}" in caplog.text
    assert f"{table}: read are the columns file, slide" in caplog.text
    table.write_text(f"file,slide\n{file.name},B\n")
    with pytest.raises(
        BadTable, match=rf"names no file that is there: .* class folder included; the first is {file.name}"
    ):
        scan(tree, table)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"file,slide_id\na.png,1\n", "has no column slide, but slide_id: rename it to slide"),
        (b"file,Label\na.png,1\n", "has no column label, but Label: rename it to label"),
        (b"file,label\n", "has no rows below its header"),
        (b"name,label\na.png,Tumor\n", "has no column file; it has name, label"),
        (b"", "has no column file; it has no rows"),
        (b"file\n\xff\n", "cannot be read"),
    ],
)
def test_a_bad_table_is_refused(tree: Path, tmp_path: Path, content: bytes, message: str):
    table = tmp_path / "bad.csv"
    table.write_bytes(content)
    with pytest.raises(BadTable, match=message):
        scan(tree, table)


def test_a_missing_table_is_refused(tree: Path, tmp_path: Path):
    with pytest.raises(BadTable, match="cannot be read"):
        scan(tree, tmp_path / "nowhere.csv")


# -- tiles ---------------------------------------------------------------------------------------------------------


def test_tiles_are_the_pixels_that_serving_sees(tree: Path):
    tiles = load_tiles(scan(tree).records, 150, 0.495)
    assert tiles.shape == (8, 150, 150, 3) and tiles.dtype == np.uint8
    assert np.array_equal(tiles[0], draw_tile("Tumor", 0))
    assert load_tiles(scan(tree).records, 60, 0.495).shape == (8, 60, 60, 3)


def test_the_scale_is_given_for_all(tree: Path):
    records = scan(tree).records[:1]
    nearer = load_tiles(records, 75, 0.495, mpp=0.495)  # the centre at full size
    assert np.array_equal(nearer[0], draw_tile("Tumor", 0)[37:112, 37:112]) or np.array_equal(
        nearer[0], draw_tile("Tumor", 0)[38:113, 38:113]
    )
    with pytest.raises(UnusableImage, match=f"{records[0].path.name}: "):
        load_tiles(records, 150, 0.495, mpp=0.2)  # the image shows less than a tile


def test_what_is_cut_off_is_counted(tree: Path, caplog: pytest.LogCaptureFixture):
    records = scan(tree).records
    load_tiles(records, 150, 0.495)
    assert caplog.text == ""
    load_tiles(records, 75, 0.495, mpp=0.495)
    assert "8 of 8 images were cut to their middle: at the um/px that was given" in caplog.text
    tagged, oblong = records[1].path, records[2].path
    Image.fromarray(draw_tile("Tumor", 20)).save(tagged, dpi=(25_400 / 0.3,) * 2)
    Image.fromarray(draw_tile("Tumor", 21)[:120]).save(oblong)
    load_tiles(records, 75, 0.495)
    assert "1 of 8 images were cut to their middle: by the um/px in their files" in caplog.text
    assert "1 of 8 images were cut to their middle: they are not square" in caplog.text


def test_rare_kinds_of_image_load(tmp_path: Path):
    colour = draw_tile("Tumor", 0)
    save(colour[..., 0], tmp_path / "a" / "grey.png")
    Image.fromarray(colour).convert("CMYK").save(tmp_path / "a" / "cmyk.jpg")
    save(colour[..., 0].astype(np.uint16) * 257, tmp_path / "b" / "deep.png")
    found = scan(tmp_path)
    assert [record.path.name for record in found.records] == ["cmyk.jpg", "grey.png", "deep.png"]
    tiles = load_tiles(found.records, 150, 0.495).astype(int)
    assert np.array_equal(tiles[1], np.repeat(colour[..., :1], 3, axis=2))
    assert np.abs(tiles[2] - tiles[1]).max() <= 1


def test_an_image_that_went_missing_is_named(tree: Path):
    records = scan(tree).records
    records[3].path.unlink()
    with pytest.raises(UnusableImage, match=records[3].path.name):
        load_tiles(records, 150, 0.495)


def test_stdout_stays_data(tree: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("training.data.LONG_READ", 1)
    load_tiles(scan(tree).records, 150, 0.495)
    out, err = capsys.readouterr()
    assert out == "" and "loading" in err


def test_labels_are_numbered_in_the_classes_order():
    records = [Record(Path("x.png"), label, None, "x", None) for label in ("Stroma", "Tumor", "Tumor")]
    assert number_labels(records, ["Tumor", "Stroma"]).tolist() == [1, 0, 0]
