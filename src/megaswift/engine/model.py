"""The Megatron-Core model of one pipeline stage: built from a family's settings, returning the summed loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megaswift.engine.backend import PlainProvider, SequenceLayout, block_spec
from megaswift.families import family_of
from megaswift.families.base import is_tied

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from megaswift.data.batches import MicroBatch

TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class ModelOptions:
    """What a run decides about its model, beyond the Hugging Face config."""

    tp: int
    pp: int
    dtype: str
    padded_vocab: int
    sequence_parallel: bool = False
    recompute: bool = False
    deterministic: bool = False
    flash_attention: bool | None = None
    variable_lengths: bool = False


class ChatModel(GPTModel):
    """GPTModel whose forward takes a micro batch's fields and returns the loss summed over supervised tokens."""

    def __init__(self, *args: Any, rope: RotaryTable, true_vocab: int, **kwargs: Any) -> None:
        super().__init__(*args, position_embedding_type="none", **kwargs)
        self.rope = rope
        self.true_vocab = true_vocab

    def forward(  # type: ignore[override]
        self, tokens: Tensor, position_ids: Tensor, labels: Tensor | None = None, segments: list[int] | None = None
    ) -> Tensor:
        """One micro batch through this stage.

        Args:
            tokens, position_ids: [b, s].
            labels: [b, s], -100 where nothing is supervised; None asks for logits [b, s, vocab of this rank].
            segments: lengths of the samples packed into the one row.

        Returns:
            Hidden states [s, b, h] before the last stage; on it the summed loss (fp32 scalar) or the logits.
        """
        hidden = self.embedding(input_ids=tokens, position_ids=position_ids) if self.pre_process else None
        cos, sin = self.rope(position_ids, self.config.params_dtype)
        hidden = self.decoder(
            hidden_states=hidden,
            attention_mask=None,
            packed_seq_params=SequenceLayout(cos=cos, sin=sin, segments=segments),
        )
        if not self.post_process:
            return hidden
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        logits, _ = self.output_layer(hidden, weight=weight)
        logits = self._without_padding(logits)
        if labels is None:
            return logits.transpose(0, 1)
        return summed_loss(logits, labels.transpose(0, 1))

    def _without_padding(self, logits: Tensor) -> Tensor:
        """Logits of this rank's vocabulary part with padding rows out of the softmax."""
        rows = logits.shape[-1]
        first_padding = self.true_vocab - tensor_parallel_rank() * rows
        if first_padding >= rows:
            return logits
        is_padding = torch.arange(rows, device=logits.device) >= first_padding
        return logits.masked_fill(is_padding, torch.finfo(logits.dtype).min)


def tensor_parallel_rank() -> int:
    """This process's place in its tensor-parallel group."""
    from megatron.core import parallel_state

    return parallel_state.get_tensor_model_parallel_rank()


def summed_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy in fp32, summed over the tokens whose label is not -100.

    Args:
        logits: [s, b, vocabulary of this rank].
        labels: [s, b].
    """
    from megatron.core import parallel_state

    supervised = labels != -100
    targets = labels.masked_fill(~supervised, 0)
    if parallel_state.get_tensor_model_parallel_world_size() == 1:
        losses = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
    else:
        losses = vocab_parallel_cross_entropy(logits.float().contiguous(), targets.contiguous())
    return (losses * supervised).sum()


class RotaryTable:
    """Rotation angles of the Hugging Face config's RoPE type (default, linear, dynamic, llama3, yarn).

    The frequencies come from transformers itself, so that every type means here what it means there. `dynamic` changes
    them only beyond max_position_embeddings, and the plan refuses samples that long.
    """

    def __init__(self, config: PreTrainedConfig, device: torch.device) -> None:
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        rope_type = config.rope_parameters.get("rope_type", "default")
        if rope_type == "default":
            size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
            exponents = torch.arange(0, size, 2, dtype=torch.int64).float() / size
            inverse, self.scale = 1.0 / (config.rope_parameters["rope_theta"] ** exponents), 1.0
        else:
            inverse, self.scale = ROPE_INIT_FUNCTIONS[rope_type](config, torch.device("cpu"))
        self.inverse = inverse.to(device)

    def __call__(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin, each [s, b, 1, head_dim], for positions [b, s]."""
        angles = position_ids.transpose(0, 1).float().unsqueeze(-1) * self.inverse
        angles = torch.cat((angles, angles), dim=-1).unsqueeze(2)
        return (angles.cos() * self.scale).to(dtype), (angles.sin() * self.scale).to(dtype)


def transformer_config(config: PreTrainedConfig, options: ModelOptions) -> TransformerConfig:
    """Megatron-Core's config of a model in a layout."""
    dtype = TORCH_DTYPES[options.dtype]
    recompute = (
        dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1) if options.recompute else {}
    )
    built = TransformerConfig(
        **family_of(config.model_type).settings(config),
        **recompute,
        activation_func=F.silu,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        tensor_model_parallel_size=options.tp,
        pipeline_model_parallel_size=options.pp,
        sequence_parallel=options.sequence_parallel,
        variable_seq_lengths=options.variable_lengths,
        moe_token_dispatcher_type="alltoall",  # Megatron-Core asks for it with variable lengths, experts or not
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=options.dtype == "bf16",
        fp16=options.dtype == "fp16",
        use_cpu_initialization=not torch.cuda.is_available(),
        perform_initialization=False,
        calculate_per_token_loss=True,
        deterministic_mode=options.deterministic,
        batch_p2p_comm=torch.cuda.is_available(),
    )
    built.flash_attention = options.flash_attention  # read by backend.CoreAttention
    return built


def build(config: PreTrainedConfig, options: ModelOptions) -> ChatModel:
    """The model of this process's pipeline stage and tensor-parallel part, its weights not yet loaded (zeros).

    Needs the process groups of `ranks.joined`.
    """
    from megatron.core import parallel_state

    megatron_config = transformer_config(config, options)
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    stage_layers = config.num_hidden_layers // options.pp
    model = ChatModel(
        config=megatron_config,
        transformer_layer_spec=block_spec(PlainProvider(), stage_layers, megatron_config.qk_layernorm),
        vocab_size=options.padded_vocab,
        max_sequence_length=config.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=is_tied(config),
        rope=RotaryTable(config, device),
        true_vocab=config.vocab_size,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()  # rows of vocabulary padding stay zero, whatever the checkpoint brings
    _mark_split_weights(model)
    return model.to(device)


def _mark_split_weights(model: torch.nn.Module) -> None:
    """Tell the gradient norm which weights are split over tensor-parallel ranks.

    Megatron-Core marks them while it initialises them, which is skipped here since every value comes from a checkpoint.
    """
    for module in model.modules():
        if isinstance(module, (ColumnParallelLinear, VocabParallelEmbedding)) and module.weight is not None:
            set_tensor_model_parallel_attributes(module.weight, True, 0, 1)
        elif isinstance(module, RowParallelLinear):
            set_tensor_model_parallel_attributes(module.weight, True, 1, 1)


def run_micro_batch(model: Any, batch: MicroBatch) -> Tensor:
    """A micro batch through (a wrapper of) ChatModel."""
    segments = None if batch.cu_seqlens is None else batch.cu_seqlens.diff().tolist()
    return model(batch.tokens, batch.position_ids, batch.labels, segments)


__all__ = ["ChatModel", "ModelOptions", "RotaryTable", "build", "run_micro_batch", "transformer_config"]
