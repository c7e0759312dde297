"""Draw the value functions of losses, and say which of them are human-aware losses.

python scripts/plot_values.py [loss=kto,dpo,slic] [loss.KEY=VALUE] [output=values.png]
"""

from __future__ import annotations

import sys

from halos.commands.plot_values import run
from halos.config.one_line import end_with_one_line

if __name__ == "__main__":
    end_with_one_line(lambda: run(sys.argv[1:]))
