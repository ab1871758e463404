"""Build the trainable causal LM and its tokenizer from the settings, loaded or newly
initialised.
"""

import difflib
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from orchestrator.data.order import PairCost, fed_lengths, longest_sequences
from orchestrator.data.pairs import Pairs, build_once
from orchestrator.data.sources import check_source, training_texts
from orchestrator.models.adapters import add_adapter
from orchestrator.models.attention import CHECKED
from orchestrator.models.behaviour import check_causal, depends_on_gradients, silence, still_noise
from orchestrator.models.dtypes import DTYPES
from orchestrator.models.fused import fuse
from orchestrator.models.head import Head
from orchestrator.models.layers import body_of, freeze_lowest
from orchestrator.models.loading import check_weights, config_at, read_model, tokenizer_at
from orchestrator.models.mapped import load_made, save_made, weights_aside
from orchestrator.models.quantized import quantized
from orchestrator.models.rope import most_positions
from orchestrator.settings.counts import counted
from orchestrator.settings.errors import UserError
from orchestrator.settings.loss import DpoSpec
from orchestrator.settings.model import Dtype, InitSpec, LoraSpec
from orchestrator.settings.run import RunSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ "
    "message['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt "
    "%}<|im_start|>assistant\n{% endif %}"
)
CANNOT_RUN = (
    RuntimeError,
    ValueError,
    TypeError,
    AttributeError,
    IndexError,
    KeyError,
    ImportError,
)  # sizes that misfit
SPECIAL_TOKENS = ["<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"]

# Config keys that must be at least 1 in every model; architectures use two sets of names.
SIZES = frozenset(
    [
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "vocab_size",
        "max_position_embeddings",
        "n_embd",
        "n_layer",
        "n_head",
        "n_positions",
    ]
)


def load_tokenizer(spec: RunSpec) -> "PreTrainedTokenizerBase":
    """Load the run's tokenizer; for model.init, train it once on data.train and keep it in the
    cache.

    Raises:
        UserError: it cannot be loaded, or has no token to pad with.
    """
    model = spec.model
    key = "model.tokenizer" if model.tokenizer or model.init else "model.path"
    if model.init and not model.tokenizer:
        source = str(_made_tokenizer(model.init, spec))
    else:
        source = model.tokenizer or model.path or ""
    tokenizer = tokenizer_at(key, source)
    if model.pad_token is not None:
        if model.pad_token not in tokenizer.get_vocab():
            raise UserError(
                "model.pad_token",
                model.pad_token,
                "is not in the tokenizer's vocabulary",
                "use one that is",
            )
        tokenizer.pad_token = model.pad_token
    if tokenizer.pad_token_id is None:
        eos = tokenizer.eos_token
        cure = (
            f"set model.pad_token='{eos}'"
            if eos
            else "set model.pad_token to a token of its vocabulary"
        )
        raise UserError(key, source, "has a tokenizer without a pad token", cure)
    if tokenizer.eos_token_id is None:
        raise UserError(
            key,
            source,
            "has a tokenizer without an end token",
            "use a tokenizer with eos_token set",
        )
    if spec.data.chat_template is not None:
        tokenizer.chat_template = spec.data.chat_template
    return tokenizer


def load_config(spec: RunSpec, tokenizer: "PreTrainedTokenizerBase") -> Any:
    """Load the config of the policy, without its weights."""
    from transformers import AutoConfig

    if spec.model.init is None:
        return config_at("model.path", str(spec.model.path))
    init = spec.model.init
    tokens = {
        f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")
    }
    known = _plain_config(init.model_type)
    for key, value in init.config.items():
        if not hasattr(known, key):
            near = difflib.get_close_matches(key, known.to_dict(), n=1)
            cure = (
                f"did you mean {near[0]}?"
                if near
                else "see that architecture's config in transformers"
            )
            raise UserError(
                f"model.init.config.{key}", value, f"{type(known).__name__} has no such key", cure
            )
        if key in SIZES and isinstance(value, int) and value < 1:
            raise UserError(
                f"model.init.config.{key}",
                value,
                "must be 1 or more",
                f"for example {getattr(known, key)}",
            )
    try:
        return AutoConfig.for_model(
            init.model_type, **{"vocab_size": len(tokenizer), **tokens, **init.config}
        )
    except Exception as error:  # each config class checks its own values in its own way
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            "model.init.config", init.config, f"transformers rejects it: {reason}", "fix it"
        ) from None


def _plain_config(model_type: str) -> Any:
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


def build_policy(
    spec: RunSpec,
    tokenizer: "PreTrainedTokenizerBase",
    dtype: torch.dtype,
    device: torch.device | None = None,
    mapped: bool = False,
) -> "PreTrainedModel":
    """Build the policy on a device (default: the CPU), with trainable weights of `dtype`. Newly
    initialised weights depend on run.seed only.

    mapped: for an engine that shards weights, on the CPU, so that no process holds its own copy.
    The weights are mapped files in the dtype of the files, and the engine casts each to `dtype`
    when it shards it, unless model.lora.base sets another dtype, which they then have already. A
    base in 8 or 4 bits is not mapped.

    Raises:
        UserError: it cannot be loaded, or does something between hidden states and logits that we
            would leave out.
    """
    lora = spec.model.lora
    mapped = mapped and not (lora is not None and lora.quantized_base)
    if spec.model.path is not None:
        model = load_model("model.path", spec.model.path, spec.model.disable_dropout, dtype, mapped)
    elif mapped:
        model = load_made(
            made_weights(spec, tokenizer, dtype), _made_config(spec, tokenizer), dtype
        )
        check_head(model)
        fuse(model)
    else:
        model = _random_model(spec, _made_config(spec, tokenizer), dtype)
        fuse(model)
    if lora is not None:
        model = _with_adapter(model, lora, spec, dtype, device or model.device)
    elif spec.model.num_frozen_layers is not None and not spec.reference.traits.shares_layers:
        freeze_lowest(
            model, spec.model.num_frozen_layers, keep_head=spec.model.tied_head == "untie"
        )
    if spec.training.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
        # transformers makes the embeddings' output require a gradient, which only reentrant
        # checkpointing needs
        model.disable_input_require_grads()
    model = model.to(device or model.device).train()  # pyright: ignore[reportArgumentType]
    if spec.model.disable_dropout:
        still_noise(model)
    return model


def made_weights(
    spec: RunSpec, tokenizer: "PreTrainedTokenizerBase", dtype: torch.dtype = torch.float32
) -> Path:
    """Return the cache folder with the weights of model.init for `load_made`.

    The first process that calls this initialises the weights and temporarily holds one full copy;
    the others wait. dtype: that of the run, in which the weights are drawn.

    Raises:
        UserError: the model cannot be built from the config, or the cache cannot be written.
    """
    import transformers
    from safetensors import SafetensorError

    config = _made_config(spec, tokenizer)
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
            folder, lambda unfinished: save_made(_random_model(spec, config, dtype), unfinished)
        )
    except (OSError, SafetensorError) as error:
        rule = f"the weights of model.init cannot be written there ({error})"
        cure = "set data.cache_dir to a folder with enough free space"
        raise UserError("data.cache_dir", str(spec.cache_dir), rule, cure) from None
    return folder


def _made_config(spec: RunSpec, tokenizer: "PreTrainedTokenizerBase") -> Any:
    config = load_config(spec, tokenizer)
    _no_dropout(config, spec.model.disable_dropout)
    return config


def _random_model(spec: RunSpec, config: Any, dtype: torch.dtype) -> "PreTrainedModel":
    """Build the model of model.init with weights drawn from run.seed."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(spec.run.seed)
        try:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
            _check_head(model)
        except CANNOT_RUN as error:  # sizes that do not fit each other
            reason = " ".join(str(error).split())[:160]
            given = spec.model.init.config if spec.model.init else None
            raise UserError(
                "model.init.config",
                given,
                f"no model can be built from it: {reason}",
                "fix its sizes",
            ) from None
    return model


def _with_adapter(
    model: "PreTrainedModel",
    lora: LoraSpec,
    spec: RunSpec,
    dtype: torch.dtype,
    device: torch.device,
) -> "PreTrainedModel":
    """Return the model as a frozen base, quantised or cast as model.lora.base says, with a
    trainable adapter.
    """
    if lora.quantized_base is not None:
        model = quantized(model, lora.quantized_base, device)
    elif lora.cast_base is not None:
        model = cast_to(model, lora.cast_base)
    with weights_aside(model, dtype) if lora.base is None else nullcontext():
        add_adapter(model, lora, spec.run.seed, dtype, spec.model.disable_dropout)
    return model


def cast_to(model: "PreTrainedModel", dtype: Dtype) -> "PreTrainedModel":
    """Cast the weights of a model in place, and return it. Buffers stay as they are, as in
    from_pretrained: rotary frequencies in 16 bits would rotate late positions by wrong angles.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(DTYPES[dtype])
    fuse(model)
    return model


def load_model(
    key: str, path: str, disable_dropout: bool, dtype: torch.dtype, mapped: bool = False
) -> "PreTrainedModel":
    """Load a causal LM from a folder or the hub with weights of `dtype`, on the CPU; mapped: see
    `load_mapped`.
    """
    config = config_at(key, path)
    _no_dropout(config, disable_dropout)
    model = read_model(key, path, config, dtype, mapped)
    check_head(model)
    fuse(model, dtype if mapped else None)
    return model


def pair_cost(model: "PreTrainedModel") -> PairCost:
    """Return the cost of a token in this model, in multiplications."""
    text = model.config.get_text_config()
    body = [m for m in body_of(model).modules() if not isinstance(m, torch.nn.Embedding)]
    matrices = {p for module in body for p in module.parameters(recurse=False) if p.ndim >= 2}
    # from the layers, not from the config: in some models heads differ by layer, others have no
    # attention
    queries = sum(
        getattr(m, "out_features", 0)
        for name, m in model.named_modules()
        if name.endswith("q_proj")
    )
    return PairCost(
        token=sum(p.numel() for p in matrices),
        scored=text.vocab_size * text.hidden_size,
        seen=2 * (queries or getattr(text, "num_hidden_layers", 0) * text.hidden_size),
    )


def check_model(spec: RunSpec, config: Any) -> None:
    """Check the files of model.path, and that the adapter fits the model, without reading the
    base's weights.

    Raises:
        UserError: weights are missing or not used, or the adapter does not fit.
    """
    if spec.model.path is None:
        return
    model = check_weights("model.path", spec.model.path, config)
    if model is not None and spec.model.lora is not None:
        add_adapter(
            model, spec.model.lora, spec.run.seed, torch.float32, spec.model.disable_dropout
        )


def check_frozen(config: Any, spec: RunSpec) -> None:
    """Check that fewer layers are frozen than the model has.

    Raises:
        UserError: the model has no layer left above the frozen ones.
    """
    layers, frozen = getattr(config.get_text_config(), "num_hidden_layers", 0), spec.frozen_layers
    if frozen is not None and frozen >= layers:
        key = (
            "model.num_frozen_layers"
            if spec.model.num_frozen_layers
            else "reference.num_shared_layers"
        )
        raise UserError(
            key,
            frozen,
            f"the model has {counted(layers, 'layer')}",
            f"set it to {layers - 1} or less",
        )


def check_router(config: Any, dpo: DpoSpec) -> None:
    """Check that a mixture of experts has no load-balancing loss: TRL would add it, and it is not
    computed here.

    Raises:
        UserError: the coefficient in the model's config is not 0, and the settings do not set it to
            0.
    """
    text = config.get_text_config()
    coefficient = getattr(text, "router_aux_loss_coef", 0)
    if hasattr(text, "output_router_logits") and coefficient and dpo.router_aux_loss_coef is None:
        rule = (
            f"the model's config sets {coefficient} for a load-balancing loss, which is not "
            "computed here"
        )
        raise UserError(
            "dpo.router_aux_loss_coef", None, rule, "set it to 0 to train without that loss"
        )


def check_fit(config: Any, pairs: Pairs, key: str, spec: RunSpec) -> None:
    """Check that the pairs fit the model: not longer than its positions, and no ids outside its
    vocabulary.

    Raises:
        UserError: a pair is too long (with its row), or an id is outside the vocabulary.
    """
    vocabulary = config.get_text_config().vocab_size
    if pairs.largest_id >= vocabulary:
        made = spec.model.init is not None and spec.model.tokenizer is None
        raise UserError(
            "model.init.config" if made else "model.tokenizer",
            spec.model.init.config if spec.model.init and made else spec.model.tokenizer,
            f"the model's vocabulary has {vocabulary} tokens, the tokenizer returned id "
            f"{pairs.largest_id} for {key}",
            "remove vocab_size from it" if made else "use the model's own tokenizer",
        )
    limit = most_positions(config)
    longest = longest_sequences(fed_lengths(pairs.lengths, spec.data.keep_last))
    worst = int(longest.argmax())
    if limit is not None and longest[worst] > limit:
        raise UserError(
            str(pairs.place(pairs.pair_ids[worst])),
            f"{longest[worst]} tokens",
            f"is longer than the model's {limit} positions",
            f"set data.max_length={limit} or less",
        )


def _no_dropout(config: Any, disable: bool) -> None:
    if disable:
        silence(config)


@contextmanager
def _at_least_fp32(head: torch.nn.Module) -> Iterator[None]:
    """Keep the head's output in fp32 within the context, so that what a model does to it differs
    from rounding.
    """
    handle = head.register_forward_hook(
        lambda _, __, logits: logits.to(torch.promote_types(logits.dtype, torch.float))
    )
    try:
        yield
    finally:
        handle.remove()


def check_head(model: "PreTrainedModel") -> None:
    """Check that a model is causal, and that Head reproduces its logits: the step runs body and
    head separately.

    A model whose logits depend on whether gradients are computed is switched to transformers' eager
    attention.

    Raises:
        UserError: it is not causal, its own logits differ from Head's, or its forward pass fails.
    """
    try:
        _check_head(model)
    except CANNOT_RUN as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        cure = "check the sizes in its config.json, or use another model"
        raise UserError(
            "model", type(model).__name__, f"its forward pass fails ({reason})", cure
        ) from None


@torch.no_grad()
def _check_head(model: "PreTrainedModel") -> None:
    if model.config.get_text_config().model_type not in CHECKED and depends_on_gradients(model):
        model.set_attn_implementation("eager")
    training, head = model.training, Head.of(model)
    model.eval()
    ids = torch.tensor([[0, 1]])
    with _at_least_fp32(head.module):
        check_causal(model, lambda ids: model(input_ids=ids, use_cache=False).logits)
        whole = model(input_ids=ids, use_cache=False).logits
        hidden = body_of(model)(input_ids=ids, use_cache=False).last_hidden_state
        apart = head(hidden)
    model.train(training)
    if whole.shape != apart.shape or not torch.allclose(
        whole.to(apart.dtype), apart, rtol=1e-4, atol=1e-4
    ):
        rule = (
            "changes its logits after the head in a way that is not supported "
            f"({_difference(whole, apart)})"
        )
        cure = "use a Llama, Qwen, Mistral, Gemma or GPT-2 style model"
        raise UserError("model", type(model).__name__, rule, cure)


def _difference(whole: torch.Tensor, apart: torch.Tensor) -> str:
    """Describe how a model's own logits differ from those of its head."""
    if whole.shape != apart.shape:
        return f"{whole.shape[-1]} logits, but its head returns {apart.shape[-1]}"
    whole, apart = whole.double(), apart.double()
    factor = ((whole * apart).sum() / (apart * apart).sum()).item()
    if torch.allclose(whole, factor * apart, rtol=1e-3, atol=1e-4):
        return f"they are multiplied by {factor:.4g}"
    return (
        f"they differ by {(whole - apart).abs().max().item():.2g}, the largest is "
        f"{whole.abs().max().item():.2g}"
    )


def _made_tokenizer(init: InitSpec, spec: RunSpec) -> Path:
    """Train a byte-level BPE tokenizer with a ChatML template on the texts of data.train; return
    its cache folder.
    """
    for key, source in spec.data.sources("train").items():
        check_source(key, source.path)
    texts, identity = training_texts(spec.data)
    config = _plain_config(init.model_type)
    folder = spec.cache_dir / "tokenizers" / f"{init.model_type}-{identity}-{init.vocab_size}"

    def build(unfinished: Path) -> None:
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
        wrapped.save_pretrained(unfinished)
        config.save_pretrained(
            unfinished
        )  # AutoTokenizer picks the class by it: the same as from an exported model

    build_once(folder, build)
    return folder
