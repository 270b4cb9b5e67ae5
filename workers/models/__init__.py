"""The models: one file per architecture, and `load`, which gives any of them in one shape."""

from workers.models.device import describe_device, resolve_device
from workers.models.registry import LoadedModel, load

__all__ = ["LoadedModel", "describe_device", "load", "resolve_device"]
