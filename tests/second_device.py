"""A second device on a machine that has one: tensors that say they are on `second:0`, and compute on the CPU.

A stand-in for a GPU in tests of what crosses from one device to the other. As on a GPU, an operation on tensors of both
devices fails, but for copies, numbers in tensors without dimensions, and indices that lie on the CPU. As on Apple's MPS,
there is no float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from e2e_sae_plugin.splice.transformer_lens import SplicedHookedTransformer

NAME = "second"
_COPIES = frozenset({"aten::_to_copy", "aten::copy_", "aten::_copy_from"})
_INDEXING = frozenset({"aten::index.Tensor", "aten::index_put_", "aten::index_put", "aten::_index_put_impl_"})


class OnSecond(Tensor):
    """A CPU tensor, `on_cpu`, under another device's name."""

    on_cpu: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnSecond:
        is_dense = inner.layout == torch.strided
        made = Tensor._make_wrapper_subclass(  # pyright: ignore[reportAttributeAccessIssue]
            cls,
            inner.shape,
            strides=inner.stride() if is_dense else None,
            storage_offset=inner.storage_offset() if is_dense else None,
            dtype=inner.dtype,
            device=torch.device(NAME, 0),
            requires_grad=inner.requires_grad,
        )
        made.on_cpu = inner
        return made

    @property
    def is_sparse(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.on_cpu.is_sparse  # the wrapper calls itself dense

    @property
    def data(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        return OnSecond(self.on_cpu.detach())

    @data.setter
    def data(self, value: Tensor) -> None:
        assert isinstance(value, OnSecond)
        self.on_cpu = value.on_cpu

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.on_cpu.untyped_storage()

    def to_dense(self, *args: Any, **kwargs: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return OnSecond(self.on_cpu.to_dense(*args, **kwargs)) if self.is_sparse else self

    def __repr__(self) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        return f"OnSecond({self.on_cpu})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})


class SecondDevice(TorchDispatchMode):
    """While it lasts, tensors can be made on `second` and moved there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})


def is_available() -> bool:
    """Whether this version of torch lets Python define a device."""
    return hasattr(backend_registration, "_setup_privateuseone_for_python_backend")


def _register() -> None:
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
    # What torch calls where it has switched modes and subclasses off, such as in `torch.tensor`.
    for name, function in (
        ("empty.memory_format", _empty),
        ("empty_strided", _empty_strided),
        ("_copy_from", _copy_from),
    ):
        torch.library.impl(f"aten::{name}", "privateuseone")(function)


class _Module:
    """What torch asks a device's module for."""

    is_initialized = is_available = staticmethod(lambda: True)
    current_device = staticmethod(lambda: 0)
    device_count = staticmethod(lambda: 1)
    _is_in_bad_fork = staticmethod(lambda: False)
    manual_seed_all = staticmethod(lambda _: None)
    get_amp_supported_dtype = staticmethod(lambda: [torch.bfloat16])
    # What is drawn there is drawn by the CPU's generator.
    get_rng_state = staticmethod(lambda _: torch.get_rng_state())
    set_rng_state = staticmethod(lambda state, _: torch.set_rng_state(state))


def _empty(size: Any, dtype: Any = None, **_: Any) -> OnSecond:
    if dtype == torch.float64:
        raise TypeError(f"Cannot convert a {NAME} Tensor to float64 dtype.")
    return OnSecond(torch.empty(size, dtype=dtype))


def _empty_strided(size: Any, stride: Any, dtype: Any = None, **_: Any) -> OnSecond:
    return OnSecond(torch.empty_strided(size, stride, dtype=dtype))


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    plain = [tensor.on_cpu if isinstance(tensor, OnSecond) else tensor for tensor in (source, target)]
    plain[1].copy_(plain[0])
    return target


def _compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
    is_second = any(isinstance(tensor, OnSecond) for tensor in tensors)
    _check_devices(func, tensors, is_second)
    wanted = kwargs.get("device")
    if wanted is not None:
        is_second = torch.device(wanted).type == NAME
        kwargs = {**kwargs, "device": torch.device("cpu")}
    if func._schema.name == "aten::copy_":
        is_second = isinstance(args[0], OnSecond)
    inner_args, inner_kwargs = tree_map(
        lambda leaf: leaf.on_cpu if isinstance(leaf, OnSecond) else leaf, (args, kwargs)
    )
    result = func(*inner_args, **inner_kwargs)
    if is_second:
        _check_dtypes(func, result)
    outer = {id(tensor.on_cpu): tensor for tensor in tensors if isinstance(tensor, OnSecond)}

    def wrapped(leaf: Any) -> Any:
        if id(leaf) in outer:
            return outer[id(leaf)]  # what is written in place stays the tensor it was
        return OnSecond(leaf) if isinstance(leaf, Tensor) and is_second else leaf

    return tree_map(wrapped, result)


def _check_devices(func: Any, tensors: list[Tensor], is_second: bool) -> None:
    schema = func._schema.name + (f".{func._schema.overload_name}" if func._schema.overload_name == "Tensor" else "")
    if not is_second or func._schema.name in _COPIES:
        return
    if schema in _INDEXING and isinstance(tensors[0], OnSecond):
        return
    on_cpu = [tensor for tensor in tensors if not isinstance(tensor, OnSecond) and tensor.ndim > 0]
    if on_cpu:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but {schema} got some on {NAME}:0 and "
            f"{[tuple(tensor.shape) for tensor in on_cpu]} on the CPU."
        )


def _check_dtypes(func: Any, result: Any) -> None:
    """As Apple's MPS, the device has no float64."""
    made = [leaf for leaf in tree_flatten(result)[0] if isinstance(leaf, Tensor)]
    if any(tensor.dtype == torch.float64 for tensor in made):
        raise TypeError(f"Cannot convert a {NAME} Tensor to float64 dtype ({func._schema.name}).")


DEVICES = [
    pytest.param(
        "second:0",
        marks=pytest.mark.skipif(not is_available(), reason="this torch has no devices made in Python"),
    ),
    pytest.param("cuda:0", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")),
]
SIDES = ["model", "sae"]
"""What is on the other device."""


@pytest.fixture(params=DEVICES)
def other_device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The other device's name."""
    if not request.param.startswith("second"):
        yield request.param
        return
    # Where a HookedTransformer starts at a block, it takes nothing but `type(start) == Tensor`.
    monkeypatch.setattr(SplicedHookedTransformer, "use_native_kernels", lambda *_: False)
    with SecondDevice():
        yield request.param


def places(side: str, other: str) -> tuple[str, str]:
    """(the SAE's device, the model's)."""
    return ("cpu", other) if side == "model" else (other, "cpu")


if is_available():
    _register()  # before the first backward of the process, which counts the devices that there are
