"""What ``halos check-gpu`` runs: is everything exact on this machine's devices, does nothing wait, how fast is it."""
