"""The Megatron-Core model of one pipeline stage: built from a family's settings, judged by an objective."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group
from torch import Tensor

from megaswift.megatron import compat
from megaswift.megatron.compat import mark_split
from megaswift.megatron.experts import tell_layers
from megaswift.megatron.gated_delta_net import GatedDeltaNet
from megaswift.megatron.kernels.activation_offload import offload_activations
from megaswift.megatron.kernels.attention import describe
from megaswift.megatron.kernels.fp8_linear import Fp8LinearOps
from megaswift.megatron.kernels.linear_cross_entropy import IGNORED, linear_cross_entropy
from megaswift.megatron.kernels.linear_ops import PLAIN, LinearOps
from megaswift.megatron.kernels.megatron_layer import FusedMLP, fuse_embedding
from megaswift.megatron.kernels.sequence_log_probability import sequence_log_probabilities
from megaswift.megatron.kernels.sequence_scores import ScoreLayer, pooled_states
from megaswift.megatron.kernels.swiglu import gelu_tanh
from megaswift.megatron.layer_specs import SequenceLayout, block_spec
from megaswift.megatron.router import Counted
from megaswift.models import family_of
from megaswift.models.family import is_tied, padded_vocab
from megaswift.models.head import labels_of
from megaswift.models.kinds import ALPHA, MAIN, QUERIES, Factors, Kind
from megaswift.models.stages import stage_layers
from megaswift.run.spec import Memory, Parallel, Precision, Routing
from megaswift.weights.torch_dtypes import OF_FLAG, TORCH_DTYPES

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from megaswift.data.batches import MicroBatch
    from megaswift.megatron.graphs import Graphs
    from megaswift.megatron.kernels.context_parallel import Share
    from megaswift.megatron.lora_layers import Attached
    from megaswift.train.objectives import Loss, Objective

KEEP_ALL, AS_IT_IS, UNCHANGED = Memory(), Routing(), Factors()


@dataclass
class EngineConfig(TransformerConfig):
    """Megatron-Core's config, and what our layers ask for beside it."""

    attention: str = "fastest"  # see run.spec.Precision
    # Not Megatron-Core's own `fp8`, which asks for TransformerEngine.
    linear_ops: LinearOps = PLAIN
    plain_layers: bool = False  # every module is called, none fused with another, so that its weights can come and go
    routing_dtype: torch.dtype = torch.float32  # of the products by which tokens are routed


class ChatModel(GPTModel):
    """GPTModel whose forward takes a micro batch's fields and returns what an objective makes of its hidden states.

    Args:
        ropes: the tables that its layers rotate by, by name.
        true_vocab: tokens of the vocabulary, without padding.
        factors: what embeddings and logits are multiplied by, and how logits are capped.
        labels: scores of each sequence, by a head that takes the place of the output layer; None: it is a language model.
    """

    def __init__(
        self,
        *args: Any,
        ropes: Mapping[str, RotaryTable],
        true_vocab: int,
        factors: Factors = UNCHANGED,
        labels: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, position_embedding_type="none", **kwargs)
        self.labels = labels
        if labels is not None:
            factors = replace(factors, logits=1.0, logit_cap=None)  # transformers has neither for scores
            if self.post_process:
                del self.output_layer
                self.score = ScoreLayer(self.config.hidden_size, labels, self.config.params_dtype)
        self.ropes = ropes
        self.true_vocab = true_vocab
        self.embedding_factor, self.logits_factor, self.logit_cap = factors.embedding, factors.logits, factors.logit_cap
        if factors.embedding_rounded:
            self.embedding_factor = float(torch.tensor(factors.embedding, dtype=self.config.params_dtype, device="cpu"))
        self.graphs: Graphs | None = None  # set by the trainer
        self.adapter: Attached | None = None  # set where one is attached

    @property
    def first_layer(self) -> int:
        """The number of its first layer in the whole model."""
        return int(self.decoder.layers[0].layer_number) - 1

    def forward(  # type: ignore[override]
        self,
        tokens: Tensor,
        position_ids: Tensor,
        seq_lens: list[int] | None = None,
        share: Share | None = None,
        worth: Callable[[ChatModel, Tensor], Any] | None = None,
        counted: Callable[[], Counted] | None = None,
        origins: Tensor | None = None,
    ) -> Any:
        """One micro batch through this stage.

        Args:
            tokens, position_ids: [b, s].
            seq_lens: lengths of the samples packed into the one row.
            share: what part of the rows these are, where several ranks share them; it knows the samples itself.
            worth: what to make of the last stage's hidden states, called with this model; None asks for logits.
            counted: makes what routers are told of the micro batch; called where the model has experts.
            origins: [b, s], which tokens these are (see MicroBatch); only adapters that drop inputs ask.

        Returns:
            Hidden states [s, b, h] before the last stage; on it what `worth` returns, or logits [b, s, vocab of this rank].
        """
        hidden = self.embedding(input_ids=tokens, position_ids=position_ids) if self.pre_process else None
        if hidden is not None and self.embedding_factor != 1.0:
            hidden = hidden * self.embedding_factor
        tables = {name: rope(position_ids, self.config.params_dtype) for name, rope in self.ropes.items()}
        layout = SequenceLayout(tables=tables, seq_lens=seq_lens, share=share)
        if counted is not None and self.config.num_moe_experts:
            layout.counted = counted()
        if self.adapter is not None and self.training:
            layout.token_keys = self.adapter.keys_of(origins)
        if seq_lens is not None:
            borders = torch.tensor([0, *seq_lens], dtype=torch.int32).cumsum(0, dtype=torch.int32)
            layout.cu_seqlens_q, layout.max_seqlen_q = borders.to(tokens.device, non_blocking=True), max(seq_lens)
        if self.graphs is None or hidden is None:
            hidden = self.decoder(hidden_states=hidden, attention_mask=None, packed_seq_params=layout)
        else:
            hidden = self.graphs(hidden, layout)
        if not self.post_process:
            return hidden
        return self._logits(hidden) if worth is None else worth(self, hidden)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: Any = None) -> Any:
        """Megatron-Core's description of what is saved: of an adapter's run the adapter alone."""
        if self.adapter is not None:
            return self.adapter.sharded_state_dict(self, prefix)
        if self.labels is not None:  # what GPTModel and LanguageModule do beyond this is about an output layer
            metadata = ensure_metadata_has_dp_cp_group(metadata)
            return super(LanguageModule, self).sharded_state_dict(prefix, sharded_offsets, metadata)
        return super().sharded_state_dict(prefix, sharded_offsets, metadata)

    def attention_kernel(self, packed: bool) -> str:
        """What attends on this GPU, in words; `packed`: rows hold several samples. Compiles the kernels where that is needed."""
        config = self.config
        if config.deterministic_mode or config.attention != "fastest":
            return "PyTorch's " + ("plain operations" if config.attention == "plain" else "flash kernel")
        heads, groups = (
            max(n // config.tensor_model_parallel_size, 1) for n in (config.num_attention_heads, config.num_query_groups)
        )
        query = torch.empty((2, 2, heads, config.kv_channels), dtype=config.params_dtype, device="cuda")
        packed = packed or config.context_parallel_size > 1
        attending = [layer for layer in self.decoder.layers if type(layer.self_attention) is not GatedDeltaNet]
        cores = [layer.self_attention.core_attention for layer in attending]
        plain = describe(query, groups, packed=packed)
        special = [(core.window, core.score_cap, core.softmax_offset is not None) for core in cores]
        said = [] if all(map(any, special)) else [plain]
        if len(attending) < len(self.decoder.layers):
            delta = next(net.self_attention for net in self.decoder.layers if type(net.self_attention) is GatedDeltaNet)
            said.append(f"{delta.kernel()} in layers with linear attention")
        for window, cap, sinks in dict.fromkeys(one for one in special if any(one)):
            words = [f"windows of {window}"] * (window is not None) + [f"scores capped at {cap:g}"] * (cap is not None)
            words += ["sinks"] * sinks
            kernel = describe(query, groups, packed=packed, window=window is not None, cap=cap, sinks=sinks)
            said.append(f"{kernel} in layers with {' and '.join(words)}")
        return "; ".join(said)

    @property
    def head(self) -> torch.nn.Module:
        """What the last stage has after its layers: output layer, or head of scores."""
        return self.output_layer if self.labels is None else self.score

    def _weight(self) -> Tensor:
        return (
            self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else self.output_layer.weight
        )

    def summed_loss(self, hidden: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
        """Summed cross entropy, without ever holding the logits of all tokens; vocabulary padding takes no part.

        Args:
            hidden: [s, b, h] of the last stage, this rank's part under sequence parallelism.
            labels: [b, s], -100 where nothing is supervised.
            weights: [b, s] fp32, what the loss at each label is multiplied by; None: 1.

        Returns:
            fp32 scalar. It must be the loss itself: its gradient is made at once, as one of a plain sum.
        """
        config = self.config
        # What the schedule multiplies the loss by: Megatron's loss scale under fp16, else nothing.
        scale = config.grad_scale_func(torch.ones((), device=hidden.device)) if config.fp16 and config.grad_scale_func else 1.0
        factors = None if weights is None else weights.t()
        loss, _ = linear_cross_entropy(
            self._head_inputs(hidden), self._weight(), labels.t(), grad_scale=scale, factors=factors, **self._head()
        )
        return loss

    def token_losses(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """fp32 [s * b], the cross entropy at each label, without a gradient; 0 where there is none. Arguments as for `summed_loss`."""
        losses, _ = linear_cross_entropy(
            self._head_inputs(hidden), self._weight(), labels.t(), reduction="none", **self._head()
        )
        return losses

    def sequence_log_probabilities(
        self, hidden: Tensor, batch: MicroBatch, sequences: Tensor, count: int
    ) -> tuple[Tensor, Tensor]:
        """What any loss of whole sequences is a function of; the logits are never held, nor what is not supervised computed.

        Args:
            hidden: [s, b, h] of the last stage, this rank's part under sequence parallelism.
            batch: this rank's part under context parallelism.
            sequences: int64 [b, s], the sequence that each token belongs to; `count`: how many there are in the whole rows.

        Returns:
            fp32 [count], the log-probability of each sequence's labels, and fp32 [count], how many labels these are; both by
            the weights of the batch, and whole on every rank that shares the rows.
        """
        group = None if batch.share is None else batch.share.group
        numbers, factors = sequences.t().reshape(-1), None if batch.weights is None else batch.weights.t().reshape(-1)
        labels = batch.labels.t().reshape(-1)
        counted = (labels != IGNORED).double() if factors is None else factors.double()
        tokens = torch.zeros(count, dtype=torch.float64).index_add_(0, numbers, counted).to(hidden.device)
        if group is not None:
            dist.all_reduce(tokens, group=group)
        inputs, numbers = self._head_inputs(hidden), numbers.to(hidden.device, non_blocking=True)
        made = sequence_log_probabilities(
            inputs, self._weight(), labels, numbers, count, factors=factors, group=group, **self._head()
        )
        return made, tokens.float()

    def sequence_scores(self, hidden: Tensor, batch: MicroBatch, sequences: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """What the head of scores says of each sequence, by the state of the one token of it that the batch marks.

        Args:
            hidden, batch, sequences, count: as for `sequence_log_probabilities`.

        Returns:
            fp32 [count, labels], and bool [count], whether a sequence has such a token (what pads a row has none); both whole
            on every rank that shares the rows or the head's inputs.
        """
        assert batch.pooled is not None
        group = None if batch.share is None else batch.share.group
        marked = batch.pooled.t().reshape(-1)
        places = marked.nonzero().squeeze(1)
        numbers = sequences.t().reshape(-1)[places]
        there = torch.zeros(count, dtype=torch.float32).index_fill_(0, numbers, 1.0).to(hidden.device)
        if group is not None:
            dist.all_reduce(there, group=group)
        tp_group = self.tp_group if self.config.sequence_parallel else None
        states = pooled_states(hidden, places.to(hidden.device), numbers.to(hidden.device), count, tp_group, group)
        return self.score(states), there > 0

    def _head_inputs(self, hidden: Tensor) -> Tensor:
        """[s * b, h], the same on every tensor-parallel rank."""
        if self.logits_factor != 1.0:
            hidden = hidden * self.logits_factor
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden)  # its backward pass sums and scatters
        return hidden.reshape(-1, hidden.shape[-1])

    def _head(self) -> dict[str, Any]:
        """What the head's kernel is told about this rank's part of the output layer."""
        return dict(
            vocab_start=self.tp_group.rank() * self._weight().shape[0],
            vocab_size=self.true_vocab,
            tp_group=self.tp_group if self.tp_group.size() > 1 else None,
            reduce_hidden_grad=not self.config.sequence_parallel,
            shared_with_embedding=self.share_embeddings_and_output_weights and self.pre_process,
            cap=self.logit_cap,
        )

    def _logits(self, hidden: Tensor) -> Tensor:
        """Logits [b, s, vocabulary of this rank], those of vocabulary padding the smallest number; of a head of scores [b, s, labels]."""
        if self.labels is not None:
            scores: Tensor = self.score(hidden)
            return scores.transpose(0, 1)
        tied = self.share_embeddings_and_output_weights
        if self.logits_factor != 1.0:
            hidden = hidden * self.logits_factor
        logits, _ = self.output_layer(hidden, weight=self.shared_embedding_or_output_weight() if tied else None)
        if self.logit_cap is not None:
            logits = torch.tanh(logits / self.logit_cap) * self.logit_cap
        padding = (
            torch.arange(logits.shape[-1], device=logits.device) + self.tp_group.rank() * logits.shape[-1] >= self.true_vocab
        )
        return logits.masked_fill(padding, torch.finfo(logits.dtype).min).transpose(0, 1)


class RotaryTable:
    """Rotation angles of the Hugging Face config's RoPE type.

    The frequencies come from transformers itself, so that every type means here what it means there. `dynamic` changes
    them only beyond max_position_embeddings, longrope beyond its original length, and the plan refuses samples that long.

    Args:
        name: MAIN, or the layer type whose entry of rope_parameters is meant; QUERIES: MAIN for queries that are multiplied by
            1 + llama_4_scaling_beta * log(1 + position // original length), as transformers' Ministral 3 has it; ALPHA: the
            default with the base theta * alpha ^ (d / (d - 2)), as its HunYuan has it.
    """

    dtype: torch.dtype | None = None  # of cos and sin, where it is not the model's

    def __init__(self, config: PreTrainedConfig, device: torch.device, name: str = MAIN) -> None:
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        one = name in (MAIN, QUERIES, ALPHA)
        parameters = config.rope_parameters if one else config.rope_parameters[name]
        rope_type = parameters.get("rope_type", "default")
        if rope_type == "default" or name == ALPHA:
            size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
            base = parameters["rope_theta"] * (parameters["alpha"] ** (size / (size - 2)) if name == ALPHA else 1)
            size = int(size * (parameters.get("partial_rotary_factor") or 1.0))
            exponents = torch.arange(0, size, 2, dtype=torch.int64).float() / size
            inverse, self.scale = 1.0 / (base**exponents), 1.0
        else:
            layer_type = None if one else name
            inverse, self.scale = ROPE_INIT_FUNCTIONS[rope_type](config, torch.device("cpu"), layer_type=layer_type)
        self.inverse = inverse.to(device)
        self.growth: tuple[float, int] | None = None
        if name == QUERIES:
            self.growth = parameters["llama_4_scaling_beta"], parameters["original_max_position_embeddings"]

    def __call__(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin, each [s, b, 1, features that rotate], for positions [b, s]."""
        positions = position_ids.transpose(0, 1).float().unsqueeze(-1)
        angles = positions * self.inverse
        angles, dtype = torch.cat((angles, angles), dim=-1).unsqueeze(2), self.dtype or dtype
        scale: Any = self.scale
        if self.growth is not None:
            beta, length = self.growth
            scale = scale * (1 + beta * torch.log(1 + torch.floor(positions / length))).unsqueeze(2)
        return (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)


class Chunks(torch.nn.ModuleList):
    """Several ChatModels of one process, first to last; what saves, loads and counts weights takes it as one model.

    Virtual stages are numbered in the order of the computation: chunk c of pipeline rank r is stage c * pp + r. Names of
    parameters begin with the chunk's number; keys in a checkpoint do not, since they count layers over the whole model.
    """

    @property
    def adapter(self) -> Attached | None:
        """What the first chunk has of an adapter; all have one or none."""
        return chunks_of(self)[0].adapter

    @property
    def config(self) -> TransformerConfig:
        """The one that all chunks share."""
        first: Any = self[0]
        return first.config

    def sharded_state_dict(self, prefix: str = "", **options: Any) -> dict[str, Any]:
        """Megatron-Core's sharded state dict of all chunks; `load_state_dict` takes the same names."""
        whole: dict[str, Any] = {}
        for number, chunk in enumerate(chunks_of(self)):
            part = chunk.sharded_state_dict(prefix="", **options)
            whole |= {f"{prefix}{number}.{name}": item for name, item in part.items()}
        return whole


def chunks_of(model: ChatModel | Chunks) -> list[ChatModel]:
    """The chunks of a process, first to last: mostly one."""
    return list(model) if isinstance(model, Chunks) else [model]  # type: ignore[arg-type]


def rotary_tables(config: PreTrainedConfig, kinds: Sequence[Kind], device: torch.device) -> dict[str, RotaryTable]:
    """Every table that layers of these kinds rotate by."""
    wanted = {kind.rotation for kind in kinds} | {kind.query_rotation for kind in kinds}
    names = sorted(name for name in wanted if name is not None)
    tables = {name: RotaryTable(config, device, name) for name in names}
    for table in tables.values() if family_of(config.model_type).rotates_in_fp32 else ():
        table.dtype = torch.float32
    return tables


def transformer_config(
    config: PreTrainedConfig,
    parallel: Parallel,
    precision: Precision,
    memory: Memory = KEEP_ALL,
    routing: Routing = AS_IT_IS,
    plain_layers: bool = False,
) -> EngineConfig:
    """Megatron-Core's config of a model in a layout: what holds for all its layers."""
    family, dtype = family_of(config.model_type), TORCH_DTYPES[precision.dtype]
    kinds = family.layers(config)
    whole_layers = dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    return EngineConfig(
        **family.settings(config) | _settings_of(kinds, family.settings(config)),
        **(whole_layers if memory.recompute == "layers" else {}),
        **_expert_settings(kinds, parallel, routing),
        # Where any layer has these norms their gradients are summed over tensor-parallel ranks.
        qk_layernorm=any(kind.qk_norm_rotated or (kind.qk_norm and not kind.qk_norm_over_heads) for kind in kinds),
        hetereogenous_dist_checkpoint=family.is_mixed(config),
        pipeline_model_parallel_layout=pipeline_layout(config, parallel.pp, parallel.vpp),
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        virtual_pipeline_model_parallel_size=parallel.vpp if parallel.vpp > 1 else None,
        context_parallel_size=parallel.cp,
        sequence_parallel=parallel.sequence_parallel,
        variable_seq_lengths=parallel.pp > 1,
        moe_token_dispatcher_type="alltoall",  # Megatron-Core asks for it with variable lengths, experts or not
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=precision.dtype == "bf16",
        fp16=precision.dtype == "fp16",
        apply_query_key_layer_scaling=precision.dtype == "fp16",
        use_cpu_initialization=not torch.cuda.is_available(),
        perform_initialization=False,
        calculate_per_token_loss=True,
        deterministic_mode=precision.deterministic,
        # Chunks that take turns receive from both neighbours, which are one at pp 2: what is sent in a batch would be mixed up.
        overlap_p2p_comm=parallel.vpp > 1,
        batch_p2p_comm=torch.cuda.is_available() and parallel.vpp == 1,
        attention=precision.attention,
        linear_ops=Fp8LinearOps() if precision.fp8 else PLAIN,
        plain_layers=plain_layers,
        routing_dtype=dtype if routing.router_dtype == "none" else OF_FLAG[routing.router_dtype],
    )


def _settings_of(kinds: Sequence[Kind], settings: Mapping[str, Any]) -> dict[str, Any]:
    """What Megatron-Core's config says of all layers at once, and ours have by their kinds.

    Raises ValueError for layers that differ in it.
    """
    (alike,) = {(kind.activation, kind.mlp == "plain", kind.bias) for kind in kinds}
    activation, plain, bias = alike
    return dict(
        activation_func=ACTIVATIONS[activation],
        gated_linear_unit=not plain,
        add_bias_linear=bias,
        attention_output_gate=any(kind.output_gate for kind in kinds),
        add_qkv_bias=settings["add_qkv_bias"] or any(kind.qkv_bias for kind in kinds),
    )


def squared_relu(x: Tensor) -> Tensor:
    return F.relu(x).square()


# The functions behind the names in a Kind.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu_tanh": gelu_tanh, "relu2": squared_relu}


def _expert_settings(kinds: Sequence[Kind], parallel: Parallel, routing: Routing) -> dict[str, Any]:
    """What Megatron-Core is told of experts; our modules have the rest from each layer's kind."""
    experts = next((kind.experts for kind in kinds if kind.experts is not None), None)
    if experts is None:
        return {}
    return dict(
        num_moe_experts=experts.count,
        moe_ffn_hidden_size=experts.ffn,
        moe_router_topk=experts.chosen,
        moe_router_load_balancing_type="none",  # ours is made by our router, from these coefficients
        moe_aux_loss_coeff=routing.balance_loss,
        moe_z_loss_coeff=routing.z_loss or None,
        expert_model_parallel_size=parallel.ep,
        expert_tensor_parallel_size=parallel.etp,
    )


def pipeline_layout(config: PreTrainedConfig, pp: int, vpp: int = 1) -> list[list[str]] | None:
    """Megatron-Core's description of (virtual) stages with different numbers of layers; None where all have as many."""
    counts = stage_layers(config, pp, vpp)
    if len(set(counts)) == 1:
        return None
    stages = [["decoder"] * count for count in counts]
    return [["embedding", *stages[0]], *stages[1:-1], [*stages[-1], "loss"]]


def build(
    config: PreTrainedConfig,
    parallel: Parallel,
    precision: Precision,
    memory: Memory = KEEP_ALL,
    routing: Routing = AS_IT_IS,
    vocab_rows: int | None = None,
    packed: bool = False,
) -> ChatModel | Chunks:
    """The model of this process's pipeline stage and tensor-parallel part, its weights not yet loaded (zeros).

    Args:
        vocab_rows: rows of the embedding over all ranks, padding included; None: the fewest that tp can split.
        packed: linear layers and experts hold frozen weights in few bits, which `packed_weights.fill` brings.

    Needs the process groups of `process_groups.joined`. Several chunks of a stage share one config.
    """
    megatron_config = transformer_config(config, parallel, precision, memory, routing)
    left, chunks = memory.offloaded_layers, []
    rows = vocab_rows or padded_vocab(config.vocab_size, parallel.tp)
    for number in range(parallel.vpp):
        chunks.append(_chunk(config, parallel, megatron_config, number, rows, left, packed))
        left -= min(left, len(chunks[-1].decoder.layers))
    return Chunks(chunks) if parallel.vpp > 1 else chunks[0]


def _chunk(
    config: PreTrainedConfig,
    parallel: Parallel,
    megatron_config: EngineConfig,
    number: int,
    vocab_rows: int,
    offloaded_layers: int,
    packed: bool,
) -> ChatModel:
    """One chunk of this process's stage; as many of its layers as it has, and no more than asked for, are offloaded."""
    from megatron.core import parallel_state

    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    stage = number * parallel.pp + parallel_state.get_pipeline_model_parallel_rank()
    counts = stage_layers(config, parallel.pp, parallel.vpp)
    first = sum(counts[:stage])
    kinds = family_of(config.model_type).layers(config)[first : first + counts[stage]]
    model = ChatModel(
        config=megatron_config,
        transformer_layer_spec=block_spec(kinds, packed),
        vocab_size=vocab_rows,
        max_sequence_length=config.max_position_embeddings,
        pre_process=stage == 0,
        post_process=stage == len(counts) - 1,
        vp_stage=number if parallel.vpp > 1 else None,
        share_embeddings_and_output_weights=is_tied(config),
        ropes=rotary_tables(config, kinds, device),
        true_vocab=config.vocab_size,
        factors=family_of(config.model_type).factors(config),
        labels=labels_of(config),
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()  # rows of vocabulary padding stay zero, whatever the checkpoint brings
    _mark_split_weights(model)
    tell_layers(model.decoder.layers)
    if megatron_config.recompute_granularity == "full":
        compat.recompute_layers(model.decoder)
    if offloaded_layers:
        offload_activations(model.decoder, min(offloaded_layers, len(kinds)))
    return fuse_embedding(model.to(device))


def _mark_split_weights(model: torch.nn.Module) -> None:
    """Tell the gradient norm which weights are split over tensor-parallel ranks.

    Megatron-Core marks them while it initialises them, which is skipped here since every value comes from a checkpoint.
    It is the weight that is split, whatever a subclass computes with it: subclasses are meant too.
    """
    for module in model.modules():
        if isinstance(module, (ColumnParallelLinear, VocabParallelEmbedding)) and module.weight is not None:
            mark_split(module.weight, 0)
        elif isinstance(module, RowParallelLinear) and module.weight is not None:
            mark_split(module.weight, 1)


def recompute_parts(model: ChatModel | Chunks, parts: str) -> None:
    """Let the MLPs compute parts again in the backward pass.

    Args:
        parts: "swiglu": 2 x ffn bytes a token and layer less, nearly free; "mlp": 4 x ffn more, for the first product again;
            else neither.
    """
    for module in model.modules():
        if type(module) is FusedMLP:
            module.recompute_activation = parts in ("swiglu", "mlp")
            module.recompute_first = parts == "mlp"


def run_micro_batch(model: Any, batch: MicroBatch, objective: Objective) -> Any:
    """A micro batch through (a wrapper of) ChatModel: hidden states before the last stage, on it the objective's Loss."""
    seq_lens = None if batch.cu_seqlens is None else batch.cu_seqlens.diff().tolist()
    worth = partial(_worth, objective, batch)
    return model(
        batch.tokens, batch.position_ids, seq_lens, batch.share, worth, partial(_counted, batch, objective), batch.origins
    )


def _counted(batch: MicroBatch, objective: Objective) -> Counted:
    """What routers are told of a micro batch; its weight is what the objective divides by."""
    return Counted(batch.padding, objective.weight(batch))


def _worth(objective: Objective, batch: MicroBatch, model: ChatModel, hidden: Tensor) -> Loss:
    return objective.micro_batch(model, hidden, batch)


__all__ = ["ChatModel", "EngineConfig", "RotaryTable", "build", "rotary_tables", "run_micro_batch", "transformer_config"]
