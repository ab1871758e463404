"""The kinds of reference model, and the life that all of them have.

Legend: 2B sequences, R rows, T tokens, H hidden size.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

from orchestrator.data.collate import PairBatch
from orchestrator.models.adapters import (
    POLICY,
    adapter_layers,
    adapter_off,
    base_name,
    is_of,
    scalings,
)
from orchestrator.models.layers import UpperLayers, captured_at, decoder_layers, lowest
from orchestrator.models.layout_check import small_batches
from orchestrator.models.logps import body_hidden, layout_of, sequence_logps
from orchestrator.settings.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Relative error of hidden states: rounding is far below it, one layer too many or too few far above
# it.
UPPER_TOLERANCE = 1e-3


class Reference:
    """A separate frozen model, and the base class of the other kinds.

    Deliberately not an nn.Module, so that a module that holds it registers no parameter. Its life
    has five steps, which `PairStep` (dpo/step.py) takes in this order:

    1. `own_modules`: list the modules that a sharding engine shards besides the policy's.
    2. `place`: move the weights that it does not share with the policy to the device.
    3. `begin_training`: drop the models that only the start needed, and return the reference of
       the steps.
    4. `logps`: compute the log-probs of a micro-batch, once per micro-batch that has none yet.
    5. `sync`: move its weights towards the policy's, every reference.sync_every steps.

    build_reference.py builds it before that. Between 2 and 3 the engine wraps the step, the error
    of an approximate reference is measured against `exact`, and the cache of log-probs is filled.
    A checkpoint holds `synced_weights`, which is empty without
    reference.sync_every.
    """

    model: "PreTrainedModel"
    # The layer of the policy whose input it needs; None for a separate model.
    capture_layer: int | None = None
    is_start = False  # True if its weights are those that the policy starts with
    # Another model that it approximates, until training begins.
    exact: "Reference | None" = None
    is_precomputed = False  # True if all log-probs are in the cache when training begins
    is_synced = False  # True if `sync` will be called
    ld_alpha: float | None = None  # dpo.ld_alpha: it sums a sequence as the policy does
    on_host: dict[str, torch.Tensor] | None = None  # the weights by name, if they are offloaded

    def __init__(self, model: "PreTrainedModel") -> None:
        self.model = model.requires_grad_(False).eval()

    # --- its life, in order -----------------------------------------------------------------------

    def own_modules(self, policy: "PreTrainedModel") -> list[nn.Module]:
        """Return the modules that a sharding engine must shard besides the policy's; they share no
        weight with it.
        """
        return [self.model]

    def place(
        self, policy: "PreTrainedModel", device: torch.device, dtype: torch.dtype | None
    ) -> None:
        """Move its own weights to the device and cast them to a dtype (None: keep theirs)."""
        for module in self.own_modules(policy):
            for tensor in (*module.parameters(), *module.buffers()):
                # others are the codes of a quantised layer, already on the device
                if tensor.is_floating_point():
                    # rotary frequencies are not cast
                    is_buffer = not isinstance(tensor, nn.Parameter)
                    tensor.data = tensor.data.to(device, None if is_buffer else dtype)

    def begin_training(self) -> "Reference":
        """Free the model that it approximates, and its own if it is precomputed; return the
        reference of the training steps.
        """
        self.exact = None
        return Absent() if self.is_precomputed else self

    def logps(self, batch: PairBatch, captured: torch.Tensor | None = None) -> torch.Tensor:
        """Return the log-probs [2B] in fp64.

        captured: [R, T, H] the input of capture_layer in the policy; unused.
        """
        return sequence_logps(self.model, batch, ld_alpha=self.ld_alpha)

    @torch.no_grad()
    def sync(
        self,
        policy_weights: "Mapping[str, torch.Tensor]",
        alpha: float,
        held: Callable[[torch.Tensor], torch.Tensor] = lambda weight: weight,
    ) -> None:
        """Set reference = alpha * policy + (1 - alpha) * reference.

        TR-DPO, arXiv 2404.09656, eq. 8.

        policy_weights: by name, in the layout of this reference's: whole, or the same shards.
        held: a weight of this reference -> what this rank holds of it.
        """
        for name, weight in self.synced_weights().items():
            own = held(weight)
            own.mul_(1 - alpha).add_(policy_weights[name].to(own.device), alpha=alpha)

    # --- its weights ------------------------------------------------------------------------------

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        """Return the model's weights by name, tied ones by each of their names.

        They are looked up each time, because an engine may replace them by shards.
        """
        return self.on_host or dict(self.model.named_parameters(remove_duplicate=False))

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return all tensors that its log-probs depend on, by name."""
        state: dict[str, torch.Tensor] = self.model.state_dict() | scalings(self.model)
        weights = self.weights
        return {name: weights.get(name, value) for name, value in state.items()}

    def synced_weights(self) -> dict[str, torch.Tensor]:
        """Return the weights that `sync` changes, and that a checkpoint must hold, by name: tied
        ones once, without the policy's.
        """
        if not self.is_synced:
            return {}
        weights = self.weights
        first: dict[int, str] = {}
        for name, weight in weights.items():
            first.setdefault(id(weight), name)
        return {name: weights[name] for name in first.values()}

    def own_bytes(self, policy: "PreTrainedModel") -> int:
        """Return the size in bytes of the weights that it does not share with the policy."""
        shared = {tensor.data_ptr() for tensor in policy.state_dict().values()}
        own = {tensor.data_ptr(): tensor.nbytes for tensor in self.tensors().values()}
        return sum(size for pointer, size in own.items() if pointer not in shared)

    def offload(self, device: torch.device) -> None:
        """Keep the weights in host memory; each layer's are on the device only while it runs."""
        from accelerate import cpu_offload

        weights = self.weights
        once = {id(p): p.detach().cpu() for p in weights.values()}  # tied ones
        self.on_host = {name: once[id(p)] for name, p in weights.items()}
        for buffer in self.model.buffers():  # small, and not offloaded
            buffer.data = buffer.data.to(device)
        cpu_offload(self.model, device, state_dict=self.on_host)


class SharedLayers(Reference):
    """A model whose lowest layers are the policy's own modules: frozen, stored once, and run once
    per micro-batch.
    """

    def __init__(self, model: "PreTrainedModel", policy: "PreTrainedModel", count: int) -> None:
        training = policy.training
        super().__init__(model)
        policy.train(training)  # eval() has gone through the shared layers
        self.capture_layer = count
        self.upper = UpperLayers(model, count)
        shared = {id(p) for p in policy.parameters()}
        self.own = {name for name, p in model.named_parameters() if id(p) not in shared}

    def logps(self, batch: PairBatch, captured: torch.Tensor | None = None) -> torch.Tensor:
        """Return the log-probs [2B] in fp64, from the upper layers, or without captured states from
        the whole model.
        """
        if captured is None:
            return super().logps(batch)
        with torch.no_grad():
            return sequence_logps(
                self.model, batch, self.upper(captured, **layout_of(batch)), self.ld_alpha
            )

    def own_modules(self, policy: "PreTrainedModel") -> list[nn.Module]:
        """Return the upper layers, and all other modules of the model that hold weights of their
        own.
        """
        shared = {id(p) for p in policy.parameters()}
        upper = list(decoder_layers(self.model)[self.capture_layer :])
        in_layers = {
            module
            for layer in (*upper, *lowest(policy, self.capture_layer or 0))
            for module in layer.modules()
        }
        besides = [
            module
            for module in self.model.modules()
            if module not in in_layers
            and any(
                id(tensor) not in shared
                for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))
            )
        ]
        return upper + besides

    def synced_weights(self) -> dict[str, torch.Tensor]:
        """Return the weights that `sync` changes: those of the upper layers."""
        return {name: value for name, value in super().synced_weights().items() if name in self.own}

    @torch.no_grad()
    def check_runs_separately(self, policy: "PreTrainedModel") -> None:
        """Check, by a forward pass, that the upper layers can run separately.

        Raises:
            UserError: their hidden states differ from those of the whole model.
        """
        _, batch = small_batches(policy.device)
        training = policy.training
        policy.eval()
        try:
            expected = body_hidden(self.model, batch)
            with captured_at(policy, self.capture_layer) as captured:
                body_hidden(policy, batch)
            output = self.upper(captured[0], **layout_of(batch))
            error = ((output - expected).abs().amax() / expected.abs().amax()).item()
        except (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError):
            error = float("inf")
        finally:
            policy.train(training)
        if not error <= UPPER_TOLERANCE:
            model = f"the upper layers of a {type(policy).__name__}"
            rule = f"{model} cannot run separately (they differ by {error:.1e})"
            fix = "set reference.kind=copy and model.num_frozen_layers"
            raise UserError("reference.kind", "shared_layers", rule, fix)


class PolicyStart(Reference):
    """The policy before its first step: computes log-probs for the cache, and is not used as
    reference afterwards.
    """

    is_start = True

    def __init__(self, policy: "PreTrainedModel") -> None:
        self.model = policy

    def logps(self, batch: PairBatch, captured: torch.Tensor | None = None) -> torch.Tensor:
        """Return the log-probs [2B] in fp64."""
        training = self.model.training
        self.model.eval()  # without dropout
        try:
            return sequence_logps(self.model, batch, ld_alpha=self.ld_alpha)
        finally:
            self.model.train(training)

    def own_bytes(self, policy: "PreTrainedModel") -> int:
        """Return 0: every weight is the policy's."""
        return 0

    def own_modules(self, policy: "PreTrainedModel") -> list[nn.Module]:
        """Return no module: every weight is the policy's."""
        return []

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the base and the frozen copy of a loaded adapter, by name, without the adapter
        that trains.
        """
        state = self.model.state_dict() | scalings(self.model)
        return {base_name(name): value for name, value in state.items() if not is_of(POLICY, name)}


class AdapterOff(PolicyStart):
    """The policy without its adapter, or with the frozen copy of the one it started from."""

    def __init__(self, policy: "PreTrainedModel") -> None:
        super().__init__(policy)
        self.layers = list(adapter_layers(policy).values())

    def logps(self, batch: PairBatch, captured: torch.Tensor | None = None) -> torch.Tensor:
        """Return the log-probs [2B] in fp64.

        Dropout would affect them; the rules of the settings require it off.
        """
        with adapter_off(self.layers):
            return sequence_logps(self.model, batch, ld_alpha=self.ld_alpha)


class Absent(Reference):
    """A reference without a model, whose log-probs are all in the cache (reference.kind=precomputed
    during training).
    """

    is_start = True

    def __init__(self) -> None:
        pass

    def own_modules(self, policy: "PreTrainedModel") -> list[nn.Module]:
        """Return no module: there is no model."""
        return []

    def logps(self, batch: PairBatch, captured: torch.Tensor | None = None) -> torch.Tensor:
        """Raise an error: there is no model to compute log-probs with.

        Raises:
            UserError: a pair has no log-probs: the cache could not be written, or changed during
                training.
        """
        raise UserError(
            "reference.kind",
            "precomputed",
            f"the log-probs of pairs {batch.pair_ids.tolist()} are not all in the cache",
            "run the same command again, with enough free space in data.cache_dir",
        )
