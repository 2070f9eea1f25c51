"""Every change that we make to third parties, each with its reason and what would remove it.

Megatron-Core 0.16.1 names the CUDA device in about 130 places. On a machine without a GPU the `cpu_engine` context
answers those calls with the CPU, so that the same engine code runs over gloo. `quiet` silences messages about optional
packages, which a user of this product can do nothing about.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

from megaswift.megatron.kernels.recompute import again
from megaswift.megatron.optimizer import AdamW
from megaswift.weights.torch_dist.guard import load_index, load_object

_DTYPE_NAMES = {
    torch.float32: "torch.cuda.FloatTensor",
    torch.bfloat16: "torch.cuda.BFloat16Tensor",
    torch.float16: "torch.cuda.HalfTensor",
}


class _CudaMeansCpu(TorchFunctionMode):
    """Rewrites device="cuda" to the CPU in every torch call.

    Reason: schedules, gradient scaler, clipping and buffers of Megatron-Core allocate with the literal "cuda".
    Removed by: a Megatron-Core release that takes its device from one place.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if device is not None and (device == "cuda" or getattr(device, "type", None) == "cuda"):
            kwargs = {**kwargs, "device": "cpu"}
        return func(*args, **kwargs)


class _NullStream:
    """Stands in for a CUDA stream or event: on the CPU everything already runs in order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __enter__(self) -> _NullStream:
        return self

    def __exit__(self, *exc: Any) -> None: ...

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None


def _type_name(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
    """Tensor.type() under the CUDA names: the distributed optimizer sorts parameters by them."""
    if dtype is None and self.dtype in _DTYPE_NAMES:
        return _DTYPE_NAMES[self.dtype]
    return _TENSOR_TYPE(self, dtype, *args, **kwargs) if dtype is not None else _TENSOR_TYPE(self)


_TENSOR_TYPE = torch.Tensor.type


def _unless_alone(collective: Any) -> Any:
    """A collective on a view of its own result: with one rank in the group there is nothing to do."""

    def call(output: torch.Tensor, source: torch.Tensor, *, group: Any, async_op: bool = False, **options: Any) -> Any:
        if dist.get_world_size(group) == 1 and not async_op:
            return None
        return collective(output, source, group=group, async_op=async_op, **options)

    return call


@contextlib.contextmanager
def cpu_engine() -> Iterator[None]:
    """Run Megatron-Core on the CPU inside this context; everything is put back at its end."""
    cpu = torch.device("cpu")
    null = _NullStream()
    replacements: list[tuple[Any, str, Any]] = [
        # The device that buffers are made on (param_and_grad_buffer.py, p2p_communication.py, rotary_pos_embedding.py).
        (torch.cuda, "current_device", lambda: cpu),
        # Waiting for a device (timers.py, p2p_communication.py); on the CPU there is nothing to wait for.
        (torch.cuda, "synchronize", lambda *args, **kwargs: None),
        (torch.cuda, "empty_cache", lambda: None),
        # Streams (param_and_grad_buffer.py, distributed_data_parallel.py).
        (torch.cuda, "Stream", _NullStream),
        (torch.cuda, "Event", _NullStream),
        (torch.cuda, "stream", lambda stream: contextlib.nullcontext()),
        (torch.cuda, "current_stream", lambda *args: null),
        (torch.cuda, "default_stream", lambda *args: null),
        # Random states (tensor_parallel/random.py): one generator serves the whole process on the CPU.
        (torch.cuda, "manual_seed", torch.manual_seed),
        (torch.cuda.random, "get_rng_state", lambda device=None: torch.get_rng_state()),
        (torch.cuda, "get_rng_state", lambda device=None: torch.get_rng_state()),
        # Copies to the device (language_module.py, grad_scaler.py).
        (torch.Tensor, "cuda", lambda self, *args, **kwargs: self),
        (torch.Tensor, "type", _type_name),
    ]
    import megatron.core.distributed.param_and_grad_buffer as buffers
    import megatron.core.tensor_parallel.random as megatron_random

    replacements.append((megatron_random, "_set_cuda_rng_state", lambda state, *args, **kwargs: torch.set_rng_state(state)))
    # The distributed optimizer's reduction and gathering: of one rank gloo copies all gradients, and all weights, twice,
    # into memory that it asks for anew in every step. NCCL does nothing then.
    for name in ("dist_reduce_scatter_func", "dist_all_gather_func"):
        replacements.append((buffers, name, _unless_alone(getattr(buffers, name))))
    saved = [(owner, name, getattr(owner, name)) for owner, name, _ in replacements]
    for owner, name, value in replacements:
        setattr(owner, name, value)
    try:
        with _CudaMeansCpu():
            yield
    finally:
        for owner, name, value in saved:
            setattr(owner, name, value)


class _NoMemory(TorchFunctionMode):
    """Puts what would be on a GPU, or is moved anywhere, on the meta device; what asks for the CPU by name stays there.

    Reason: Megatron-Core's layers name the device of their weights.
    Removed by: layers that take a default device.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs = {**kwargs, "device": "meta"}
        if func is torch.Tensor.to and args[0].is_meta:
            args = tuple("meta" if isinstance(one, (torch.device, str)) else one for one in args)
            kwargs = kwargs | {"device": "meta"} if "device" in kwargs else kwargs
        return func(*args, **kwargs)


@contextlib.contextmanager
def without_memory() -> Iterator[None]:
    """Tensors that are made in this context have a shape and no memory."""
    with torch.device("meta"), _NoMemory():
        yield


def join_nobody(world_size: int) -> None:
    """Be rank 0 of a process group whose other members are not there; torch has a backend for that, which sends nothing.

    Reason: it stands among torch's tools for its own tests.
    Removed by: a public name for it.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())


def use_our_adamw() -> None:
    """Let Megatron-Core build engine.optimizer.AdamW where it would look for apex's FusedAdam.

    Reason: without apex and TransformerEngine it builds an unfused torch.optim.AdamW, whose reshardable state it cannot
    load again (`step` is taken for a weight: KeyError in distrib_optimizer._set_main_param_and_optimizer_states).
    Removed by: a Megatron-Core release that takes the optimizer class as an argument.
    """
    import megatron.core.optimizer as megatron_optimizer
    from megatron.core.optimizer import distrib_optimizer

    if megatron_optimizer.Adam is AdamW:
        return
    megatron_optimizer.Adam = AdamW
    megatron_optimizer.USING_PYTORCH_OPTIMIZER = False
    distrib_optimizer.Adam = AdamW
    distrib_optimizer.HAVE_APEX_OR_TE = True
    distrib_optimizer.USING_APEX_OPTIMIZER = True


def become(built: Any, kind: type) -> Any:
    """Let an object that Megatron-Core built be of a class of ours from here on; returns it.

    Reason: Megatron-Core builds optimizers, the embedding and the block of layers of classes that it names itself. A wrapper
    would change the names in checkpoints, and what asks `isinstance`.
    Removed by: a Megatron-Core release that takes these classes as arguments.

    Args:
        kind: a subclass of the object's class, or of a parent of it where it replaces all that the class adds.

    Raises TypeError for any other class.
    """
    if not issubclass(kind, (type(built), *(parent for parent in type(built).__bases__ if parent is not object))):
        raise TypeError(f"a {type(built).__name__} cannot become a {kind.__name__}: they have no parent in common")
    built.__class__ = kind
    return built


# What a DistributedOptimizer keeps of a parameter, and where. Reason: its names for it are private, and what it offers
# gathers the state of all ranks. Removed by: a way to read and write what one rank holds.


def state_of_shard(optimizer: Any, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
    """Master weights and moments of what this rank's optimizer holds of a parameter."""
    return optimizer._get_main_param_and_optimizer_states(parameter)


def set_state_of_shard(optimizer: Any, parameter: torch.Tensor, states: dict[str, torch.Tensor]) -> None:
    """The inverse of `state_of_shard`."""
    optimizer._set_main_param_and_optimizer_states(parameter, states)


def weights_of_shard(optimizer: Any, parameter: torch.Tensor) -> torch.Tensor:
    """The flat stretch of the model's own weights, in their buffer, that this rank's optimizer updates."""
    place = optimizer._get_model_param_range_map(parameter)["gbuf_world_in_bucket"]
    buffer, _, bucket = optimizer.model_param_gbuf_map[parameter]
    return optimizer.buffers[buffer].buckets[bucket].param_data.view(-1)[place.start : place.end]


def wait_for_weights(wrapped: Any) -> Any:
    """A forward hook of the data-parallel wrapper: the module called waits until its own weights are gathered.

    Reason: the wrapper hangs it to modules that are called; our fused operations take weights from others.
    Removed by: a public way to wait for a parameter.
    """
    return wrapped._make_forward_pre_hook()


def guard_checkpoint_reads() -> None:
    """Let every load of a torch_dist checkpoint go through checkpoint.guard.

    Reason: torch 2.13 unpickles `.metadata` and byte items without restriction, so a checkpoint could run code.
    Removed by: a torch release whose FileSystemReader and DefaultLoadPlanner restrict both.
    """
    from pathlib import Path

    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, set_element
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import StorageMeta

    def read_metadata(self: FileSystemReader, *args: Any, **kwargs: Any) -> Any:
        metadata = load_index(Path(self._get_metadata_path(kwargs.get("rank"))))
        if getattr(metadata, "storage_meta", None) is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata

    def load_bytes(self: DefaultLoadPlanner, read_item: Any, value: Any) -> None:
        name = read_item.dest_index.fqn
        loaded = load_object(value.getvalue(), name)
        if self.flatten_state_dict:
            set_element(self.original_state_dict, self.mappings[name], loaded)
        else:
            self.state_dict[name] = loaded

    FileSystemReader.read_metadata = read_metadata  # type: ignore[method-assign]
    DefaultLoadPlanner.load_bytes = load_bytes  # type: ignore[method-assign]


def mlp_spec(module: Any, submodules: Any) -> Any:
    """A layer's MLP, in the form in which this version of Megatron-Core builds it.

    Reason: 0.16.1 wants a ModuleSpec; 0.19 calls what it is given, with arguments that a class's `as_mlp_submodule` takes.
    Removed by: nothing older than 0.19 being supported.
    """
    from megatron.core.transformer.spec_utils import ModuleSpec

    build = getattr(module, "as_mlp_submodule", None)
    return ModuleSpec(module=module, submodules=submodules) if build is None else partial(build, submodules=submodules)


def mark_split(weight: torch.Tensor, axis: int) -> None:
    """Mark a weight as cut over tensor-parallel ranks along an axis, unless it is marked.

    Reason: 0.16.1 marks weights while it initialises them only, later versions in any case, and none takes a second mark.
    Removed by: nothing older than 0.19 being supported.
    """
    from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes

    if not hasattr(weight, "tensor_model_parallel"):
        set_tensor_model_parallel_attributes(weight, True, axis, 1)
    elif not weight.tensor_model_parallel or weight.partition_dim != axis:  # type: ignore[attr-defined]
        raise AssertionError(f"a weight split along axis {axis} is marked otherwise by Megatron-Core")


def gradients_for_norm(optimizer: Any) -> list[torch.Tensor]:
    """The gradients of a rank's optimizer that count in the norm, each weight once.

    Reason: 0.19 has another name for it. Removed by: nothing older being supported.
    """
    name = "get_main_grads_for_grad_norm"
    return getattr(optimizer, name if hasattr(optimizer, name) else "get_grads_for_grad_norm")()


def let_groups_be_found(saved: Any, optimizer: Any) -> None:
    """Give the parameter groups of a checkpoint the rates of the optimizer that will load them.

    Reason: 0.19 finds the saved group of each of an optimizer's groups by everything that a user may set for a group, the
    rates among it, so that a run could not go on with another learning rate. Removed by: groups found by what they hold.

    Args:
        saved: what `optimizer.state_dict()` gave, one of a chain or a list of them; changed in place.
    """
    from megatron.core.optimizer.optimizer import param_group_identifier_keys as names

    kinds = ("wd_mult", "lr_mult", "is_expert_parallel", "is_decoupled_lr")  # all names that 0.16.1 has
    parts = saved if isinstance(saved, list) else [saved]
    for part, inner in zip(parts, optimizer.chained_optimizers, strict=True):
        ours = {tuple(group.get(name) for name in kinds): group for group in inner.param_groups}
        for group in part["optimizer"]["param_groups"]:
            found = ours.get(tuple(group.get(name) for name in kinds), {})
            group.update({name: found[name] for name in names if name not in kinds and name in found})


def without_hooks(module: Any) -> None:
    """Take all forward hooks off a module.

    Reason: torch takes a hook away by its handle only, and who set these keeps none. Removed by: a public way to clear them.
    """
    module._forward_pre_hooks.clear()
    module._forward_hooks.clear()


def quiet() -> None:
    """Silence, at their source, messages about packages that this product does not need."""
    for message in (
        r".*Apex is not installed.*",
        r".*Transformer Engine and Apex are not installed.*",
        r".*transformer_engine.*not.*installed.*",
        r".*nvidia_modelopt.*",
        r".*torch_npu.*",
        r".*(reduce_scatter_tensor|all_gather_into_tensor|_all_gather_base|_reduce_scatter_base).*",
        r".*\.grad attribute of a Tensor that is not a leaf.*",
        r".*TypedStorage is deprecated.*",
        r".*`load_state_dict` is deprecated.*",
        r".*CUDA_DEVICE_MAX_CONNECTIONS.*",
        r".*deprecating ShardedTensor.*",
        r".*full scope is deprecated.*",
        r".*pynvml package is deprecated.*",
        r".*is a no-op on.*CPU.*|.*CUDA is not available.*",
    ):
        warnings.filterwarnings("ignore", message=message)
    # torch.utils.cpp_extension: "No CUDA runtime is found", in the processes that are kept off the GPUs on purpose.
    for name in ("megatron", "torch.distributed", "torch.distributed.checkpoint", "nv_one_logger", "torch.utils.cpp_extension"):
        logging.getLogger(name).setLevel(logging.ERROR)


@contextlib.contextmanager
def modules_by_name() -> Iterator[None]:
    """Let PEFT take `target_modules` for names of modules, whatever the model.

    Reason: of models with experts 0.21 takes `gate_proj` and its like for the routed experts, so that an MLP that every token
    goes through can be named as a parameter only, which has no dropout. Removed by: a PEFT that tells them apart.
    """
    name = "peft.utils.transformers_weight_conversion.convert_peft_config_for_transformers"
    with mock.patch(name, lambda *_, **__: None):
        yield


def recompute_layers(block: Any) -> None:
    """Let a TransformerBlock whose layers are recomputed do it by `kernels.recompute`.

    Reason: its own way saves and restores random states, which costs time and cannot be captured as a CUDA graph.
    Removed by: a Megatron-Core whose checkpoint can leave them alone.
    """

    def forward(hidden_states: Any, attention_mask: Any, packed_seq_params: Any, **_: Any) -> Any:
        for layer in block.layers:

            def run(hidden: Any, layer: Any = layer) -> Any:
                return layer(hidden_states=hidden, attention_mask=attention_mask, packed_seq_params=packed_seq_params)[0]

            hidden_states = again(hidden_states, run)
        return hidden_states

    block._checkpointed_forward = forward
