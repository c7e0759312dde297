"""What every objective promises, each promise a function that raises :class:`Violation` where it is broken.

They register themselves as they are imported, and are checked in this order.
"""

from halos.testing.properties import values as values  # isort: skip
from halos.testing.properties import invariance as invariance  # isort: skip
from halos.testing.properties import effects as effects  # isort: skip
