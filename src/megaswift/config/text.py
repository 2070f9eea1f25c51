"""The options of `swift pt` that `swift sft` has not, and which of that command's mean nothing for plain text."""

from __future__ import annotations

from dataclasses import dataclass

from megaswift.config.parse import BaseArguments, option


@dataclass(kw_only=True)
class TextArguments(BaseArguments):
    """Continued pre-training: how much text is read, how documents share a row, and what the weights begin as."""

    train_tokens: str | None = option(
        None,
        "How much is trained on, as 500M or 2B (K, M, B, T: powers of a thousand); rounded up to a whole step.",
        count=True,
        unit="tokens",
    )
    reset_attention_mask: bool = option(
        True,
        "Attention and positions begin anew with each document of a row; false: a row is one text, as in Megatron-LM by default.",
    )
    init: str = option(
        "weights",
        "What the weights begin as: those of the model, or random ones for its config.json, drawn as transformers does from --seed.",
        ("weights", "random"),
    )
    dataset_test_ratio: float = option(
        0.001,
        "Share of each training dataset that validates: its last documents, enough for one row; 0 for none.",
        low=0,
        below=1,
    )
    packing: bool = option(True, "Documents are joined to full rows.")


# Options of `swift sft` that mean nothing for plain text, each with the reason.
NOT_OF_TEXT = {
    "template_type": "text has no chat template",
    "system": "text has no system prompt",
    "task_type": "text is continued, not judged",
    "num_labels": "text is continued, not judged",
    "problem_type": "text is continued, not judged",
    "template_date": "text has no chat template",
    "loss_scale": "every token of a text carries loss",
    "model_name": "no name is filled into text",
    "model_author": "no name is filled into text",
    "truncation_strategy": "a document that does not fit goes on in the next row",
    "packing": "rows of text are always full; true is what is done",
    "group_by_length": "all rows are equally long",
    "streaming": "text is read once, from its front to its end, in bounded memory; name#N reads the first N documents",
}
