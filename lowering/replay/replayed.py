"""Functions whose calls are recorded and replayed."""

from __future__ import annotations

import functools
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from structfly.compat import sees_operations
from structfly.lowering.autocast import without_autocast
from structfly.lowering.direct_launch import has_launch_hooks
from structfly.lowering.launch import on_device
from structfly.lowering.precision import tf32_allowed
from structfly.lowering.replay.forms import form_of
from structfly.lowering.replay.recorder import Recorder
from structfly.lowering.replay.recording import Recording

_FORMS = 256  # of calls of a function that are remembered; those used longest ago are forgotten
_RECORDINGS = 8  # of calls of one form that look up different things about their tensors
_LOG = logging.getLogger(__name__)

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])


class _Form:
    """What is known of the calls of one form."""

    def __init__(self) -> None:
        self.recordings: list[Recording] = []
        self.why_not = ""


class _Forms(threading.local):
    """A thread's own, for a recording serves one call at a time."""

    def __init__(self) -> None:
        self.known: OrderedDict[Hashable, _Form] = OrderedDict()

    def find(self, key: Hashable) -> _Form | None:
        """The form, None when it is first asked for."""
        form = self.known.get(key)
        if form is None:
            self.known[key] = _Form()
            if len(self.known) > _FORMS:
                self.known.popitem(last=False)
        else:
            self.known.move_to_end(key)
        return form


def replayed(function: FunctionT) -> FunctionT:
    """The same function; of its calls on GPUs the second of a form is recorded, and later ones are replayed.

    What it does may depend on the forms of its arguments and on numbers among them, on what
    :func:`~structfly.lowering.remembered.remembered` finds about tensors, and on nothing else that changes.  A call
    that reads on the host what a tensor holds, or uses a tensor that it neither was given nor made, is not recorded.
    """
    forms = _Forms()

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        device = _device_of(arguments)
        if device is None or not _replays(device) or has_launch_hooks() or sees_operations():
            return function(*arguments)
        key, tensors = form_of(arguments)
        form = forms.find((key, _settings()))
        with on_device(device):
            if form is None or form.why_not:  # when it is first called, kernels may have to be compiled
                return function(*arguments)
            with without_autocast(device):
                for recording in form.recordings:
                    done, result = recording.replay(tensors)
                    if done:
                        return result
            if len(form.recordings) >= _RECORDINGS:
                return function(*arguments)
            return _recorded(function, arguments, tensors, form)

    return cast(FunctionT, call)


def _recorded(function: Callable[..., Any], arguments: Any, tensors: list[Tensor], form: _Form) -> Any:
    with Recorder(tensors) as recorder:
        given = function(*arguments)
        result = recorder.value(given)
    form.why_not = recorder.why_not
    if recorder.why_not:
        _LOG.info("calls of %s are not replayed: %s", function.__qualname__, recorder.why_not)
    else:
        made = Recording(recorder.lookups, recorder.steps, result, len(tensors), recorder.memories)
        form.recordings.append(made)
    return given


def _replays(device: torch.device) -> bool:
    return device.type == "cuda"


def _device_of(value: Any) -> torch.device | None:
    """That of the first tensor in it."""
    if isinstance(value, Tensor):
        return value.device
    found = map(_device_of, value) if isinstance(value, (list, tuple)) else ()
    return next((each for each in found if each is not None), None)


def _settings() -> Hashable:
    """What else they depend on."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda"),
        torch.are_deterministic_algorithms_enabled(),
        tf32_allowed(),
    )
