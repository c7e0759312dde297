from .source import ToySource as ToySource
