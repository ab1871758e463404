"""DeepSpeed ZeRO, stages 1 to 3: it moves and cuts weights, gradients and state; scaling and clipping stay ours.

Private names of DeepSpeed's are used nowhere but here, under tests/contract/test_engines.py and an exact version: by
its public functions a state cannot be read or written per parameter with two groups, nor a gradient be dropped.
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
from orchestrator.settings.spec import Precision, UserError
from orchestrator.world import World


class DeepSpeedEngine(SteppingEngine):
    """Engine of base.py. In bf16 and fp16 the weights that compute are of that type, and each rank keeps its part of
    them in fp32 for the optimizer; gradients are added in fp32, over micro-batches and over ranks."""

    module: Any  # pyright: ignore[reportIncompatibleVariableOverride] - deepspeed's engine

    def wrap(self, step: PairStep, optimizer: OptimizerFactory, scheduler: SchedulerFactory) -> None:
        self.world.meet()
        deepspeed = _imported(self.world)
        _check_precision(self.precision, self.world.device, deepspeed.accelerator.get_accelerator())
        self.step = step
        self.averaged_over = self.world.size
        self.stage = self.settings.stage
        self.config = config = self._config(sum(p.numel() for p in step.parameters() if p.requires_grad))
        checked = _checked(config)
        if self.stage == 3:
            self._cut(step, config)
        self.optimizer = optimizer(param_groups(step, self.weight_decay))
        self.scheduler = scheduler(self.optimizer)
        self.module = _zero_alone(deepspeed.DeepSpeedEngine)(  # what deepspeed.initialize does for a model like ours
            args=None,
            model=step,
            optimizer=self.optimizer,
            dist_init_required=False,
            config=config,
            config_class=checked,
        )
        self.zero: Any = self.module.optimizer
        step.reference.were_wrapped()
        self.saved = step.saved()
        if self.stage == 3:
            self._register_heads(step)

    # --- wrapping ------------------------------------------------------------------------------------------------

    def _config(self, trained: int) -> dict[str, Any]:
        """What DeepSpeed is told: the user's file, and over it what the settings decide. trained: elements that are."""
        config = _without_auto(copy.deepcopy(self.settings.deepspeed_config or {}))
        for ours in ("optimizer", "scheduler", "bf16", "fp16"):  # compared with the settings by a rule of theirs
            config.pop(ours, None)
        zero = config.setdefault("zero_optimization", {})
        zero["stage"] = self.stage
        on_gpu = self.world.device.type == "cuda"
        host = {"device": "cpu", "pin_memory": on_gpu}
        if self.settings.offload != "none":
            zero.setdefault("sub_group_size", 10**8)  # elements updated at a time: torch's Adam makes copies of each
            zero["offload_optimizer"] = {**host, **(zero.get("offload_optimizer") or {})}
        if self.settings.offload == "parameters":
            zero["offload_param"] = {**host, **(zero.get("offload_param") or {})}
        if self.settings.bucket_size is not None:
            zero["reduce_bucket_size"] = self.settings.bucket_size
        if self.settings.overlap_comm is not None or not on_gpu:
            zero["overlap_comm"] = bool(self.settings.overlap_comm) and on_gpu  # on a CPU there are no streams
        # a bucket is allocated whole, however little there is to reduce
        zero.setdefault("reduce_bucket_size", max(1, min(5 * 10**8 if on_gpu else 10**7, trained)))
        config |= {
            # we say ourselves which micro-step is the last, and divide by the global count: these divide by 1
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "train_batch_size": self.world.size,
            "gradient_clipping": 0.0,  # without it 1.0 would clip
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,  # which would be compiled for minutes, and is not the one asked for
            "steps_per_print": 10**12,
        }
        if self.precision == "bf16":
            config["bf16"] = {"enabled": True}
        if self.precision == "fp16":
            config["fp16"] = {"enabled": True, "loss_scale": 1.0}  # the scale is ours
        # its own choice is the type of the weights, in which small gradients are lost when they are added
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
        added, sent = self.config["data_types"]["grad_accum_dtype"], self.config["communication_data_type"]
        return types._replace(
            weights=f"{self.precision} (a rank's part also in {types.weights})",
            arithmetic=self.precision,
            gradients=added if added == sent else f"{added} (sent in {sent})",
        )

    def _cut(self, step: PairStep, config: dict[str, Any]) -> None:
        """Cut the weights one at a time, so that no rank holds more than one of them whole."""
        from deepspeed import zero

        kept = dtype_of(self.precision)
        context = zero.Init(module=nn.Module(), config_dict_or_path=config, dtype=kept)
        for p in step.parameters():
            to = kept if kept != torch.float32 else (self.held if p.requires_grad else self.frozen_held)
            p.data = p.data.to(to)
            context._convert_to_zero_parameters([p])
        for buffer in step.buffers():  # which DeepSpeed leaves where they are when weights are cut already
            buffer.data = buffer.data.to(self.world.device)

    def _register_heads(self, step: PairStep) -> None:
        """Have the weights of the heads gathered for the whole of the step, which reads them outside their modules."""
        from deepspeed import zero

        for model in (step.policy, getattr(step.reference, "model", None)):
            head: Any = model.get_output_embeddings() if model is not None else None
            for p in head.parameters() if head is not None else ():
                if hasattr(p, "ds_id"):
                    zero.register_external_parameter(step, p)

    # --- a step --------------------------------------------------------------------------------------------------

    def _before_micro_step(self, last: bool) -> None:
        self.module.set_gradient_accumulation_boundary(last)

    def _backward(self, loss: torch.Tensor) -> None:
        # it will be averaged over ranks, which is undone: in fp16 when it is unscaled, for want of range before
        self.module.backward(loss if self.precision == "fp16" else loss * self.world.size)

    def _gradients(self) -> list[torch.Tensor]:
        if self.stage < 3 and self.zero.cpu_offload:
            self.zero._wait_for_offload_copies()  # into pinned memory, which we would read too early
        if self._masters()[0].grad is not None:  # offloaded, each is where its weights are
            return [master.grad for master in self._masters() if master.grad is not None]
        parts = self.zero.averaged_gradients.values()
        return [gradient for part in parts if part is not None for gradient in part if gradient is not None]

    def _update(self) -> None:
        self.zero.step()
        if self.zero.overflow:  # the same on all ranks
            raise RuntimeError("DeepSpeed has dropped a gradient that is finite: its norm overflows fp32")
        self.zero.zero_grad(set_to_none=True)

    def discard(self) -> None:
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
        self.module.destroy()  # its hooks hold it, and it the weights
        _forget()

    def release(self) -> None:
        if self.stage == 3:
            self.module.empty_partition_cache()  # else the model stays gathered until the next backward pass

    # --- who holds what ------------------------------------------------------------------------------------------

    def _masters(self) -> list[torch.Tensor]:
        """Flat weights that the optimizer updates on this rank, by group."""
        return self.zero.fp32_partitioned_groups_flat if self.stage == 3 else self.zero.single_partition_of_fp32_groups

    def _fragments(self) -> Iterator[Fragment]:
        find = self._cut_fragment if self.stage == 3 else self._flat_fragment
        groups = {p: group for group, params in enumerate(self._groups()) for p in params}
        for index, (name, p) in enumerate(self.saved.items()):
            if p in groups or hasattr(p, "ds_id"):
                if (found := find(name, p, groups.get(p))) is not None:
                    yield found
            else:  # whole on every rank
                deals = index % self.world.size == self.world.rank
                yield Fragment(name, tuple(p.shape), 0, p.numel(), p.detach().view(-1), None, 0, deals)

    def _groups(self) -> list[list[torch.Tensor]]:
        return self.zero.fp16_groups if self.stage == 3 else self.zero.bit16_groups

    def _flat_fragment(self, name: str, p: Any, group: int | None) -> Fragment | None:
        """Stages 1 and 2: all weights of a group in one row, cut evenly."""
        if p._hp_mapping is None or group is None:
            return None
        lp, hp = p._hp_mapping.lp_fragment_address, p._hp_mapping.hp_fragment_address
        master = self._masters()[group]
        weight = master.detach()[hp.start : hp.start + hp.numel]
        return Fragment(name, tuple(p.shape), lp.start, lp.start + lp.numel, weight, master, hp.start, True)

    def _cut_fragment(self, name: str, p: Any, group: int | None) -> Fragment | None:
        """Stage 3: each weight cut evenly, the last part padded."""
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
        return Fragment(name, tuple(p.ds_shape), start, stop, weight[: stop - start], master, offset, True)

    def _weights_were_put(self) -> None:
        if self.stage < 3:
            self.zero.update_lp_params()
            return
        self.module.empty_partition_cache()
        for group in range(len(self._masters())):
            self.zero._reassign_or_swap_out_partitioned_parameters(group)
        self._gather_small()

    def _gather_small(self) -> None:
        """Weights too small to be cut for each use are kept gathered: from their new parts."""
        if small := self.zero.persistent_parameters:
            small[0].partition(small, has_been_updated=False)
            small[0].all_gather(small)

    @torch.no_grad()
    def sync_reference(self, alpha: float) -> None:
        policys: dict[str, Any] = dict(self.step.policy.named_parameters(remove_duplicate=False))
        reference = self.step.reference
        if self.stage < 3:
            return reference.sync(policys, alpha)
        if not len(self.step.judge):
            return reference.sync(_Gathered(policys), alpha)
        for name, own in reference.moving().items():
            part: Any = own
            part.ds_tensor.data.mul_(1 - alpha).add_(policys[name].ds_tensor.data, alpha=alpha)
        self.module.empty_partition_cache()
        return self._gather_small()


class _Gathered(dict[str, Any]):
    """Weights that are cut, by name, each gathered when it is asked for. Collective."""

    def __getitem__(self, name: str) -> torch.Tensor:
        from deepspeed import zero

        p = super().__getitem__(name)
        with zero.GatheredParameters([p]):
            return p.detach().clone()


def _imported(world: World) -> Any:
    """The library, told which device and which ranks there are, and kept from compiling on a CPU."""
    # it takes the device by this number, which need not be ours where Ray shows a worker its own GPU alone
    os.environ["LOCAL_RANK"] = str(world.device.index or 0)
    if world.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    import deepspeed.comm.torch  # which `deepspeed.comm.torch` does not name afterwards

    if world.device.type == "cpu":
        # an operator for ranks of one machine, which takes minutes to compile at the first start
        sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # pyright: ignore[reportAttributeAccessIssue]
        # DeepSpeed refuses fp16 where oneDNN has no fp16 kernels for the CPU (AVX512-FP16). torch computes every
        # operator in fp16 on any CPU, and DeepSpeed calls no kernel of its own here.
        accelerator: Any = deepspeed.accelerator.get_accelerator()
        accelerator.is_fp16_supported = lambda: True
    # the group of all ranks itself, where it would make another one with a time-out of its own
    deepspeed.utils.groups._WORLD_GROUP = torch.distributed.group.WORLD  # pyright: ignore[reportPrivateImportUsage]
    deepspeed.init_distributed("nccl" if world.device.type == "cuda" else "gloo", dist_init_required=False)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*is deprecated", module="torch.distributed")  # names it still calls
    return deepspeed


def _check_precision(precision: Precision, device: torch.device, accelerator: Any) -> None:
    """Check that DeepSpeed trains in this precision on this device, its accelerator.

    Raises:
        UserError: it does not: fp16 on a GPU before Volta.
    """
    if precision == "fp16" and not accelerator.is_fp16_supported():
        rule = f"DeepSpeed does not train in fp16 on {device_name(device)}"
        raise UserError("precision", precision, rule, "set precision=fp32, or engine.kind=ddp or fsdp")


def _forget() -> None:
    """Undo for the next run in this process: groups of ranks, which end with this one, and the linear layer that stage
    3 puts in the place of torch's, which would keep gathered weights until the backward pass."""
    from deepspeed.runtime.zero import partition_parameters
    from deepspeed.utils import groups

    groups._release_process_group_references()
    if (linear := getattr(partition_parameters.InsertPostInitMethodToModuleSubClasses, "linear_bk", None)) is not None:
        nn.functional.linear = linear


def _checked(config: dict[str, Any]) -> Any:
    """The config as DeepSpeed reads it.

    Raises:
        UserError: it does not, for a value that is the user's.
    """
    from deepspeed.runtime.config import DeepSpeedConfig

    try:
        return DeepSpeedConfig(config)
    except Exception as error:  # pydantic's, and DeepSpeed's own of several types
        reason = " ".join(str(error).split())[:160]
        cure = "mend that value in the file"
        raise UserError("engine.deepspeed_config", config, f"DeepSpeed refuses it: {reason}", cure) from None


def _zero_alone(engine: Any) -> Any:
    """DeepSpeed's engine with one kind of optimizer wrapper: for bf16 at stage 1 it would take another one, with other
    names and rules, which differs in nothing that we use."""

    class ZeroAlone(engine):
        def _do_optimizer_sanity_check(self, basic_optimizer: Any) -> str:
            return "zero_optimization"

    return ZeroAlone


def _without_auto(value: Any) -> Any:
    """A user's file without the keys that it leaves to us or to DeepSpeed."""
    if isinstance(value, dict):
        return {key: _without_auto(item) for key, item in value.items() if item != "auto"}
    return value
