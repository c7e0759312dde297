"""``model.cpu_kernels``: faster operations for a model that runs on a CPU in float32."""

from torch import nn

from halos.policy.kernels.elementwise import use_fewer_temporaries
from halos.policy.kernels.matmul import limit_kernel_caches, use_faster_products


def use_cpu_kernels(model: nn.Module) -> None:
    """Replace the model's operations by faster ones where a trial shows that results stay the same.

    Matrix products go to oneDNN on processors where that is faster, RMSNorm and SwiGLU use less memory, and oneDNN
    keeps a bounded number of kernels. Modules keep their names, weights and hooks. On other devices and in other
    precisions the modules compute as before.

    Args:
        model: a causal language model; its modules are changed in place.
    """
    limit_kernel_caches()  # before the first product: oneDNN reads its limits once
    use_faster_products(model)
    use_fewer_temporaries(model)
