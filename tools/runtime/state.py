"""Everything the next step depends on, as one snapshot: what a checkpoint holds and a resumed run starts from."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors.torch import load_file
from torch import Tensor, nn

from tools.runtime.checkpoint import MODEL_FILE, TRAINED_FILE, TRAINING_FILE, Files
from tools.runtime.ema import Ema


class Part(Protocol):
    """Something with a state of its own; state_dict may be collective: it is called on every process."""

    def state_dict(self) -> Mapping[str, Any]: ...

    def load_state_dict(self, state: Any) -> None: ...


class TrainingState:
    """Model, average, optimiser, loss scaler, random states, and the parts given by name.

    Args:
        net, optimizer: as `accelerator.prepare` returned them.
        ema: the average of the weights, if there is one.
        parts: progress, stream position, meter and so on.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        net: nn.Module,
        optimizer: Any,
        ema: Ema | None,
        parts: Mapping[str, Part],
    ) -> None:
        self._accelerator = accelerator
        self._net = accelerator.unwrap_model(net)
        self._optimizer = optimizer
        self._ema = ema
        self._parts = parts

    def snapshot(self, *, copy: bool) -> Files:
        """Return the files of a checkpoint; called on every process, only the first one's counts.

        Args:
            copy: whether the tensors must stay as they are while training goes on.
        """
        parts = {name: dict(part.state_dict()) for name, part in self._parts.items()}
        generators = gather_object([_generators(self._accelerator.device)])
        if not self._accelerator.is_main_process:
            return {}
        scaler = self._accelerator.scaler
        files: Files = {
            TRAINING_FILE: {
                "optimizer": self._optimizer.state_dict(),
                "scaler": scaler.state_dict() if scaler is not None else None,
                "generators": generators,
                "parts": parts,
            }
        }
        files[MODEL_FILE] = dict(self._net.state_dict() if self._ema is None else self._ema.model_state())
        if self._ema is not None:
            files[TRAINED_FILE] = dict(self._net.state_dict())
        host = {name: _on_host(content, copy) for name, content in files.items()}
        for name in {MODEL_FILE, TRAINED_FILE} & host.keys():  # safetensors knows no memory formats
            host[name] = {key: tensor.contiguous() for key, tensor in host[name].items()}
        return host

    def restore(self, path: Path) -> None:
        """Continue from the checkpoint folder `path`, also one of another number of processes.

        Raises:
            FileNotFoundError: it holds a model alone.
            ValueError: other code wrote it, whose state this one does not know.
        """
        if not (path / TRAINING_FILE).is_file():
            raise FileNotFoundError(
                f"{path} has no {TRAINING_FILE}: it holds a model to use, not a run to go on with; start a new run"
            )
        averaged = load_file(path / MODEL_FILE)
        self._net.load_state_dict(averaged if self._ema is None else load_file(path / TRAINED_FILE))
        if self._ema is not None:
            self._ema.load_model_state(averaged)
        training = torch.load(path / TRAINING_FILE, map_location="cpu", weights_only=True)
        saved = training["optimizer"]
        for group, own in zip(saved["param_groups"], self._optimizer.param_groups, strict=False):
            group["fused"] = own["fused"]  # how this machine computes, no part of the run's state
        self._optimizer.load_state_dict(saved)
        if self._accelerator.scaler is not None and training["scaler"] is not None:
            self._accelerator.scaler.load_state_dict(training["scaler"])
        rank = self._accelerator.process_index
        if rank < len(training["generators"]):  # a process more than there were keeps the run's seed
            _set_generators(training["generators"][rank], self._accelerator.device)
        for name, part in self._parts.items():
            try:
                part.load_state_dict(training["parts"][name])
            except KeyError as error:
                raise ValueError(
                    f"{path} has no {error} in its state of the {name}: other code wrote it; go on with that code "
                    "(commit in run.json), or start a new run"
                ) from error


def _on_host(content: Any, copy: bool) -> Any:
    """Bring the tensors of nested containers to the CPU; `copy` also those that are there already."""
    if isinstance(content, Tensor):
        return content.detach().to("cpu", copy=copy)
    if isinstance(content, dict):
        return {key: _on_host(value, copy) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return type(content)(_on_host(value, copy) for value in content)
    return content


def _generators(device: torch.device) -> dict[str, Any]:
    """Return the states of this process's global generators, as tensors and plain Python values.

    Nothing of ours draws from them after the initial weights; what a user adds might.
    """
    name, keys, *rest = np.random.get_state()  # noqa: NPY002  # what is saved is the global one
    state = {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys, np.int64)), *rest),
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set_generators(state: Mapping[str, Any], device: torch.device) -> None:
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
