"""A path may be a URL: what it is called, what lies beside it, and what of it is shown."""

import pickle
from pathlib import Path

import pytest

from cogtools.checkpoint.paths import RemotePath, as_path
from cogtools.errors import OptionError

SIGNED = "https://user:secret@example.org/runs/lora%20a/1000/mp_rank_00_model_states.pt?X-Amz-Signature=abc#part"


def remote(url: str) -> RemotePath:
    path = as_path(url)
    assert isinstance(path, RemotePath)
    return path


def test_a_path_of_this_machine_stays_what_it_is() -> None:
    assert as_path("runs/lora") == Path("runs/lora")
    assert as_path(Path("a.pt")) == Path("a.pt")
    assert as_path("file:///runs/lora%20a") == Path("/runs/lora a")


def test_a_url_shows_neither_password_nor_query() -> None:
    path = remote(SIGNED)
    assert str(path) == "https://example.org/runs/lora%20a/1000/mp_rank_00_model_states.pt"
    assert repr(path) == f"RemotePath({str(path)!r})"


def test_requests_have_the_whole_url_also_for_what_lies_beside() -> None:
    path = remote(SIGNED)
    assert path.url == SIGNED.removesuffix("#part")
    above = path.parent.parent
    assert (above / "training config.yaml").url == (
        "https://user:secret@example.org/runs/lora%20a/training%20config.yaml?X-Amz-Signature=abc"
    )


def test_a_name_from_a_file_stays_one_name() -> None:
    assert (remote("https://example.org/a") / "..%2fb?c#d").url == "https://example.org/a/..%252fb%3Fc%23d"
    assert (remote("s3://bucket/a") / "b?c#d").url == "s3://bucket/a/b?c#d"


def test_the_parts_of_a_url_are_those_of_a_path() -> None:
    path = remote("s3://bucket/runs/lora/model.v2.safetensors")
    assert (path.name, path.stem, path.suffix) == ("model.v2.safetensors", "model.v2", ".safetensors")
    assert path.parts == ("s3://bucket", "runs", "lora", "model.v2.safetensors")
    assert str(path.with_name("b")) == "s3://bucket/runs/lora/b"
    assert str(path.parent.parent.parent.parent.parent) == "s3://bucket"
    assert remote("s3://bucket/runs/") == remote("s3://bucket/runs")


def test_a_job_takes_its_url_along_whole() -> None:
    path = remote(SIGNED)
    again = pickle.loads(pickle.dumps(path))
    assert (again, again.url) == (path, path.url)


@pytest.mark.parametrize(
    ("url", "what"),
    [
        ("s3://", "this URL has no host or bucket"),
        ("https:///a", "this URL has no host or bucket"),
        ("https://example.org/a/../b", "this URL has a part that is not a name"),
        ("zip://a.pt::https://example.org/b.zip", "a chain of URLs is not supported"),
    ],
)
def test_a_url_that_can_lead_nowhere_is_an_error(url: str, what: str) -> None:
    with pytest.raises(OptionError) as caught:
        as_path(url)
    assert caught.value.what == what
