"""Generation: what answers (transformers_backend), what asks (chat, questions) and what is kept (results)."""
