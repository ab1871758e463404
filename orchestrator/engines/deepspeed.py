"""DeepSpeed ZeRO, stages 1 to 3: it shards and moves weights, gradients and state; scaling and
clipping are ours.

Only this file uses private names of DeepSpeed, with an exact version and
tests/contract/test_engines.py: its public functions can neither read or write the state per
parameter with two groups, nor drop a gradient.
"""

import copy
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from orchestrator.dpo.step import PairStep
from orchestrator.engines.base import OptimizerFactory, SchedulerFactory
from orchestrator.engines.optim import param_groups
from orchestrator.engines.precision import Types, device_name, dtype_of, is_16_bit
from orchestrator.engines.stepping import Fragment, SteppingEngine
from orchestrator.settings.errors import UserError, message_of
from orchestrator.settings.precision import Precision
from orchestrator.world import World


class DeepSpeedEngine(SteppingEngine):
    """Engine (see base.py) on DeepSpeed. In bf16 and fp16 the forward pass has weights in that
    dtype, and each rank holds its part of them in fp32 for the optimizer; gradients are summed in
    fp32, over micro-batches and ranks.
    """

    module: Any  # pyright: ignore[reportIncompatibleVariableOverride] - deepspeed's engine

    def wrap(
        self, step: PairStep, optimizer: OptimizerFactory, scheduler: SchedulerFactory
    ) -> None:
        self.world.ensure_process_group()
        deepspeed = _imported(self.world)
        _check_precision(self.precision, self.world.device, deepspeed.accelerator.get_accelerator())
        self.step = step
        self.averaged_over = self.world.size
        self.stage = self.settings.stage
        self.config = config = self._config(
            sum(p.numel() for p in step.parameters() if p.requires_grad)
        )
        parsed = _parse(config)
        if self.stage == 3:
            self._cut(step, config)
        self.optimizer = optimizer(param_groups(step, self.weight_decay))
        self.scheduler = scheduler(self.optimizer)
        self.module = _zero_alone(
            deepspeed.DeepSpeedEngine
        )(  # as deepspeed.initialize does for such a model
            args=None,
            model=step,
            optimizer=self.optimizer,
            dist_init_required=False,
            config=config,
            config_class=parsed,
        )
        self.zero: Any = self.module.optimizer
        self.saved = step.saved()
        if self.stage == 3:
            self._register_heads(step)

    # --- wrapping ---------------------------------------------------------------------------------

    def _config(self, trained: int) -> dict[str, Any]:
        """Return DeepSpeed's config: the user's file, overridden by the settings. trained: the
        number of trainable elements.
        """
        config = _without_auto(copy.deepcopy(self.settings.deepspeed_config or {}))
        # a rule of the settings has compared them
        for ours in ("optimizer", "scheduler", "bf16", "fp16"):
            config.pop(ours, None)
        zero = config.setdefault("zero_optimization", {})
        zero["stage"] = self.stage
        on_gpu = self.world.device.type == "cuda"
        host = {"device": "cpu", "pin_memory": on_gpu}
        if self.settings.offload != "none":
            # elements updated at a time: torch's Adam copies each
            zero.setdefault("sub_group_size", 10**8)
            zero["offload_optimizer"] = {**host, **(zero.get("offload_optimizer") or {})}
        if self.settings.offload == "parameters":
            zero["offload_param"] = {**host, **(zero.get("offload_param") or {})}
        if self.settings.bucket_size is not None:
            zero["reduce_bucket_size"] = self.settings.bucket_size
        if self.settings.overlap_comm is not None or not on_gpu:
            # on a CPU there are no streams
            zero["overlap_comm"] = bool(self.settings.overlap_comm) and on_gpu
        # DeepSpeed allocates a whole bucket even if there is less to reduce
        zero.setdefault("reduce_bucket_size", max(1, min(5 * 10**8 if on_gpu else 10**7, trained)))
        config |= {
            # the boundary is set explicitly and the loss divided by the global count, so these must
            # divide by 1
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "train_batch_size": self.world.size,
            "gradient_clipping": 0.0,  # the default 1.0 would clip
            "zero_allow_untested_optimizer": True,
            # it takes minutes to compile, and is not the settings' optimizer
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 10**12,
        }
        if self.precision == "bf16":
            config["bf16"] = {"enabled": True}
        if self.precision == "fp16":
            config["fp16"] = {"enabled": True, "loss_scale": 1.0}  # the scale is ours
        # DeepSpeed's default is the dtype of the weights, in which sums lose small gradients
        types = config["data_types"] = config.get("data_types") or {}
        if not types.get("grad_accum_dtype") or self.precision != "bf16":
            types["grad_accum_dtype"] = "fp32"
        if is_16_bit(self.precision):
            config.setdefault("communication_data_type", "fp32")
        return config

    @property
    def types(self) -> Types:
        types = super().types
        if not is_16_bit(self.precision):
            return types
        added, sent = (
            self.config["data_types"]["grad_accum_dtype"],
            self.config["communication_data_type"],
        )
        return types._replace(
            weights=f"{self.precision} (a rank's part also in {types.weights})",
            arithmetic=self.precision,
            gradients=added if added == sent else f"{added} (sent in {sent})",
        )

    def _cut(self, step: PairStep, config: dict[str, Any]) -> None:
        """Shard the weights one at a time, so that no rank holds more than one of them whole."""
        from deepspeed import zero

        kept = dtype_of(self.precision)
        context = zero.Init(module=nn.Module(), config_dict_or_path=config, dtype=kept)
        for p in step.parameters():
            to = (
                kept
                if kept != torch.float32
                else (self.held if p.requires_grad else self.frozen_held)
            )
            p.data = p.data.to(to)
            context._convert_to_zero_parameters([p])
        # DeepSpeed does not move them when the weights are sharded already
        for buffer in step.buffers():
            buffer.data = buffer.data.to(self.world.device)

    def _register_heads(self, step: PairStep) -> None:
        """Gather the weights of the heads for the whole step, which reads them outside their
        modules.
        """
        from deepspeed import zero

        for model in (step.policy, getattr(step.reference, "model", None)):
            head: Any = model.get_output_embeddings() if model is not None else None
            for p in head.parameters() if head is not None else ():
                if hasattr(p, "ds_id"):
                    zero.register_external_parameter(step, p)

    # --- a step -----------------------------------------------------------------------------------

    def _before_micro_step(self, last: bool) -> None:
        self.module.set_gradient_accumulation_boundary(last)

    def _backward(self, loss: torch.Tensor) -> None:
        # undoes DeepSpeed's average over ranks; in fp16, whose range is too small, unscaling undoes
        # it later
        self.module.backward(loss if self.precision == "fp16" else loss * self.world.size)

    def _gradients(self) -> list[torch.Tensor]:
        if self.stage < 3 and self.zero.cpu_offload:
            # into pinned memory, which would be read too early
            self.zero._wait_for_offload_copies()
        if self._masters()[0].grad is not None:  # offloaded gradients are beside their weights
            return [master.grad for master in self._masters() if master.grad is not None]
        parts = self.zero.averaged_gradients.values()
        return [
            gradient
            for part in parts
            if part is not None
            for gradient in part
            if gradient is not None
        ]

    def _update(self) -> None:
        self.zero.step()
        if self.zero.overflow:  # the same on all ranks
            raise RuntimeError("DeepSpeed dropped a finite gradient: its norm overflows fp32")
        self.zero.zero_grad(set_to_none=True)

    def drop_gradients(self) -> None:
        zero = self.zero
        zero.zero_grad(set_to_none=True)
        if self.stage == 3:
            zero._pre_step()
            zero._partition_all_parameters()
            zero._overflow_clean_up(1.0)
            return
        zero.micro_step_id = -1
        zero._release_preflattened_grad_buffers()
        if zero.cpu_offload:
            zero._offload_accumulated_param_ids = set()
            zero.reset_cpu_buffers()
        for group in zero.averaged_gradients:
            zero.averaged_gradients[group] = None
        for group in zero.all_grad_tensors:
            zero.all_grad_tensors[group] = None

    def close(self) -> None:
        self.module.destroy()  # its hooks hold the engine, which holds the weights
        _forget()

    def release(self) -> None:
        if self.stage == 3:
            # otherwise the model stays gathered until the next backward pass
            self.module.empty_partition_cache()

    # --- shards on this rank ----------------------------------------------------------------------

    def _masters(self) -> list[torch.Tensor]:
        """Return the flat weights that the optimizer updates on this rank, by group."""
        return (
            self.zero.fp32_partitioned_groups_flat
            if self.stage == 3
            else self.zero.single_partition_of_fp32_groups
        )

    def _fragments(self) -> Iterator[Fragment]:
        find = self._cut_fragment if self.stage == 3 else self._flat_fragment
        groups = {p: group for group, params in enumerate(self._groups()) for p in params}
        for index, (name, p) in enumerate(self.saved.items()):
            if p in groups or hasattr(p, "ds_id"):
                if (fragment := find(name, p, groups.get(p))) is not None:
                    yield fragment
            else:  # whole on every rank
                deals = index % self.world.size == self.world.rank
                yield Fragment(
                    name, tuple(p.shape), 0, p.numel(), p.detach().view(-1), None, 0, deals
                )

    def _groups(self) -> list[list[torch.Tensor]]:
        return self.zero.fp16_groups if self.stage == 3 else self.zero.bit16_groups

    def _flat_fragment(self, name: str, p: Any, group: int | None) -> Fragment | None:
        """Return this rank's range in stages 1 and 2: all weights of a group are concatenated and
        split evenly.
        """
        if p._hp_mapping is None or group is None:
            return None
        lp, hp = p._hp_mapping.lp_fragment_address, p._hp_mapping.hp_fragment_address
        master = self._masters()[group]
        weight = master.detach()[hp.start : hp.start + hp.numel]
        return Fragment(
            name, tuple(p.shape), lp.start, lp.start + lp.numel, weight, master, hp.start, True
        )

    def _cut_fragment(self, name: str, p: Any, group: int | None) -> Fragment | None:
        """Return this rank's range in stage 3: each weight is split evenly, and its last part
        padded.
        """
        each = p.ds_tensor.numel()
        start, stop = (min(at * each, p.ds_numel) for at in (self.world.rank, self.world.rank + 1))
        if start == stop:
            return None
        if group is None:
            weight, master, offset = p.ds_tensor.data.view(-1), None, 0
        else:
            _, offset, _ = self.zero.grad_position[self.zero.get_param_id(p)]
            master = self._masters()[group]
            weight = master.detach()[offset:]
        return Fragment(
            name, tuple(p.ds_shape), start, stop, weight[: stop - start], master, offset, True
        )

    def _after_loading(self) -> None:
        if self.stage < 3:
            self.zero.update_lp_params()
            return
        self.module.empty_partition_cache()
        for group in range(len(self._masters())):
            self.zero._reassign_or_swap_out_partitioned_parameters(group)
        self._gather_small()

    def _gather_small(self) -> None:
        """Gather the small weights, which DeepSpeed keeps gathered, again from their new parts."""
        if small := self.zero.persistent_parameters:
            small[0].partition(small, has_been_updated=False)
            small[0].all_gather(small)

    @torch.no_grad()
    def sync_reference(self, alpha: float) -> None:
        weights: dict[str, Any] = dict(self.step.policy.named_parameters(remove_duplicate=False))
        if self.stage < 3:
            return self.step.sync_reference(weights, alpha)
        if not len(self.step.reference_modules):
            return self.step.sync_reference(_Gathered(weights), alpha)
        shards = {name: _shard_of(weight) for name, weight in weights.items()}
        self.step.sync_reference(shards, alpha, _shard_of)
        self.module.empty_partition_cache()
        return self._gather_small()


def _shard_of(weight: Any) -> torch.Tensor:
    """Return the part of a weight that this rank holds."""
    return weight.ds_tensor.data


class _Gathered(dict[str, Any]):
    """Sharded weights by name, each gathered on access. Collective."""

    def __getitem__(self, name: str) -> torch.Tensor:
        from deepspeed import zero

        p = super().__getitem__(name)
        with zero.GatheredParameters([p]):
            return p.detach().clone()


def _imported(world: World) -> Any:
    """Import DeepSpeed, set its device and group of ranks, and keep it from compiling on a CPU."""
    # DeepSpeed selects the device by this variable; Ray shows a worker only its own GPU, so ours
    # may differ
    os.environ["LOCAL_RANK"] = str(world.device.index or 0)
    if world.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    # afterwards `deepspeed.comm.torch` is another object; see sys.modules below
    import deepspeed.comm.torch

    if world.device.type == "cpu":
        # an operator for ranks on one machine, which takes minutes to compile at the first start
        comm: Any = sys.modules["deepspeed.comm.torch"]
        comm.build_shm_op = lambda: None
        # DeepSpeed refuses fp16 where oneDNN has no fp16 kernels for the CPU (AVX512-FP16). torch
        # computes every operator in fp16 on any CPU, and DeepSpeed calls no kernel of its own here.
        accelerator: Any = deepspeed.accelerator.get_accelerator()
        accelerator.is_fp16_supported = lambda: True
    # use our group of all ranks: DeepSpeed would create another one with its own time-out
    groups: Any = deepspeed.utils.groups
    groups._WORLD_GROUP = torch.distributed.group.WORLD  # pyright: ignore
    deepspeed.init_distributed(
        "nccl" if world.device.type == "cuda" else "gloo", dist_init_required=False
    )
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # names it still calls
    warnings.filterwarnings("ignore", message=".*is deprecated", module="torch.distributed")
    return deepspeed


def _check_precision(precision: Precision, device: torch.device, accelerator: Any) -> None:
    """Check that DeepSpeed supports this precision on this device, its accelerator.

    Raises:
        UserError: fp16 on a GPU before Volta.
    """
    if precision == "fp16" and not accelerator.is_fp16_supported():
        rule = f"DeepSpeed does not support fp16 on {device_name(device)}"
        raise UserError(
            "precision", precision, rule, "set precision=fp32, or engine.kind=ddp or fsdp"
        )


def _forget() -> None:
    """Undo DeepSpeed's changes for the next run in this process: drop its groups of ranks, which
    end with this run, and restore torch's linear, whose replacement in stage 3 keeps gathered
    weights until the backward pass.
    """
    from deepspeed.runtime.zero import partition_parameters
    from deepspeed.utils import groups

    groups._release_process_group_references()
    if (
        linear := getattr(
            partition_parameters.InsertPostInitMethodToModuleSubClasses, "linear_bk", None
        )
    ) is not None:
        nn.functional.linear = linear


def _parse(config: dict[str, Any]) -> Any:
    """Parse the config with DeepSpeed.

    Raises:
        UserError: DeepSpeed rejects a value of the user's file.
    """
    from deepspeed.runtime.config import DeepSpeedConfig

    try:
        return DeepSpeedConfig(config)
    except Exception as error:  # pydantic's errors, and several types of DeepSpeed's
        reason = message_of(error)
        cure = "fix that value in the file"
        raise UserError(
            "engine.deepspeed_config", config, f"DeepSpeed rejects it: {reason}", cure
        ) from None


def _zero_alone(engine: Any) -> Any:
    """Return DeepSpeed's engine class, restricted to one kind of optimizer wrapper. For bf16 in
    stage 1 it would use another one with other names and rules, but no feature that we use.
    """

    class ZeroAlone(engine):
        def _do_optimizer_sanity_check(self, basic_optimizer: Any) -> str:
            return "zero_optimization"

    return ZeroAlone


def _without_auto(value: Any) -> Any:
    """Return a user's file without the keys set to "auto"."""
    if isinstance(value, dict):
        return {key: _without_auto(item) for key, item in value.items() if item != "auto"}
    return value
