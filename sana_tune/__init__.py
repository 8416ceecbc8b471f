"""sana_tune: a config-driven trainer for NVIDIA's Sana text-to-image models."""

__version__ = "0.1.0"
