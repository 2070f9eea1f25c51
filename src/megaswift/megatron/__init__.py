"""All that knows Megatron-Core. Its messages about packages that are not needed are silenced before anything here imports it."""

from megaswift.megatron import compat

compat.quiet()
