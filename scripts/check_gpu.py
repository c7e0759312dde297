"""Check this machine's devices: exactness, waits, strategies, speed: ``python scripts/check_gpu.py output=out/gpu``."""

from halos.cli import main_command

if __name__ == "__main__":
    main_command("check-gpu")
