"""Files that are meant to hang, flood or crash whoever reads them as configuration."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

SMALL = b'{"seed": 1}'

BOMBS: dict[str, Callable[[Path], object]] = {
    "100,000 lists in each other": lambda path: path.write_bytes(b"[" * 100_000),
    "100,000 objects in each other": lambda path: path.write_bytes(b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    "200 objects in each other": lambda path: path.write_bytes(b'{"a":' * 200 + b"1" + b"}" * 200),
    "2 MB of spaces": lambda path: path.write_bytes(b" " * 2_000_000 + SMALL),
    "200 kB of keys": lambda path: path.write_bytes(b"{" + b",".join(b'"k%d":1' % key for key in range(16_000)) + b"}"),
    "200 kB of one key, again and again": lambda path: path.write_bytes(
        b"{" + b",".join([b'"seed":1'] * 20_000) + b"}"
    ),
    "200 kB of misspelt names": lambda path: path.write_bytes(
        b"{" + b",".join(b'"gradient_acumulation_stepz%d":1' % key for key in range(5_000)) + b"}"
    ),
    "one string of 190 kB": lambda path: path.write_bytes(b'{"name": "' + b"x" * 190_000 + b'"}'),
    "one key of 190 kB": lambda path: path.write_bytes(b'{"' + b"x" * 190_000 + b'": 1}'),
    "a whole number of 4,000 digits": lambda path: path.write_bytes(b'{"seed": ' + b"9" * 4_000 + b"}"),
    "a whole number of 190,000 digits": lambda path: path.write_bytes(b'{"seed": ' + b"9" * 190_000 + b"}"),
    "a number with 190,000 digits behind the point": lambda path: path.write_bytes(
        b'{"seed": 0.' + b"9" * 190_000 + b"}"
    ),
    "NaN": lambda path: path.write_bytes(b'{"seed": NaN}'),
    "Infinity": lambda path: path.write_bytes(b'{"seed": -Infinity}'),
    "a byte order mark": lambda path: path.write_bytes(b"\xef\xbb\xbf" + SMALL),
    "UTF-16": lambda path: path.write_bytes(SMALL.decode().encode("utf-16")),
    "a NUL byte": lambda path: path.write_bytes(SMALL + b"\0"),
    "bytes that are not UTF-8": lambda path: path.write_bytes(b'{"name": "\xff\xfe"}'),
    "terminal escapes": lambda path: path.write_bytes(
        b'{"name": "\\u001b[2J\\u001b]0;owned\\u0007", "\\u001b[31m": 1}'
    ),
    "an empty file": lambda path: path.write_bytes(b""),
    "random bytes": lambda path: path.write_bytes(os.urandom(100_000)),
    "a link to /dev/zero": lambda path: path.symlink_to("/dev/zero"),
    "a link to itself": lambda path: path.symlink_to(path),
    "a FIFO": lambda path: os.mkfifo(path),
    "a folder": lambda path: path.mkdir(),
    "a file that may not be read": lambda path: (path.write_bytes(SMALL), path.chmod(0)),
    "no file": lambda path: None,
}
"""Name -> what makes it at a path."""
