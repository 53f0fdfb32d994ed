"""Files that users have reported, rebuilt small: what verify, inspect and the export say of them."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.support.command_line import CommandLine
from tests.support.factories import TOY_2B, sat_checkpoint, sat_state_dict, save_run

LAYERS, HIDDEN = 42, 3072  # of CogVideoX-5B
FILE_NAME = "pytorch_lora_weights.safetensors"
ATTENTION = {f"attn1.{name}": (HIDDEN, HIDDEN) for name in ("to_q", "to_k", "to_v", "to_out.0")}
FEED_FORWARD = {"ff.net.0.proj": (4 * HIDDEN, HIDDEN), "ff.net.2": (HIDDEN, 4 * HIDDEN)}


def lora(modules: dict[str, tuple[int, int]], ranks: dict[str, int] | None = None) -> dict[str, torch.Tensor]:
    """A LoRA in bfloat16 for these modules of every layer, rank 1 unless another one is given."""
    random = torch.Generator().manual_seed(0)

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for layer in range(LAYERS):
            for module, (rows, columns) in modules.items():
                rank = (ranks or {}).get(module, 1)
                key = f"transformer.transformer_blocks.{layer}.{module}"
                for name, shape in (("lora_A", (rank, columns)), ("lora_B", (rows, rank))):
                    yield f"{key}.{name}.weight", torch.randn(shape, generator=random).bfloat16()

    return dict(tensors())


def header(**config: object) -> dict[str, str]:
    stated = {"r": 1, "lora_alpha": 1, "rank_pattern": {}, "alpha_pattern": {}, **config}
    return {"format": "pt", "lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in stated.items()})}


def test_a_lora_on_attention_and_feed_forward_is_complete(tmp_path: Path, cogtools_cli: CommandLine) -> None:
    targets = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]
    save_file(lora(ATTENTION | FEED_FORWARD), tmp_path / FILE_NAME, header(target_modules=targets))

    verified, inspected = cogtools_cli("verify", tmp_path), cogtools_cli("inspect", tmp_path / FILE_NAME, "--json")

    assert (verified.code, verified.out.splitlines()[-1]) == (0, "verified: all 12 checks passed")
    report = inspected.json["report"]["checkpoints"][0]["lora"]
    assert (report["complete"], report["missing"], report["unplaced"], report["tensors"]) == (True, [], [], 504)


def test_a_lora_with_biases_is_complete(tmp_path: Path, cogtools_cli: CommandLine) -> None:
    tensors = lora(ATTENTION)
    biases = {
        key.replace(".weight", ".bias"): torch.zeros(len(tensor)).bfloat16()
        for key, tensor in tensors.items()
        if "lora_B" in key
    }
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    save_file(tensors | biases, tmp_path / FILE_NAME, header(target_modules=targets, lora_bias=True))

    verified, inspected = cogtools_cli("verify", tmp_path, "--load"), cogtools_cli("inspect", tmp_path / FILE_NAME)

    assert (verified.code, verified.out.splitlines()[-1]) == (0, "verified: all 13 checks passed")
    assert "LoRA       complete: 42 layers (0-41), rank 1, bfloat16, 504 tensors" in inspected.out


def test_two_ranks_that_nothing_states_are_a_warning_that_says_what_is_at_stake(
    tmp_path: Path, cogtools_cli: CommandLine
) -> None:
    save_file(lora(ATTENTION, {"attn1.to_q": 2}), tmp_path / FILE_NAME, {"format": "pt"})

    verified, inspected = cogtools_cli("verify", tmp_path), cogtools_cli("inspect", tmp_path / FILE_NAME)

    assert (verified.code, verified.out.splitlines()[-1]) == (
        0, "verified, with 2 warnings (rank, scale): 9 of 11 checks passed"
    )  # fmt: skip
    assert "warn     rank            1, 2, and nothing states which module has which\n" in verified.out
    assert "releases of diffusers before August 2026 run some modules at another scaling" in verified.out
    assert "--overwrite" not in verified.out
    assert "LoRA       complete: 42 layers (0-41), ranks 1, 2, bfloat16, 336 tensors" in inspected.out


def test_a_published_lora_without_its_scale_is_never_overwritten(tmp_path: Path, cogtools_cli: CommandLine) -> None:
    save_file(lora(ATTENTION), tmp_path / "orbit_left_lora_weights.safetensors")

    verified = cogtools_cli("verify", tmp_path)

    assert verified.code == 0
    hint = "load it at weight alpha / rank (1 for SAT's default alpha, 1); to write a file that states it: cogtools "
    assert f"try: {hint}export-lora {tmp_path}/orbit_left_lora_weights.safetensors OUT_DIR" in verified.out
    assert "--overwrite" not in verified.out


def test_a_lokr_is_called_that_by_every_command(tmp_path: Path, cogtools_cli: CommandLine) -> None:
    path = tmp_path / FILE_NAME
    keys = [f"lycoris_transformer_blocks_{layer}_attn1_{name}" for layer in range(2) for name in ("to_q", "to_k")]
    parts = {"lokr_w1": (2, 2), "lokr_w2_a": (4, 1), "lokr_w2_b": (1, 4), "alpha": ()}
    save_file({f"{key}.{part}": torch.ones(shape) for key in keys for part, shape in parts.items()}, path)
    readers = "load it with lycoris (create_lycoris_from_weights, merge_to)"

    verified, inspected = cogtools_cli("verify", path), cogtools_cli("inspect", path)
    exported = cogtools_cli("export-lora", path, tmp_path / "out")

    assert verified.code == 1
    assert "fail     names           this is a LyCORIS LoKr, not a LoRA\n" in verified.out
    assert "fail     complete        no LoRA tensor: this is a LyCORIS LoKr\n" in verified.out
    assert f"try: {readers}\n" in verified.out
    assert "unexpected" not in verified.out
    assert f"adapter    a LyCORIS LoKr, not a LoRA: {readers}\n" in inspected.out
    assert (exported.code, "found:     a LyCORIS LoKr\n" in exported.err) == (2, True)
    assert cogtools_cli("inspect", path, "--json").json["report"]["checkpoints"][0]["other_adapter"] == {
        "name": "a LyCORIS LoKr",
        "readers": "lycoris (create_lycoris_from_weights, merge_to)",
    }


def test_an_empty_peft_folder_is_told_its_usual_cause(tmp_path: Path, cogtools_cli: CommandLine) -> None:
    save_file({}, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": 64, "lora_alpha": 64, "target_modules": ["to_q", "to_k"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))

    verified = cogtools_cli("verify", tmp_path)

    lines = [line for line in verified.out.splitlines() if line.startswith(("fail", "warn", "pass"))]
    assert (verified.code, lines) == (
        1,
        [
            "pass     readable        0 tensors, the safetensors library reads it too",
            "fail     names           the file has no tensor",
            "fail     complete        no LoRA tensor at all",
        ],
    )
    assert "a ZeRO-3 training that saves before its parameters are gathered writes no tensors" in verified.out


@pytest.mark.parametrize("words", [[], ["--verify"]], ids=["plain", "verify"])
def test_a_lora_that_diverged_is_written_and_called_that(
    words: list[str], tmp_path: Path, cogtools_cli: CommandLine
) -> None:
    state_dict = sat_state_dict(TOY_2B, 4)
    for key, tensor in state_dict.items():
        if ".dense.matrix_B" in key:
            tensor.fill_(float("nan"))
    save_run(tmp_path / "run", sat_checkpoint(state_dict), rank=4, alpha=1)

    result = cogtools_cli("export-lora", tmp_path / "run", tmp_path / "out", *words)

    assert (tmp_path / "out" / FILE_NAME).exists()
    assert "note: 3 of 24 tensors begin with NaN or infinity: the training diverged." in result.err
    last = result.out.splitlines()[-1]
    if words:
        assert (result.code, last) == (1, "NOT verified: 1 of 15 checks failed (finite)")
    else:
        checkpoint = tmp_path / "run" / "1000" / "mp_rank_00_model_states.pt"
        check = f"cogtools verify {tmp_path / 'out' / FILE_NAME} --against {checkpoint}"
        assert (result.code, last) == (0, f"Check every value of it (or export with --verify): {check}")


def test_an_export_that_verifies_itself_prints_one_report(tmp_path: Path, cogtools_cli: CommandLine) -> None:
    save_run(tmp_path / "run", sat_checkpoint(sat_state_dict(TOY_2B, 4)), rank=4, alpha=1)
    words = ["export-lora", tmp_path / "run", tmp_path / "out", "--verify", "--overwrite"]

    shown, quiet, printed = cogtools_cli(*words), cogtools_cli(*words, "--quiet"), cogtools_cli(*words, "--json")
    many = cogtools_cli("export-lora", tmp_path / "run", f"{tmp_path}/many/", "--verify")

    assert (shown.code, shown.out.splitlines()[-1]) == (0, "verified: all 15 checks passed")
    assert quiet == (0, "", "")
    assert printed.json["report"]["verification"]["verdict"] == "pass"
    assert (many.code, many.out.splitlines()[1]) == (0, "         verified: all 15 checks passed")


def test_a_batch_that_is_quiet_still_says_what_it_wrote_wrong(tmp_path: Path, cogtools_cli: CommandLine) -> None:
    state_dict = sat_state_dict(TOY_2B, 16, torch.float32)
    key = next(key for key in state_dict if "matrix_A" in key)
    state_dict[key].flatten()[-1] = float("nan")
    save_run(tmp_path / "run", sat_checkpoint(state_dict), rank=16, alpha=1)

    words = ["export-lora", tmp_path / "run", f"{tmp_path}/many/", "--verify", "--overwrite"]
    quiet, printed = cogtools_cli(*words, "--quiet"), cogtools_cli(*words, "--json")

    assert (quiet.code, quiet.out.splitlines()[1]) == (1, "         NOT verified: 1 of 15 checks failed (finite)")
    assert (printed.code, printed.json["status"]) == (1, "wrong")
