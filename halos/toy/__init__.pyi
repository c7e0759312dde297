from .people import Annotator as Annotator
from .source import ToySource as ToySource
from .topics_source import ToyTopicsSource as ToyTopicsSource
