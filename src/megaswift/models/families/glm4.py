"""GLM-4-0414 and GLM-Z1: GLM with norms behind attention and MLP, too."""

from __future__ import annotations

from dataclasses import replace

from megaswift.models.families.glm import GLM
from megaswift.models.kinds import Kind
from megaswift.models.rules import norms_behind

GLM4 = replace(
    GLM,
    name="glm4",
    hf_types=("glm4",),
    rules=GLM.rules + norms_behind("post_self_attn_layernorm", "post_mlp_layernorm"),
    kind=lambda config, layer: Kind(qkv_bias=bool(config.attention_bias), norms="around"),
    tiny=GLM.tiny | {"attention_bias": False},
)
