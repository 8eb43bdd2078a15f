"""Names the kinds of files that are not read, by their first bytes and by their text."""

from __future__ import annotations

import re

__all__ = ["named_binary", "named_page", "named_text", "other_encoding"]

_OTHER_BOMS = {
    b"\xff\xfe\0\0": "UTF-32",
    b"\0\0\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
"""First bytes of files in other encodings; longer ones first, because one is a prefix of another."""

_TABLE = "export it as CSV or as JSON lines"
_UNPACK = "decompress it and pass the text to --input -"

_MAGIC = (
    (b"PAR1", "a Parquet file", f"{_TABLE} (pandas: read_parquet(…).to_json(…, orient='records', lines=True))"),
    (b"ORC", "an ORC file", _TABLE),
    (b"Obj\x01", "an Avro file", _TABLE),
    (b"ARROW1", "an Arrow file", _TABLE),
    (b"FEA1", "a Feather file", _TABLE),
    (b"\xff\xff\xff\xff", "an Arrow stream", _TABLE),
    (b"SQLite format 3\0", "an SQLite database", f"{_TABLE} (sqlite3 -csv -header FILE 'select …')"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file", _TABLE),
    (b"CDF\x01", "a NetCDF file", _TABLE),
    (b"CDF\x02", "a NetCDF file", _TABLE),
    (b"\x93NUMPY", "a NumPy array", _TABLE),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Microsoft Office file such as an .xls workbook", _TABLE),
    (b"RDX2\n", "an R data file", _TABLE),
    (b"RDX3\n", "an R data file", _TABLE),
    (b"<stata_dta>", "a Stata file", _TABLE),
    (b"$FL2", "an SPSS file", _TABLE),
    (b"%PDF-", "a PDF document", _TABLE),
    (b"{\\rtf", "an RTF document", _TABLE),
    (b"\x89PNG\r\n\x1a\n", "a PNG image", _TABLE),
    (b"\xff\xd8\xff", "a JPEG image", _TABLE),
    (b"GIF8", "a GIF image", _TABLE),
    (b"\x7fELF", "a program", _TABLE),
    (b"\x1f\x8b", "a gzip file inside a gzip file", _UNPACK),
    (b"\x28\xb5\x2f\xfd", "a zstd file", f"{_UNPACK} (zstdcat)"),
    (b"BZh", "a bzip2 file", f"{_UNPACK} (bzcat)"),
    (b"\xfd7zXZ\0", "an xz file", f"{_UNPACK} (xzcat)"),
    (b"\x04\x22\x4d\x18", "an lz4 file", f"{_UNPACK} (lz4cat)"),
    (b"\x1e{", "a JSON text sequence", "remove the record separators (tr -d '\\036')"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it"),
    (b"Rar!\x1a\x07", "a RAR archive", "unpack it"),
)
"""First bytes, the kind that they begin, and how its records become readable."""

_ZIP = (b"PK\x03\x04", b"PK\x05\x06")
_WORKBOOK_PARTS = (b"[Content_Types].xml", b"_rels/", b"docProps/", b"xl/")
_PICKLE = re.compile(rb"\x80[\x02-\x05](\x95.{8})?[\x28-\x7e\x80-\x9b]|\([ld]p\d+\n", re.DOTALL)
_CONTROL = frozenset(range(32)) - frozenset(b"\t\n\v\f\r\x1b")

_MARKUP = re.compile(rb"<(\?xml|!doctype|!--|[a-z][\w:-]*[\s/>])", re.IGNORECASE)
_PRINTED_TABLE = re.compile(rb"(\+-[-+]*\+|[^\n]*\|[^\n]*\r?\n[ |+:-]*--[ |+:-]*)\r?\n")
_SETTING = re.compile(rb"[A-Za-z_][\w.-]*[ \t]*=[ \t]*\S")
_SECTION = re.compile(rb"^\[\[?[A-Za-z_][\w .:\"'-]*\]\]?[ \t]*(#.*)?\r?$", re.MULTILINE)
_PYTHON_LITERAL = re.compile(rb"\[?\s*\{\s*('|\w+\s*:)")
_YAML_ADVICE = (
    "YAML",
    "convert it to JSON (python -c 'import json, sys, yaml; print(json.dumps(yaml.safe_load(sys.stdin)))')",
)
_YAML_LINE = rb"(?:- +)?[A-Za-z_\"'][\w \"'.-]*:(?: [^\n]*)?\r?$"
_YAML = re.compile(
    rb"(?:" + _YAML_LINE + rb")\s+(?:" + _YAML_LINE + rb"|- )|- [^\n]*\s+(?:- |" + _YAML_LINE + rb")",
    re.MULTILINE,
)
_SQL = re.compile(rb"(--\s|insert\s+into\s|create\s+table\s|copy\s+\S+\s*\(|begin;|set\s+\S+\s*=)", re.IGNORECASE)


def other_encoding(head: bytes) -> str | None:
    """Return the encoding that a byte order mark names; None for UTF-8 and without a mark."""
    return next((encoding for bom, encoding in _OTHER_BOMS.items() if head.startswith(bom)), None)


def named_binary(head: bytes) -> tuple[str, str] | None:
    """Return the kind of a file that is no UTF-8 text, and what to do with it; None for what may be text."""
    for first, kind, advice in _MAGIC:
        if head.startswith(first):
            return kind, advice
    if head.startswith(_ZIP):
        if any(part in head[:4096] for part in _WORKBOOK_PARTS):
            return "an .xlsx workbook or another Office file (a zip archive)", "save the sheet as CSV"
        return "a zip archive", "unpack it (unzip -p FILE | stageflow run … --input -)"
    if head[257:262] == b"ustar":
        return "a tar archive", "unpack it"
    if _PICKLE.match(head):
        return "a Python pickle", f"{_TABLE}; a pickle is never loaded"
    begin = head[:1024].removesuffix(b"\x1a")  # the end of a file of CP/M and DOS
    if begin and not begin.strip(b"\0"):
        return "a file of zero bytes", "was it copied completely?"
    if b"\0" in begin:
        return _with_zero_bytes(begin)
    if sum(byte in _CONTROL for byte in begin) > len(begin) // 20:
        return "binary data", _TABLE
    return None


def _with_zero_bytes(begin: bytes) -> tuple[str, str]:
    for encoding, characters, zeros in (
        ("UTF-16LE", begin[::2], begin[1::2]),
        ("UTF-16BE", begin[1::2], begin[::2]),
    ):
        if zeros.count(0) > 0.7 * len(zeros) and characters.count(0) < 0.1 * len(characters):
            return f"{encoding} text without a byte order mark", f"convert it to UTF-8 (iconv -f {encoding} -t UTF-8)"
    return "binary data", _TABLE


def named_page(text: bytes) -> tuple[str, str] | None:
    """Return the kind of a text that is no table, whatever its name is; None for what may be a table."""
    if _MARKUP.match(text):
        html = re.search(rb"<(!doctype\s+)?html", text[:2048], re.IGNORECASE) is not None
        return ("an HTML page", "was it downloaded without logging in?") if html else ("XML", _TABLE)
    if _PRINTED_TABLE.match(text):
        return "a table as psql and mysql print it", "export it as CSV (psql --csv, mysql --batch)"
    return _YAML_ADVICE if text.startswith((b"---", b"%YAML")) else None


def named_text(text: bytes) -> tuple[str, str] | None:
    """Return the kind of a text of another format, and what to do with it; None for a text of unknown format."""
    if _SECTION.match(text) or (_SETTING.match(text) and _SECTION.search(text)):
        return "an INI or TOML file", _TABLE
    if _PYTHON_LITERAL.match(text):
        return "dicts as Python or JavaScript prints them, not JSON", "write them with json.dumps()"
    if _YAML.match(text):
        return _YAML_ADVICE
    return ("SQL", _TABLE) if _SQL.match(text) else None
