"""A model whose weights stay mapped files: the same to the last bit once cast, and no process holds
a copy.
"""

import gc
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    ApertusConfig,
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    MixtralConfig,
    MptConfig,
)

from orchestrator.models.identity import identity_of
from orchestrator.models.logps import sequence_logps
from orchestrator.models.mapped import mapped_twin, types_when_cut
from orchestrator.models.new_model import new_weights
from orchestrator.models.policy import build_policy, load_model
from orchestrator.models.reference import PolicyStart, Reference
from orchestrator.settings.errors import UserError
from orchestrator.settings.run import RunSpec
from support.tiny_parts import ALONE, pair_batch, save_adapter, tiny_model, tokenizer
from support.tiny_settings import TINY_MODEL, tiny_spec

SMALL: dict[str, Any] = {
    **{name: value for name, value in TINY_MODEL.items() if name != "tie_word_embeddings"},
    "vocab_size": 300,
    "initializer_range": 0.2,
    "head_dim": 8,
    "pad_token_id": 0,
}


def saved(
    folder: Path, model: Any, dtype: torch.dtype = torch.bfloat16, shard: str = "1GB"
) -> RunSpec:
    """Settings of a run that goes on from that model, in files of that type and size."""
    model.to(dtype).save_pretrained(folder / "model", max_shard_size=shard)
    return from_path(folder)


def from_path(folder: Path, **model: Any) -> RunSpec:
    reference = {"kind": "adapter_off" if "lora" in model else "copy"}
    return tiny_spec(
        folder, model={"init": None, "path": str(folder / "model"), **model}, reference=reference
    )


def of_config(config: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def both(spec: RunSpec, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """The policy built in the ordinary way, and mapped."""
    return build_policy(spec, tokenizer(), dtype), build_policy(
        spec, tokenizer(), dtype, mapped=True
    )


def parameters(model: Any) -> dict[str, torch.nn.Parameter]:
    return dict(model.named_parameters(remove_duplicate=False))


def is_mapped(tensor: torch.Tensor) -> bool:
    """Return whether a tensor lies in memory that is a safetensors file."""
    with open("/proc/self/maps") as maps:
        for line in maps:
            first, _, last = line.split(maxsplit=1)[0].partition("-")
            if int(first, 16) <= tensor.data_ptr() < int(last, 16):
                return line.rstrip().endswith(".safetensors") or "/blobs/" in line
    return False


def all_mapped(model: Any) -> bool:
    return all(is_mapped(p) for name, p in parameters(model).items() if ".lora_" not in name)


def cut(model: Any, dtype: torch.dtype = torch.float32) -> Any:
    """Cast each parameter, as an engine does when it cuts it."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def check_same(
    ordinary: Any, mapped: Any, dtype: torch.dtype = torch.float32, rounds: bool = True
) -> None:
    """Everything that tells the two models apart; then what they compute, once the mapped one is
    cut.
    """
    ours, theirs = parameters(mapped), parameters(ordinary)
    assert list(ours) == list(theirs)
    assert all(torch.equal(p.to(theirs[name].dtype), theirs[name]) for name, p in ours.items())
    assert [p.requires_grad for p in ours.values()] == [p.requires_grad for p in theirs.values()]
    # ties
    assert [name for name, _ in mapped.named_parameters()] == [
        name for name, _ in ordinary.named_parameters()
    ]
    buffers, others = dict(mapped.named_buffers()), dict(ordinary.named_buffers())
    assert {n: b.dtype for n, b in buffers.items()} == {n: b.dtype for n, b in others.items()}
    assert all(torch.equal(b, others[name]) for name, b in buffers.items())
    assert mapped.config.to_dict() == ordinary.config.to_dict()
    assert mapped.generation_config.to_dict() == ordinary.generation_config.to_dict()
    assert mapped.training
    assert ["forward" in m.__dict__ for m in mapped.modules()] == [
        "forward" in m.__dict__ for m in ordinary.modules()
    ]
    ids = torch.arange(24)[None]
    assert torch.equal(cut(mapped, dtype)(input_ids=ids).logits, ordinary(input_ids=ids).logits)


# --- from files -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "tied", "shard"),
    [
        (torch.float32, True, "1GB"),
        (torch.bfloat16, True, "20KB"),
        (torch.bfloat16, False, "1GB"),
        (torch.float16, False, "20KB"),
    ],
)
def test_a_loaded_model_is_mapped_and_the_same_once_cast(
    tmp_path: Path, dtype: torch.dtype, tied: bool, shard: str
) -> None:
    model = tiny_model(tie_word_embeddings=tied)
    assert model.generation_config is not None
    model.generation_config.repetition_penalty = 1.5
    spec = saved(tmp_path, model, dtype, shard)
    assert (tmp_path / "model" / "model.safetensors.index.json").exists() is (shard == "20KB")
    ordinary, mapped = both(spec)
    assert all_mapped(mapped)
    assert {p.dtype for p in mapped.parameters()} == {dtype}
    assert mapped.generation_config.repetition_penalty == 1.5
    assert mapped.config.dtype == torch.float32
    check_same(ordinary, mapped)


@pytest.mark.parametrize("run", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "config",
    [
        Gemma3TextConfig(**SMALL),
        ApertusConfig(**SMALL),
        Gemma2Config(**SMALL, final_logit_softcapping=1.0),
        GPT2Config(n_embd=32, n_head=4, n_layer=2, n_positions=64, vocab_size=300),
        MptConfig(d_model=32, n_heads=4, n_layers=2, max_seq_len=64, vocab_size=300),
    ],
    ids=[
        "a constant rounded to a type",
        "one in the file",
        "a capped head",
        "transposed layers",
        "a config in two",
    ],
)
def test_architectures_with_more_than_weights_are_the_same(
    tmp_path: Path, config: Any, run: torch.dtype
) -> None:
    ordinary, mapped = both(saved(tmp_path, of_config(config)), run)
    assert all_mapped(mapped)
    check_same(ordinary, mapped, run)


def test_a_model_of_the_hubs_cache_is_mapped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "hub" / "models--someone--tiny"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("a" * 40)
    saved(tmp_path, tiny_model(), shard="20KB")
    shutil.copytree(tmp_path / "model", cache / "snapshots" / ("a" * 40))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    ordinary, mapped = both(tiny_spec(tmp_path, model={"init": None, "path": "someone/tiny"}))
    assert all_mapped(mapped)
    check_same(ordinary, mapped)


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"reference\.path = '/no/such/folder'"):
        load_model("reference.path", "/no/such/folder", True, torch.float32, mapped=True)
    saved(tmp_path, tiny_model())
    (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(UserError, match="its model cannot be loaded"):
        load_model("model.path", str(tmp_path / "model"), True, torch.float32, mapped=True)


# --- what cannot be mapped ------------------------------------------------------------------------


def of_two_types(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    held = load_file(folder / "model.safetensors")
    halves = {name: w if "mlp" in name else w.to(torch.bfloat16) for name, w in held.items()}
    save_file(halves, folder / "model.safetensors", metadata={"format": "pt"})


def as_pickle(folder: Path) -> None:
    torch.save(tiny_model().state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize("change", [of_two_types, as_pickle])
def test_files_of_another_kind_are_loaded_in_the_ordinary_way(tmp_path: Path, change: Any) -> None:
    spec = saved(tmp_path, tiny_model(), torch.float32)
    change(tmp_path / "model")
    ordinary, mapped = both(spec)
    assert not is_mapped(mapped.get_input_embeddings().weight)
    assert {p.dtype for p in mapped.parameters()} == {torch.float32}
    check_same(ordinary, mapped)


def test_old_rotary_frequencies_in_a_file_do_not_count(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    spec, file = (
        saved(tmp_path, tiny_model(), torch.float16),
        tmp_path / "model" / "model.safetensors",
    )
    # of fp32, as in Llama 2's
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file(load_file(file) | old, file, metadata={"format": "pt"})
    ordinary, mapped = both(spec)
    assert all_mapped(mapped)
    check_same(ordinary, mapped)


def test_experts_that_transformers_merges_are_the_same(tmp_path: Path) -> None:
    config = MixtralConfig(**SMALL, num_local_experts=2)
    ordinary, mapped = both(saved(tmp_path, of_config(config)))
    experts = [p for name, p in parameters(mapped).items() if "experts" in name]
    assert experts
    assert not any(is_mapped(p) for p in experts)
    assert is_mapped(mapped.get_input_embeddings().weight)
    check_same(ordinary, mapped)


def test_a_quantised_checkpoint_is_loaded_in_the_ordinary_way(tmp_path: Path) -> None:
    from transformers import BitsAndBytesConfig

    saved(tmp_path, tiny_model())
    eight: Any = {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    AutoModelForCausalLM.from_pretrained(tmp_path / "model", **eight).save_pretrained(
        tmp_path / "eight"
    )
    path = str(tmp_path / "eight")  # of a reference: quantised weights cannot train
    ordinary = load_model("reference.path", path, True, torch.float32)
    mapped = load_model("reference.path", path, True, torch.float32, mapped=True)
    assert torch.int8 in {p.dtype for p in mapped.parameters()}
    assert {n: p.dtype for n, p in parameters(mapped).items()} == {
        n: p.dtype for n, p in parameters(ordinary).items()
    }
    assert all(torch.equal(p, parameters(ordinary)[name]) for name, p in parameters(mapped).items())


# --- made on the spot -----------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_model_built_from_a_config_is_built_once_and_equal(
    tmp_path: Path, dtype: torch.dtype, tied: bool
) -> None:
    spec = tiny_spec(
        tmp_path, model={"init": {"config": {**TINY_MODEL, "tie_word_embeddings": tied}}}
    )
    before = torch.get_rng_state()
    ordinary, mapped = both(spec, dtype)
    assert torch.equal(torch.get_rng_state(), before)
    assert all_mapped(mapped)
    [folder] = (spec.cache_dir / "models").glob("*/")
    made_at = folder.stat().st_mtime_ns
    build_policy(spec, tokenizer(), dtype, mapped=True)
    assert new_weights(spec, tokenizer(), dtype) == folder
    assert folder.stat().st_mtime_ns == made_at
    check_same(ordinary, mapped, dtype)


def test_other_settings_build_other_weights(tmp_path: Path) -> None:
    def folder(dtype: torch.dtype = torch.float32, seed: int = 7, **config: Any) -> Path:
        spec = tiny_spec(
            tmp_path, run={"seed": seed}, model={"init": {"config": {**TINY_MODEL, **config}}}
        )
        return new_weights(spec, tokenizer(), dtype)

    assert (
        len({folder(), folder(torch.float64), folder(seed=8), folder(initializer_range=0.1)}) == 4
    )


def test_a_config_or_a_cache_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    spec = tiny_spec(tmp_path, model={"init": {"config": {**TINY_MODEL, "num_attention_heads": 3}}})
    with pytest.raises(UserError, match="no model can be built from it"):
        new_weights(spec, tokenizer())
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"data\.cache_dir = .*cannot be written there"):
        new_weights(tiny_spec(tmp_path, data={"cache_dir": str(tmp_path / "file")}), tokenizer())


# --- what is done to it before it is cut ----------------------------------------------------------


@pytest.mark.parametrize("how", ["new", "loaded", "cast to what the file has"])
def test_adapters_on_a_mapped_base_are_those_on_an_ordinary_one(tmp_path: Path, how: str) -> None:
    saved(tmp_path, tiny_model())
    save_adapter(tmp_path / "model", tmp_path / "adapter")
    lora = {"new": {"r": 4}, "loaded": {"adapter_path": str(tmp_path / "adapter")}}.get(
        how, {"r": 4, "base": "bf16"}
    )
    ordinary, mapped = both(from_path(tmp_path, lora=lora))
    assert all_mapped(mapped)
    assert any(p.requires_grad for p in mapped.parameters())
    if how.startswith("cast"):
        assert [p.dtype for p in mapped.parameters()] == [p.dtype for p in ordinary.parameters()]
        assert all(
            torch.equal(p, parameters(ordinary)[name]) for name, p in parameters(mapped).items()
        )
    else:
        assert {p.dtype for n, p in mapped.named_parameters() if ".lora_" in n} == {torch.float32}
        check_same(ordinary, mapped)


@pytest.mark.parametrize("base", ["fp16", "int8"])
def test_a_base_in_another_dtype_is_loaded_without_mapping(tmp_path: Path, base: str) -> None:
    saved(tmp_path, tiny_model())
    ordinary, mapped = both(from_path(tmp_path, lora={"r": 4, "base": base}))
    assert [p.dtype for p in mapped.parameters()] == [p.dtype for p in ordinary.parameters()]
    assert all(torch.equal(p, parameters(ordinary)[name]) for name, p in parameters(mapped).items())


def test_frozen_layers_stay_mapped_and_an_untied_head_is_its_own(tmp_path: Path) -> None:
    saved(tmp_path, tiny_model())
    ordinary, mapped = both(from_path(tmp_path, num_frozen_layers=1))
    own = [name for name, p in parameters(mapped).items() if not is_mapped(p)]
    assert own == ["lm_head.weight"]
    check_same(ordinary, mapped)


def test_a_head_in_16_bits_is_judged_as_exactly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import Gemma2ForCausalLM

    capped: dict[str, Any] = {**SMALL, "final_logit_softcapping": 1.0}
    loaded = saved(tmp_path, of_config(Gemma2Config(**capped)))
    settings = tiny_spec(tmp_path, model={"init": {"model_type": "gemma2", "config": capped}})
    for spec in (loaded, settings):
        build_policy(spec, tokenizer(), torch.float32, mapped=True)
    original = Gemma2ForCausalLM.forward

    def forward(self: Any, *args: Any, **options: Any) -> Any:
        actual = original(self, *args, **options)
        actual.logits = 1.01 * actual.logits
        return actual

    monkeypatch.setattr(Gemma2ForCausalLM, "forward", forward)
    for spec in (loaded, settings):
        with pytest.raises(UserError, match="changes its logits after the head"):
            build_policy(spec, tokenizer(), torch.float32, mapped=True)


def test_a_twin_lies_in_the_same_memory_until_it_is_cut(tmp_path: Path) -> None:
    _, model = both(saved(tmp_path, tiny_model()))
    twin = mapped_twin(model)
    assert all_mapped(twin)
    assert not any(p.requires_grad for p in twin.parameters())
    assert all(p.requires_grad for p in model.parameters())
    assert twin.get_output_embeddings().weight is twin.get_input_embeddings().weight
    pairs = list(zip(twin.parameters(), model.parameters(), strict=True))
    assert all(a is not b and a.data_ptr() == b.data_ptr() for a, b in pairs)
    assert not {b.data_ptr() for b in twin.buffers()} & {b.data_ptr() for b in model.buffers()}
    batch = pair_batch(2)
    before = sequence_logps(cut(twin), batch)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.equal(before, sequence_logps(cut(model), batch))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5)
    assert torch.equal(before, sequence_logps(twin, batch))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_mapped_model_has_the_identity_of_an_ordinary_one(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    saved(tmp_path, tiny_model())
    ordinary, mapped = both(from_path(tmp_path, lora={"r": 4, "alpha": 3}), dtype)

    def identity(model: Any, kind: Any, types: Any = None) -> Any:
        return identity_of(kind(model).tensors(), model.config, ALONE, types)

    types = types_when_cut(mapped, dtype)
    # the base; all, with the factors of the adapters, which stay fp32
    for kind in (PolicyStart, Reference):
        expected = identity(ordinary, kind)
        assert identity(mapped, kind) != expected
        assert identity(mapped, kind, types) == expected
    assert identity(cut(mapped, dtype), PolicyStart) == identity(ordinary, PolicyStart)


# --- memory ---------------------------------------------------------------------------------------


def anonymous_mb() -> float:
    """Memory that is this process's own."""
    gc.collect()
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) / 1024


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux's /proc")
@pytest.mark.parametrize("way", ["path", "init"])
def test_no_copy_is_held(tmp_path: Path, way: str) -> None:
    config = {**TINY_MODEL, "vocab_size": 30_000, "hidden_size": 512}  # one weight of 59 MB in fp32
    settings = tiny_spec(tmp_path, model={"init": {"config": config}})
    if way == "path":
        spec = saved(tmp_path, build_policy(settings, tokenizer(), torch.float32))
    else:
        new_weights(settings, tokenizer())
        spec = settings
    before = anonymous_mb()
    mapped = build_policy(spec, tokenizer(), torch.float32, mapped=True)
    twin = mapped_twin(mapped)
    assert all_mapped(mapped)
    assert anonymous_mb() - before < 12
    cut(twin, torch.float64)  # to see that a copy would show
    assert anonymous_mb() - before > 90
