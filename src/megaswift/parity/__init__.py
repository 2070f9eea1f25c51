"""The same rows through transformers and through the engine, and through the engine at several layouts, compared step by step."""
