"""Settings -> the trainable causal LM and its tokenizer, loaded or made on the spot."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from orchestrator.data.pairs import Pairs, build_once, check_source, training_texts
from orchestrator.models.logps import output_head
from orchestrator.settings.load import looks_local
from orchestrator.settings.spec import InitSpec, RunSpec, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL_TOKENS = ["<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"]


def load_tokenizer(spec: RunSpec) -> "PreTrainedTokenizerBase":
    """The run's tokenizer; for model.init it is trained on data.train, once, and kept in the cache.

    Raises:
        UserError: it cannot be loaded, or has no token to pad with.
    """
    from transformers import AutoTokenizer

    model = spec.model
    key = "model.tokenizer" if model.tokenizer or model.init else "model.path"
    if model.init and not model.tokenizer:
        source = str(_made_tokenizer(model.init, spec))
    else:
        source = model.tokenizer or model.path or ""
    _check_folder(key, source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except Exception as error:  # transformers and the hub raise many types; all mean that it cannot be loaded
        raise _cannot_load(key, source, "tokenizer", error) from None
    if model.pad_token is not None:
        if model.pad_token not in tokenizer.get_vocab():
            raise UserError(
                "model.pad_token", model.pad_token, "is not in the tokenizer's vocabulary", "take one that is"
            )
        tokenizer.pad_token = model.pad_token
    if tokenizer.pad_token_id is None:
        eos = tokenizer.eos_token
        cure = f"set model.pad_token='{eos}'" if eos else "set model.pad_token to a token of its vocabulary"
        raise UserError(key, source, "has a tokenizer without a pad token", cure)
    if tokenizer.eos_token_id is None:
        raise UserError(key, source, "has a tokenizer without an end token", "take a tokenizer with eos_token set")
    return tokenizer


def load_config(spec: RunSpec, tokenizer: "PreTrainedTokenizerBase") -> Any:
    """The config of the policy, without its weights."""
    from transformers import AutoConfig

    if spec.model.init is None:
        path = str(spec.model.path)
        _check_folder("model.path", path)
        try:
            return AutoConfig.from_pretrained(path)
        except Exception as error:
            raise _cannot_load("model.path", path, "model config", error) from None
    init = spec.model.init
    tokens = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    try:
        return AutoConfig.for_model(init.model_type, **{"vocab_size": len(tokenizer), **tokens, **init.config})
    except ValueError as error:
        raise UserError(
            "model.init.model_type",
            init.model_type,
            f"transformers says: {' '.join(str(error).split())[:160]}",
            "for example qwen2",
        ) from None


def build_policy(spec: RunSpec, tokenizer: "PreTrainedTokenizerBase", dtype: torch.dtype) -> "PreTrainedModel":
    """The policy on the CPU, with trainable weights of `dtype`; weights made on the spot depend on run.seed alone.

    Raises:
        UserError: it cannot be loaded, or does something between hidden states and logits that we would leave out.
    """
    from transformers import AutoModelForCausalLM

    if spec.model.path is not None:
        model = load_model("model.path", spec.model.path, spec.model.disable_dropout, dtype)
    else:
        config = load_config(spec, tokenizer)
        _no_dropout(config, spec.model.disable_dropout)
        with torch.random.fork_rng():
            torch.manual_seed(spec.run.seed)
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if spec.training.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        # transformers gives the embeddings' output a gradient for reentrant checkpointing; ours does not need it
        model.disable_input_require_grads()
    _check_head(model)
    return model.train()


def load_model(key: str, path: str, disable_dropout: bool, dtype: torch.dtype) -> "PreTrainedModel":
    """A causal LM from a folder or the hub, with weights of `dtype`, on the CPU."""
    from transformers import AutoConfig, AutoModelForCausalLM

    _check_folder(key, path)
    try:
        config = AutoConfig.from_pretrained(path)
        _no_dropout(config, disable_dropout)
        return AutoModelForCausalLM.from_pretrained(path, config=config, dtype=dtype)
    except Exception as error:
        raise _cannot_load(key, path, "model", error) from None


def check_positions(config: Any, pairs: Pairs, key: str) -> None:
    """Refuse a pair that is longer than the model has positions for, by its row."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    longest = pairs.lengths[:, 0] + pairs.lengths[:, 1:].max(axis=1)
    worst = int(longest.argmax())
    if limit is not None and longest[worst] > limit:
        raise UserError(
            f"{key} row {pairs.row_numbers[worst]}",
            f"{longest[worst]} tokens",
            f"is longer than the model's {limit} positions",
            f"set data.max_length={limit} or less",
        )


def _no_dropout(config: Any, disable: bool) -> None:
    if disable:
        for name, value in vars(config.get_text_config()).items():
            if isinstance(value, float) and ("dropout" in name or name.endswith("_pdrop")):
                setattr(config.get_text_config(), name, 0.0)


@torch.no_grad()
def _check_head(model: "PreTrainedModel") -> None:
    """The step runs body and head apart: refuse a model that scales or caps its logits in between."""
    training = model.training
    model.eval()
    ids = torch.tensor([[0, 1]])
    whole = model(input_ids=ids, use_cache=False).logits
    apart = output_head(model)(model.base_model(input_ids=ids, use_cache=False).last_hidden_state)
    model.train(training)
    if not torch.allclose(whole, apart, rtol=1e-4, atol=1e-4):
        raise UserError(
            "model",
            type(model).__name__,
            "scales or caps its logits after the head, which is not supported yet",
            "take a Llama, Qwen, Mistral or GPT-2 style model",
        )


def _check_folder(key: str, path: str) -> None:
    if looks_local(path) and not os.path.isdir(path):
        raise UserError(key, path, "is not a folder", "give a folder with config.json and weights, or a hub name")


def _cannot_load(key: str, path: str, what: str, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:200]
    return UserError(
        key,
        path,
        f"its {what} cannot be loaded ({type(error).__name__}: {reason})",
        "give a folder or a hub name that can be reached",
    )


def _made_tokenizer(init: InitSpec, spec: RunSpec) -> Path:
    """Folder of a byte-level BPE tokenizer trained on the texts of data.train, with a ChatML template."""
    check_source("data.train", spec.data.train)
    texts, identity = training_texts(spec.data)
    folder = spec.cache_dir / "tokenizers" / f"{identity}-{init.vocab_size}"

    def build(partial: Path) -> None:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
        from transformers import PreTrainedTokenizerFast

        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
        tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore
        trainer = trainers.BpeTrainer(
            vocab_size=init.vocab_size,
            special_tokens=SPECIAL_TOKENS,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts(), trainer)
        wrapped = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            eos_token="<|im_end|>",
            pad_token="<|pad|>",
            additional_special_tokens=["<|im_start|>"],
        )
        wrapped.chat_template = CHAT_TEMPLATE
        wrapped.save_pretrained(partial)
        (partial / "made_from.json").write_text(json.dumps({"data": spec.data.train, "vocab_size": init.vocab_size}))

    build_once(folder, build)
    return folder
