"""Build a new model and its tokenizer (model.init): config, random weights, trained vocabulary."""

import difflib
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from orchestrator.data.build_once import build_once
from orchestrator.data.file_lock import Poll, no_poll
from orchestrator.data.sources import check_source, training_texts
from orchestrator.models.behaviour import silence
from orchestrator.models.head_check import CANNOT_RUN, compare_with_head
from orchestrator.models.loading import wrong_size
from orchestrator.models.mapped import save_mapped
from orchestrator.settings.errors import UserError, message_of
from orchestrator.settings.model import InitSpec
from orchestrator.settings.run import RunSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ "
    "message['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt "
    "%}<|im_start|>assistant\n{% endif %}"
)
SPECIAL_TOKENS = ["<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"]


def new_config(init: InitSpec, tokenizer: "PreTrainedTokenizerBase") -> Any:
    """Return the config that model.init describes, for a tokenizer.

    Raises:
        UserError: the architecture is not a causal LM, or a value of model.init.config is wrong.
    """
    from transformers import AutoConfig

    tokens = {
        f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")
    }
    defaults = _default_config(init.model_type)
    for key, value in init.config.items():
        _check_key(key, value, defaults)
    keys = {"vocab_size": len(tokenizer), **tokens, **init.config}
    try:
        return AutoConfig.for_model(init.model_type, **keys)
    except Exception as error:  # each config class checks its own values in its own way
        rule = f"transformers rejects it: {message_of(error)}"
        raise UserError("model.init.config", init.config, rule, "fix it") from None


def _check_key(key: str, value: Any, defaults: Any) -> None:
    """Check that an architecture's config has the key, and that a size is possible."""
    setting = f"model.init.config.{key}"
    if not hasattr(defaults, key):
        near = difflib.get_close_matches(key, defaults.to_dict(), n=1)
        fix = (
            f"did you mean {near[0]}?" if near else "see that architecture's config in transformers"
        )
        raise UserError(setting, value, f"{type(defaults).__name__} has no such key", fix)
    if rule := wrong_size(key, value):
        raise UserError(setting, value, rule, f"for example {getattr(defaults, key)}")


def _default_config(model_type: str) -> Any:
    """Return the default config of an architecture that has a causal LM."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        near = difflib.get_close_matches(model_type, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, n=1)
        cure = f"did you mean {near[0]}?" if near else "for example qwen2"
        raise UserError(
            "model.init.model_type", model_type, "is not a causal LM of transformers", cure
        )
    return AutoConfig.for_model(model_type)


def new_model(
    spec: RunSpec, tokenizer: "PreTrainedTokenizerBase", dtype: torch.dtype
) -> "PreTrainedModel":
    """Build the model of model.init with weights drawn from run.seed, and check its head."""
    return _random_model(spec, quiet_config(spec, tokenizer), dtype)


def new_weights(
    spec: RunSpec,
    tokenizer: "PreTrainedTokenizerBase",
    dtype: torch.dtype = torch.float32,
    poll: Poll = no_poll,
) -> Path:
    """Return the cache folder with the weights of model.init for `load_saved`.

    The first process that calls this initialises the weights and temporarily holds one full copy;
    the others wait. dtype: that of the run, in which the weights are drawn. poll: called while this
    process waits.

    Raises:
        UserError: the model cannot be built from the config, or the cache cannot be written.
    """
    import transformers
    from safetensors import SafetensorError

    config = quiet_config(spec, tokenizer)
    depends_on = [
        config.to_dict(),
        spec.run.seed,
        str(dtype),
        torch.__version__,
        transformers.__version__,
    ]
    digest = hashlib.sha256(
        json.dumps(depends_on, sort_keys=True, default=str).encode()
    ).hexdigest()
    folder = spec.cache_dir / "models" / f"{config.model_type}-{digest[:16]}"
    try:
        build_once(
            folder,
            lambda unfinished: save_mapped(_random_model(spec, config, dtype), unfinished),
            poll,
        )
    except (OSError, SafetensorError) as error:
        rule = f"the weights of model.init cannot be written there ({error})"
        cure = "set data.cache_dir to a folder with enough free space"
        raise UserError("data.cache_dir", str(spec.cache_dir), rule, cure) from None
    return folder


def quiet_config(spec: RunSpec, tokenizer: "PreTrainedTokenizerBase") -> Any:
    """Return the config of model.init, without dropout if model.disable_dropout says so."""
    assert spec.model.init is not None
    config = new_config(spec.model.init, tokenizer)
    if spec.model.disable_dropout:
        silence(config)
    return config


def _random_model(spec: RunSpec, config: Any, dtype: torch.dtype) -> "PreTrainedModel":
    """Build the model of model.init with weights drawn from run.seed."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(spec.run.seed)
        try:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
            compare_with_head(model)
        except CANNOT_RUN as error:  # sizes that do not fit each other
            reason = message_of(error)
            keys = spec.model.init.config if spec.model.init else None
            raise UserError(
                "model.init.config",
                keys,
                f"no model can be built from it: {reason}",
                "fix its sizes",
            ) from None
    return model


def trained_tokenizer(init: InitSpec, spec: RunSpec) -> Path:
    """Train a byte-level BPE tokenizer with a ChatML template on the texts of data.train; return
    its cache folder.
    """
    for key, source in spec.data.sources("train").items():
        check_source(key, source.path)
    texts, identity = training_texts(spec.data)
    config = _default_config(init.model_type)
    folder = spec.cache_dir / "tokenizers" / f"{init.model_type}-{identity}-{init.vocab_size}"

    def build(unfinished: Path) -> None:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
        from transformers import PreTrainedTokenizerFast

        tokenizer: Any = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
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
        wrapped.save_pretrained(unfinished)
        # AutoTokenizer picks the class by it: the same as from an exported model
        config.save_pretrained(unfinished)

    build_once(folder, build)
    return folder
