"""What a layer of a model is made of, by names for which the engine has modules."""

from __future__ import annotations

from dataclasses import dataclass

MAIN = "main"  # the rotation of a model that has one
QUERIES = "queries"  # the same, for queries that grow with their position
ALPHA = "alpha"  # the same, with a base that grows by `alpha` of rope_parameters
GATED_DELTA = "gated_delta"  # linear attention: a state of each head, by the gated delta rule
EXPERTS = "experts"  # the MLP that is many, of which a router chooses some for each token
LATENT = "latent"  # attention whose keys and values, and mostly its queries, come from narrow states


@dataclass(frozen=True)
class Experts:
    """A layer's experts, and how its router chooses among them.

    Args:
        count: how many there are.
        chosen: how many each token goes to.
        ffn: rows of the gate, and of the up projection, of one expert.
        score: "softmax" over all experts, or "sigmoid" of each by itself.
        renormalise: whether the scores of the chosen experts are divided by their sum.
        least: what that sum is taken for at least.
        factor: what the weights are multiplied by then.
        groups, kept: experts are chosen within the `kept` best of so many groups; 1: among all.
        group_score: what a group counts by: "two best", the sum of these scores, or "best", the largest.
        bias: whether a bias, which training leaves alone, is added to the scores for the choice, but not to the weights.
        shared_ffn: the same rows of an expert beside them that every token goes to; 0: there is none.
        biases: whether the router and the products of each expert have biases.
        clamp: limit and slope of a gate that is clamped (see `kernels/biased_experts.py`); None: the gate is SiLU's.
        shared_gate: whether each token weighs what that expert gives by a gate of its own.
    """

    count: int
    chosen: int
    ffn: int
    score: str = "softmax"
    renormalise: bool = True
    least: float = 0.0
    factor: float = 1.0
    groups: int = 1
    kept: int = 1
    group_score: str = "two best"
    bias: bool = False
    shared_ffn: int = 0
    shared_gate: bool = False
    biases: bool = False
    clamp: tuple[float, float] | None = None


@dataclass(frozen=True)
class Delta:
    """Linear attention by the gated delta rule.

    Args:
        key_heads: heads of queries and keys; `heads`: of values, as many of them for each key head.
        key_dim, value_dim: their sizes.
        width: how many tokens the convolution before them sees.
    """

    key_heads: int
    heads: int
    key_dim: int
    value_dim: int
    width: int

    @property
    def channels(self) -> int:
        """Rows of queries, keys and values."""
        return 2 * self.key_heads * self.key_dim + self.heads * self.value_dim


@dataclass(frozen=True)
class Latent:
    """The sizes of attention whose keys and values are made from one narrow state of each token (https://arxiv.org/abs/2405.04434).

    Args:
        query: width of the state that queries are made from; None: they are made from the layer's input.
        key_value: width of the state that keys and values of all heads are made from.
        still, turning: features of a head's query and key that know no position, and that rotate; the key's are one for all heads.
        value: features of a head's value.
        neighbours: whether features that stand beside each other rotate together, or those of two halves.
        epsilon: what the norms of the narrow states add to a variance.
    """

    query: int | None
    key_value: int
    still: int
    turning: int
    value: int
    neighbours: bool = True
    epsilon: float = 1e-6


@dataclass(frozen=True)
class Kind:
    """What one layer computes. `megatron/layer_specs.py` has a module for each name and refuses any other.

    Args:
        attention, mlp, norm: how the layer attends, what its MLP is ("gated", "plain" without a gate, or EXPERTS), and which
            norm stands with each of the two.
        activation: the function in the MLP; the same in all layers.
        norms: where norms stand: "before" attention and MLP, "behind" them, before what they give is added, or "around": both.
        beside: whether attention and MLP take the same normed states, so that one norm stands before the two.
        rotation: which rotation tables query and key take: MAIN, ALPHA, or the name under which `rope_parameters` has others
            (a layer type); None: the layer knows no positions (NoPE).
        query_rotation: which tables queries take where they are not those of the keys (QUERIES); None: the same.
        window: how many tokens a token sees, itself among them; None: all before it.
        score_cap: a score s becomes score_cap * tanh(s / score_cap); None: it stays.
        sinks: whether each head's softmax has one score more, which no key has and which is trained.
        qk_norm: whether each head's query and key go through the norm, before they rotate.
        qk_norm_over_heads: whether that norm goes over all heads together.
        qk_norm_rotated: whether they go through it after they rotate.
        qkv_bias: whether the product for query, key and value has a bias.
        bias: whether it, attention's output and the MLP's products have one; the same in all layers.
        output_gate: whether each head's result is multiplied by the sigmoid of a gate, which comes with its query; the same in all
            layers that attend.
        residual_factor: what the results of attention and MLP are multiplied by before they are added.
        experts: what an MLP of the name EXPERTS is made of; None with any other MLP.
        delta: what an attention of the name GATED_DELTA is made of; None with any other.
        latent: what attention of the name LATENT is made of; None with any other.
    """

    attention: str = "grouped_query"
    mlp: str = "gated"
    norm: str = "rms"
    activation: str = "silu"
    norms: str = "before"
    beside: bool = False
    rotation: str | None = MAIN
    query_rotation: str | None = None
    window: int | None = None
    score_cap: float | None = None
    sinks: bool = False
    qk_norm: bool = False
    qk_norm_over_heads: bool = False
    qk_norm_rotated: bool = False
    qkv_bias: bool = False
    bias: bool = False
    output_gate: bool = False
    residual_factor: float = 1.0
    experts: Experts | None = None
    delta: Delta | None = None
    latent: Latent | None = None


@dataclass(frozen=True)
class Factors:
    """What a model multiplies and caps before its first and after its last layer.

    Args:
        embedding: what embeddings are multiplied by.
        embedding_rounded: whether that number is rounded to the model's precision first.
        logits: what logits are multiplied by.
        logit_cap: a logit x becomes logit_cap * tanh(x / logit_cap) then; None: it stays.
    """

    embedding: float = 1.0
    embedding_rounded: bool = False
    logits: float = 1.0
    logit_cap: float | None = None
