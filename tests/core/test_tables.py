import codecs

import pytest

from meddino.core.errors import ConfigError
from meddino.core.tables import first_cell, read_list, read_table

PLAIN = "case,patient,site\nc1,Müller,Genève\nc2,Bauer,Genève\n"
EXPECTED = [{"case": "c1", "patient": "Müller", "site": "Genève"}, {"case": "c2", "patient": "Bauer", "site": "Genève"}]

ENCODED = {
    "utf-8": PLAIN.encode(),
    "byte-order mark": codecs.BOM_UTF8 + PLAIN.encode(),
    "utf-16 little": codecs.BOM_UTF16_LE + PLAIN.encode("utf-16-le"),
    "utf-16 big": codecs.BOM_UTF16_BE + PLAIN.encode("utf-16-be"),
    "latin-1": PLAIN.encode("latin-1"),
    "semicolons": PLAIN.replace(",", ";").encode(),
    "tabs": PLAIN.replace(",", "\t").encode(),
    "said by Excel": b"sep=;\n" + PLAIN.replace(",", ";").encode(),
    "Windows' line ends": PLAIN.replace("\n", "\r\n").encode(),
    "spaces": PLAIN.replace(",", " , ").replace("\n", "  \n").encode(),
    "quoted": PLAIN.replace("c1", '"c1"').replace("Bauer", '"Bauer "').encode(),
    "empty rows": ("\n" + PLAIN.replace("c2", ",,\n\nc2") + ",,\n   \n").encode(),
    "empty cells behind": PLAIN.replace("Bauer,Genève", "Bauer,Genève,,").encode(),
}


@pytest.mark.parametrize("name", ENCODED)
def test_read_table__one_content_however_it_was_saved(name, tmp_path):
    (tmp_path / "t.csv").write_bytes(ENCODED[name])
    table = read_table(tmp_path / "t.csv", ["case", "patient"], filled=["case"], unique="case")
    assert table.columns == ("case", "patient", "site")
    assert [row.cells for row in table.rows] == EXPECTED
    assert table.rows[0]["nothing"] == ""


WRONG = {
    "short row": ("case,patient\nc1,p1\nc2\n", ["line 3", "1 cells", "'c2'"]),
    "long row": ("case,patient\nc1,p1,p2\n", ["line 2", "3 cells"]),
    "missing column": ("Case,patient\nc1,p1\n", ["line 1", "case", "Case, patient"]),
    "other separator": ("case|patient\nc1|p1\n", ["line 1", "case|patient"]),
    "column twice": ("case,patient,case\nc1,p1,c1\n", ["line 1", "case", "twice"]),
    "empty cell": ("case,patient\n\nc1,p1\nc2, \n", ["line 4", "column patient"]),
    "case twice, two patients": ("case,patient\nc1,p1\nc2,p2\nc1 ,p3\n", ["line 4", "column case", "'c1'", "line 2"]),
    "open quote": ('case,patient\nc1,"p1\nc2,p2\n', ["line 2", "quote"]),
    "no text": ("case,patient\nc1,\0p1\n", ["line 2", r"\x00"]),
    "empty": ("\n \n", ["case, patient"]),
    "line after a cell of two lines": ('case,patient\nc1,"p\n1"\nc2\n', ["line 4"]),
}


@pytest.mark.parametrize("name", WRONG)
def test_read_table__names_file_line_column_and_value(name, tmp_path):
    content, words = WRONG[name]
    (tmp_path / "t.csv").write_text(content)
    with pytest.raises(ConfigError) as caught:
        read_table(tmp_path / "t.csv", ["case", "patient"], filled=["case", "patient"], unique="case")
    assert all(word in str(caught.value) for word in ["t.csv", *words])


def test_read_table__refuses_what_is_no_file_and_what_is_too_large(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        read_table(tmp_path, ["case"])
    (tmp_path / "t.csv").write_text(PLAIN)
    with pytest.raises(ConfigError, match="bytes"):
        read_table(tmp_path / "t.csv", ["case"], max_bytes=10)
    (tmp_path / "t.csv").write_bytes(b"\xff\xfea")
    with pytest.raises(ConfigError, match="utf-16"):
        read_table(tmp_path / "t.csv", ["case"])


def test_read_list__lines_without_spaces_and_blank_ones(tmp_path):
    (tmp_path / "l.txt").write_bytes("\ufeffa \r\n\r\n é\n".encode("utf-16-le"))
    assert read_list(tmp_path / "l.txt") == ["a", "é"]


def test_first_cell__quotes_and_separators():
    assert first_cell('"a,b",c', ",") == "a,b"
    assert first_cell(" a ;b", ";") == "a"
    assert first_cell('"a', ",") == '"a'


def test_read_table__without_a_header_columns_are_named_by_the_caller(tmp_path):
    (tmp_path / "a.csv").write_text("0000_1.png;3\n0001_1.png;0\n")
    table = read_table(tmp_path / "a.csv", ["image", "grade"], header=["image", "grade"])
    assert [(row.line, row["image"], row["grade"]) for row in table.rows] == [(1, "0000_1.png", "3"), (2, "0001_1.png", "0")]
    (tmp_path / "b.csv").write_text("a.png,1\nb.png\n")
    with pytest.raises(ConfigError, match="line 2"):
        read_table(tmp_path / "b.csv", ["image"], header=["image", "grade"])
