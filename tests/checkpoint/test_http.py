"""Checkpoints on a server that speaks HTTP: what is asked for, and servers that answer badly."""

import contextlib
import gzip
import itertools
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("aiohttp")

import cogtools
from cogtools.checkpoint.opening import open_checkpoint
from cogtools.checkpoint.remote import file, http, store
from cogtools.conversion import fetching
from cogtools.errors import CheckpointError, CogtoolsError, OptionError
from tests.support.command_line import CommandLine
from tests.support.factories import TOY_2B, sat_checkpoint, sat_state_dict, save_deflated, save_legacy
from tests.support.http_server import HttpServer, Request, good, http_server

WEIGHTS = "mp_rank_00_model_states.pt"


@pytest.fixture(autouse=True)
def _in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "PAUSES_SECONDS", (0.0, 0.0))


@pytest.fixture
def served(run_folder: Path) -> Iterator[HttpServer]:
    with http_server(run_folder.parent) as server:
        yield server


def exported(source: object, out: Path) -> bytes:
    return cogtools.export_lora(source, out).output.read_bytes()  # type: ignore[arg-type]


@pytest.mark.parametrize("path", ["run", "run/", "run/1000", f"run/1000/{WEIGHTS}"])
def test_an_export_from_a_server_is_the_export_from_a_disk(
    path: str, served: HttpServer, run_folder: Path, tmp_path: Path
) -> None:
    here = exported(run_folder, tmp_path / "here")
    assert exported(f"{served.url}/{path}", tmp_path / "there") == here


@pytest.mark.parametrize("save", [save_legacy, save_deflated])
@pytest.mark.parametrize("scale", ["metadata", "fold"])
def test_every_format_is_exported_from_a_server(save: object, scale: str, tmp_path: Path) -> None:
    save(sat_checkpoint(sat_state_dict(TOY_2B, 4)), tmp_path / "a.pt")  # type: ignore[operator]
    options = {"alpha": 2, "scale": scale}
    here = cogtools.export_lora(tmp_path / "a.pt", tmp_path / "a", **options).output.read_bytes()  # type: ignore[arg-type]
    with http_server(tmp_path) as server:
        report = cogtools.export_lora(f"{server.url}/a.pt", tmp_path / "b", **options)  # type: ignore[arg-type]
    assert report.output.read_bytes() == here


def test_inspect_and_verify_take_urls(served: HttpServer, run_folder: Path) -> None:
    url = f"{served.url}/run"
    there, here = cogtools.inspect_checkpoint(url), cogtools.inspect_checkpoint(run_folder)
    assert str(there.checkpoint) == f"{url}/1000/{WEIGHTS}"
    assert replace(there, checkpoint=here.checkpoint, lora=None) == replace(here, lora=None)
    exported(run_folder, run_folder.parent / "lora")
    report = cogtools.verify_lora(f"{served.url}/lora", against=url)
    assert (report.verdict, str(report.against)) == ("pass", f"{url}/1000/{WEIGHTS}")


def test_the_lora_travels_once_and_is_checked_on_the_way(served: HttpServer, run_folder: Path, tmp_path: Path) -> None:
    report = cogtools.export_lora(f"{served.url}/run", tmp_path / "out")
    assert report.crc32 == "checked"
    size = (run_folder / "1000" / WEIGHTS).stat().st_size
    assert served.sent_bytes < size + 4 * store.BLOCK_BYTES
    assert len(served.asked) < 30


def test_a_look_at_values_fetches_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = sat_state_dict(TOY_2B, 64)
    for key, tensor in state.items():
        if "matrix_B" in key:
            tensor.zero_()
    torch.save(sat_checkpoint(state), tmp_path / "a.pt")
    monkeypatch.setattr(file, "BLOCK_BYTES", 512)
    monkeypatch.setattr(file, "_MAX_BLOCKS", 4)
    here = cogtools.export_lora(tmp_path / "a.pt", tmp_path / "here")
    assert "All 12 lora_B begin with zeros: if the rest is zero too, this LoRA does nothing, as before training." in (
        here.notices
    )
    with http_server(tmp_path) as server:
        there = cogtools.export_lora(f"{server.url}/a.pt", tmp_path / "there")
        sent_bytes, asked = server.sent_bytes, len(server.asked)
        planned = cogtools.export_lora(f"{server.url}/a.pt", tmp_path / "planned", dry_run=True)
        assert len(server.asked) - asked <= asked
    assert there.notices == here.notices
    assert len(planned.notices) == len(here.notices) - 1
    assert sent_bytes < 1.5 * (tmp_path / "a.pt").stat().st_size


@pytest.mark.parametrize(("window", "ahead", "gap"), [(300, 1000, 0), (5000, 0, 0), (1 << 20, 1 << 20, 1 << 20)])
@pytest.mark.parametrize("name", ["diffusers", "comfyui", "sat"])
def test_ranges_of_any_length_make_up_the_same_output(
    window: int,
    ahead: int,
    gap: int,
    name: Any,
    served: HttpServer,
    run_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here = cogtools.export_lora(run_folder, tmp_path / "here", format=name).output.read_bytes()
    monkeypatch.setattr(fetching, "WINDOW_BYTES", window)
    monkeypatch.setattr(fetching, "AHEAD_BYTES", ahead)
    monkeypatch.setattr(fetching, "GAP_BYTES", gap)
    report = cogtools.export_lora(f"{served.url}/run", tmp_path / "there", format=name)
    assert report.output.read_bytes() == here
    assert report.crc32 == "checked"


def test_an_iteration_is_asked_for_by_its_number(served: HttpServer, run_folder: Path) -> None:
    (run_folder / "1000").rename(run_folder / "500")
    with open_checkpoint(f"{served.url}/run", iteration=500) as checkpoint:
        assert str(checkpoint.path) == f"{served.url}/run/500/{WEIGHTS}"


def test_a_server_lists_nothing_so_all_and_patterns_are_refused(
    served: HttpServer, tmp_path: Path, cogtools_cli: CommandLine
) -> None:
    for words in (["--all", f"{served.url}/run"], [f"{served.url}/*/"]):
        result = cogtools_cli("export-lora", *words, tmp_path / "out", "--json")
        assert result.code == 2
        assert "needs a store that lists" in result.json["error"]["what"]


def test_secrets_of_a_url_are_sent_and_never_shown(
    served: HttpServer, tmp_path: Path, cogtools_cli: CommandLine
) -> None:
    secret = served.url.replace("http://", "http://me:pass@")
    for words in (["inspect"], ["export-lora"]):
        url = f"{secret}/run/1000/{WEIGHTS}?signature=5ecret"
        result = cogtools_cli(*words, url, *([] if words == ["inspect"] else [tmp_path / "out"]), "--json")
        assert result.code == 0
        assert "5ecret" not in result.out + result.err
        assert "pass@" not in result.out + result.err
    assert all("signature=5ecret" in path for path, _, _ in served.asked)
    written = (tmp_path / "out" / "pytorch_lora_weights.safetensors").read_bytes()
    assert b"5ecret" not in written
    missing = cogtools_cli("inspect", f"{secret}/none.pt?signature=5ecret", "--json")
    assert (missing.code, "5ecret" in missing.out) == (2, False)


def test_a_checkpoint_that_is_not_there_is_an_error(served: HttpServer) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(f"{served.url}/none.pt")
    assert caught.value.fields() == [("file", f"{served.url}/none.pt"), ("found", "HTTP 404 Not Found")]


def test_a_server_that_is_not_there_is_an_error() -> None:
    with pytest.raises(CheckpointError, match="the server cannot be reached"):
        open_checkpoint("http://127.0.0.1:1/a.pt")


def test_weights_that_were_damaged_are_found_on_the_way(served: HttpServer, run_folder: Path, tmp_path: Path) -> None:
    path = run_folder / "1000" / WEIGHTS
    with open_checkpoint(path) as checkpoint:
        key = next(key for key in checkpoint.tensors if "matrix_A" in key)
        offset = checkpoint.tensors[key].storage.range().offset_bytes
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="the checkpoint is damaged"):
        cogtools.export_lora(f"{served.url}/run", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Servers that answer badly


def _whole(request: Request) -> None:
    request.answer(200, request.path.read_bytes())


def _wrong_range(request: Request) -> None:
    request.answer(206, request.content, Content_Range=f"bytes 1-{request.end - request.start}/{request.size}")


def _other_length(request: Request) -> None:
    body = request.content
    request.answer(206, body + b"x", Content_Range=request.content_range)


def _huge(request: Request) -> None:
    request.answer(206, b"", Content_Range=f"bytes 0-{10**18}/{10**18 + 1}", Content_Length=str(10**18 + 1))


def _negative(request: Request) -> None:
    request.answer(206, request.content, Content_Range="bytes -5-10/-1")


def _no_content_range(request: Request) -> None:
    request.answer(206, request.content)


_BOMB = gzip.compress(bytes(50 << 20), 1)


def _packed(request: Request) -> None:
    request.answer(206, _BOMB, Content_Range=request.content_range, Content_Encoding="gzip")


def _to_a_file(request: Request) -> None:
    request.answer(302, b"", Location="file:///etc/passwd")


def _in_circles(request: Request) -> None:
    request.answer(302, b"", Location=request.handler.path)


def _forbidden(request: Request) -> None:
    request.answer(401, b"")


def _broken(request: Request) -> None:
    request.answer(503, b"")


def _endless(request: Request) -> None:
    request.answer(206, b"", Content_Range=request.content_range, Content_Length=None, Transfer_Encoding="chunked")
    while True:
        request.handler.wfile.write(b"10000\r\n" + bytes(0x10000) + b"\r\n")


def _silent(request: Request) -> None:
    request.answer(206, b"", Content_Range=request.content_range, Content_Length=str(request.end - request.start))
    time.sleep(3)


def _cut_off(request: Request) -> None:
    length = str(request.end - request.start)
    request.answer(206, request.content[:100], Content_Range=request.content_range, Content_Length=length)
    request.handler.close_connection = True


NO_PARTS = "the server does not serve parts of this file"
AS_IT_SHOULD = "the server does not answer as it should"
BAD = {
    "whole": (_whole, NO_PARTS, "the whole file (HTTP 200), where a part was asked for"),
    "wrong-range": (_wrong_range, NO_PARTS, None),
    "other-length": (_other_length, NO_PARTS, None),
    "huge": (_huge, NO_PARTS, None),
    "negative": (_negative, NO_PARTS, "Content-Range: bytes -5-10/-1"),
    "no-content-range": (_no_content_range, NO_PARTS, "no Content-Range"),
    "packed": (_packed, NO_PARTS, "a packed answer"),
    "to-a-file": (_to_a_file, "the server redirects to where nothing is read from", "not a URL of HTTP"),
    "in-circles": (_in_circles, "the server redirects to where nothing is read from", "too many redirects"),
    "forbidden": (_forbidden, "the server asks for credentials", "HTTP 401 Unauthorized"),
    "broken": (_broken, AS_IT_SHOULD, "HTTP 503 Service Unavailable, 3 times"),
    "endless": (_endless, NO_PARTS, None),
    "silent": (_silent, AS_IT_SHOULD, "it is silent for too long, 3 times"),
    "cut-off": (_cut_off, AS_IT_SHOULD, None),
}


@pytest.mark.parametrize("name", BAD)
def test_a_server_that_answers_badly_is_an_error_and_nothing_is_written(
    name: str, run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer, what, found = BAD[name]
    if name == "silent":
        monkeypatch.setattr(http, "_SILENCE_SECONDS", 0.5)
    with http_server(run_folder, answer) as server, pytest.raises(CheckpointError) as caught:
        cogtools.export_lora(f"{server.url}/1000/{WEIGHTS}", tmp_path / "out")
    assert caught.value.what == what
    assert found is None or caught.value.found == found
    assert not (tmp_path / "out").exists()


def test_what_breaks_off_now_and_then_is_asked_for_again(run_folder: Path, tmp_path: Path) -> None:
    def moody(request: Request) -> None:
        (_cut_off if request.number % 3 == 1 else _broken if request.number % 3 == 2 else good)(request)

    here = exported(run_folder, tmp_path / "here")
    with http_server(run_folder, moody) as server:
        assert exported(f"{server.url}/1000/{WEIGHTS}", tmp_path / "there") == here


@pytest.mark.parametrize("after", [1, 3, 4])
def test_a_file_that_changes_in_between_is_an_error(after: int, run_folder: Path, tmp_path: Path) -> None:
    answers = itertools.count()

    def changing(request: Request) -> None:
        if next(answers) == after:
            with request.path.open("r+b") as file:
                file.seek(-1, 2)
                file.write(b"x")
        good(request)

    with http_server(run_folder, changing) as server, pytest.raises(CogtoolsError, match="changed while it was read"):
        cogtools.export_lora(f"{server.url}/1000/{WEIGHTS}", tmp_path / "out", alpha=1)
    assert not (tmp_path / "out").exists()


def test_a_small_file_may_come_whole(run_folder: Path) -> None:
    def lazy(request: Request) -> None:
        (_whole if request.size < 10_000 else good)(request)

    with http_server(run_folder.parent, lazy) as server, open_checkpoint(f"{server.url}/run") as checkpoint:
        assert checkpoint.run is not None
        assert checkpoint.run.latest == "1000"


def test_pages_in_place_of_what_is_not_there_are_not_taken_for_it(run_folder: Path) -> None:
    (run_folder / "1000" / "adapter_config.json").write_text("<html>not found</html>")
    (run_folder / "1000" / "training_config.yaml").write_text("<html>not found</html>")

    def polite(request: Request) -> None:
        if request.path.suffix in (".json", ".yaml") and request.path.parent.name == "1000":
            request.answer(200, request.content, Content_Type="text/html; charset=utf-8")
        else:
            good(request)

    with http_server(run_folder, polite) as server, open_checkpoint(f"{server.url}/1000/{WEIGHTS}") as checkpoint:
        found = checkpoint.read_beside("training_config.yaml", 1 << 17, above=True)
        assert found is not None
        assert str(found.path) == f"{server.url}/training_config.yaml"


def test_nothing_is_written_over_http(run_folder: Path) -> None:
    with pytest.raises(CogtoolsError) as caught:
        cogtools.export_lora(run_folder, "http://127.0.0.1:1/out")
    assert caught.value.what == "nothing can be written to http://"


def test_a_library_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "cogtools.checkpoint.remote.http", None)
    with pytest.raises(OptionError) as caught:
        open_checkpoint("https://example.org/a.pt")
    assert str(caught.value.hint) == "pip install aiohttp s3fs, or cogtools with its extra remote"


def test_shards_are_found_by_their_index(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    tensors = sat_state_dict(TOY_2B, 4)
    folder = tmp_path / "served" / "transformer"
    folder.mkdir(parents=True)
    halves = [dict(list(tensors.items())[::2]), dict(list(tensors.items())[1::2])]
    names = [f"diffusion_pytorch_model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for name, half in zip(names, halves, strict=True):
        save_file({key: tensor.contiguous().clone() for key, tensor in half.items()}, folder / name)
    weight_map = {key: name for name, half in zip(names, halves, strict=True) for key in half}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with http_server(tmp_path / "served") as server, open_checkpoint(f"{server.url}/transformer") as checkpoint:
        assert set(checkpoint.tensors) == set(tensors)


def test_an_index_cannot_lead_out_of_its_folder(tmp_path: Path) -> None:
    for name in ("..", "../a.safetensors", "http://example.org/a", "a/b"):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"key": name}}))
        with http_server(tmp_path) as server, pytest.raises(CheckpointError, match="not an index"):
            open_checkpoint(f"{server.url}/model.safetensors.index.json")


def test_what_is_unpacked_is_bounded(tmp_path: Path) -> None:
    """A zip bomb by URL is what it is on a disk."""
    import zipfile

    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(100 << 20))
    with http_server(tmp_path) as server, contextlib.suppress(ZeroDivisionError), pytest.raises(CheckpointError):
        open_checkpoint(f"{server.url}/bomb.pt")


def test_a_save_folder_may_begin_with_a_digit(run_folder: Path, tmp_path: Path) -> None:
    run_folder.rename(run_folder.with_name("2b-fp16"))
    with http_server(run_folder.parent) as server:
        report = cogtools.export_lora(f"{server.url}/2b-fp16", tmp_path / "out")
    assert report.tensors == cogtools.export_lora(run_folder.with_name("2b-fp16"), tmp_path / "here").tensors
