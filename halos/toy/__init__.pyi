from .people import Annotator as Annotator
from .people_source import ToyPeopleSource as ToyPeopleSource
from .source import ToySource as ToySource
