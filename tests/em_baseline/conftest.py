from tests.kernels.gpu_fixtures import cupy, device, host

__all__ = ["cupy", "device", "host"]
