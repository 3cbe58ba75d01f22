import base64
import gzip
import io
import re
import struct
import tarfile
import warnings

import blosc2
import pyarrow as pa
import pyarrow.parquet as pq
import pydicom
import pytest
from meddino_data_curation.cli import main
from meddino_data_curation.privacy import Salt, load_salt
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from pydicom.datadict import DicomDictionary
from pydicom.dataset import Dataset

from meddino.core.errors import ConfigError
from tests.data_curation.conftest import make_hu, write_volume
from tests.data_curation.dicom_files import ct_slice
from tests.data_curation.test_bad_files import nifti_header

SECRET = "Zebulon"
DIGITS = "19120623"  # in what holds numbers only
TEXTS = {
    **dict.fromkeys(("AE", "LO", "LT", "PN", "SH", "ST", "UC", "UR", "UT"), SECRET),
    **dict.fromkeys(("CS",), SECRET.upper()),
    **dict.fromkeys(("DA", "DS", "IS"), DIGITS),
    "AS": "912Y", "DT": f"{DIGITS}1234", "TM": "121314.151617", "UI": f"1.2.{DIGITS}",
}  # fmt: skip
NEEDLES = (SECRET, DIGITS, "912Y", "121314.151617")
# What a CT slice is made of: set by `ct_slice`, or of another meaning than text where it stands.
KEPT = {"SpecificCharacterSet", "NumberOfFrames", "PixelDataProviderURL", "ICCProfile", "ModalityLUTType"}


def planted(index: int, plane) -> pydicom.Dataset:
    """A slice with something in every element of the dictionary that holds text or numbers as text."""
    item = ct_slice(plane, 5.0 * index)
    count = 0
    for tag, (kind, _, _, _, keyword) in DicomDictionary.items():
        if kind in TEXTS and tag >> 16 > 2 and keyword and keyword not in KEPT and tag not in item:
            item.add_new(tag, kind, TEXTS[kind])
            count += 1
    assert count > 2300
    item.RescaleType = "HU"  # any other is refused
    item.PatientName, item.PatientID, item.SeriesDescription = f"{SECRET}^Jane", f"{SECRET}1", f"{SECRET} series"
    sequence, inner = Dataset(), Dataset()
    inner.CodeMeaning = sequence.CodeMeaning = SECRET
    sequence.ProcedureCodeSequence = [inner]
    item.ProcedureCodeSequence = [sequence]
    for element, kind in enumerate(TEXTS, start=1):
        item.add_new(0x00091000 + element, kind, TEXTS[kind])
    item.add_new(0x000910F0, "UN", SECRET.encode())
    return item


def planted_nifti(path, hu) -> None:
    """NIfTI with something in every field of text, and in an extension."""
    header = bytearray(nifti_header(hu.shape[::-1]))
    for start, length in ((4, 10), (14, 18), (148, 80), (228, 24), (328, 16)):  # data_type, db_name, descrip, aux_file, intent
        header[start : start + length] = SECRET.encode().ljust(length, b"\0")
    struct.pack_into("<f", header, 108, 352 + 32)
    header[348:352] = b"\1\0\0\0"
    extension = struct.pack("<2i", 32, 6) + SECRET.encode().ljust(24, b"\0")
    path.write_bytes(gzip.compress(bytes(header) + extension + hu.astype("<i2").tobytes()))


def planted_texts(folder, hu_nrrd, hu_meta, hu_detached) -> None:
    """NRRD and MetaImage with comments, keys and fields of text."""
    path = write_volume(folder / f"{SECRET}.nrrd", hu_nrrd)
    words = f"# {SECRET}\ncontent: {SECRET}\nPatientName:={SECRET}\n{SECRET}:=a key\n".encode()
    path.write_bytes(path.read_bytes().replace(b"type:", words + b"type:", 1))
    path = write_volume(folder / f"{SECRET}.mha", hu_meta)
    words = f"Comment = {SECRET}\nName = {SECRET}\nPatientName = {SECRET}\n".encode()
    path.write_bytes(path.read_bytes().replace(b"NDims", words + b"NDims", 1))
    path = write_volume(folder / f"{SECRET}_detached.mhd", hu_detached)
    assert (folder / f"{SECRET}_detached.raw").exists()


def texts_of(path):
    """Yield a file's bytes, and what is packed in them: columns of Parquet, members of tar and gzip, pictures as base64."""
    data = path.read_bytes()
    yield data
    if path.suffix == ".parquet":
        table = pq.read_table(path)
        yield repr((table.to_pylist(), table.schema.metadata, table.schema)).encode()
        for row in table.to_pylist():
            yield from (value for value in row.values() if isinstance(value, bytes))
    if path.suffix == ".tar":
        with tarfile.open(path) as archive:
            for member in archive:
                content = archive.extractfile(member).read()
                yield member.name.encode() + repr(member.pax_headers).encode() + content
                if member.name.endswith(".b2"):
                    frame = blosc2.schunk_from_cframe(content)
                    yield repr((frame.vlmeta.getall(), [frame.meta[name] for name in frame.meta])).encode()
    for found in re.findall(rb"base64,([A-Za-z0-9+/=]+)", data):
        picture = base64.b64decode(found)
        yield picture
        if picture.startswith(b"\x89PNG"):
            yield repr(Image.open(io.BytesIO(picture)).info).encode()
    assert data[:2] != b"\x1f\x8b"  # nothing else is packed
    assert data[:4] != b"\x28\xb5\x2f\xfd"


def test_texts_of__finds_what_is_packed(tmp_path):
    """The search itself: text in zstd columns, in a gzip-like picture and in a tar is found."""
    words = " ".join(f"{number} {SECRET if number == 1500 else number % 7}" for number in range(3000))
    options = {"compression": "zstd", "write_statistics": False, "use_dictionary": False}
    pq.write_table(pa.table({"a": [words], "b": [[words.encode()]]}), tmp_path / "a.parquet", **options)
    assert SECRET.encode() not in (tmp_path / "a.parquet").read_bytes()
    assert any(SECRET.encode() in text for text in list(texts_of(tmp_path / "a.parquet"))[1:])
    note = PngInfo()
    note.add_text("comment", SECRET, zip=True)
    stream = io.BytesIO()
    Image.new("L", (4, 4)).save(stream, "PNG", pnginfo=note)
    (tmp_path / "a.html").write_bytes(b"<img src='data:image/png;base64," + base64.b64encode(stream.getvalue()) + b"'>")
    assert any(SECRET.encode() in text for text in texts_of(tmp_path / "a.html"))


def test_build__no_name_path_or_date_reaches_any_byte_of_the_output(tmp_path, salt_file, capsys):
    root = tmp_path / f"{SECRET}_study"
    folder = root / f"{SECRET}_Jane" / DIGITS
    folder.mkdir(parents=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for index, plane in enumerate(make_hu(0)[:3]):
            planted(index, plane).save_as(folder / f"{SECRET}_{index}.dcm", enforce_file_format=True)
        scout = planted(99, make_hu(2)[0])
        scout.ImageType, scout.SeriesInstanceUID = ["ORIGINAL", "PRIMARY", "LOCALIZER", SECRET.upper()], "1.2.3.4.5"
        scout.save_as(folder / "scout", enforce_file_format=True)
        odd = planted(98, make_hu(2)[1])
        odd.RescaleType, odd.SeriesInstanceUID = SECRET.upper(), "1.2.3.4.6"
        odd.save_as(folder / "odd", enforce_file_format=True)
    planted_nifti(root / f"{SECRET}.nii.gz", make_hu(1))
    write_volume(root / f"{SECRET}_copy.nrrd", make_hu(1))
    planted_texts(root, make_hu(3), make_hu(4), make_hu(5))
    (root / f"{SECRET}_broken.nii.gz").write_bytes(b"\x1f\x8b nothing")
    (root / f"{SECRET}_cut.nrrd").write_bytes(
        b"NRRD0004\n# " + SECRET.encode() + b"\ndata file: ../" + SECRET.encode() + b"\n\n"
    )
    (folder / f"{SECRET}_cut").write_bytes((folder / f"{SECRET}_0.dcm").read_bytes()[:200])
    (folder / f"{SECRET}.zip").write_bytes(SECRET.encode())
    capsys.readouterr()  # pydicom's words on what was planted just now
    out = tmp_path / "out"
    for workers, where in ((1, out), (2, tmp_path / "two")):
        arguments = ["build", str(root), "--out", str(where), f"workers={workers}", f"privacy.salt_file={salt_file}"]
        assert main(arguments) == 0
    rows = pq.read_table(out / "volumes.parquet").to_pylist()
    formats = sorted(row["format"] for row in rows if row["status"] == "accepted")
    assert formats == ["dicom", "metaimage", "metaimage", "nifti", "nrrd"]
    assert len(rows) == 11
    searched = 0
    needles = [needle.encode() for needle in (*NEEDLES, SECRET.lower(), SECRET.upper(), "1.2.3.4.5")]
    for path in [*out.rglob("*"), *(tmp_path / "two").rglob("*")]:
        assert not any(needle.decode() in str(path.relative_to(tmp_path)) for needle in needles)
        for text in texts_of(path) if path.is_file() else ():
            searched += len(text)
            for needle in needles:
                assert needle not in text, (path.name, needle)
    assert searched > 500_000
    log = capsys.readouterr()
    assert SECRET not in log.err.replace(str(root), "") + log.out
    source_map = (tmp_path / "out.private" / "sources.jsonl").read_text()
    assert f"{SECRET}.nii.gz" in source_map  # the owner can find a volume again
    assert (tmp_path / "out.private").stat().st_mode & 0o077 == 0


def test_read_header__values_that_pydicom_finds_wrong_are_not_quoted(tmp_path, capfd, caplog, recwarn):
    """pydicom warns of an id of more than 64 characters, or of a wrong birth date, and quotes it."""
    from meddino.volumes.dicom.headers import read_header

    path = tmp_path / "slice"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        item = ct_slice(make_hu(0)[0], 0.0, PatientID=SECRET * 12, PatientBirthDate=f"{SECRET} 1912", StudyInstanceUID=SECRET)
        item.save_as(path, enforce_file_format=True)
    plain = pydicom.dcmread(path)
    assert [str(plain.get(name)) for name in ("PatientID", "PatientBirthDate", "StudyInstanceUID")]
    assert SECRET in caplog.text + "".join(str(warning.message) for warning in recwarn)  # it does so for everybody else
    caplog.clear()
    capfd.readouterr()
    recwarn.clear()
    header = read_header(path, "slice", "")
    assert header.patient_id == SECRET * 12
    heard = "".join([caplog.text, *capfd.readouterr(), *(str(warning.message) for warning in recwarn)])
    assert SECRET not in heard


def test_load_salt__made_once_and_kept_outside(tmp_path):
    first, again = load_salt(None, tmp_path / "corpus"), load_salt(None, tmp_path / "corpus")
    assert first.fingerprint == again.fingerprint
    assert (tmp_path / "corpus.private" / "salt").stat().st_mode & 0o077 == 0
    assert load_salt(None, tmp_path / "other").fingerprint != first.fingerprint


@pytest.mark.parametrize(("text", "words"), [("short", "at least 8"), (None, "cannot be read")])
def test_load_salt__wrong_files_are_refused(tmp_path, text, words):
    if text is not None:
        (tmp_path / "salt").write_text(text)
    with pytest.raises(ConfigError, match=words):
        load_salt(tmp_path / "salt", tmp_path / "corpus")


def test_load_salt__inside_the_corpus_is_refused(tmp_path):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "salt").write_text("a long enough salt")
    with pytest.raises(ConfigError, match="inside the corpus"):
        load_salt(tmp_path / "corpus" / "salt", tmp_path / "corpus")


def test_salt__kinds_and_parts_are_told_apart():
    salt = Salt(b"secret")
    assert len({salt.key("patient", "a", "b"), salt.key("patient", "ab"), salt.key("volume", "a", "b")}) == 3
