"""The checks of a whole model: each part's files, configuration and tensors, and what makes a pipeline of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cogtools.checkpoint.places import is_file, is_folder, list_folder
from cogtools.conversion.model_reading import model_name, read_transformer
from cogtools.conversion.part_config import read_config
from cogtools.conversion.plan import FLOATS
from cogtools.errors import CheckpointError, ExportError, Hint, Problem
from cogtools.formatting import counted
from cogtools.layouts import text_encoder, transformer, vae
from cogtools.layouts.family import MODELS, Model
from cogtools.layouts.pipeline import PARTS, TOKENIZER_FILES, TRANSFORMER, scheduler_config
from cogtools.verification.model_values import not_finite
from cogtools.verification.report import Check, judged

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from cogtools.checkpoint.paths import AnyPath
    from cogtools.conversion.model import ModelPart
    from cogtools.verification.model_written import WrittenModel, WrittenPart
    from cogtools.verification.report import Status


def part_checks(written: WrittenPart, model: Model | None, advance: Callable[[int], None]) -> list[Check]:
    """All checks of one part.

    Args:
        written: the part.
        model: the model that the transformer beside it is, for the fields that follow from that.
        advance: called with the bytes whose values were looked at, as they are.
    """
    name = written.name
    checks = [_files(written)]
    if is_folder(written.path):
        checks.append(_config(written, model))
    if written.part is None:
        return checks
    if written.name == TRANSFORMER and written.config is None:
        return [*checks, _alone(written, written.part, model), *_values(written, advance)]
    expected = expected_shapes(written)
    tensors = {_name(written, key): entry for key, entry in written.part.tensors.items()}
    if expected is None:
        return [*checks, Check(f"{name} keys", "fail", "nothing tells what there should be")]
    return [*checks, _keys(written, tensors, expected), _shapes(written, tensors, expected), *_values(written, advance)]


def _alone(written: WrittenPart, part: ModelPart, model: Model | None) -> Check:
    """The tensors of a transformer without a configuration, held against what its own sizes tell."""
    name = f"{part.name} keys"
    try:
        reading = read_transformer(part, model)
    except ExportError as error:
        if not error.problems and is_folder(written.path):
            return Check(name, "skipped", f"{error.what}, without a config.json")
        if not error.problems:
            raise
        return Check(name, "fail", "not all that a transformer of these sizes has", error.problems)
    return Check(name, "pass", f"all {len(reading.shapes)} tensors of {model_name(reading)}, at their shapes")


def _name(written: WrittenPart, key: str) -> str:
    """A key by the name that the table has for it."""
    return {"vae": vae.bare_key, "text_encoder": text_encoder.bare_key}.get(written.name, str)(key)


def expected_shapes(written: WrittenPart) -> Mapping[str, tuple[int, ...]] | None:
    """What a part should have: of its config.json, else of the sizes that its tensors tell; None if nothing tells."""
    config, part = written.config, written.part
    if part is None:
        return None
    if written.name == TRANSFORMER:
        return None if config is None else transformer.shapes_of_config(config)
    if written.name == "vae":
        of_tensors = vae.structure_in_sat if part.layout == "sat" else vae.structure_in_diffusers
        found = of_tensors(part.shapes) if config is None else vae.structure_of_config(config)
        names = "sat" if part.layout == "sat" else "diffusers"
        return None if found is None else {getattr(item, names): item.shape for item in vae.tensors(found)}
    sizes = text_encoder.structure(part.shapes) if config is None else text_encoder.structure_of_config(config)
    return None if sizes is None else {item.diffusers: item.shape for item in text_encoder.tensors(sizes)}


def _files(written: WrittenPart) -> Check:
    name, part = f"{written.name} files", written.part
    if written.problems:
        return Check(name, "fail", "what its library would load is not what is there", written.problems)
    files = 0 if part is None else len(part.checkpoint.files)
    tensors = "no tensors" if part is None else counted(len(part.tensors), "tensor")
    seen = f"{tensors} in {counted(files, 'file')}" + (", as the index says" if files > 1 else "")
    return judged(name, written.odd, seen, f"{seen}, and what the index does not name", status="warn")


def _config(written: WrittenPart, model: Model | None) -> Check:
    """The configuration: of the right class, and with the values that all models of the family have."""
    name, config = f"{written.name} config", written.config
    file = written.path / PARTS[written.name].config
    if config is None:
        problem = Problem("unreadable" if is_file(file) else "missing", file.name)
        return Check(name, "fail", f"no {file.name} that can be read", (problem,))
    wrong = _class_problems(written.name, config)
    if wrong:
        return Check(name, "fail", "it is of another class", tuple(wrong))
    differing = _differing(config, _table(written, model))
    seen = f"{len(config)} fields"
    return judged(
        name,
        differing,
        f"{seen}, the values that this model has",
        "values that this model does not have",
        status="warn",
    )


def _class_problems(name: str, config: Mapping[str, object]) -> list[Problem]:
    expected, architectures = PARTS[name].class_name, config.get("architectures")
    found = [config.get("_class_name"), *(architectures if isinstance(architectures, list) else [])]
    return [] if expected in found else [Problem("value", "_class_name", str(found[0]), expected)]


def _table(written: WrittenPart, model: Model | None) -> dict[str, object]:
    """The fields that a configuration should have and that do not follow from the tensors."""
    if written.name == TRANSFORMER:
        own = _model_of_config(written.config or {}) or model
        sizes = {*transformer.SIZE_FIELDS, "ofs_embed_dim", "patch_size_t", "patch_bias"}
        fields = {} if own is None else own.config
        return {field: value for field, value in fields.items() if field not in sizes}
    if written.name == "vae":
        structure = vae.Structure((), 0)
        fields = structure.config(model or MODELS[0])
        follow = {"block_out_channels", "down_block_types", "up_block_types", "layers_per_block", "latent_channels"}
        if model is None:  # the transformer tells, and is not here
            follow |= {"scaling_factor", "invert_scale_latents"}
        return {field: value for field, value in fields.items() if field not in follow}
    return {"feed_forward_proj": "gated-gelu", "layer_norm_epsilon": 1e-06, "model_type": "t5"}


def _differing(config: Mapping[str, object], expected: Mapping[str, object]) -> list[Problem]:
    """Fields of other values. One that is absent has its class's default, which is not known for all."""
    return [
        Problem("value", field, str(config[field])[:100], str(value))
        for field, value in expected.items()
        if field in config and config[field] != value
    ]


def _model_of_config(config: Mapping[str, object]) -> Model | None:
    """The model that a transformer's configuration is of, whatever its sizes are."""
    fields = {**transformer.DEFAULTS, **config}
    for model in MODELS:
        if (
            fields.get("patch_size_t") == model.patch_size_t
            and fields["in_channels"] == model.in_channels
            and fields["use_rotary_positional_embeddings"] == model.rotary
        ):
            return model
    return None


def model_of(written: WrittenModel) -> Model | None:
    """The model that a written transformer is; None if there is none, or it is none of the family."""
    part = written.parts.get(TRANSFORMER)
    return None if part is None or part.config is None else _model_of_config(part.config)


def _keys(written: WrittenPart, tensors: Mapping[str, object], expected: Mapping[str, tuple[int, ...]]) -> Check:
    may_be_there = _allowed(written)
    missing = [Problem("missing", key) for key in expected if key not in tensors]
    if written.name == "text_encoder" and text_encoder.TIED_EMBEDDING in tensors:
        missing = [problem for problem in missing if problem.subject != text_encoder.EMBEDDING]
    unexpected = [Problem("unexpected", key) for key in tensors if key not in expected and key not in may_be_there]
    count = (
        f"all {len(expected)} tensors" if not missing else f"{len(expected) - len(missing)} of {len(expected)} tensors"
    )
    bad = f"{count}, {len(unexpected)} unexpected" if unexpected else count
    hint = Hint("what is missing is loaded with random values, after a warning") if missing else None
    return judged(f"{written.name} keys", [*missing, *unexpected], count, bad, hint=hint)


def _allowed(written: WrittenPart) -> tuple[str, ...]:
    """Keys that may be there and need not."""
    if written.part is not None and written.part.layout == "sat":
        return tuple(key for key in written.part.tensors if vae.bare_key(key).startswith("loss."))
    return (text_encoder.TIED_EMBEDDING,) if written.name == "text_encoder" else ()


def _shapes(written: WrittenPart, tensors: Mapping[str, object], expected: Mapping[str, tuple[int, ...]]) -> Check:
    wrong = []
    for key, shape in expected.items():
        found = getattr(tensors.get(key), "shape", shape)
        if found != shape:
            wrong.append(Problem("shape", key, str(found), str(shape)))
    source = "the sizes in its config.json" if written.config is not None else "its own sizes"
    return judged(f"{written.name} shapes", wrong, f"those of {source}", f"not those of {source}")


def _values(written: WrittenPart, advance: Callable[[int], None]) -> list[Check]:
    name, part = written.name, written.part
    if part is None:
        return []
    dtypes = sorted({entry.dtype.name for entry in part.tensors.values()})
    odd = [dtype for dtype in dtypes if dtype not in FLOATS]
    problems = [
        Problem("dtype", key, str(entry.dtype)) for key, entry in part.tensors.items() if entry.dtype.name in odd
    ]
    seen = " and ".join(dtypes)
    status: Status = "fail" if odd else "warn" if len(dtypes) > 1 else "pass"
    in_order = sorted(
        part.tensors.items(),
        key=lambda item: (str(item[1].storage.range().file.path), item[1].storage.range().offset_bytes),
    )
    infinite = [problem for key, entry in in_order if (problem := not_finite(key, entry, advance)) is not None]
    return [
        Check(f"{name} dtype", status, seen, tuple(problems)),
        judged(f"{name} finite", infinite, f"all values of {counted(len(part.tensors), 'tensor')}", "NaN or infinity"),
    ]


# What makes a pipeline


def pipeline_checks(written: WrittenModel, model: Model | None) -> list[Check]:
    """What is beside the parts with weights: the index, the tokenizer and the scheduler."""
    checks = []
    if written.kind == "pipeline":
        checks.append(_index(written, model))
    names = _named(written)
    if "tokenizer" in written.folders or "tokenizer" in names:
        checks.append(_tokenizer(written))
    if "scheduler" in written.folders:
        checks.append(_scheduler(written.folders["scheduler"], model))
    return checks


def _named(written: WrittenModel) -> dict[str, object]:
    """The parts that the index names, and their classes."""
    index = written.index or {}
    return {name: value for name, value in index.items() if not name.startswith("_") and value != [None, None]}


def _index(written: WrittenModel, model: Model | None) -> Check:
    named = _named(written)
    problems = [
        Problem("missing", f"the folder {name}", expected=str(value))
        for name, value in named.items()
        if name not in written.folders and isinstance(value, list)
    ]
    problems += [
        Problem("missing", name, expected=part.class_name) for name, part in PARTS.items() if name not in named
    ]
    found = str((written.index or {}).get("_class_name"))
    if model is not None and found != model.pipeline:
        problems.append(Problem("value", "_class_name", found, f"{model.pipeline}, for {model.name}"))
    for name, value in named.items():
        if name in PARTS and name != "scheduler" and value != [PARTS[name].library, PARTS[name].class_name]:
            expected = f"{PARTS[name].library} {PARTS[name].class_name}"
            problems.append(Problem("value", name, str(value)[:100], expected))
    return judged(
        "pipeline", problems, f"{found} of {len(named)} parts, all there", "the index is not that of these parts"
    )


def _tokenizer(written: WrittenModel) -> Check:
    folder = written.folders.get("tokenizer")
    found = [] if folder is None else [entry.path.name for entry in list_folder(folder) if entry.is_file]
    complete = [name for name in TOKENIZER_FILES if name in found]
    problem = Problem("missing", " or ".join(TOKENIZER_FILES), ", ".join(found)[:100] or "no files")
    return judged(
        "tokenizer",
        [] if complete else [problem],
        f"its vocabulary is there: {' and '.join(complete)}",
        "no vocabulary: it would load without a word, and every prompt would mean the same",
        hint=None if complete else Hint("copy the folder tokenizer of the released pipeline here"),
    )


def _scheduler(folder: AnyPath, model: Model | None) -> Check:
    part = PARTS["scheduler"]
    try:
        config = read_config(folder / part.config)
    except CheckpointError as error:
        return Check(
            "scheduler", "fail", f"no {part.config} that can be read", (Problem("unreadable", part.config, error.what),)
        )
    expected = scheduler_config(model or MODELS[0])
    skipped = {"_class_name", "_diffusers_version", *(() if model is not None else ("snr_shift_scale",))}
    differing = _differing(config, {name: value for name, value in expected.items() if name not in skipped})
    absent = [Problem("missing", name, expected=str(value)) for name, value in expected.items()
              if name not in config and name not in skipped and value is not None]  # fmt: skip
    seen = f"{config.get('_class_name')}, the noise levels of {'SAT' if model is None else model.name}"
    return judged(
        "scheduler", [*differing, *absent], seen, "not the noise levels that the model was trained with", status="warn"
    )
