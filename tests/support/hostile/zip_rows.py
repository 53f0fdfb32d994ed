"""Zip files, the container of `torch.save`, that lie."""

from __future__ import annotations

import pickle
import struct
import zlib
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from tests.support.hostile.assembler import (
    KEY,
    SHELL,
    STORAGES,
    Expectation,
    HostileFile,
    checkpoint,
    storage,
    stream,
    tensor,
    u32,
    u64,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

LOCAL, CENTRAL, END = struct.Struct("<4s5H3I2H"), struct.Struct("<4s6H3I5H2I"), struct.Struct("<4s4H2IH")
ENCRYPTED, DESCRIPTOR, PATCHED, STRONG = 0x1, 0x8, 0x20, 0x40  # bits of a member's flags
STORED, DEFLATED = 0, 8  # methods
DAY_ONE = 0x21  # the first day that a zip can name: 1 January 1980


@dataclass(frozen=True)
class Member:
    """A member of a zip file; `local` and `central` replace fields of its two headers, which thus can lie."""

    name: bytes
    content: bytes
    local: Mapping[str, Any] = field(default_factory=dict)
    central: Mapping[str, Any] = field(default_factory=dict)


def _headers(member: Member, changes: Mapping[str, Any]) -> dict[str, Any]:
    size = len(member.content)
    honest = {"flags": 0, "method": STORED, "crc": zlib.crc32(member.content), "packed": size, "size": size}
    return honest | {"name": member.name, "extra": b"", "magic": None, "offset": None} | dict(changes)


def zip_file(
    members: Iterable[Member],
    *,
    prefix: bytes = b"",
    before_end: bytes = b"",
    comment: bytes = b"",
    comment_length: int | None = None,
    **end: int,
) -> bytes:
    """A zip file. `end` replaces fields of the end record: disk, first_disk, here, count, size, offset."""
    body, directory = bytearray(prefix), bytearray()
    member_list = list(members)
    for member in member_list:
        offset = len(body)
        one = _headers(member, member.local)
        sizes = one["crc"], one["packed"], one["size"], len(one["name"]), len(one["extra"])
        body += LOCAL.pack(one["magic"] or b"PK\3\4", 20, one["flags"], one["method"], 0, DAY_ONE, *sizes)
        body += one["name"] + one["extra"] + member.content
        one = _headers(member, member.central)
        sizes = one["crc"], one["packed"], one["size"], len(one["name"]), len(one["extra"])
        place = offset if one["offset"] is None else one["offset"]
        start = one["magic"] or b"PK\1\2", 20, 20, one["flags"], one["method"], 0, DAY_ONE
        directory += CENTRAL.pack(*start, *sizes, 0, 0, 0, 0, place)
        directory += one["name"] + one["extra"]
    count, size = len(member_list), len(directory)
    honest = {"disk": 0, "first_disk": 0, "here": count, "count": count, "size": size, "offset": len(body)}
    length = len(comment) if comment_length is None else comment_length
    record = END.pack(b"PK\5\6", *(honest | end).values(), length)
    return bytes(body + directory) + before_end + record + comment


def members(pickled: bytes, storages: Mapping[str, bytes] = STORAGES) -> dict[str, Member]:
    """The members of a `.pt` file, as `torch.save` lays them out, by their names below the root folder."""
    contents = {"data.pkl": pickled, "byteorder": b"little", "version": b"3\n"}
    contents |= {f"data/{key}": content for key, content in storages.items()}
    return {name: Member(b"archive/" + name.encode(), content) for name, content in contents.items()}


def torch_zip(pickled: bytes, storages: Mapping[str, bytes] = STORAGES) -> bytes:
    """A sound `.pt` file around a pickle."""
    return zip_file(members(pickled, storages).values())


def _changed(pickled: bytes, name: str, **changes: Any) -> bytes:
    """A `.pt` file one member of which has changed headers: both, or only the local or the central one."""
    local: dict[str, Any] = {}
    central: dict[str, Any] = {}
    for change, value in changes.items():
        where, _, what = change.partition("_")
        if where != "central":
            local[what if where == "local" else change] = value
        if where != "local":
            central[what if where == "central" else change] = value
    by_name = members(pickled)
    by_name[name] = replace(by_name[name], local=local, central=central)
    return zip_file(by_name.values())


def _zip64(**numbers: int) -> bytes:
    """A zip64 extra field of these numbers, in the order size, packed, offset."""
    body = b"".join(map(u64, numbers.values()))
    return struct.pack("<HH", 1, len(body)) + body


def _zip64_end(*, entries: int, size: int, offset: int, at: int) -> bytes:
    """A zip64 end record and the locator that says where it is."""
    record = b"PK\6\6" + u64(44) + struct.pack("<2H2I", 45, 45, 0, 0) + u64(entries) * 2 + u64(size) + u64(offset)
    return record + b"PK\6\7" + u32(0) + u64(at) + u32(1)


def _inflating(total: int) -> tuple[bytes, int, bytes]:
    """A deflate stream of `total` bytes of NONE and a STOP: a unit, how often it comes, and its end."""
    unit_bytes = 2**24
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    unit = packer.compress(pickle.NONE * unit_bytes) + packer.flush(zlib.Z_FULL_FLUSH)
    return unit, total // unit_bytes, packer.compress(pickle.STOP) + packer.flush()


TEN_GIGABYTES = 10 * 2**30


def _bomb(path: Path, *, name: str, declared: int | None) -> None:
    """A `.pt` file with a member of 10 MB that inflates to 10 GB, or that `declared` another size."""
    unit, times, end = _inflating(TEN_GIGABYTES)
    by_name = members(checkpoint())
    content = unit * times + end
    size = {"size": declared} if declared else {"size": 0xFFFFFFFF, "extra": _zip64(size=TEN_GIGABYTES + 1)}
    headers = {"method": DEFLATED, "crc": 0} | size
    by_name[name] = replace(by_name[name], content=content, local=headers, central=headers)
    path.write_bytes(zip_file(by_name.values()))


def _many_members(path: Path) -> None:
    """A `.pt` file of 60,000 storages of no bytes."""
    empty = {str(index): b"" for index in range(1, 60_000)}
    path.write_bytes(torch_zip(checkpoint(), STORAGES | empty))


def _long_directory(path: Path) -> None:
    """A `.pt` file whose directory has 9 MB of what is beside the names in it."""
    padded = (Member(b"archive/x/%d" % index, b"", central={"extra": bytes(65_000)}) for index in range(140))
    path.write_bytes(zip_file([*members(checkpoint()).values(), *padded]))


def variants_of(family: str, variants: Mapping[str, bytes], expect: Expectation, **more: Any) -> Iterator[HostileFile]:
    for name, content in variants.items():
        yield HostileFile(f"{family}-{name}", content, expect=expect, **more)


def zips() -> Iterator[HostileFile]:
    """`.pt` files whose zip lies."""
    good, hostile = checkpoint(), checkpoint(SHELL)
    by_name = members(good)
    sound = list(by_name.values())
    archive = torch_zip(good)
    beyond = len(archive) + 1000
    end_at = len(archive) - END.size

    # Scanners stumbled over these, and torch.load does not.
    nowhere = {"local_flags": DESCRIPTOR, "local_packed": 0, "local_size": 0, "local_crc": 0}
    stumbling = {
        "wrong-crc": _changed(hostile, "data.pkl", crc=0x12345678),
        "no-crc": _changed(hostile, "data.pkl", crc=0),
        "other-local-name": _changed(hostile, "data.pkl", local_name=b"archive/datap.kl"),
        "longer-local-name": _changed(hostile, "data.pkl", local_name=b"archive/data.pkl.txt"),
        "other-local-sizes": _changed(hostile, "data.pkl", local_packed=1, local_size=2),
        "sizes-only-in-the-directory": _changed(hostile, "data.pkl", **nowhere),
        "a-bad-member-first": zip_file([Member(b"archive/x", b"x", central={"crc": 1}), *members(hostile).values()]),
        "with-a-readme": zip_file([*members(hostile).values(), Member(b"archive/README.txt", b"safe")]),
        "comment-says-safe": zip_file(members(hostile).values(), comment=b"scanned: safe"),
    }
    flags = {"encrypted": ENCRYPTED, "patched": PATCHED, "strongly-encrypted": STRONG}
    for name, flag in flags.items():
        odd = Member(b"archive/config.pkl", stream(SHELL), {"flags": flag}, {"flags": flag})
        stumbling[f"beside-a-member-{name}"] = zip_file([odd, *members(hostile).values()])
    yield from variants_of("zip", stumbling, "either", names=("os.system",), fires=True)
    flagged = {name: _changed(hostile, "data.pkl", flags=flag) for name, flag in flags.items()}
    yield from variants_of("zip-pickle", flagged, "either", names=("os.system",))
    # The pickle is good. What lies beside it is not, and nobody has to look there.
    for name in ("config.pkl", "data/evil.pkl", "data/1", ".data/evil", "data.pkl.bak", "DATA.PKL"):
        beside = zip_file([*sound, Member(b"archive/" + name.encode(), stream(SHELL))])
        yield HostileFile(f"zip-another-pickle-{name.lower()}-{name.isupper()}", beside, expect="either")

    headers = {
        "wrong-magic-of-the-pickle": _changed(good, "data.pkl", local_magic=b"PK\3\5"),
        "wrong-magic-of-a-storage": _changed(good, "data/0", local_magic=bytes(4)),
        "wrong-magic-in-the-directory": _changed(good, "data.pkl", central_magic=b"PK\1\3"),
        "offset-beyond-the-file": _changed(good, "data/0", central_offset=beyond),
        "offset-of-4-gigabytes": _changed(good, "data/0", central_offset=0xFFFFFFFF),
        "offset-of-another-member": _changed(good, "data/0", central_offset=0),
        "offset-within-a-member": _changed(good, "data/0", central_offset=40),
        "storage-beyond-the-file": _changed(good, "data/0", packed=beyond, size=beyond),
        "storage-of-4-gigabytes": _changed(good, "data/0", packed=0xFFFFFFFE, size=0xFFFFFFFE),
        "storage-packed-shorter": _changed(good, "data/0", packed=32),
        "storage-unpacked-longer": _changed(good, "data/0", size=128),
        "pickle-beyond-the-file": _changed(good, "data.pkl", packed=beyond, size=beyond),
    }
    yield from variants_of("zip", headers, "refuse")
    # Of a member that need not be read.
    beyond_name = _changed(good, "version", local_name=b"a" * 65535, central_offset=end_at)
    yield from variants_of("zip", {"local-name-beyond-the-file": beyond_name}, "either")
    methods = (1, DEFLATED, 9, 12, 14, 93, 95, 98, 99, 0xFFFF)
    for name in ("data.pkl", "data/0"):
        changed = {f"{method}-of-{name[:4]}{len(name)}": _changed(good, name, method=method) for method in methods}
        yield from variants_of("zip-method", changed, "refuse")
    full = 0xFFFFFFFF  # says: look into the zip64 field
    zip64: dict[str, dict[str, Any]] = {
        "size-of-2-to-64": {"central_size": full, "central_extra": _zip64(size=2**64 - 1)},
        "sizes-of-2-to-63": {"size": full, "packed": full, "extra": _zip64(size=2**63, packed=2**63)},
        "offset-of-2-to-63": {"central_offset": full, "central_extra": _zip64(offset=2**63)},
        "offset-beyond": {"central_offset": full, "central_extra": _zip64(offset=beyond)},
        "missing": {"central_size": full, "central_packed": full},
        "cut": {"central_size": full, "central_extra": b"\1\0\4\0" + bytes(4)},
        "longer-than-its-field": {"central_size": full, "central_extra": b"\1\0\xff\xff" + bytes(8)},
        "empty": {"central_size": full, "central_extra": b"\1\0\0\0"},
    }
    yield from variants_of(
        "zip64", {name: _changed(good, "data/0", **change) for name, change in zip64.items()}, "refuse"
    )

    large = tensor(storage=storage(numel=2**40), size=(2**40,), stride=(1,))
    contents = {
        "storage-shorter-than-its-tensors": torch_zip(good, {"0": bytes(16)}),
        "storage-of-no-bytes": torch_zip(good, {"0": b""}),
        "no-storage": torch_zip(good, {}),
        "pickle-of-no-bytes": torch_zip(b""),
        "two-pickles": zip_file([*sound, Member(b"archive/data.pkl", hostile)]),
        "two-pickles-hostile-first": zip_file([Member(b"archive/data.pkl", hostile), *sound]),
        "two-storages-of-one-name": zip_file([*sound, Member(b"archive/data/0", bytes(64))]),
        "two-roots": zip_file([*sound, Member(b"other/data.pkl", hostile)]),
        "no-pickle": zip_file(member for member in sound if not member.name.endswith(b"pkl")),
        "no-members": zip_file([]),
        "unknown-endian": zip_file((by_name | {"byteorder": Member(b"archive/byteorder", b"\xff")}).values()),
        "tensor-of-4-terabytes": torch_zip(checkpoint(module={KEY: large})),
    }
    yield from variants_of("zip", contents, "refuse")
    ends = {
        "cut": archive[:-1],
        "only": archive[-END.size :],
        "missing": archive[: -END.size],
        "start-only": archive[:30],
        "directory-beyond-the-file": zip_file(sound, offset=beyond),
        "directory-of-4-gigabytes": zip_file(sound, size=0xFFFFFFFE),
    }
    yield from variants_of("zip-end", ends, "refuse")
    locator = b"PK\6\7" + u32(0)
    endless = _zip64_end(entries=2**60, size=2**62, offset=0, at=end_at)
    unclear = {
        "count-too-high": zip_file(sound, count=1000, here=1000),
        "count-of-65535": zip_file(sound, count=0xFFFF, here=0xFFFF),
        "count-of-zero": zip_file(sound, count=0, here=0),
        "directory-of-no-bytes": zip_file(sound, size=0),
        "directory-at-4-gigabytes": zip_file(sound, offset=full),
        "comment-beyond-the-file": zip_file(sound, comment_length=0xFFFF),
        "on-another-disk": zip_file(sound, disk=1, first_disk=1),
        "zip64-nowhere": zip_file(sound, before_end=locator + u64(2**63) + u32(1), count=0xFFFF, offset=full),
        "zip64-is-its-locator": zip_file(sound, before_end=locator + u64(end_at) + u32(1), count=0xFFFF, offset=full),
        "zip64-of-2-to-60-members": zip_file(sound, before_end=endless, count=0xFFFF, offset=full),
    }
    yield from variants_of("zip-end", unclear, "either")

    # A storage whose header lies within the pickle: two members share bytes.
    inner = zip_file([by_name["data/0"]]).partition(b"PK\1\2")[0]
    hiding = checkpoint(inner)
    within = replace(by_name["data/0"], central={"offset": torch_zip(hiding).index(inner)})
    decoy = torch_zip(hostile)
    first_end = END.pack(b"PK\5\6", 0, 0, 0, 0, 0, 0, 0)
    tolerated = {
        "storage-within-the-pickle": zip_file((members(hiding) | {"data/0": within}).values()),
        "two-members-at-one-place": zip_file([*sound, Member(b"archive/data/1", b"", central={"offset": 0})]),
        "storage-longer-than-its-tensors": torch_zip(good, {"0": bytes(80)}),
        "storage-encrypted": _changed(good, "data/0", flags=ENCRYPTED),
        "storage-of-another-crc": _changed(good, "data/0", crc=1),
        "storage-of-another-local-name": _changed(good, "data/0", local_name=b"archive/data/1"),
        "big-endian": zip_file((by_name | {"byteorder": Member(b"archive/byteorder", b"big")}).values()),
        "without-a-root": zip_file([Member(b"data.pkl", good), Member(b"data/0", STORAGES["0"])]),
        "torchscript": zip_file([*sound, Member(b"archive/constants.pkl", hostile)]),
        "prefix": zip_file(sound, prefix=b"#!/bin/sh\n" * 100),
        "prefix-not-counted": b"#!/bin/sh\n" * 100 + archive,
        "spanned-marker": zip_file(sound, prefix=b"PK\7\x08"),
        "behind-another": decoy + archive,
        "garbage-behind": archive + bytes(100),
        "comment-with-an-end-record": zip_file(sound, comment=first_end + b"x"),
        "comment-with-a-zip": zip_file(sound, comment=decoy),
        "comment-of-65535": zip_file(sound, comment=b"PK\5\6" * 16383),
        "end-record-in-a-storage": torch_zip(good, {"0": (archive[-END.size :] * 3)[:64]}),
    }
    yield from variants_of("zip", tolerated, "either")
    names_beside = {
        "up": b"../../pwned",
        "up-within": b"archive/data/../../../pwned",
        "absolute": b"/pwned",
        "drive": b"C:\\pwned",
        "backslash": b"archive\\data.pkl",
        "nul": b"archive/data.pkl\0.txt",
        "empty": b"",
        "no-utf-8": b"archive/\xff\xfe",
        "newline": b"archive/a\nb",
        "ansi": b"archive/\x1b[31m",
        "long": b"a" * 65535,
        "double-slash": b"archive//data.pkl",
        "dot": b"archive/./data.pkl",
        "folder": b"archive/data/",
    }
    beside_it = {name: zip_file([*sound, Member(odd_name, b"x")]) for name, odd_name in names_beside.items()}
    yield from variants_of("zip-member-name", beside_it, "either")
    bombs: tuple[tuple[str, str, int | None], ...] = (
        ("pickle", "data.pkl", None),
        ("pickle-that-lies", "data.pkl", 100),
        ("storage", "data/0", None),
        ("storage-that-lies", "data/0", 64),
        ("byteorder", "byteorder", 6),
    )
    for name, member, declared in bombs:
        yield HostileFile(f"zip-bomb-{name}", partial(_bomb, name=member, declared=declared))
    yield HostileFile("zip-many-members", _many_members, expect="either")
    yield HostileFile("zip-directory-of-many-bytes", _long_directory)
