from .definition import Verdict as Verdict, is_halo as is_halo
from .shapes import Shape as Shape, gradient_bounds as gradient_bounds, shape as shape
from .tracing import Trace as Trace, trace as trace
from .values import ImpliedLoss as ImpliedLoss, Side as Side, sides as sides, value_curve as value_curve
