"""The errors that cogtools raises for bad input, told in fields.

Whoever shows one of these decides how: the command line prints the fields under each other, `--json` puts them
into an object. Any other exception is a bug in cogtools and keeps its traceback.
"""

from __future__ import annotations

import shlex
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

SHOWN_PROBLEMS = 10
"""How many problems a message lists before it says how many more there are."""


ProblemKind = Literal[
    "collision",  # two keys for one tensor
    "constant",  # one value throughout
    "dtype",
    "error",  # what a library raised
    "invalid",  # a stated setting that cannot be, or changes what the LoRA does
    "library_warning",
    "missing",
    "module",  # no adapter where one should be, or one that does nothing
    "not_finite",
    "rank",
    "scale",
    "shape",
    "unexpected",
    "unpaired",  # one factor of a LoRA without the other
    "unreadable",
    "value",
    "zero",
]
"""What sort of thing is wrong; the schema `error.json` lists the same."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong with one key, or with a few alike.

    Attributes:
        kind: what sort of problem.
        subject: the key, or several folded into one name ("layers 3-5: to_v lora_B").
        found: what the checkpoint holds, where there is something.
        expected: what should be there, where that can be said.
        keys: all the keys that are meant, where the subject is several folded into one name.
    """

    kind: ProblemKind
    subject: str
    found: str | None = None
    expected: str | None = None
    keys: tuple[str, ...] = ()

    def __str__(self) -> str:
        details = [
            f"{label} {value}"
            for label, value in (("found", self.found), ("expected", self.expected))
            if value is not None
        ]
        return f"{self.kind.replace('_', ' ')}: {self.subject}" + (f" ({', '.join(details)})" if details else "")


@dataclass(frozen=True, slots=True)
class Hint:
    """What to do about something.

    Attributes:
        advice: in plain words.
        command: a command line of cogtools to paste, which does it or shows more.
    """

    advice: str | None = None
    command: str | None = None

    def __str__(self) -> str:
        return ": ".join(filter(None, (self.advice, self.command)))


def command(*words: object, advice: str | None = None) -> Hint:
    """A hint with a command line of cogtools, made of these words: paths with spaces are quoted."""
    return Hint(advice, shlex.join(["cogtools", *map(str, words)]))


class CogtoolsError(Exception):
    """Something that the user can act on.

    Attributes:
        what: what failed, in a sentence without a full stop.
        file: the file or folder in which it failed, as text.
        found: what is there.
        expected: what should be there.
        hint: what to do about it.
        problems: all that is wrong with single keys, collected.
    """

    kind = "error"

    def __init__(
        self,
        what: str,
        *,
        file: object = None,
        found: str | None = None,
        expected: str | None = None,
        hint: Hint | str | None = None,
        problems: Sequence[Problem] = (),
    ) -> None:
        super().__init__(what)
        self.what = what
        self.file = None if file is None else str(file)
        self.found = found
        self.expected = expected
        self.hint = Hint(hint) if isinstance(hint, str) else hint
        self.problems = tuple(problems)

    def __reduce__(self) -> tuple[object, ...]:
        """How it is pickled on its way from another process: with all its fields, whatever `__init__` takes."""
        return _unpickled, (type(self), self.args), self.__dict__

    def fields(self) -> list[tuple[str, str]]:
        """The labelled lines under the message, in the order in which they are read."""
        lines = [("file", self.file), ("found", self.found), ("expected", self.expected)]
        shown = [(label, text) for label, text in lines if text is not None]
        shown += [("problem", str(problem)) for problem in self.problems[:SHOWN_PROBLEMS]]
        if len(self.problems) > SHOWN_PROBLEMS:
            shown.append(("problem", f"… and {len(self.problems) - SHOWN_PROBLEMS} more (--json lists all)"))
        if self.hint is not None:
            shown.append(("try", str(self.hint)))
        return shown

    def to_dict(self) -> dict[str, object]:
        """The error as plain data, for `--json`: every field, every problem."""
        return {
            "kind": self.kind,
            "what": self.what,
            "file": self.file,
            "found": self.found,
            "expected": self.expected,
            "hint": None if self.hint is None else asdict(self.hint),
            "problems": [asdict(problem) for problem in self.problems],
        }

    @staticmethod
    def from_dict(fields: Mapping[str, Any]) -> CogtoolsError:
        """The error that `to_dict` has told, of the same kind."""
        kinds = {error.kind: error for error in CogtoolsError.__subclasses__()}
        return kinds.get(fields["kind"], CogtoolsError)(
            fields["what"],
            file=fields["file"],
            found=fields["found"],
            expected=fields["expected"],
            hint=None if fields["hint"] is None else Hint(**fields["hint"]),
            problems=[Problem(**{**problem, "keys": tuple(problem["keys"])}) for problem in fields["problems"]],
        )

    def __str__(self) -> str:
        return "\n".join([self.what, *(f"  {label + ':':<10} {text}" for label, text in self.fields())])


def _unpickled(error: type[CogtoolsError], args: tuple[object, ...]) -> CogtoolsError:
    return error.__new__(error, *args)


class CheckpointError(CogtoolsError):
    """A checkpoint cannot be read: it is missing, damaged, hostile, or no checkpoint."""

    kind = "checkpoint"


class ExportError(CogtoolsError):
    """A checkpoint was read, but no right LoRA can be made of it."""

    kind = "export"


class OutputError(CogtoolsError):
    """The output cannot be written: it exists, is not writable, or the disk is full."""

    kind = "output"


class PrintError(OutputError):
    """The result cannot be printed: standard output is closed, or its disk is full."""

    def __init__(self, cause: OSError) -> None:
        super().__init__(f"the result cannot be printed: {cause.strerror or cause}")


class OptionError(CogtoolsError):
    """An option or argument has a value that makes no sense."""

    kind = "usage"


class KilledError(CogtoolsError):
    """The process that did the work was killed by the system or from outside."""

    kind = "killed"


class LibraryError(CogtoolsError):
    """A library that is needed cannot be imported: it is not installed, or its release does not go with others."""

    kind = "library"


class InterruptedByUserError(CogtoolsError):
    """Ctrl-C or a signal has ended the work; nothing was left half-written."""

    kind = "interrupted"
