"""The training configuration: what it says of the LoRA, and nothing that a stranger can break with it."""

from pathlib import Path

import pytest

from cogtools.checkpoint import limits
from cogtools.checkpoint.files import SourceFile
from cogtools.checkpoint.index import Checkpoint, SmallFile
from cogtools.checkpoint.paths import AnyPath
from cogtools.conversion.training_config import TrainingConfig, find_training_config, read_training_config
from cogtools.errors import CheckpointError
from tests.support.factories import TOY_2B, sat_checkpoint, sat_state_dict, save_run

HINT = "fix it; export-lora does without it if --alpha states the LoRA's alpha"


def read(path: Path, *, with_alpha: bool = True) -> TrainingConfig:
    return read_training_config(SmallFile(path, path.read_bytes()), with_alpha=with_alpha)


def found(checkpoint: Path) -> AnyPath | None:
    """Where the configuration of a checkpoint is found; the file is made if it is not there."""
    checkpoint.touch()
    with SourceFile.open(checkpoint) as file:
        config = find_training_config(Checkpoint(path=checkpoint, format="", files=[file], tensors={}))
    return None if config is None else config.path


def lora_params(text: str) -> str:
    """A configuration with these parameters of the LoRA, in YAML's flow style."""
    return "model: {network_config: {params: {modules: {lora_config: {params: {" + text + "}}}}}}"


def written(folder: Path, content: str | bytes) -> Path:
    path = folder / "training_config.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    ("text", "rank", "alpha", "layers"),
    [
        ("r: 128", 128, None, None),
        ("r: 128, lora_alpha: 64", 128, 64, None),
        ("r: 128, lora_alpha: 0.5, layer_range: [3, 1, 2, 3]", 128, 0.5, (1, 2, 3)),
        ("r: 4.0", 4, None, None),
        ("r: '4', lora_alpha: '16'", 4, 16, None),
        ("lora_alpha: 1e0", None, 1.0, None),
        ("lora_alpha: 1e+1", None, 10.0, None),
        ("lora_alpha: '0.5'", None, 0.5, None),
        ("layer_range: [0, -1, -3]", None, None, (-3, -1, 0)),
        ("", None, None, None),
        ("r: null, lora_alpha: null, layer_range: null", None, None, None),
    ],
)
def test_rank_alpha_and_layers_are_read_where_they_are_said(
    text: str, rank: int | None, alpha: float | None, layers: tuple[int, ...] | None, tmp_path: Path
) -> None:
    path = written(tmp_path, lora_params(text))

    assert read(path) == TrainingConfig(path, rank, alpha, layers)


def test_negative_layers_count_from_the_last_one_back(tmp_path: Path) -> None:
    config = read(written(tmp_path, lora_params("layer_range: [0, -1, 29, -3]")))

    assert config.layers_of(30) == (0, 27, 29)


def test_an_alpha_that_is_not_needed_may_be_anything(tmp_path: Path) -> None:
    path = written(tmp_path, lora_params("r: 4, lora_alpha: many, layer_range: [0]"))

    assert read(path, with_alpha=False) == TrainingConfig(path, 4, None, (0,))


@pytest.mark.parametrize(
    "content",
    ["", "just text", "- a\n- list", "model: null", "model: {network_config: [1]}", lora_params("").replace("{}", "1")],
)
def test_a_configuration_without_a_lora_says_nothing(content: str, tmp_path: Path) -> None:
    path = written(tmp_path, content)

    assert read(path) == TrainingConfig(path, None, None, None)


def test_what_the_trainer_writes_is_read(tmp_path: Path) -> None:
    checkpoint = sat_checkpoint(sat_state_dict(TOY_2B, 4, base="none"))
    file = save_run(tmp_path, checkpoint, rank=4, alpha=2.0, layer_range=[0, 2])
    path = tmp_path / "training_config.yaml"

    assert found(file) == path
    assert read(path) == TrainingConfig(path, 4, 2.0, (0, 2))


def test_what_the_real_trainer_wrote_is_read(real: Path) -> None:
    path = real / "2b-fp16" / "training_config.yaml"

    assert read(path) == TrainingConfig(path, 4, None, None)


def test_a_list_of_layers_may_be_mentioned_by_an_alias(tmp_path: Path) -> None:
    path = written(tmp_path, "layers: &trained [0, 1]\n" + lora_params("layer_range: *trained"))

    assert read(path).layers == (0, 1)


@pytest.mark.parametrize(
    ("text", "name", "found", "expected"),
    [
        ("r: 0", "r", "0", "a whole number, 1 or more"),
        ("r: 1.5", "r", "1.5", "a whole number, 1 or more"),
        ("r: true", "r", "True", "a whole number, 1 or more"),
        ("r: many", "r", "'many'", "a whole number, 1 or more"),
        ("r: 0x" + "f" * 90, "r", str(16**90 - 1)[:100], "a whole number, 1 or more"),
        ("r: 0001-01-01T00:00:00+23:59", "r", "a datetime", "a whole number, 1 or more"),
        ("lora_alpha: 0", "lora_alpha", "0", "a number above 0"),
        ("lora_alpha: -1", "lora_alpha", "-1", "a number above 0"),
        ("lora_alpha: .nan", "lora_alpha", "nan", "a number above 0"),
        ("lora_alpha: .inf", "lora_alpha", "inf", "a number above 0"),
        ("lora_alpha: [1]", "lora_alpha", "[1]", "a number above 0"),
        ("lora_alpha: '-1'", "lora_alpha", "'-1'", "a number above 0"),
        ("lora_alpha: 'nan'", "lora_alpha", "'nan'", "a number above 0"),
        ("lora_alpha: 'x" + "y" * 200 + "'", "lora_alpha", "'x" + "y" * 98, "a number above 0"),
        ("lora_alpha: " + "1" * 90, "lora_alpha", "1" * 90, "a number above 0"),
        ("layer_range: []", "layer_range", "[]", "a list of layer numbers"),
        ("layer_range: 3", "layer_range", "3", "a list of layer numbers"),
        ("layer_range: [1, x, [2], {a: b}]", "layer_range", "[1, 'x', […], a dict]", "a list of layer numbers"),
        ("layer_range: [1000]", "layer_range", "[1000]", "a list of layer numbers"),
        ("layer_range: [-1001]", "layer_range", "[-1001]", "a list of layer numbers"),
        ("layer_range: &a [*a]", "layer_range", "[[…]]", "a list of layer numbers"),
        (
            f"layer_range: [{', '.join('x' * 20)}]",
            "layer_range",
            f"[{', '.join(chr(39) + 'x' + chr(39) for _ in range(8))}, …]",
            "a list of layer numbers",
        ),
    ],
)
def test_a_value_that_is_not_valid_is_an_error(text: str, name: str, found: str, expected: str, tmp_path: Path) -> None:
    path = written(tmp_path, lora_params(text))

    with pytest.raises(CheckpointError) as caught:
        read(path)
    assert str(caught.value) == (
        f"`{name}` in the training configuration is not valid\n"
        f"  file:      {path}\n  found:     {found}\n  expected:  {expected}\n  try:       {HINT}"
    )


@pytest.mark.parametrize(
    "content",
    [
        pytest.param("a: [", id="no-yaml"),
        pytest.param(b"a: \xff\xfe", id="not-utf-8"),
        pytest.param("a: \0", id="nul"),
        pytest.param("a: !!python/object/apply:os.system [ls]", id="python-call"),
        pytest.param("a: !!python/name:os.system", id="python-name"),
        pytest.param("a: !own 1", id="unknown-tag"),
        pytest.param("a: &a {b: 1}\nc: {<<: *a}", id="merge"),
        pytest.param("a: *nothing", id="alias-of-nothing"),
        pytest.param("[" * 5000 + "]" * 5000, id="deep-nesting"),
        pytest.param("? [a]\n: 1", id="list-as-key"),
        pytest.param("a: 2024-99-99", id="date-that-is-none"),
        pytest.param("a: 0001-01-01T00:00:00+23:59\nb: !!timestamp x", id="timestamp-that-is-none"),
        pytest.param("a: !!int ''", id="empty-integer"),
        pytest.param("a: !!float ''", id="empty-number"),
        pytest.param("a: !!bool x", id="boolean-that-is-none"),
        pytest.param("a: !!binary x", id="base64-that-is-none"),
        pytest.param("a: 1" + ":1" * 45 + ".5" + "\nb: 1" + ":1" * 50, id="long-number-to-the-base-60"),
        pytest.param("a: 0x" + "f" * 5000, id="long-number"),
    ],
)
def test_a_file_that_is_no_plain_yaml_is_an_error(content: str | bytes, tmp_path: Path) -> None:
    path = written(tmp_path, content)

    with pytest.raises(CheckpointError) as caught:
        read(path)
    error = caught.value
    assert (error.what, error.file, error.expected, str(error.hint)) == (
        "the training configuration cannot be read",
        str(path),
        "YAML as the trainer writes it",
        HINT,
    )


def test_a_number_to_the_base_60_that_is_larger_than_any_is_an_error(tmp_path: Path) -> None:
    path = written(tmp_path, lora_params("lora_alpha: " + ":".join(["59"] * 30) + ".5"))

    with pytest.raises(CheckpointError, match="`lora_alpha` in the training configuration is not valid"):
        read(path)


def test_the_message_says_what_yaml_cannot_read(tmp_path: Path) -> None:
    path = written(tmp_path, "a: &a {b: 1}\nc: {<<: *a}")

    with pytest.raises(CheckpointError) as caught:
        read(path)
    assert str(caught.value) == (
        "the training configuration cannot be read\n"
        f"  file:      {path}\n"
        "  found:     it has a merge key (<<)\n"
        "  expected:  YAML as the trainer writes it\n"
        f"  try:       {HINT}"
    )


def test_aliases_of_aliases_take_no_room(tmp_path: Path) -> None:
    levels = [f"l{number}: &l{number} [{', '.join([f'*l{number - 1}'] * 9)}]" for number in range(1, 30)]
    path = written(tmp_path, "\n".join(["l0: &l0 [x]", *levels, lora_params("r: 4, layer_range: [0]")]))

    assert read(path) == TrainingConfig(path, 4, None, (0,))


def test_a_file_that_is_too_long_is_not_read(tmp_path: Path) -> None:
    path = written(tmp_path, " " * (limits.MAX_TRAINING_CONFIG_BYTES + 1))

    with pytest.raises(CheckpointError) as caught:
        found(path.with_name("x.pt"))
    assert (caught.value.found, caught.value.expected) == ("131,073 bytes", "at most 131,072")


# Where it is looked for


@pytest.mark.parametrize("place", ["run/1000", "run"])
def test_it_is_found_beside_the_checkpoint_and_in_the_save_folder(place: str, tmp_path: Path) -> None:
    (tmp_path / "run" / "1000").mkdir(parents=True)
    path = written(tmp_path / place, "")

    assert found(tmp_path / "run" / "1000" / "x.pt") == path


def test_the_one_beside_the_checkpoint_comes_first(tmp_path: Path) -> None:
    (tmp_path / "1000").mkdir()
    written(tmp_path, "")
    path = written(tmp_path / "1000", "")

    assert found(tmp_path / "1000" / "x.pt") == path


def test_it_is_not_looked_for_any_further_up(tmp_path: Path) -> None:
    (tmp_path / "run" / "1000").mkdir(parents=True)
    written(tmp_path, "")

    assert found(tmp_path / "run" / "1000" / "x.pt") is None


@pytest.mark.parametrize("link", ["best.pt", "best"])
def test_a_link_to_a_checkpoint_or_its_folder_leads_to_its_configuration(link: str, tmp_path: Path) -> None:
    (tmp_path / "run" / "1000").mkdir(parents=True)
    (tmp_path / "links").mkdir()
    file = tmp_path / "run" / "1000" / "x.pt"
    file.touch()
    (tmp_path / "links" / link).symlink_to(file if link.endswith(".pt") else file.parent)
    path = written(tmp_path / "run", "")
    given = tmp_path / "links" / link

    assert found(given if link.endswith(".pt") else given / "x.pt") == path
