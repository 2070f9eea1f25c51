"""Conversion between a Hugging Face folder and a Megatron checkpoint by the family's rules, one tensor at a time.

No model is built and no process group is opened. Memory holds one tensor for each writing thread, whatever the model's
size. Both directions compute the SHA-256 of every Hugging Face tensor, so that the result can be compared with its source.
"""

from megaswift.weights.convert.model import FiniteCheck, check_megatron, digest
from megaswift.weights.convert.precision import Precisions, precisions_of_checkpoint, precisions_of_folder
from megaswift.weights.convert.round_trip import verify_round_trip, verify_written
from megaswift.weights.convert.to_hf import planned_hf_tensors
from megaswift.weights.convert.to_megatron import Conversion, hf_to_megatron, megatron_to_megatron

__all__ = [
    "Conversion", "FiniteCheck", "Precisions", "check_megatron", "digest",
    "hf_to_megatron", "megatron_to_megatron", "planned_hf_tensors", "precisions_of_checkpoint", "precisions_of_folder",
    "verify_round_trip", "verify_written",
]  # fmt: skip
