"""from_pretrained(export) computes what the policy computed at its last step, whatever the model
stores and how.
"""

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
)

from orchestrator.durable import sha256_of
from orchestrator.models.new_model import new_weights
from orchestrator.models.policy import load_tokenizer
from orchestrator.models.storage import persistent_buffers
from orchestrator.run.local.trial import NothingToSave
from orchestrator.settings.errors import UserError
from orchestrator.settings.load import make_spec
from orchestrator.training.assemble import assembled
from orchestrator.training.checkpoint_reader import Reader
from orchestrator.training.context import RunContext
from orchestrator.training.export import export
from orchestrator.training.manifest import sealed
from orchestrator.training.prepare import prepare
from support.export_checks import (
    TOLERANCE,
    changed_file,
    export_error,
    export_error_on_ranks,
    logits,
    random_base,
    trained_logits,
)
from support.gloo_ranks import on_gloo
from support.tiny_parts import ALONE, tokenizer
from support.tiny_settings import raw_settings, tiny_spec

SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {
    **SIZES,
    "moe_intermediate_size": 16,
    "num_experts_per_tok": 2,
    "num_experts": 4,
    "num_local_experts": 4,
}
ROUTED = {
    **EXPERTS,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "head_dim": 8,
}
ROUTED["first_k_dense_replace"] = 1
GPT2 = {"vocab_size": 300, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
LORA = {"model": {"lora": {"r": 4}}, "reference": {"kind": "adapter_off"}}


def config(model_type: str, sizes: dict[str, Any] = SIZES, **more: Any) -> Any:
    return AutoConfig.for_model(model_type, **sizes, **more)


@pytest.fixture
def separate_head(tmp_path: Path) -> Path:
    """A model whose config ties head and embeddings, and whose file holds a head of its own."""
    base = random_base(tmp_path / "base", config("llama", tie_word_embeddings=True))
    changed_file(
        base, lm_head__weight=torch.randn(300, 32, generator=torch.Generator().manual_seed(1))
    )
    return base


@pytest.mark.parametrize(
    ("of", "settings"),
    [
        (config("llama", tie_word_embeddings=True), {}),
        (config("glm4_moe", ROUTED), {}),
        (config("qwen3_moe", EXPERTS), LORA),
        (config("gpt2", GPT2), LORA),
        (config("gpt2", GPT2), {**LORA, "model": {"lora": {"r": 4, "base": "nf4"}}}),
    ],
    ids=[
        "tied",
        "router biases",
        "adapter on experts",
        "adapter on Conv1D",
        "adapter on Conv1D in 4 bits",
    ],
)
def test_export_computes_what_the_policy_computed(
    tmp_path: Path, of: Any, settings: dict[str, Any]
) -> None:
    assert export_error(tmp_path, random_base(tmp_path / "base", of), **settings) <= TOLERANCE


# --- more kinds, and engines ----------------------------------------------------------------------

MLA = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
HYBRID = {"mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 2}
HYBRID |= {
    "layers_block_type": ["mamba", "attention", "moe", "mlp"],
    "moe_shared_expert_intermediate_size": 16,
}
KINDS: dict[str, Any] = {
    "untied": config("llama", tie_word_embeddings=False),
    "window": config("mistral", sliding_window=8),
    "soft cap": config("gemma2", sliding_window=8, head_dim=8),
    "mixtral": config("mixtral", EXPERTS),
    "qwen2_moe": config("qwen2_moe", EXPERTS, shared_expert_intermediate_size=16),
    "olmoe": config("olmoe", EXPERTS),
    "granitemoe": config("granitemoe", EXPERTS),
    "gpt_oss": config("gpt_oss", EXPERTS, head_dim=8),
    "ernie4_5_moe": config(
        "ernie4_5_moe", EXPERTS, moe_num_experts=4, moe_k=2, moe_layer_start_index=1
    ),
    "minimax_m2": config("minimax_m2", EXPERTS, head_dim=8),
    "deepseek_v3": config("deepseek_v3", {**ROUTED, **MLA}),
    "dots1": config("dots1", ROUTED),
    "lfm2_moe": config(
        "lfm2_moe", EXPERTS, num_dense_layers=1, layer_types=["full_attention", "conv"]
    ),
    "nemotron_h": config("nemotron_h", {**ROUTED, **HYBRID}),
}


NO_LORA = {"nemotron_h"}  # peft refuses all linear layers of a Mamba model


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "settings"),
    [(kind, {}) for kind in KINDS] + [(kind, LORA) for kind in sorted(KINDS.keys() - NO_LORA)],
    ids=[f"{kind}-full" for kind in KINDS]
    + [f"{kind}-lora" for kind in sorted(KINDS.keys() - NO_LORA)],
)
def test_export_of_many_kinds_computes_what_the_policy_computed(
    tmp_path: Path, kind: str, settings: dict[str, Any]
) -> None:
    assert (
        export_error(tmp_path, random_base(tmp_path / "base", KINDS[kind]), **settings) <= TOLERANCE
    )


VISION = {"hidden_size": 16, "intermediate_size": 32}
GEMMA3 = {
    **VISION,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
QWEN3_5 = {
    **VISION,
    "depth": 1,
    "num_heads": 2,
    "out_hidden_size": 32,
    "patch_size": 4,
    "num_position_embeddings": 16,
}
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8}
LINEAR |= {
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
    "head_dim": 8,
}


@pytest.mark.slow
def test_the_vision_tower_of_a_multimodal_model_is_exported(tmp_path: Path) -> None:
    text = {"model_type": "gemma3_text", **SIZES, "head_dim": 8, "sliding_window": 8}
    special = {
        "image_token_index": 299,
        "boi_token_index": 298,
        "eoi_token_index": 297,
        "mm_tokens_per_image": 4,
    }
    base = random_base(
        tmp_path / "base",
        config("gemma3", {"text_config": text, "vision_config": GEMMA3, **special}),
    )
    policy, run_dir = trained_logits(tmp_path, base)
    start, end = (load_file(folder / "model.safetensors") for folder in (base, run_dir.model))
    assert start.keys() == end.keys()
    vision = [name for name in start if "vision" in name]
    assert len(vision) > 10
    assert all(torch.equal(start[name], end[name]) for name in vision)
    exported = AutoModelForCausalLM.from_pretrained(run_dir.model)
    assert (logits(exported) - policy).abs().max() <= TOLERANCE * policy.abs().max()


@pytest.mark.slow
def test_a_language_model_that_is_loaded_alone_is_exported_alone_and_said_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, whole = (
        tmp_path / "base",
        config("qwen3_5", {"text_config": SIZES | LINEAR, "vision_config": QWEN3_5}),
    )
    AutoModelForImageTextToText.from_config(whole).save_pretrained(base)
    tokenizer().save_pretrained(base)
    assert export_error(tmp_path, base) <= TOLERANCE
    output = capsys.readouterr().out
    assert (
        "qwen3_5: only its language model (Qwen3_5ForCausalLM) is loaded, trained and exported"
        in output
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "engine", [{"kind": "ddp"}, {"kind": "fsdp"}, {"kind": "deepspeed", "zero_stage": 3}], ids=str
)
@pytest.mark.parametrize(
    ("of", "settings"),
    [(config("glm4_moe", ROUTED), {}), (config("qwen3_moe", EXPERTS), LORA)],
    ids=["router biases", "adapter on experts"],
)
def test_export_of_two_ranks_computes_what_the_policy_computed(
    tmp_path: Path, engine: dict[str, Any], of: Any, settings: dict[str, Any]
) -> None:
    raw_settings(tmp_path)  # writes the data
    base = random_base(tmp_path / "base", of)
    errors = on_gloo(2, export_error_on_ranks, tmp_path, base, {**settings, "engine": engine})
    assert max(errors) <= TOLERANCE


# --- heads ----------------------------------------------------------------------------------------


def test_a_head_that_only_the_file_has_is_trained_and_exported(
    tmp_path: Path, separate_head: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy, run_dir = trained_logits(tmp_path, separate_head)
    assert (
        "the weights have a separate output head, although the config ties it"
        in capsys.readouterr().out
    )
    exported = AutoModelForCausalLM.from_pretrained(run_dir.model)
    assert (logits(exported) - policy).abs().max() <= TOLERANCE * policy.abs().max()
    assert not exported.config.tie_word_embeddings
    head = load_file(separate_head / "model.safetensors")["lm_head.weight"]
    assert 0 < (exported.lm_head.weight - head).abs().max() < 0.1  # three steps of 0.01


def test_an_old_run_whose_config_ties_a_separate_head_is_exported_with_it(
    tmp_path: Path, separate_head: Path
) -> None:
    policy, run_dir = trained_logits(tmp_path, separate_head)
    old = run_dir.tokenizer / "config.json"
    old.write_text(json.dumps({**json.loads(old.read_text()), "tie_word_embeddings": True}))
    exported = AutoModelForCausalLM.from_pretrained(export(run_dir, tmp_path / "again"))
    assert (logits(exported) - policy).abs().max() <= TOLERANCE * policy.abs().max()
    assert not exported.config.tie_word_embeddings


# --- persistent buffers ---------------------------------------------------------------------------


def without_buffers(checkpoint: Path, names: set[str]) -> None:
    """Make a checkpoint one of a version that left buffers out."""
    index, manifest = (
        json.loads((checkpoint / f"{name}.json").read_text()) for name in ("index", "manifest")
    )
    index["shapes"] = {name: shape for name, shape in index["shapes"].items() if name not in names}
    index["ranges"] = [entry for entry in index["ranges"] if entry[2] not in names]
    (checkpoint / "index.json").write_text(json.dumps(index))
    manifest["files"]["index.json"] = sha256_of(checkpoint / "index.json")
    (checkpoint / "manifest.json").write_text(json.dumps(sealed(manifest)))


def test_a_checkpoint_without_buffers_takes_them_from_the_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = random_base(tmp_path / "base", config("glm4_moe", ROUTED))
    policy, run_dir = trained_logits(tmp_path, base)
    [checkpoint] = run_dir.checkpoints.glob("step_*")
    start = AutoModelForCausalLM.from_pretrained(base)
    buffers = persistent_buffers(start)
    assert buffers.keys() <= Reader(checkpoint).shapes.keys()
    without_buffers(checkpoint, set(buffers))
    exported = AutoModelForCausalLM.from_pretrained(export(run_dir, tmp_path / "again"))
    assert (logits(exported) - policy).abs().max() <= TOLERANCE * policy.abs().max()
    assert (
        "was written by a version that left out model.layers.1.mlp.gate.e_score_correction_bias"
        in caplog.text
    )


@pytest.mark.parametrize("is_old", [False, True])
def test_a_resumed_policy_has_the_buffers_of_the_run(tmp_path: Path, is_old: bool) -> None:
    base = random_base(tmp_path / "base", config("glm4_moe", ROUTED))
    _, run_dir = trained_logits(tmp_path, base)
    [checkpoint] = run_dir.checkpoints.glob("step_*")
    expected = persistent_buffers(AutoModelForCausalLM.from_pretrained(base))
    assert all(buffer.abs().max() > 0 for buffer in expected.values())
    if is_old:
        without_buffers(checkpoint, set(expected))
    blocks = {
        "model": {"init": None, "path": str(base)},
        "data": {"eval": None},
        "training": {"max_steps": 3},
    }
    spec = make_spec(raw_settings(tmp_path, **blocks))
    with assembled(
        RunContext(spec, ALONE, NothingToSave(), run_dir), prepare(spec), checkpoint=checkpoint
    ) as trainer:
        actual = persistent_buffers(trainer.engine.step.policy)
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], buffer) for name, buffer in expected.items())


def test_router_biases_stay_in_fp32_in_a_16_bit_export(tmp_path: Path) -> None:
    base = random_base(tmp_path / "base", config("glm4_moe", ROUTED))
    _, run_dir = trained_logits(tmp_path, base)
    half = load_file(export(run_dir, tmp_path / "half", "bf16") / "model.safetensors")
    whole = load_file(run_dir.model / "model.safetensors")
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert torch.equal(half.pop(name), whole[name])
    assert {tensor.dtype for tensor in half.values()} == {torch.bfloat16}


# --- what stands beside the weights ---------------------------------------------------------------


def test_files_follow_the_umask(tmp_path: Path) -> None:
    base, spec = random_base(tmp_path / "base", config("llama")), tiny_spec(tmp_path)
    before = os.umask(0o027)
    try:
        trained_logits(tmp_path, base)
        new_weights(spec, load_tokenizer(spec))
    finally:
        os.umask(before)
    files = [file for file in (tmp_path / "runs").rglob("*") if file.is_file()]
    modes = {
        str(file.relative_to(tmp_path)): oct(stat.S_IMODE(file.stat().st_mode)) for file in files
    }
    assert {name: mode for name, mode in modes.items() if mode != "0o640"} == {}
    # export, checkpoint, random state, model.init
    assert sum(name.endswith(".safetensors") for name in modes) >= 4


def test_the_config_is_exported_as_it_was_loaded(tmp_path: Path) -> None:
    base = random_base(tmp_path / "base", config("llama", attention_dropout=0.25, use_cache=True))
    _, run_dir = trained_logits(tmp_path, base)
    exported, loaded = (
        json.loads((folder / "config.json").read_text()) for folder in (run_dir.model, base)
    )
    assert exported == loaded


def test_files_beside_the_base_weights_are_exported(tmp_path: Path) -> None:
    base = random_base(tmp_path / "base", config("llama"))
    # which transformers refuses to save anew
    sampling = {"do_sample": False, "temperature": 0.6, "max_new_tokens": 9}
    (base / "generation_config.json").write_text(json.dumps(sampling))
    (base / "preprocessor_config.json").write_text('{"image_mean": [0.5]}')
    several = AutoTokenizer.from_pretrained(base)
    several.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    several.save_pretrained(base)
    _, run_dir = trained_logits(tmp_path, base)
    exported = json.loads((run_dir.model / "generation_config.json").read_text())
    assert exported.items() >= sampling.items()
    assert (run_dir.model / "preprocessor_config.json").read_text() == '{"image_mean": [0.5]}'
    assert AutoTokenizer.from_pretrained(run_dir.model).chat_template == several.chat_template


# --- what cannot be exported ----------------------------------------------------------------------


def test_an_adapter_that_cannot_be_merged_is_refused_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft.tuners.lora import Linear

    def unsupported(*_: Any) -> torch.Tensor:
        raise NotImplementedError

    monkeypatch.setattr(Linear, "get_delta_weight", unsupported)  # which no forward pass needs
    base = random_base(tmp_path / "base", config("llama"))
    with pytest.raises(
        UserError, match=r"the adapter on .*_proj \(Linear\) cannot be merged when the model is"
    ):
        trained_logits(tmp_path, base, **LORA)
    assert not (tmp_path / "runs" / "tiny" / "metrics.jsonl").exists()


def test_a_model_that_its_config_does_not_describe_is_refused_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from orchestrator.training import assemble

    build = assemble.build_policy

    def with_a_bias(*args: Any, **options: Any) -> Any:
        model: Any = build(*args, **options)
        model.model.norm.bias = torch.nn.Parameter(torch.zeros(32))
        return model

    monkeypatch.setattr(assemble, "build_policy", with_a_bias)
    base = random_base(tmp_path / "base", config("llama"))
    with pytest.raises(
        UserError,
        match=r"model.path = .*an export would not hold the trained weights: model.norm.bias",
    ):
        trained_logits(tmp_path, base)
    assert not (tmp_path / "runs" / "tiny" / "metrics.jsonl").exists()
