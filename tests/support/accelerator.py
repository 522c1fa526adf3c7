"""A device that isn't the CPU, on the CPU: tells whether all tensors of a run lie where they should.

Its tensors hold CPU tensors and compute with them, but meet no tensor of the CPU, except where a GPU's do too: numbers
(no dimensions), indices and copies. So a run on it fails where one on a GPU would, and ends in the numbers of the CPU.

    python tests/support/accelerator.py [arguments of python -m tav_core, with --device npu]
"""

import torch
from torch import Tensor, nn
from torch.library import Library
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "npu"  # a device that ComfyUI knows, and that no Python package but PyTorch's own plays
DEVICE = torch.device("cpu")  # until `register`
CPU = torch.device("cpu")
MADE = (
    "empty.memory_format",
    "empty_strided",
    "copy_",
    "arange",
    "arange.start",
    "arange.start_step",
)  # how tensors come there
aten = torch.ops.aten
COPIES = (aten._to_copy.default, aten.copy_.default, aten.to.other)
# a CPU takes long for them in half precision, so they are computed in float32 there and rounded, as a GPU adds up in
# float32
PRODUCTS = (aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default, aten.convolution.default,
            aten.convolution_backward.default)  # fmt: skip
HALF = ({torch.float16}, {torch.bfloat16})
INDEXED = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)


class OnDevice(Tensor):
    """A tensor of the pretended device; `held` has its values."""

    @staticmethod
    def __new__(cls, held: Tensor):
        self = Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
        )
        self.held = held
        return self

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, new: Tensor):
        set_data(self, new)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return compute(function, args, kwargs or {})

    def __repr__(self):
        return f"OnDevice({self.held})"


def compute(function, args: tuple, kwargs: dict):
    if function == aten._has_compatible_shallow_copy_type.default:
        return False
    leaves: list = []
    each(leaves.append, (args, kwargs))
    given = [x for x in leaves if isinstance(x, Tensor)]
    ours = {id(x.held): x for x in given if isinstance(x, OnDevice)}
    there = bool(ours)
    for wanted in leaves:
        if isinstance(wanted, torch.device):
            there = wanted.type == NAME
    if ours and function not in COPIES:
        for x in given:
            if not isinstance(x, OnDevice) and x.dim() and not (function in INDEXED and x is not args[0]):
                raise RuntimeError(f"{function}: a tensor {tuple(x.shape)} is on {x.device}, another on {DEVICE}")
    generator = kwargs.get("generator")
    if generator is not None and there:
        raise RuntimeError(f"{function}: the generator is on {generator.device}, the tensor on {DEVICE}")
    args, kwargs = each(
        lambda x: x.held if isinstance(x, OnDevice) else CPU if isinstance(x, torch.device) else x, (args, kwargs)
    )
    dtypes = {x.dtype for x in given}
    if function in PRODUCTS and dtypes in HALF:
        result = cast(function(*cast(args, torch.float32), **kwargs), *dtypes)
    else:
        result = function(*args, **kwargs)
    if function == aten.copy_.default:
        there = id(result) in ours
    if not there:
        return result

    def placed(x):
        if not isinstance(x, Tensor) or isinstance(x, OnDevice):
            return x
        return ours[id(x)] if id(x) in ours else OnDevice(x)

    return each(placed, result)


def each(function, tree):
    """The tree of its values; PyTorch's own `tree_map` takes as long as the operations of tiny models."""
    if isinstance(tree, (tuple, list)):
        return type(tree)([each(function, x) for x in tree])
    if isinstance(tree, dict):
        return {name: each(function, x) for name, x in tree.items()}
    return function(tree)


def cast(tree, dtype: torch.dtype):
    return each(lambda x: x.to(dtype) if isinstance(x, Tensor) else x, tree)


def set_data(tensor: Tensor, new: Tensor):
    """`tensor.data = new`, which may bring a parameter to the device."""
    if not isinstance(new, OnDevice):
        Tensor.data.__set__(tensor, new)
    elif isinstance(tensor, OnDevice) and not new.is_inference() and not tensor.is_inference():
        Tensor.data.__set__(tensor, new)
        tensor.held = new.held
    else:  # tensors of two kinds
        torch.utils.swap_tensors(tensor, nn.Parameter(new, tensor.requires_grad))


class Module(_DummyBackendModule):
    """`torch.npu`. `free`: its memory, bytes, of which nothing is ever used."""

    def __init__(self, free: int):
        self.free = free

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def memory_stats(self, device: torch.device) -> dict[str, int]:
        return {"reserved_bytes.all.current": 0, "active_bytes.all.current": 0}

    def mem_get_info(self, device: torch.device) -> tuple[int, int]:
        return self.free, self.free

    def empty_cache(self):
        pass


def register(free: int = 16_000_000_000):
    global DEVICE
    _setup_privateuseone_for_python_backend(NAME, Module(free))
    torch.__future__.set_swap_module_params_on_conversion(True)
    nn.Parameter.data = property(Tensor.data.__get__, set_data)
    DEVICE = torch.device(NAME, 0)
    register.operators = Library("aten", "IMPL")  # they end with it
    for name in MADE:
        packet, _, overload = name.partition(".")
        operator = getattr(getattr(aten, packet), overload or "default")
        register.operators.impl(
            name, lambda *args, operator=operator, **kwargs: compute(operator, args, kwargs), "PrivateUse1"
        )


if __name__ == "__main__":
    register()
    from tav_core.cli import main

    main()
