"""Draw the value functions of losses, and say which of them are human-aware losses.

python scripts/plot_values.py [loss=kto,dpo,slic] [output=values.png]
"""

from __future__ import annotations

from halos.theory.command import main

if __name__ == "__main__":
    main()
