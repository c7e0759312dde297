"""What every objective promises: one function a promise, which raises :class:`Violation` if it is broken.

Importing a module registers its promises. They are checked in the order of these imports.
"""

from halos.testing.properties import values as values  # isort: skip
from halos.testing.properties import invariance as invariance  # isort: skip
from halos.testing.properties import effects as effects  # isort: skip
