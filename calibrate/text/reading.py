"""Reads the files that a user names. Their bytes tell what they are; other forms are refused by name.

Plain text and JSON are read; JSON is a list, or one value a line. Both may be packed by gzip and may have any
line ends. They are in UTF-8, with or without a byte-order mark, or in UTF-16 or UTF-32 with one.
"""

import codecs
import gzip
import hashlib
import json
import re
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from cor_vllm.calibrate.config import CalibrationError

GZIP = b"\x1f\x8b"
# How files of other forms begin. Each pattern holds a byte that prose does not have in that place.
SIGNATURES: tuple[tuple[bytes, str], ...] = (
    (GZIP, "a gzip file within a gzip file"),
    (rb"PK(\x03\x04|\x05\x06)", "a zip archive, as xlsx, docx, epub, npz and pt files are"),
    (rb"\xfd7zXZ\0", "an xz file"),
    (rb"\x28\xb5\x2f\xfd", "a zstd file"),
    (rb"\x04\x22\x4d\x18", "an lz4 file"),
    (rb"BZh[1-9]1AY&SY", "a bzip2 file"),
    (rb"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (rb"Rar!\x1a\x07", "a rar archive"),
    (rb".{257}ustar(\0| {2}\0)", "a tar archive"),
    (rb"PAR1[\0-\x1f]", "a Parquet file"),
    (rb"ARROW1\0\0", "an Arrow file"),
    (rb"\xff\xff\xff\xff", "an Arrow stream, as the files of a saved data set are"),
    (rb"ORC[\0-\x1f]", "an ORC file"),
    (rb"Obj\x01", "an Avro file"),
    (rb"\x89HDF", "an HDF5 file"),
    (rb"\x93NUMPY", "a NumPy file"),
    (rb"\x80[\x02-\x05]", "a Python pickle"),
    (rb"SQLite format 3\0", "an SQLite database"),
    (rb"GGUF[\x01-\x09]\0", "a GGUF model"),
    (rb".{4}\0{4}\{", "a safetensors file"),
    (rb"%PDF-\d", "a PDF"),
    (rb"\{\\rtf\d", "an RTF document"),
    (rb"\xd0\xcf\x11\xe0", "an old Office document"),
    (rb"\x89PNG|\xff\xd8\xff|GIF8[79]a.{0,1000}\0", "a picture"),
)
MARKUP = re.compile(r"\s*<(!doctype html|html|\?xml)\b", re.IGNORECASE)
# Tables and markup are text that no byte tells from prose, so the file's name has to.
NAMES = {
    ".csv": "a CSV table", ".tsv": "a TSV table", ".yaml": "a YAML file", ".yml": "a YAML file",
    ".html": "a web page", ".htm": "a web page", ".xml": "an XML file",
}  # fmt: skip
JSON_NAMES = {".json", ".jsonl", ".ndjson", ".jsonlines"}
STRING = r'"(?:[^"\\]|\\.)*"\s*'
# What follows the first string tells JSON that may be broken from prose like `["Yes," she said.]`.
BEGINNING = re.compile(
    rf'\{{\s*{STRING}:|\[\s*(\{{\s*{STRING}:|{STRING}(,\s*(["\[{{\]\d-]|true|false|null)|\]\s*(\n|\Z)))',
    re.DOTALL,
)
BOMS = (  # UTF-32's come first: UTF-16's are their beginnings
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
SHOWN = 60  # characters of a line that a message quotes


@dataclass(frozen=True)
class Row:
    """One value of a JSON file."""

    place: str  # "line 3" of a file, or "item 3" of a list; both count from 1
    value: Any


@dataclass(frozen=True)
class Given:
    """A file that an option names, as text."""

    name: str  # "--corpus FILE", with which messages begin
    suffix: str  # in lower case and without .gz
    wanted: str  # what the option takes, for messages
    text: str
    sha256: str  # of the file's bytes as they are

    def refuse(self, reason: str) -> NoReturn:
        """Raise a CalibrationError with the file, the reason and what is wanted."""
        raise CalibrationError(f"{self.name}: {reason}; give {self.wanted}")

    def is_json(self) -> bool:
        """Whether the file is JSON and not prose: by its name, or by its first characters.

        A file of another name is JSON if it begins like a list or an object with a string, up to what follows
        that string. It is JSON, too, if its first line is an object, or if the whole is a list or an object.
        """
        if self.suffix in JSON_NAMES:
            return True
        text = self.text.lstrip()
        if not text.startswith(("{", "[")):
            return False
        if BEGINNING.match(text):
            return True
        return isinstance(_parsed(text.split("\n")[0]), dict) or isinstance(_parsed(text), list | dict)

    def rows(self) -> list[Row]:
        """The values of a JSON file: the items of a list, or one for each line that is not blank.

        Raises:
            CalibrationError: a part is not JSON; the message shows the line.
        """
        whole = _parsed(self.text)
        if isinstance(whole, list):
            return [Row(f"item {number}", value) for number, value in enumerate(whole, start=1)]
        lines = [(n, line) for n, line in enumerate(self.text.split("\n"), start=1) if line.strip()]
        if isinstance(whole, dict):  # over one line or several
            return [Row(f"line {lines[0][0]}", whole)]
        if isinstance(_parsed(lines[0][1]), ValueError):  # so these are not JSON lines
            self._refuse_json(whole, 1)
        rows = []
        for number, line in lines:
            value = _parsed(line)
            if isinstance(value, ValueError):
                self._refuse_json(value, number)
            rows.append(Row(f"line {number}", value))
        return rows

    def strings(self, row: Row, *keys: str) -> list[str]:
        """The strings under `keys` of a row that is an object; every other row is refused."""
        if not isinstance(row.value, dict) or not all(key in row.value for key in keys):
            self.refuse(f"{row.place} is {described(row.value)}")
        for key in keys:
            if not isinstance(row.value[key], str):
                self.refuse(f"`{key}` of {row.place} is {described(row.value[key])}, not a string")
        return [self.whole(row, row.value[key]) for key in keys]

    def whole(self, row: Row, text: str) -> str:
        """Return the text if a tokenizer can take it: JSON can escape half of a character."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            self.refuse(f"{row.place} holds half a character, {text[error.start : error.end]!a}")
        return text

    def _refuse_json(self, error: Any, first: int) -> NoReturn:
        """Refuse with the `error` of `_parsed`; `first` is the number in the file of the error's line 1."""
        if not isinstance(error, json.JSONDecodeError):
            self.refuse(f"line {first} is not JSON that can be read ({error})")
        number = first + error.lineno - 1
        line = self.text.split("\n")[number - 1]
        self.refuse(f"line {number} is not JSON ({error.msg}, column {error.colno}): {shown(line)}")


def read(path: Path, option: str, wanted: str) -> Given:
    """Read a file that an option names.

    Args:
        path: the file.
        option: the option's name, "--corpus" for instance, for messages.
        wanted: what the option takes; follows "give" in messages.

    Raises:
        CalibrationError: the file cannot be read, is empty, is not text, or has a form that is not read.
    """
    name = f"{option} {path}"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CalibrationError(f"{name}: cannot be read ({error.strerror}); check the path") from None
    sha256 = hashlib.sha256(data).hexdigest()
    if data.startswith(GZIP):
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error):
            raise CalibrationError(f"{name}: is a damaged or incomplete gzip file; make it again") from None
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() not in (".gz", ".gzip")]
    suffix = suffixes[-1] if suffixes else ""
    given = Given(name, suffix, wanted, _decoded(data, name, wanted), sha256)
    if not given.text.strip():
        given.refuse("is empty")
    if MARKUP.match(given.text):
        given.refuse("is a web page or an XML file")
    if suffix in NAMES and not given.is_json():
        given.refuse(f"is {NAMES[suffix]}")
    return given


def _decoded(data: bytes, name: str, wanted: str) -> str:
    for signature, form in SIGNATURES:
        if re.match(signature, data, re.DOTALL):
            raise CalibrationError(f"{name}: is {form}, which is not read; give {wanted}")
    encoding = next((encoding for bom, encoding in BOMS if data.startswith(bom)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        label = encoding.upper().removesuffix("-SIG")
        raise CalibrationError(f"{name}: not {label} text (byte {error.start}); convert it") from None
    if "\0" in text:
        raise CalibrationError(
            f"{name}: not text: character {text.index(chr(0))} is NUL (UTF-16 is read if it begins with a "
            f"byte-order mark); give {wanted}"
        )
    return text.replace("\r\n", "\n").replace("\r", "\n")  # a JSON value has no raw line ends


def _parsed(text: str) -> Any:
    """A JSON value, or the ValueError that says why there is none."""
    try:
        return json.loads(text)
    except ValueError as error:
        return error
    except RecursionError:
        return ValueError("nested too deep")


def described(value: Any) -> str:
    """What a JSON value is, in words."""
    if isinstance(value, dict):
        keys = ", ".join(f"`{shown(key)}`" for key in list(value)[:6])
        return f"an object with {keys}" if keys else "an empty object"
    names = {str: "a string", list: "a list", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def shown(text: str) -> str:
    """The beginning of a text; characters that cannot be seen are shown as escapes."""
    visible = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text[:SHOWN])
    return visible + ("…" if len(text) > SHOWN else "")
