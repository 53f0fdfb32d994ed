"""Numbers and text in few words."""

import pytest

from cogtools.formatting import size, truncate


@pytest.mark.parametrize(
    ("length", "start", "end", "both"),
    [
        (10, "0123456789", "0123456789", "0123456789"),
        (9, "01234567…", "…23456789", "01…456789"),
        (4, "012…", "…789", "0…89"),
        (2, "0…", "…9", "…9"),
        (1, "…", "…", "…"),
    ],
)
def test_a_text_that_is_too_long_is_cut_where_it_need_not_be_kept(length: int, start: str, end: str, both: str) -> None:
    text = "0123456789"
    assert truncate(text, length) == start
    assert truncate(text, length, keep="end") == end
    assert truncate(text, length, keep="both") == both


def test_what_was_cut_out_can_be_marked_otherwise() -> None:
    assert truncate("0123456789", 8, mark=" [10]") == "012 [10]"


@pytest.mark.parametrize(
    ("size_bytes", "shown"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1.0 kB"),
        (999_949, "999.9 kB"),
        (999_950, "1.0 MB"),
        (10**16, "10000.0 TB"),
    ],
)
def test_a_number_of_bytes_has_its_unit(size_bytes: int, shown: str) -> None:
    assert size(size_bytes) == shown
