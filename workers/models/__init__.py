"""Models: one module per architecture, and `load`, which returns any of them as a `LoadedModel`."""

from workers.models.device import describe_device, resolve_device
from workers.models.registry import LoadedModel, load

__all__ = ["LoadedModel", "describe_device", "load", "resolve_device"]
