"""Driver of the Triton backend `cpu`, a stub. It drives no device, because Triton's interpreter runs the kernels
itself."""

from __future__ import annotations

from typing import Any

from triton.backends.driver import DriverBase


class CpuStub(DriverBase):  # type: ignore[misc] # Triton is not there where types are checked
    """Stub of a Triton driver, so that vLLM finds an active driver while the interpreter runs the kernels."""

    def __init__(self) -> None:
        pass

    @classmethod
    def is_active(cls) -> bool:
        """Return True: vLLM checks whether Triton has an active driver."""
        return True

    def map_python_to_cpp_type(self, ty: Any) -> Any:
        """Raise NotImplementedError: the interpreter never calls this method."""
        raise NotImplementedError

    def get_current_target(self) -> Any:
        """Raise NotImplementedError: the interpreter never calls this method."""
        raise NotImplementedError

    def get_active_torch_device(self) -> Any:
        """Return the device of the tensors."""
        import torch

        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        """Raise NotImplementedError: the interpreter never calls this method."""
        raise NotImplementedError
