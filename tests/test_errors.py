"""The errors, and what they carry."""

import pickle

import pytest

from cogtools.errors import CogtoolsError, PrintError, Problem, command


def all_kinds(error: type[CogtoolsError]) -> list[type[CogtoolsError]]:
    return [error, *(kind for child in error.__subclasses__() for kind in all_kinds(child))]


@pytest.mark.parametrize("kind", all_kinds(CogtoolsError))
def test_an_error_comes_out_of_another_process_with_all_its_fields(kind: type[CogtoolsError]) -> None:
    error = (
        PrintError(OSError(28, "No space left on device"))
        if kind is PrintError
        else kind(
            "it cannot be read",
            file="a.pt",
            found="this",
            expected="that",
            hint=command("inspect", "a.pt", advice="look"),
            problems=[Problem("missing", "a", "nothing", "something", ("a", "b"))],
        )
    )
    error.add_note("seen twice")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert (copy.args, str(copy), copy.to_dict()) == (error.args, str(error), error.to_dict())
    assert vars(copy) == vars(error)
