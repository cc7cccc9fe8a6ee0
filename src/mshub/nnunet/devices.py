"""The devices a network can run on, by the names clients use."""

from __future__ import annotations

import torch

from mshub.errors import CaseError


def resolve_device(name: str) -> torch.device:
    """Return the torch device for `name`; what the machine lacks becomes the CPU, as clients send ``cuda`` blindly.

    Raises
    ------
    CaseError
        `name` is no device name.
    """
    name = (name or "auto").strip().lower()
    family = name.split(":")[0]
    if family not in ("auto", "cpu", "cuda", "gpu"):
        raise CaseError(f"The device {name!r} is unknown: expected auto, cpu, cuda or cuda:N.")
    if family == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    index = name.partition(":")[2]
    if index.isdigit() and int(index) < torch.cuda.device_count():
        return torch.device("cuda", int(index))
    return torch.device("cuda", 0)


def candidate_devices(name: str) -> tuple[torch.device, ...]:
    """Return the devices that may serve a request for `name`: every GPU where it names none by number.

    Raises
    ------
    CaseError
        `name` is no device name.
    """
    device = resolve_device(name)
    if device.type != "cuda" or name.strip().partition(":")[2].isdigit():
        return (device,)
    return tuple(torch.device("cuda", index) for index in range(torch.cuda.device_count()))


def available_devices() -> list[str]:
    """Return the names of the devices predictions can run on, the preferred one first."""
    cuda = [f"cuda:{index}" for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return [*cuda, "cpu"]
