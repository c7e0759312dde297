"""What a run needs: one optimizer step of the real model is traced without memory for its tensors.

1. :mod:`halos.estimation.step` builds the model, the objective and batches on PyTorch's meta device, whose tensors have
   shapes and no values, and runs the code of a training step on them.
2. :mod:`halos.estimation.functions` lets attention and autocast act there as on the device that is meant.
3. :mod:`halos.estimation.tracer` sees every operation: which memory is alive, what is computed, how many kernels.
4. :mod:`halos.estimation.division` says which of that memory ``ddp`` and ``fsdp`` divide, and what they add.
"""
