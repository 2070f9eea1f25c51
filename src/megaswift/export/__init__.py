"""The work of `swift export`, in both directions."""
